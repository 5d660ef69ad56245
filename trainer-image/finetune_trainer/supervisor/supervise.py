"""Runs one pod, from its start to its exit code. `Supervisor.run` lists the steps."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import FineTuneError, InternalError
from finetune_api.names import Env, ExitCode, FailureClass, Reason, Storage
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_api.rules import generation_server, value_or_default
from finetune_api.status import Output, Stage

from finetune_trainer import processes
from finetune_trainer.agent_result import RESULT_FILE, read_exit_codes
from finetune_trainer.channel import STOP_FILE
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.checkpoint.uploader import KeepPolicy, Uploader, to_status_checkpoints
from finetune_trainer.failure import RankFailure, as_failure, failure_from_exit_code
from finetune_trainer.files import replace_file
from finetune_trainer.inputs import FILE_NAME, Inputs
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.storage.base import join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.agent_process import start_agent
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder
from finetune_trainer.supervisor.existing_model import ExistingModel, find_existing_model, record_existing_model
from finetune_trainer.supervisor.existing_result import store_result
from finetune_trainer.supervisor.exit_decision import (
    AttemptFacts,
    ExitDecision,
    StageFailure,
    StageReport,
    decide_exit,
    is_state_saved,
    stop_deadline,
)
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.gang import Forwarder, Gate, StoreAddress, connect_gang
from finetune_trainer.supervisor.later_stages import MODEL_FOLDER, LaterStages
from finetune_trainer.supervisor.lineage import Lineage
from finetune_trainer.supervisor.metric_log import MetricLog
from finetune_trainer.supervisor.prepare import Preparation, add_restored_checkpoint, sweep_leftovers
from finetune_trainer.supervisor.rank_channel import RankChannel
from finetune_trainer.supervisor.rank_messages import RankMessages
from finetune_trainer.supervisor.remaining_time import estimate_step_seconds
from finetune_trainer.supervisor.run_report import ReportWriter
from finetune_trainer.supervisor.run_results import RunResults
from finetune_trainer.supervisor.run_state import RunState, store_quietly
from finetune_trainer.supervisor.server import Server
from finetune_trainer.supervisor.staging import Staging
from finetune_trainer.supervisor.stall import StallWatch, dump_rank_stacks
from finetune_trainer.supervisor.termination import build_termination_message, write_termination_message
from finetune_trainer.supervisor.tracking import RunTracking, parse_log, read_checkpoint_log

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05
UPLOAD_AFTER_FAILURE_SECONDS = 120.0
"""Maximum wait for uploads at the end of an attempt that has written no final artefact."""
PARTS_AFTER_FAILURE_SECONDS = 5.0
"""Maximum wait for the files that other pods upload for a checkpoint, after a rank of the gang has failed."""
FINAL_UPLOAD_SECONDS = 6 * 3600.0
"""Maximum wait for the upload of the final artefact."""
UPLOAD_POLL_SECONDS = 0.2
OPTIONAL_TASK_SECONDS = 60.0
"""Maximum wait for one optional task at the end of an attempt, such as the removal of old checkpoints."""
OPTIONAL_TASK_AFTER_STOP_SECONDS = 10.0
MIN_OPTIONAL_TASK_SECONDS = 0.05
SAVE_GRACE_SHARE = 0.5
"""A stopped pod may store the result of a finished stage until this share of the grace period has passed."""
TRACKING_GRACE_SHARE = 0.75
"""A stopped pod waits for trackers until this share of the grace period has passed. The remaining time is reserved for the report."""
RESULT_FILES = "result files"
ATTEMPT_RECORDS = "records of the attempt"
RESULT_RECORDS = "records of the result"


class Supervisor:
    """Supervises one pod. `run()` returns its exit code.

    Besides the main thread, the supervisor has threads for the HTTP server, the preparation, the ranks' messages and the uploads.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = RunState(processes.seconds_since_process_start())
        self._facts = AttemptFacts()
        self._must_end = threading.Event()
        self._failure_lock = threading.Lock()
        self._run: RunConfig | None = None
        self._tree: CheckpointTree | None = None
        self._uploader: Uploader | None = None
        self._staging: Staging | None = None
        self._metric_log: MetricLog | None = None
        self._results: RunResults | None = None
        self._report_writer: ReportWriter | None = None
        self._started_at = datetime.now(UTC)
        self._existing_model: ExistingModel | None = None
        self._recorder: AttemptRecorder | None = None
        self._digests = FileDigests()
        self._lineage: Lineage | None = None
        self._lineage_uri: str | None = None
        self._server: Server | None = None
        self._channel: RankChannel | None = None
        self._gang_relay: Gate | Forwarder | None = None
        self._tracking: RunTracking | None = None

    def run(self, stop_requests: Sequence[float] = ()) -> int:
        """Run the pod and return its exit code. `stop_requests`: monotonic times of earlier SIGTERMs."""
        self._handle_signals(stop_requests)
        processes.adopt_orphans()
        with self._record_failures("SupervisorFailed"):
            # 1. Start the HTTP server, within a second of the pod's start.
            self._server = self._start_server()
            # 2. Read the run configuration, and remove the files that an earlier container of this pod left behind.
            run, config_sha256 = self._read_run_config()
            self._clean_work_folder()
            # 3. Start to receive messages of ranks.
            self._channel = self._open_channel(run)
            # 4. Check storage, download and check the inputs, and restore the checkpoint in a thread, while the ranks import their libraries.
            threading.Thread(target=self._prepare_pod, args=(run, config_sha256), name="prepare", daemon=True).start()
            # 5. Start the ranks and watch them until they end or the attempt must end. A job without training has no ranks.
            if run.spec.phases.train is False:
                self._wait_for_preparation()
            else:
                self._watch_agent(run, start_agent(run, self._settings, self._channel.address, self._connect_gang(run)))
        # 6. Kill all child processes that still run, and handle the messages that they sent before.
        processes.kill_all_descendants()
        if self._channel is not None:
            self._channel.close()
        # 7. Finish the uploads, within the time limit.
        self._finish_uploads()
        # 8. Run the stages after training.
        self._run_later_stages()
        # 9. Decide the exit code, write the run's report, and report the end to the operator.
        exit_decision = self._decide_exit()
        self._finish_tracking(exit_decision)
        self._write_report(exit_decision)
        self._store_result(exit_decision)
        self._report_end(exit_decision)
        return exit_decision.exit_code

    # ---- 1 to 3: start ----

    def _handle_signals(self, stop_requests: Sequence[float]) -> None:
        signal.signal(signal.SIGTERM, self._request_stop)
        signal.signal(signal.SIGINT, self._request_stop)
        if stop_requests:
            self._facts.stop_requested_at = stop_requests[0]

    def _request_stop(self, signal_number: int, _frame: Any) -> None:
        """Handle SIGTERM and Ctrl-C, which request a checkpoint and the end of the pod. A second Ctrl-C ends the pod without a checkpoint."""
        if self._facts.stop_requested_at is None:
            self._facts.stop_requested_at = time.monotonic()
            self._facts.is_ended_by_user = signal_number == signal.SIGINT
        elif signal_number == signal.SIGINT:
            self._facts.is_deadline_passed = True

    def _start_server(self) -> Server:
        """Start the HTTP server of the pod. Errors: InternalError `PortInUse`."""
        try:
            server = Server(self._state, self._settings.port, attempt_secret=self._settings.attempt_secret)
        except OSError as error:
            raise InternalError(
                "PortInUse", f"port {self._settings.port} cannot be opened: {error.strerror}",
                hint=f"if another program uses the port, give --port or set {Env.PORT} (0 chooses a free port)",
            ) from error  # fmt: skip
        log.info("listening on port %d", server.port)
        return server

    def _read_run_config(self) -> tuple[RunConfig, str]:
        self._run, config_sha256 = load_run(self._settings)
        self._state.set_run_config(self._run, config_sha256)
        return self._run, config_sha256

    def _clean_work_folder(self) -> None:
        work_folder = self._settings.work_folder
        work_folder.mkdir(parents=True, exist_ok=True)
        for name in (FILE_NAME, STOP_FILE, RESULT_FILE):
            (work_folder / name).unlink(missing_ok=True)
        # In a local run, an earlier attempt may have left files. A model folder must not contain files of another model.
        for name in ("output", "staged", "stages", "fetched", MODEL_FOLDER, "merged-model"):
            shutil.rmtree(work_folder / name, ignore_errors=True)
        for name in ("output", "staged"):
            (work_folder / name).mkdir()

    def _open_channel(self, run: RunConfig) -> RankChannel:
        incarnation = self._settings.incarnation(run)
        self._staging = Staging(self._settings.work_folder, self._state, rank_count=run.world.processes_per_node)
        self._tracking = RunTracking(run, self._settings, self._state)
        self._metric_log = MetricLog(self._state, incarnation, on_line=self._tracking.record_log_line)
        messages = RankMessages(self._state, self._facts, self._staging, self._metric_log, incarnation)

        def handle_message(message: dict[str, Any]) -> None:
            try:
                messages.handle(message)
            except FineTuneError as error:
                self._end_with_error(error)

        return RankChannel(handle_message)

    def _connect_gang(self, run: RunConfig) -> StoreAddress | None:
        """Protect the rendezvous of several pods with the secret of the attempt. Return None if the job has one pod, or if the operator gave no secret."""
        attempt_secret = self._settings.attempt_secret
        if run.world.nodes == 1 or attempt_secret is None:
            return None
        self._gang_relay, store_address = connect_gang(run.world, self._settings.node_rank, attempt_secret)
        return store_address

    # ---- 4: prepare (in its own thread) ----

    def _prepare_pod(self, run: RunConfig, config_sha256: str) -> None:
        with self._record_failures("PreparationFailed"):
            preparation = Preparation(run, config_sha256, self._settings, self._state, self._digests)
            preparation.check_hub_token()
            preparation.preflight()
            tree = self._tree = CheckpointTree(open_store(run.storage), self._settings.checkpoint_key)
            self._results = RunResults(run, tree, self._settings.work_folder / "output")
            self._lineage = Lineage(run, tree, self._state, self._digests)
            self._recorder = AttemptRecorder(
                run, tree, incarnation=self._settings.incarnation(run), config_sha256=config_sha256, started_at=self._started_at
            )
            self._report_writer = ReportWriter(run, tree, self._results, self._recorder, config_sha256=config_sha256)
            if run.spec.phases.train is False:
                self._prepare_existing_model(run, preparation, tree)
                return
            self._facts.output = find_committed_output(tree)
            if self._facts.output is not None:
                self._start_tracking(parse_log(tree.store.get(join_key(Storage.METRICS, ResultFile.LOG))))
                self._must_end.set()
                return
            inputs, facts = preparation.fetch(uses_stored_rows=True)
            preparation.claim_storage(tree)
            if self._settings.node_rank == 0:
                store_quietly(self._state, RESULT_FILES, self._results.record_start)
            restore_result = preparation.restore(tree, facts)
            self._facts.start_step = restore_result.step
            earlier_entries = read_checkpoint_log(restore_result)
            if restore_result.manifest is not None:
                self._state.set_expected_step_seconds(estimate_step_seconds(earlier_entries, restore_result.manifest.facts, facts))
            self._start_tracking(earlier_entries, facts)
            self._record_start(preparation.data_summary)
            self._start_uploader(run, tree, facts, restore_result)
            self._state.enter_stage(Stage.LOADING)
            add_restored_checkpoint(inputs, restore_result).write(self._settings.work_folder)  # The ranks wait for this file.

    def _prepare_existing_model(self, run: RunConfig, preparation: Preparation, tree: CheckpointTree) -> None:
        """Prepare the stages of a job that does not train. Rank 0's pod runs the stages; the other pods need only the address of the model."""
        if self._settings.node_rank > 0:
            self._facts.output = find_existing_model(run.spec.phases.from_ or "", tree).output
        else:
            inputs, existing_model = preparation.fetch_existing_model(tree, self._settings.work_folder / MODEL_FOLDER)
            preparation.claim_storage(tree)
            assert self._results is not None
            store_quietly(self._state, RESULT_FILES, self._results.record_start)
            record_existing_model(existing_model, tree, run.attempt)
            inputs.write(self._settings.work_folder)
            self._existing_model, self._facts.output = existing_model, existing_model.output
            self._start_tracking([])
        self._must_end.set()

    def _start_tracking(self, past_entries: list[LogEntry], facts: RunFacts | None = None) -> None:
        """Start to send the events of the run to trackers. `facts`: the facts of the run; None if this attempt does not train."""
        assert self._tracking is not None and self._results is not None
        self._tracking.start(self._results.read_start_time(), past_entries, resumed_from_step=self._facts.start_step if facts else None)
        if facts is not None:
            self._tracking.record_training(facts)

    def _record_start(self, data_summary: DataSummary | None) -> None:
        """Record the start of training for the report and the lineage statement now, because a killed pod cannot record it at its end."""
        recorder, writer = self._recorder, self._report_writer
        if recorder is None or writer is None or self._settings.node_rank > 0:
            return
        store_quietly(self._state, ATTEMPT_RECORDS, lambda: recorder.record_start(self._facts.start_step, self._state.report().resolved))
        if data_summary is not None:
            store_quietly(self._state, ATTEMPT_RECORDS, lambda: writer.record_data(data_summary))

    def _start_uploader(self, run: RunConfig, tree: CheckpointTree, facts: RunFacts, restore_result: RestoreResult) -> None:
        checkpoint_spec = run.spec.checkpoint
        keep_count = 3 if checkpoint_spec.keep is None else checkpoint_spec.keep
        uploader = Uploader(
            tree, self._state, facts, KeepPolicy(keep_count, tuple(checkpoint_spec.pinned or ())), job_id=f"{run.namespace}/{run.name}/{run.uid}",
            attempt=run.attempt, node_rank=self._settings.node_rank, node_count=run.world.nodes, before_commit=self._store_logs_and_records,
            after_commit=self._warn_if_grace_period_is_too_short, final_upload_timeout_seconds=self._settings.final_upload_timeout_seconds,
        )  # fmt: skip
        if self._settings.node_rank == 0:
            uploader.adopt_committed(to_status_checkpoints(tree, restore_result.ancestor_checkpoints))
            # If a final model is committed at this point, its manifest is not readable, because `_prepare_pod` does not train if the model can be read.
            unreadable_model = tree.get_committed(None)
            uploader.add_skipped([*restore_result.skipped_checkpoints, *([unreadable_model] if unreadable_model else [])])
        self._uploader = uploader
        assert self._staging is not None
        self._staging.uploader = uploader

    def _store_logs_and_records(self) -> None:
        """Store all log lines so far, the files that rank 0 has written, and the configuration in the record of the attempt.

        This is called before each commit, because an attempt that resumes from the checkpoint does not log these lines again.
        """
        if self._settings.node_rank > 0:
            return
        if self._tree is not None and self._metric_log is not None:
            self._metric_log.upload(self._tree.store)
        if self._results is not None:
            store_quietly(self._state, RESULT_FILES, self._results.store_rank_files)
        if (recorder := self._recorder) is not None:  # The ranks have reported their device before the first commit.
            store_quietly(self._state, ATTEMPT_RECORDS, lambda: recorder.record_configuration(self._state.report().resolved))

    def _warn_if_grace_period_is_too_short(self) -> None:
        grace_seconds, save_seconds = self._run.grace_seconds if self._run else 0, self._state.last_save_seconds
        if save_seconds is not None and save_seconds > grace_seconds:
            self._state.add_note(
                f"a checkpoint takes {save_seconds:.0f} s to commit. This is longer than the grace period of {grace_seconds} s, so a stop would lose "
                "the newest steps; raise policy.terminationGracePeriodSeconds"
            )

    # ---- 5: watch ----

    def _watch_agent(self, run: RunConfig, agent: processes.ChildProcess) -> None:
        """Wait until the agent has ended, or until the attempt must end although the agent still runs."""
        server_spec = generation_server(run.spec)
        stall_watch = StallWatch(
            self._state, run.spec.policy.stall_timeout_seconds, pod_count=run.world.nodes,
            longest_wait_seconds=value_or_default(server_spec, "start_timeout_seconds") if server_spec is not None else 0.0,
        )  # fmt: skip
        stop_was_handled = False
        while (agent_exit_code := agent.poll()) is None:
            if self._must_end.wait(POLL_SECONDS):
                return
            if (failure := self._find_upload_failure(run)) is not None:
                self._end_with_error(failure)
                return
            if self._facts.stop_requested_at is not None and not stop_was_handled:
                stop_was_handled = True
                if not self._can_save_steps(run):
                    return
                self._ask_ranks_to_stop(run)
            if self._facts.is_deadline_passed or self._is_past_deadline():
                self._facts.is_deadline_passed = True
                return
            if (stall_error := stall_watch.stall_error()) is not None:
                dump_rank_stacks(processes.descendants())
                self._end_with_error(stall_error)
                return
        self._facts.agent_exit_code = agent_exit_code

    def _wait_for_preparation(self) -> None:
        """Wait until the model of `phases.from` is on the pod's disk, or until the attempt must end without it."""
        while self._facts.stop_requested_at is None and not self._must_end.wait(POLL_SECONDS):
            pass

    def _find_upload_failure(self, run: RunConfig) -> FineTuneError | None:
        """Return an error if the uploader has stopped uploading, or if no checkpoint was committed for too long. Otherwise return None."""
        if self._uploader is None:
            return None
        return self._uploader.failure or self._uploader.unsaved_error(
            self._settings.unsaved_timeout_seconds, run.spec.policy.stall_timeout_seconds
        )

    def _end_with_error(self, error: FineTuneError) -> None:
        """End the attempt with an error. If the attempt already has an error, the first error is kept."""
        with self._failure_lock:
            if self._facts.supervisor_error is None:
                self._facts.supervisor_error = error
        self._must_end.set()

    @contextlib.contextmanager
    def _record_failures(self, code: str) -> Iterator[None]:
        """If the code within the context raises an exception, end the attempt with this exception. `code`: the error code if the exception has no code."""
        try:
            yield
        except Exception as error:
            self._end_with_error(as_failure(error, code))

    def _compute_stop_deadline(self) -> float | None:
        """Return the monotonic time by which a stopped pod must end, or None if no stop was requested."""
        if self._facts.stop_requested_at is None or self._run is None:
            return None
        return stop_deadline(self._facts.stop_requested_at, self._run.grace_seconds)

    def _is_past_deadline(self) -> bool:
        return time.monotonic() > self._compute_time_after_grace_share(1.0)

    def _compute_time_after_grace_share(self, share: float) -> float:
        """Return the monotonic time at which `share` of the time from the stop request to the deadline has passed; infinite if no stop was requested."""
        stop_requested_at, deadline = self._facts.stop_requested_at, self._compute_stop_deadline()
        return math.inf if stop_requested_at is None or deadline is None else stop_requested_at + share * (deadline - stop_requested_at)

    def _can_save_steps(self, run: RunConfig) -> bool:
        """Whether this pod has unsaved steps and enough time to save them."""
        is_training = self._state.current_stage is Stage.TRAINING
        if self._state.step <= self._facts.start_step and not self._facts.is_output_written and not is_training:
            return False
        save_seconds = self._state.last_save_seconds
        if save_seconds is not None and save_seconds > run.grace_seconds:
            self._facts.is_deadline_passed = True
            return False
        return True

    def _ask_ranks_to_stop(self, run: RunConfig) -> None:
        self._state.enter_stage(Stage.STOPPING)
        with replace_file(self._settings.work_folder / STOP_FILE) as partial_file:
            partial_file.write_text(str(time.time() + run.grace_seconds))

    # ---- 7: finish uploads ----

    def _finish_uploads(self) -> None:
        """Wait for the uploads within the time limit, then remove old checkpoints and leftovers."""
        uploader = self._uploader
        if uploader is None:
            return
        if self._facts.stop_requested_at is None and not self._facts.is_output_written:
            uploader.limit_part_wait(PARTS_AFTER_FAILURE_SECONDS)
        if not self._wait_for_uploads(uploader) and self._facts.stop_requested_at is not None:
            self._facts.is_deadline_passed = True
        uploader.close()
        if uploader.failure is not None:
            self._end_with_error(uploader.failure)
        if uploader.output is not None:
            self._facts.output = uploader.output
            if self._tracking is not None:
                self._tracking.record_model(uploader.output)
            self._run_optional_task(lambda: uploader.apply_retention(is_run_finished=True))
            self._run_optional_task(self._sweep_unless_superseded)
        self._run_optional_task(self._store_logs_and_records)

    def _wait_for_uploads(self, uploader: Uploader) -> bool:
        """Wait for the uploads; after a stop request, wait at most until the deadline. Returns whether all uploads ended in time."""
        max_seconds = FINAL_UPLOAD_SECONDS if self._facts.is_output_written else UPLOAD_AFTER_FAILURE_SECONDS
        latest_end_time = math.inf if self._facts.stop_requested_at is not None else time.monotonic() + max_seconds
        while not self._facts.is_deadline_passed:
            seconds_left = min(latest_end_time, self._compute_time_after_grace_share(1.0)) - time.monotonic()
            if uploader.wait_until_idle(max(0.0, min(seconds_left, UPLOAD_POLL_SECONDS))):
                return True
            if seconds_left <= 0:
                return False
        return uploader.wait_until_idle(0)

    def _run_optional_task(self, task: Callable[[], None]) -> None:
        """Run an optional task in a thread. The wait for the task ends early enough to write the termination message."""
        started_at = time.monotonic()
        thread = threading.Thread(target=task, name="optional-task", daemon=True)
        thread.start()
        thread.join(MIN_OPTIONAL_TASK_SECONDS)
        while thread.is_alive() and time.monotonic() < self._compute_optional_task_deadline(started_at):
            thread.join(POLL_SECONDS)

    def _compute_optional_task_deadline(self, started_at: float) -> float:
        """Return the monotonic time at which the wait for an optional task ends. A stop request while the task runs makes this time earlier."""
        stop_requested_at = self._facts.stop_requested_at
        if stop_requested_at is None:
            return started_at + OPTIONAL_TASK_SECONDS
        return min(max(started_at, stop_requested_at) + OPTIONAL_TASK_AFTER_STOP_SECONDS, self._compute_time_after_grace_share(1.0))

    def _sweep_unless_superseded(self) -> None:
        """Remove dropped and failed uploads, unless a later attempt has begun. The operator starts a later attempt if it cannot reach this pod."""
        if self._tree is not None and self._run is not None and not self._tree.is_superseded(self._run.attempt):
            sweep_leftovers(self._tree, self._state)

    # ---- 8: stages after training ----

    def _run_later_stages(self) -> None:
        """In rank 0's pod, run the stages that follow the commit of the model."""
        run, tree, results, output = self._run, self._tree, self._results, self._facts.output
        if run is None or tree is None or results is None or output is None or self._settings.node_rank > 0:
            return
        self._run_optional_task(self._write_lineage)
        output = output.model_copy(update={"lineage_uri": self._lineage_uri})
        self._state.set_output(output)
        started_at = time.time()
        later_stages = LaterStages(
            run, self._settings, tree, self._state, results=results, fetch_inputs=lambda: self._fetch_for_stages(run),
            is_stop_requested=lambda: self._facts.stop_requested_at is not None,
            is_save_deadline_passed=lambda: time.monotonic() > self._compute_time_after_grace_share(SAVE_GRACE_SHARE), existing_model=self._existing_model,
        )  # fmt: skip
        try:
            self._facts.stage_report = later_stages.run(output)
        except Exception as error:
            self._facts.stage_report = StageReport(failure=StageFailure(self._state.current_stage, as_failure(error, "StageFailed")))
        # If large files must be hashed, a thread writes the lineage statement while the stages run.
        self._facts.output = (self._facts.stage_report.output or output).model_copy(update={"lineage_uri": self._lineage_uri})
        if self._tracking is not None:
            self._tracking.record_evaluation(self._state.report().evaluation, started_at)
        self._run_optional_task(lambda: store_quietly(self._state, RESULT_FILES, results.store_metric_files))

    def _write_lineage(self) -> None:
        """Write the lineage statement. A failure only adds a note, because the model is already committed."""
        assert self._lineage is not None
        try:
            self._lineage_uri = self._lineage.write_statement(Inputs.read(self._settings.work_folder))
        except Exception as error:
            log.warning("the lineage statement was not written", exc_info=error)
            code = error.code if isinstance(error, FineTuneError) else type(error).__name__
            self._state.add_note(f"the lineage statement was not written: {code}")

    def _fetch_for_stages(self, run: RunConfig) -> Inputs:
        """Download the inputs for the stages. This is called in a pod that has not trained, because an earlier attempt has already committed the model."""
        assert self._tree is not None
        preparation = Preparation(run, self._state.config_sha256, self._settings, self._state, self._digests)
        preparation.claim_storage(self._tree)
        return preparation.fetch()[0]

    # ---- 9: end ----

    def _decide_exit(self) -> ExitDecision:
        is_saved = is_state_saved(
            self._facts, step=self._state.step, node_rank=self._settings.node_rank,
            committed_step=self._uploader.committed_step if self._uploader else 0,
            uploaded_step=self._uploader.uploaded_step if self._uploader else 0,
        )  # fmt: skip
        return decide_exit(
            self._facts, read_exit_code_failures(self._settings.work_folder), is_saved=is_saved, node_rank=self._settings.node_rank
        )

    def _finish_tracking(self, exit_decision: ExitDecision) -> None:
        """Send the end of the attempt to the trackers, and wait within a time limit. A stop request during the wait shortens the limit."""
        if self._tracking is not None:
            self._tracking.finish(
                exit_decision, is_ended_by_user=self._facts.is_ended_by_user, get_latest_end=lambda: self._compute_time_after_grace_share(TRACKING_GRACE_SHARE)
            )

    def _write_report(self, exit_decision: ExitDecision) -> None:
        """Write the report within the time limit. A failure only adds a note, because the run is complete without a report.

        If storage has failed, the report is not written, because it could not be stored.
        """
        writer, message = self._report_writer, self._build_termination_message(exit_decision)
        if writer is None or self._settings.node_rank > 0 or message.class_ is FailureClass.STORAGE:
            return
        output = self._facts.output
        if output is not None:
            self._state.enter_stage(Stage.REPORTING)
        uris: list[str | None] = []

        def write() -> None:
            try:
                uris.append(writer.write(message, self._state.report()))
            except Exception as error:
                self._state.add_note(f"the run's report was not written: {as_failure(error, Reason.REPORT_FAILED).code}")

        self._run_optional_task(write)
        if output is not None and uris and uris[0] is not None:
            self._facts.output = output.model_copy(update={"report_uri": uris[0]})
            self._state.set_output(self._facts.output)

    def _store_result(self, exit_decision: ExitDecision) -> None:
        """Store the result of a successful run, so that a later job of the same name can adopt it. A failure only adds a note."""
        run, tree, output = self._run, self._tree, self._facts.output
        if exit_decision.exit_code != ExitCode.OK or run is None or tree is None or output is None:
            return
        if self._settings.node_rank == 0 and run.spec.phases.train is not False:
            self._run_optional_task(lambda: store_quietly(self._state, RESULT_RECORDS, lambda: store_result(run, tree, output, self._state.report())))

    def _build_termination_message(self, exit_decision: ExitDecision) -> TerminationMessage:
        return build_termination_message(
            exit_decision, self._state.report(), output=self._facts.output, start_step=self._facts.start_step,
            node_name=self._settings.node_name,
        )  # fmt: skip

    def _report_end(self, exit_decision: ExitDecision) -> None:
        message = self._build_termination_message(exit_decision)
        self._state.enter_stage(Stage.DONE if exit_decision.exit_code == ExitCode.OK else Stage.FAILED, message.message)
        write_termination_message(message, self._settings.termination_log)
        for closable in (self._gang_relay, self._server):
            if closable is not None:
                closable.close()


def find_committed_output(tree: CheckpointTree) -> Output | None:
    """Return the final artefact if an earlier incarnation committed it and ended before it could report the commit. Otherwise return None."""
    committed_model = tree.get_committed(None)
    manifest = tree.read_manifest(committed_model) if committed_model else None
    if committed_model is None or manifest is None:
        return None
    log.info("the final artefact was committed by %s", committed_model.marker.path)
    return Output(
        uri=tree.uri(committed_model.folder), sha256=committed_model.marker.manifest_sha256, kind=manifest.kind,
        evaluation=manifest.extra.get("evaluation"),
    )  # fmt: skip


def read_exit_code_failures(work_folder: Path) -> list[RankFailure]:
    """Read the exit codes of this pod's ranks, and return the failures that these codes show."""
    had_oom_kill = processes.has_oom_kill()
    exit_code_by_rank = read_exit_codes(work_folder) or {}
    return [failure_from_exit_code(rank, code, is_host_out_of_memory=had_oom_kill) for rank, code in exit_code_by_rank.items()]


def supervise(settings: Settings, stop_requests: Sequence[float] = ()) -> int:
    """Run one pod; returns its exit code. `stop_requests`: monotonic times of earlier stop signals."""
    return Supervisor(settings).run(stop_requests)
