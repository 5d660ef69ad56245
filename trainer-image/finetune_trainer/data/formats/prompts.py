"""Formats with a prompt and answers to it: `promptCompletion`, `preference`, `unpairedPreference` and `promptOnly`.

Prompt and answers may be text or messages. An answer may also be the whole conversation; the prompt is then removed from the
beginning of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import (
    PROMPT_COLUMN,
    SYSTEM_COLUMN,
    ColumnRole,
    column_value,
    find_column,
    optional_text,
    required_value,
)
from finetune_trainer.data.formats.base import Format, ReadOptions
from finetune_trainer.data.formats.turns import is_trainable, make_conversation, parse_turns, with_system_prompt
from finetune_trainer.data.rows import Completion, Conversation, LabelledAnswer, Preference, Prompt, RowError, Turn

TurnsOrText = tuple[Turn, ...] | str
CHOSEN_COLUMN = ColumnRole("chosen", ("chosen",))
REJECTED_COLUMN = ColumnRole("rejected", ("rejected",))
LABEL_COLUMN = ColumnRole("label", ("label",))


class PromptCompletion(Format):
    """A prompt and its completion."""

    name = DatasetFormat.PROMPT_COMPLETION
    question = ColumnRole("question", ("prompt", "instruction", "question"))
    answer = ColumnRole("answer", ("completion", "response", "output", "answer"))
    required = (question, answer)

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        return columns.question is None and columns.answer is None and row.keys() >= {"prompt", "completion"}

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation | Completion:
        prompt = _parse_turns_or_text(required_value(self.question, row, options.columns), "prompt")
        completion = _parse_turns_or_text(required_value(self.answer, row, options.columns), "completion")
        system = optional_text(SYSTEM_COLUMN, row, options.columns)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion.strip():
                raise RowError("NoTrainableToken", "the completion is empty", "write a text, or remove the row")
            return Completion(_prepend_system_prompt(prompt, options, system), completion)
        question, answer = _remove_prompt_from_answers(
            () if _is_prompt_in_answers(prompt, completion) else _to_turns(prompt, "user"),
            completion=_to_turns(completion, "assistant"),
            ignores_system_prompts=_replaces_system_prompts(options, system),
            allows_further_question=not isinstance(prompt, str),
        )
        untrained_question = tuple(replace(turn, weight=0) for turn in question)
        return make_conversation((*untrained_question, *answer), options, system=system)


class PairedPreference(Format):
    """A better and a worse answer to one prompt. If there is no prompt column, the shared beginning of the answers is the prompt."""

    name = DatasetFormat.PREFERENCE
    required = (CHOSEN_COLUMN, REJECTED_COLUMN)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Preference:
        chosen_turns = _parse_turns_or_text(required_value(CHOSEN_COLUMN, row, options.columns), "chosen")
        rejected_turns = _parse_turns_or_text(required_value(REJECTED_COLUMN, row, options.columns), "rejected")
        prompt_value = column_value(PROMPT_COLUMN, row, options.columns)
        prompt = _parse_turns_or_text(prompt_value, "prompt") if prompt_value is not None else None
        is_prompt_in_answers = prompt is None or _is_prompt_in_answers(prompt, chosen_turns, rejected_turns)
        if is_prompt_in_answers:
            prompt, chosen_turns, rejected_turns = _split_shared_beginning(chosen_turns, rejected_turns)
        system = optional_text(SYSTEM_COLUMN, row, options.columns)
        prompt, chosen_turns, rejected_turns = _to_same_type(
            prompt, options, system, is_prompt_removed=is_prompt_in_answers, chosen=chosen_turns, rejected=rejected_turns
        )
        if chosen_turns == rejected_turns:
            raise RowError(
                "DatasetRowInvalid", "chosen and rejected are equal", "give two different answers, or remove the row"
            )
        for column, answer in (("chosen", chosen_turns), ("rejected", rejected_turns)):
            if not (answer.strip() if isinstance(answer, str) else any(is_trainable(turn) for turn in answer)):
                raise RowError("NoTrainableToken", f"the {column} answer is empty", "write a text, or remove the row")
        return Preference(prompt, chosen_turns, rejected_turns)


class UnpairedPreference(Format):
    """One answer to a prompt, labelled good (true) or bad (false).

    If one column holds the whole conversation, the labelled answer begins at the first assistant message.
    """

    name = DatasetFormat.UNPAIRED_PREFERENCE
    answer = ColumnRole("answer", ("completion", "response", "answer"))
    required = (PROMPT_COLUMN, answer, LABEL_COLUMN)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> LabelledAnswer:
        prompt = _parse_turns_or_text(required_value(PROMPT_COLUMN, row, options.columns), "prompt")
        completion = _parse_turns_or_text(required_value(self.answer, row, options.columns), "completion")
        label_value = required_value(LABEL_COLUMN, row, options.columns)
        label = {"true": True, "false": False, "1": True, "0": False}.get(str(label_value).strip().lower())
        if label is None:
            raise RowError("DatasetRowInvalid", f"label is {label_value!r}", "write true or false")
        system = optional_text(SYSTEM_COLUMN, row, options.columns)
        row_columns = row.keys()
        is_same_column = find_column(PROMPT_COLUMN, row_columns, options.columns) == find_column(self.answer, row_columns, options.columns)
        is_prompt_in_answer = is_same_column or _is_prompt_in_answers(prompt, completion)
        if is_prompt_in_answer and not isinstance(completion, str):
            prompt, completion = _split_at_first_answer(completion)
        prompt, completion = _to_same_type(prompt, options, system, is_prompt_removed=is_prompt_in_answer, completion=completion)
        return LabelledAnswer(prompt, completion, label)


class PromptOnly(Format):
    """A prompt for which the model generates answers. The row's other columns are passed to the rewards."""

    name = DatasetFormat.PROMPT_ONLY
    required = (PROMPT_COLUMN,)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Prompt:
        prompt = _parse_turns_or_text(required_value(PROMPT_COLUMN, row, options.columns), "prompt")
        prompt_column = find_column(PROMPT_COLUMN, row.keys(), options.columns)
        (prompt,) = _to_same_type(prompt, options, optional_text(SYSTEM_COLUMN, row, options.columns))
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise RowError("RowEmpty", "the prompt is empty", "write a text, or remove the row")
        return Prompt(prompt, {key: value for key, value in row.items() if key != prompt_column})


def _parse_turns_or_text(value: Any, column: str) -> TurnsOrText:
    """Parse a column that holds text, messages, one message, or an object with messages. Errors: RowError."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = _read_messages_of_object(value, column)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list) and value:
        return parse_turns(value)
    if isinstance(value, list):
        raise RowError("ConversationEmpty", f"`{column}` has no messages", "write messages, or remove the row")
    raise RowError(
        "DatasetRowInvalid", f"`{column}` is neither text nor messages", "write a string, or an array of messages"
    )


def _read_messages_of_object(value: Mapping[str, Any], column: str) -> list[Any]:
    """Return the messages of an object `{messages, tools, ...}`, as in OpenAI's preference files. Errors: RowError if the object has tools."""
    if value.get("tools"):
        raise RowError(
            "DatasetRowInvalid", f"`{column}` holds tools, but only `messages` rows of sft support tools",
            "remove the tools, or the row",
        )  # fmt: skip
    return list(value["messages"])


def _to_turns(value: TurnsOrText, role: str) -> tuple[Turn, ...]:
    return (Turn(role, value),) if isinstance(value, str) else value


def _prepend_system_prompt(prompt: str, options: ReadOptions, system: str | None) -> str:
    """Put a system prompt before a text prompt. The spec's system prompt takes precedence over the column's."""
    system = options.system_prompt if options.system_prompt is not None else system
    return f"{system}\n\n{prompt}" if system else prompt


def _is_prompt_in_answers(prompt: TurnsOrText, *answers: TurnsOrText) -> bool:
    """Whether the prompt is blank, and every answer is a whole conversation that begins with a user message."""
    are_whole_conversations = (
        not isinstance(answer, str) and [turn.role for turn in _split_system_prompt(answer)[1][:1]] == ["user"]
        for answer in answers
    )  # fmt: skip
    return isinstance(prompt, str) and not prompt.strip() and all(are_whole_conversations)


def _replaces_system_prompts(options: ReadOptions, system: str | None) -> bool:
    """Whether a system prompt from the spec or from a column replaces the system prompts in the messages."""
    return options.system_prompt is not None or system is not None


def _split_shared_beginning(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return the shared beginning of both answers as the prompt, and the remainder of each answer. Errors: RowError PromptMissing."""
    shared_length = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared_length += 1
    if isinstance(chosen, str) and 0 < shared_length < len(chosen):  # Split between words, not inside a word.
        shared_length = max(chosen.rfind(" ", 0, shared_length), chosen.rfind("\n", 0, shared_length)) + 1
    if shared_length == 0 or type(chosen) is not type(rejected):
        raise RowError(
            "PromptMissing",
            "there is no prompt, and chosen and rejected have no shared beginning",
            "add a column `prompt`",
        )
    return chosen[:shared_length], chosen[shared_length:], rejected[shared_length:]


def _split_at_first_answer(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Return the turns before the first assistant message, and the turns from this message on. Errors: RowError NoTrainableToken."""
    answer_index = next((index for index, turn in enumerate(turns) if turn.role == "assistant"), None)
    if answer_index is None:
        raise RowError("NoTrainableToken", "`completion` has no answer", "write an answer, or remove the row")
    return turns[:answer_index], turns[answer_index:]


def _to_same_type(
    prompt: Any, options: ReadOptions, system: str | None, *, is_prompt_removed: bool = False, **answers: Any
) -> tuple[Any, ...]:
    """Convert prompt and answers to the same type (text if all are text, else turns), and add the system prompt.

    `is_prompt_removed`: whether the answers no longer begin with the prompt.
    """
    if all(isinstance(part, str) for part in (prompt, *answers.values())):
        return (_prepend_system_prompt(prompt, options, system), *answers.values())
    answer_turns = {name: _to_turns(answer, "assistant") for name, answer in answers.items()}
    turns, answers_after_prompt = _to_turns(prompt, "user"), list(answer_turns.values())
    if not is_prompt_removed:
        turns, *answers_after_prompt = _remove_prompt_from_answers(
            turns, ignores_system_prompts=_replaces_system_prompts(options, system), **answer_turns
        )
    return (with_system_prompt(turns, options.system_prompt, system), *answers_after_prompt)


def _remove_prompt_from_answers(
    prompt: tuple[Turn, ...], *, ignores_system_prompts: bool = False, allows_further_question: bool = False, **answers: tuple[Turn, ...]
) -> tuple[tuple[Turn, ...], ...]:  # fmt: skip
    """Remove the prompt from the beginning of each answer that is a whole conversation. Returns the prompt and the answers.

    If only the answers have a system prompt, it is moved to the prompt. `answers`: the answers by column name.
    `ignores_system_prompts`: whether system prompts may differ, because all are replaced later. `allows_further_question`: whether an
    answer may begin with a user message other than the prompt. An answer that contains the prompt anywhere but at its beginning is always refused.
    Errors: RowError PromptMismatch, NoTrainableToken (nothing follows the prompt).
    """
    system_turns, question = _split_system_prompt(prompt)
    remaining_answers = []
    for column, answer in answers.items():
        answer_system_turns, answer_turns = _split_system_prompt(answer)
        if question and _has_same_contents(answer_turns[: len(question)], question):
            answer_turns = answer_turns[len(question) :]
            if not answer_turns:
                raise RowError(
                    "NoTrainableToken", f"`{column}` ends with the prompt and has no answer", "write an answer, or remove the row"
                )
        elif (
            question
            and answer_turns
            and question[-1].role == answer_turns[0].role == "user"
            and (not allows_further_question or _contains_turns(answer_turns, question))
        ):
            raise RowError(
                "PromptMismatch", f"`{column}` begins with a user message that is not the prompt",
                f"begin `{column}` with the whole prompt or with the answer; or leave out `prompt` if chosen and rejected contain the prompt",
            )  # fmt: skip
        if answer_system_turns and system_turns and not ignores_system_prompts and not _has_same_contents(answer_system_turns, system_turns):
            raise RowError(
                "PromptMismatch",
                f"`{column}` has a system prompt that differs from another system prompt of the row",
                "write one system prompt",
            )
        system_turns = system_turns or answer_system_turns
        remaining_answers.append(answer_turns)
    return ((*system_turns, *question), *remaining_answers)


def _split_system_prompt(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """Split the turns into the system prompt at their beginning (one turn or none) and the other turns."""
    system_turn_count = int(bool(turns) and turns[0].role == "system")
    return turns[:system_turn_count], turns[system_turn_count:]


def _contains_turns(turns: tuple[Turn, ...], searched_turns: tuple[Turn, ...]) -> bool:
    return any(_has_same_contents(turns[start : start + len(searched_turns)], searched_turns) for start in range(len(turns)))


def _has_same_contents(left: tuple[Turn, ...], right: tuple[Turn, ...]) -> bool:
    """Whether roles and contents are equal. Leading and trailing blanks do not count, because the columns of a row often differ in them."""
    return [(turn.role, turn.content.strip(), turn.extra) for turn in left] == [
        (turn.role, turn.content.strip(), turn.extra) for turn in right
    ]
