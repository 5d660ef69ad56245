"""Rendering conversations with chat templates, and the characters that the run trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.errors import DataError
from finetune_trainer.data.rows import Conversation, Text, Turn
from finetune_trainer.data.template import render

from tests.support.data import SYSTEM_FIRST, prepare_rows, render_options, tokenizer, trained_texts
from tests.support.learning import TEN_ROWS
from tests.support.tiny import CHATML_MARKED, CHATML_TEMPLATE

THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Chat template as in reasoning models: only the last assistant message gets an empty think block."""
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
"""Template whose generation prompt lacks the assistant header, and whose generation markers exclude the end-of-turn token."""
MARKED_IN_PIECES = MARKED_TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content[:2] }}{% endgeneration %}{% generation %}{{ m.content[2:] + '<|im_end|>\n' }}", 1
)
MARKED_IN_PIECES = MARKED_IN_PIECES.replace("{% endgeneration %}<|im_end|>\n", "{% endgeneration %}")


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, CHATML_MARKED, THINKING_TEMPLATE], ids=["plain", "marked", "thinking"])
def test_answers_are_trained_on_with_their_end_tokens(template: str, tmp_path: Path) -> None:
    spans = trained_texts(Conversation(TWO_ANSWERS), render_options(tokenizer(tmp_path, template)))
    assert spans[0] == "red<|im_end|>"
    assert spans[1] in ("green<|im_end|>", "<think></think>green<|im_end|>")


def test_generation_markers_define_the_answers(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, MARKED_TEMPLATE))
    assert trained_texts(Conversation(TWO_ANSWERS), options) == ["red<|im_end|>", "green<|im_end|>"]
    turns = (*TWO_ANSWERS[:2], Turn("assistant", "red", 0), *TWO_ANSWERS[3:])
    assert trained_texts(Conversation(turns), options) == ["green<|im_end|>"]
    whole = render(Conversation(turns), render_options(options.tokenizer, response_only=False))
    assert [whole.text[end:start] for (_, end), (start, _) in zip(whole.spans, whole.spans[1:], strict=False)] == [
        "red<|im_end|>"
    ]
    unmarked = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert "says" in trained_texts(Conversation(TWO_ANSWERS), render_options(tokenizer(tmp_path / "b", unmarked)))[0]


def test_generation_markers_may_split_an_answer(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path, MARKED_IN_PIECES))
    assert trained_texts(Conversation(TWO_ANSWERS), options) == ["re", "d<|im_end|>\n", "gr", "een<|im_end|>\n"]
    turns = (*TWO_ANSWERS[:2], Turn("assistant", "red", 0), *TWO_ANSWERS[3:])
    assert "red" not in "".join(trained_texts(Conversation(turns), options)), (
        "the content of the answers is searched if the marked spans cannot be matched"
    )


def test_generation_markers_of_an_unused_template_are_ignored(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    tok.chat_template = {"default": CHATML_TEMPLATE, "tool_use": MARKED_TEMPLATE}
    assert trained_texts(Conversation(TWO_ANSWERS), render_options(tok)) == ["red<|im_end|>", "green<|im_end|>"]


def test_an_answer_of_weight_0_is_not_trained_on(tmp_path: Path) -> None:
    turns = (*TWO_ANSWERS[:2], Turn("assistant", "red", 0), *TWO_ANSWERS[3:])
    assert trained_texts(Conversation(turns), render_options(tokenizer(tmp_path))) == ["green<|im_end|>"]
    whole = trained_texts(Conversation(turns), render_options(tokenizer(tmp_path), response_only=False))
    assert "red" not in "".join(whole) and "green" in "".join(whole)


@pytest.mark.parametrize("template", [True, False], ids=["template", "words"])
def test_an_untrained_answer_is_distinguished_from_the_same_word_elsewhere(template: bool, tmp_path: Path) -> None:
    turns = (Turn("user", "say red"), Turn("assistant", "red", 0), Turn("user", "two"), Turn("assistant", "green"))
    options = render_options(tokenizer(tmp_path), response_only=False, template=template)
    rendered = render(Conversation(turns), options)
    silent = "".join(
        rendered.text[end:start] for (_, end), (start, _) in zip(rendered.spans, rendered.spans[1:], strict=False)
    )
    assert silent in ("red", "red<|im_end|>")
    assert "say red" in rendered.text[slice(*rendered.spans[0])]


def test_all_tokens_are_trained_on_if_response_only_is_disabled(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path), response_only=False)
    rendered = render(Conversation(TWO_ANSWERS), options)
    assert rendered.spans == ((0, len(rendered.text)),)


def test_markers_of_the_user_take_precedence(tmp_path: Path) -> None:
    options = render_options(tokenizer(tmp_path), markers=("<|im_start|>user", "<|im_start|>assistant\n"))
    assert trained_texts(Conversation(TWO_ANSWERS), options) == ["red<|im_end|>\n", "green<|im_end|>\n"]
    plain = render_options(tokenizer(tmp_path), template=False, markers=("Q:", "A:"))
    assert trained_texts(Text("Q: one A: red Q: two A: green"), plain) == [" red ", " green"]


def test_error_for_an_absent_marker_shows_the_row(tmp_path: Path) -> None:
    dataset = {"responseOnly": {"questionMarker": "<start_of_turn>user", "answerMarker": "<start_of_turn>model"}}
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path), dataset)
    assert caught.value.code == "MarkerAbsent"
    assert "train.jsonl, row 1" in caught.value.message and "<|im_start|>user" in caught.value.message


def test_role_names_are_written_without_a_template(tmp_path: Path) -> None:
    example = Conversation((Turn("user", "one"), Turn("assistant", "red")), role_names=("Question", "Answer"))
    rendered = render(example, render_options(tokenizer(tmp_path, None), template=False))
    assert rendered.text == "Question: one\nAnswer: red"
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["red"]


def test_error_of_the_template_names_the_row(tmp_path: Path) -> None:
    rows = [TEN_ROWS[0], {"messages": [*TEN_ROWS[1]["messages"], {"role": "system", "content": "late"}]}]
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path, SYSTEM_FIRST, bos=True), {}, rows)
    assert caught.value.code == "TemplateRefusedRow"
    assert "row 2" in caught.value.message and "system must come first" in caught.value.message
