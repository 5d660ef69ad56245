"""Stage 3, normalise: rows of any format become one of six typed examples, or a named error with its row number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data import columns as names
from finetune_trainer.data import oasst
from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    Judged,
    Preference,
    Prompt,
    Raw,
    RowError,
    Text,
    Turn,
)

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""Every speaker that is understood, and who that is for a chat template."""
WITHOUT_ANSWERS = (DatasetFormat.PROMPT_ONLY,)


@dataclass(frozen=True)
class Recipe:
    """What of the spec decides how a row is read."""

    format: DatasetFormat
    columns: Columns
    system_prompt: str | None = None
    template: str | None = None
    include_options: bool = True
    answers_needed: bool = True
    """False where the loss covers every token: a conversation without an answer can be learned then."""


def normalise(rows: Iterable[Raw], recipe: Recipe) -> Iterator[tuple[Raw, Example | RowError]]:
    """Every row with its example, or with what is wrong with it."""
    if recipe.format is DatasetFormat.OASST:
        for row, found in oasst.paths(rows):
            yield row, found if isinstance(found, RowError) else _attempt(_from_messages, found, recipe)
        return
    read = READERS[recipe.format]
    for row in rows:
        yield row, _attempt(read, row.value, recipe)


def _attempt(read: Callable[[Any, Recipe], Example], value: Any, recipe: Recipe) -> Example | RowError:
    try:
        return read(value, recipe)
    except RowError as error:
        return error


# ---- text


def _plain_text(row: Mapping[str, Any], recipe: Recipe) -> Text:
    return Text(_filled(names.required_text(names.TEXT, row, recipe.columns), "text"))


def _custom(row: Mapping[str, Any], recipe: Recipe) -> Text:
    """`{column}` is replaced by that column, `{{` and `}}` are braces."""

    def fill(match: re.Match[str]) -> str:
        whole = match.group(0)
        if whole in ("{{", "}}"):
            return whole[0]
        name = match.group(1)
        if name not in row:
            there = ", ".join(f"`{one}`" for one in row)
            raise RowError(
                "ColumnMissing", f"dataset.template names `{name}`; there are {there}", "name a column that is there"
            )
        return names.as_text(row[name], name) if row[name] is not None else ""

    return Text(_filled(re.sub(r"\{\{|\}\}|\{([^{}]+)\}", fill, recipe.template or ""), "rendered template"))


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise RowError("RowEmpty", f"the {what} is empty", "give it a text, or remove the row")
    return text


# ---- turns


def _messages(row: Mapping[str, Any], recipe: Recipe) -> Conversation:
    if names.pairs_instead(row.keys(), recipe.columns):
        return _pair(row, recipe, ("User", "Assistant"), None)
    found = names.required(names.MESSAGES, row, recipe.columns)
    if isinstance(found, str):  # a CSV or Parquet column that holds JSON
        found = _json_column(found)
    conversation = _from_messages(found, recipe, system=names.optional_text(names.SYSTEM, row, recipe.columns))
    tools = row.get("tools")
    tools = _json_column(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools is not None and not isinstance(tools, list):
        raise RowError("DatasetRowInvalid", "`tools` is not an array", "write an array of function descriptions")
    return replace(conversation, tools=tuple(tools or ()))


def _json_column(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(
            "DatasetRowInvalid", "an array of messages was expected, found a text that is not JSON", "write an array"
        ) from None


def _from_messages(found: Any, recipe: Recipe, *, system: str | None = None) -> Conversation:
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise RowError(
            "DatasetRowInvalid",
            f"messages are {type(found).__name__}, not an array",
            'write [{"role": ..., "content": ...}]',
        )
    if not found:
        raise RowError("ConversationEmpty", "the conversation has no messages", "give it messages, or remove the row")
    turns = tuple(_turn(message, place) for place, message in enumerate(found, start=1))
    return _conversation(turns, recipe, system=system)


def _turn(message: Any, place: int) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(
            "DatasetRowInvalid",
            f"message {place} is {type(message).__name__}, not an object",
            'write {"role": ..., "content": ...}',
        )
    role = message.get("role", message.get("from"))
    if role is None:
        raise RowError(
            "DatasetRowInvalid",
            f"message {place} has neither `role` nor `from`; there are {', '.join(message)}",
            "name the speaker",
        )
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise RowError(
            "UnknownRole", f"message {place}: the speaker {role!r} is not known", f"write one of {', '.join(ROLES)}"
        )
    extra = {
        key: message[key]
        for key in ("tool_calls", "name", "tool_call_id", "reasoning_content")
        if message.get(key) is not None
    }
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], place)
    content = next((message[key] for key in ("content", "value", "text") if key in message), None)
    if content is None and "tool_calls" not in extra:
        raise RowError("DatasetRowInvalid", f"message {place} ({role}) has no content", "write `content`")
    return Turn(known, _content(content, place), _weight(message.get("weight"), place), extra)


def _content(content: Any, place: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type", "text") == "text" for part in content
    ):
        return "".join(str(part.get("text", "")) for part in content)
    raise RowError("DatasetRowInvalid", f"message {place}: content is neither text nor text parts", "write a string")


def _weight(weight: Any, place: int) -> int:
    if weight is None:
        return 1
    if weight in (0, 1) and not isinstance(weight, bool):
        return int(weight)
    raise RowError(
        "DatasetRowInvalid", f"message {place}: weight is {weight!r}", "write 0 (not learned) or 1 (learned)"
    )


def _tool_calls(calls: Any, place: int) -> list[Any]:
    """Tool calls with their arguments as objects: APIs send them as JSON text, templates want to print them themselves."""
    if not isinstance(calls, list):
        raise RowError("DatasetRowInvalid", f"message {place}: tool_calls is not an array", "write an array")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
            except ValueError:
                raise RowError(
                    "DatasetRowInvalid", f"message {place}: the arguments of a tool call are not JSON", "write JSON"
                ) from None
        result.append(call)
    return result


def _conversation(
    turns: tuple[Turn, ...], recipe: Recipe, *, system: str | None = None, words: tuple[str, str] = ("User", "Assistant"),
    columns: Mapping[str, Any] | None = None,
) -> Conversation:  # fmt: skip
    turns = with_system(turns, recipe.system_prompt, system)
    if all(turn.role == "system" for turn in turns):
        raise RowError("ConversationEmpty", "there is nothing but a system prompt", "add a question and an answer")
    if recipe.answers_needed and not any(_learnable(turn) for turn in turns):
        raise RowError(
            "NoTrainableToken", "no answer to learn from: every assistant message is absent, empty or has weight 0",
            "add an answer, or set dataset.responseOnly.enabled: false to learn all tokens",
        )  # fmt: skip
    return Conversation(turns, words=words, columns=columns or {})


def _learnable(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.weight == 1 and bool(turn.content.strip() or turn.extra.get("tool_calls"))


def with_system(turns: tuple[Turn, ...], override: str | None, column: str | None) -> tuple[Turn, ...]:
    """Put the system prompt first: the spec's beats the column's, which beats the conversation's own."""
    prompt = override if override is not None else column
    if prompt is None:
        return turns
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    return (Turn("system", prompt), *rest)


# ---- question and answer columns


def _pair(row: Mapping[str, Any], recipe: Recipe, words: tuple[str, str], passage: names.Slot | None) -> Conversation:
    question = names.required_text(names.QUESTION[recipe.format], row, recipe.columns)
    answer = names.required_text(names.ANSWER[recipe.format], row, recipe.columns)
    more = names.optional_text(passage, row, recipe.columns) if passage else None
    if more:
        question = f"{question}\n\n{more}" if passage is names.INPUT else f"{more}\n\n{question}"
    turns = (Turn("user", _filled(question, "question")), Turn("assistant", answer))
    return _conversation(turns, recipe, system=names.optional_text(names.SYSTEM, row, recipe.columns), words=words)


def _instruction(row: Mapping[str, Any], recipe: Recipe) -> Conversation:
    return _pair(row, recipe, ("Instruction", "Response"), names.INPUT)


def _alpaca(row: Mapping[str, Any], recipe: Recipe) -> Conversation:
    return _pair(row, recipe, ("Instruction", "Output"), names.INPUT)


def _qa(row: Mapping[str, Any], recipe: Recipe) -> Conversation:
    return _pair(row, recipe, ("Question", "Answer"), names.PASSAGE)


def _mcq(row: Mapping[str, Any], recipe: Recipe) -> Conversation:
    question = _filled(names.required_text(names.QUESTION[recipe.format], row, recipe.columns), "question")
    options = options_of(names.required(names.OPTIONS, row, recipe.columns))
    answer = names.required_text(names.ANSWER[recipe.format], row, recipe.columns).strip()
    letter = next((key for key in options if key.lower() == answer.strip("().:").lower()), None)
    letter = letter or next((key for key, text in options.items() if text.strip().lower() == answer.lower()), None)
    if letter is None:
        raise RowError(
            "AnswerNotAnOption",
            f"the answer {answer!r} is none of the options {', '.join(options)}",
            "write an option's letter",
        )
    if recipe.include_options:
        question += "\n" + "\n".join(f"{key}. {text}" for key, text in options.items())
    turns = (Turn("user", question), Turn("assistant", letter))
    system = names.optional_text(names.SYSTEM, row, recipe.columns)
    return _conversation(
        turns, recipe, system=system, words=("Question", "Answer"), columns={"options": tuple(options)}
    )


def options_of(found: Any) -> dict[str, str]:
    """Options by letter, from an object or a list (which gets A, B, C, ...). Errors: RowError."""
    if isinstance(found, str):
        found = _json_column(found)
    if isinstance(found, Mapping):
        options = {str(key): str(text) for key, text in found.items() if text is not None}
    elif isinstance(found, list):
        options = {chr(ord("A") + place): str(text) for place, text in enumerate(found[:26])}
    else:
        options = {}
    if len(options) < 2:
        raise RowError("DatasetRowInvalid", "fewer than two options", 'write {"A": "...", "B": "..."}')
    return options


# ---- prompt and completion, preferences


def _turns_or_text(found: Any, what: str) -> tuple[Turn, ...] | str:
    if isinstance(found, str):
        return found
    if isinstance(found, Mapping) and isinstance(found.get("messages"), list):
        found = _inside(found, what)
    if isinstance(found, list) and found:
        return tuple(_turn(message, place) for place, message in enumerate(found, start=1))
    if isinstance(found, list):
        raise RowError("ConversationEmpty", f"`{what}` has no messages", "give it messages, or remove the row")
    raise RowError(
        "DatasetRowInvalid", f"`{what}` is neither text nor messages", "write a string, or an array of messages"
    )


def _inside(found: Mapping[str, Any], what: str) -> list[Any]:
    """Messages of an object that holds them, as fine-tuning APIs write a prompt. Errors: RowError for tools."""
    if found.get("tools"):
        raise RowError(
            "DatasetRowInvalid", f"`{what}` holds tools, which only `messages` rows of sft are rendered with",
            "remove the tools, or the row",
        )  # fmt: skip
    return list(found["messages"])


def _prompt_completion(row: Mapping[str, Any], recipe: Recipe) -> Conversation | Completion:
    prompt = _turns_or_text(names.required(names.QUESTION[recipe.format], row, recipe.columns), "prompt")
    completion = _turns_or_text(names.required(names.ANSWER[recipe.format], row, recipe.columns), "completion")
    system = names.optional_text(names.SYSTEM, row, recipe.columns)
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowError("NoTrainableToken", "the completion is empty", "give it a text, or remove the row")
        lead = recipe.system_prompt if recipe.system_prompt is not None else system
        return Completion(f"{lead}\n\n{prompt}" if lead else prompt, completion)
    question, answer = _asked_once(
        () if _unasked(prompt, completion) else _as_turns(prompt, "user"), completion=_as_turns(completion, "assistant"),
        replaced=_replaced(recipe, system), goes_on=not isinstance(prompt, str),
    )  # fmt: skip
    asked = tuple(replace(turn, weight=0) for turn in question)
    return _conversation((*asked, *answer), recipe, system=system)


def _as_turns(found: tuple[Turn, ...] | str, role: str) -> tuple[Turn, ...]:
    return (Turn(role, found),) if isinstance(found, str) else found


def _unasked(prompt: tuple[Turn, ...] | str, *answers: tuple[Turn, ...] | str) -> bool:
    """Whether an empty prompt stands beside whole conversations, which begin with the question."""
    whole = (not isinstance(one, str) and [turn.role for turn in _led(one)[1][:1]] == ["user"] for one in answers)
    return isinstance(prompt, str) and not prompt.strip() and all(whole)


def _replaced(recipe: Recipe, system: str | None) -> bool:
    """Whether the conversations' own system prompts are not read: the spec or a column gives another."""
    return recipe.system_prompt is not None or system is not None


def _preference(row: Mapping[str, Any], recipe: Recipe) -> Preference:
    chosen = _turns_or_text(names.required(names.CHOSEN, row, recipe.columns), "chosen")
    rejected = _turns_or_text(names.required(names.REJECTED, row, recipe.columns), "rejected")
    found = names.value(names.QUESTION[recipe.format], row, recipe.columns)
    prompt = _turns_or_text(found, "prompt") if found is not None else None
    implicit = prompt is None or _unasked(prompt, chosen, rejected)
    if implicit:
        prompt, chosen, rejected = _common(chosen, rejected)
    system = names.optional_text(names.SYSTEM, row, recipe.columns)
    asked, better, worse = _alike(prompt, recipe, system, apart=implicit, chosen=chosen, rejected=rejected)
    if better == worse:
        raise RowError(
            "DatasetRowInvalid", "chosen and rejected are equal", "give two different answers, or remove the row"
        )
    for name, answer in (("chosen", better), ("rejected", worse)):
        if not (answer.strip() if isinstance(answer, str) else any(_learnable(turn) for turn in answer)):
            raise RowError("NoTrainableToken", f"the {name} answer is empty", "give it a text, or remove the row")
    return Preference(asked, better, worse)


def _common(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that chosen and rejected share at their beginning. Errors: RowError PromptMissing."""
    same = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        same += 1
    if isinstance(chosen, str) and 0 < same < len(chosen):  # do not cut a word: the answers begin where it begins
        same = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same)) + 1
    if same == 0 or type(chosen) is not type(rejected):
        raise RowError(
            "PromptMissing",
            "there is no prompt, and chosen and rejected share no beginning",
            "add a column `prompt`",
        )
    return chosen[:same], chosen[same:], rejected[same:]


def _alike(prompt: Any, recipe: Recipe, system: str | None, *, apart: bool = False, **answers: Any) -> tuple[Any, ...]:
    """Prompt and answers all as turns if one of them is, else all as text; with the system prompt in its place.

    `apart`: the prompt has been taken from the answers, which go on from it.
    """
    override = recipe.system_prompt
    if any(not isinstance(part, str) for part in (prompt, *answers.values())):
        said = {name: _as_turns(answer, "assistant") for name, answer in answers.items()}
        turns, rest = _as_turns(prompt, "user"), list(said.values())
        if not apart:
            turns, *rest = _asked_once(turns, replaced=_replaced(recipe, system), **said)
        return (with_system(turns, override, system), *rest)
    lead = override if override is not None else system
    return (f"{lead}\n\n{prompt}" if lead else prompt, *answers.values())


def _asked_once(
    prompt: tuple[Turn, ...], *, replaced: bool = False, goes_on: bool = False, **answers: tuple[Turn, ...]
) -> tuple[tuple[Turn, ...], ...]:
    """Prompt and answers, by the names of their columns, where an answer may be the whole conversation: without the prompt in it.

    `replaced`: system prompts may differ, another one is put in their place. `goes_on`: behind a question an answer may begin
    with a further one, as long as the prompt does not come later in it.
    A system prompt that only the whole conversations have goes to the prompt.
    Errors: RowError PromptMismatch (a conversation with another beginning), NoTrainableToken (nothing behind the prompt).
    """
    system, asked = _led(prompt)
    rest = []
    for name, answer in answers.items():
        own, said = _led(answer)
        if asked and _same(said[: len(asked)], asked):
            said = said[len(asked) :]
            if not said:
                raise RowError(
                    "NoTrainableToken", f"`{name}` ends with the prompt", "give it an answer, or remove the row"
                )
        elif asked and said and asked[-1].role == said[0].role == "user" and (not goes_on or _holds(said, asked)):
            raise RowError(
                "PromptMismatch", f"`{name}` begins with a message of the user that is not the prompt",
                "begin it with all messages of the prompt, or with the answer; or leave out `prompt` where chosen and rejected hold it",
            )  # fmt: skip
        if own and system and not replaced and not _same(own, system):
            raise RowError(
                "PromptMismatch",
                f"`{name}` has another system prompt than the rest of the row",
                "write one system prompt",
            )
        system = system or own
        rest.append(said)
    return ((*system, *asked), *rest)


def _led(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """The system prompt at the beginning, if there is one, and the other turns."""
    place = int(bool(turns) and turns[0].role == "system")
    return turns[:place], turns[place:]


def _holds(turns: tuple[Turn, ...], part: tuple[Turn, ...]) -> bool:
    """Whether `part` is said somewhere among the turns."""
    return any(_same(turns[place : place + len(part)], part) for place in range(len(turns)))


def _same(some: tuple[Turn, ...], others: tuple[Turn, ...]) -> bool:
    """Whether the same is said by the same speakers; columns of one data set differ in blanks at the ends."""
    return [(turn.role, turn.content.strip(), turn.extra) for turn in some] == [
        (turn.role, turn.content.strip(), turn.extra) for turn in others
    ]


def _judged(row: Mapping[str, Any], recipe: Recipe) -> Judged:
    prompt = _turns_or_text(names.required(names.QUESTION[recipe.format], row, recipe.columns), "prompt")
    completion = _turns_or_text(names.required(names.ANSWER[recipe.format], row, recipe.columns), "completion")
    label = names.required(names.LABEL, row, recipe.columns)
    truth = {"true": True, "false": False, "1": True, "0": False}.get(str(label).strip().lower())
    if truth is None:
        raise RowError("DatasetRowInvalid", f"label is {label!r}", "write true or false")
    system = names.optional_text(names.SYSTEM, row, recipe.columns)
    if unasked := _unasked(prompt, completion):
        prompt, completion = _first_answer(completion)
    asked, answer = _alike(prompt, recipe, system, apart=unasked, completion=completion)
    return Judged(asked, answer, truth)


def _first_answer(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
    """A whole conversation before and from its first answer. Errors: RowError NoTrainableToken."""
    place = next((place for place, turn in enumerate(turns) if turn.role == "assistant"), None)
    if place is None:
        raise RowError("NoTrainableToken", "`completion` has no answer", "give it an answer, or remove the row")
    return turns[:place], turns[place:]


def _prompt_only(row: Mapping[str, Any], recipe: Recipe) -> Prompt:
    prompt = _turns_or_text(names.required(names.QUESTION[recipe.format], row, recipe.columns), "prompt")
    name = names.column(names.QUESTION[recipe.format], row.keys(), recipe.columns)
    (asked,) = _alike(prompt, recipe, names.optional_text(names.SYSTEM, row, recipe.columns))
    if not asked or (isinstance(asked, str) and not asked.strip()):
        raise RowError("RowEmpty", "the prompt is empty", "give it a text, or remove the row")
    return Prompt(asked, {key: found for key, found in row.items() if key != name})


READERS: dict[DatasetFormat, Callable[[Mapping[str, Any], Recipe], Example]] = {
    DatasetFormat.PLAIN_TEXT: _plain_text,
    DatasetFormat.CUSTOM: _custom,
    DatasetFormat.MESSAGES: _messages,
    DatasetFormat.SHAREGPT: _messages,
    DatasetFormat.INSTRUCTION: _instruction,
    DatasetFormat.ALPACA: _alpaca,
    DatasetFormat.QA: _qa,
    DatasetFormat.MCQ: _mcq,
    DatasetFormat.PROMPT_COMPLETION: _prompt_completion,
    DatasetFormat.PREFERENCE: _preference,
    DatasetFormat.UNPAIRED_PREFERENCE: _judged,
    DatasetFormat.PROMPT_ONLY: _prompt_only,
}
