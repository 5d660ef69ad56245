"""`finetune rerun`."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_cli.commands.rerun import find_chosen_values, find_free_name


@pytest.mark.parametrize(
    ("name", "taken_names", "expected"),
    [
        ("bot", set(), "bot-2"),
        ("bot", {"bot-2"}, "bot-3"),
        ("bot-2", {"bot-2"}, "bot-3"),
        ("a" * 40, set(), "a" * 38 + "-2"),
    ],
)
def test_free_name_adds_the_next_number(name: str, taken_names: set[str], expected: str) -> None:
    assert find_free_name(name, taken_names) == expected


CHOSEN_VALUES: dict[str, Any] = {
    "resources.nodePool": "h100", "resources.gpusPerNode": 2, "distributed.strategy": "fsdp", "training.batchSizePerDevice": 2,
    "training.gradientAccumulationSteps": 4,
}  # fmt: skip
BATCH, GPUS, STRATEGY = ("training.batchSizePerDevice", "training.gradientAccumulationSteps"), "resources.gpusPerNode", "distributed.strategy"


@pytest.mark.parametrize(
    ("changed_values", "dropped_paths"),
    [
        ({"resources.nodes": 2, "resources.gpusPerNode": 1}, BATCH),
        ({}, ()),
        ({"training.epochs": 5}, ()),
        ({"training.effectiveBatchSize": 8}, BATCH),
        ({"training.gradientAccumulationSteps": 8}, BATCH),
        ({"resources.nodes": 2}, BATCH),
        ({"resources.gpusPerNode": 4}, BATCH),
        ({"resources.gpusPerNode": 1}, (*BATCH, STRATEGY)),
        ({"resources.processesPerNode": 4}, (*BATCH, GPUS)),
        ({"resources.processesPerNode": 1}, (*BATCH, GPUS, STRATEGY)),
    ],
)
def test_a_job_that_resumes_gets_the_values_that_the_plan_chose(changed_values: dict[str, Any], dropped_paths: tuple[str, ...]) -> None:
    job = {"status": {"plan": {"choices": [{"field": path, "value": value, "reason": "r"} for path, value in CHOSEN_VALUES.items()]}}}
    assert find_chosen_values(job, changed_values) == {path: value for path, value in CHOSEN_VALUES.items() if path not in dropped_paths}
    assert find_chosen_values({"status": {}}, changed_values) == {}


@pytest.mark.parametrize(("nodes", "is_kept"), [(2, True), (1, False)])
def test_the_chosen_strategy_is_kept_as_long_as_there_are_several_ranks(nodes: int, is_kept: bool) -> None:
    choices = [{"field": path, "value": value, "reason": "r"} for path, value in (CHOSEN_VALUES | {GPUS: 1}).items()]
    job = {"spec": {"resources": {"nodes": 2}}, "status": {"plan": {"choices": choices}}}
    assert (STRATEGY in find_chosen_values(job, {"resources.nodes": nodes})) is is_kept
