"""The table OBJECTIVES is complete, and the rules and defaults of the spec agree with this table."""

from __future__ import annotations

import pytest
from finetune_api.defaults import resolve_defaults
from finetune_api.objectives import OBJECTIVES, choose_objective_for_format, list_objectives_that_read
from finetune_api.rules import check_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import DatasetFormat, TrainerType


def make_spec(trainer: TrainerType, dataset_format: DatasetFormat) -> FineTuneJobSpec:
    raw_spec = {"model": {"source": "hf://a/b"}, "dataset": {"train": "s3://a/b.jsonl", "format": dataset_format}, "trainer": {"type": trainer}}
    return FineTuneJobSpec.model_validate(raw_spec)  # fmt: skip


@pytest.mark.parametrize("trainer", list(TrainerType))
def test_every_objective_has_a_data_format(trainer: TrainerType) -> None:
    assert OBJECTIVES[trainer].dataset_formats


@pytest.mark.parametrize("dataset_format", list(DatasetFormat))
@pytest.mark.parametrize("trainer", list(TrainerType))
def test_a_format_is_refused_unless_the_objective_lists_it(trainer: TrainerType, dataset_format: DatasetFormat) -> None:
    problems = [problem for problem in check_spec(make_spec(trainer, dataset_format)) if problem.code == "FormatOfAnotherObjective"]
    assert bool(problems) is (dataset_format not in OBJECTIVES[trainer].dataset_formats)
    if problems:
        assert f"trainer: {{type: {choose_objective_for_format(dataset_format)}}}" in str(problems[0])


@pytest.mark.parametrize("trainer", list(TrainerType))
def test_the_learning_rate_of_the_objective_takes_precedence_over_that_of_the_method(trainer: TrainerType) -> None:
    rate = resolve_defaults(make_spec(trainer, OBJECTIVES[trainer].dataset_formats[0])).spec.training.learning_rate
    assert rate == (OBJECTIVES[trainer].learning_rate or 2e-4)


def test_the_objectives_that_read_an_option_are_listed_in_the_order_of_the_table() -> None:
    assert list_objectives_that_read("dpo")[:3] == (TrainerType.DPO, TrainerType.KTO, TrainerType.ORPO)
    assert list_objectives_that_read("rewards") == (TrainerType.GRPO,)
    assert TrainerType.SFT not in list_objectives_that_read("maxCompletionLength")
