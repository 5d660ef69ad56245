"""Everything between pod start and the ranks' first look at data: is storage usable, fetch, check, restore.

It runs beside the ranks' imports. Its failures end the pod before training, with the code that says whose fault it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune_api.errors import StorageError
from finetune_api.names import CONFIGMAP_MOUNT, Reason
from finetune_api.pod import RunConfig
from finetune_api.status import Resolved, Stage

from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import Restored, restore
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.inputs import Inputs, RestoredCheckpoint
from finetune_trainer.storage.base import sha256_file
from finetune_trainer.storage.fetch import Fetcher, digest_of, fingerprint
from finetune_trainer.storage.preflight import preflight

if TYPE_CHECKING:
    from finetune_trainer.supervisor.board import Board

log = logging.getLogger(__name__)
T = TypeVar("T")
BUSY_PAUSES = (1.0, 2.0, 4.0, 8.0)
NUMBERS = ("model", "method", "trainer", "dataset", "training", "evaluation")
BESIDE = (
    "batchSizePerDevice", "gradientAccumulationSteps", "learningRate", "gradientCheckpointing", "storage", "tokenSecretRef",
)  # fmt: skip
"""What an attempt may change and is told by itself, and how sources are reached."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes")


class Preparation:
    """Fetches and checks for one pod; `run` returns what the ranks need and what the uploader must know."""

    def __init__(self, run: RunConfig, config_sha256: str, work: Path, board: Board, *, node_rank: int = 0) -> None:
        self._run, self._sha256, self._work, self._board, self._node_rank = run, config_sha256, work, board, node_rank
        self._bytes = 0

    def preflight(self) -> None:
        """Is the job's own root usable? Errors: 67, 69, 77."""
        self._timed("preflight", self._preflight)

    def _preflight(self) -> None:
        abilities = self._patiently(lambda: preflight(self._run.storage, write=self._node_rank == 0))
        if self._node_rank == 0:
            self._board.resolve(Resolved(storage=abilities.to_wire()))
            if not abilities.can_delete:
                self._board.note("storage: s3:DeleteObject is not granted; old checkpoints stay")

    def _patiently(self, ask: Callable[[], T]) -> T:
        """A store that answers, and is busy, is asked again; what is set up wrongly, or does not answer, is told at once."""
        for pause in BUSY_PAUSES:
            try:
                return ask()
            except StorageError as error:
                if error.code != "StorageFailed":
                    raise
                log.warning("storage is busy, asked again in %.0f s: %s", pause, error)
                time.sleep(pause)
        return ask()

    def fetch(self) -> tuple[Inputs, RunFacts]:
        """Bring everything to local disk and check the rows. Errors: 64, 65, 66, 67, 69, 77."""
        self._board.stage(Stage.DOWNLOADING)
        inputs = self._timed("fetch", self._fetch)
        self._board.stage(Stage.CHECKING)
        self._timed("check", lambda: self._check(inputs))
        facts = facts_of(self._run, self._sha256, inputs)
        return inputs, facts

    def restore(self, tree: Tree, facts: RunFacts) -> Restored:
        """The checkpoint to go on from. Errors: 64 CheckpointIncompatible, 73."""
        self._board.stage(Stage.RESTORING)
        found = self._timed(
            "restore",
            lambda: restore(
                tree, self._run.resume, facts, self._work / "output", count=self._count, attempt=self._run.attempt
            ),
        )
        for sentence in found.damaged:
            self._board.problem(Reason.CHECKPOINT_DAMAGED, sentence)
            self._board.note(f"passed over: {sentence}")  # stays when the next commit has made the condition well again
        if found.manifest is not None:
            self._board.resumed_from_step = found.step
            self._board.resolve(Resolved(resume_exact=found.exact, resume_note=found.note))
        return found

    def _fetch(self) -> Inputs:
        spec, fetcher = self._run.spec, Fetcher(self._run, self._work, count=self._count)
        data = spec.dataset
        source = spec.model.source or ""
        model = fetcher.model(source, "model.source", "model")
        tokenizer = spec.model.tokenizer
        adapter = spec.method.adapter.source if spec.method.adapter else None
        reference = spec.trainer.dpo.reference_model if spec.trainer.dpo else None
        train = fetcher.data(data.train, "dataset.train", "train") if data.train else []
        mixture = [
            fetcher.data(item.source, f"dataset.mixture[{number}].source", f"mixture-{number}")
            for number, item in enumerate(data.mixture or [])
        ]
        return Inputs(
            model=model.path,
            tokenizer=fetcher.model(tokenizer, "model.tokenizer", "tokenizer").path
            if tokenizer and tokenizer != source
            else None,
            adapter=fetcher.model(adapter, "method.adapter.source", "adapter").path if adapter else None,
            reference=fetcher.model(reference, "trainer.dpo.referenceModel", "reference").path if reference else None,
            train=train,
            mixture=mixture,
            validation=fetcher.data(data.validation, "dataset.validation", "validation") if data.validation else [],
            test=fetcher.data(data.test, "dataset.test", "test") if data.test else [],
            model_revision=model.revision or fingerprint(model.path),
            dataset_digest=digest_of([*train, *(file for part in mixture for file in part)], sha256_file),
            output_dir=self._work / "output",
            config_maps=Path(CONFIGMAP_MOUNT),
        )

    def _check(self, inputs: Inputs) -> None:
        from finetune_trainer.data import check_files  # reads rows; imports neither torch nor transformers

        summary = check_files(self._run, inputs)
        for note in summary.notes:
            self._board.note(note)
        self._board.resolve(
            Resolved(
                model_revision=inputs.model_revision,
                dataset_digest=inputs.dataset_digest,
                dataset_rows=summary.rows.get("train"),
                dataset_format=str(summary.format),
            )
        )

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return work()
        finally:
            self._board.timing(name, time.monotonic() - started)

    def _count(self, count: int) -> None:
        self._bytes += count
        self._board.stage(self._board.current_stage, f"{self._bytes / 1e6:.0f} MB")


def with_restored(inputs: Inputs, found: Restored) -> Inputs:
    """The inputs with the checkpoint to resume from."""
    if found.manifest is None or found.path is None:
        return inputs
    restored = RestoredCheckpoint(path=found.path, step=found.step, uri=found.uri, manifest=found.manifest.to_wire())
    return inputs.model_copy(update={"restore": restored})


def facts_of(run: RunConfig, config_sha256: str, inputs: Inputs) -> RunFacts:
    """What this run is, for comparison with what a checkpoint was made by."""
    training = run.spec.training
    micro, accumulation = training.batch_size_per_device or 1, training.gradient_accumulation_steps or 1
    return RunFacts(
        model_revision=inputs.model_revision,
        dataset_digest=inputs.dataset_digest,
        method=str(run.spec.method.type or ""),
        trainer=str(run.spec.trainer.type or ""),
        strategy=str(run.spec.distributed.strategy or ""),
        seed=training.seed or 0,
        world_size=run.world.size,
        micro_batch=micro,
        accumulation=accumulation,
        effective_batch=micro * accumulation * run.world.size,
        learning_rate=training.learning_rate,
        settings=settings_of(run),
        beside=beside_of(inputs),
        config_sha256=config_sha256,
        versions=versions(),
    )


def settings_of(run: RunConfig) -> dict[str, str]:
    """A short hash of each group of the spec that decides what numbers come out, without what is compared by itself."""
    spec = run.spec.to_wire()
    found = {}
    for group in NUMBERS:
        value = {name: one for name, one in (spec.get(group) or {}).items() if name not in BESIDE}
        found[group] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    return found


def beside_of(inputs: Inputs) -> dict[str, str]:
    """A hash of everything else that was read, by what it is called in a sentence."""
    models = {"tokenizer": inputs.tokenizer, "reference model": inputs.reference, "adapter": inputs.adapter}
    found = {word: fingerprint(folder) for word, folder in models.items() if folder is not None}
    files = {"validation data": inputs.validation, "contents of ConfigMaps": _mounted(inputs.config_maps)}
    return found | {word: digest_of(paths, sha256_file) for word, paths in files.items() if paths}


def _mounted(folder: Path) -> list[Path]:
    """Files of mounted ConfigMaps: a mount's own folders, whose names begin with two dots, hold each of them once more."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not any(part.startswith("..") for part in path.relative_to(folder).parts)]


def versions() -> dict[str, str]:
    """Versions of the packages that decide what numbers come out, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an image may leave out what its jobs never use
            continue
    return found
