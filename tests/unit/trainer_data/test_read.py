"""Reading data files: file formats, encodings, damaged files and limits."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from finetune_api.errors import DataError
from finetune_trainer.data import read
from finetune_trainer.data.rows import Conversation, Text, Turn

from tests.support.data import catch_check_error, load_examples

HI, HO = Turn("user", "hi"), Turn("assistant", "ho")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
FILE_CASES: dict[str, tuple[str, str | bytes]] = {
    "json array": ("a.json", '[{"text": "x"}, {"text": "y"}]'),
    "json data": ("a.json", '{"data": [{"text": "x"}, {"text": "y"}]}'),
    "jsonl under the name json": ("a.json", '{"text": "x"}\n{"text": "y"}\n'),
    "jsonl with blank lines and BOM": ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n\n{"text": "y"}'),
    "csv": ("a.csv", "text,other\nx,1\ny,2\n"),
    "csv with semicolons": ("a.csv", "text;other\nx;1\ny;2\n"),
    "tsv": ("a.tsv", "text\tother\nx\t1\ny\t2\n"),
    "txt": ("a.txt", "x\n\ny\n"),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}\n')),
    "name without extension": ("data", '{"text": "x"}\n{"text": "y"}\n'),
}


@pytest.mark.parametrize("name", FILE_CASES)
def test_every_file_format_is_read(name: str, tmp_path: Path) -> None:
    file, text = FILE_CASES[name]
    assert load_examples(tmp_path, text=text, name=file) == [Text("x"), Text("y")]


@pytest.mark.parametrize(
    ("file_format", "file_text", "expected_texts"),
    [
        ("csv", "text,other\nx,1\n", ["x"]),
        ("txt", '{"text": "x"}\n', ['{"text": "x"}']),
        ("jsonl", '{"text": "x"}\n', ["x"]),
        ("json", '[{"text": "x"}]', ["x"]),
    ],
)
def test_the_file_format_of_the_spec_takes_precedence_over_the_extension(
    file_format: str, file_text: str, expected_texts: list[str], tmp_path: Path
) -> None:
    examples = load_examples(tmp_path, {"fileFormat": file_format}, text=file_text, name="rows.parquet")
    assert examples == [Text(text_of_row) for text_of_row in expected_texts]


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": [MESSAGES]}), tmp_path / "a.parquet")
    assert load_examples(tmp_path, text=(tmp_path / "a.parquet").read_bytes(), name="b.parquet") == [
        Conversation((HI, HO))
    ]


@pytest.mark.parametrize(
    ("text", "name", "code", "message"),
    [
        ("", "train.jsonl", "DatasetEmpty", "no rows"),
        ("\n \n", "train.txt", "DatasetEmpty", "no rows"),
        ("[]", "train.json", "DatasetEmpty", "no rows"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "train.jsonl", "DatasetNotUtf8", "byte 24 is not UTF-8"),
        ("[1]".encode("utf-16"), "train.json", "DatasetNotUtf8", "UTF-16"),
        ("{", "train.json", "DatasetRowInvalid", "line 1, column 2"),
        ('"x"', "train.json", "DatasetRowInvalid", "found a string"),
        ("a,b\n1\n", "train.csv", "DatasetRowInvalid", "1 values, but the header names 2 columns (a, b)"),
        ("\x00\x01", "data", "FileFormatUnknown", "cannot be recognised from the name"),
        ('{"x": 1}', "train.jsonl", "FormatUnknown", "the first row has `x`"),
        (b"PAR1junk", "train.parquet", "DatasetRowInvalid", "not a readable Parquet file"),
        (b"plain", "train.jsonl.gz", "DatasetRowInvalid", "not a readable gzip file"),
        (
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20],
            "train.jsonl.gz",
            "DatasetRowInvalid",
            "not a readable gzip file",
        ),
        (gzip.compress(b"text\na\n", mtime=0)[:-9], "train.csv.gz", "DatasetRowInvalid", "not a readable gzip file"),
        ("[" * 100_000, "train.jsonl", "DatasetRowInvalid", "row 1: not valid JSON: maximum recursion depth"),
        ("[" * 100_000, "train.json", "DatasetRowInvalid", "not valid JSON: maximum recursion depth"),
        (f'[{{"text": {"1" * 5000}}}]', "train.json", "DatasetRowInvalid", "not valid JSON: Exceeds the limit"),
        (
            r'{"text": "a \ud83d b"}',
            "train.jsonl",
            "DatasetRowInvalid",
            r"row 1: `\ud83d` is half of a UTF-16 surrogate pair",
        ),
        (
            r'[{"text": "a"}, {"text": {"b": ["\uDE00"]}}]',
            "train.json",
            "DatasetRowInvalid",
            r"row 2: `\ude00` is half",
        ),
        ("question,answer,answer\nq,a,b\n", "train.csv", "DatasetRowInvalid", "names column 'answer' twice"),
    ],
)
def test_a_broken_file_is_refused(text: str | bytes, name: str, code: str, message: str, tmp_path: Path) -> None:
    error = catch_check_error(tmp_path, text=text, name=name)
    assert (error.code, int(error.exit_code)) == (code, 65)
    assert message in error.message and name in error.message


def test_escaped_surrogate_pairs_are_read(tmp_path: Path) -> None:
    assert load_examples(tmp_path, text=r'{"text": "a \ud83d\ude00"}') == [Text("a \U0001f600")]


@pytest.mark.parametrize(
    ("text", "name", "code", "message"),
    [
        (b'{"text": "' + b"a" * 2000 + b'"}\n', "train.jsonl", "DatasetRowTooLarge", "train.jsonl, row 1: the row has more than 1000 bytes"),
        (b"a\n" + b"b" * 1001, "train.txt", "DatasetRowTooLarge", "train.txt, row 2: the row has more than 1000 bytes"),
        (gzip.compress(b'{"text": "' + b"a" * 200_000 + b'"}\n', mtime=0), "train.jsonl.gz", "DatasetRowTooLarge", "row 1: the row has more than 1000 bytes"),
        (gzip.compress(b'{"text": "a"}\n' * 90_000, mtime=0), "train.jsonl.gz", "DatasetExpandsTooMuch", " bytes, but expands to more than "),
        (gzip.compress(b"text\n" + b"a\n" * 900_000, mtime=0), "train.csv.gz", "DatasetExpandsTooMuch", " bytes, but expands to more than "),
        (gzip.compress(b"[" + b" " * 900_000 + b"]", mtime=0), "train.json.gz", "DatasetExpandsTooMuch", " bytes, but expands to more than "),
    ],
)  # fmt: skip
def test_rows_and_files_that_would_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, name: str, code: str, message: str
) -> None:
    """The limits are lowered, so that the test needs little memory."""
    monkeypatch.setattr(read, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(read, "SMALL_FILE_BYTES", 10_000)
    with pytest.raises(DataError) as caught:
        load_examples(tmp_path, text=text, name=name)
    assert caught.value.code == code and message in caught.value.message


def test_rows_and_files_within_the_limits_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = b'{"text": "' + b"a" * 987 + b'"}\n'
    assert len(row) == 1000
    monkeypatch.setattr(read, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(read, "SMALL_FILE_BYTES", 1000)
    monkeypatch.setattr(read, "MAX_EXPANSION", 1)
    assert len(load_examples(tmp_path, text=row, name="a.jsonl")) == 1
    assert len(load_examples(tmp_path, text=gzip.compress(row, mtime=0), name="b.jsonl.gz")) == 1
