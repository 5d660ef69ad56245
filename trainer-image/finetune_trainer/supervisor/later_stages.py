"""Runs the stages after training, one process at a time, and stores their files and records.

The model is committed before the first stage. A stage that has a record in storage is not repeated, so the attempt after a stop begins with the first
unfinished stage. The files of a stage are uploaded before the record of the stage.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.errors import (
    FineTuneError,
    GateFailedError,
    InternalError,
    NoCheckpointError,
    StorageError,
    VerificationFailedError,
)
from finetune_api.names import Storage
from finetune_api.pod import RunConfig
from finetune_api.rules import exports_oci, pushes_to_hub
from finetune_api.spec.enums import OutputKind
from finetune_api.status import GateResult, Output, Stage, Verification, VerificationOutcome
from pydantic import ValidationError

from finetune_trainer.checkpoint.address import download_committed
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.failure import classify_error
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings
from finetune_trainer.stages.files import (
    MEASUREMENTS_FILE,
    OUTPUT_FOLDER,
    PARTS_FOLDER,
    RESULT_FILE,
    TASK_FILE,
    StageRecord,
    StageResult,
    StageTask,
    StoredFile,
)
from finetune_trainer.stages.plan import list_planned_stages
from finetune_trainer.storage.base import join_key
from finetune_trainer.supervisor.child_run import run_child
from finetune_trainer.supervisor.existing_model import ExistingModel
from finetune_trainer.supervisor.exit_decision import StageFailure, StageReport
from finetune_trainer.supervisor.hub import push_to_hub
from finetune_trainer.supervisor.interruptible import StoppedError, run_until
from finetune_trainer.supervisor.merged_model import commit_merged_model, fetch_merged_model, find_merged_model_uri
from finetune_trainer.supervisor.oci_artefact import store_oci_artefact
from finetune_trainer.supervisor.rank_messages import apply_report
from finetune_trainer.supervisor.reference_values import copy_reference_values
from finetune_trainer.supervisor.run_results import RunResults
from finetune_trainer.supervisor.run_state import RunState, store_quietly
from finetune_trainer.supervisor.stall import StallWatch, dump_rank_stacks

log = logging.getLogger(__name__)
T = TypeVar("T")
PARTS_RETRY_SECONDS = 30.0
"""Pause before parts of a stage are stored again after storage has failed."""
MODEL_FOLDER = "final-model"
"""Folder on the pod's disk to which a pod that has not trained downloads the model."""
RECORDS_FOLDER = f"{Storage.RUN}/stages"
STORAGE_FOLDER_BY_STAGE = {
    Stage.EVALUATING: Storage.EVALUATION, Stage.COMPARING: Storage.EVALUATION, Stage.VERIFYING: Storage.SERVING,
    Stage.BENCHMARKING: Storage.EVALUATION,
}  # fmt: skip
"""The folder in storage for the files of each stage. Other stages have no files."""
PUBLISHING_STAGES = (Stage.UPLOADING,)
"""Stages that run only if the model has passed all gates.

All other stages run before the gates take effect, so that all results exist even if a gate fails. A model is promoted only if all other stages
have succeeded.
"""


class LaterStages:
    """Runs the stages after training. Only rank 0's pod runs them."""

    def __init__(
        self, run: RunConfig, settings: Settings, tree: CheckpointTree, run_state: RunState, *,
        results: RunResults, fetch_inputs: Callable[[], Inputs], is_stop_requested: Callable[[], bool], is_save_deadline_passed: Callable[[], bool],
        existing_model: ExistingModel | None = None,
    ) -> None:  # fmt: skip
        """`results` copies files to `output.dir`. `fetch_inputs` downloads the inputs if this pod has not trained.

        `existing_model`: the model of `phases.from`; None if the job trains.
        `is_stop_requested`: whether the pod must end. `is_save_deadline_passed`: whether, after a stop request, too little time is left to store the
        result of a finished stage.
        """
        self._run, self._settings, self._tree, self._state = run, settings, tree, run_state
        self._results, self._fetch_inputs, self._is_stop_requested = results, fetch_inputs, is_stop_requested
        self._is_save_deadline_passed, self._existing_model = is_save_deadline_passed, existing_model
        self._stages_folder = settings.work_folder / "stages"
        self._parts_folder, self._parts_key = self._stages_folder, ""
        self._stored_parts: set[str] = set()
        """Names of the parts of the current stage that are already in storage. A part is a file with the result of a finished task."""
        self._next_parts_time = 0.0
        """Monotonic time from which parts may be stored again after storage has failed."""
        self._record_by_stage: dict[Stage, StageRecord] = {}

    def run(self, output: Output) -> StageReport:
        """Run all unfinished stages in order, promote the model or report the failed gate, and publish the model.

        After a failure or a stop request, no further stage runs.
        """
        stages = list_planned_stages(self._run)
        report = StageReport(open_stages=stages, output=output)
        try:
            self._record_by_stage = self._run_until_stop(lambda: self._read_records(stages, output))
        except StoppedError:
            return report
        report.open_stages = [stage for stage in stages if stage not in self._record_by_stage]
        for is_publishing in (False, True):
            if is_publishing and not self._finish_gates(report, output):
                return report
            for stage in stages:
                if (stage in PUBLISHING_STAGES) is is_publishing and not self._finish_stage(stage, report, output):
                    return report
        return report

    def _finish_stage(self, stage: Stage, report: StageReport, output: Output) -> bool:
        """Run the stage unless it has a record, and add its result to the report. Returns whether the next stage may run."""
        record = self._record_by_stage.get(stage)
        if record is None and self._is_stop_requested():
            return False
        try:
            if record is None:
                record = self._record_by_stage[stage] = self._run_stage(stage, report.output or output)
                report.open_stages.remove(stage)
        except StoppedError:
            return False
        except Exception as error:
            if not isinstance(error, FineTuneError):
                log.exception("the stage %s failed", stage)
            return self._fail_stage(stage, classify_error(error)[0], report)
        report.output = self._apply_result(record.result, report.output or output)
        verification = record.result.verification
        if verification is not None and verification.result is VerificationOutcome.FAILED:
            return self._fail_stage(stage, build_verification_error(verification, report.output), report)
        return True

    def _fail_stage(self, stage: Stage, error: FineTuneError, report: StageReport) -> bool:
        """Report the failure of a stage. Returns whether the next stage may run.

        If a gate has failed, the job fails for this reason, so the failure of another stage only adds a note. But if a later attempt has begun, this
        attempt ends at once, because the later attempt runs the same stages and writes the same objects.
        """
        if isinstance(error, FencedOutError) or not self._find_failed_gates():
            report.failure = StageFailure(stage, error)
            return False
        self._state.add_note(f"the stage {stage} failed: {error.code}: {error.message}")
        if stage in report.open_stages:
            report.open_stages.remove(stage)
        return True

    # ---- gates ----

    def _find_gate_stage(self) -> Stage | None:
        """Return the stage whose record contains the results of the gates, or None if there are no gates."""
        stages = (stage for stage, record in self._record_by_stage.items() if record.result.evaluation and record.result.evaluation.gates)
        return next(stages, None)

    def _find_failed_gates(self) -> list[GateResult]:
        gate_stage = self._find_gate_stage()
        evaluation = self._record_by_stage[gate_stage].result.evaluation if gate_stage is not None else None
        return [gate for gate in (evaluation.gates if evaluation else None) or [] if not gate.passed]

    def _finish_gates(self, report: StageReport, output: Output) -> bool:
        """Promote the model if it has passed all gates, otherwise report the failed gates. Returns whether the model may be published.

        The results of the gates are read from the stored records of the stages, so every attempt makes the same decision.
        """
        gate_stage, failed_gates = self._find_gate_stage(), self._find_failed_gates()
        if gate_stage is None:
            return True
        try:
            if not failed_gates:
                self._run_until_save_deadline(lambda: self._promote(output, self._record_by_stage[gate_stage]))
        except StoppedError:
            report.open_stages.append(gate_stage)  # The next attempt reads the record of this stage and promotes the model.
            return False
        except FineTuneError as error:
            report.failure = StageFailure(gate_stage, error)
            return False
        report.output = (report.output or output).model_copy(update={"promoted": not failed_gates})
        self._state.set_output(report.output)
        if failed_gates:
            report.open_stages.clear()
            report.failure = StageFailure(gate_stage, GateFailedError("GateFailed", "; ".join(gate.text or gate.metric for gate in failed_gates)))
        return not failed_gates

    def _promote(self, output: Output, record: StageRecord) -> None:
        """Write the marker `_PROMOTED` below this job's folder, even if the model is in another job's folder.

        Errors: FencedOutError; those of storage.
        """
        self._tree.require_newest_attempt(self._run.attempt)
        promotion = {
            "manifestSha256": output.sha256, "uri": output.uri, "attempt": self._run.attempt, "time": datetime.now(UTC).isoformat(),
            "gates": [gate.to_wire() for gate in (record.result.evaluation and record.result.evaluation.gates) or []],
        }  # fmt: skip
        self._tree.store.put(join_key(Storage.MODEL, Storage.PROMOTED), json.dumps(promotion, indent=1).encode())

    def _apply_result(self, result: StageResult, output: Output) -> Output:
        """Add the result of a stage to the pod's report. Returns a copy of `output` with the fields that the result sets."""
        if result.evaluation is not None:
            self._state.merge_evaluation(result.evaluation)
        field_names = ("merged_uri", "published_uri", "hub_uri", "oci_digest", "verification")
        added_fields = {name: value for name in field_names if (value := getattr(result, name)) is not None}
        if added_fields:
            output = output.model_copy(update=added_fields)
            self._state.set_output(output)
        return output

    def _run_stage(self, stage: Stage, output: Output) -> StageRecord:
        """Run one stage, store its files, and write its record. Errors: StoppedError; the failure of the stage."""
        self._state.enter_stage(stage)
        folder = self._stages_folder / stage.value
        result = self._run_until_stop(lambda: self._begin_stage(stage, output, folder))
        if result is not None:
            return self._run_until_save_deadline(lambda: self._write_record(stage, output, result, []))
        self._run_process(folder)
        if stage is Stage.MERGING:
            return self._run_until_stop(lambda: self._write_record(stage, output, self._commit_merged_model(output, folder / OUTPUT_FOLDER), []))
        return self._run_until_save_deadline(lambda: self._store_result(stage, output, folder))

    def _begin_stage(self, stage: Stage, output: Output, folder: Path) -> StageResult | None:
        """Prepare the process of a stage and return None. If the stage needs no process, complete it and return its result."""
        self._tree.require_newest_attempt(self._run.attempt)
        if stage is Stage.UPLOADING:
            return self._publish(output)
        if stage is Stage.MERGING and (uri := find_merged_model_uri(self._tree, output)) is not None:
            return StageResult(merged_uri=uri)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / OUTPUT_FOLDER).mkdir(parents=True)
        self._fetch_parts(stage, output, folder / PARTS_FOLDER)
        if Inputs.read(self._settings.work_folder) is None:
            self._fetch_inputs().write(self._settings.work_folder)
            self._state.enter_stage(stage)
        if stage is Stage.VERIFYING:  # The stage verifying must read the files in storage, not the files that the trainer left on the pod's disk.
            shutil.rmtree(self._find_trained_model_folder(), ignore_errors=True)
            shutil.rmtree(self._stages_folder / Stage.MERGING.value / OUTPUT_FOLDER, ignore_errors=True)
        task = StageTask(
            stage=stage, model=self._provide_model(output), kind=output.kind or OutputKind.MODEL, uri=output.uri or "",
            evaluated=self._fetch_evaluation() if stage is Stage.COMPARING else None,
            merged=self.provide_merged_model(output) if stage is Stage.VERIFYING else None, merged_uri=output.merged_uri,
            reference_problem=self._copy_reference_values(folder) if stage is Stage.VERIFYING else None,
        )  # fmt: skip
        (folder / TASK_FILE).write_text(task.model_dump_json(by_alias=True))
        return None

    def _store_result(self, stage: Stage, output: Output, folder: Path) -> StageRecord:
        """Store the files of a stage that has ended, and then the record of the stage.

        Errors: InternalError `NoStageResult`; FencedOutError; those of storage.
        """
        result = _read_result(folder)
        self._tree.require_newest_attempt(self._run.attempt)
        return self._write_record(stage, output, result, self._upload_files(stage, folder / OUTPUT_FOLDER))

    def _write_record(self, stage: Stage, output: Output, result: StageResult, files: list[StoredFile]) -> StageRecord:
        """Write the record of a stage that has ended. Errors: FencedOutError; those of storage."""
        self._tree.require_newest_attempt(self._run.attempt)
        record = StageRecord(
            stage=stage, model_sha256=output.sha256 or "", attempt=self._run.attempt, time=datetime.now(UTC).isoformat(), result=result, files=files
        )
        self._tree.store.put(_build_record_key(stage), json.dumps(record.to_wire(), indent=1).encode())
        return record

    def _find_trained_model_folder(self) -> Path:
        """Return the folder to which the trainer of this pod writes the final model."""
        return self._settings.work_folder / "output" / "final"

    def _provide_model(self, output: Output) -> Path:
        """Return the folder of the committed model on this pod's disk. A pod that has not trained downloads and verifies the model."""
        if self._find_trained_model_folder().exists():
            return self._find_trained_model_folder()
        target_folder = self._settings.work_folder / MODEL_FOLDER
        if target_folder.exists():
            return target_folder
        committed_model = self._tree.get_committed(None)
        partial_folder = target_folder.with_name(f"{target_folder.name}.part")
        shutil.rmtree(partial_folder, ignore_errors=True)
        problem = "the marker is missing" if committed_model is None else download_committed(self._tree, committed_model, partial_folder,
            byte_counter=self._raise_if_stopped)
        if problem is not None:
            raise NoCheckpointError("ModelDamaged", f"the committed model {output.uri} cannot be read: {problem}")
        partial_folder.rename(target_folder)
        return target_folder

    def _fetch_evaluation(self) -> Path:
        """Download and verify the measurements of the trained model. Returns the folder that holds them.

        Errors: StorageError `EvaluationDamaged`. In this case, the record of the stage `evaluating` is removed, so that the next attempt evaluates the
        model again.
        """
        record, folder = self._record_by_stage[Stage.EVALUATING], self._stages_folder / "evaluated"
        key = join_key(STORAGE_FOLDER_BY_STAGE[Stage.EVALUATING], MEASUREMENTS_FILE)
        sha256 = self._tree.store.download(key, folder / MEASUREMENTS_FILE, byte_counter=self._raise_if_stopped)
        if sha256 is None or sha256 not in [file.sha256 for file in record.files if file.key == key]:
            self._tree.store.delete([_build_record_key(Stage.EVALUATING)])
            raise StorageError("EvaluationDamaged", f"{self._tree.uri(key)} is missing or damaged", hint="the next attempt evaluates the model again")
        return folder

    def provide_merged_model(self, output: Output) -> Path | None:
        """Return the folder of the merged model on this pod's disk; None if the job merges no model. If another pod merged the model, this pod downloads it."""
        if output.merged_uri is None:
            return None
        local_merged_folder = self._stages_folder / Stage.MERGING.value / OUTPUT_FOLDER
        target_folder = self._settings.work_folder / "merged-model"
        return next((folder for folder in (local_merged_folder, target_folder) if folder.exists()), None) or fetch_merged_model(
            self._tree, target_folder, byte_counter=self._raise_if_stopped
        )

    def _commit_merged_model(self, output: Output, folder: Path) -> StageResult:
        """Upload and commit the merged model. A stop request ends the upload."""
        _read_result(folder.parent)

        def report_or_stop(uploaded_bytes: int, total_bytes: int) -> None:
            self._raise_if_stopped()
            self._state.enter_stage(Stage.MERGING, f"uploaded {uploaded_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB")

        uri = commit_merged_model(
            self._tree, output, folder, attempt=self._run.attempt, incarnation=self._settings.incarnation(self._run),
            before_each_file=report_or_stop, byte_counter=self._raise_if_stopped,
        )  # fmt: skip
        return StageResult(merged_uri=uri)

    def _publish(self, output: Output) -> StageResult:
        """Write the OCI artefact, copy model and results to `output.dir`, and push the model to the hub, if the spec requests these steps."""
        published_uri = hub_uri = oci_digest = None
        if exports_oci(self._run.spec):
            oci_digest = store_oci_artefact(self._tree, self._run.name, is_merged=output.merged_uri is not None)
        if self._run.publish is not None:
            result_folders = tuple(dict.fromkeys(STORAGE_FOLDER_BY_STAGE.values()))
            model_folder, merged_folder = self._provide_model(output), self.provide_merged_model(output)
            published_uri = self._results.publish(output, model_folder, result_folders, merged_folder, byte_counter=self._raise_if_stopped)
        if pushes_to_hub(self._run.spec):
            model_folder = self.provide_merged_model(output) or self._provide_model(output)
            self._state.enter_stage(Stage.UPLOADING, "pushing to the model hub")
            hub_uri = push_to_hub(self._run, model_folder, retry_seconds=self._settings.final_upload_timeout_seconds)
        return StageResult(published_uri=published_uri, hub_uri=hub_uri, oci_digest=oci_digest)

    def _copy_reference_values(self, folder: Path) -> str | None:
        """Copy the reference values of the model to the folder of a stage. Returns None, or the reason if no usable reference values exist."""
        if self._existing_model is not None:
            return copy_reference_values(self._existing_model.tree, self._existing_model.committed, folder)
        return copy_reference_values(self._tree, self._tree.get_committed(None), folder)

    # ---- the process of a stage ----

    def _run_process(self, folder: Path) -> None:
        """Run the process of a stage and wait for its end. Errors: the failure that the process reports; StoppedError."""
        self._state.record_heartbeat()  # Uploads and downloads before the process started must not count as time without a heartbeat.
        stall_watch = StallWatch(self._state, self._run.spec.policy.stall_timeout_seconds)
        child_result = run_child(
            ["stage", str(folder)], self._run, self._settings,
            handle_message=self._handle_message, watch_process=lambda pid: self._watch_process(pid, stall_watch),
        )  # fmt: skip
        if child_result.exit_code != 0:
            self._run_until_save_deadline(self._store_parts)
        if child_result.failure is not None:
            raise child_result.failure

    def _watch_process(self, pid: int, stall_watch: StallWatch) -> None:
        """Store new parts of the stage. Raise an error, which ends the process of the stage, if the process must stop or has stalled.

        Errors: StoppedError; PeerError `Stalled`.
        """
        if self._list_new_parts() and time.monotonic() >= self._next_parts_time:
            self._run_until_stop(self._store_parts)
            if self._list_new_parts():
                self._next_parts_time = time.monotonic() + PARTS_RETRY_SECONDS
        if self._is_stop_requested():
            raise StoppedError
        if (stall_error := stall_watch.stall_error()) is not None:
            dump_rank_stacks([pid])
            raise stall_error

    def _handle_message(self, message: dict[str, Any]) -> None:
        self._state.record_heartbeat()
        apply_report(self._state, message)

    # ---- stops ----

    def _run_until_stop(self, action: Callable[[], T]) -> T:
        """Run an action, but stop waiting for it at a stop request. The next attempt then repeats the action. Errors: StoppedError; those of the action."""
        return run_until(self._is_stop_requested, action)

    def _run_until_save_deadline(self, action: Callable[[], T]) -> T:
        """Run an action that stores the result of a finished stage. After a stop request, the action may use a part of the grace period.

        Errors: StoppedError; those of the action.
        """
        return run_until(self._is_save_deadline_passed, action)

    def _raise_if_stopped(self, _byte_count: int = 0) -> None:
        """Raise StoppedError after a stop request, to end the transfer that calls this function."""
        if self._is_stop_requested():
            raise StoppedError

    # ---- storage ----

    def _read_records(self, stages: list[Stage], output: Output) -> dict[Stage, StageRecord]:
        return {stage: record for stage in stages if (record := self._read_record(stage, output)) is not None}

    def _read_record(self, stage: Stage, output: Output) -> StageRecord | None:
        """Return the record of a stage if the record was made for this model, otherwise None."""
        data = self._tree.store.get(_build_record_key(stage))
        if data is None:
            return None
        try:
            record = StageRecord.model_validate_json(data)
        except ValidationError:
            log.warning("the record of the stage %s cannot be read: the stage is repeated", stage)
            return None
        return record if record.model_sha256 == output.sha256 else None

    def _upload_files(self, stage: Stage, folder: Path) -> list[StoredFile]:
        """Upload the files of a stage. These files replace the files of an earlier, unfinished run of the stage."""
        stored_files = []
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            key = join_key(STORAGE_FOLDER_BY_STAGE[stage], path.relative_to(folder).as_posix())
            self._tree.store.put_file(path, key)
            stored_files.append(StoredFile(key=key, size=path.stat().st_size, sha256=sha256_file(path)))
        return stored_files

    def _fetch_parts(self, stage: Stage, output: Output, folder: Path) -> None:
        """Download the finished parts of an earlier, unfinished run of the stage with the same model."""
        folder.mkdir()
        self._parts_folder, self._stored_parts = folder, set()
        self._parts_key = f"{RECORDS_FOLDER}/{stage.value}-parts/{(output.sha256 or '')[:16]}"
        for stat in self._tree.store.list(f"{self._parts_key}/"):
            name = stat.key.rpartition("/")[2]
            if (data := self._tree.store.get(stat.key)) is not None:
                (folder / name).write_bytes(data)
                self._stored_parts.add(name)

    def _list_new_parts(self) -> list[Path]:
        return [path for path in self._parts_folder.glob("*.json") if path.name not in self._stored_parts]

    def _store_parts(self) -> None:
        """Upload the new parts. A failure only adds a note, because the next attempt repeats the tasks whose parts were not stored.

        Errors: FencedOutError if a later attempt has begun.
        """
        try:
            self._tree.require_newest_attempt(self._run.attempt)
        except FencedOutError:
            raise
        except FineTuneError:
            log.warning("it could not be read from storage whether a later attempt has begun", exc_info=True)
        for path in self._list_new_parts():
            store_quietly(self._state, "results of finished tasks", partial(self._store_part, path))

    def _store_part(self, path: Path) -> None:
        self._tree.store.put_file(path, f"{self._parts_key}/{path.name}")
        self._stored_parts.add(path.name)


def build_verification_error(verification: Verification, output: Output) -> VerificationFailedError:
    """Return the error for a stored model that differs from the trained model. The error names the first artefact that differs."""
    failed_artefact = next(artefact for artefact in verification.artefacts if artefact.result is VerificationOutcome.FAILED)
    return VerificationFailedError(
        failed_artefact.code or "VerificationFailed", f"the stored {failed_artefact.artefact} differs from the trained model "
        f"or is damaged: {failed_artefact.reason}",
        hint=f"do not serve the files in {output.uri}; status.output.verification shows the difference",
    )


def _build_record_key(stage: Stage) -> str:
    return f"{RECORDS_FOLDER}/{stage.value}.json"


def _read_result(folder: Path) -> StageResult:
    """Read the result of a stage. Errors: InternalError `NoStageResult` if the process ended without a result."""
    try:
        return StageResult.model_validate_json((folder / RESULT_FILE).read_text())
    except (OSError, ValidationError) as error:
        raise InternalError("NoStageResult", f"the stage ended without a result: {type(error).__name__}") from error
