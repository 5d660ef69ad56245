"""Token ids and labels: boundary tokens, length limits, and counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.errors import ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data import SYSTEM_FIRST, decode_rows, prepare_rows, tokenizer
from tests.support.learning import TEN_ROWS, make_run
from tests.support.tiny import make_tiny_model

LONG_ROWS = [{"text": "one two three four five " * n} for n in (1, 2, 12)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_a_token_is_trained_on_if_it_overlaps_a_span(widths: list[int], gaps: list[tuple[int, int]]) -> None:
    from finetune_trainer.data.tokenise import make_labels

    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    offsets = [(end - width, end) for end, width in zip(ends, widths, strict=True)]
    spans, position = [], 0
    for gap, length in gaps:
        if length:
            spans.append((position + gap, position + gap + length))
        position += gap + length
    ids = list(range(100, 100 + len(widths)))
    expected_labels = [
        token if any(start < stop and end > begin for begin, stop in spans) else -100
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    assert make_labels(ids, offsets, spans) == expected_labels


def test_the_beginning_token_occurs_once_and_is_not_trained_on(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, SYSTEM_FIRST, bos=True)
    for dataset, rows in (({}, TEN_ROWS), ({}, [{"text": "one red"}]), ({"addBosToken": True}, TEN_ROWS)):
        for row in prepare_rows(tmp_path, tok, dataset, rows).train:
            assert row["input_ids"].count(tok.bos_token_id) == 1 and row["input_ids"][0] == tok.bos_token_id
            assert row["labels"][0] == -100
    for rows in (TEN_ROWS, [{"text": "one red"}]):
        assert all(
            tok.bos_token_id not in row["input_ids"]
            for row in prepare_rows(tmp_path, tok, {"addBosToken": False}, rows).train
        )


TEMPLATE_WITH_TWO_BOS = SYSTEM_FIRST.replace("{{ bos_token }}", "{{ bos_token + bos_token }}")


@pytest.mark.parametrize("add_bos", [None, True])
@pytest.mark.parametrize("count", [1, 2])
def test_beginning_tokens_in_the_text_are_not_doubled(count: int, add_bos: bool | None, tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, SYSTEM_FIRST if count == 1 else TEMPLATE_WITH_TWO_BOS, bos=True)
    for name, rows in (("plain", [{"text": tok.bos_token * count + "one red"}]), ("templated", TEN_ROWS)):
        for row in prepare_rows(tmp_path / name, tok, {"addBosToken": add_bos}, rows).train:
            assert (row["input_ids"].count(tok.bos_token_id), row["input_ids"][0]) == (1, tok.bos_token_id)
            assert len(row["labels"]) == len(row["input_ids"])


def test_a_row_whose_first_token_alone_has_a_label_is_a_bad_row(tmp_path: Path) -> None:
    """The first token cannot be predicted, because no token precedes it."""
    tok = tokenizer(tmp_path)
    assert len(tok("a")["input_ids"]) == 1
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tok, {"addEosToken": False}, [{"text": "a"}])
    assert caught.value.code == "NoTrainableToken" and "train.jsonl, row 1" in caught.value.message
    data_with_end_token = prepare_rows(tmp_path / "with end", tok, {}, [{"text": "a"}])
    assert data_with_end_token.reports["train"].rows == 1


def test_the_end_token_occurs_once_and_is_trained_on(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    for rows in (TEN_ROWS, [{"text": "one red"}], [{"text": "one red<|im_end|>"}]):
        for row in prepare_rows(tmp_path, tok, {}, rows).train:
            trained_tokens = [token for token in row["labels"] if token != -100]
            assert trained_tokens[-1] == tok.eos_token_id and trained_tokens.count(tok.eos_token_id) == 1
    (row,) = prepare_rows(tmp_path, tok, {"addEosToken": False}, [{"text": "one red"}]).train
    assert tok.eos_token_id not in row["input_ids"]


def test_an_end_token_after_an_untrained_turn_is_not_trained_on(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    question = [{"role": "user", "content": "two"}]
    untrained_answer = [{"role": "assistant", "content": "green", "weight": 0}]
    rows = [{"messages": TEN_ROWS[0]["messages"] + last_turns} for last_turns in ([], question, question + untrained_answer)]
    trained_rows = decode_rows(tok, prepare_rows(tmp_path, tok, {"useChatTemplate": False}, rows))
    assert [trained_text for _, trained_text in trained_rows] == [" red<|im_end|>", " red", " red"]
    assert all(text.endswith("<|im_end|>") for text, _ in trained_rows)


def test_add_bos_token_is_refused_if_the_tokenizer_has_no_beginning_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path), {"addBosToken": True})
    assert caught.value.code == "BosMissing"


def test_an_end_token_that_is_also_the_pad_token_is_trained_on(tmp_path: Path, model: Path) -> None:
    from finetune_trainer.model import load_tokenizer
    from transformers import AutoTokenizer

    tokenizer(tmp_path, pad="<|im_end|>")
    run, inputs = make_run(tmp_path, model, {}, TEN_ROWS)
    default_tokenizer, notes = load_tokenizer(run, inputs.model_copy(update={"tokenizer": tmp_path / "tokenizer"}))
    assert default_tokenizer.pad_token != default_tokenizer.eos_token and default_tokenizer.pad_token in ("<|pad|>", "<|endoftext|>")
    assert "short rows are padded with" in notes[0]
    run, inputs = make_run(tmp_path, model, {"model": {"padToken": "<eos>"}}, TEN_ROWS)
    tokenizer_with_pad_token, _ = load_tokenizer(run, inputs)
    assert tokenizer_with_pad_token.pad_token == tokenizer_with_pad_token.eos_token
    assert all(row["labels"][-2:].count(tokenizer_with_pad_token.eos_token_id) == 1 for row in prepare_rows(tmp_path, tokenizer_with_pad_token).train)
    run, inputs = make_run(tmp_path, model, {"model": {"padToken": "<nope>"}}, TEN_ROWS)
    with pytest.raises(ConfigError, match="PadTokenUnknown"):
        load_tokenizer(run, inputs)
    assert AutoTokenizer.from_pretrained(model).pad_token == "<|pad|>"


@pytest.mark.parametrize(("overflow", "row_count", "counter"), [("truncate", 3, "truncated"), ("drop", 2, "dropped")])
def test_truncated_and_dropped_rows_are_counted(overflow: str, row_count: int, counter: str, tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    data = prepare_rows(tmp_path, tok, {"overflow": overflow, "maxSequenceLength": 48}, LONG_ROWS)
    report = data.reports["train"]
    assert len(data.train) == row_count and report.longest <= 48
    assert (report.truncated, report.dropped) == ((1, 0) if counter == "truncated" else (0, 1))
    assert any("maxSequenceLength 48" in note for note in data.notes)


def test_with_overflow_fail_the_error_names_the_row_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tokenizer(tmp_path), {"overflow": "fail", "maxSequenceLength": 48}, LONG_ROWS)
    assert caught.value.code == "RowTooLong" and "train.jsonl, row 3" in caught.value.message


def test_rows_whose_whole_answer_is_cut_off_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*TEN_ROWS, {"messages": [{"role": "user", "content": "one two three " * 30}, TEN_ROWS[0]["messages"][1]]}]
    data = prepare_rows(tmp_path, tokenizer(tmp_path), {"maxSequenceLength": 64}, rows)
    assert len(data.train) == 10 and data.reports["train"].answerless == 1
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path / "b", tokenizer(tmp_path), {"maxSequenceLength": 5}, rows)
    assert caught.value.code == "NoTrainableToken" and "maxSequenceLength (now 5)" in (caught.value.hint or "")
