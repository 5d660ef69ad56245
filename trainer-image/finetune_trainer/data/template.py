"""Stage 5, render: convert an example to a text, and find the character spans of the text that are trained on.

If the user sets marker strings, they show where an answer begins and ends. Otherwise, the generation markers of the chat template
(`{% generation %}`) show where answers begin and end. If the template has no generation markers, the conversation is rendered turn by turn: the
answer is the text that the template adds after the generation prompt. Some templates render a turn differently if more turns follow. If the
template does so, the trainer searches the text for the answer's content. If the content cannot be found, the template is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
from finetune_api.errors import ConfigError

from finetune_trainer.data.rows import Completion, Conversation, Example, RowError, Text, Turn
from finetune_trainer.data.time_limit import TimeLimitExceeded, time_limit

CharSpan = tuple[int, int]
_SENTINEL_TEXT = "\ue000\ue001\ue002"
"""Characters from a private-use area of Unicode. No tokenizer, template or data set should contain these characters."""
TEMPLATE_TIMEOUT_SECONDS = 60.0
"""Time limit for one run of a chat template. Rendering a long conversation takes only milliseconds."""
_GENERATION_TAG_PATTERN = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTokenizer(Protocol):
    """The attributes of a tokenizer that rendering uses."""

    chat_template: str | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and the character spans that are trained on. A span includes its first position, but not its end."""

    text: str
    spans: tuple[CharSpan, ...]
    is_templated: bool
    """Whether a chat template rendered the text. A text from a chat template already contains its special tokens."""


@dataclass(frozen=True)
class RenderOptions:
    """Options for rendering examples."""

    tokenizer: ChatTokenizer
    use_chat_template: bool
    response_only: bool
    turn_markers: tuple[str, str] | None = None
    """The question marker and the answer marker from the spec. The question marker may be empty."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens of the tokenizer, longest first. The special token that ends an answer belongs to the trained span."""
    renders_text_as_turns: bool = True
    """Whether a text prompt and its text completion are rendered as turns. If False, the two texts are joined."""
    has_content_parts: bool = False
    """Whether the template reads the content of a message as a list of parts, as templates of vision-language models do."""


def render(example: Example, options: RenderOptions) -> Rendered:
    """Render one example.

    Errors: RowError TemplateRefusedRow, MarkerAbsent, FormatMismatch, ToolCallsDropped; ConfigError TemplateSpansUnknown, TemplateInvalid, TemplateTooSlow.
    """
    match example:
        case Text(text):
            rendering = Rendered(text, ((0, len(text)),), False)
        case Completion(prompt, completion):
            if options.use_chat_template and options.renders_text_as_turns:
                turns = (Turn("user", prompt), Turn("assistant", completion))
                return render(Conversation(turns), options)
            start = len(prompt) if options.response_only else 0
            rendering = Rendered(prompt + completion, ((start, len(prompt) + len(completion)),), False)
        case Conversation():
            rendering = (
                _render_with_template(example, options)
                if options.use_chat_template
                else _render_plain(example, options)
            )
        case _:
            raise RowError(
                "FormatMismatch",
                f"{type(example).__name__} rows have no text to learn",
                "choose a trainer.type that reads such rows",
            )
    return _find_spans_from_markers(rendering, options.turn_markers) if options.turn_markers and options.response_only else rendering


# ---- without a template


def _render_plain(example: Conversation, options: RenderOptions) -> Rendered:
    """Render each turn after the role name that the format uses, as in `Question: ...` and `Answer: ...`."""
    label_by_role = {"system": "System", "user": example.role_names[0], "assistant": example.role_names[1], "tool": "Tool"}
    text = ""
    trained_spans: list[CharSpan] = []
    untrained_spans: list[CharSpan] = []
    for turn in example.turns:
        text += ("\n" if text else "") + f"{label_by_role[turn.role]}: "
        if turn.role == "assistant":
            (trained_spans if turn.weight else untrained_spans).append((len(text), len(text) + len(turn.content)))
        text += turn.content
    return Rendered(text, tuple(trained_spans) if options.response_only else _find_spans_outside(untrained_spans, text), False)


def _find_spans_outside(untrained_spans: Sequence[CharSpan], text: str) -> tuple[CharSpan, ...]:
    """Return the spans of the text that are not in `untrained_spans`."""
    boundaries = [0, *(end for span in untrained_spans for end in span), len(text)]
    return tuple((start, end) for start, end in zip(boundaries[::2], boundaries[1::2], strict=True) if end > start)


# ---- with a template


def _render_with_template(example: Conversation, options: RenderOptions) -> Rendered:
    text = _apply_template(options, example.turns, example.tools)
    if options.response_only and options.turn_markers:
        return Rendered(text, (), True)
    weight = int(options.response_only)
    spans = _find_spans_from_generation_markers(example, weight, text, options)
    if spans is None:
        spans = [
            _find_answer_span(example, index, text, options)
            for index, turn in enumerate(example.turns)
            if turn.role == "assistant" and turn.weight == weight
        ]
    if options.response_only:
        _require_tool_calls(example.turns, "".join(text[start:end] for start, end in spans))
    return Rendered(text, tuple(spans) if options.response_only else _find_spans_outside(spans, text), True)


def _require_tool_calls(turns: Sequence[Turn], trained_text: str) -> None:
    """Refuse a template that leaves out the tool calls of an answer, because the model would learn an empty answer. Errors: RowError ToolCallsDropped."""
    calls = [call for turn in turns if turn.role == "assistant" and turn.weight for call in turn.extra.get("tool_calls", ())]
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        function_or_call = function if isinstance(function, Mapping) else call  # some data sets write the name in the call itself
        name = function_or_call.get("name") if isinstance(function_or_call, Mapping) else None
        if isinstance(name, str) and name not in trained_text:
            raise RowError(
                "ToolCallsDropped", f"the chat template does not write the call of the tool {name!r} into the answer",
                "give a template that writes `tool_calls` (dataset.chatTemplate), or remove the rows with tool calls",
            )  # fmt: skip


def _find_spans_from_generation_markers(
    example: Conversation, weight: int, text: str, options: RenderOptions
) -> list[CharSpan] | None:
    """Find the spans of the answers with this weight, from the template's generation markers. Each span includes the answer's end token.

    The first marked span belongs to the first answer, and so on. If the numbers of spans and answers differ, the spans are usable only if
    all answers have the same weight. Returns None if the spans are not usable or the template has no markers.
    """
    weights = [turn.weight for turn in example.turns if turn.role == "assistant"]
    if weight not in weights:
        return []
    marked_spans = _find_generation_spans(options, example.turns, example.tools, text)
    if marked_spans is None:
        return None
    if len(marked_spans) != len(weights):
        if len(set(weights)) > 1:
            return None
        weights = weights[:1] * len(marked_spans)
    return [
        _with_end_token(text, span, options.special_tokens)
        for span, answer_weight in zip(marked_spans, weights, strict=True)
        if answer_weight == weight
    ]


def _find_generation_spans(
    options: RenderOptions, turns: tuple[Turn, ...], tools: Sequence[Any], text: str
) -> list[CharSpan] | None:
    """Return the spans of `text` between generation markers; None if there are no markers, or if rendering with markers yields another text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    any_tokenizer: Any = options.tokenizer
    tool_descriptions = list(tools) or None
    template_source = any_tokenizer.get_chat_template(None, tool_descriptions)
    if not _GENERATION_TAG_PATTERN.search(template_source):
        return None
    rendering: Any = render_jinja_template(
        [[dict(turn.to_message(has_content_parts=options.has_content_parts)) for turn in turns]],
        tools=tool_descriptions, chat_template=template_source, return_assistant_tokens_mask=True,
        **any_tokenizer.special_tokens_map,
    )  # fmt: skip
    (rendered_text,), (spans,) = rendering  # a batch of one conversation
    nonempty_spans = [(start, end) for start, end in spans if end > start]
    return nonempty_spans if nonempty_spans and rendered_text == text else None


def _find_answer_span(example: Conversation, index: int, text: str, options: RenderOptions) -> CharSpan:
    """Return the span of `text` that the model must generate for turn `index`, with the end-of-turn token."""
    turns, tools = example.turns, example.tools
    text_before = _apply_template(options, turns[:index], tools, add_generation_prompt=True) if index else ""
    text_with_answer = text if index == len(turns) - 1 else _apply_template(options, turns[: index + 1], tools)
    if text_before and text.startswith(text_before) and text.startswith(text_with_answer) and len(text_with_answer) > len(text_before):
        return _with_end_token(text, (len(text_before), len(text_before) + len(text_with_answer[len(text_before) :].rstrip())), options.special_tokens)
    start, end = _find_content_span(turns, tools, index, text, options)
    if text_before and text.startswith(text_before) and len(text_before) <= start:
        start = len(text_before)
    return _with_end_token(text, (start, end), options.special_tokens)


def _find_content_span(
    turns: tuple[Turn, ...], tools: Sequence[Any], index: int, text: str, options: RenderOptions
) -> CharSpan:
    """Find the turn's content in `text`: render the conversation again with a sentinel in place of the content.

    Errors: ConfigError TemplateSpansUnknown.
    """
    turn = turns[index]
    changed_turns = (*turns[:index], Turn(turn.role, _SENTINEL_TEXT, turn.weight, turn.extra), *turns[index + 1 :])
    changed_text = _apply_template(options, changed_turns, tools)
    start = changed_text.find(_SENTINEL_TEXT)
    tail_length = len(changed_text) - start - len(_SENTINEL_TEXT)
    if (
        start < 0
        or changed_text.count(_SENTINEL_TEXT) != 1
        or text[:start] != changed_text[:start]
        or text[len(text) - tail_length :] != changed_text[len(changed_text) - tail_length :]
    ):
        raise ConfigError(
            "TemplateSpansUnknown", f"the chat template does not show where answer {index + 1} of a conversation begins and ends",
            hint="give a template with {% generation %} markers (dataset.chatTemplate), or set dataset.responseOnly.enabled: false",
        )  # fmt: skip
    return start, len(text) - tail_length


def _with_end_token(text: str, span: CharSpan, special_tokens: tuple[str, ...]) -> CharSpan:
    """Extend the span by the special token that ends the turn. Without training on this token, the model's answers would never end."""
    start, end = span
    if any(text[start:end].rstrip().endswith(token) for token in special_tokens):
        return span
    following_token = next((token for token in special_tokens if text.startswith(token, end)), "")
    return start, end + len(following_token)


def _find_spans_from_markers(rendering: Rendered, turn_markers: tuple[str, str]) -> Rendered:
    """Set the trained spans to the texts from each answer marker to the next question marker. Errors: RowError MarkerAbsent."""
    question_marker, answer_marker = turn_markers
    spans, position = [], 0
    while answer_marker and (marker_start := rendering.text.find(answer_marker, position)) >= 0:
        start = marker_start + len(answer_marker)
        end = rendering.text.find(question_marker, start) if question_marker else -1
        end = len(rendering.text) if end < 0 else end
        spans.append((start, end))
        position = end
    if not spans:
        raise RowError(
            "MarkerAbsent", f"the answer marker {answer_marker!r} does not occur in the rendered row: {rendering.text[:120]!r}...",
            "copy the marker from the rendered row, or leave out the markers of dataset.responseOnly",
        )  # fmt: skip
    return Rendered(rendering.text, tuple(spans), rendering.is_templated)


def _apply_template(
    options: RenderOptions, turns: tuple[Turn, ...], tools: Sequence[Any], *, add_generation_prompt: bool = False
) -> str:
    """Render the turns. Errors: RowError TemplateRefusedRow with the template's message; ConfigError TemplateInvalid, TemplateTooSlow."""
    messages: list[Mapping[str, Any]] = [turn.to_message(has_content_parts=options.has_content_parts) for turn in turns]
    try:
        with time_limit(TEMPLATE_TIMEOUT_SECONDS):
            return str(
                options.tokenizer.apply_chat_template(
                    messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
    except TimeLimitExceeded:
        raise ConfigError(
            "TemplateTooSlow", f"the chat template did not end within {TEMPLATE_TIMEOUT_SECONDS:g} s for a row with {len(turns)} turns",
            hint="remove loops from dataset.chatTemplate or from the template of the tokenizer: a template needs one loop over the messages",
        ) from None  # fmt: skip
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            "TemplateInvalid", f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            hint="correct dataset.chatTemplate, or leave it out to use the template of the tokenizer",
        ) from error  # fmt: skip
    except jinja2.TemplateError as error:
        raise RowError(
            "TemplateRefusedRow", f"the chat template refuses the conversation: {error}",
            f"give the turns in the order that the template expects (the row has: {', '.join(turn.role for turn in turns)})",
        ) from None  # fmt: skip
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        content_type = "a list of parts of the types `image` and `text`" if options.has_content_parts else "text"
        raise RowError(
            "TemplateRefusedRow", f"the chat template fails for the conversation: {type(error).__name__}: {str(error)[:200]}",
            f"correct the template, for example in dataset.chatTemplate: the content of each turn is {content_type}",
        ) from None  # fmt: skip
