"""Stores the result of a successful run, and finds the result of an earlier job of the same name, for `policy.onExistingResult`.

A job's folder in storage ends with its uid: `<storage.uri>/<namespace>/<name>/<uid>`. The folders of earlier jobs of the same name lie next to
it. They are only read. The comparison is in `finetune_api.existing_result`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.existing_result import RunResult, result_differences, result_digest, result_settings
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
"""Name of an input in `RunFacts.other_inputs` whose digest covers the weights. Its `source_versions` are compared instead."""
SHOWN_DIFFERENCES = 10


@dataclass(frozen=True)
class EarlierRun:
    """A final model that an earlier job of the same name has committed. `result` is None if the run did not succeed, or its trainer is too old."""

    uid: str
    uri: str
    result: RunResult | None


def store_result(run: RunConfig, tree: CheckpointTree, output: Output, report: ProgressReport) -> None:
    """Store the result of a successful run, unless a later attempt has begun. Errors: those of storage."""
    committed = tree.get_committed(None)
    manifest = tree.read_manifest(committed) if committed is not None else None
    if manifest is None or tree.is_superseded(run.attempt):
        return
    settings, inputs = result_settings(run.spec, run.defaults, run.before_adaptation), compared_inputs(manifest.facts)
    result = RunResult(
        digest=result_digest(settings, inputs), settings=settings, inputs=inputs, finished_at=datetime.now(UTC), output=output,
        evaluation=report.evaluation, metrics=report.metrics, progress=report.progress,
        resolved=report.resolved.model_copy(update={"notes": None, "config_sha256": None}),
    )  # fmt: skip
    tree.store.put(RESULT_KEY, result.model_dump_json(by_alias=True, exclude_none=True).encode())


def compared_inputs(facts: RunFacts) -> dict[str, str]:
    """Return digest or version of each input, in a form that a pod without weights can compute."""
    others = {name: digest for name, digest in facts.other_inputs.items() if name != REFERENCE_MODEL}
    return {"training data": facts.dataset_digest, **others, **facts.source_versions}


def find_result_to_adopt(run: RunConfig, facts: RunFacts, state: RunState) -> RunResult | None:
    """Return the result of an earlier job with the same spec and inputs; None if the job must train.

    Errors: ConfigError `ExistingResultFound` with `policy.onExistingResult: fail`. Storage errors, if the user wrote adopt or fail: with the
    default, a store that does not permit to list the folder above the job's folder must not end the job.
    """
    mode = run.spec.policy.on_existing_result
    if mode is OnExistingResult.TRAIN:
        return None
    try:
        earlier_runs, unreadable = list_earlier_runs(run)
    except FineTuneError as error:
        if mode is not None:
            raise
        state.add_note(f"policy.onExistingResult: the results of earlier jobs could not be read, so the job trains: {error.code}")
        return None
    for uid, error in unreadable.items():
        state.add_note(f"policy.onExistingResult: the result of the job with uid {uid} could not be read, so it is not compared: {error.code}")
    if not earlier_runs:
        return None
    settings, inputs = result_settings(run.spec, run.defaults, run.before_adaptation), compared_inputs(facts)
    if mode is OnExistingResult.FAIL:
        raise _found_error(run, earlier_runs[0], settings, inputs)
    digest = result_digest(settings, inputs)
    for earlier in earlier_runs:
        if earlier.result is not None and earlier.result.digest == digest:
            log.info("the result of the job with uid %s is adopted: %s", earlier.uid, earlier.uri)
            return earlier.result.model_copy(update={"output": earlier.result.output.model_copy(update={"adopted_uid": earlier.uid})})
    difference = _explain_difference(earlier_runs[0], settings, inputs)
    state.add_note(f"policy.onExistingResult: {earlier_runs[0].uri} was not adopted, because {difference}; the job trains")
    return None


def list_earlier_runs(run: RunConfig) -> tuple[list[EarlierRun], dict[str, FineTuneError]]:
    """Return the complete final models of earlier jobs of the same name, and the errors of those that could not be read, by uid.

    Those with a result come first, the newest first. Errors: those of listing the folder; those of reading, if no earlier run could be read.
    """
    root, _, own_uid = run.storage.uri.rstrip("/").rpartition("/")
    folder = open_store(run.storage.model_copy(update={"uri": root}))
    try:
        uids = [uid for uid in folder.list_folders() if uid != own_uid]
    finally:
        folder.close()
    runs: list[EarlierRun] = []
    unreadable: dict[str, FineTuneError] = {}
    for uid in uids:
        try:
            runs += [earlier] if (earlier := _read_run(run, f"{root}/{uid}", uid)) is not None else []
        except FineTuneError as error:  # for example encrypted with the key of another job
            unreadable[uid] = error
    if unreadable and not runs:
        raise next(iter(unreadable.values()))
    runs.sort(key=lambda earlier: earlier.result.finished_at.timestamp() if earlier.result is not None else 0.0, reverse=True)
    return runs, unreadable


def _read_run(run: RunConfig, uri: str, uid: str) -> EarlierRun | None:
    """Read the run in a job's folder. None if no complete model is committed there."""
    tree = CheckpointTree(open_store(run.storage.model_copy(update={"uri": uri})))
    try:
        committed = tree.get_committed(None)
        if committed is None or not tree.is_complete(committed):
            return None
        model_uri = redact_source(tree.uri(committed.folder))
        try:
            result = RunResult.model_validate_json(tree.store.get(RESULT_KEY) or b"")
        except ValidationError:
            return EarlierRun(uid, model_uri, None)
        belongs_to_model = result.output.sha256 == committed.marker.manifest_sha256
        return EarlierRun(uid, model_uri, result if belongs_to_model else None)
    finally:
        tree.store.close()


def _explain_difference(earlier: EarlierRun, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    if earlier.result is None:
        return "it has no record of a successful run"
    differences = result_differences(earlier.result, settings, inputs)
    more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
    return f"it was made with other values: {', '.join(differences[:SHOWN_DIFFERENCES])}{more}"


def _found_error(run: RunConfig, earlier: EarlierRun, settings: dict[str, Any], inputs: dict[str, str]) -> ConfigError:
    is_same = earlier.result is not None and earlier.result.digest == result_digest(settings, inputs)
    comparison = "spec and inputs are the same" if is_same else _explain_difference(earlier, settings, inputs)
    return ConfigError(
        "ExistingResultFound",
        f"policy.onExistingResult is fail, and an earlier FineTuneJob {run.namespace}/{run.name} (uid {earlier.uid}) has stored {earlier.uri}; {comparison}",
        hint="choose another name, or write `policy.onExistingResult: adopt` to take the result over, or `train` to train again into a new folder",
    )
