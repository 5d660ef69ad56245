"""Ranks that share each sequence have the same losses and gradients as a single rank, and resume exactly."""

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
"""Rows of different lengths. Some lengths are odd, so two ranks can share them only with padding."""
BASE_SPEC: dict[str, Any] = {
    # sgd without clipping, because Adam and clipping would hide gradients that are scaled by a wrong factor.
    "training": {
        "seed": 7, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1, "maxSteps": 4, "learningRate": 1e-2, "optimizer": "sgd", "maxGradNorm": 1000,
    },
    "method": {"type": "full"},
}  # fmt: skip


def make_shared_sequence_spec(stage: int = 2, spec: dict[str, Any] | None = None) -> dict[str, Any]:
    distributed = {"strategy": "deepspeed", "deepspeed": {"zeroStage": stage}, "contextParallelSize": 2}
    return merge_mappings(merge_mappings(BASE_SPEC, {"distributed": distributed}), spec or {})


EVALUATION_SPEC: dict[str, Any] = {"evaluation": {"strategy": "steps", "steps": 4}, "checkpoint": {"strategy": "steps", "steps": 2}}
LORA_SPEC: dict[str, Any] = {"method": {"type": "lora", "lora": {"dropout": 0, "init": "gaussian"}}, "training": {"learningRate": 0.5}}
SPECS = {
    "zero0": make_shared_sequence_spec(0), "zero2": make_shared_sequence_spec(2, EVALUATION_SPEC), "zero3": make_shared_sequence_spec(3),
    "accumulated": make_shared_sequence_spec(2, {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 2}}),
    "lora": make_shared_sequence_spec(2, LORA_SPEC),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of all runs that the selected tests compare. The ranks start only once for all runs."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    needed_names = {"zero2", *(item.callspec.params["name"] for item in tests)}
    cells = [
        Cell(name, str(model), spec, ROWS, validation=ROWS[:3] if name == "zero2" else None, keep=True) for name, spec in SPECS.items() if name in needed_names
    ]
    return launch_cells(cells, tmp_path_factory.mktemp("shared"), rank_count=2)


@pytest.mark.parametrize("name", quick_slice(SPECS, ["zero2"]))
def test_losses_and_gradients_are_those_of_one_rank(name: str, results: dict[str, Result], model: Path, tmp_path: Path) -> None:
    one_rank_spec = merge_mappings(SPECS[name], {"distributed": {"strategy": "none", "deepspeed": None, "contextParallelSize": 1}})
    one_rank_outcome = run_training(tmp_path, model, one_rank_spec, ROWS, validation=ROWS[:3] if name == "zero2" else None)
    shared_result = results[name]
    assert shared_result.error is None
    assert shared_result.losses == pytest.approx(one_rank_outcome.losses, abs=2e-5) and len(one_rank_outcome.losses) == 4
    # DeepSpeed reports no gradient norm in stage 0. A wrong size of the gradients would also change the losses of the later steps.
    assert shared_result.grad_norms == ([] if name == "zero0" else pytest.approx(one_rank_outcome.grad_norms, abs=2e-4))
    assert (shared_result.resolved["effectiveBatch"], shared_result.resolved["worldSize"], shared_result.resolved["attention"]) == (2, 2, "sdpa")
    assert "2 ranks share each sequence (Ulysses)" in shared_result.notes
    if name == "zero2":
        assert shared_result.eval["eval_loss"] == pytest.approx(one_rank_outcome.eval_losses[-1], abs=2e-5)


@pytest.mark.slow  # `make test` resumes ZeRO cells in test_strategies.py, and compares the losses of shared sequences in this file
def test_a_resumed_run_continues_with_the_same_rows(results: dict[str, Result], model: Path, tmp_path: Path) -> None:
    whole_result = results["zero2"]
    resumed_cell = Cell("resumed", str(model), SPECS["zero2"], ROWS, validation=ROWS[:3], resume=str(Path(whole_result.folder) / "checkpoint-2"))
    assert launch_cells([resumed_cell], tmp_path, rank_count=2)["resumed"].losses == whole_result.losses[2:]


@pytest.mark.faults
def test_two_groups_train_on_different_rows(model: Path, tmp_path: Path) -> None:
    """Four ranks form two groups, and each group trains one row per step. The losses equal those of one rank with two rows per step."""
    spec = make_shared_sequence_spec(2, {"training": {"batchSizePerDevice": 1}})
    groups_result = launch_cells([Cell("groups", str(model), spec, ROWS)], tmp_path / "groups", rank_count=4)["groups"]
    one_rank_outcome = run_training(tmp_path / "alone", model, BASE_SPEC, ROWS)
    assert groups_result.error is None and groups_result.resolved["effectiveBatch"] == 2
    assert groups_result.losses == pytest.approx(one_rank_outcome.losses, abs=2e-5)
    assert groups_result.grad_norms == pytest.approx(one_rank_outcome.grad_norms, abs=2e-4)
