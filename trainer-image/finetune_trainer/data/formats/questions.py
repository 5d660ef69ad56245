"""Formats whose rows hold a question and an answer: `instruction`, `alpaca`, `qa` and `mcq`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import (
    SYSTEM_COLUMN,
    ColumnRole,
    find_column,
    optional_text,
    required_text,
    required_value,
)
from finetune_trainer.data.formats.base import Format, ReadOptions, require_text
from finetune_trainer.data.formats.turns import make_conversation, parse_json_column
from finetune_trainer.data.rows import Conversation, RowError, Turn

INPUT_COLUMN = ColumnRole("input", ("input", "context"))
"""Column whose text is added after the question."""
PASSAGE_COLUMN = ColumnRole("input", ("context", "passage"))
"""Column whose text is added before the question."""


class Instruction(Format):
    """An instruction with a response, and optional input."""

    name = DatasetFormat.INSTRUCTION
    question = ColumnRole("question", ("instruction", "prompt", "question"))
    answer = ColumnRole("answer", ("response", "output", "completion", "answer"))
    required = (question, answer)

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        return _has_default_columns(row, columns, "instruction") and find_column(self.answer, row.keys(), columns) is not None

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        return read_question_and_answer(
            row, options, self.question, self.answer, ("Instruction", "Response"), column_after=INPUT_COLUMN
        )


class Alpaca(Format):
    """Stanford Alpaca: `instruction`, optional `input`, `output`."""

    name = DatasetFormat.ALPACA
    question = ColumnRole("question", ("instruction",))
    answer = ColumnRole("answer", ("output", "response", "completion"))
    required = (question, answer)

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        return _has_default_columns(row, columns, "instruction", "output")

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        return read_question_and_answer(
            row, options, self.question, self.answer, ("Instruction", "Output"), column_after=INPUT_COLUMN
        )


class QuestionAnswer(Format):
    """A question with an answer, and an optional passage as the context of the question."""

    name = DatasetFormat.QA
    question = ColumnRole("question", ("question", "query", "q", "prompt"))
    answer = ColumnRole("answer", ("answer", "response", "a", "completion"))
    required = (question, answer)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        return read_question_and_answer(
            row, options, self.question, self.answer, ("Question", "Answer"), column_before=PASSAGE_COLUMN
        )


class MultipleChoice(Format):
    """A question with options, and the letter or the text of the correct option. The model learns to answer with the letter."""

    name = DatasetFormat.MCQ
    question = ColumnRole("question", ("question",))
    answer = ColumnRole("answer", ("answer",))
    options = ColumnRole("options", ("options", "choices"))
    required = (question, answer, options)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        question = require_text(required_text(self.question, row, options.columns), "question")
        choices = parse_choices(required_value(self.options, row, options.columns))
        answer = required_text(self.answer, row, options.columns).strip()
        letter = next((key for key in choices if key.lower() == answer.strip("().:").lower()), None)
        letter = letter or next((key for key, text in choices.items() if text.strip().lower() == answer.lower()), None)
        if letter is None:
            raise RowError(
                "AnswerNotAnOption",
                f"the answer {answer!r} is none of the options {', '.join(choices)}",
                "write the letter of an option",
            )
        if options.include_options:
            question += "\n" + "\n".join(f"{key}. {text}" for key, text in choices.items())
        return make_conversation(
            (Turn("user", question), Turn("assistant", letter)), options, role_names=("Question", "Answer"),
            system=optional_text(SYSTEM_COLUMN, row, options.columns), columns={"options": tuple(choices)},
        )  # fmt: skip


def parse_choices(value: Any) -> dict[str, str]:
    """Return the text of each option by its letter. The entries of a list get the letters A, B, C and so on. Errors: RowError."""
    if isinstance(value, str):
        value = parse_json_column(value)
    if isinstance(value, Mapping):
        choices = {str(key): str(text) for key, text in value.items() if text is not None}
    elif isinstance(value, list):
        choices = {chr(ord("A") + index): str(text) for index, text in enumerate(value[:26])}
    else:
        choices = {}
    if len(choices) < 2:
        raise RowError("DatasetRowInvalid", "there are fewer than two options", 'write {"A": "...", "B": "..."}')
    return choices


def read_question_and_answer(
    row: Mapping[str, Any], options: ReadOptions, question: ColumnRole, answer: ColumnRole,
    role_names: tuple[str, str] = ("User", "Assistant"),
    *, column_before: ColumnRole | None = None, column_after: ColumnRole | None = None,
) -> Conversation:  # fmt: skip
    """Return a conversation of one question and one answer. Errors: RowError.

    `column_before`, `column_after`: columns whose texts are added before and after the question.
    """
    question_text = required_text(question, row, options.columns)
    answer_text = required_text(answer, row, options.columns)
    if column_before and (text := optional_text(column_before, row, options.columns)):
        question_text = f"{text}\n\n{question_text}"
    if column_after and (text := optional_text(column_after, row, options.columns)):
        question_text = f"{question_text}\n\n{text}"
    turns = (Turn("user", require_text(question_text, "question")), Turn("assistant", answer_text))
    system = optional_text(SYSTEM_COLUMN, row, options.columns)
    return make_conversation(turns, options, system=system, role_names=role_names)


def _has_default_columns(row: Mapping[str, Any], columns: Columns, *names: str) -> bool:
    """Whether the row has all columns in `names`, and `dataset.columns` names neither a question nor an answer column."""
    return columns.question is None and columns.answer is None and row.keys() >= set(names)
