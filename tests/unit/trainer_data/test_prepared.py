"""Prepared rows on disk: their manifest, their verification, and equal bytes for equal rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from finetune_api.errors import StorageError
from finetune_trainer.data import shards
from finetune_trainer.data.pack import build_packed_batches, pack
from finetune_trainer.data.prepare import open_split
from finetune_trainer.data.prepared import MANIFEST_FILE, PreparedFolder, open_prepared, write_prepared
from finetune_trainer.data.shards import ColumnType, ShardReader, ShardWriter, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

COLUMNS = {"input_ids": ColumnType.TOKENS, "labels": ColumnType.TOKENS}
ROWS = [list(range(10 * number, 10 * number + length)) for number, length in enumerate([1, 3, 2, 8, 5, 9, 4])]


def make_token_batch(rows: list[list[int]]) -> Any:
    return make_batch(COLUMNS, {"input_ids": rows, "labels": [[token + 1 for token in row] for row in rows]})


def write_splits(folder: Path, splits: dict[str, list[Any]], digest: str = "d") -> PreparedFolder:
    return write_prepared(folder, splits, inputs_digest=digest, summary={"notes": ["a note"]})


def test_the_manifest_describes_the_rows(tmp_path: Path) -> None:
    write_splits(tmp_path / "p", {"train": [make_token_batch(ROWS[:4]), make_token_batch(ROWS[4:])], "test": [make_token_batch(ROWS[:2])]})
    prepared_folder = open_prepared(tmp_path / "p", "d")
    train, test = prepared_folder.manifest.splits["train"], prepared_folder.manifest.splits["test"]
    assert (train.rows, train.tokens, test.rows, test.tokens) == (7, 32, 2, 4)
    assert train.lengths == {"1": 1, "2": 1, "4": 2, "8": 2, "16": 1}, "a row of 9 tokens counts under 16, a row of 8 tokens under 8"
    assert [file.path for file in prepared_folder.manifest.files] == ["train/00000.arrow", "test/00000.arrow"]
    assert all((tmp_path / "p" / file.path).stat().st_size == file.size for file in prepared_folder.manifest.files)
    assert prepared_folder.manifest.summary == {"notes": ["a note"]}
    prepared_folder.verify()
    rows = open_split(prepared_folder, "train")
    assert rows is not None and rows["input_ids"][:] == ROWS and rows["labels"][5] == [token + 1 for token in ROWS[5]]
    assert open_split(prepared_folder, "validation") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_large_splits_have_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1)
    prepared_folder = write_splits(tmp_path / "p", {"train": [make_token_batch([row]) for row in ROWS]})
    assert [file.path for file in prepared_folder.manifest.splits["train"].files] == [f"train/{number:05}.arrow" for number in range(7)]
    rows = open_split(open_prepared(tmp_path / "p"), "train")
    assert rows is not None and rows["input_ids"][:] == ROWS and rows[6]["input_ids"] == ROWS[6]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shards_are_found(damage: str, tmp_path: Path) -> None:
    prepared_folder = write_splits(tmp_path / "p", {"train": [make_token_batch(ROWS)]})
    shard = tmp_path / "p/train/00000.arrow"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content if damage == "flip" else content[:-1])
    if damage == "remove":
        shard.unlink()
    with pytest.raises(StorageError) as caught:
        prepared_folder.verify() if damage == "flip" else open_prepared(tmp_path / "p")
    assert (caught.value.code, caught.value.hint) == ("PreparedDataDamaged", "prepare the data again")
    assert "train/00000.arrow" in caught.value.message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 0}, "PreparedDataDiffers"), ({"inputsDigest": "e"}, "PreparedDataDiffers"), ({"splits": None}, "PreparedDataDamaged"),
        ({"splits": {"train": {"rows": 1, "tokens": 1, "files": [{"path": "../outside", "size": 0, "sha256": "a"}]}}}, "PreparedDataDamaged"),
    ],
)  # fmt: skip
def test_a_folder_with_an_unsuitable_manifest_is_not_opened(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    write_splits(tmp_path / "p", {"train": [make_token_batch(ROWS)]})
    (tmp_path / "outside").touch()
    manifest = tmp_path / "p" / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(StorageError) as caught:
        open_prepared(tmp_path / "p", "d")
    assert caught.value.code == code


def test_an_incomplete_folder_is_not_opened_and_is_replaced(tmp_path: Path) -> None:
    def yield_batch_and_interrupt() -> Any:
        yield make_token_batch(ROWS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_splits(tmp_path / "p", {"train": yield_batch_and_interrupt()})
    with pytest.raises(StorageError, match="PreparedDataMissing"):
        open_prepared(tmp_path / "p")
    write_splits(tmp_path / "p", {"train": [make_token_batch(ROWS[:1])]})
    rows = open_split(open_prepared(tmp_path / "p"), "train")
    assert rows is not None and rows["input_ids"][:] == ROWS[:1]


def write_and_open(folder: Path, batches: list[Any]) -> ShardReader:
    with ShardWriter(folder, "rows") as writer:
        for batch in batches:
            writer.add(batch)
    return ShardReader(folder, writer.files)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 7), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rows_are_read_by_position_and_equal_rows_give_equal_bytes(positions: list[int], batch_rows: int, tokens_per_batch: int) -> None:
    """The bytes of copied rows do not depend on the batches in which the rows were first written."""
    import tempfile

    lengths = numpy.array([len(ROWS[position]) for position in positions])
    with tempfile.TemporaryDirectory() as folder_name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "TOKENS_PER_BATCH", tokens_per_batch)
        digests = []
        for number, size in enumerate((batch_rows, 7)):
            reader = write_and_open(Path(folder_name, str(number)), [make_token_batch(ROWS[start : start + size]) for start in range(0, 7, size)])
            batches = list(reader.read(numpy.array(positions), lengths))
            assert [row for batch in batches for row in batch.column("input_ids").to_pylist()] == [ROWS[position] for position in positions]
            assert all(batch.num_rows == 1 or sum(map(len, batch.column("input_ids").to_pylist())) <= tokens_per_batch for batch in batches)
            digests.append(write_splits(Path(folder_name, f"p{number}"), {"train": batches}).manifest.files[0].sha256)
        assert digests[0] == digests[1]


def test_rows_are_read_from_shards_and_packed_into_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TOKENS_PER_BATCH", 25)
    reader = write_and_open(tmp_path, [make_token_batch(ROWS[:3]), make_token_batch(ROWS[3:])])
    positions = numpy.array([6, 5, 4, 3, 2, 1, 0])
    lengths = numpy.array([len(ROWS[position]) for position in positions])
    bins = pack(lengths.tolist(), 10)
    packed_rows = [row for batch in build_packed_batches(reader, positions, lengths, bins, -100) for row in batch.to_pylist()]
    documents = [[ROWS[positions[row]] for row in rows] for rows in bins]
    assert packed_rows == [
        {
            "input_ids": sum(rows, []),
            "labels": sum(([-100, *(token + 1 for token in row[1:])] for row in rows), []),
            "seq_lengths": [len(row) for row in rows],
        }
        for rows in documents
    ]  # fmt: skip
    assert sorted(sum(documents, [])) == sorted(ROWS)
