"""Encoding rows in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.errors import DataError
from finetune_trainer.data.prepared import open_prepared
from finetune_trainer.data.rows import Conversation, ImageFile, Turn

from tests.support.data import SYSTEM_FIRST, prepare_rows, tokenizer
from tests.support.learning import TEN_ROWS


def read_shard_hashes(folder: Path) -> list[str]:
    (manifest,) = (folder / "tokens").glob("*/prepared.json")
    prepared_folder = open_prepared(manifest.parent)
    prepared_folder.verify()
    return [file.sha256 for file in prepared_folder.manifest.files]


def test_a_batch_is_complete_when_its_images_exceed_the_limit() -> None:
    from finetune_trainer.data import parallel

    image = ImageFile(content=b"x" * (20 << 20))
    rows = [(str(number), Conversation((Turn("user", "What?", parts=(image, "What?")), Turn("assistant", "A dot.")))) for number in range(5)]
    assert [len(batch) for batch in parallel._split_into_batches(rows)] == [2, 2, 1]


@pytest.mark.timeout(120)
def test_several_processes_produce_the_same_tokens_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.data import parallel

    failing_row = {"messages": [*TEN_ROWS[1]["messages"], {"role": "system", "content": "late"}]}
    rows = [failing_row if index in (7, 1203) else TEN_ROWS[index % 10] for index in range(2500)]
    tok = tokenizer(tmp_path, SYSTEM_FIRST, bos=True)
    dataset = {"badRows": "skip", "numProc": 2}
    without_workers = prepare_rows(tmp_path / "a", tok, dataset, rows)
    monkeypatch.setattr(parallel, "ROWS_WITHOUT_WORKERS", 1000)
    worker_counts: list[int] = []
    start_pool = parallel._start_pool
    monkeypatch.setattr(parallel, "_start_pool", lambda work, workers: worker_counts.append(workers) or start_pool(work, workers))
    with_workers = prepare_rows(tmp_path / "b", tok, dataset, rows)
    assert worker_counts == [2]
    assert with_workers.train["input_ids"] == without_workers.train["input_ids"]
    assert with_workers.train["labels"] == without_workers.train["labels"]
    assert with_workers.notes == without_workers.notes
    assert read_shard_hashes(tmp_path / "b") == read_shard_hashes(tmp_path / "a")
    assert len(with_workers.train) == 2498
    assert any("2 rows were left out; the first: train.jsonl, row 8" in note for note in with_workers.notes)
    with pytest.raises(DataError) as caught:
        prepare_rows(tmp_path / "c", tok, {"numProc": 2}, rows)
    assert caught.value.code == "TemplateRefusedRow" and "row 8" in caught.value.message
