"""Rows in the format `preTokenized`: valid rows are used unchanged, and invalid rows are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import DataError

from tests.support.data import catch_check_error, load_examples, make_data_run, prepare_rows, tokenizer
from tests.support.learning import write_rows

TOKEN_ROWS = {"format": "preTokenized"}
IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("columns", "expected_labels"),
    [
        ({}, IDS), ({"labels": None}, IDS), ({"labels": [-100, -100, 7, 8]}, [-100, -100, 7, 8]), ({"completion_mask": [0, 1, 1, 0]}, [-100, 6, 7, -100]),
        ({"assistant_masks": [0, 0, 0, 1], "attention_mask": [1, 1, 1, 1]}, [-100, -100, -100, 8]),
    ],
)  # fmt: skip
def test_rows_of_token_ids_are_used_unchanged(columns: dict[str, Any], expected_labels: list[int], tmp_path: Path) -> None:
    data = prepare_rows(tmp_path, tokenizer(tmp_path), TOKEN_ROWS, [{"input_ids": IDS, **columns}, {"input_ids": [9, 9]}])
    assert data.train[:] == {"input_ids": [IDS, [9, 9]], "labels": [expected_labels, [9, 9]]}
    assert (data.reports["train"].tokens, data.format) == (6, "preTokenized")


def test_rows_of_token_ids_are_cut_and_packed(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(1, 13))}, {"input_ids": IDS}]
    data = prepare_rows(tmp_path, tokenizer(tmp_path), {**TOKEN_ROWS, "packing": True, "maxSequenceLength": 10}, [*rows, {"input_ids": IDS}])
    assert data.train["input_ids"][:] == [list(range(1, 11)), IDS + IDS]
    assert data.train["labels"][1] == [-100, *IDS[1:], -100, *IDS[1:]] and data.train["seq_lengths"][1] == [4, 4]
    assert data.reports["train"].truncated == 1


def test_rows_of_token_ids_are_mixed_with_rows_of_text(tmp_path: Path) -> None:
    from finetune_trainer.data.prepare import prepare

    tok = tokenizer(tmp_path)
    mixture = [{"source": "s3://data/0.jsonl", **TOKEN_ROWS}, {"source": "s3://data/1.jsonl"}]
    run, inputs = make_data_run(tmp_path, {"dataset": {"train": None, "mixture": mixture}})
    files = [[write_rows(tmp_path / f"{i}.jsonl", rows)] for i, rows in enumerate([[{"input_ids": IDS}], [{"text": "one"}]])]
    data = prepare(run, inputs.model_copy(update={"train": [], "mixture": files}), tok, max_positions=512, cache_folder=tmp_path / "tokens")
    assert data.train["input_ids"][:] == [IDS, [*tok("one")["input_ids"], tok.eos_token_id]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": []}, "is empty or has a negative number"), ({"input_ids": [1, -1]}, "is empty or has a negative number"),
        ({"input_ids": "1 2"}, "column `input_ids` is not a list of integers"), ({"input_ids": [1, 2.0]}, "not a list of integers"),
        ({"input_ids": IDS, "labels": [6, 7, 8, -100]}, "the label at position 0 is 6, but the token there is 5"),
        ({"input_ids": IDS, "labels": [5]}, "`labels` has 1 numbers, but `input_ids` has 4"),
        ({"input_ids": IDS, "completion_mask": [0, 1, 2, 1]}, "has other numbers than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 1, 0]}, "so the row is padded"),
    ],
)  # fmt: skip
def test_invalid_rows_of_token_ids_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    error = catch_check_error(tmp_path, TOKEN_ROWS, [{"input_ids": IDS}, row])
    assert error.code == "DatasetRowInvalid" and error.message.startswith("train.jsonl, row 2: ") and message in error.message
    assert load_examples(tmp_path, {**TOKEN_ROWS, "badRows": "skip", "maxBadRowRatio": 0.5}, [{"input_ids": IDS}, row])[0].ids == tuple(IDS)


def test_rows_of_token_ids_are_read_only_if_the_spec_sets_their_format(tmp_path: Path) -> None:
    assert catch_check_error(tmp_path, {}, [{"input_ids": IDS}]).code == "FormatUnknown"
    assert catch_check_error(tmp_path, TOKEN_ROWS, [{"text": "one"}]).code == "ColumnMissing"


def test_a_token_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path, tok, TOKEN_ROWS, [{"input_ids": IDS}, {"input_ids": [1, len(tok)]}])
    assert caught.value.code == "TokenUnknown"
    assert caught.value.message == f"train.jsonl, row 2: token {len(tok)} is not in the model's vocabulary of {len(tok)} tokens"
    prepare_rows(tmp_path, tok, TOKEN_ROWS, [{"input_ids": [1, len(tok) - 1]}])
