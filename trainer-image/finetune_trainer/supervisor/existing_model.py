"""Finds the model of a job that does not train: `phases.from` names a final model or checkpoint of another job.

The other job's folder is not changed. The record of the model and all results are stored in this job's own folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass, Storage, parse_attempt_of_uri
from finetune_api.sources import redact_source
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Output

from finetune_trainer.checkpoint.address import parse_address
from finetune_trainer.checkpoint.manifest import Manifest, checkpoint_folder_key
from finetune_trainer.checkpoint.restore import fetch_verified, open_other_job
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.inputs import Inputs
from finetune_trainer.storage.base import ByteCounter, join_key
from finetune_trainer.storage.web import split_query

SPEC_FIELD = "phases.from"
RECORD_KEY = f"{Storage.RUN}/given_model.json"
TRAINING_STATE_NAME_ENDINGS = (".pt", ".pth", "training_args.bin")
"""Endings of the names of checkpoint files that are needed only to resume training. Files in the subfolders of a checkpoint are also needed only to
resume training."""


@dataclass(frozen=True)
class ExistingModel:
    """The committed model that `phases.from` names."""

    tree: CheckpointTree
    committed: CommittedCheckpoint
    manifest: Manifest
    output_kind: OutputKind

    @property
    def output(self) -> Output:
        """The model as `status.output` describes it."""
        return Output(
            uri=redact_source(self.tree.uri(self.committed.folder)), sha256=self.committed.marker.manifest_sha256, kind=self.output_kind,
            evaluation=self.manifest.extra.get("evaluation"),
        )  # fmt: skip


def find_existing_model(source_uri: str, own_tree: CheckpointTree) -> ExistingModel:
    """Find the model that `source_uri` names, and read its manifest.

    Errors: ConfigError `ExistingModelInvalid` (64); NotFoundError `ExistingModelNotCommitted`, `ExistingModelDamaged`, `ExistingModelIncomplete` (66).
    """
    shown_uri, address = redact_source(source_uri), parse_address(source_uri)
    if address.is_whole_job:
        raise ConfigError(
            "ExistingModelInvalid", f"{SPEC_FIELD} is {shown_uri}, which is not the folder of a final model or checkpoint",
            hint="write status.output.uri of the other FineTuneJob, or <its folder>/model or <its folder>/checkpoints/step-00000100",
        )  # fmt: skip
    tree = open_other_job(own_tree, address.job_uri)
    committed, folder = tree.get_committed(address.step), split_query(source_uri)[0].rstrip("/")
    is_other_folder = committed is not None and parse_attempt_of_uri(folder) is not None and not folder.endswith(f"/{committed.marker.path}")
    if committed is None or is_other_folder:
        reason = "the committed model is in another folder next to it" if committed else f"there is no {Storage.COMMITTED} object"
        raise _not_found_error(
            "ExistingModelNotCommitted", f"{SPEC_FIELD} is {shown_uri}, but no model is committed there: {reason}",
            f"check the address; {redact_source(tree.uri(checkpoint_folder_key(address.step)))} must contain the object {Storage.COMMITTED}",
        )  # fmt: skip
    manifest = tree.read_manifest(committed)
    if manifest is None:
        address_of_manifest = redact_source(tree.uri(join_key(committed.folder, Storage.MANIFEST)))
        raise _damaged_error(shown_uri, f"{address_of_manifest} is missing or is not the manifest that was committed")
    kind = manifest.kind or _find_output_kind(manifest)
    if kind is None:
        raise _not_found_error(
            "ExistingModelIncomplete", f"{SPEC_FIELD} is {shown_uri}, which contains neither adapter_config.json nor config.json",
            "name another checkpoint or the final model",
        )  # fmt: skip
    return ExistingModel(tree, committed, manifest, kind)


def _find_output_kind(manifest: Manifest) -> OutputKind | None:
    file_paths = {entry.path for entry in manifest.files}
    return OutputKind.ADAPTER if "adapter_config.json" in file_paths else OutputKind.MODEL if "config.json" in file_paths else None


def require_same_base(existing: ExistingModel, inputs: Inputs) -> str | None:
    """Check that the model was trained from this job's base model. Returns a note if the two base models cannot be compared, otherwise None.

    Errors: ConfigError `ExistingModelOfOtherBase`.
    """
    trained_revision, base_revision = existing.manifest.facts.model_revision, inputs.model_revision
    uri = existing.output.uri
    if not trained_revision or trained_revision.startswith("sha256:") != base_revision.startswith("sha256:"):
        trained_text = trained_revision or "an unknown base model"
        return f"{SPEC_FIELD}: {uri} was trained from {trained_text}; the trainer could not compare it with model.source ({base_revision})"
    if trained_revision != base_revision:
        raise ConfigError(
            "ExistingModelOfOtherBase",
            f"{SPEC_FIELD} is {uri}, which was trained from the base model {trained_revision}, but model.source has {base_revision}",
            hint="write the base model of the other FineTuneJob in model.source",
        )  # fmt: skip
    return None


def download_existing_model(
    existing: ExistingModel, target_folder: Path, *, byte_counter: ByteCounter | None = None, check_space: Callable[[int], None] | None = None
) -> None:
    """Download the model to a folder and compare every file with the manifest. Errors: NotFoundError `ExistingModelDamaged`."""
    entries = [entry for entry in existing.manifest.files if _is_model_file(entry.path, existing.committed.step)]
    if check_space is not None:
        check_space(sum(entry.size for entry in entries))
    partial_folder = target_folder.with_name(f"{target_folder.name}.part")
    shutil.rmtree(partial_folder, ignore_errors=True)
    problem = fetch_verified(
        existing.tree, existing.committed.folder, existing.manifest, partial_folder, lambda path: _is_model_file(path, existing.committed.step), byte_counter
    )
    if problem is not None:
        raise _damaged_error(str(existing.output.uri), redact_source(problem))
    partial_folder.rename(target_folder)


def _is_model_file(path: str, step: int | None) -> bool:
    return step is None or ("/" not in path and not path.endswith(TRAINING_STATE_NAME_ENDINGS))


def record_existing_model(existing: ExistingModel, own_tree: CheckpointTree, attempt: int) -> None:
    """Store, in this job's own folder, a record of the model that the job uses. Errors: those of storage."""
    output = existing.output
    record = {"uri": output.uri, "sha256": output.sha256, "kind": existing.output_kind, "attempt": attempt, "time": datetime.now(UTC).isoformat()}
    own_tree.store.put(RECORD_KEY, json.dumps(record, indent=1).encode())


def _damaged_error(uri: str, problem: str) -> NotFoundError:
    return _not_found_error(
        "ExistingModelDamaged", f"{SPEC_FIELD} is {uri}, which is damaged: {problem}", "restore the object, or name another checkpoint or model"
    )


def _not_found_error(code: str, message: str, hint: str) -> NotFoundError:
    return NotFoundError(code, message, hint=hint, failure_class=FailureClass.MODEL)
