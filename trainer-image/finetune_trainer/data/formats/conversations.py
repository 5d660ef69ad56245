"""Formats whose rows hold an array of messages: `messages` and `sharegpt`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import (
    SYSTEM_COLUMN,
    ColumnRole,
    column_value,
    find_column,
    optional_text,
    required_value,
)
from finetune_trainer.data.formats.base import Format, ReadOptions
from finetune_trainer.data.formats.questions import read_question_and_answer
from finetune_trainer.data.formats.turns import parse_conversation, parse_json_column
from finetune_trainer.data.rows import Conversation, RawRow, RowError

MESSAGES_COLUMN = ColumnRole("messages", ("messages", "conversations", "conversation"))
QUESTION_COLUMN = ColumnRole("question", ("question", "prompt"))
ANSWER_COLUMN = ColumnRole("answer", ("answer", "response"))


class Messages(Format):
    """Messages with `role` and `content`, as in chat APIs.

    If a row has no messages, question and answer are read from the columns that `dataset.columns` names.
    """

    name = DatasetFormat.MESSAGES
    required = (MESSAGES_COLUMN,)

    def required_columns(self, sample: Sequence[RawRow], columns: Columns) -> tuple[ColumnRole, ...]:
        has_questions = all(_has_question_instead_of_messages(row.value.keys(), columns) for row in sample)
        return (QUESTION_COLUMN, ANSWER_COLUMN) if has_questions else self.required

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        if _has_question_instead_of_messages(row.keys(), options.columns):
            return read_question_and_answer(row, options, QUESTION_COLUMN, ANSWER_COLUMN)
        messages = required_value(MESSAGES_COLUMN, row, options.columns)
        if isinstance(messages, str):
            messages = parse_json_column(messages)
        conversation = parse_conversation(messages, options, system=optional_text(SYSTEM_COLUMN, row, options.columns))
        tools = row.get("tools")
        tools = parse_json_column(tools) if isinstance(tools, str) and tools.strip() else tools
        if tools is not None and not isinstance(tools, list):
            raise RowError("DatasetRowInvalid", "`tools` is not an array", "write an array of function descriptions")
        return replace(conversation, tools=tuple(tools or ()))


class ShareGpt(Messages):
    """Messages with `from` and `value`."""

    name = DatasetFormat.SHAREGPT

    def required_columns(self, sample: Sequence[RawRow], columns: Columns) -> tuple[ColumnRole, ...]:
        return self.required

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        messages = column_value(MESSAGES_COLUMN, row, columns)
        first_message = messages[0] if isinstance(messages, list) and messages else None
        return isinstance(first_message, dict) and ("from" in first_message or "value" in first_message)


def _has_question_instead_of_messages(row_columns: Collection[str], columns: Columns) -> bool:
    """Whether `dataset.columns` names a question or answer column, and the row has no column of messages."""
    names_question_or_answer = columns.question is not None or columns.answer is not None
    return names_question_or_answer and find_column(MESSAGES_COLUMN, row_columns, columns) is None
