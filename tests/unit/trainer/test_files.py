"""Files that another process may read at any time are replaced as a whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from finetune_trainer.files import replace_file
from finetune_trainer.train import TrainingSession


def test_readers_see_no_unfinished_file(tmp_path: Path) -> None:
    path = tmp_path / "new-folder" / "values.json"
    with replace_file(path) as partial_file:
        partial_file.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with replace_file(path) as partial_file:
        partial_file.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_if_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replace_file(path) as partial_file:
        partial_file.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"


def test_a_reader_of_the_log_never_reads_an_unfinished_log(tmp_path: Path) -> None:
    """The supervisor may upload `log.jsonl` while rank 0 writes it. An upload of the empty file lost the log of the whole run."""
    session = cast(TrainingSession, SimpleNamespace(inputs=SimpleNamespace(output_dir=tmp_path)))
    (tmp_path / "log.jsonl").write_text("old\n")
    with (tmp_path / "log.jsonl").open() as reader:
        TrainingSession._write_log(session, SimpleNamespace(state=SimpleNamespace(log_history=[{"step": 1, "loss": 2.5}])))
        assert reader.read() == "old\n"
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n'
