"""The importer `toml`: sections, the text `"null"`, environment variables, and options that depend on each other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

REQUIRED_KEYS = '[fine_tuner]\nbase_model_id = "org/m"\ntraining_data_id = "org/d"\n'


@pytest.fixture
def import_toml(write_file: WriteFile) -> Any:
    """Return a function that writes a TOML file with the required keys followed by `text`, and imports it."""

    def run(text: str = "", words: str = "", base_text: str = REQUIRED_KEYS, **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.toml", base_text + text), words=words, source="toml", **request_fields)

    return run


def test_a_minimal_file_gets_the_values_of_the_tools_example(import_toml: Any) -> None:
    import_outcome = import_toml()
    assert import_outcome.spec["training"] == {
        "epochs": 30, "learningRate": 2e-4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4, "warmupSteps": 5, "scheduler": "linear",
        "optimizer": "paged_adamw_8bit", "weightDecay": 0.01, "maxGradNorm": 1, "seed": 42, "gradientCheckpointing": "unsloth",
    }  # fmt: skip
    assert import_outcome.spec["model"] == {
        "source": "org/m", "quantization": {"bits": 4, "type": "nf4"}, "dtype": "auto", "attention": "flashAttention2",
    }  # fmt: skip
    assert import_outcome.at("method.type") == "qlora"
    assert import_outcome.at("dataset.responseOnly") == {"enabled": True}
    assert import_outcome.at("output.hub") is None


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("dtype = null\n", 'job.toml:4: fine_tuner.dtype: an unquoted null is not TOML; write "null", or remove the key'),
        ("packing = True\n", "job.toml:4: fine_tuner.packing: True is not TOML; write true"),
        ("weight_decay = .5\n", "job.toml:4: fine_tuner.weight_decay: .5 is not TOML; write 0.5"),
        ("epochs = 1\nepochs = 2\n",
         "job.toml:5: fine_tuner.epochs: fine_tuner.epochs is set twice: lines 4 and 5; keep one of them; a later file can override the value"),
        ("[finetuner]\nrank = 1\n", "job.toml:4: [finetuner]: unknown section; write one of fine_tuner, mlflow, inferencer, evaluator, pipeline"),
        ("ranks = 8\n", "job.toml:4: fine_tuner.ranks: unknown key; did you mean fine_tuner.rank?"),
        ("epochs = true\n", "job.toml:4: fine_tuner.epochs: true is not an integer; allowed: an integer of at least 1"),
        ("lora_dropout = 0.31\n", "job.toml:4: fine_tuner.lora_dropout: 0.31 is out of range; allowed: a number from 0 to 0.3"),
        ('system_prompt_override_text = "${NOBODY}"\n',
         "job.toml:4: fine_tuner.system_prompt_override_text: variable NOBODY is not set; set the variable, or write its value here"),
        ('report_to = "mlflow"\n', "job.toml:4: fine_tuner.report_to: mlflow needs a server, but no server is given; write [mlflow] tracking_uri"),
        ("tags = 1\n", "job.toml:4: fine_tuner.tags: unknown key; it is not an option of this TOML tool; remove it"),
    ],
)  # fmt: skip
def test_invalid_file_is_refused_with_its_line(import_toml: Any, text: str, mistake: str) -> None:
    assert import_toml(text, environment={}).mistakes == [mistake]


def test_numbers_and_quoted_numbers_are_read(import_toml: Any) -> None:
    import_outcome = import_toml('max_sequence_length = 1_024\nlearning_rate = "1e-4"\n')
    assert (import_outcome.at("dataset.maxSequenceLength"), import_outcome.at("training.learningRate")) == (1024, 1e-4)
    assert "is not a number" in import_toml('learning_rate = "1_000"\n').mistakes[0]


def test_multi_line_string_keeps_later_line_numbers(import_toml: Any) -> None:
    text = 'system_prompt_override_text = """You are\nepochs = 3\nbrief."""\nepochs = 0\n'
    assert import_toml(text).mistakes == [
        "job.toml:7: fine_tuner.epochs: 0 is out of range; allowed: an integer of at least 1"
    ]


@pytest.mark.parametrize(
    ("text", "method", "bits"),
    [
        ("load_in_4bit = true\n", "qlora", 4),
        ("load_in_4bit = false\n", "lora", None),
        ("load_in_4bit = false\nload_in_8bit = true\n", "lora", 8),
        ("load_in_8bit = true\n", "lora", 8),
        ("full_finetuning = true\n", "full", None),
        ("full_finetuning = true\nload_in_4bit = false\n", "full", None),
    ],
)
def test_options_select_method_and_bits(import_toml: Any, text: str, method: str, bits: int | None) -> None:
    import_outcome = import_toml(text)
    assert import_outcome.mistakes == []
    assert (import_outcome.at("method.type"), import_outcome.at("model.quantization.bits")) == (method, bits)


def test_full_fine_tuning_of_4_bit_weights_is_refused(import_toml: Any) -> None:
    (mistake,) = import_toml("full_finetuning = true\nload_in_4bit = true\n").mistakes
    assert mistake.startswith(
        "job.toml:4, job.toml:5: fine_tuner.full_finetuning, fine_tuner.load_in_4bit: full fine-tuning"
    )


def test_quantized_base_model_stays_quantized(write_file: WriteFile) -> None:
    text = REQUIRED_KEYS.replace("org/m", "org/m-bnb-4bit") + "load_in_4bit = false\n"
    import_outcome = import_files(write_file("job.toml", text))
    assert (import_outcome.at("method.type"), import_outcome.at("model.quantization.bits")) == ("qlora", 4)
    assert "holds 4-bit weights" in import_outcome.warnings[0]


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ("is_multimodel = true\n", {"visionLayers": True}),
        ("is_multimodel = true\nfinetune_vision_layers = false\nfinetune_mlp_modules = false\n", {"visionLayers": False, "mlpModules": False}),
    ],
)
def test_vision_layers_of_a_vision_model_are_trained_unless_they_are_turned_off(import_toml: Any, text: str, vision: dict[str, bool]) -> None:
    import_outcome = import_toml(text)
    assert import_outcome.mistakes == []
    assert (import_outcome.at("model.modality"), import_outcome.at("method.vision")) == ("visionLanguage", vision)


def test_vision_options_of_a_text_model_have_no_effect(import_toml: Any) -> None:
    import_outcome = import_toml("finetune_vision_layers = true\n")
    assert import_outcome.at("method.vision") is None and import_outcome.at("model.modality") is None
    assert any("the model is not multimodal" in warning for warning in import_outcome.warnings)


def test_loftq_options_are_read_and_explained(import_toml: Any) -> None:
    import_outcome = import_toml("loftq_config = { loftq_bits = 4, loftq_iter = 2 }\n")
    assert import_outcome.at("method.lora.loftq") == {"bits": 4, "iterations": 1}
    assert (import_outcome.at("method.lora.init"), import_outcome.at("method.type"), import_outcome.at("model.quantization")) == (
        "loftq",
        "lora",
        None,
    )
    assert import_outcome.notes[0].startswith("loftq_iter 2 becomes 1: each further iteration changes the quantised base model")
    assert (
        import_outcome.notes[1]
        == "LoftQ with load_in_4bit: the trainer loads the base model in full precision, initialises the adapter, and then quantises the model"
    )


def test_loftq_with_a_quantized_base_model_is_refused(import_toml: Any) -> None:
    (mistake,) = import_toml("loftq_config = { loftq_bits = 4 }\n", base_text=REQUIRED_KEYS.replace("org/m", "org/m-bnb-4bit")).mistakes
    assert "LoftQ needs an unquantized base model" in mistake


def test_validation_data_enables_evaluation(import_toml: Any) -> None:
    import_outcome = import_toml('validation_data_id = "org/v"\n')
    assert import_outcome.spec["evaluation"] == {"strategy": "epoch", "batchSizePerDevice": 4}


def test_run_name_parts_are_read(import_toml: Any) -> None:
    text = 'report_to = "none"\n[mlflow]\nrun_name = "0.0.1"\nrun_name_prefix = "exp-"\nrun_name_suffix = "-v1"\n'
    assert import_toml(text).at("output.runName") == {"name": "0.0.1", "prefix": "exp-", "suffix": "-v1"}
    (mistake,) = import_toml(text.replace("exp-", "exp#")).mistakes
    assert "mlflow.run_name_prefix" in mistake


def test_repository_is_named_after_the_run(import_toml: Any) -> None:
    text = 'push_to_hub = true\n[mlflow]\nrun_name = "bot"\n[inferencer]\nhf_user_id = "me"\n'
    import_outcome = import_toml(text)
    reference = {"name": "job-hub", "key": "token"}
    assert import_outcome.spec["output"]["hub"] == {"push": True, "repository": "me/bot", "private": False, "tokenSecretRef": reference}
    assert any("kubectl create secret generic job-hub" in warning for warning in import_outcome.warnings)


def test_keys_on_the_command_line_are_written_to_the_secret(import_toml: Any) -> None:
    import_outcome = import_toml(
        'report_to = "wandb"\n', words="--hf-key hf_a1b2c3 --wandb-key wsecret --openai-key osecret --skip-evaluation"
    )
    assert import_outcome.secrets == {"hf-token": "hf_a1b2c3", "wandb-api-key": "wsecret", "openai-api-key": "osecret"}
    assert import_outcome.at("placement.env") == [
        {"name": "OPENAI_API_KEY", "secretKeyRef": {"name": "job-import", "key": "openai-api-key"}}
    ]
    assert import_outcome.at("phases.evaluate") is False


def test_password_in_a_uri_is_moved_to_the_secret(import_toml: Any) -> None:
    import_outcome = import_toml('[mlflow]\ntracking_uri = "https://bob:pa55word@host/x"\n')
    assert import_outcome.at("tracking.mlflow.trackingUri") == "https://host/x"
    assert import_outcome.secrets == {"mlflow-tracking-username": "bob", "mlflow-tracking-password": "pa55word"}
    assert "pa55word" not in str(import_outcome.documents[1:]) + str(import_outcome.warnings)


def test_evaluation_and_phases_are_read(import_toml: Any) -> None:
    text = '[evaluator]\nmetrics = ["rouge_score", "answer_accuracy"]\nllm = "j"\nembedding = "text-embeddings-3-small"\ncost_per_million_input_tokens = 0.15\n'
    import_outcome = import_toml(text + "[pipeline]\nenable_inference = true\nstop_after_finetuning = true\n")
    assert import_outcome.at("evaluation.metrics") == ["rouge", "answerAccuracy"]
    assert import_outcome.at("evaluation.judge") == {"model": "j", "embedding": "text-embedding-3-small", "inputPrice": 0.15}
    assert import_outcome.at("phases") == {"infer": False, "evaluate": False}


TOML_CONFIG = '[fine_tuner]\nbase_model_id = "org/m"\ntraining_data_id = "org/d"\nreport_to = "none"\n'


def test_null_system_column_gives_a_note(write_file: WriteFile) -> None:
    import_outcome = import_files(write_file("a.toml", TOML_CONFIG + 'system_prompt_column = "null"\n'))
    assert import_outcome.at("dataset.columns") == {"question": "question", "answer": "answer"}
    assert any(note.startswith("system_prompt_column is null") for note in import_outcome.notes)
