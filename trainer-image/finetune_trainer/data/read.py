"""Stage 1, read: read the rows of JSONL, JSON, CSV, text and Parquet files. Texts are in UTF-8. Errors name the file and the row or byte."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune_api.errors import DataError
from finetune_api.spec.enums import BadRows, FileFormat

from finetune_trainer.data.rows import RawRow, RowError

FILE_FORMATS = {
    ".jsonl": FileFormat.JSONL, ".ndjson": FileFormat.JSONL, ".json": FileFormat.JSON, ".csv": FileFormat.CSV,
    ".tsv": FileFormat.CSV, ".txt": FileFormat.TXT, ".text": FileFormat.TXT, ".parquet": FileFormat.PARQUET,
}  # fmt: skip
"""File format by file extension."""
CSV_FIELD_LIMIT = 16 * 1024 * 1024
"""Maximum number of characters of a CSV value."""
MAX_ROW_BYTES = 64 << 20
"""Maximum length of a line in a JSONL or text file, in bytes."""
MAX_EXPANSION, SMALL_FILE_BYTES = 200, 256 << 20
"""A .gz file may expand to `MAX_EXPANSION` times its size, or to `SMALL_FILE_BYTES` if that is more. Text usually expands 3 to 20 times."""
SURROGATE_ESCAPE = "\\ud"
"""The beginning of a JSON escape for a UTF-16 surrogate (half of a character), in lower case."""


@dataclass
class SkippedRows:
    """The number of bad rows that were left out, and the first bad row with its error."""

    count: int = 0
    first: tuple[RawRow, RowError] | None = None

    def add(self, row: RawRow, error: RowError) -> None:
        """Count a bad row, and keep the row if it is the first bad row."""
        self.count += 1
        self.first = self.first or (row, error)


def data_files(paths: list[Path]) -> list[Path]:
    """Return the files at `paths`. A folder stands for all data files below it, sorted by path. Errors: DatasetEmpty."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file() and _get_file_extension(p) in FILE_FORMATS)
        else:
            files.append(path)
    if not files:
        raise DataError(
            "DatasetEmpty", f"no data file was found in {', '.join(p.name for p in paths) or 'the data set'}",
            hint=f"give a file or a folder with files that end in {', '.join(FILE_FORMATS)}",
        )  # fmt: skip
    return files


def read_rows(
    files: list[Path], file_format: FileFormat, *, bad_rows: SkippedRows | None = None
) -> Iterator[RawRow]:
    """Yield all rows of all files, in order.

    A row is bad if it is not a JSON object, or if the number of its CSV values is wrong. Bad rows are added to `bad_rows`. If `bad_rows`
    is None, the first bad row raises an error.
    Errors: DatasetRowInvalid, DatasetNotUtf8, FileFormatUnknown, DatasetRowTooLarge, DatasetExpandsTooMuch.
    """
    for file in files:
        for row in _read_file(file, file_format):
            if isinstance(row, RawRow):
                yield row
            elif bad_rows is None:
                raise row_error_as_data_error(*row)
            else:
                bad_rows.add(*row)


def row_error_as_data_error(row: RawRow, error: RowError) -> DataError:
    """Return the error that ends a job because of one bad row."""
    skip_hint = f"; or `dataset.badRows: {BadRows.SKIP}` to leave such rows out"
    return DataError(error.code, f"{row.location}: {error.message}", hint=error.hint + skip_hint)


def choose_file_format(file: Path, spec_format: FileFormat) -> FileFormat:
    """Return the file's format: from the spec; else from the file name; else from the first bytes. Errors: FileFormatUnknown."""
    if spec_format is not FileFormat.AUTO:
        return spec_format
    format_by_name = FILE_FORMATS.get(_get_file_extension(file))
    if format_by_name is not None:
        return format_by_name
    with _open_decompressed(file) as stream:
        first_bytes = stream.read(4096)
    if first_bytes.startswith(b"PAR1"):
        return FileFormat.PARQUET
    first_character = first_bytes.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first_character in (b"{", b"["):
        return FileFormat.JSONL if first_character == b"{" else FileFormat.JSON
    raise DataError(
        "FileFormatUnknown", f"{file.name}: the file format cannot be recognised from the name or the first bytes",
        hint="set dataset.fileFormat to one of jsonl, json, csv, txt, parquet",
    )  # fmt: skip


def _get_file_extension(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


@contextmanager
def _open_decompressed(file: Path) -> Iterator[IO[bytes]]:
    """Open the file for reading. A file whose name ends in .gz is decompressed. Errors: DatasetRowInvalid for an unreadable .gz file."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not a readable gzip file: {error}",
            hint="upload the file again, or name it without .gz if it is not compressed",
        ) from None  # fmt: skip


def _check_expansion(file: Path, byte_count: int) -> None:
    """Check the number of decompressed bytes of a .gz file. Errors: DatasetExpandsTooMuch."""
    if byte_count > _compute_max_decompressed_bytes(file):
        raise DataError(
            "DatasetExpandsTooMuch", f"{file.name} has {file.stat().st_size} bytes, but expands to more than {_compute_max_decompressed_bytes(file)} bytes",
            hint="upload the file without compression",
        )  # fmt: skip


def _compute_max_decompressed_bytes(file: Path) -> float:
    is_compressed = file.name.lower().endswith(".gz")
    return max(SMALL_FILE_BYTES, MAX_EXPANSION * file.stat().st_size) if is_compressed else float("inf")


def _read_file(file: Path, file_format: FileFormat) -> Iterator[RawRow | tuple[RawRow, RowError]]:
    match choose_file_format(file, file_format):
        case FileFormat.JSONL:
            return _read_jsonl(file)
        case FileFormat.JSON:
            return _read_json(file)
        case FileFormat.CSV:
            return _read_csv(file)
        case FileFormat.PARQUET:
            return _read_parquet(file)
        case _:
            return _read_text_lines(file)


def _read_numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their line numbers. Errors: DatasetNotUtf8, DatasetRowTooLarge, DatasetExpandsTooMuch."""
    offset = 0
    with _open_decompressed(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b""), start=1):
            _check_expansion(file, offset + len(line))
            if len(line) > MAX_ROW_BYTES:
                raise DataError(
                    "DatasetRowTooLarge", f"{file.name}, row {number}: the row has more than {MAX_ROW_BYTES} bytes",
                    hint="write shorter rows; if the file is one JSON array, write one row per line (JSON Lines)",
                )  # fmt: skip
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _encoding_error(file, offset + error.start, line) from None
            offset += len(line)
            if text.strip():
                yield number, text


def _encoding_error(file: Path, byte_offset: int, first_bytes: bytes) -> DataError:
    other_encoding = "UTF-16" if first_bytes.startswith((b"\xff\xfe", b"\xfe\xff")) else "another encoding"
    return DataError(
        "DatasetNotUtf8", f"{file.name}: byte {byte_offset} is not UTF-8 (the file looks like {other_encoding})",
        hint=f"convert the file: iconv -f {'UTF-16' if other_encoding == 'UTF-16' else 'ENCODING'} -t UTF-8 {file.name}",
    )  # fmt: skip


def _read_text(file: Path) -> str:
    with _open_decompressed(file) as stream:
        limit = _compute_max_decompressed_bytes(file)
        file_bytes = stream.read() if limit == float("inf") else stream.read(int(limit) + 1)
    _check_expansion(file, len(file_bytes))
    try:
        return file_bytes.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _encoding_error(file, error.start, file_bytes[:4]) from None


def _parse_object_row(file: Path, number: int, value: Any, *, has_surrogates: bool) -> RawRow | tuple[RawRow, RowError]:
    """Return the row, or the row with an error if the value is not a valid object.

    `has_surrogates`: whether the JSON text contains escapes for UTF-16 surrogates.
    """
    if isinstance(value, dict):
        error = _find_surrogate_error(value) if has_surrogates else None
        return (RawRow(file, number, {}), error) if error else RawRow(file, number, value)
    message = f"a JSON object was expected, found {_name_json_type(value)}"
    return RawRow(file, number, {}), RowError(
        "DatasetRowInvalid", message, 'write one object per row, for example {"messages": [...]}'
    )


def _find_surrogate_error(value: Any) -> RowError | None:
    """Return an error if the value has an unpaired UTF-16 surrogate, such as `\\ud83d` alone. Tokenizers reject unpaired surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return RowError(
            "DatasetRowInvalid", f"`\\u{ord(error.object[error.start]):04x}` is half of a UTF-16 surrogate pair",
            "write both UTF-16 surrogates, or the character itself",
        )  # fmt: skip
    return None


def _read_jsonl(file: Path) -> Iterator[RawRow | tuple[RawRow, RowError]]:
    for number, line in _read_numbered_lines(file):
        try:
            value = json.loads(line.rstrip())
        except (ValueError, RecursionError) as error:
            column = (
                f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
            )
            yield (
                RawRow(file, number, {}),
                RowError("DatasetRowInvalid", f"not valid JSON{column}", "write one JSON object per line"),
            )
            continue
        yield _parse_object_row(file, number, value, has_surrogates=SURROGATE_ESCAPE in line.lower())


def _read_json(file: Path) -> Iterator[RawRow | tuple[RawRow, RowError]]:
    text = _read_text(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # The file is probably a JSONL file with the wrong extension.
            yield from _read_jsonl(file)
            return
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="write an array of objects; or write one object per line, and set `dataset.fileFormat: jsonl`",
        ) from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        # Python's parser refuses numbers with thousands of digits, and deeply nested arrays.
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not valid JSON: {error}", hint="fix the row, or remove it"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: an array of objects was expected, found {_name_json_type(value)}",
            hint='write [{"messages": [...]}, ...], or an object whose `data` is such an array',
        )  # fmt: skip
    has_surrogates = SURROGATE_ESCAPE in text.lower()
    for number, item in enumerate(value, start=1):
        yield _parse_object_row(file, number, item, has_surrogates=has_surrogates)


def _read_csv(file: Path) -> Iterator[RawRow | tuple[RawRow, RowError]]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    text = _read_text(file)
    header_line = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count) if any(c in header_line for c in ",;\t") else ","
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line_number = 0
    try:
        header = [name.strip() for name in next(records, [])]
        _require_unique_names(header, file)
        for line_number, record in enumerate(records, start=1):
            if not record:
                continue
            if len(record) != len(header):
                message = f"{len(record)} values, but the header names {len(header)} columns ({', '.join(header)})"
                hint = f"put a value that contains {delimiter!r}, a quote or a line break into double quotes"
                yield RawRow(file, line_number, {}), RowError("DatasetRowInvalid", message, hint)
                continue
            yield RawRow(file, line_number, dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}, row {line_number + 1}: not valid CSV: {error}",
            hint="put values with quotes or line breaks into double quotes, and write each quote inside such a value twice",
        ) from None  # fmt: skip


def _require_unique_names(header: list[str], file: Path) -> None:
    """Refuse a header with two equal column names, because only the last of the two columns would be read. Errors: DatasetRowInvalid."""
    duplicate_name = next((name for name in header if name and header.count(name) > 1), None)
    if duplicate_name is not None:
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: the header names column {duplicate_name!r} twice", hint="give each column its own name"
        )  # fmt: skip


def _read_text_lines(file: Path) -> Iterator[RawRow]:
    for number, line in _read_numbered_lines(file):
        yield RawRow(file, number, {"text": line.strip("\r\n")})


PARQUET_ROWS = 64
"""Number of rows that are converted to Python objects together. The number is small, because a row may hold megabytes of images or thousands of token ids."""


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        row_number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            for value in batch.to_pylist():
                row_number += 1
                yield RawRow(file, row_number, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            "DatasetRowInvalid", f"{file.name}: not a readable Parquet file: {reason}", hint="write the file again"
        ) from None


def _name_json_type(value: Any) -> str:
    """Return the JSON type of a value, for messages."""
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
