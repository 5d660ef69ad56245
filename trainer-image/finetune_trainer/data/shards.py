"""Writes rows with typed columns to Arrow files (shards), and reads rows by position.

Readers map the shards into memory. The processes of a node share the mapped pages, and the system can drop the pages at any time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.base import LenientModel
from pydantic import Field

from finetune_trainer.file_entry import FileEntry

if TYPE_CHECKING:
    import numpy
    import pyarrow

MAX_SHARD_BYTES = 256 << 20
"""A shard is complete when it has at least this many bytes. The next batch then goes into a new shard."""
COUNTED_COLUMN_SUFFIX = "_ids"
"""The length of a row is the number of tokens in its columns whose names end with this suffix."""
ROWS_PER_BATCH, TOKENS_PER_BATCH = 1000, 1 << 18
"""Maximum numbers of rows and of tokens in a batch that is copied from one shard to another."""
IMAGE_ROWS_PER_BATCH = 4
"""Maximum number of rows in a batch with images. An Arrow array of bytes holds at most 2 GiB, and a row may have 16 images of 20 MB."""


class ColumnType(StrEnum):
    """Type of the values of a column."""

    TOKENS = "tokens"
    """A list of token ids, labels or lengths: 32-bit integers."""
    FLAG = "flag"
    TEXT = "text"
    IMAGES = "images"
    """A list of objects with `path` or `bytes`."""


Columns = Mapping[str, ColumnType]
"""Names and types of the columns of a shard."""


class SplitManifest(LenientModel):
    """The shards of one split."""

    rows: int = Field(description="Stored rows. A packed sequence counts as one row.")
    tokens: int = Field(description="Tokens of all rows.")
    lengths: dict[str, int] = Field(
        default_factory=dict,
        description="Number of rows by length. The key is a power of two; a row counts under the smallest key that is at least its number of tokens.",
    )
    files: list[FileEntry] = Field(description="The shards in the order of their rows; paths are relative to the prepared folder.")


def make_schema(columns: Columns) -> pyarrow.Schema:
    """Return the Arrow schema for these columns."""
    import pyarrow

    types = {
        ColumnType.TOKENS: pyarrow.list_(pyarrow.int32()), ColumnType.FLAG: pyarrow.bool_(), ColumnType.TEXT: pyarrow.string(),
        ColumnType.IMAGES: pyarrow.list_(pyarrow.struct({"path": pyarrow.string(), "bytes": pyarrow.binary()})),
    }  # fmt: skip
    return pyarrow.schema([(name, types[column_type]) for name, column_type in columns.items()])


def make_batch(columns: Columns, values: Mapping[str, Sequence[Any]]) -> pyarrow.RecordBatch:
    """Return an Arrow batch. `values`: the values of each column, by column name."""
    import pyarrow

    schema = make_schema(columns)
    return pyarrow.record_batch([pyarrow.array(values[field.name], field.type) for field in schema], schema=schema)


class _CountedFile:
    """A file object that counts the bytes written to it. It also hashes the bytes if `is_hashed` is true."""

    def __init__(self, path: Path, is_hashed: bool):
        self._file, self.size, self.closed = path.open("wb"), 0, False
        self._hash = hashlib.sha256() if is_hashed else None

    def write(self, data: Any) -> int:
        """Write bytes, or an Arrow buffer."""
        view = memoryview(data)
        if self._hash is not None:
            self._hash.update(view)
        self.size += view.nbytes
        return self._file.write(view)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self.closed = True

    @property
    def sha256(self) -> str:
        """The hash in hex; empty if the bytes are not hashed."""
        return self._hash.hexdigest() if self._hash is not None else ""


@dataclass
class ShardWriter:
    """Writes batches to the shards `<folder>/<name>/00000.arrow` and so on.

    Use the writer as a context manager: the end of the context closes the last shard.
    """

    folder: Path
    name: str
    is_hashed: bool = True
    """Whether the manifest contains the sha256 of each shard. Temporary shards need no sha256."""
    rows: int = 0
    tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    files: list[FileEntry] = field(default_factory=list)
    _file: _CountedFile | None = None
    _stream: Any = None

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self.folder / self.name, ignore_errors=True)
        (self.folder / self.name).mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()

    def add(self, batch: pyarrow.RecordBatch) -> None:
        """Append the rows of a batch."""
        import pyarrow

        if self._file is None:
            self._file = _CountedFile(self.folder / self._shard_path, self.is_hashed)
            self._stream = pyarrow.ipc.new_stream(pyarrow.PythonFile(self._file, "w"), batch.schema)
        self._stream.write_batch(batch)
        self._count_rows_and_tokens(batch)
        if self._file.size >= MAX_SHARD_BYTES:
            self._close_shard()

    def manifest(self) -> SplitManifest:
        """Return the manifest of the written shards. Call this method after the last shard has been closed."""
        lengths = {str(bound): self.lengths[bound] for bound in sorted(self.lengths)}
        return SplitManifest(rows=self.rows, tokens=self.tokens, lengths=lengths, files=self.files)

    @property
    def _shard_path(self) -> str:
        return f"{self.name}/{len(self.files):05}.arrow"

    def _count_rows_and_tokens(self, batch: pyarrow.RecordBatch) -> None:
        import numpy

        lengths = row_lengths(batch)
        self.rows += batch.num_rows
        self.tokens += int(lengths.sum())
        bounds, counts = numpy.unique(numpy.exp2(numpy.ceil(numpy.log2(numpy.maximum(lengths, 1)))), return_counts=True)
        self.lengths.update(dict(zip(map(int, bounds), map(int, counts), strict=True)))

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._stream.close()
        self._file.close()
        self.files.append(FileEntry(path=self._shard_path, size=self._file.size, sha256=self._file.sha256))
        self._file = self._stream = None


def row_lengths(batch: pyarrow.RecordBatch) -> numpy.ndarray[Any, Any]:
    """Return the number of tokens of each row, in all its token columns together."""
    import numpy
    import pyarrow.compute

    lengths = numpy.zeros(batch.num_rows, dtype=numpy.int64)
    for name in batch.schema.names:
        if name.endswith(COUNTED_COLUMN_SUFFIX):
            lengths += pyarrow.compute.list_value_length(batch.column(name)).to_numpy(zero_copy_only=False)
    return lengths


def batch_ranges(lengths: numpy.ndarray[Any, Any], max_rows: int = ROWS_PER_BATCH) -> Iterator[tuple[int, int]]:
    """Divide rows into batches of limited size. For each batch, yields the index of its first row, and the index after its last row.

    `lengths`: the number of tokens of each row.
    """
    import numpy

    ends: Any = numpy.cumsum(lengths)
    start = 0
    while start < len(ends):
        tokens_before = int(ends[start - 1]) if start else 0
        end = min(int(numpy.searchsorted(ends, tokens_before + TOKENS_PER_BATCH, side="right")), start + max_rows)
        yield start, max(end, start + 1)
        start = max(end, start + 1)


class ShardReader:
    """Reads rows, by their positions, from the shards that a `ShardWriter` has written."""

    def __init__(self, folder: Path, files: Sequence[FileEntry]):
        import numpy
        import pyarrow

        self._batches: list[pyarrow.RecordBatch] = []
        for file in files:
            self._batches += pyarrow.ipc.open_stream(pyarrow.memory_map(str(folder / file.path)))
        self._ends = numpy.cumsum([batch.num_rows for batch in self._batches])
        image_type = make_schema({"images": ColumnType.IMAGES}).field(0).type
        has_images = bool(self._batches) and image_type in self._batches[0].schema.types
        self._max_rows = IMAGE_ROWS_PER_BATCH if has_images else ROWS_PER_BATCH

    def read(self, positions: numpy.ndarray[Any, Any], lengths: numpy.ndarray[Any, Any]) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows at `positions`, in the order of `positions`, in batches of limited size. `lengths`: the number of tokens of each row."""
        for start, end in batch_ranges(lengths, self._max_rows):
            yield self.read_batch(positions[start:end])

    def read_batch(self, positions: numpy.ndarray[Any, Any]) -> pyarrow.RecordBatch:
        """Return the rows at the positions (at least one) as one batch. Neighbouring rows of a shard are copied together."""
        import numpy
        import pyarrow

        batch_indices = numpy.searchsorted(self._ends, positions, side="right")
        run_starts = numpy.flatnonzero((numpy.diff(positions, prepend=-2) != 1) | (numpy.diff(batch_indices, prepend=-1) != 0))
        run_ends = numpy.append(run_starts[1:], len(positions))
        slices = []
        for start, end in zip(run_starts.tolist(), run_ends.tolist(), strict=True):
            batch = self._batches[int(batch_indices[start])]
            first_row = int(positions[start]) - (int(self._ends[batch_indices[start]]) - batch.num_rows)
            slices.append(batch.slice(first_row, end - start))
        joined_batch = pyarrow.Table.from_batches(slices).combine_chunks().to_batches()[0]
        # A slice of a batch keeps the buffers of the whole batch. A copy holds only the values of its rows, so that equal rows give equal bytes.
        return joined_batch.take(pyarrow.array(range(len(positions)), pyarrow.int64()))


