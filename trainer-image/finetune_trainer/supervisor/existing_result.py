"""Stores the result of a successful run, and finds the result of an earlier job of the same name, for `policy.onExistingResult`.

A job's folder in storage ends with its uid: `<storage.uri>/<namespace>/<name>/<uid>`. The folders of earlier jobs of the same name are next to this
folder. This module only reads the folders of earlier jobs. `finetune_api.existing_result` compares the results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.existing_result import (
    RunResult,
    collect_result_settings,
    compute_result_digest,
    list_result_differences,
)
from finetune_api.names import RESULT_KEY
from finetune_api.pod import ProgressReport, RunConfig
from finetune_api.sources import redact_source
from finetune_api.spec.enums import OnExistingResult
from finetune_api.status import Output
from pydantic import ValidationError

from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.run_state import RunState

log = logging.getLogger(__name__)
REFERENCE_MODEL = "reference model"
"""Key of the reference model in `RunFacts.other_inputs`. The digest of the reference model cannot be computed without its weights, so the version of
the model is compared instead."""
MAX_SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class EarlierRun:
    """A final model that an earlier job of the same name has committed.

    `result` is None if the run did not succeed, or if its trainer did not store a result.
    """

    job_uid: str
    uri: str
    result: RunResult | None


def store_result(run: RunConfig, tree: CheckpointTree, output: Output, report: ProgressReport) -> None:
    """Store the result of a successful run, unless a later attempt has begun. Errors: those of storage."""
    committed_model = tree.get_committed(None)
    manifest = tree.read_manifest(committed_model) if committed_model is not None else None
    if manifest is None or tree.is_superseded(run.attempt):
        return
    settings, inputs = collect_result_settings(run.spec, run.defaults, run.before_adaptation), collect_compared_inputs(manifest.facts)
    result = RunResult(
        digest=compute_result_digest(settings, inputs), settings=settings, inputs=inputs, finished_at=datetime.now(UTC), output=output,
        evaluation=report.evaluation, metrics=report.metrics, progress=report.progress,
        resolved=report.resolved.model_copy(update={"notes": None, "config_sha256": None}),
    )  # fmt: skip
    tree.store.put(RESULT_KEY, result.model_dump_json(by_alias=True, exclude_none=True).encode())


def collect_compared_inputs(facts: RunFacts) -> dict[str, str]:
    """Return the digest or version of each input. A pod can compute all these values before it downloads any weights."""
    other_inputs = {name: digest for name, digest in facts.other_inputs.items() if name != REFERENCE_MODEL}
    return {"training data": facts.dataset_digest, **other_inputs, **facts.source_versions}


def find_result_to_adopt(run: RunConfig, facts: RunFacts, state: RunState) -> RunResult | None:
    """Return the result of an earlier job with the same spec and inputs, or None if this job must train.

    Errors: ConfigError `ExistingResultFound` with `policy.onExistingResult: fail`. Storage errors if the user set this field to
    `adopt` or `fail`. If the user did not set the field, a storage error only adds a note, because some stores do not permit a job to list the folder
    above the job's own folder.
    """
    mode = run.spec.policy.on_existing_result
    if mode is OnExistingResult.TRAIN:
        return None
    try:
        earlier_runs, errors_by_uid = list_earlier_runs(run)
    except FineTuneError as error:
        if mode is not None:
            raise
        state.add_note(f"policy.onExistingResult: the results of earlier jobs could not be read, so the job trains: {error.code}")
        return None
    for uid, error in errors_by_uid.items():
        state.add_note(f"policy.onExistingResult: the result of the job with uid {uid} could not be read, so it is not compared: {error.code}")
    if not earlier_runs:
        return None
    settings, inputs = collect_result_settings(run.spec, run.defaults, run.before_adaptation), collect_compared_inputs(facts)
    if mode is OnExistingResult.FAIL:
        raise _build_result_found_error(run, earlier_runs[0], settings, inputs)
    digest = compute_result_digest(settings, inputs)
    for earlier_run in earlier_runs:
        if earlier_run.result is not None and earlier_run.result.digest == digest:
            log.info("the result of the job with uid %s is adopted: %s", earlier_run.job_uid, earlier_run.uri)
            return earlier_run.result.model_copy(update={"output": earlier_run.result.output.model_copy(update={"adopted_uid": earlier_run.job_uid})})
    difference = _explain_difference(earlier_runs[0], settings, inputs)
    state.add_note(f"policy.onExistingResult: {earlier_runs[0].uri} was not adopted, because {difference}; the job trains")
    return None


def list_earlier_runs(run: RunConfig) -> tuple[list[EarlierRun], dict[str, FineTuneError]]:
    """Return the complete final models of earlier jobs of the same name and, by uid, the errors of the jobs whose results could not be read.

    Models of jobs with a stored result come first, sorted from newest to oldest. Errors: storage errors if the folder cannot be listed, or if no
    earlier run can be read.
    """
    root, _, own_uid = run.storage.uri.rstrip("/").rpartition("/")
    root_store = open_store(run.storage.model_copy(update={"uri": root}))
    try:
        uids = [uid for uid in root_store.list_folders() if uid != own_uid]
    finally:
        root_store.close()
    earlier_runs: list[EarlierRun] = []
    errors_by_uid: dict[str, FineTuneError] = {}
    for uid in uids:
        try:
            earlier_runs += [earlier_run] if (earlier_run := _read_run(run, f"{root}/{uid}", uid)) is not None else []
        except FineTuneError as error:  # For example, the other job encrypted its files with another key.
            errors_by_uid[uid] = error
    if errors_by_uid and not earlier_runs:
        raise next(iter(errors_by_uid.values()))
    earlier_runs.sort(key=lambda earlier_run: earlier_run.result.finished_at.timestamp() if earlier_run.result is not None else 0.0, reverse=True)
    return earlier_runs, errors_by_uid


def _read_run(run: RunConfig, uri: str, uid: str) -> EarlierRun | None:
    """Return the run in the folder of an earlier job, or None if no complete model is committed in the folder."""
    tree = CheckpointTree(open_store(run.storage.model_copy(update={"uri": uri})))
    try:
        committed_model = tree.get_committed(None)
        if committed_model is None or not tree.is_complete(committed_model):
            return None
        model_uri = redact_source(tree.uri(committed_model.folder))
        try:
            result = RunResult.model_validate_json(tree.store.get(RESULT_KEY) or b"")
        except ValidationError:
            return EarlierRun(uid, model_uri, None)
        belongs_to_model = result.output.sha256 == committed_model.marker.manifest_sha256
        return EarlierRun(uid, model_uri, result if belongs_to_model else None)
    finally:
        tree.store.close()


def _explain_difference(earlier_run: EarlierRun, own_settings: dict[str, Any], own_inputs: dict[str, str]) -> str:
    if earlier_run.result is None:
        return "it has no record of a successful run"
    differences = list_result_differences(earlier_run.result, own_settings, own_inputs)
    more_note = f" and {len(differences) - MAX_SHOWN_DIFFERENCES} more" if len(differences) > MAX_SHOWN_DIFFERENCES else ""
    return f"it was made with other values: {', '.join(differences[:MAX_SHOWN_DIFFERENCES])}{more_note}"


def _build_result_found_error(run: RunConfig, earlier_run: EarlierRun, own_settings: dict[str, Any], own_inputs: dict[str, str]) -> ConfigError:
    is_same = earlier_run.result is not None and earlier_run.result.digest == compute_result_digest(own_settings, own_inputs)
    comparison = "spec and inputs are the same" if is_same else _explain_difference(earlier_run, own_settings, own_inputs)
    return ConfigError(
        "ExistingResultFound",
        f"policy.onExistingResult is fail, and an earlier FineTuneJob {run.namespace}/{run.name} (uid {earlier_run.job_uid}) "
        f"has stored {earlier_run.uri}; {comparison}",
        hint="choose another name, or write `policy.onExistingResult: adopt` to adopt the result, or `train` to train again into a new folder",
    )
