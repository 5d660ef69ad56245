"""The pod of a preparation: which rows it stores and uses, and which messages of the process `check` it accepts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.pod import RunConfig
from finetune_api.status import DataReport, ResolvedConfig
from finetune_trainer import rows_request
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor import preparation_pod
from finetune_trainer.supervisor.preparation_pod import CheckResult, PreparationPod

from tests.support.learning import make_run

DIGEST = "d" * 64
SUMMARY = SimpleNamespace(rows={"train": 3}, bad_rows=0, findings=SimpleNamespace(duplicate_count=0, personal_data_counts={}))
STORED_ROWS = {"prepared_uri": f"s3://rows/{DIGEST}", "prepared_sha256": "e" * 64}


class FakeStore:
    """A row store that records the calls of its methods."""

    def __init__(self) -> None:
        self.fetched_digests: list[str] = []
        self.committed_digests: list[str] = []
        self.on_cleanup: Callable[[], None] = lambda: None

    def fetch_for_preparation(self, digest: str, work: Path) -> None:
        self.fetched_digests.append(digest)

    def commit(self, digest: str, folder: Path, **_: Any) -> str:
        self.committed_digests.append(digest)
        return "e" * 64

    def uri(self, digest: str) -> str:
        return f"s3://rows/{digest}"

    def remove_expired(self) -> list[str]:
        self.on_cleanup()
        return []


class PreparationBench:
    """A preparation pod whose process `check` requests rows with the digest `requested_digest` and reports the digest `checked_digest`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store = folder, FakeStore()
        self.requested_digest: Any = DIGEST
        self.checked_digest = DIGEST
        self.pod = PreparationPod(Settings(folder / "run.json", None, folder / "work", folder / "log", 0, 0, "", "uid"))
        self.run: RunConfig = self.build_run({})
        monkeypatch.setattr(preparation_pod, "load_run", lambda _: (self.run, "sha"))
        monkeypatch.setattr(preparation_pod, "Preparation", lambda *_: SimpleNamespace(
            check_hub_token=lambda: None, preflight=lambda: None, data_summary=SUMMARY,
            fetch=lambda: (SimpleNamespace(write=lambda _: None), RunFacts(dataset_digest="t")),
        ))  # fmt: skip
        monkeypatch.setattr(preparation_pod, "find_result_to_adopt", lambda *_: None)
        monkeypatch.setattr(preparation_pod, "run_child", self._run_child)
        monkeypatch.setattr(preparation_pod.RowStore, "open", self._open)

    def build_run(self, spec: dict[str, Any]) -> RunConfig:
        return make_run(self.folder, Path("/models/tiny"), spec)[0]

    @contextmanager
    def _open(self, *_: Any) -> Iterator[FakeStore]:
        yield self.store

    def _run_child(self, *_: Any, handle_message: Callable[[dict[str, Any]], None], **__: Any) -> SimpleNamespace:
        if self.requested_digest is not None:
            handle_message({"kind": rows_request.ROWS_NEEDED, "digest": self.requested_digest})
        for thread in threading.enumerate():
            if thread.name == "stored-rows":
                thread.join()
        check_result = CheckResult(data=DataReport(rows={"train": 3}, digest=self.checked_digest), resolved=ResolvedConfig())
        handle_message({"kind": "checked", "value": check_result.to_wire()})
        return SimpleNamespace(failure=None)

    def check(self) -> DataReport:
        return self.pod._check()

    def list_notes(self) -> list[str]:
        resolved = self.pod._state.report().resolved
        return list((resolved.notes if resolved is not None else None) or [])

    @property
    def is_answered(self) -> bool:
        return rows_request.answer_file(self.folder / "work", DIGEST).exists()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparationBench:
    return PreparationBench(tmp_path, monkeypatch)


def test_a_preparation_searches_for_stored_rows_and_stores_its_own(bench: PreparationBench) -> None:
    report = bench.check()
    assert (report.prepared_uri, report.prepared_sha256) == tuple(STORED_ROWS.values())
    assert (bench.store.fetched_digests, bench.store.committed_digests, bench.is_answered, bench.list_notes()) == ([DIGEST], [DIGEST], True, [])


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": {"trustRemoteCode": True}}, "model.trustRemoteCode"),
        ({"placement": {"image": "registry.example.com/own:1"}}, "placement.image"),
        ({"placement": {"env": [{"name": "PYTHONPATH", "value": "/mnt/code"}]}}, "placement.env[0].name"),
        (
            {"trainer": {"type": "grpo", "rewards": [{"configMapRef": {"name": "rewards", "key": "rewards.py"}}]}},
            "trainer.rewards[0].configMapRef",
        ),
    ],
)
def test_a_preparation_that_runs_other_code_neither_stores_nor_uses_rows(bench: PreparationBench, spec: dict[str, Any], field: str) -> None:
    bench.run = bench.build_run(spec)
    report = bench.check()
    assert (report.rows, report.prepared_uri, report.prepared_sha256) == ({"train": 3}, None, None)
    assert (bench.store.fetched_digests, bench.store.committed_digests, bench.is_answered) == ([], [], True)
    assert bench.list_notes() == [
        f"prepared rows are neither stored nor used, because {field} can run other code in the preparation; the training pods tokenise the data"
    ]


def test_a_repeated_request_touches_a_file_during_the_search_and_the_answer_file_after_it(bench: PreparationBench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.folder / "work").mkdir()
    request = {"kind": rows_request.ROWS_NEEDED, "digest": DIGEST}
    may_end, bench.pod._row_store = threading.Event(), bench.store  # type: ignore[assignment]
    monkeypatch.setattr(bench.store, "fetch_for_preparation", lambda *_: may_end.wait())
    bench.pod._handle_message(request)
    bench.pod._handle_message(request)
    assert rows_request.working_file(bench.folder / "work", DIGEST).exists() and not bench.is_answered
    may_end.set()
    assert bench.pod._rows_search is not None
    bench.pod._rows_search.join()
    assert bench.is_answered
    rows_request.answer_file(bench.folder / "work", DIGEST).unlink()
    bench.pod._handle_message(request)
    assert bench.is_answered, "the first answer was lost"


@pytest.mark.parametrize(
    ("requested_digest", "checked_digest", "fetched_digests"),
    [
        (DIGEST, "f" * 64, [DIGEST]), (DIGEST, "../" + "d" * 61, [DIGEST]), ("../../other", "../../other", []), ("D" * 64, "D" * 64, []),
        (None, DIGEST, []), (["d"], DIGEST, []),
    ],
    ids=["another digest", "path at the end", "path", "capitals", "no request", "list"],
)  # fmt: skip
def test_rows_with_an_invalid_or_another_digest_are_not_stored(
    bench: PreparationBench, requested_digest: Any, checked_digest: str, fetched_digests: list[str]
) -> None:
    bench.requested_digest, bench.checked_digest = requested_digest, checked_digest
    report = bench.check()
    assert (report.prepared_uri, report.prepared_sha256, bench.store.fetched_digests, bench.store.committed_digests) == (None, None, fetched_digests, [])
    assert bench.list_notes() == ["the prepared rows were not stored: their digest differs from the requested digest; the training pods tokenise the data"]


def test_a_stop_during_the_cleanup_keeps_the_result(bench: PreparationBench) -> None:
    may_end = threading.Event()

    def stop() -> None:
        bench.pod._stop_requested.set()
        may_end.wait()

    bench.store.on_cleanup = stop
    report = bench.check()
    may_end.set()
    assert (report.rows, report.prepared_sha256, bench.store.committed_digests) == ({"train": 3}, "e" * 64, [DIGEST])
