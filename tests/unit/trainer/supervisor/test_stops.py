"""A stop request ends any work after training at once, and the next attempt continues the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import StorageError
from finetune_api.names import ExitCode
from finetune_api.status import EvaluationResult, GateResult, Output, Stage
from finetune_trainer.settings import Settings
from finetune_trainer.stages.files import RESULT_FILE, StageResult
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor import later_stages
from finetune_trainer.supervisor.exit_decision import AttemptFacts, ExitDecision, StageReport, decide_exit
from finetune_trainer.supervisor.interruptible import THREAD_NAME, StoppedError, run_until
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.stall import StallWatch
from finetune_trainer.supervisor.supervise import Supervisor

from tests.support.later_stages import (
    COMPARED,
    EVALUATED,
    MERGED,
    RECORD,
    Attempt,
    FakeStages,
    commit_model,
    write_measurements,
    write_merged_model,
)
from tests.support.learning import make_run

COPIED: dict[str, Any] = {"output": {"dir": "results", "layout": "flat"}}


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return commit_model(tmp_path)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Return a function that makes the first call of a method with a matching argument hang until the end of the test.

    The call first runs `before`, for example to request a stop. The function returns a list. When the call hangs, the matching
    argument is added to this list.
    """
    may_end = threading.Event()

    def replace(target: Any, method: str, key_part: str, before: Callable[[], None]) -> list[str]:
        original, hung_arguments = getattr(target, method), list[str]()

        def call(*arguments: Any, **options: Any) -> Any:
            if not hung_arguments and (matching := [str(argument) for argument in arguments if key_part in str(argument)]):
                hung_arguments.append(matching[0])
                before()
                may_end.wait()
            return original(*arguments, **options)

        monkeypatch.setattr(target, method, call)
        return hung_arguments

    yield replace
    may_end.set()


def write_passed_gates(folder: Path) -> None:
    """Write the result of an evaluation that has passed its gates."""
    result = StageResult(evaluation=EvaluationResult(gates=[GateResult(metric="perplexity", passed=True)]))
    (folder / RESULT_FILE).write_text(result.model_dump_json(by_alias=True))


def decide_exit_code(report: StageReport) -> int:
    return decide_exit(AttemptFacts(output=report.output, stage_report=report, stop_requested_at=1.0), [], is_saved=True, node_rank=0).exit_code


WORK: dict[str, tuple[str, str, dict[str, Any], Callable[[Path], None]]] = {
    "reading the records": ("get", RECORD, EVALUATED, FakeStages.behaviour),
    "download of the model": ("download", "model/a1-00000001/model.safetensors", EVALUATED, FakeStages.behaviour),
    "download of finished parts": ("list", "run/stages/evaluating-parts/", EVALUATED, FakeStages.behaviour),
    "download of measurements": ("download", "evaluation/measurements.json", COMPARED, write_measurements),
    "upload of results": ("put_file", "evaluation/predictions.jsonl", EVALUATED, FakeStages.behaviour),
    "upload of the merged model": ("put_file", "model-2.safetensors", MERGED, write_merged_model),
    "commit of the merged model": ("create", "merged/_COMMITTED", MERGED, write_merged_model),
    "promotion": ("put", "model/_PROMOTED", EVALUATED, write_passed_gates),
    "copy to output.dir": ("put_file", "results/model.safetensors", COPIED, FakeStages.behaviour),
}
"""For each test case: the method of the store that hangs, a part of the key with which it hangs, the job's spec, and what its stages write."""


@pytest.mark.parametrize("work", WORK)
def test_a_stop_ends_storage_work_that_hangs(
    work: str, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch, hang: Callable[..., list[str]]
) -> None:
    method, key, spec, behaviour = WORK[work]
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(behaviour))
    stopped_attempt = Attempt(tmp_path, 1, has_trained=False, spec=spec)

    def stop() -> None:
        stopped_attempt.is_stopped = stopped_attempt.is_save_deadline_passed = True

    hung_arguments = hang(FolderStore, method, key, stop)
    report = stopped_attempt.end(output)
    assert len(hung_arguments) == 1 and report.failure is None and decide_exit_code(report) == ExitCode.PREEMPTED_SAVED
    finished_report = Attempt(tmp_path, 2, has_trained=False, spec=spec).end(output)
    assert (finished_report.failure, finished_report.open_stages, decide_exit_code(finished_report)) == (None, [], ExitCode.OK)


def test_a_stop_ends_the_download_of_the_inputs(tmp_path: Path, output: Output, hang: Callable[..., list[str]]) -> None:
    attempt = Attempt(tmp_path, 1, has_trained=False)
    attempt.stages._fetch_inputs = lambda: attempt._fetch()
    hung_arguments = hang(Attempt, "_fetch", "Attempt", lambda: setattr(attempt, "is_stopped", True))
    report = attempt.end(output)
    assert len(hung_arguments) == 1 and (report.failure, report.open_stages) == (None, [Stage.EVALUATING])
    assert attempt.stages.calls == []


def test_a_stop_ends_a_push_to_the_hub(tmp_path: Path, output: Output, hang: Callable[..., list[str]]) -> None:
    hub = {"push": True, "repository": "org/bot", "tokenSecretRef": {"name": "hub", "key": "token"}}
    attempt = Attempt(tmp_path, 1, spec={"output": {"hub": hub}})
    hung_arguments = hang(later_stages, "push_to_hub", "org/bot", lambda: setattr(attempt, "is_stopped", True))
    report = attempt.end(output)
    assert len(hung_arguments) == 1 and (report.failure, report.open_stages, report.output) == (None, [Stage.UPLOADING], output)


def test_a_stop_ends_the_upload_of_finished_parts(tmp_path: Path, output: Output, hang: Callable[..., list[str]]) -> None:
    """A benchmark stores the results of each finished task while its process runs."""
    attempt = Attempt(tmp_path, 1)
    hung_arguments = hang(FolderStore, "put_file", "-parts/", lambda: setattr(attempt, "is_stopped", True))

    def run(folder: Path) -> None:
        (folder / "parts" / "task-1.json").write_text("{}")
        stall_watch = StallWatch(RunState(), None)
        while True:  # The simulated process does not end by itself.
            attempt.stages._watch_process(0, stall_watch)

    attempt.stages.behaviour = run  # type: ignore[method-assign]
    assert attempt.end(output).open_stages == [Stage.EVALUATING] and len(hung_arguments) == 1


def test_the_result_of_a_finished_stage_is_stored_even_after_a_stop(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 1, spec=COMPARED)

    def stop_at_the_end(folder: Path) -> None:
        write_measurements(folder)
        attempt.is_stopped = True

    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(stop_at_the_end))
    report = attempt.end(output)
    assert (report.failure, report.open_stages) == (None, [Stage.COMPARING]) and attempt.tree.store.get(RECORD) is not None


def test_a_stop_ends_a_transfer_that_makes_progress(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, ended_keys = Attempt(tmp_path, 1, has_trained=False), []

    def download(_store: FolderStore, key: str, _target: Path, *, byte_counter: Callable[[int], None]) -> str:
        attempt.is_stopped = True
        try:
            byte_counter(1)
        except StoppedError:
            ended_keys.append(key)
            raise StorageError("StorageFailed", "the transfer was ended") from None  # The client of a store may raise its own error instead of StoppedError.
        return "sha256"

    monkeypatch.setattr(FolderStore, "download", download)
    report = attempt.end(output)
    assert ended_keys == ["model/a1-00000001/model.safetensors"] and (report.failure, report.open_stages) == (None, [Stage.EVALUATING])


# ---- the copy to output.dir


def copy_until(number: int, folder: Path, output: Output, monkeypatch: pytest.MonkeyPatch, *, file_count: int) -> list[str]:
    """Run an attempt that is stopped after it has copied `file_count` model files. Returns the names of all files that the attempt has copied."""
    attempt, copied_names, put_file = Attempt(folder, number, spec=COPIED), list[str](), FolderStore.put_file
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        (folder / f"work-{number}" / "output" / "final" / name).write_text(name)

    def put_and_count(store: FolderStore, source: Path, key: str, **options: Any) -> None:
        put_file(store, source, key, **options)
        copied_names.append(key.rpartition("/")[2])
        attempt.is_stopped = len(copied_names) == file_count

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put_file", put_and_count)
        report = attempt.end(output)
        for thread in threading.enumerate():  # an abandoned thread may still record the last file
            if thread.name == THREAD_NAME:
                thread.join()
    assert report.failure is None and (report.open_stages == []) is (len(copied_names) != file_count)
    return copied_names


def test_an_interrupted_copy_is_continued(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    assert copy_until(1, tmp_path, output, monkeypatch, file_count=2) == ["a.safetensors", "b.safetensors"]
    assert copy_until(2, tmp_path, output, monkeypatch, file_count=9) == ["c.safetensors"]


def test_a_file_of_the_copy_that_has_changed_is_copied_again(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_until(1, tmp_path, output, monkeypatch, file_count=2)
    (tmp_path / "copies" / "results" / "a.safetensors").write_text("A.safetensors")  # simulates another job that has replaced this file
    assert copy_until(2, tmp_path, output, monkeypatch, file_count=9) == ["a.safetensors", "c.safetensors"]


@pytest.mark.parametrize("damage", ["another model", "not JSON"])
def test_an_unusable_list_of_copied_files_is_ignored(damage: str, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_until(1, tmp_path, output, monkeypatch, file_count=2)
    if damage == "not JSON":
        (tmp_path / "store" / "run" / "copied.json").write_text("{")
    model_output = output.model_copy(update={"sha256": "1" * 64}) if damage == "another model" else output
    assert copy_until(2, tmp_path, model_output, monkeypatch, file_count=9) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_stored_files_of_stages_are_copied_once(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {**EVALUATED, **COPIED}
    first_attempt = Attempt(tmp_path, 1, spec=spec)
    assert first_attempt.end(output).open_stages == []
    copy = tmp_path / "copies" / "results" / "predictions.jsonl"
    assert copy.read_text() == '{"a": 1}\n'
    first_attempt.tree.store.delete(["run/stages/uploading.json"])
    copied_at_ns = copy.stat().st_mtime_ns
    assert Attempt(tmp_path, 2, spec=spec).end(output).open_stages == [] and copy.stat().st_mtime_ns == copied_at_ns
    first_attempt.tree.store.put("evaluation/predictions.jsonl", b'{"a": 2}\n')
    first_attempt.tree.store.delete(["run/stages/uploading.json"])
    assert Attempt(tmp_path, 3, spec=spec).end(output).open_stages == [] and copy.read_text() == '{"a": 2}\n'


# ---- the supervisor's time limits


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    """A supervisor of a pod with a grace period of 100 seconds, of which 5 are reserved for the termination message."""
    supervisor = Supervisor(Settings(tmp_path / "run.json", None, tmp_path, tmp_path / "log", 0, 0, "", "uid"))
    supervisor._run = make_run(tmp_path, tmp_path / "model")[0].model_copy(update={"grace_seconds": 100})
    return supervisor


def test_an_attempt_begins_without_the_downloads_of_an_earlier_attempt(supervisor: Supervisor, tmp_path: Path) -> None:
    """In a local run, the work folder stays. A model folder with files of two models would load the wrong weights."""
    (tmp_path / "fetched" / "model").mkdir(parents=True)
    (tmp_path / "fetched" / "model" / "model.safetensors").write_bytes(b"weights of another model")
    supervisor._clean_work_folder()
    assert not (tmp_path / "fetched").exists()


def test_time_limits_are_shares_of_the_grace_period(supervisor: Supervisor) -> None:
    assert supervisor._compute_time_after_grace_share(0.5) == float("inf") and not supervisor._is_past_deadline()
    supervisor._facts.stop_requested_at = 1000.0
    assert [supervisor._compute_time_after_grace_share(share) for share in (0.0, 0.5, 1.0)] == [1000.0, 1047.5, 1095.0]


@pytest.mark.parametrize(
    ("stopped_at", "started_at", "ends_at"),
    [(None, 1000.0, 1060.0), (1000.0, 990.0, 1010.0), (1000.0, 1030.0, 1040.0), (1000.0, 1090.0, 1095.0)],
)
def test_a_stop_shortens_the_wait_for_optional_work(stopped_at: float | None, started_at: float, ends_at: float, supervisor: Supervisor) -> None:
    supervisor._facts.stop_requested_at = stopped_at
    assert supervisor._compute_optional_task_deadline(started_at) == ends_at


def test_a_stop_during_optional_work_ends_the_wait(supervisor: Supervisor) -> None:
    may_end = threading.Event()

    def request_stop_and_hang() -> None:
        supervisor._facts.stop_requested_at = time.monotonic() - 1000
        may_end.wait()

    supervisor._run_optional_task(request_stop_and_hang)  # Without the stop request, this call would wait for 60 seconds.
    may_end.set()


def test_a_stop_during_the_wait_for_trackers_leaves_time_for_the_report(supervisor: Supervisor) -> None:
    ends: list[float] = []

    class Tracking:
        def finish(self, _decision: object, *, is_ended_by_user: bool, get_latest_end: Callable[[], float]) -> None:
            ends.append(get_latest_end())
            supervisor._facts.stop_requested_at = 1000.0
            ends.append(get_latest_end())

    supervisor._tracking = Tracking()  # type: ignore[assignment]
    supervisor._finish_tracking(ExitDecision(ExitCode.OK))
    assert ends == [float("inf"), 1071.25]


def test_an_error_that_is_not_caused_by_a_stop_is_raised() -> None:
    def fail() -> None:
        raise StorageError("StorageFull", "full")

    with pytest.raises(StorageError):
        run_until(lambda: False, fail)
    with pytest.raises(StoppedError):
        run_until(lambda: True, fail)
