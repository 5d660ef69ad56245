"""On two ranks, padding-free batches have the same losses in training and evaluation as padded batches."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cells import Cell, Result, launch_cells
from tests.support.learning import TEN_ROWS, merge_mappings
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.pod, pytest.mark.slow]
ROWS = [
    {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + 7 * index % 24)}]}
    for index, row in enumerate(TEN_ROWS)
]
"""Rows with very different lengths, so that ranks and micro-batches have unequal numbers of trained tokens."""
SPEC: dict[str, Any] = {
    "training": {"batchSizePerDevice": 3, "gradientAccumulationSteps": 2, "maxSteps": 3, "learningRate": 1e-3},
    "evaluation": {"strategy": "steps", "steps": 3},
}
"""The runs have batches of three rows on two ranks. An evaluation of ten rows repeats two rows, to fill the last batches."""
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"method": {"lora": {"dropout": 0}}, "distributed": {"strategy": "ddp"}},
    "fsdp": {"method": {"type": "full"}, "distributed": {"strategy": "fsdp"}, "training": {"learningRate": 1e-4}},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "raw")
    cells = [
        Cell(f"{name} {padding_free}", str(model), merge_mappings(SPEC, spec), ROWS, ROWS, padding_free=padding_free)
        for name, spec in RUNS.items()
        for padding_free in (False, True)
    ]
    return launch_cells(cells, tmp_path_factory.mktemp("cells"), rank_count=2)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_have_the_losses_of_padded_batches(name: str, results: dict[str, Result]) -> None:
    padded_result, padding_free_result = results[f"{name} False"], results[f"{name} True"]
    assert (padded_result.error, padding_free_result.error) == (None, None)
    assert (padded_result.resolved["attention"], padding_free_result.resolved["attention"]) == ("sdpa", "varlen")
    assert padding_free_result.losses == pytest.approx(padded_result.losses, abs=1e-5) and len(padding_free_result.losses) == 3
    assert padding_free_result.grad_norms == pytest.approx(padded_result.grad_norms, rel=1e-4)
    for metric in ("eval_loss", "eval_mean_token_accuracy"):
        assert padding_free_result.eval[metric] == pytest.approx(padded_result.eval[metric], abs=1e-5)
