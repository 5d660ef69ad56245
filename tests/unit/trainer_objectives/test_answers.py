"""Encoded prompts and answers: length limits, and the shared prompt of two answers."""

from __future__ import annotations

import pytest
from datasets import Dataset
from finetune_api.errors import DataError
from finetune_api.spec.enums import OverflowPolicy, TrainerType
from finetune_trainer.data.batches import RowOutcome
from finetune_trainer.objective.answers import (
    EncodedAnswers,
    LengthLimits,
    RowLayout,
    count_sequence_tokens,
    fit_to_limits,
    with_shared_prompt,
)


def fit_row(
    row: EncodedAnswers, trainer_type: TrainerType, overflow: OverflowPolicy = OverflowPolicy.TRUNCATE, answer_limit: int | None = None
) -> tuple[RowOutcome, EncodedAnswers]:
    """Fit the row into 6 tokens."""
    return fit_to_limits("train.jsonl, row 1", row, LengthLimits(6, answer_limit, overflow), trainer_type)


LONG_ROW = EncodedAnswers([1, 2, 3], [[4, 5, 6, 7], [8]])
"""A row whose prompt and longer answer have seven tokens together."""


def test_answers_beyond_the_maximum_row_length_are_cut() -> None:
    assert fit_row(LONG_ROW, TrainerType.DPO) == (RowOutcome.CUT, EncodedAnswers([1, 2, 3], [[4, 5, 6], [8]]))


def test_a_reward_model_drops_rows_whose_answer_would_be_cut() -> None:
    """A reward model computes its score at the last token of the answer."""
    assert fit_row(LONG_ROW, TrainerType.REWARD)[0] is RowOutcome.TOO_LONG


def test_a_reward_model_keeps_rows_that_fit() -> None:
    row = EncodedAnswers([1, 2, 3], [[4, 5, 6], [8]])
    assert fit_row(row, TrainerType.REWARD) == (RowOutcome.KEPT, row)


def test_a_row_that_is_too_long_is_dropped_or_refused_as_overflow_says() -> None:
    assert fit_row(LONG_ROW, TrainerType.DPO, OverflowPolicy.DROP)[0] is RowOutcome.TOO_LONG
    with pytest.raises(DataError, match="train.jsonl, row 1: 7 tokens, more than dataset.maxSequenceLength 6"):
        fit_row(LONG_ROW, TrainerType.DPO, OverflowPolicy.FAIL)


def test_a_row_whose_prompt_leaves_no_token_for_an_answer_is_dropped() -> None:
    assert fit_row(EncodedAnswers([1, 2, 3, 4, 5, 6], [[7], [8]]), TrainerType.DPO)[0] is RowOutcome.TOO_LONG


def test_pairs_that_are_equal_after_cutting_are_dropped() -> None:
    assert fit_row(EncodedAnswers([1], [[2, 3, 4], [2, 3, 5]]), TrainerType.DPO, answer_limit=2)[0] is RowOutcome.EQUAL_ANSWERS


def test_tokens_merged_across_the_end_of_the_prompt_belong_to_the_answers() -> None:
    """The third token contains the end of the prompt and the first character of the answer, so it differs between the answers."""
    encoded = [([1, 2, 10], [4]), ([1, 2, 11], [5, 6])]
    assert with_shared_prompt(encoded, None) == EncodedAnswers([1, 2], [[10, 4], [11, 5, 6]])


def test_a_prompt_that_is_shorter_for_one_answer_is_cut_to_the_shared_tokens() -> None:
    assert with_shared_prompt([([1, 2], [3]), ([1, 2, 4], [5])], None) == EncodedAnswers([1, 2], [[3], [4, 5]])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [(RowLayout.PAIRS, (19, 6)), (RowLayout.WHOLE_PAIRS, (19, 6)), (RowLayout.PAIRS_WITH_TEXTS, (19, 6)), (RowLayout.LABELLED, (11, 6))],
)
def test_the_prompt_counts_once_for_each_answer(layout: RowLayout, expected: tuple[int, int]) -> None:
    rows = [EncodedAnswers([1, 2, 3], [[4, 5], [6]], label=True), EncodedAnswers([1, 2], [[3, 4, 5, 6], [7, 8]], label=False)]
    dataset = Dataset.from_list([layout.column_values(row) for row in rows])
    assert count_sequence_tokens(dataset, layout) == expected
