"""Writes the lineage statement of the final model. `docs/guides/lineage.md` describes the statement and what the statement's signature proves.

The statement is written after the model's commit, perhaps by a later attempt. Facts that a later attempt cannot know, such as the device and the step
from which an earlier attempt resumed, are read from the record of each attempt (`attempt_recorder`).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finetune_api.lineage import (
    BASE_MODEL_DEPENDENCY,
    BUILD_TYPE,
    BUILDER_ID,
    IMAGE_SETS,
    REVISION_ANNOTATION,
    STATEMENT_KEY,
    TRAINER_IMAGE_DEPENDENCY,
    BuildDefinition,
    Builder,
    BuildMetadata,
    Provenance,
    Resource,
    RunDetails,
    RunSummary,
    Statement,
    remove_secrets,
)
from finetune_api.names import Storage
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source

from finetune_trainer.artefact.combination import combined_adapter_name
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.inputs import Inputs
from finetune_trainer.supervisor.attempt_recorder import read_attempt_records
from finetune_trainer.supervisor.fetch import compute_combined_digest, compute_fingerprint
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.run_results import START_TIME_KEY
from finetune_trainer.supervisor.run_state import RunState

MAX_HASHED_MODEL_BYTES = 8 << 30
"""Maximum number of bytes that are read to compute digests of the base model's files, because the GPUs are idle while files are read.

If the files have more bytes, the statement contains the revision of the model, but no digests of its files.
"""
GIT_COMMIT_DIGITS = 40


class Lineage:
    """Writes the lineage statement of one run. Only rank 0's pod writes it."""

    def __init__(self, run: RunConfig, tree: CheckpointTree, run_state: RunState, digests: FileDigests) -> None:
        """`digests`: the digests of the files that this pod has downloaded."""
        self._run, self._tree, self._state, self._digests = run, tree, run_state, digests

    def write_statement(self, inputs: Inputs | None) -> str | None:
        """Store the statement unless it is already stored. Returns its URI, or None if no model is committed or a later attempt has begun.

        `inputs`: the local inputs, if this pod has trained. If `inputs` is None, the statement contains no digests of single files. Errors: those
        of storage.
        """
        committed_model = self._tree.get_committed(None)
        manifest = self._tree.read_manifest(committed_model) if committed_model is not None else None
        if committed_model is None or manifest is None or self._tree.is_superseded(self._run.attempt):
            return None
        uri = self._tree.uri(STATEMENT_KEY)
        if self._is_statement_stored_for(committed_model):
            return uri
        self._tree.store.put(STATEMENT_KEY, self._build_statement(committed_model, manifest, inputs).to_bytes())
        return uri

    def _is_statement_stored_for(self, committed_checkpoint: CommittedCheckpoint) -> bool:
        """Whether the stored statement names the manifest of the committed model. If it does, it may already be signed and must not be replaced."""
        data = self._tree.store.get(STATEMENT_KEY)
        try:
            return data is not None and Statement.model_validate_json(data).subject[0] == _build_manifest_subject(committed_checkpoint)
        except ValueError:
            return False

    def _build_statement(self, committed_checkpoint: CommittedCheckpoint, manifest: Manifest, inputs: Inputs | None) -> Statement:
        spec, redacted_fields = remove_secrets(self._run.to_wire()["spec"])
        world = self._run.world
        internal_parameters = {
            "defaults": self._run.defaults, "redactedFields": redacted_fields,
            "originalValues": remove_secrets(self._run.before_adaptation or {})[0],
            "world": {"nodes": world.nodes, "processesPerNode": world.processes_per_node, "gpusPerNode": world.gpus_per_node},
        }  # fmt: skip
        return Statement(
            subject=[_build_manifest_subject(committed_checkpoint), *(Resource(name=file.path, digest={"sha256": file.sha256}) for file in manifest.files)],
            predicate=Provenance(
                build_definition=BuildDefinition(
                    build_type=BUILD_TYPE, external_parameters={"spec": spec}, internal_parameters=internal_parameters,
                    resolved_dependencies=list_dependencies(self._run, manifest.facts, inputs, self._digests),
                ),
                run_details=RunDetails(
                    builder=Builder(id=BUILDER_ID, version=_read_builder_versions(manifest.facts)),
                    metadata=BuildMetadata(invocation_id=manifest.job, started_on=self._read_start_time(), finished_on=datetime.now(UTC).isoformat()),
                    byproducts=[
                        Resource(name=checkpoint_folder_key(checkpoint.step), digest={"sha256": checkpoint.marker.manifest_sha256})
                        for checkpoint in reversed(self._tree.list_committed())
                    ],
                    finetune_run=RunSummary(
                        step=manifest.step, facts=manifest.facts.to_wire(), stage_seconds=self._state.report().timings,
                        attempts=[record.without_texts() for record in read_attempt_records(self._tree)],
                    ),
                ),
            ),
        )  # fmt: skip

    def _read_start_time(self) -> str | None:
        data = self._tree.store.get(START_TIME_KEY)
        return str(json.loads(data)["time"]) if data is not None else None


def _build_manifest_subject(committed_checkpoint: CommittedCheckpoint) -> Resource:
    return Resource(name=str(Storage.MANIFEST), digest={"sha256": committed_checkpoint.marker.manifest_sha256})


def _read_builder_versions(facts: RunFacts) -> dict[str, str]:
    try:
        operator_version = {"finetune-operator": version("finetune-operator")}
    except PackageNotFoundError:  # The code runs from a checkout, and the package is not installed.
        operator_version = {}
    return {**operator_version, "python": platform.python_version(), **facts.versions}


# ---- dependencies ----


def list_dependencies(run: RunConfig, facts: RunFacts, inputs: Inputs | None, digests: FileDigests) -> list[Resource]:
    """Return the base model, the other models, the data and the trainer image. Each source is followed by those of its files whose digests are known."""
    return [*_list_model_resources(run, facts, inputs, digests), *_list_data_resources(run, facts, inputs, digests), *_list_image_resources(run)]


def _list_model_resources(run: RunConfig, facts: RunFacts, inputs: Inputs | None, digests: FileDigests) -> Iterator[Resource]:
    spec = run.spec
    is_git_commit = len(facts.model_revision) == GIT_COMMIT_DIGITS
    yield Resource(
        name=BASE_MODEL_DEPENDENCY, uri=redact_source(spec.model.source or ""), annotations={REVISION_ANNOTATION: facts.model_revision},
        digest={"gitCommit": facts.model_revision} if is_git_commit else {},
    )  # fmt: skip
    if inputs is not None and (is_git_commit or compute_fingerprint(inputs.model) == facts.model_revision):
        yield from _list_model_file_resources(BASE_MODEL_DEPENDENCY, inputs.model, digests)
    adapter_source = spec.method.adapter.source if spec.method.adapter else None
    reference_source = spec.trainer.dpo.reference_model if spec.trainer.dpo else None
    other_sources = (
        ("model.tokenizer", spec.model.tokenizer, "tokenizer"), ("method.adapter.source", adapter_source, "adapter"),
        ("trainer.dpo.referenceModel", reference_source, "reference model"),
    )  # fmt: skip
    other_sources += tuple(
        (f"output.combineAdapters[{number}].source", item.source, combined_adapter_name(number))
        for number, item in enumerate(spec.output.combine_adapters or [])
    )
    for spec_path, source, input_name in other_sources:
        if source and input_name in facts.other_inputs:
            yield Resource(name=spec_path, uri=redact_source(source), annotations={REVISION_ANNOTATION: facts.other_inputs[input_name]})


def _list_model_file_resources(name: str, folder: Path, digests: FileDigests) -> Iterator[Resource]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if sum(path.stat().st_size for path in files if digests.get_known_sha256(path) is None) <= MAX_HASHED_MODEL_BYTES:
        for path in files:
            yield Resource(name=f"{name}/{path.relative_to(folder).as_posix()}", digest={"sha256": digests.get_sha256(path)})


def _list_data_resources(run: RunConfig, facts: RunFacts, inputs: Inputs | None, digests: FileDigests) -> Iterator[Resource]:
    """Yield the data sources and their files. A file that has changed since the training has no digest."""
    dataset_spec = run.spec.dataset
    training_sources = [("dataset.train", dataset_spec.train, inputs.train if inputs else [])] if dataset_spec.train else []
    training_sources += [
        (f"dataset.mixture[{number}].source", item.source, inputs.mixture[number] if inputs else [])
        for number, item in enumerate(dataset_spec.mixture or [])
    ]
    held_out_sources = [
        ("dataset.validation", dataset_spec.validation, inputs.validation if inputs else [], "validation data"),
        ("dataset.test", dataset_spec.test, inputs.test if inputs else [], "test data"),
    ]
    yield from _list_data_file_resources(training_sources, facts.dataset_digest, digests)
    for spec_path, source, files, input_name in held_out_sources:
        if source:
            yield from _list_data_file_resources([(spec_path, source, files)], facts.other_inputs.get(input_name, ""), digests)
    image_root = dataset_spec.images.root if dataset_spec.images else None
    for name in IMAGE_SETS:
        if name in facts.other_inputs:
            digest = facts.other_inputs[name]
            yield Resource(name=name, uri=redact_source(image_root) if image_root else None, annotations={"combinedDigest": digest})


def _list_data_file_resources(sources: list[tuple[str, str, list[Path]]], digest: str, digests: FileDigests) -> Iterator[Resource]:
    sha256_by_file = {file: digests.get_sha256(file) for _, _, files in sources for file in files}
    is_unchanged = compute_combined_digest(list(sha256_by_file), sha256_by_file.__getitem__) == digest
    for spec_path, source, files in sources:
        yield Resource(name=spec_path, uri=redact_source(source), annotations={"combinedDigest": digest})
        if is_unchanged:
            yield from (Resource(name=f"{spec_path}/{file.name}", digest={"sha256": sha256_by_file[file]}) for file in files)


def _list_image_resources(run: RunConfig) -> Iterator[Resource]:
    """Yield the image of `placement.image`.

    A pod does not know the digest of its image; `finetune sign NAME` adds the digest that the operator recorded.
    """
    image = run.spec.placement.image
    if image:
        _, _, digest = image.partition("@sha256:")
        yield Resource(name=TRAINER_IMAGE_DEPENDENCY, uri=image, digest={"sha256": digest} if digest else {})
