"""With new tokens and with LoftQ, every strategy has the same losses and test metrics on two ranks as on one rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import Cell, Result, launch_cells
from tests.support.learning import TEN_ROWS, RunOutcome, merge_mappings, run_training

pytestmark = [pytest.mark.pod, pytest.mark.slow, pytest.mark.timeout(400)]
ROWS = [
    {"messages": [row["messages"][0], {"role": "assistant", "content": f"<yes>{row['messages'][1]['content']}"}]}
    for row in [*TEN_ROWS, TEN_ROWS[0]]
]
"""Eleven rows, three of which form the test set. On two ranks, the last test batch repeats a row, which must count only once."""
BASE_SPEC: dict[str, Any] = {
    "model": {"newTokens": ["<yes>"]}, "dataset": {"split": {"test": 0.3}}, "training": {"batchSizePerDevice": 2, "maxSteps": 3},
    "evaluation": {"metrics": ["f1"]},
}  # fmt: skip
LORA_SPEC: dict[str, Any] = {"method": {"lora": {"dropout": 0}}}
FULL_SPEC: dict[str, Any] = {"method": {"type": "full"}}
LOFTQ_SPEC: dict[str, Any] = {
    "model": {"newTokens": None},
    "method": {"lora": {"dropout": 0, "init": "loftq"}},
}
ZERO2_STRATEGY: dict[str, Any] = {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}
METHODS_AND_STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp lora": (LORA_SPEC, {"strategy": "ddp"}),
    "zero 2 lora": (LORA_SPEC, ZERO2_STRATEGY),
    "ddp full": (FULL_SPEC, {"strategy": "ddp"}),
    "fsdp full": (FULL_SPEC, {"strategy": "fsdp"}),
    "ddp loftq": (LOFTQ_SPEC, {"strategy": "ddp"}),
    "fsdp loftq": (LOFTQ_SPEC, {"strategy": "fsdp"}),
}


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    cells = [
        Cell(name, str(model), merge_mappings(merge_mappings(BASE_SPEC, method), {"distributed": strategy}), ROWS)
        for name, (method, strategy) in METHODS_AND_STRATEGIES.items()
    ]
    return launch_cells(cells, tmp_path_factory.mktemp("cells"), rank_count=2)


@pytest.fixture(scope="module")
def one_rank_outcomes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunOutcome]:
    """The runs of METHODS_AND_STRATEGIES on one rank, with the effective batch of the runs on two ranks."""
    batch = {"training": {"batchSizePerDevice": 4}}
    return {
        name: run_training(tmp_path_factory.mktemp(name), model, merge_mappings(merge_mappings(BASE_SPEC, method), batch), ROWS)
        for name, method in (("lora", LORA_SPEC), ("full", FULL_SPEC), ("loftq", LOFTQ_SPEC))
    }


def parse_test_loss(notes: list[str]) -> float:
    (match,) = (
        re.match(r"test: 3 rows, loss ([\d.]+),", note) for note in notes if note.startswith("test: 3 rows, loss")
    )
    assert match is not None
    return float(match[1])


@pytest.mark.parametrize("name", METHODS_AND_STRATEGIES)
def test_two_ranks_have_the_losses_and_test_metrics_of_one_rank(
    name: str, results: dict[str, Result], one_rank_outcomes: dict[str, RunOutcome]
) -> None:
    two_rank_result, one_rank_outcome = results[name], one_rank_outcomes[name.rsplit(" ", 1)[-1]]
    assert two_rank_result.error is None
    assert two_rank_result.resolved["worldSize"] == 2
    assert two_rank_result.losses == pytest.approx(one_rank_outcome.losses, abs=1e-4)
    assert parse_test_loss(two_rank_result.notes) == pytest.approx(parse_test_loss(one_rank_outcome.notes), abs=2e-4)
    if not name.startswith("fsdp"):  # with fsdp, no rank has the whole language-model head
        test_line = next(line for line in one_rank_outcome.logs if "test_f1" in line)
        assert two_rank_result.eval["test_f1"] == pytest.approx(test_line["test_f1"], abs=1e-6)
