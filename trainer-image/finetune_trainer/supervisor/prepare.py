"""Runs the steps between the pod's start and training: check storage, download the inputs, check the inputs, restore the checkpoint.

These steps run while the ranks import their libraries. A failure ends the pod before training. The exit code shows who must act: the user, the
storage administrator or the cluster administrator.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_api.errors import ConfigError, FineTuneError, StorageError
from finetune_api.lineage import IMAGE_SETS
from finetune_api.names import Env, Reason
from finetune_api.pod import RunConfig
from finetune_api.rules import benchmarks_after_training, prompts_to_compare, pushes_to_hub
from finetune_api.spec.enums import OutputKind
from finetune_api.status import ModelOrigin, ResolvedConfig, Stage

from finetune_trainer.artefact.combination import combined_adapter_name, require_combinable
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult, restore
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.inputs import Inputs, RestoredCheckpoint
from finetune_trainer.model_cache.record import CacheRecord
from finetune_trainer.results.model_comparison import read_prompts
from finetune_trainer.settings import Settings
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.supervisor.existing_model import (
    ExistingModel,
    download_existing_model,
    find_existing_model,
    require_same_base,
)
from finetune_trainer.supervisor.fetch import (
    MODEL_SOURCE,
    Fetcher,
    SourceKind,
    compute_combined_digest,
    compute_fingerprint,
)
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.hub import require_push_token
from finetune_trainer.supervisor.image_digests import compute_image_set_digest
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.stored_rows import RowStore, StoredRows

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
T = TypeVar("T")
BUSY_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""Pauses before the retries of a request to a busy store."""
COMPARED_SPEC_FIELDS = ("model", "method", "trainer", "dataset", "training", "evaluation", "distributed")
"""Top-level fields of the spec that influence the computed numbers of a run."""
FIELDS_NOT_HASHED = (
    "batchSizePerDevice", "gradientAccumulationSteps", "effectiveBatchSize", "learningRate", "gradientCheckpointing", "storage", "tokenSecretRef",
)  # fmt: skip
"""Fields that are left out of the hashes, because they are compared separately or only describe how to access a source."""
RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")


class Preparation:
    """Prepares one pod. The public methods are listed in the order in which the supervisor calls them."""

    def __init__(
        self, run: RunConfig, config_sha256: str, settings: Settings, run_state: RunState, digests: FileDigests, model_kind: SourceKind = MODEL_SOURCE
    ) -> None:
        """`digests` receives the sha256 of the downloaded files. `model_kind`: MODEL_SOURCE, or MODEL_WITHOUT_WEIGHTS if no model is loaded."""
        self._model_kind = model_kind
        self._run, self._config_sha256, self._work_folder, self._digests = run, config_sha256, settings.work_folder, digests
        self._node_rank, self._state = settings.node_rank, run_state
        self._config_maps = settings.config_maps
        self._downloaded_bytes = 0
        self.data_summary: DataSummary | None = None
        """The result of the check of the rows; None before the check."""

    def check_hub_token(self) -> None:
        """If the job pushes its model to the hub, check that the token for the push exists. Errors: CredentialsError HubTokenMissing."""
        if pushes_to_hub(self._run.spec) and self._node_rank == 0:
            require_push_token()

    def preflight(self) -> None:
        """Check that the job's storage can be used. Errors: exit codes 67, 69, 77."""
        self._run_timed("preflight", self._preflight)

    def _preflight(self) -> None:
        abilities = self._retry_while_busy(lambda: preflight(self._run.storage, needs_write=self._node_rank == 0))
        if self._node_rank == 0:
            self._state.merge_resolved(ResolvedConfig(storage=abilities.to_wire()))
            if not abilities.can_delete:
                self._state.add_note("storage: s3:DeleteObject is not granted; old checkpoints are not removed")

    def _retry_while_busy(self, send_request: Callable[[], T]) -> T:
        """Check the store, and retry while the store reports that it is busy. Wrong settings and unreachable stores are reported at once."""
        for pause_seconds in BUSY_PAUSES_SECONDS:
            try:
                return send_request()
            except StorageError as error:
                if error.code != "StorageFailed":
                    raise
                log.warning("storage is busy, will retry in %.0f s: %s", pause_seconds, error)
                time.sleep(pause_seconds)
        return send_request()

    def fetch_existing_model(self, tree: CheckpointTree, folder: Path) -> tuple[Inputs, ExistingModel]:
        """Download the inputs, and download the model of `phases.from` to `folder`.

        Errors: those of `fetch` and of `existing_model`; ConfigError `ExistingModelNotAdapter` (64).
        """
        self._state.enter_stage(Stage.DOWNLOADING)
        existing_model = find_existing_model(self._run.spec.phases.from_ or "", tree)
        if self._run.spec.output.merge_adapter and existing_model.output_kind is OutputKind.MODEL:
            raise ConfigError(
                "ExistingModelNotAdapter", f"phases.from is {existing_model.output.uri}, a complete model, but output.mergeAdapter needs an adapter",
                hint="remove output.mergeAdapter, or write the address of an adapter in phases.from",
            )  # fmt: skip
        inputs, _ = self.fetch()
        note = require_same_base(existing_model, inputs)
        if note is not None:
            self._state.add_note(note)
        fetcher = Fetcher(self._run, self._work_folder)
        self._state.enter_stage(Stage.DOWNLOADING)
        self._run_timed(
            "existing model",
            lambda: download_existing_model(
                existing_model, folder, byte_counter=self._count_downloaded_bytes, check_space=lambda size: fetcher.require_space(size, "phases.from")
            ),
        )
        return inputs, existing_model

    def fetch(self, *, uses_stored_rows: bool = False) -> tuple[Inputs, RunFacts]:
        """Download all inputs to the local disk and check the rows. Errors: exit codes 64, 65, 66, 67, 69, 77.

        `uses_stored_rows`: whether to download the rows that the job's preparation stored, if they exist. These rows are not checked again.
        """
        self._state.enter_stage(Stage.DOWNLOADING)
        inputs = self._run_timed("fetch", self._fetch)
        facts = collect_run_facts(self._run, self._config_sha256, inputs, self._digests.get_sha256)
        # A replay with other data must fail with `InputsChanged`, even if the stored rows cannot be used.
        require_expected_inputs(facts, unknown_inputs=IMAGE_SETS)
        self._state.enter_stage(Stage.CHECKING)
        stored_rows = self._run_timed("rows", lambda: self._fetch_stored_rows(facts)) if uses_stored_rows else None
        summary = self._run_timed("check", lambda: self._check_data(inputs, stored_rows))
        image_digests = self._run_timed("images", lambda: self._compute_image_digests(summary))
        facts = facts.model_copy(update={"other_inputs": facts.other_inputs | image_digests})
        require_expected_inputs(facts)
        return inputs.model_copy(update={"image_digests": image_digests, "stored_rows": stored_rows.digest if stored_rows is not None else None}), facts

    def _fetch_stored_rows(self, facts: RunFacts) -> StoredRows | None:
        """Download the rows that the job's preparation stored. If these rows cannot be used, add a note. Return None if there are no usable rows."""
        if self._run.prepared is None or not self._run.prepared.digest:
            return None
        try:
            with RowStore.open(self._run) as row_store:
                stored_rows = row_store.fetch_for_training(
                    facts, self._work_folder, renews_marker=self._node_rank == 0, byte_counter=self._count_downloaded_bytes
                )
        except Exception as error:  # Stored rows only save time, so a failure must not end the job.
            log.warning("the prepared rows are not used", exc_info=error)
            problem = error.message if isinstance(error, FineTuneError) else type(error).__name__
            self._state.add_note(f"the prepared rows are not used: {problem}; this pod reads and tokenises the data")
            return None
        self._state.add_note(f"the rows of the preparation are used: {stored_rows.row_count} rows")
        return stored_rows

    def _compute_image_digests(self, summary: DataSummary) -> dict[str, str]:
        """Return one digest for the images of the training rows and one for the images of the held-out rows, by the names in `IMAGE_SETS`.

        A set without images has no entry.
        """
        image_sets = zip(IMAGE_SETS, (summary.training_images, summary.held_out_images), strict=True)
        return {
            name: compute_image_set_digest(images, self._digests, lambda text: self._state.enter_stage(Stage.CHECKING, text))
            for name, images in image_sets if images
        }

    def claim_storage(self, tree: CheckpointTree) -> None:
        """Fence out earlier attempts, then remove the leftovers of killed incarnations. Called only in rank 0's pod.

        The order matters: after `begin_attempt`, no earlier attempt can commit. With the reverse order, the sweep could remove data that an earlier
        attempt is about to commit. Errors: FencedOutError if a later attempt has begun.
        """
        if self._node_rank > 0:
            return
        tree.require_newest_attempt(self._run.attempt)
        tree.begin_attempt(self._run.attempt, self._run.to_bytes())
        sweep_leftovers(tree, self._state)

    def restore(self, tree: CheckpointTree, facts: RunFacts) -> RestoreResult:
        """Download the checkpoint to resume from. Errors: exit codes 64 (`CheckpointIncompatible`), 73."""
        self._state.enter_stage(Stage.RESTORING)
        restore_result = self._run_timed(
            "restore",
            lambda: restore(
                tree, self._run.resume, facts, self._work_folder / "output", byte_counter=self._count_downloaded_bytes, attempt=self._run.attempt
            ),
        )
        for sentence in restore_result.damage_messages:
            self._state.record_checkpoint_problem(Reason.CHECKPOINT_DAMAGED, sentence)
            self._state.add_note(f"skipped: {sentence}")  # The note stays when the next commit clears the reported problem.
        if restore_result.manifest is not None:
            self._state.resumed_from_step = restore_result.step
            self._state.merge_resolved(ResolvedConfig(resume_exact=restore_result.is_exact, resume_note=restore_result.inexact_reason))
            if restore_result.changed_inputs:
                self._state.add_note(
                    f"resumed from step {restore_result.step} with changed {', '.join(restore_result.changed_inputs)}"
                )
        return restore_result

    def _fetch(self) -> Inputs:
        spec = self._run.spec
        cache = CacheRecord.read(self._work_folder)
        fetcher = Fetcher(
            self._run, self._work_folder, byte_counter=self._count_downloaded_bytes, digests=self._digests, model_kind=self._model_kind,
            cached_models=cache.models if cache is not None else None,
        )  # fmt: skip
        dataset_spec = spec.dataset
        source = spec.model.source or ""
        model = fetcher.fetch_model(source, "model.source", "model")
        if cache is not None:
            self._report_cache(cache, fetcher)
        tokenizer_source = spec.model.tokenizer
        adapter_source = spec.method.adapter.source if spec.method.adapter else None
        reference_source = spec.trainer.dpo.reference_model if spec.trainer.dpo else None
        train_files = fetcher.fetch_data_files(dataset_spec.train, "dataset.train", "train") if dataset_spec.train else []
        files_by_mixture_part = [
            fetcher.fetch_data_files(item.source, f"dataset.mixture[{number}].source", f"mixture-{number}")
            for number, item in enumerate(dataset_spec.mixture or [])
        ]
        validation_files = fetcher.fetch_data_files(dataset_spec.validation, "dataset.validation", "validation") if dataset_spec.validation else []
        test_files = fetcher.fetch_data_files(dataset_spec.test, "dataset.test", "test") if dataset_spec.test else []
        training_files = [*train_files, *(file for source_files in files_by_mixture_part for file in source_files)]
        data_files = [*training_files, *validation_files, *test_files]
        image_root = dataset_spec.images.root if dataset_spec.images else None
        metric_models = spec.evaluation.metric_models
        bertscore_source, similarity_source = (metric_models.bertscore, metric_models.semantic_similarity) if metric_models else (None, None)
        return Inputs(
            model=model.path,
            tokenizer=fetcher.fetch_tokenizer(tokenizer_source, "model.tokenizer", "tokenizer").path
            if tokenizer_source and tokenizer_source != source
            else None,
            adapter=fetcher.fetch_adapter(adapter_source, "method.adapter.source", "adapter").path if adapter_source else None,
            reference=fetcher.fetch_model(reference_source, "trainer.dpo.referenceModel", "reference").path if reference_source else None,
            bertscore_model=fetcher.fetch_model(bertscore_source, "evaluation.metricModels.bertscore", "bertscore").path if bertscore_source else None,
            similarity_model=fetcher.fetch_model(similarity_source, "evaluation.metricModels.semanticSimilarity", "similarity").path
            if similarity_source
            else None,
            combined_adapters=self._fetch_combined_adapters(fetcher, model.path),
            benchmarks=self._fetch_benchmarks(fetcher),
            train=train_files,
            mixture=files_by_mixture_part,
            validation=validation_files,
            test=test_files,
            file_digests={file: digest for file in data_files if (digest := self._digests.get_known_sha256(file)) is not None},
            images=fetcher.fetch_image_folder(image_root, "dataset.images.root", "images") if image_root else None,
            source_versions=fetcher.source_versions,
            model_revision=model.hub_revision or compute_fingerprint(model.path),
            dataset_digest=compute_combined_digest(training_files, self._digests.get_sha256),
            output_dir=self._work_folder / "output",
            config_maps=self._config_maps,
        )

    def _report_cache(self, cache: CacheRecord, fetcher: Fetcher) -> None:
        """Report where the base model came from."""
        for note in cache.notes:
            self._state.add_note(note)
        cached_model = fetcher.models_from_cache.get("model.source")
        if cached_model is None and "model.source" in cache.models:
            self._state.add_note("model.source was removed from model.cache before this pod could use it, and was downloaded again")
        is_cached = cached_model is not None and cached_model.from_cache
        self._state.merge_resolved(
            ResolvedConfig(
                model_source=ModelOrigin.CACHE if is_cached else ModelOrigin.DOWNLOAD,
                model_bytes_saved=cached_model.size if cached_model and is_cached else 0,
            )
        )

    def _fetch_benchmarks(self, fetcher: Fetcher) -> list[Path | None]:
        """Fetch the folders of the benchmarks, but only in rank 0's pod, which runs the benchmarks. None stands for a benchmark without a folder."""
        benchmarks = benchmarks_after_training(self._run.spec) if self._node_rank == 0 else []
        return [
            fetcher.fetch_folder(benchmark.folder, f"evaluation.benchmarks[{number}].folder", f"benchmark-{number}") if benchmark.folder else None
            for number, benchmark in enumerate(benchmarks)
        ]

    def _fetch_combined_adapters(self, fetcher: Fetcher, base_model: Path) -> list[Path]:
        """Fetch and check the adapters of `output.combineAdapters`, in rank 0's pod only. Errors: ConfigError `AdapterNotCombinable`."""
        adapter_folders = []
        for number, item in enumerate((self._run.spec.output.combine_adapters or []) if self._node_rank == 0 else []):
            spec_path = f"output.combineAdapters[{number}].source"
            adapter_folder = fetcher.fetch_adapter(item.source, spec_path, f"combined-adapter-{number}").path
            if not self._model_kind.skipped_endings:
                require_combinable(adapter_folder, base_model, spec_path, item.source)
            adapter_folders.append(adapter_folder)
        return adapter_folders

    def _check_data(self, inputs: Inputs, stored_rows: StoredRows | None) -> DataSummary:
        from finetune_trainer.benchmarks.plan import plan_tasks
        from finetune_trainer.data import check_files  # This module imports neither torch nor transformers.

        if self._node_rank == 0:
            plan_tasks(self._run, inputs.benchmarks)  # Before training, refuse tasks that cannot run.
        self.data_summary = summary = check_files(self._run, inputs) if stored_rows is None else stored_rows.summary
        read_prompts(prompts_to_compare(self._run.spec), inputs.config_maps)  # Find errors in the prompts before training.
        for note in summary.notes:
            self._state.add_note(note)
        self._state.merge_resolved(
            ResolvedConfig(
                model_revision=inputs.model_revision,
                dataset_digest=inputs.dataset_digest,
                dataset_rows=summary.rows.get("train"),
                dataset_format=str(summary.format),
            )
        )
        return summary

    def _run_timed(self, timing_name: str, task: Callable[[], T]) -> T:
        """Run a task, and add its duration to the timings under `timing_name`."""
        started_at = time.monotonic()
        try:
            return task()
        finally:
            self._state.add_timing(timing_name, time.monotonic() - started_at)

    def _count_downloaded_bytes(self, byte_count: int) -> None:
        self._downloaded_bytes += byte_count
        self._state.enter_stage(self._state.current_stage, f"{self._downloaded_bytes / 1e6:.0f} MB")


def sweep_leftovers(tree: CheckpointTree, run_state: RunState) -> None:
    """Remove the leftovers of killed incarnations. A failure only adds a note, because the leftovers only cost space."""
    sweep_result = tree.sweep()
    if sweep_result.removed_count:
        log.info("removed %d objects of unfinished uploads", sweep_result.removed_count)
    if sweep_result.first_error is not None:
        log.warning("removing unfinished uploads failed: %s", sweep_result.first_error)
        run_state.add_note(f"storage: unfinished uploads could not be removed: {sweep_result.first_error.message}")


def add_restored_checkpoint(inputs: Inputs, restore_result: RestoreResult) -> Inputs:
    """Return the inputs, and add the checkpoint to resume from if there is one."""
    if restore_result.manifest is None or restore_result.local_folder is None:
        return inputs
    checkpoint = RestoredCheckpoint(
        path=restore_result.local_folder, step=restore_result.step, uri=restore_result.uri, manifest=restore_result.manifest.to_wire()
    )
    return inputs.model_copy(update={"restore": checkpoint})


def require_expected_inputs(facts: RunFacts, *, unknown_inputs: Sequence[str] = ()) -> None:
    """Compare the inputs with `Env.EXPECTED_INPUTS`, which a replay sets. Errors: ConfigError `InputsChanged`.

    `unknown_inputs`: names of inputs whose digests are not known yet.
    """
    expected_json = os.environ.get(Env.EXPECTED_INPUTS)
    if not expected_json:
        return
    expected_facts = RunFacts.model_validate_json(expected_json)
    expected_and_found = [
        ("base model", expected_facts.model_revision, facts.model_revision),
        ("training data", expected_facts.dataset_digest, facts.dataset_digest),
    ]
    expected_and_found += [
        (name, expected_digest, facts.other_inputs.get(name, ""))
        for name, expected_digest in expected_facts.other_inputs.items() if name not in unknown_inputs
    ]
    changed_inputs = [
        f"{name} is {found_digest or 'absent'} instead of {expected_digest}"
        for name, expected_digest, found_digest in expected_and_found if expected_digest != found_digest
    ]
    if changed_inputs:
        raise ConfigError(
            "InputsChanged", "the inputs are not those of the run that is replayed: " + "; ".join(changed_inputs),
            hint="give the original files, for example with --set dataset.train=file:///path",
        )  # fmt: skip


def collect_run_facts(run: RunConfig, config_sha256: str, inputs: Inputs, hash_file: Callable[[Path], str] = sha256_file) -> RunFacts:
    """Return the facts that this run stores in its checkpoints. A run that resumes from a checkpoint compares the facts in the checkpoint with its own facts.

    `hash_file` is a function that returns the digest of a file.
    """
    training_spec = run.spec.training
    micro_batch, accumulation_steps = training_spec.batch_size_per_device or 1, training_spec.gradient_accumulation_steps or 1
    return RunFacts(
        model_revision=inputs.model_revision,
        dataset_digest=inputs.dataset_digest,
        method=str(run.spec.method.type or ""),
        trainer=str(run.spec.trainer.type or ""),
        strategy=str(run.spec.distributed.strategy or ""),
        seed=training_spec.seed or 0,
        world_size=run.world.size,
        micro_batch=micro_batch,
        accumulation=accumulation_steps,
        effective_batch=micro_batch * accumulation_steps * run.world.size // (run.spec.distributed.context_parallel_size or 1),
        learning_rate=training_spec.learning_rate,
        settings=hash_settings(run),
        other_inputs=hash_other_inputs(inputs, hash_file),
        source_versions=inputs.source_versions,
        config_sha256=config_sha256,
        versions=read_package_versions(),
    )


def hash_settings(run: RunConfig) -> dict[str, str]:
    """Return a short hash of each top-level spec field in `COMPARED_SPEC_FIELDS`, by the name of the field."""
    spec = run.spec.to_wire()
    spec["distributed"] = _drop_unused_options(spec.get("distributed") or {})
    hashes = {}
    for field in COMPARED_SPEC_FIELDS:
        hashed_options = {name: value for name, value in (spec.get(field) or {}).items() if name not in FIELDS_NOT_HASHED}
        hashes[field] = hashlib.sha256(json.dumps(hashed_options, sort_keys=True).encode()).hexdigest()[:12]
    return hashes


def _drop_unused_options(distributed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `spec.distributed` that influence the computed numbers and differ from their defaults."""
    fsdp = {name: value for name, value in (distributed.get("fsdp") or {}).items() if name != "stateDict"}
    options = {**distributed, "fsdp": fsdp, "contextParallelSize": (distributed.get("contextParallelSize") or 1) - 1}
    return {name: value for name, value in options.items() if value}


def hash_other_inputs(inputs: Inputs, hash_file: Callable[[Path], str]) -> dict[str, str]:
    """Return a hash of each input except the base model and the training data, by the name of the input in messages."""
    folder_by_name = {"tokenizer": inputs.tokenizer, "reference model": inputs.reference, "adapter": inputs.adapter}
    folder_by_name |= {combined_adapter_name(number): folder for number, folder in enumerate(inputs.combined_adapters)}
    hashes = {name: compute_fingerprint(folder) for name, folder in folder_by_name.items() if folder is not None}
    files_by_name = {
        "validation data": inputs.validation, "test data": inputs.test,
        "contents of ConfigMaps": _list_mounted_files(inputs.config_maps),
    }  # fmt: skip
    return hashes | inputs.image_digests | {name: compute_combined_digest(paths, hash_file) for name, paths in files_by_name.items() if paths}


def _list_mounted_files(folder: Path) -> list[Path]:
    """Return the files of mounted ConfigMaps, without the kubelet's copies in folders whose names begin with two dots."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith("..") for part in path.relative_to(folder).parts)]


def read_package_versions() -> dict[str, str]:
    """Return the versions of the packages that influence the computed numbers of a run. The packages are not imported."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # An image may lack packages that its jobs do not need.
            continue
    return versions
