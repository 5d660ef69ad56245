"""A checkpoint is queued for upload when the last rank of the pod has written its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import StorageError
from finetune_trainer.checkpoint.uploader import StagedCheckpoint
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.staging import Staging


class RecordingUploader:
    def __init__(self) -> None:
        self.enqueued_checkpoints: list[StagedCheckpoint] = []
        self.unsaved_count = 0

    def enqueue(self, staged: StagedCheckpoint) -> None:
        self.enqueued_checkpoints.append(staged)

    def record_unsaved(self) -> None:
        self.unsaved_count += 1


class Bench:
    """A staging folder for two ranks, and the folder with the files of their checkpoint."""

    def __init__(self, work: Path) -> None:
        self.work, self.state, self.uploader = work, RunState(), RecordingUploader()
        self.staging = Staging(work, self.state, rank_count=2)
        self.staging.uploader = self.uploader  # type: ignore[assignment] # a recorder

    def add_rank_files(self, local_rank: int, step: int = 5, **fields: Any) -> Path:
        source = self.work / f"output/checkpoint-{step}"
        source.mkdir(parents=True, exist_ok=True)
        (source / f"rank{local_rank}").write_text("weights")
        message = {"step": step, "localRank": local_rank, "folder": str(source), "incarnation": "a1-0"}
        self.staging.add_rank_files(message | fields)
        return source


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_checkpoint_is_enqueued_after_the_last_rank(bench: Bench) -> None:
    bench.add_rank_files(0, epoch=1.5, stallSeconds=2)
    bench.add_rank_files(0, step=6, stallSeconds=1)
    assert bench.uploader.enqueued_checkpoints == []
    source = bench.add_rank_files(1, graceful=True, stallSeconds=7)
    (staged,) = bench.uploader.enqueued_checkpoints
    assert (staged.step, staged.incarnation, staged.is_graceful_stop, staged.rank0_report["epoch"]) == (5, "a1-0", True, 1.5)
    assert sorted(file.name for file in staged.folder.iterdir()) == ["rank0", "rank1"] and not source.exists()
    assert bench.state.counters == {"checkpoint_stall_seconds": 3.0}
    bench.add_rank_files(1)
    assert len(bench.uploader.enqueued_checkpoints) == 1, "after an upload, the messages for the same step are counted from zero"


def test_nothing_is_staged_before_the_pod_is_prepared(bench: Bench) -> None:
    bench.staging.uploader = None
    bench.add_rank_files(0)
    bench.add_rank_files(1)
    bench.staging.add_final({"folder": str(bench.work)}, "a1-0")
    bench.staging.skip_checkpoint("Skipped", "why")
    assert not (bench.work / "staged").exists() and bench.state.checkpoint_problem == "Skipped: why"


def test_a_checkpoint_that_cannot_be_staged_is_skipped(bench: Bench) -> None:
    bench.add_rank_files(0)
    bench.add_rank_files(1, folder=str(bench.work / "missing"))
    assert bench.uploader.enqueued_checkpoints == [] and bench.uploader.unsaved_count == 1
    assert bench.state.checkpoint_problem is not None and bench.state.checkpoint_problem.startswith("StagingFailed: step 5: ")
    assert bench.state.counters["checkpoints_skipped"] == 1


def test_the_final_artefact_is_enqueued_with_the_newest_step(bench: Bench) -> None:
    bench.state.record_step(9)
    (bench.work / "final").mkdir()
    (bench.work / "final/weights").write_text("weights")
    bench.staging.add_final({"folder": str(bench.work / "final"), "outputKind": "adapter"}, "a1-0")
    (staged,) = bench.uploader.enqueued_checkpoints
    assert (staged.step, staged.incarnation, staged.rank0_report["step"], staged.rank0_report["outputKind"]) == (None, "a1-0", 9, "adapter")
    assert (staged.folder / "weights").read_text() == "weights" and (bench.work / "final/weights").exists()
    with pytest.raises(StorageError, match="No such file"):
        bench.staging.add_final({"folder": str(bench.work / "missing")}, "a1-0")
