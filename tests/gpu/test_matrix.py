"""A GPU accepts the same combinations of methods and objectives as a CPU, and every fused, paged or 8-bit optimizer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import Cell, launch_cells
from tests.support.gpu import ONE_GPU, require_gpu
from tests.support.learning import TEN_ROWS, merge_mappings
from tests.support.matrix import SPEC_BY_METHOD, TRAINER_BY_OBJECTIVE, read_expected_table, run_strategy

pytestmark = pytest.mark.gpu
OPTIMIZERS = ["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"]
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"training": {"mixedPrecision": "bf16"}},
    "fp16": {"training": {"mixedPrecision": "fp16"}},
    "32 bits": {"training": {"mixedPrecision": "no"}},
    "bf16 weights": {"model": {"dtype": "bfloat16"}},
}


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skip the tests of this file if there is no CUDA device."""
    require_gpu()


@pytest.mark.parametrize("method", SPEC_BY_METHOD)
def test_a_gpu_accepts_and_refuses_the_same_combinations_as_a_cpu(method: str, tmp_path: Path) -> None:
    expected_verdicts = {cell: verdict for cell, verdict in read_expected_table("one rank").items() if cell[0] == method}
    assert run_strategy("one rank", tmp_path, methods=[method], base_spec=ONE_GPU) == expected_verdicts
    assert len(expected_verdicts) == len(TRAINER_BY_OBJECTIVE)


def test_every_precision_and_optimizer_lowers_the_loss_on_a_gpu(tmp_path: Path) -> None:
    from tests.support.tiny import make_tiny_model

    model = str(make_tiny_model(tmp_path / "model", hidden=256))
    options = PRECISIONS | {name: {"training": {"optimizer": name}} for name in OPTIMIZERS}
    training = {"maxSteps": 20, "batchSizePerDevice": 10, "scheduler": "constant", "learningRate": 1e-3}
    specs = {name: merge_mappings({"method": {"type": "full"}, "training": training} | ONE_GPU, spec) for name, spec in options.items()}
    cells = [Cell(name, model, spec, TEN_ROWS) for name, spec in specs.items()]
    results = launch_cells(cells, tmp_path / "cells", rank_count=1)
    assert {name: result.error for name, result in results.items()} == dict.fromkeys(options)
    has_fallen = {name: result.losses[-1] < result.losses[0] for name, result in results.items()}
    assert has_fallen == dict.fromkeys(options, True)
