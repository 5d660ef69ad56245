"""The importer `guide`: the flat and the nested form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.cli.conftest import Write
from tests.unit.cli.import_command import Outcome, import_

NESTED = "base_model: {name: mistralai/M}\nlora: {r: 8, lora_alpha: 16}\n"


@pytest.fixture
def guide(write: Write) -> Any:
    """Return a function that imports a configuration in the form of the guide."""

    def run(text: str, words: str = "", **more: Any) -> Outcome:
        return import_(write("job.yaml", text), words=words, source="guide", **more)

    return run


@pytest.mark.parametrize("text", ["model: org/m\nlora_r: 8\n", NESTED])
def test_both_forms_have_the_same_defaults(guide: Any, text: str) -> None:
    imported = guide(text)
    assert imported.spec["training"] == {
        "epochs": 3, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4, "learningRate": 2e-4, "scheduler": "linear", "warmupRatio": 0.03,
        "optimizer": "adamw_torch", "weightDecay": 0, "maxGradNorm": 1, "mixedPrecision": "bf16",
    }  # fmt: skip
    assert imported.spec["method"]["lora"]["rank"] == 8
    assert (imported.at("dataset.maxSequenceLength"), imported.at("checkpoint.keep"), imported.at("dataset.train")) == (
        512,
        3,
        None,
    )
    assert any("names no training data" in warning for warning in imported.warnings)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lora_r: 8\n", "lora"),
        ("lora_r: 8\nuse_4bit: true\n", "qlora"),
        ("lora_r: 8\nuse_4bit: false\n", "lora"),
        ("use_4bit: true\n", "qlora"),
    ],
)
def test_method_is_inferred(guide: Any, text: str, method: str) -> None:
    assert guide("model: org/m\n" + text).at("method.type") == method


def test_file_without_a_method_is_refused(guide: Any) -> None:
    (mistake,) = guide("model: org/m\nuse_4bit: false\n").mistakes
    assert "the file selects no method" in mistake


def test_target_modules_are_chosen_by_model_family(guide: Any) -> None:
    text = "base_model: {name: meta-llama/Llama-3}\nlora: {r: 8, target_modules: {mistral: [a], llama: [b, c]}}\n"
    assert guide(text).at("method.lora.targetModules") == ["b", "c"]
    (mistake,) = guide(text.replace("meta-llama/Llama-3", "org/gpt")).mistakes
    assert "none of the model families mistral, llama occurs in the model name org/gpt" in mistake


def test_bf16_training_overrides_float16_weights(guide: Any) -> None:
    imported = guide("base_model: {name: m/m, dtype: float16}\nlora: {r: 8}\ntraining: {bf16: true}\n")
    assert (imported.at("model.dtype"), imported.at("training.mixedPrecision")) == ("bfloat16", "bf16")
    assert "the job uses bfloat16" in imported.warnings[0]


def test_callbacks_are_read(guide: Any) -> None:
    text = (
        NESTED
        + "dataset: {eval_size: 0.1}\ncallbacks: {early_stopping: {enabled: true}, wandb: {enabled: true, project: p}}\n"
    )
    imported = guide(text)
    assert imported.at("training.earlyStopping") == {"patience": 3, "threshold": 0.01}
    assert (imported.at("tracking.reportTo"), imported.at("tracking.wandb")) == (["wandb"], {"project": "p"})
    assert imported.at("evaluation") == {"steps": 100, "strategy": "steps"}


def test_evaluation_without_data_is_refused(guide: Any) -> None:
    (mistake,) = guide(NESTED + "training: {eval_strategy: steps}\n").mistakes
    assert mistake.startswith("job.yaml:3: training.eval_strategy: steps, but the spec has no validation data")


def test_flags_of_the_script_are_read(guide: Any) -> None:
    imported = guide(
        "model: org/m\nlora_r: 8\n",
        words="python finetune_lora.py --data s3://data/x.json --epochs 1 --batch-size 2 --lora-r 4 --merge",
    )
    assert (imported.at("dataset.train"), imported.at("training.epochs"), imported.at("method.lora.rank")) == (
        "s3://data/x.json",
        1,
        4,
    )
    assert imported.at("output.mergeAdapter") is True
