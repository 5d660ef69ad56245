"""Strategies, methods and objectives work in the built trainer image as its user, with a read-only root file system and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import Cell, launch_cells
from tests.support.learning import merge_mappings
from tests.support.matrix import (
    RANKS_BY_STRATEGY,
    SPEC_BY_METHOD,
    TRAINER_BY_OBJECTIVE,
    read_expected_table,
    run_strategy,
)
from tests.support.tiny import make_tiny_model
from tests.support.trainer_image import TrainerImage

pytestmark = pytest.mark.image
OFFLOAD_SPEC: dict[str, Any] = {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3, "offloadOptimizer": True, "offloadParameters": True}}
QUICK_CELLS = [
    ("qlora", "kto", "deepspeed, ZeRO 2"), ("lora", "grpo", "deepspeed, ZeRO 3"), ("full", "orpo", "ZeRO 3, offload"), ("lora", "dpo", "fsdp, fullShard"),
    ("lora, 8-bit base", "reward", "ddp"), ("spectrum", "sft", "ddp"),
]  # fmt: skip
"""Combinations of method, objective and strategy. They cover every strategy library, every objective and every quantisation."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", RANKS_BY_STRATEGY)
def test_the_reference_page_shows_the_matrix_of_the_image(strategy: str, trainer_image: TrainerImage, tmp_path: Path) -> None:
    matrix = run_strategy(strategy, tmp_path, run_python=trainer_image.python_runner(tmp_path))
    assert len(matrix) == len(SPEC_BY_METHOD) * len(TRAINER_BY_OBJECTIVE)
    assert matrix == read_expected_table(strategy)


def test_every_strategy_and_objective_trains_in_the_image(trainer_image: TrainerImage, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    cells = []
    for method, objective, strategy in QUICK_CELLS:
        trainer, rows = TRAINER_BY_OBJECTIVE[objective]
        distributed = OFFLOAD_SPEC if strategy == "ZeRO 3, offload" else RANKS_BY_STRATEGY[strategy][1]
        spec = {"trainer": trainer, "distributed": distributed, "training": {"maxSteps": 2}}
        cells.append(Cell(f"{method} | {objective} | {strategy}", str(model), merge_mappings(SPEC_BY_METHOD[method], spec), rows))
    results = launch_cells(cells, tmp_path / "cells", rank_count=2, run_python=trainer_image.python_runner(tmp_path))
    assert {name: result.error for name, result in results.items()} == {cell.name: None for cell in cells}
    assert all(len(result.losses) == 2 and any(file.endswith(".safetensors") for file in result.files) for result in results.values())
    assert {objective for _, objective, _ in QUICK_CELLS} == set(TRAINER_BY_OBJECTIVE)
