"""The importer `guide`, for flat and nested configurations."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

NESTED_CONFIG = "base_model: {name: mistralai/M}\nlora: {r: 8, lora_alpha: 16}\n"


@pytest.fixture
def import_guide(write_file: WriteFile) -> Any:
    """Return a function that imports a configuration with the importer `guide`."""

    def run(text: str, words: str = "", **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.yaml", text), words=words, source="guide", **request_fields)

    return run


@pytest.mark.parametrize("text", ["model: org/m\nlora_r: 8\n", NESTED_CONFIG])
def test_both_forms_have_the_same_defaults(import_guide: Any, text: str) -> None:
    import_outcome = import_guide(text)
    assert import_outcome.spec["training"] == {
        "epochs": 3, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4, "learningRate": 2e-4, "scheduler": "linear", "warmupRatio": 0.03,
        "optimizer": "adamw_torch", "weightDecay": 0, "maxGradNorm": 1, "mixedPrecision": "bf16",
    }  # fmt: skip
    assert import_outcome.spec["method"]["lora"]["rank"] == 8
    assert (import_outcome.at("dataset.maxSequenceLength"), import_outcome.at("checkpoint.keep"), import_outcome.at("dataset.train")) == (
        512,
        3,
        None,
    )
    assert any("names no training data" in warning for warning in import_outcome.warnings)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lora_r: 8\n", "lora"),
        ("lora_r: 8\nuse_4bit: true\n", "qlora"),
        ("lora_r: 8\nuse_4bit: false\n", "lora"),
        ("use_4bit: true\n", "qlora"),
    ],
)
def test_the_options_select_the_method(import_guide: Any, text: str, method: str) -> None:
    assert import_guide("model: org/m\n" + text).at("method.type") == method


def test_file_without_a_method_is_refused(import_guide: Any) -> None:
    (mistake,) = import_guide("model: org/m\nuse_4bit: false\n").mistakes
    assert "the file selects no method" in mistake


def test_target_modules_are_chosen_by_model_family(import_guide: Any) -> None:
    text = "base_model: {name: meta-llama/Llama-3}\nlora: {r: 8, target_modules: {mistral: [a], llama: [b, c]}}\n"
    assert import_guide(text).at("method.lora.targetModules") == ["b", "c"]
    (mistake,) = import_guide(text.replace("meta-llama/Llama-3", "org/gpt")).mistakes
    assert "none of the model families mistral, llama occurs in the model name org/gpt" in mistake


def test_bf16_training_overrides_float16_weights(import_guide: Any) -> None:
    import_outcome = import_guide("base_model: {name: m/m, dtype: float16}\nlora: {r: 8}\ntraining: {bf16: true}\n")
    assert (import_outcome.at("model.dtype"), import_outcome.at("training.mixedPrecision")) == ("bfloat16", "bf16")
    assert "the job uses bfloat16" in import_outcome.warnings[0]


def test_callbacks_set_early_stopping_and_trackers(import_guide: Any) -> None:
    text = (
        NESTED_CONFIG
        + "dataset: {eval_size: 0.1}\ncallbacks: {early_stopping: {enabled: true}, wandb: {enabled: true, project: p}}\n"
    )
    import_outcome = import_guide(text)
    assert import_outcome.at("training.earlyStopping") == {"patience": 3, "threshold": 0.01}
    assert (import_outcome.at("tracking.reportTo"), import_outcome.at("tracking.wandb")) == (
        ["wandb"], {"project": "p", "apiKeySecretRef": {"name": "job-wandb", "key": "token"}},
    )
    assert import_outcome.at("evaluation") == {"steps": 100, "strategy": "steps"}


def test_evaluation_without_data_is_refused(import_guide: Any) -> None:
    (mistake,) = import_guide(NESTED_CONFIG + "training: {eval_strategy: steps}\n").mistakes
    assert mistake.startswith("job.yaml:3: training.eval_strategy: steps, but the spec has no validation data")


def test_flags_of_the_guides_script_are_read(import_guide: Any) -> None:
    import_outcome = import_guide(
        "model: org/m\nlora_r: 8\n",
        words="python finetune_lora.py --data s3://data/x.json --epochs 1 --batch-size 2 --lora-r 4 --merge",
    )
    assert (import_outcome.at("dataset.train"), import_outcome.at("training.epochs"), import_outcome.at("method.lora.rank")) == (
        "s3://data/x.json",
        1,
        4,
    )
    assert import_outcome.at("output.mergeAdapter") is True


def test_a_conflict_names_both_keys_with_their_values(import_guide: Any) -> None:
    training = "training: {save_steps: 60, eval_steps: 25, load_best_model_at_end: true, eval_strategy: steps}\n"
    (mistake,) = import_guide(NESTED_CONFIG + "dataset: {eval_size: 0.1}\n" + training).mistakes
    assert "training.save_steps 60 and training.eval_steps 25: the first is not a multiple of the second" in mistake
    (mistake,) = import_guide(NESTED_CONFIG + "post_training: {push_to_hub: true}\n").mistakes
    assert mistake.endswith("post_training.push_to_hub is true, but post_training.hub_model_id is missing; write post_training.hub_model_id: org/name")


def test_fields_without_implementation_are_left_out_on_request(import_guide: Any) -> None:
    export = {"output.export": ["safetensors", "gguf"]}
    import_outcome = import_guide(NESTED_CONFIG, overrides=export, drop_unsupported=True)
    assert import_outcome.at("output.export") == ["safetensors"]
    assert "gguf is left out: contains gguf, but no library can convert a complete model" in import_outcome.warnings[-1]
    assert import_guide(NESTED_CONFIG, overrides=export).at("output.export") == ["safetensors", "gguf"]
