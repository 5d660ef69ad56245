"""Finds the tokens with which the model learned to end its answers.

A chat template often ends answers with another token than the base model's end token, for example `<|im_end|>`. If a server only knew the
base model's end token, generation would continue after the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from finetune_trainer.data.rows import IGNORED_LABEL

MIN_SHARE = 0.01
"""Share of the answers that must end with a token. An answer that was cut off may end with any token."""
MAX_ROWS = 2000
"""Number of training rows that are read."""


def trained_end_tokens(tokenizer: Any, answers: Iterable[Sequence[int]]) -> list[int]:
    """Return the ids of the tokens that end the answers, the most frequent first. `answers`: token ids of each answer.

    Only special tokens, added tokens and the tokenizer's end token count. White space after the end token is ignored.
    """
    candidates = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    @cache
    def is_blank(token: int) -> bool:
        return token not in candidates and not tokenizer.decode([token]).strip()

    last_tokens = Counter(next((token for token in reversed(answer) if not is_blank(token)), None) for answer in answers)
    total = sum(last_tokens.values())
    return [token for token, count in last_tokens.most_common() if token in candidates and count >= MIN_SHARE * total]


def answers_of_labels(labels: Sequence[int]) -> Iterator[list[int]]:
    """Yield the trained parts of a row. Each part is the longest possible sequence of labels without an ignored label."""
    part: list[int] = []
    for label in [*labels, IGNORED_LABEL]:
        if label != IGNORED_LABEL:
            part.append(label)
        elif part:
            yield part
            part = []


def trained_answers(rows: Any) -> Iterator[Sequence[int]]:
    """Yield the answers in a data set of any objective. A data set without answers, such as grpo's prompts, yields nothing.

    At most `MAX_ROWS` rows are read, evenly spaced over the data set.
    """
    columns = rows.column_names
    for number in range(0, len(rows), -(-len(rows) // MAX_ROWS)):
        row = rows[number]
        if "labels" in columns:
            yield from answers_of_labels(row["labels"])
        elif "chosen_ids" in columns:
            yield row["chosen_ids"]
        elif "completion_ids" in columns and row.get("label", True):
            yield row["completion_ids"]
