"""Rendering conversations with chat templates, and finding the characters to train on."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, DataError
from finetune_trainer.data import template
from finetune_trainer.data.prepare import add_template_variables
from finetune_trainer.data.rows import Completion, Conversation, Example, Prompt, RowError, Text, Turn
from finetune_trainer.data.template import RenderOptions, render
from finetune_trainer.data.time_limit import time_limit

from tests.support.data import SYSTEM_FIRST, prepare_rows, render_options, tokenizer, trained_texts
from tests.support.learning import TEN_ROWS
from tests.support.tiny import CHATML_MARKED, CHATML_TEMPLATE

THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A chat template as in reasoning models: only the last assistant message gets an empty think block."""
TWO_ANSWERS = (
    Turn("system", "be"),
    Turn("user", "one"),
    Turn("assistant", "red"),
    Turn("user", "two"),
    Turn("assistant", "green"),
)
MARKED_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant says: {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
"""A template without a generation prompt, whose generation markers exclude the end-of-turn token."""
MARKED_IN_PIECES = MARKED_TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content[:2] }}{% endgeneration %}{% generation %}{{ m.content[2:] + '<|im_end|>\n' }}", 1
)
MARKED_IN_PIECES = MARKED_IN_PIECES.replace("{% endgeneration %}<|im_end|>\n", "{% endgeneration %}")


def test_generation_markers_define_the_answers(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, MARKED_TEMPLATE))
    assert trained_texts(Conversation(TWO_ANSWERS), options) == ["red<|im_end|>", "green<|im_end|>"]
    turns = (*TWO_ANSWERS[:2], Turn("assistant", "red", 0), *TWO_ANSWERS[3:])
    assert trained_texts(Conversation(turns), options) == ["green<|im_end|>"]
    whole_rendering = render(Conversation(turns), render_options(options.tokenizer, response_only=False))
    assert [whole_rendering.text[end:start] for (_, end), (start, _) in zip(whole_rendering.spans, whole_rendering.spans[1:], strict=False)] == [
        "red<|im_end|>"
    ]
    unmarked_template = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert "says" in trained_texts(Conversation(TWO_ANSWERS), render_options(tokenizer(tmp_path / "b", unmarked_template)))[0]


def test_generation_markers_may_split_an_answer(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, MARKED_IN_PIECES))
    assert trained_texts(Conversation(TWO_ANSWERS), options) == ["re", "d<|im_end|>\n", "gr", "een<|im_end|>\n"]
    turns = (*TWO_ANSWERS[:2], Turn("assistant", "red", 0), *TWO_ANSWERS[3:])
    assert trained_texts(Conversation(turns), options) == ["<|im_start|>assistant says: green<|im_end|>"], (
        "if the marked spans do not match the answers, the content of the answers is searched in the text"
    )


def test_generation_markers_of_an_unused_template_are_ignored(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    tok.chat_template = {"default": CHATML_TEMPLATE, "tool_use": MARKED_TEMPLATE}
    assert trained_texts(Conversation(TWO_ANSWERS), render_options(tok)) == ["red<|im_end|>", "green<|im_end|>"]


def test_the_error_for_an_absent_marker_shows_the_rendered_row(tmp_path: Path) -> None:
    dataset = {"responseOnly": {"questionMarker": "<start_of_turn>user", "answerMarker": "<start_of_turn>model"}}
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path), dataset)
    assert caught.value.code == "MarkerAbsent"
    assert "train.jsonl, row 1" in caught.value.message and "<|im_start|>user" in caught.value.message


def test_an_error_that_the_template_raises_names_the_row(tmp_path: Path) -> None:
    rows = [TEN_ROWS[0], {"messages": [*TEN_ROWS[1]["messages"], {"role": "system", "content": "late"}]}]
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path, SYSTEM_FIRST, bos=True), {}, rows)
    assert caught.value.code == "TemplateRefusedRow"
    assert "row 2" in caught.value.message and "system must come first" in caught.value.message


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message['content'] + 1 }}{% endfor %}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{% for message in messages %}{{ message['content'] }}{{ 1 // 0 }}{% endfor %}", "ZeroDivisionError: integer division or modulo by zero"),
    ],
)
def test_an_error_in_the_expressions_of_a_template_names_the_row(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path, template), {})
    assert caught.value.code == "TemplateRefusedRow"
    assert f"row 1: the chat template fails for the conversation: {message}" in caught.value.message
    assert "the content of each turn is text" in str(caught.value)


def mark_spans(example: Example, options: RenderOptions) -> str:
    """Return the rendered text with « and » around each trained span, and [ and ] in place of <|im_start|> and <|im_end|>."""
    rendering = render(example, options)
    text = rendering.text
    for start, end in reversed(rendering.spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text.replace("<|im_start|>", "[").replace("<|im_end|>", "]")


HI, HO, TWO, GREEN = Turn("user", "hi"), Turn("assistant", "ho"), Turn("user", "two"), Turn("assistant", "green")
UNTRAINED_HO, UNTRAINED_GREEN = Turn("assistant", "ho", 0), Turn("assistant", "green", 0)
UPPER_TEMPLATE = CHATML_TEMPLATE.replace("message['content'] +", "(message['content'] | upper) +")
TWICE_TEMPLATE = CHATML_TEMPLATE.replace("message['content'] +", "message['content'] + message['content'] +")
HIDDEN_TEMPLATE = CHATML_TEMPLATE.replace(
    "message['content'] +", "(message['content'] if message['role'] == 'user' else '') +"
)
LENGTH_TEMPLATE = "{{ messages[-1].content | length }}" + CHATML_TEMPLATE
LENGTH_AT_END_TEMPLATE = CHATML_TEMPLATE + "{{ messages[-1].content | length }}"
REMINDER_TEMPLATE = CHATML_TEMPLATE.replace("'<|im_end|>", "(' end' if loop.last else '') + '<|im_end|>")
"""A template that adds a word to the last message, so a message is rendered differently if another message follows."""
SUFFIX_TEMPLATE = CHATML_TEMPLATE.replace("'<|im_end|>", "(' ok' if message['role'] == 'assistant' else '') + '<|im_end|>")
PREFIX_TEMPLATE = CHATML_MARKED.replace("{% generation %}", "{{ '> ' }}").replace("{% endgeneration %}{{ '", "{{ ' end' if loop.last else '' }}{{ '")
"""A template that writes `> ` before an answer, and a word after the last answer."""
HEADER_ONLY_TEMPLATE = PREFIX_TEMPLATE.replace("{{ '> ' }}{{ message['content'] + '<|im_end|>' }}{{ ' end' if loop.last else '' }}{{ '\\n' }}", "")
HEADER_TEMPLATE = CHATML_TEMPLATE.replace("<|im_start|>assistant\\n' }}{% endif %}", "# ' }}{% endif %}")
"""A template whose generation prompt differs from the header that it writes before an answer."""
TOOLS_TEMPLATE = "{{ tools | length if tools is not none else 'no' }} tools\n" + CHATML_MARKED
THOUGHT_SWITCH = "{% if not enable_thinking %}{{ '<think></think>' }}{% endif %}"
NO_THINKING_TEMPLATE = add_template_variables(THINKING_TEMPLATE.removesuffix("{% endif %}") + THOUGHT_SWITCH + "{% endif %}", {"enable_thinking": "false"})
"""A template as in reasoning models: a variable adds an empty think block to the generation prompt."""
END_TOKEN_FIRST_TEMPLATE = CHATML_MARKED.replace(
    "message['content'] + '<|im_end|>'", "'<|im_end|>' + message['content']"
)


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML_TEMPLATE, (HI, HO), "[user\nhi]\n[assistant\n«ho]»\n"),
        (CHATML_TEMPLATE, (HO, HI), "[assistant\n«ho]»\n[user\nhi]\n"),
        (CHATML_TEMPLATE, (HI, Turn("assistant", " ho  ")), "[user\nhi]\n[assistant\n« ho  ]»\n"),
        (CHATML_TEMPLATE, (HI, Turn("assistant", "")), "[user\nhi]\n[assistant\n«]»\n"),
        (CHATML_TEMPLATE, (HI, Turn("assistant", "ho<|im_end|>")), "[user\nhi]\n[assistant\n«ho]]»\n"),
        (CHATML_TEMPLATE, (HI, HO, GREEN), "[user\nhi]\n[assistant\n«ho]»\n[assistant\n«green]»\n"),
        (CHATML_TEMPLATE, (HI, UNTRAINED_HO), "[user\nhi]\n[assistant\nho]\n"),
        (CHATML_TEMPLATE, (HI,), "[user\nhi]\n"),
        (CHATML_MARKED, (HI,), "[user\nhi]\n"),
        (CHATML_MARKED, (HI, UNTRAINED_HO, TWO, GREEN), "[user\nhi]\n[assistant\nho]\n[user\ntwo]\n[assistant\n«green]»\n"),
        (CHATML_MARKED, (HI, UNTRAINED_HO, TWO, UNTRAINED_GREEN), "[user\nhi]\n[assistant\nho]\n[user\ntwo]\n[assistant\ngreen]\n"),
        (UPPER_TEMPLATE, (HO, HI), "[assistant\n«HO]»\n[user\nHI]\n"),
        (END_TOKEN_FIRST_TEMPLATE, (HI, HO), "[user\nhi]\n[assistant\n«]ho»\n"),
        (TOOLS_TEMPLATE, (HI, HO), "no tools\n[user\nhi]\n[assistant\n«ho]»\n"),
        (THINKING_TEMPLATE, (HI, HO, TWO, GREEN), "[user\nhi]\n[assistant\n«ho]»\n[user\ntwo]\n[assistant\n«<think></think>green]»\n"),
        (NO_THINKING_TEMPLATE, (HI, HO, TWO, GREEN), "[user\nhi]\n[assistant\n«ho]»\n[user\ntwo]\n[assistant\n<think></think>«green]»\n"),
        (REMINDER_TEMPLATE, (HI, HO, TWO), "[user\nhi]\n[assistant\n«ho]»\n[user\ntwo end]\n"),
        (SUFFIX_TEMPLATE, (HI, HO, TWO), "[user\nhi]\n[assistant\n«ho ok]»\n[user\ntwo]\n"),
        (PREFIX_TEMPLATE, (HI, HO, TWO), "[user\nhi]\n[assistant\n«> ho]»\n[user\ntwo]\n"),
        (HEADER_TEMPLATE, (HI, HO, TWO, GREEN), "[user\nhi]\n[assistant\n«ho]»\n[user\ntwo]\n[assistant\n«green]»\n"),
    ],
    ids=[
        "one answer", "answer first", "answer with spaces", "empty answer", "answer with an end token", "two answers in a row",
        "untrained answer", "no answer", "no answer, marked", "marked, weights differ", "marked, weight 0", "changed answer", "end token inside the markers",
        "marked, with tools", "last answer rendered differently",
        "reasoning switched off by a variable", "last turn rendered differently", "text after an answer",
        "text before an answer", "other generation prompt",
    ],
)  # fmt: skip
def test_only_the_answers_are_trained_on(template: str, turns: tuple[Turn, ...], expected: str, tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, template))
    assert mark_spans(Conversation(turns), options) == expected
    assert render(Conversation(turns), options).is_templated


ALL_ROLES = (Turn("system", "be"), HI, UNTRAINED_HO, Turn("tool", "42"), Turn("assistant", ""), GREEN)


@pytest.mark.parametrize(
    ("example", "options", "expected"),
    [
        (Text("some text"), {}, "«some text»"),
        (Completion("ask ", "answer"), {"use_chat_template": False}, "ask «answer»"),
        (Completion("ask ", "answer"), {"use_chat_template": False, "response_only": False}, "«ask answer»"),
        (Completion("ask ", "answer"), {"renders_text_as_turns": False}, "ask «answer»"),
        (Completion("ask ", "answer"), {}, "[user\nask ]\n[assistant\n«answer]»\n"),
        (Conversation(ALL_ROLES), {"use_chat_template": False}, "System: be\nUser: hi\nAssistant: ho\nTool: 42\nAssistant: «»\nAssistant: «green»"),
        (
            Conversation(ALL_ROLES), {"use_chat_template": False, "response_only": False},
            "«System: be\nUser: hi\nAssistant: »ho«\nTool: 42\nAssistant: \nAssistant: green»",
        ),
        (
            Conversation((UNTRAINED_HO, HI, UNTRAINED_GREEN), role_names=("Question", "Answer")), {"use_chat_template": False, "response_only": False},
            "«Answer: »ho«\nQuestion: hi\nAnswer: »green",
        ),
        (
            Conversation((Turn("user", "say ho"), UNTRAINED_HO, TWO, GREEN)), {"response_only": False},
            "«[user\nsay ho]\n[assistant\n»ho]«\n[user\ntwo]\n[assistant\ngreen]\n»",
        ),
        (Conversation((HI, HO)), {"response_only": False}, "«[user\nhi]\n[assistant\nho]\n»"),
        (Conversation((HI, HO)), {"turn_markers": ("<|im_start|>", "\n")}, "[user\n«hi]\n»[assistant\n«ho]\n»"),
        (Text("A:1 Q:2 A:3 A:4Q:A:"), {"turn_markers": ("Q:", "A:")}, "A:«1 »Q:2 A:«3 A:4»Q:A:«»"),
        (Text("Q:1 A:2 Q:3"), {"turn_markers": ("", "A:")}, "Q:1 A:«2 Q:3»"),
        (Text("Q:1 A:2 Q:3"), {"turn_markers": ("Q:", "A:"), "response_only": False}, "«Q:1 A:2 Q:3»"),
    ],
    ids=[
        "text", "joined", "joined, whole", "joined in spite of a template", "as turns", "words", "words, whole", "words, whole, untrained",
        "template, whole, untrained", "template, whole", "markers in a template", "marker at the start", "no question marker", "markers not used",
    ],
)  # fmt: skip
def test_the_options_decide_what_is_trained_on(
    example: Example, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    render_settings = RenderOptions(
        **{"use_chat_template": True, "response_only": True, **options},
        tokenizer=tokenizer(tmp_path),
        special_tokens=("<|im_end|>",),
    )
    assert mark_spans(example, render_settings) == expected
    assert render(example, render_settings).is_templated == ("[" in expected)


def test_untrained_answers_in_several_parts_are_left_out_of_the_whole_text(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, MARKED_IN_PIECES), response_only=False)
    assert mark_spans(Conversation((HI, Turn("assistant", "red", 0))), options) == "«[user\nhi]\n[assistant says: »red]\n"


def test_the_longest_special_token_ends_the_answer(tmp_path: Path) -> None:
    options = RenderOptions(
        tokenizer(tmp_path, MARKED_TEMPLATE), True, True, special_tokens=("<|im_end|>\n", "<|im_end|>")
    )
    assert mark_spans(Conversation((HI, HO)), options) == "[user\nhi]\n[assistant says: «ho]\n»"


@pytest.mark.parametrize(
    ("template", "turns", "answer"),
    [
        (TWICE_TEMPLATE, (HO, HI), 1), (HIDDEN_TEMPLATE, (HO, HI), 1), (HEADER_ONLY_TEMPLATE, (HI, HO), 2),
        (LENGTH_TEMPLATE, (HI, HI, GREEN), 3), (LENGTH_TEMPLATE, (TWO, HO), 2),
        (LENGTH_AT_END_TEMPLATE, (HO,), 1), (LENGTH_AT_END_TEMPLATE, (GREEN,), 1),
    ],
    ids=[
        "repeated answer", "no answer", "only the header",
        "other text before a long answer", "before a short answer", "other text after a short answer", "after a long answer",
    ],
)  # fmt: skip
def test_a_template_that_hides_the_answers_is_refused(
    template: str, turns: tuple[Turn, ...], answer: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        render(Conversation(turns), render_options(tokenizer(tmp_path, template)))
    assert caught.value.code == "TemplateSpansUnknown"
    assert f"answer {answer} of" in caught.value.message


@pytest.mark.parametrize(
    ("example", "markers", "code", "message", "hint"),
    [
        (Text("x" * 121), ("Q:", "A:"), "MarkerAbsent", f"the answer marker 'A:' does not occur in the rendered row: {'x' * 120!r}...", "copy the marker"),
        (Text("A: 1"), ("Q:", ""), "MarkerAbsent", "the answer marker '' does not occur in the rendered row: 'A: 1'...", "copy the marker"),
        (Prompt("x", {}), None, "FormatMismatch", "Prompt rows have no text to learn", "choose a trainer.type that reads such rows"),
        (
            Conversation((HI, Turn("system", "be"))), None, "TemplateRefusedRow",
            "the chat template refuses the conversation: system must come first", "(the row has: user, system)",
        ),
    ],
    ids=["no marker in the row", "empty marker", "other row", "turns in a wrong order"],
)  # fmt: skip
def test_the_error_for_a_row_that_cannot_be_rendered_gives_problem_and_correction(
    example: Example, markers: tuple[str, str] | None, code: str, message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(RowError) as caught:
        render(example, render_options(tokenizer(tmp_path, SYSTEM_FIRST), markers=markers))
    assert (caught.value.code, caught.value.message) == (code, message)
    assert hint in caught.value.hint


def test_a_template_that_does_not_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja's sandbox limits the length of a single `range`, but not nested loops."""
    monkeypatch.setattr(template, "TEMPLATE_TIMEOUT_SECONDS", 0.05)
    endless_tokenizer = tokenizer(tmp_path, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConfigError, match="did not end within 0.05 s for a row with 5 turns") as caught:
        render(Conversation(TWO_ANSWERS), render_options(endless_tokenizer))
    assert caught.value.code == "TemplateTooSlow"
    assert signal.getsignal(signal.SIGALRM) is handler


def test_the_time_limit_restores_the_timer_of_the_program() -> None:
    """A thread other than the main thread has no time limit, because Python delivers signals only to the main thread."""
    previous_timer = signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        with time_limit(60):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        assert 60 < signal.getitimer(signal.ITIMER_REAL)[0] <= 600

        def read_timer_in_thread() -> float:
            with time_limit(60):
                return signal.getitimer(signal.ITIMER_REAL)[0]

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(read_timer_in_thread).result() > 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, *previous_timer)


CALL = {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]}
TEMPLATE_WITH_CALLS = (
    "{{ tools | tojson }}{% for message in messages %}[{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant\n{% endif %}"
)


@pytest.mark.parametrize("call", ["weather()", {"function": "weather"}, {"function": None, "name": "weather"}, {"function": {"name": None}}])
def test_tool_calls_of_an_unknown_form_are_rendered_without_an_error(call: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.support.tiny import make_tokenizer

    chat_template = TEMPLATE_WITH_CALLS.replace("{{ call.function.name }}({{ call.function.arguments | tojson }})", "{{ call | tojson }}")
    make_tokenizer(tmp_path, chat_template=chat_template)
    options = RenderOptions(AutoTokenizer.from_pretrained(tmp_path), use_chat_template=True, response_only=True)
    row = Conversation((Turn("user", "hi"), Turn("assistant", "text", extra={"tool_calls": [call]})))
    assert "text" in render(row, options).text


@pytest.mark.parametrize(("template", "is_written"), [(TEMPLATE_WITH_CALLS, True), (TEMPLATE_WITH_CALLS.replace("call.function.name", "''"), False)])
def test_a_template_that_drops_tool_calls_is_an_error_of_the_row(template: str, is_written: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.support.tiny import make_tokenizer

    make_tokenizer(tmp_path, chat_template=template)
    options = RenderOptions(AutoTokenizer.from_pretrained(tmp_path), use_chat_template=True, response_only=True)
    row = Conversation((Turn("user", "hi"), Turn("assistant", "", extra=CALL)), tools=({"function": {"name": "weather"}},))
    if is_written:
        rendering = render(row, options)
        assert [rendering.text[start:end] for start, end in rendering.spans] == ['weather({"city": "Paris"})]']
        return
    with pytest.raises(RowError) as caught:
        render(row, options)
    assert caught.value.code == "ToolCallsDropped" and "'weather'" in caught.value.message
