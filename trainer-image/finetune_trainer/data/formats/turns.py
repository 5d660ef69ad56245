"""Parses messages into turns, for all formats with messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.data.formats.base import ReadOptions
from finetune_trainer.data.rows import Conversation, GivenImage, RowError, Turn

ROLE_OF_NAME = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
"""Maps each accepted role name to the role that chat templates use."""
IMAGE_PARTS = ("image", "image_url")
"""Types of content parts that hold an image."""
IMAGE_KEYS = ("image", "image_url", "path", "url", "base64", "bytes")
"""Fields of a content part that may hold the image."""


def parse_json_column(json_text: str) -> Any:
    """Parse the value of a text column that contains JSON, as in CSV and Parquet files. Errors: RowError DatasetRowInvalid."""
    try:
        return json.loads(json_text)
    except ValueError:
        raise RowError(
            "DatasetRowInvalid", "an array was expected, but the text is not JSON", "write an array"
        ) from None


def parse_conversation(messages: Any, options: ReadOptions, *, system: str | None = None) -> Conversation:
    """Parse an array of messages. Errors: RowError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(
            "DatasetRowInvalid",
            f"messages are {type(messages).__name__}, not an array",
            'write [{"role": ..., "content": ...}]',
        )
    if not messages:
        raise RowError("ConversationEmpty", "the conversation has no messages", "write messages, or remove the row")
    return make_conversation(parse_turns(messages), options, system=system)


def parse_turns(messages: Sequence[Any]) -> tuple[Turn, ...]:
    """Return one turn for each message. Errors: RowError."""
    return tuple(_parse_turn(message, number) for number, message in enumerate(messages, start=1))


def _parse_turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(
            "DatasetRowInvalid",
            f"message {number} is {type(message).__name__}, not an object",
            'write {"role": ..., "content": ...}',
        )
    role = message.get("role", message.get("from"))
    if role is None:
        raise RowError(
            "DatasetRowInvalid",
            f"message {number} has neither `role` nor `from`; it has {', '.join(message)}",
            "write `role`",
        )
    template_role = ROLE_OF_NAME.get(str(role).strip().lower())
    if template_role is None:
        raise RowError(
            "UnknownRole", f"message {number} has the unknown role {role!r}", f"write one of {', '.join(ROLE_OF_NAME)}"
        )
    extra = {
        key: message[key]
        for key in ("tool_calls", "name", "tool_call_id", "reasoning_content", "thinking")
        if message.get(key) is not None
    }
    if "tool_calls" in extra:
        extra["tool_calls"] = _parse_tool_calls(extra["tool_calls"], number)
    content = next((message[key] for key in ("content", "value", "text") if key in message), None)
    if content is None and "tool_calls" not in extra:
        raise RowError("DatasetRowInvalid", f"message {number} ({role}) has no content", "write `content`")
    parts = _parse_content(content, number)
    has_images = any(isinstance(part, GivenImage) for part in parts)
    text = "".join(part for part in parts if isinstance(part, str))
    return Turn(template_role, text, _parse_weight(message.get("weight"), number), extra, parts if has_images else ())


def _parse_content(content: Any, number: int) -> tuple[str | GivenImage, ...]:
    """Return the texts and images of a message. Errors: RowError DatasetRowInvalid."""
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,)
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return tuple(_parse_part(part, number) for part in content)
    raise RowError(
        "DatasetRowInvalid", f"message {number}: content is neither text nor an array of parts", "write a string, or an array of text and image parts"
    )


def _parse_part(part: Mapping[str, Any], number: int) -> str | GivenImage:
    """Parse one part of a message's content. In Parquet files, every part has the fields of all part types; absent values are null."""
    part_type = part.get("type") or "text"
    if part_type == "text":
        return str(part.get("text") or "")
    if part_type not in IMAGE_PARTS:
        raise RowError(
            "DatasetRowInvalid", f"message {number}: content has a part of type {part_type!r}", f"write parts of type text, {' or '.join(IMAGE_PARTS)}"
        )
    key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
    value = part[key] if key else None
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    return GivenImage(f"data:image;base64,{value}" if key == "base64" and isinstance(value, str) else value)


def _parse_weight(weight: Any, number: int) -> int:
    if weight is None:
        return 1
    if weight in (0, 1) and not isinstance(weight, bool):
        return int(weight)
    raise RowError(
        "DatasetRowInvalid", f"message {number}: weight is {weight!r}", "write 0 (not trained on) or 1 (trained on)"
    )


def _parse_tool_calls(calls: Any, number: int) -> list[Any]:
    """Parse the arguments of tool calls. APIs write arguments as JSON text, but chat templates expect objects."""
    if not isinstance(calls, list):
        raise RowError("DatasetRowInvalid", f"message {number}: tool_calls is not an array", "write an array")
    parsed_calls = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
            except ValueError:
                raise RowError(
                    "DatasetRowInvalid", f"message {number}: the arguments of a tool call are not JSON", "write JSON"
                ) from None
        parsed_calls.append(call)
    return parsed_calls


def make_conversation(
    turns: tuple[Turn, ...], options: ReadOptions, *, system: str | None = None,
    role_names: tuple[str, str] = ("User", "Assistant"), columns: Mapping[str, Any] | None = None,
) -> Conversation:  # fmt: skip
    """Build a conversation that begins with its system prompt. Errors: RowError ConversationEmpty, NoTrainableToken."""
    turns = with_system_prompt(turns, options.system_prompt, system)
    if all(turn.role == "system" for turn in turns):
        raise RowError("ConversationEmpty", "the conversation has only a system prompt", "add a question and an answer")
    if options.needs_answer and not any(is_trainable(turn) for turn in turns):
        raise RowError(
            "NoTrainableToken", "no answer to learn from: every assistant message is absent, empty or has weight 0",
            "add an answer, or set dataset.responseOnly.enabled: false to train on all tokens",
        )  # fmt: skip
    return Conversation(turns, role_names=role_names, columns=columns or {})


def is_trainable(turn: Turn) -> bool:
    """Whether the turn is an answer with content and weight 1."""
    return turn.role == "assistant" and turn.weight == 1 and bool(turn.content.strip() or turn.extra.get("tool_calls"))


def with_system_prompt(turns: tuple[Turn, ...], spec_prompt: str | None, column_prompt: str | None) -> tuple[Turn, ...]:
    """Return the turns with at most one system prompt.

    The system prompt of the spec is used if there is one, else that of the column, else that of the conversation.
    """
    prompt = spec_prompt if spec_prompt is not None else column_prompt
    if prompt is None:
        return turns
    other_turns = turns[1:] if turns and turns[0].role == "system" else turns
    return (Turn("system", prompt), *other_turns)
