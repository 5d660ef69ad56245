"""Finds the tokens with which the model learned to end its answers.

Many chat templates do not end answers with the base model's end token, but with another one, for example `<|im_end|>`. If a server only
knew the base model's end token, generation would continue after the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from finetune_trainer.data.rows import IGNORED_LABEL

MIN_SHARE = 0.01
"""A token is an end token only if it ends at least this share of the answers. Without this limit, the last token of a truncated answer would count as
an end token."""
MAX_ROWS = 2000
"""Largest number of training rows that are read."""


def find_trained_end_tokens(tokenizer: Any, answers: Iterable[Sequence[int]]) -> list[int]:
    """Return the ids of the tokens that end the answers, the most frequent first. `answers`: token ids of each answer.

    Only special tokens and added tokens can be end tokens. White space after an end token is ignored.
    """
    candidate_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @cache
    def is_blank(token: int) -> bool:
        return token not in candidate_ids and not tokenizer.decode([token]).strip()

    answer_count_by_last_token = Counter(next((token for token in reversed(answer) if not is_blank(token)), None) for answer in answers)
    answer_count = sum(answer_count_by_last_token.values())
    return [token for token, count in answer_count_by_last_token.most_common() if token in candidate_ids and count >= MIN_SHARE * answer_count]


def split_into_answers(labels: Sequence[int]) -> Iterator[list[int]]:
    """Split the labels of a row into the answers that are trained on. An answer is an unbroken sequence of labels between ignored labels."""
    answer: list[int] = []
    for label in [*labels, IGNORED_LABEL]:
        if label != IGNORED_LABEL:
            answer.append(label)
        elif answer:
            yield answer
            answer = []


def read_trained_answers(rows: Any) -> Iterator[Sequence[int]]:
    """Yield the token ids of the answers in a data set of any objective. For a data set without answers (prompts of grpo), this function yields nothing.

    At most `MAX_ROWS` rows are read, evenly spaced over the data set.
    """
    columns = rows.column_names
    for row_index in range(0, len(rows), -(-len(rows) // MAX_ROWS)):
        row = rows[row_index]
        if "labels" in columns:
            yield from split_into_answers(row["labels"])
        elif "chosen_ids" in columns:
            yield row["chosen_ids"]
        elif "completion_ids" in columns and row.get("label", True):
            yield row["completion_ids"]
