"""Runs report their throughput, their GPU utilisation (MFU) and their share of padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.speed import ModelShape, flops_per_token

from tests.support.learning import TEN_ROWS, RunOutcome, run_training
from tests.support.tiny import make_tiny_model

HIDDEN_SIZE, LAYER_COUNT, HEAD_COUNT = 64, 2, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw", hidden=HIDDEN_SIZE, layers=LAYER_COUNT)


def count_matrix_weights(folder: Path) -> int:
    """Count the weights that take part in matrix products: all weights of the stored model except the embedding table."""
    from safetensors.torch import load_file

    stored_weights = load_file(folder / "model.safetensors")
    return sum(weight.numel() for name, weight in stored_weights.items() if "embed_tokens" not in name)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_every_method_reports_the_shape_of_the_base_model(method: str, model: Path, tmp_path: Path) -> None:
    trained_model = run_training(tmp_path, model, {"method": {"type": method}, "training": {"maxSteps": 1}}).model
    base = getattr(trained_model, "get_base_model", lambda: trained_model)()
    assert ModelShape.of(base) == ModelShape(count_matrix_weights(model), LAYER_COUNT, HEAD_COUNT, HIDDEN_SIZE // HEAD_COUNT)


def test_the_weights_of_a_tied_head_count_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "tied", hidden=HIDDEN_SIZE, layers=LAYER_COUNT, tied=True)
    tied_model = AutoModelForCausalLM.from_pretrained(folder)
    assert tied_model.get_output_embeddings().weight is tied_model.get_input_embeddings().weight
    assert ModelShape.of(tied_model).matrix_parameters == sum(weight.numel() for weight in tied_model.parameters())


@pytest.mark.parametrize(("method", "is_base_frozen"), [("lora", True), ("full", False)])
def test_utilisation_is_tokens_per_second_times_flops_over_the_peak(
    method: str, is_base_frozen: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.objective import sft

    peak = 1e12
    monkeypatch.setattr(sft, "peak_flops_of", lambda name: peak)
    outcome = run_training(tmp_path, model, {"method": {"type": method}})
    report = outcome.extra["data"]["tokens"]["train"]
    shape = ModelShape(count_matrix_weights(model), LAYER_COUNT, HEAD_COUNT, HIDDEN_SIZE // HEAD_COUNT)
    flops = flops_per_token(shape, report["tokens"] / report["rows"], frozen_base=is_base_frozen)
    lines = [line for line in outcome.logs if "mfu" in line]
    assert [line["step"] for line in lines] == [2, 3, 4]  # throughput is measured from one log line to the next, so step 1 has no value
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / peak, rel=1e-9)


def test_an_unknown_device_has_no_utilisation(model: Path, tmp_path: Path) -> None:
    assert not any("mfu" in line for line in run_training(tmp_path, model).logs)


def test_the_reported_token_count_equals_that_of_the_data(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, {"training": {"maxSteps": None, "epochs": 2, "batchSizePerDevice": 5}})
    tokens = outcome.extra["data"]["tokens"]["train"]["tokens"]
    assert [line["num_tokens"] for line in outcome.logs if "loss" in line][-1] == 2 * tokens


def read_length_report(outcome: RunOutcome) -> dict[str, Any]:
    return dict(outcome.extra["data"]["tokens"]["train"])


def test_packing_leaves_little_padding_and_reports_it(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [TEN_ROWS[i % 10]["messages"][0], {"role": "assistant", "content": "red blue " * (1 + (7 * i) % 23)}]}
        for i in range(200)
    ]
    packed_outcome = run_training(
        tmp_path, model, {"dataset": {"packing": True, "maxSequenceLength": 512}, "training": {"maxSteps": 2}}, rows
    )
    report = read_length_report(packed_outcome)
    assert report["rows"] == 200 and report["dropped"] == report["truncated"] == 0
    assert report["padding_share"] == 1 - report["tokens"] / (512 * report["sequences"])
    assert report["padding_share"] <= 0.03
    assert f"train: packed into {report['sequences']} sequences, {report['padding_share']:.1%} padding" in packed_outcome.notes
    assert [line["padding_share"] for line in packed_outcome.logs if "padding_share" in line] == [0.0, 0.0]


def test_padding_is_reported_without_packing(model: Path, tmp_path: Path) -> None:
    """A batch of two rows is padded to the length of the longer row."""
    rows = [{"messages": [TEN_ROWS[0]["messages"][0], {"role": "assistant", "content": "red " * times}]} for times in (1, 9)]
    outcome = run_training(tmp_path, model, {"training": {"maxSteps": 1, "batchSizePerDevice": 2}}, rows)
    report = read_length_report(outcome)
    (line,) = [line for line in outcome.logs if "padding_share" in line]
    assert line["padding_share"] == pytest.approx(1 - report["tokens"] / (2 * report["longest"]))
