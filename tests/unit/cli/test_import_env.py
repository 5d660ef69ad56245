"""The importer `env`: the syntax of .env files, which of several values of an option wins, and options that depend on each other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

REQUIRED_KEYS = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/d.jsonl\nDATASET_TYPE=instruction_jsonl\n"


@pytest.fixture
def import_env(write_file: WriteFile) -> Any:
    """Return a function that writes a .env file with the required keys followed by `text`, and imports it."""

    def run(text: str = "", words: str = "", base_text: str = REQUIRED_KEYS, **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.env", base_text + text), words=words, source="env", **request_fields)

    return run


def test_a_minimal_file_gets_the_defaults_of_the_tool(import_env: Any) -> None:
    import_outcome = import_env()
    assert import_outcome.spec["training"] == {
        "epochs": 3, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4, "learningRate": 3e-4, "scheduler": "linear", "warmupRatio": 0,
        "optimizer": "adamw_torch", "weightDecay": 0, "maxGradNorm": 1,
    }  # fmt: skip
    assert import_outcome.spec["method"] == {"type": "lora", "lora": {"rank": 8, "alpha": 16, "dropout": 0.1}}
    assert import_outcome.at("dataset.maxSequenceLength") == 512
    assert import_outcome.at("dataset.responseOnly.enabled") is False
    assert import_outcome.spec["checkpoint"] == {"keep": 0, "loadBestAtEnd": True, "steps": 100, "strategy": "steps"}
    assert import_outcome.at("output.dir") == "results"


def test_dotenv_syntax_is_read(import_env: Any) -> None:
    text = 'export PROJECT_NAME = "a.b"\nDEVICE=cpu  \nTOKENIZER=${MODEL_NAME}\nLORA_R=8 # small\nLORA_R=16\nPAD_TOKEN=a#b\n'
    import_outcome = import_env(text)
    assert import_outcome.at("output.project") == "a.b"
    assert import_outcome.at("training.device") == "cpu"
    assert import_outcome.at("model.tokenizer") == "org/m"
    assert import_outcome.at("method.lora.rank") == 16
    assert import_outcome.at("model.padToken") == "a#b"


def test_dollar_without_braces_is_literal(import_env: Any) -> None:
    assert import_env("PAD_TOKEN=$X\n").at("model.padToken") == "$X"


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("Copy code\n", "job.env:4: 'Copy code' does not have the form KEY=value; remove the line, or write KEY=value"),
        ("EPOCHS\n", "job.env:4: EPOCHS: the line has no `=` and no value; write EPOCHS=value, or EPOCHS= to leave it unset"),
        ("LERNING_RATE=1e-4\n", "job.env:4: LERNING_RATE: unknown key; did you mean LEARNING_RATE?"),
        ("PACKING=yes\n", 'job.env:4: PACKING: "yes" is not true or false; allowed: true, false'),
        ("EPOCHS=21\n", 'job.env:4: EPOCHS: "21" is out of range; allowed: an integer from 1 to 20'),
        ("LEARNING_RATE=1e-6\n", 'job.env:4: LEARNING_RATE: "1e-6" is out of range; allowed: a number from 1e-05 to 0.0005'),
        ("LEARNING_RATE=nan\n", 'job.env:4: LEARNING_RATE: "nan" is not a number; allowed: a number from 1e-05 to 0.0005'),
        ("BATCH_SIZE=1_0\n", 'job.env:4: BATCH_SIZE: "1_0" is not an integer; allowed: an integer from 1 to 32'),
        ("TOKENIZER=${NOBODY}\n", "job.env:4: TOKENIZER: variable NOBODY is not set; set the variable above this line, or write its value here"),
    ],
)  # fmt: skip
def test_an_invalid_line_is_refused_with_its_number(import_env: Any, text: str, mistake: str) -> None:
    assert import_env(text, environment={}).mistakes == [mistake]


def test_empty_required_option_is_refused(import_env: Any) -> None:
    assert import_env("TRAIN_DATA_PATH=\n").mistakes == ["job.env:4: TRAIN_DATA_PATH: this required option is empty"]


@pytest.mark.parametrize(
    ("ratios", "split"),
    [
        ("TRAIN_RATIO=0.85\nVAL_RATIO=0.15\n", (0.85, 0.15, 0)),
        ("TRAIN_RATIO=1.0\nVAL_RATIO=0.0\n", (1, 0, 0)),
        ("TRAIN_RATIO=0.7\nVAL_RATIO=0.2\nTEST_RATIO=0.1\n", (0.7, 0.2, 0.1)),
        ("TRAIN_RATIO=0.9\n", (0.9, 0.05, 0.05)),
        ("VAL_RATIO=0.2\n", (0.7, 0.2, 0.1)),
        ("VAL_RATIO=0.2\nTEST_RATIO=0.2\n", (0.6, 0.2, 0.2)),
        ("", (0.8, 0.1, 0.1)),
    ],
)
def test_split_ratios_are_completed(import_env: Any, ratios: str, split: tuple[float, float, float]) -> None:
    imported_split = import_env(ratios).spec["dataset"]["split"]
    assert (imported_split["train"], imported_split["validation"], imported_split["test"], imported_split["seed"]) == (*split, 42)


def test_ratios_above_one_are_refused(import_env: Any) -> None:
    (mistake,) = import_env("TRAIN_RATIO=0.8\nTEST_RATIO=0.3\n").mistakes
    assert "TRAIN_RATIO+TEST_RATIO = 1.1, but must be at most 1" in mistake


@pytest.mark.parametrize("text", ["TRAIN_RATIO=0\n", "VAL_RATIO=0.5\nTEST_RATIO=0.5\n"])
def test_split_without_training_rows_is_refused(import_env: Any, text: str) -> None:
    (mistake,) = import_env(text).mistakes
    assert "no rows are left for training" in mistake


def test_a_line_that_may_be_a_secret_is_shortened(import_env: Any) -> None:
    assert import_env("Sup3rS3cretValue\n").mistakes == [
        "job.env:4: Su...: the line has no `=` and no value; write Su...=value, or Su...= to leave it unset"
    ]


def test_validation_file_replaces_the_split(import_env: Any) -> None:
    import_outcome = import_env("VAL_DATA_PATH=s3://data/v.jsonl\nTRAIN_RATIO=0.9\n")
    assert import_outcome.at("dataset.split") is None
    assert import_outcome.at("dataset.validation") == "s3://data/v.jsonl"
    assert "job.env:5: TRAIN_RATIO has no effect" in import_outcome.warnings[0]


def test_zero_on_the_command_line_is_kept(import_env: Any) -> None:
    assert import_env(words="--lora_dropout 0").at("method.lora.dropout") == 0


def test_flags_override_the_file_and_may_be_abbreviated(import_env: Any) -> None:
    import_outcome = import_env("EPOCHS=2\nLEARNING_RATE=1e-4\n", words="python main.py --epochs=5 --learning_rat 2e-4 -lora_r 64")
    assert (import_outcome.at("training.epochs"), import_outcome.at("training.learningRate"), import_outcome.at("method.lora.rank")) == (
        5,
        2e-4,
        64,
    )


def test_later_files_override_earlier_ones_per_key(write_file: WriteFile) -> None:
    first_path, second_path = write_file("a.env", REQUIRED_KEYS + "EPOCHS=2\nBATCH_SIZE=8\n"), write_file("b.env", "EPOCHS=7\n")
    import_outcome = import_files(first_path, second_path, source="env")
    assert (import_outcome.at("training.epochs"), import_outcome.at("training.batchSizePerDevice")) == (7, 8)


def test_config_flag_of_the_tool_reads_a_file(write_file: WriteFile) -> None:
    import_outcome = import_files(
        words=["python", "main.py", "--config", str(write_file("x.env", REQUIRED_KEYS)), "--epochs", "1"], source="env"
    )
    assert (import_outcome.at("model.source"), import_outcome.at("training.epochs")) == ("org/m", 1)


@pytest.mark.parametrize(
    ("text", "method", "bits"),
    [
        ("TECHNIQUE=lora\n", "lora", None),
        ("TECHNIQUE=qlora\n", "qlora", 4),
        ("TECHNIQUE=lora\nLOAD_IN_4BIT=TRUE\n", "qlora", 4),
        ("TECHNIQUE=dora\nLOAD_IN_4BIT=true\n", "dora", 4),
    ],
)
def test_technique_and_bits_select_the_method(import_env: Any, text: str, method: str, bits: int | None) -> None:
    import_outcome = import_env(text)
    assert (import_outcome.at("method.type"), import_outcome.at("model.quantization.bits")) == (method, bits)


def test_qlora_without_4_bit_loading_is_refused(import_env: Any) -> None:
    (mistake,) = import_env("TECHNIQUE=qlora\nLOAD_IN_4BIT=False\n").mistakes
    assert mistake.startswith("job.env:4, job.env:5: TECHNIQUE, LOAD_IN_4BIT: qlora loads the base model in 4 bits")


def test_an_override_names_the_adapter(import_env: Any) -> None:
    import_outcome = import_env("TECHNIQUE=adapter\n", overrides={"method.adapter.source": "s3://models/a"})
    assert import_outcome.spec["method"] == {"type": "adapter", "adapter": {"source": "s3://models/a"}}


@pytest.mark.parametrize(
    ("device", "gpus", "precision"), [("cpu", 0, "no"), ("cuda", 1, "fp16"), ("auto", None, None), ("mps", None, "no")]
)
def test_device_sets_gpus_and_precision(import_env: Any, device: str, gpus: int | None, precision: str | None) -> None:
    import_outcome = import_env(f"DEVICE={device}\n")
    assert (import_outcome.at("resources.gpusPerNode"), import_outcome.at("training.mixedPrecision")) == (gpus, precision)
    assert import_outcome.at("training.device") == (None if device == "auto" else device)
    assert any("cluster nodes have no MPS devices" in warning for warning in import_outcome.warnings) == (device == "mps")


def test_token_is_written_only_to_the_secret(import_env: Any) -> None:
    import_outcome = import_env("HUGGINGFACE_TOKEN=hf_verysecret\nUSE_AUTH_TOKEN=True\n")
    assert import_outcome.secrets == {"hf-token": "hf_verysecret"}
    assert import_outcome.at("model.tokenSecretRef") == {"name": "job-import", "key": "hf-token"}
    secret, job = import_outcome.documents
    assert secret["stringData"] == {"hf-token": "hf_verysecret"}
    assert "hf_verysecret" not in str(job) + str(import_outcome.warnings) + str(import_outcome.notes)


def test_refused_file_does_not_print_its_secrets(import_env: Any) -> None:
    import_outcome = import_env(
        "HUGGINGFACE_TOKEN=verysecret\nMODEL_TOKEN=othersecret\nPAD_TOKEN=verysecret\nEPOCHS=verysecret\nverysecret\n"
    )
    assert len(import_outcome.mistakes) == 3
    assert "verysecret" not in str(import_outcome.mistakes)
    assert "othersecret" not in str(import_outcome.mistakes)


def test_mongodb_uri_is_written_to_the_secret(import_env: Any) -> None:
    import_outcome = import_env("MONGODB_URI=mongodb://u:p@host/db\nMONGODB_DB_NAME=runs\n")
    assert import_outcome.spec["tracking"]["mongodb"] == {
        "database": "runs",
        "uriSecretRef": {"name": "job-import", "key": "mongodb-uri"},
    }
    assert import_outcome.at("tracking.reportTo") == ["mongodb"]


def test_local_paths_become_file_sources_with_a_warning(import_env: Any) -> None:
    import_outcome = import_env(base_text="MODEL_NAME=/models/tiny\nTRAIN_DATA_PATH=data/x.jsonl\nDATASET_TYPE=qa\n")
    assert (import_outcome.at("model.source"), import_outcome.at("dataset.train")) == ("file:///models/tiny", "file://data/x.jsonl")
    assert ["--model URI" in import_outcome.warnings[0], "--data URI" in import_outcome.warnings[1]] == [True, True]


def test_a_prompts_file_becomes_a_config_map_reference(import_env: Any) -> None:
    import_outcome = import_env("PROMPTS_FILE=./my prompts.txt\n")
    assert import_outcome.at("evaluation.comparison.promptsRef") == {"name": "job-prompts", "key": "my_prompts.txt"}
    assert "kubectl create configmap job-prompts" in import_outcome.warnings[0]


@pytest.mark.parametrize(
    ("dataset_type", "file", "dataset_format"),
    [
        ("text", "a.txt", "plainText"),
        ("text", "a.jsonl", "promptCompletion"),
        ("conversation", "a.jsonl", "messages"),
        ("qa", "a.csv", "qa"),
    ],
)
def test_dataset_types_of_later_versions_are_read(import_env: Any, dataset_type: str, file: str, dataset_format: str) -> None:
    assert import_env(base_text=f"TRAIN_DATA_PATH=s3://data/{file}\nDATASET_TYPE={dataset_type}\n").at("dataset.format") == dataset_format


def test_evaluation_options_without_validation_data_have_no_effect(import_env: Any) -> None:
    import_outcome = import_env("TRAIN_RATIO=1\nVAL_RATIO=0\nEVAL_STEPS=10\n")
    assert import_outcome.at("checkpoint") == {"strategy": "epoch", "keep": 0}
    assert import_outcome.at("evaluation") is None
    assert import_outcome.warnings == ["job.env:6: EVAL_STEPS has no effect: there is no validation data"]


def test_adapter_options_have_no_effect_on_an_existing_adapter(import_env: Any) -> None:
    import_outcome = import_env(
        "TECHNIQUE=adapter\nLORA_R=8\nLORA_DROPOUT=0.2\n", overrides={"method.adapter.source": "s3://models/adapter"}
    )
    assert (import_outcome.mistakes, import_outcome.spec["method"]) == (
        [],
        {"type": "adapter", "adapter": {"source": "s3://models/adapter"}},
    )
    no_effect_warnings = [
        warning for warning in import_outcome.warnings if "has no effect: the existing adapter defines this value" in warning
    ]
    assert [warning.split(": ")[1].split(" ")[0] for warning in no_effect_warnings] == ["LORA_R", "LORA_DROPOUT"]


def test_4_bit_quantisation_has_the_defaults_of_the_tool(write_file: WriteFile) -> None:
    text = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/d.jsonl\nDATASET_TYPE=qa\nTECHNIQUE=qlora\n"
    import_outcome = import_files(write_file("a.env", text))
    assert import_outcome.at("model.quantization") == {"bits": 4, "type": "nf4", "doubleQuant": False}
    import_outcome = import_files(write_file("a.env", text + "DEVICE=cuda\nBNB_4BIT_USE_DOUBLE_QUANT=true\n"))
    assert import_outcome.at("model.quantization") == {
        "bits": 4,
        "type": "nf4",
        "doubleQuant": True,
        "computeDtype": "float16",
    }


def test_token_is_ignored_when_use_auth_token_is_false(import_env: Any) -> None:
    import_outcome = import_env("HUGGINGFACE_TOKEN=hf_verysecret\nUSE_AUTH_TOKEN=false\n")
    assert (import_outcome.secrets, import_outcome.at("model.tokenSecretRef")) == ({}, None)
    assert import_outcome.warnings == ["job.env:4: HUGGINGFACE_TOKEN has no effect: USE_AUTH_TOKEN is false"]
