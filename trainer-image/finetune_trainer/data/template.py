"""Stage 5, template: an example becomes one text and the spans of it that are learned.

Where an answer begins and ends is never guessed from marker strings unless the user gives them. A template with generation
markers (`{% generation %}`) says it itself; for any other the conversation is rendered turn by turn: what the template adds for
an answer, after the header it writes when asked for one, is the answer. Templates that render earlier turns differently once
later ones follow are handled by looking for the answer's own text; what stays unknown is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
from finetune_api.errors import ConfigError

from finetune_trainer.data.rows import Completion, Conversation, Example, RowError, Text, Turn

Span = tuple[int, int]
_SENTINEL = "\ue000\ue001\ue002"
"""Private-use characters that no tokenizer, template or data set contains."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTokenizer(Protocol):
    """What of a tokenizer is needed here."""

    chat_template: str | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and the half-open character spans that the loss covers. `templated`: special tokens stand in the text already."""

    text: str
    spans: tuple[Span, ...]
    templated: bool


@dataclass(frozen=True)
class Style:
    """How examples are rendered."""

    tokenizer: ChatTokenizer
    use_chat_template: bool
    response_only: bool
    markers: tuple[str, str] | None = None
    """Question and answer marker of the spec; the second alone is enough."""
    specials: tuple[str, ...] = ()
    """Special tokens of the tokenizer, longest first: the end of a turn is learned with it."""
    text_as_turns: bool = True
    """Whether a prompt and a completion that are text become turns too, or are joined as they are."""


def render(example: Example, style: Style) -> Rendered:
    """The text of one example. Errors: RowError TemplateRefusedRow; ConfigError TemplateSpansUnknown, MarkerAbsent."""
    match example:
        case Text(text):
            rendered = Rendered(text, ((0, len(text)),), False)
        case Completion(prompt, completion):
            if style.use_chat_template and style.text_as_turns:
                turns = (Turn("user", prompt), Turn("assistant", completion))
                return render(Conversation(turns), style)
            start = len(prompt) if style.response_only else 0
            rendered = Rendered(prompt + completion, ((start, len(prompt) + len(completion)),), False)
        case Conversation():
            rendered = _templated(example, style) if style.use_chat_template else _plain(example, style)
        case _:
            raise RowError(
                "FormatMismatch",
                f"{type(example).__name__} rows have no text to learn",
                "choose the trainer that reads them",
            )
    return _marked(rendered, style.markers) if style.markers and style.response_only else rendered


def prompt_text(turns: tuple[Turn, ...], style: Style, tools: Sequence[Any] = ()) -> str:
    """A prompt as the model sees it when it has to answer."""
    return _apply(style.tokenizer, turns, tools, open_answer=True)


# ---- without a template


def _plain(example: Conversation, style: Style) -> Rendered:
    """`Question: ...` and `Answer: ...` lines with the format's own words."""
    words = {"system": "System", "user": example.words[0], "assistant": example.words[1], "tool": "Tool"}
    text, spoken, silent = "", [], []
    for turn in example.turns:
        text += ("\n" if text else "") + f"{words[turn.role]}: "
        if turn.role == "assistant":
            (spoken if turn.weight else silent).append((len(text), len(text) + len(turn.content)))
        text += turn.content
    return Rendered(text, tuple(spoken) if style.response_only else _all_but(silent, text), False)


def _all_but(silent: Sequence[Span], text: str) -> tuple[Span, ...]:
    """Everything, less the answers of weight 0."""
    ends = [0, *(place for span in silent for place in span), len(text)]
    return tuple((start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if end > start)


# ---- with a template


def _templated(example: Conversation, style: Style) -> Rendered:
    text = _apply(style.tokenizer, example.turns, example.tools)
    if style.response_only and style.markers:
        return Rendered(text, (), True)
    wanted = int(style.response_only)
    spans = _said_by_template(example, wanted, text, style)
    if spans is None:
        spans = [
            _answer_span(example, place, text, style)
            for place, turn in enumerate(example.turns)
            if turn.role == "assistant" and turn.weight == wanted
        ]
    return Rendered(text, tuple(spans) if style.response_only else _all_but(spans, text), True)


def _said_by_template(example: Conversation, wanted: int, text: str, style: Style) -> list[Span] | None:
    """Answers of weight `wanted` by the template's own generation markers, each with its end; None: they do not tell.

    The pieces are told apart by their order. Where there are more or fewer of them than answers, they tell if all answers weigh the same.
    """
    weights = [turn.weight for turn in example.turns if turn.role == "assistant"]
    if wanted not in weights:
        return []
    marked = _generated(style.tokenizer, example.turns, example.tools, text)
    if marked is None:
        return None
    if len(marked) != len(weights):
        if len(set(weights)) > 1:
            return None
        weights = weights[:1] * len(marked)
    return [
        _with_end(text, span, style.specials) for span, weight in zip(marked, weights, strict=True) if weight == wanted
    ]


def _generated(tokenizer: ChatTokenizer, turns: tuple[Turn, ...], tools: Sequence[Any], text: str) -> list[Span] | None:
    """What stands between generation markers in `text`; None: the template has none there, or the tokenizer does more than its template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    known: Any = tokenizer
    functions = list(tools) or None
    source = known.get_chat_template(None, functions)
    if not _GENERATION.search(source):
        return None
    rendering: Any = render_jinja_template(
        [[dict(turn.message()) for turn in turns]], tools=functions, chat_template=source, return_assistant_tokens_mask=True,
        **known.special_tokens_map,
    )  # fmt: skip
    (rendered,), (spans,) = rendering  # of the one conversation
    found = [(start, end) for start, end in spans if end > start]
    return found if found and rendered == text else None


def _answer_span(example: Conversation, place: int, text: str, style: Style) -> Span:
    """Characters of `text` that answer `place` consists of, its end-of-turn token included."""
    turns, tools = example.turns, example.tools
    head = _apply(style.tokenizer, turns[:place], tools, open_answer=True) if place else ""
    whole = text if place == len(turns) - 1 else _apply(style.tokenizer, turns[: place + 1], tools)
    if head and text.startswith(head) and text.startswith(whole) and len(whole) > len(head):
        return _with_end(text, (len(head), len(head) + len(whole[len(head) :].rstrip())), style.specials)
    inside = _content_span(turns, tools, place, text, style.tokenizer)
    start = len(head) if head and text.startswith(head) and len(head) <= inside[0] else inside[0]
    return _with_end(text, (start, inside[1]), style.specials)


def _content_span(
    turns: tuple[Turn, ...], tools: Sequence[Any], place: int, text: str, tokenizer: ChatTokenizer
) -> Span:
    """Where the answer's own text stands, found by rendering the conversation with another text in its place."""
    turn = turns[place]
    other = (*turns[:place], Turn(turn.role, _SENTINEL, turn.weight, turn.extra), *turns[place + 1 :])
    changed = _apply(tokenizer, other, tools)
    at = changed.find(_SENTINEL)
    tail = len(changed) - at - len(_SENTINEL)
    if (
        at < 0
        or changed.count(_SENTINEL) != 1
        or text[:at] != changed[:at]
        or text[len(text) - tail :] != changed[len(changed) - tail :]
    ):
        raise ConfigError(
            "TemplateSpansUnknown", f"the chat template does not tell where answer {place + 1} of a conversation begins and ends",
            hint="give a template with {% generation %} markers (dataset.chatTemplate), or set dataset.responseOnly.enabled: false",
        )  # fmt: skip
    return at, len(text) - tail


def _with_end(text: str, span: Span, specials: tuple[str, ...]) -> Span:
    """The span with the special token that ends the turn: a model that never learns it never stops."""
    start, end = span
    if any(text[start:end].rstrip().endswith(one) for one in specials):
        return span
    following = next((one for one in specials if text.startswith(one, end)), "")
    return start, end + len(following)


def _marked(rendered: Rendered, markers: tuple[str, str]) -> Rendered:
    """Spans after each answer marker, up to the next question marker. Errors: RowError MarkerAbsent."""
    question, answer = markers
    spans, at = [], 0
    while answer and (found := rendered.text.find(answer, at)) >= 0:
        start = found + len(answer)
        end = rendered.text.find(question, start) if question else -1
        end = len(rendered.text) if end < 0 else end
        spans.append((start, end))
        at = end
    if not spans:
        raise RowError(
            "MarkerAbsent", f"the answer marker {answer!r} does not occur in the rendered row: {rendered.text[:120]!r}...",
            "copy the marker from the rendered row, or leave dataset.responseOnly's markers out",
        )  # fmt: skip
    return Rendered(rendered.text, tuple(spans), rendered.templated)


def _apply(
    tokenizer: ChatTokenizer, turns: tuple[Turn, ...], tools: Sequence[Any], *, open_answer: bool = False
) -> str:
    """Render with the chat template. Errors: RowError TemplateRefusedRow with the template's own words."""
    messages: list[Mapping[str, Any]] = [turn.message() for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=open_answer
            )
        )
    except jinja2.TemplateError as error:
        raise RowError(
            "TemplateRefusedRow", f"the chat template refuses the conversation: {error}",
            f"give turns in the order it wants (found: {', '.join(turn.role for turn in turns)})",
        ) from None  # fmt: skip
