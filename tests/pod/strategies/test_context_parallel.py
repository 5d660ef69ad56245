"""Ranks that share each sequence compute the losses and gradients of a single rank, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import Cell, Result, launch_cells
from tests.support.learning import TEN_ROWS, merge_mappings, run_training
from tests.support.slices import quick_slice
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.pod
ROWS = [
    {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + index % 4)}]}
    for index, row in enumerate(TEN_ROWS[:8])
]  # fmt: skip
"""Rows of different lengths, some of them odd, so that batches are padded."""
BASE: dict[str, Any] = {
    # Adam and clipping would hide a wrong factor of the gradients.
    "training": {
        "seed": 7, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1, "maxSteps": 4, "learningRate": 1e-2, "optimizer": "sgd", "maxGradNorm": 1000,
    },
    "method": {"type": "full"},
}  # fmt: skip


def sharing(stage: int = 2, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    distributed = {"strategy": "deepspeed", "deepspeed": {"zeroStage": stage}, "contextParallelSize": 2}
    return merge_mappings(merge_mappings(BASE, {"distributed": distributed}), spec or {})


EVALUATION: dict[str, Any] = {"evaluation": {"strategy": "steps", "steps": 4}, "checkpoint": {"strategy": "steps", "steps": 2}}
LORA: dict[str, Any] = {"method": {"type": "lora", "lora": {"dropout": 0, "init": "gaussian"}}, "training": {"learningRate": 0.5}}
SPECS = {
    "zero0": sharing(0), "zero2": sharing(2, EVALUATION), "zero3": sharing(3),
    "accumulated": sharing(2, {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 2}}), "lora": sharing(2, LORA),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The runs that the selected tests compare, in one start of the ranks."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {"zero2", *(item.callspec.params["name"] for item in tests)}
    cells = [
        Cell(name, str(model), spec, ROWS, validation=ROWS[:3] if name == "zero2" else None, keep=True) for name, spec in SPECS.items() if name in names
    ]
    return launch_cells(cells, tmp_path_factory.mktemp("shared"), rank_count=2)


@pytest.mark.parametrize("name", quick_slice(SPECS, ["zero2"]))
def test_losses_and_gradients_are_those_of_one_rank(name: str, results: dict[str, Result], model: Path, tmp_path: Path) -> None:
    single = merge_mappings(SPECS[name], {"distributed": {"strategy": "none", "deepspeed": None, "contextParallelSize": 1}})
    alone = run_training(tmp_path, model, single, ROWS, validation=ROWS[:3] if name == "zero2" else None)
    shared = results[name]
    assert shared.error is None
    assert shared.losses == pytest.approx(alone.losses, abs=2e-5) and len(alone.losses) == 4
    # DeepSpeed reports no gradient norm in stage 0; there, the later losses show the size of the gradients.
    assert shared.grad_norms == ([] if name == "zero0" else pytest.approx(alone.grad_norms, abs=2e-4))
    assert (shared.resolved["effectiveBatch"], shared.resolved["worldSize"], shared.resolved["attention"]) == (2, 2, "sdpa")
    assert "2 ranks share each sequence (Ulysses)" in shared.notes
    if name == "zero2":
        assert shared.eval["eval_loss"] == pytest.approx(alone.eval_losses[-1], abs=2e-5)


def test_a_resumed_run_continues_with_the_same_rows(results: dict[str, Result], model: Path, tmp_path: Path) -> None:
    whole = results["zero2"]
    resumed = Cell("resumed", str(model), SPECS["zero2"], ROWS, validation=ROWS[:3], resume=str(Path(whole.folder) / "checkpoint-2"))
    assert launch_cells([resumed], tmp_path, rank_count=2)["resumed"].losses == whole.losses[2:]


@pytest.mark.faults
def test_two_groups_train_on_different_rows(model: Path, tmp_path: Path) -> None:
    """Four ranks in two groups, each with one row: the step of one rank with two rows."""
    spec = sharing(2, {"training": {"batchSizePerDevice": 1}})
    found = launch_cells([Cell("groups", str(model), spec, ROWS)], tmp_path / "groups", rank_count=4)["groups"]
    alone = run_training(tmp_path / "alone", model, BASE, ROWS)
    assert found.error is None and found.resolved["effectiveBatch"] == 2
    assert found.losses == pytest.approx(alone.losses, abs=2e-5)
    assert found.grad_norms == pytest.approx(alone.grad_norms, abs=2e-4)
