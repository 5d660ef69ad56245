"""Runs the pod of a preparation: checks storage, model and data before a pod with GPUs starts.

The pod downloads the data. Of the model, it downloads the configuration and the tokenizer, but not the weights. It reports each problem with the same error
code as a training pod. At the end, it stores the tokenised rows in storage, from which the training pods download them. If the job has a cache of base
models in a PersistentVolumeClaim, the pod also puts the model into the cache, so that no GPU is idle during the download. A stopped preparation is
started again.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.base import ReportModel
from finetune_api.existing_result import RunResult
from finetune_api.names import PREPARATION_ATTEMPT, ExitCode
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_api.status import DataReport, ResolvedConfig, Stage
from finetune_api.tenancy import find_user_code_in_preparation

from finetune_trainer import processes, rows_request
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.data.prepared import TOKENS_FOLDER, prepared_folder
from finetune_trainer.failure import RankFailure, as_failure
from finetune_trainer.inputs import FILE_NAME
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.supervisor.cache_pod import fill_claim
from finetune_trainer.supervisor.child_run import run_child
from finetune_trainer.supervisor.existing_result import find_result_to_adopt
from finetune_trainer.supervisor.exit_decision import ExitDecision
from finetune_trainer.supervisor.fetch import MODEL_WITHOUT_WEIGHTS
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.interruptible import StoppedError, run_until
from finetune_trainer.supervisor.prepare import Preparation
from finetune_trainer.supervisor.rank_messages import apply_report
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.server import Server
from finetune_trainer.supervisor.stored_rows import RowStore, StoredRows
from finetune_trainer.supervisor.termination import build_termination_message, write_termination_message

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
MAX_FILL_SECONDS = 3600.0
"""Maximum time to fill the cache of base models. The limit is needed because the preparation reports its result only after the cache is filled, and
its Kubernetes Job has a deadline of six hours."""


class CheckResult(ReportModel):
    """What the process `check` of a preparation reports about the tokenised data."""

    data: DataReport
    resolved: ResolvedConfig


class PreparationPod:
    """One pod of a preparation. `run()` returns its exit code."""

    def __init__(self, settings: Settings, stop_requests: Sequence[float] = ()) -> None:
        self._settings = settings
        self._state = RunState()
        self._stop_requested = threading.Event()
        if stop_requests:
            self._stop_requested.set()
        self._check_result: CheckResult | None = None
        self._row_store: RowStore | None = None
        """The prepared rows in storage; None if this preparation neither stores nor uses prepared rows."""
        self._stored_rows: StoredRows | None = None
        """The rows of an earlier preparation, if this pod uses them."""
        self._adopted_result: RunResult | None = None
        self._requested_digest: str | None = None
        """The digest in the first request of the process `check`. Requests with another digest are refused."""
        self._rows_search: threading.Thread | None = None

    def run(self) -> int:
        """Check everything, report the result to the operator, and return the exit code."""
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda _number, _frame: self._stop_requested.set())
        processes.adopt_orphans()
        # If the operator has given no secret, the random secret makes the server refuse every request for the report.
        server = Server(self._state, self._settings.port, attempt_secret=self._settings.attempt_secret or secrets.token_hex(32))
        log.info("listening on port %d", server.port)
        data_report = DataReport()
        try:
            data_report = self._check()
            decision = ExitDecision(ExitCode.OK)
        except StoppedError:
            decision = ExitDecision(ExitCode.PREEMPTED_SAVED)  # A stopped preparation has no state to save, because the next preparation starts again.
        except Exception as error:
            failure = as_failure(error, "PreparationFailed")
            decision = ExitDecision(int(failure.exit_code), RankFailure(failure))
        processes.kill_all_descendants()
        message = build_termination_message(decision, self._state.report(), output=None, start_step=0, node_name=self._settings.node_name)
        # `model_revision` can be a digest of all files of the model, but this pod has not downloaded the weights.
        resolved_config = message.resolved.model_copy(update={"model_revision": None}) if message.resolved is not None else None
        message = message.model_copy(update={"data": data_report, "resolved": resolved_config})
        if self._adopted_result is not None and decision.exit_code == ExitCode.OK:
            message = _add_adopted_result(message, self._adopted_result)
        write_termination_message(message, self._settings.termination_log)
        server.close()
        return decision.exit_code

    def _check(self) -> DataReport:
        """Run all checks and store the rows. Errors: those of `Preparation` and of the process `check`; StoppedError."""
        run, config_sha256 = load_run(self._settings)
        self._state.set_run_config(run.model_copy(update={"attempt": PREPARATION_ATTEMPT}), config_sha256)
        work_folder = self._settings.work_folder
        for folder in (work_folder / "output", work_folder / TOKENS_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        (work_folder / "output").mkdir(parents=True)
        for leftover in (work_folder / FILE_NAME, *work_folder.glob(rows_request.ANSWER_FILES)):
            leftover.unlink(missing_ok=True)
        preparation = Preparation(run, config_sha256, self._settings, self._state, FileDigests(), MODEL_WITHOUT_WEIGHTS)
        preparation.check_hub_token()

        def prepare_inputs() -> RunFacts:
            preparation.preflight()
            inputs, facts = preparation.fetch()
            inputs.write(work_folder)
            self._adopted_result = find_result_to_adopt(run, facts, self._state)
            return facts

        facts = run_until(self._stop_requested.is_set, prepare_inputs)
        row_address_fields: dict[str, str] = {}
        with RowStore.open(run, self._settings.checkpoint_key) as row_store:
            self._row_store = row_store if self._may_share_rows(run) else None
            if self._adopted_result is None:
                self._run_process(run)
            summary, check_result = preparation.data_summary, self._check_result
            self._state.merge_resolved(check_result.resolved if check_result is not None else ResolvedConfig())
            if summary is None:
                return DataReport()
            if check_result is not None and self._row_store is not None:
                row_address_fields = run_until(self._stop_requested.is_set, lambda: self._store_rows(row_store, run, check_result.data.digest, facts, summary))
            with suppress(StoppedError):  # If the pod is stopped here, a later preparation removes unused rows, and training pods fill the cache.
                run_until(self._stop_requested.is_set, lambda: _remove_unused_rows(row_store))
                if self._adopted_result is None:
                    fill_deadline = time.monotonic() + MAX_FILL_SECONDS
                    run_until(lambda: self._stop_requested.is_set() or time.monotonic() > fill_deadline, lambda: self._fill_cache(run))
        findings = summary.findings
        data_report = DataReport(
            rows=summary.rows, bad_rows=summary.bad_rows, duplicates=findings.duplicate_count, personal_data=findings.personal_data_counts
        )
        return data_report.model_copy(update=(check_result.data.model_dump(exclude_none=True) if check_result is not None else {}) | row_address_fields)

    def _may_share_rows(self, run: RunConfig) -> bool:
        """Whether this preparation stores and uses shared rows.

        A preparation that runs the user's code must not store or use shared rows, because the code could change the rows of other jobs.
        """
        user_code_fields = find_user_code_in_preparation(run.spec)
        if user_code_fields:
            self._state.add_note(
                f"prepared rows are neither stored nor used, because {', '.join(user_code_fields)} can run other code in the preparation; "
                "the training pods tokenise the data"
            )
        return not user_code_fields

    def _run_process(self, run: RunConfig) -> None:
        """Run the process `check`, which does the checks that need large libraries. Errors: the failure that the process reports; StoppedError."""

        def watch(_pid: int) -> None:
            if self._stop_requested.is_set():
                raise StoppedError

        child_result = run_child(["check"], run, self._settings, handle_message=self._handle_message, watch_process=watch)
        if child_result.failure is not None:
            raise child_result.failure

    def _answer_request(self, digest: Any) -> None:
        """Search for the stored rows that the process `check` requests. If `check` repeats the request, signal that the search continues, or answer again."""
        if not rows_request.is_digest(digest) or self._requested_digest not in (None, digest):
            log.warning("a request for prepared rows is not valid")
            return
        if self._rows_search is None:
            self._requested_digest = digest
            self._rows_search = threading.Thread(target=self._provide_rows, args=(digest,), name="stored-rows", daemon=True)
            self._rows_search.start()
        elif self._rows_search.is_alive():
            _touch(rows_request.working_file(self._settings.work_folder, digest))
        else:
            _touch(rows_request.answer_file(self._settings.work_folder, digest))

    def _provide_rows(self, digest: str) -> None:
        """Download rows that an earlier preparation has stored, and let the process `check` continue. This method runs in a thread of its own."""
        work_folder = self._settings.work_folder
        try:
            if self._row_store is not None:
                self._stored_rows = self._row_store.fetch_for_preparation(digest, work_folder)
        except Exception as error:
            log.warning("stored rows could not be read", exc_info=error)
        finally:
            _touch(rows_request.answer_file(work_folder, digest))

    def _store_rows(self, row_store: RowStore, run: RunConfig, digest: str | None, facts: RunFacts, summary: DataSummary) -> dict[str, str]:
        """Store the rows, unless an earlier preparation has stored them. Returns the fields of `DataReport` that name the stored rows.

        `digest`: None if the rows of this run must not be stored. A failure only adds a note, because the training pods can prepare the data themselves.
        """
        if digest is None:
            return {}
        if not rows_request.is_digest(digest) or digest != self._requested_digest:
            self._state.add_note("the prepared rows were not stored: their digest differs from the requested digest; the training pods tokenise the data")
            return {}
        folder = prepared_folder(self._settings.work_folder / TOKENS_FOLDER, digest)
        try:
            if self._stored_rows is not None and self._stored_rows.digest == digest:
                sha256 = self._stored_rows.manifest_sha256
            else:
                self._state.enter_stage(Stage.UPLOADING, "prepared rows")
                sha256 = row_store.commit(digest, folder, incarnation=self._settings.incarnation(run), facts=facts, summary=summary)
        except Exception as error:
            log.warning("the prepared rows were not stored", exc_info=error)
            self._state.add_note(f"the prepared rows were not stored: {as_failure(error, 'StorageFailed').code}; the training pods tokenise the data")
            return {}
        return {"prepared_uri": row_store.uri(digest), "prepared_sha256": sha256}

    def _fill_cache(self, run: RunConfig) -> None:
        """Put the models of the run into a cache in a PersistentVolumeClaim.

        A failure only adds a note, because the training pods try again to fill the cache.
        """
        if self._settings.claim_cache is None:
            return
        self._state.enter_stage(Stage.DOWNLOADING, "model.cache")
        try:
            for note in fill_claim(self._settings, run, self._settings.claim_cache):
                self._state.add_note(f"in the preparation, {note}")
        except Exception as error:
            log.warning("the cache was not filled", exc_info=error)

    def _handle_message(self, message: dict[str, Any]) -> None:
        match message.get("kind"):
            case rows_request.ROWS_NEEDED:
                self._answer_request(message.get("digest"))
            case rows_request.ROWS_TOKENISED:
                self._state.set_data(DataReport(tokenised_rows=int(message["rows"])))
            case "checked":
                self._check_result = CheckResult.model_validate(message["value"])
            case _:
                apply_report(self._state, message)


def _add_adopted_result(message: TerminationMessage, result: RunResult) -> TerminationMessage:
    """Return the termination message with the result of the earlier run, as if this job had trained the model."""
    own_notes = message.resolved.notes if message.resolved is not None else None
    resolved_config = (result.resolved or ResolvedConfig()).model_copy(update={"notes": own_notes})
    return message.model_copy(update={
        "output": result.output, "evaluation": result.evaluation, "metrics": result.metrics, "progress": result.progress,
        "step": result.progress.step if result.progress is not None else None, "resolved": resolved_config,
    })  # fmt: skip


def _touch(file: Path) -> None:
    """Create or touch a file.

    A failure is only logged, because the process `check` repeats its request, and it tokenises the data itself if it gets no answer.
    """
    try:
        file.touch()
    except OSError as error:
        log.warning("%s could not be written: %s", file.name, error)


def _remove_unused_rows(row_store: RowStore) -> None:
    """Remove rows that no job has used for `prepare.ttlDays`. A failure is only logged, because unused rows only cost space."""
    try:
        for digest in row_store.remove_expired():
            log.info("removed unused prepared rows %s", digest)
    except Exception as error:
        log.warning("unused prepared rows were not removed", exc_info=error)


def prepare(settings: Settings, stop_requests: Sequence[float] = ()) -> int:
    """Run the pod of a preparation; returns its exit code. `stop_requests`: monotonic times of earlier stop signals."""
    return PreparationPod(settings, stop_requests).run()
