"""Stage 1, read: files become rows. JSONL, JSON, CSV, text and Parquet; UTF-8 only; every failure names file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from finetune_api.errors import DataError
from finetune_api.spec.enums import BadRows, FileFormat

from finetune_trainer.data.rows import Raw, RowError

SUFFIXES = {
    ".jsonl": FileFormat.JSONL, ".ndjson": FileFormat.JSONL, ".json": FileFormat.JSON, ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV, ".txt": FileFormat.TXT, ".text": FileFormat.TXT, ".parquet": FileFormat.PARQUET,
}  # fmt: skip
CSV_FIELD_LIMIT = 16 * 1024 * 1024
HALF = "\\ud"
"""How JSON begins to name half of a character, in small letters."""


def data_files(paths: list[Path]) -> list[Path]:
    """The files behind `paths`: folders give the data files in them, by name. Errors: DatasetEmpty."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise DataError(
            "DatasetEmpty", f"no data file was found in {', '.join(p.name for p in paths) or 'the data set'}",
            hint=f"give a file or a folder with files that end in {', '.join(SUFFIXES)}",
        )  # fmt: skip
    return files


def read_rows(
    files: list[Path], kind: FileFormat, *, bad_rows: list[tuple[Raw, RowError]] | None = None
) -> Iterator[Raw]:
    """All rows of all files, in order.

    A row that is no JSON object, or a record of the wrong width, is put into `bad_rows`; without such a list it is an error.
    Errors: DatasetRowInvalid, DatasetNotUtf8, FileFormatUnknown.
    """
    for file in files:
        for row in _read_file(file, kind):
            if isinstance(row, Raw):
                yield row
            elif bad_rows is None:
                raise row_failure(*row)
            else:
                bad_rows.append(row)


def row_failure(row: Raw, error: RowError, *, skippable: bool = True) -> DataError:
    """The failure that ends a job because of one row."""
    skip = f"; or `dataset.badRows: {BadRows.SKIP}` to leave such rows out" if skippable else ""
    return DataError(error.code, f"{row.place}: {error.found}", hint=error.write + skip)


def kind_of(file: Path, kind: FileFormat) -> FileFormat:
    """Kind of a file: as asked, by its name, else by its first bytes. Errors: FileFormatUnknown."""
    if kind is not FileFormat.AUTO:
        return kind
    known = SUFFIXES.get(_suffix(file))
    if known is not None:
        return known
    with _open(file) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return FileFormat.PARQUET
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start in (b"{", b"["):
        return FileFormat.JSONL if start == b"{" else FileFormat.JSON
    raise DataError(
        "FileFormatUnknown", f"{file.name}: neither its name nor its first bytes tell what kind of file it is",
        hint="set dataset.fileFormat to one of jsonl, json, csv, txt, parquet",
    )  # fmt: skip


def _suffix(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Errors: DatasetRowInvalid for a .gz file that is none, or is cut off."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not a readable gzip file: {error}",
            hint="upload it whole, or name it without .gz if it is not compressed",
        ) from None  # fmt: skip


def _read_file(file: Path, kind: FileFormat) -> Iterator[Raw | tuple[Raw, RowError]]:
    match kind_of(file, kind):
        case FileFormat.JSONL:
            return _jsonl(file)
        case FileFormat.JSON:
            return _json(file)
        case FileFormat.CSV:
            return _csv(file)
        case FileFormat.PARQUET:
            return _parquet(file)
        case _:
            return _text(file)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Errors: DatasetNotUtf8."""
    offset = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, offset + error.start, line) from None
            offset += len(line)
            if text.strip():
                yield number, text


def _not_utf8(file: Path, offset: int, head: bytes) -> DataError:
    other = "UTF-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "another encoding"
    return DataError(
        "DatasetNotUtf8", f"{file.name}: byte {offset} is not UTF-8 (the file looks like {other})",
        hint=f"convert it: iconv -f {'UTF-16' if other == 'UTF-16' else 'ENCODING'} -t UTF-8 {file.name}",
    )  # fmt: skip


def _whole(file: Path) -> str:
    with _open(file) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error.start, data[:4]) from None


def _object(file: Path, number: int, value: Any, *, escapes: bool) -> Raw | tuple[Raw, RowError]:
    """The row, if it is an object of whole characters; `escapes`: the file wrote some of them as halves."""
    if isinstance(value, dict):
        broken = _half_character(value) if escapes else None
        return (Raw(file, number, {}), broken) if broken else Raw(file, number, value)
    found = f"a JSON object was expected, found {_kind(value)}"
    return Raw(file, number, {}), RowError(
        "DatasetRowInvalid", found, 'write one object per row, for example {"messages": [...]}'
    )


def _half_character(value: Any) -> RowError | None:
    """JSON may name half of a character (`\\ud83d` without its second half), which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return RowError(
            "DatasetRowInvalid", f"`\\u{ord(error.object[error.start]):04x}` is half of a character",
            "write both halves, or the character itself",
        )  # fmt: skip
    return None


def _jsonl(file: Path) -> Iterator[Raw | tuple[Raw, RowError]]:
    for number, line in _lines(file):
        try:
            value = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            where = (
                f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
            )
            yield (
                Raw(file, number, {}),
                RowError("DatasetRowInvalid", f"not valid JSON{where}", "write one JSON object per line"),
            )
            continue
        yield _object(file, number, value, escapes=HALF in line.lower())


def _json(file: Path) -> Iterator[Raw | tuple[Raw, RowError]]:
    text = _whole(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line under the wrong name is what people mean
            yield from _jsonl(file)
            return
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="write an array of objects, or one object per line and `dataset.fileFormat: jsonl`",
        ) from None  # fmt: skip
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested arrays
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not valid JSON: {error}", hint="mend the row, or remove it"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: an array of objects was expected, found {_kind(value)}",
            hint='write [{"messages": [...]}, ...], or an object whose `data` is such an array',
        )  # fmt: skip
    escapes = HALF in text.lower()
    for number, item in enumerate(value, start=1):
        yield _object(file, number, item, escapes=escapes)


def _csv(file: Path) -> Iterator[Raw | tuple[Raw, RowError]]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    text = _whole(file)
    header_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count) if any(c in header_line for c in ",;\t") else ","
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = [name.strip() for name in next(records, [])]
        _require_different(header, file)
        for number, record in enumerate(records, start=1):
            if not record:
                continue
            if len(record) != len(header):
                found = f"{len(record)} values, but the header names {len(header)} columns ({', '.join(header)})"
                write = f"put a value that contains {delimiter!r}, a quote or a line break into double quotes"
                yield Raw(file, number, {}), RowError("DatasetRowInvalid", found, write)
                continue
            yield Raw(file, number, dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}, row {number + 1}: not valid CSV: {error}",
            hint="put values with quotes or line breaks into double quotes, and double the quotes inside",
        ) from None  # fmt: skip


def _require_different(header: list[str], file: Path) -> None:
    """Of two columns with one name the first would be lost. Errors: DatasetRowInvalid."""
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: the header names column {twice!r} twice", hint="give each a name of its own"
        )  # fmt: skip


def _text(file: Path) -> Iterator[Raw]:
    for number, line in _lines(file):
        yield Raw(file, number, {"text": line.strip("\r\n")})


def _parquet(file: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Raw(file, number, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not a readable Parquet file: {reason}", hint="write it again"
        ) from None


def _kind(value: Any) -> str:
    """What a JSON value is, in a reader's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case _:
            return "an object"
