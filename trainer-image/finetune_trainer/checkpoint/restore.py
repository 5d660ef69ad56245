"""Finds and downloads the newest committed checkpoint that is complete, undamaged and belongs to this run.

A checkpoint is downloaded only if this job committed it (`why_not_trusted`). Every byte is hashed during the download, and the hash is
compared with the manifest. A damaged or forged checkpoint is reported, and the previous checkpoint is tried. If the job had made progress and no
checkpoint can be loaded, the pod exits with 73 instead of starting from zero. A checkpoint is used even if it is not marked healthy: the pod may
have ended before it could set the mark, and a checkpoint is only saved if its own loss is finite. After a rollback, checkpoints later than
`resume.maxStep` are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.errors import ConfigError, NoCheckpointError
from finetune_api.lineage import TRAINING_IMAGES
from finetune_api.names import Storage
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_api.rules.training import PICKLING_STRATEGIES
from finetune_api.sources import redact_source
from finetune_api.spec.enums import StrategyType

from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, RunFacts, prefix_of, step_of
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.storage.base import ByteCounter, join
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import split_query

DOWNLOAD_THREADS = 4
LARGE_FILE_BYTES = 32 << 20
"""Files above this size are downloaded one at a time."""


@dataclass
class RestoreResult:
    """The result of a restore. `checkpoint` is None if the run starts from zero."""

    checkpoint: CommittedCheckpoint | None = None
    manifest: Manifest | None = None
    path: Path | None = None
    uri: str = ""
    is_exact: bool = True
    """Whether the resumed run equals an uninterrupted run bit by bit."""
    inexact_reason: str | None = None
    """Why the resumed run differs from an uninterrupted run; None if `is_exact`."""
    changed_inputs: list[str] = field(default_factory=list)
    """Inputs other than model and training data that have changed since the checkpoint, such as `validation data`."""
    damage_messages: list[str] = field(default_factory=list)
    """One sentence for each damaged checkpoint, with the object's address."""
    ancestor_checkpoints: list[CommittedCheckpoint] = field(default_factory=list)
    """The job's own checkpoints up to the restored step."""
    skipped_checkpoints: list[CommittedCheckpoint] = field(default_factory=list)
    """The job's own checkpoints after the restored step: damaged, or later than the step of a rollback."""

    @property
    def step(self) -> int:
        """Step from which the run continues, or 0 without a checkpoint."""
        return self.manifest.step if self.manifest else 0


def restore(
    tree: CheckpointTree, resume_config: ResumeConfig, facts: RunFacts, target: Path, *, is_wanted: Callable[[str], bool] = lambda path: True,
    byte_counter: ByteCounter | None = None, attempt: int | None = None,
) -> RestoreResult:  # fmt: skip
    """Find, check and download the checkpoint to resume from.

    `is_wanted` selects the files that this pod needs; `attempt` is the attempt that this pod belongs to. A URI in `checkpoint.resume`
    is only used while the job has no checkpoints of its own. The operator may not know the job's own checkpoints: if a queue
    reclaims the quota of a running job, the same attempt starts again later.

    Errors: NoCheckpointError with code `NoLoadableCheckpoint` if the job has made progress and no checkpoint can be loaded. ConfigError
    with code `CheckpointIncompatible` if the newest undamaged checkpoint belongs to a different run; its message names the difference.
    """
    own_checkpoints, unreadable_steps = tree.list_committed_and_damaged()
    result = RestoreResult(skipped_checkpoints=own_checkpoints)
    if resume_config.max_step is None:
        candidates = own_checkpoints
    else:
        # Checkpoints of the attempts after the rollback remain candidates. Trainers before 0.2.0 only know that the current attempt is one
        # of these attempts.
        first_attempt = resume_config.rolled_back_attempt or attempt
        candidates = [
            one for one in own_checkpoints
            if (one.step or 0) <= resume_config.max_step or (first_attempt is not None and one.marker.attempt >= first_attempt)
        ]  # fmt: skip
        unreadable_steps = [step for step in unreadable_steps if step <= resume_config.max_step]
    result.damage_messages += [f"{tree.uri(join(prefix_of(step), Storage.COMMITTED))} is damaged" for step in unreadable_steps]
    if resume_config.mode not in ("auto", "never") and not candidates and not unreadable_steps:
        return _restore_named(resume_config.mode, facts, target, tree, is_wanted, byte_counter, result)
    for candidate in candidates:
        problem = why_not_trusted(tree, candidate, resume_config, facts.strategy)
        if problem is None:
            problem = _try_to_restore(tree, candidate, facts, target, result, is_wanted, byte_counter)
        if problem is None:
            result.ancestor_checkpoints = [one for one in own_checkpoints if (one.step or 0) <= result.step]
            result.skipped_checkpoints = [one for one in own_checkpoints if (one.step or 0) > result.step]
            return result
        result.damage_messages.append(problem)
    if candidates or unreadable_steps or resume_config.expect_step > 0:
        reasons = "; ".join(result.damage_messages) or "storage holds no checkpoint"
        reached_step = resume_config.expect_step or max([*(one.step or 0 for one in candidates), *unreadable_steps])
        raise NoCheckpointError(
            "NoLoadableCheckpoint", f"the job had reached step {reached_step}, and no checkpoint can be loaded: {reasons}",
            hint="restore the objects. Or create a new FineTuneJob: checkpoint.resume with the address of a checkpoint that you trust continues there; "
            "without it, the training starts again",
        )  # fmt: skip
    return result


def why_not_trusted(tree: CheckpointTree, candidate: CommittedCheckpoint, resume_config: ResumeConfig, strategy: str) -> str | None:
    """Why a checkpoint in the job's own folder may be forged, or None. Nothing of it is downloaded before.

    The operator knows the manifests of the checkpoints in the status. A newer checkpoint is trusted if it is signed with the job's key. Without a
    key, and for strategies whose checkpoints contain no code, a newer checkpoint is trusted in any case, so that no progress is lost.
    """
    address, sha256 = tree.uri(candidate.folder), candidate.marker.manifest_sha256
    known_sha256 = resume_config.known_checkpoints.get("/".join(candidate.folder.split("/")[-2:]))
    if known_sha256 is not None:
        if known_sha256 == sha256:
            return None
        return f"{address} is not the checkpoint that this job committed: its manifest has sha256 {sha256}, but the job's status has {known_sha256}"
    if strategy in PICKLING_STRATEGIES and tree.is_signing and not tree.is_signed(candidate):
        return f"{address} is neither in the job's status nor signed by this job, and a forged checkpoint of {strategy} can run code"
    return None


def _try_to_restore(
    tree: CheckpointTree, candidate: CommittedCheckpoint, facts: RunFacts, target: Path, result: RestoreResult, is_wanted: Callable[[str], bool],
    byte_counter: ByteCounter | None,
) -> str | None:  # fmt: skip
    """Download one checkpoint and fill `result`; returns why the checkpoint cannot be used, or None."""
    manifest = tree.read_manifest(candidate)
    if manifest is None:
        return (
            f"{tree.uri(join(candidate.folder, Storage.MANIFEST))} is missing or is not the manifest that was committed"
        )
    check_compatible(manifest.facts, facts, tree.uri(candidate.folder))
    folder = target / f"checkpoint-{manifest.step}"
    problem = fetch_verified(tree, candidate.folder, manifest, folder, is_wanted, byte_counter)
    if problem is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return problem
    result.checkpoint, result.manifest, result.path = candidate, manifest, folder
    result.uri, result.inexact_reason = tree.uri(candidate.folder), inexact_reason(manifest.facts, facts)
    result.is_exact, result.changed_inputs = result.inexact_reason is None, changed_inputs(manifest.facts, facts)
    return None


def open_other_job(tree: CheckpointTree, root: str) -> CheckpointTree:
    """Open the folder of another job. If it is in S3, this job's storage connection is used to read it."""
    own_store = getattr(tree.store, "target", None)
    if own_store and root.startswith("s3://"):
        return CheckpointTree(open_store(own_store.model_copy(update={"uri": root})))
    return CheckpointTree(open_store(StoreTarget(uri=root, ca_bundle=own_store.ca_bundle if own_store else None)))


def _restore_named(
    uri: str, facts: RunFacts, target: Path, tree: CheckpointTree, is_wanted: Callable[[str], bool], byte_counter: ByteCounter | None,
    result: RestoreResult,
) -> RestoreResult:  # fmt: skip
    """Restore the checkpoint at the URI in `checkpoint.resume`. The URI names the folder of a step or of one incarnation of a step."""
    root, folder, step = _parse_checkpoint_uri(uri)
    other_tree = open_other_job(tree, root)
    candidate = other_tree.get_committed(step)
    uri = redact_source(uri)
    if candidate is None or not (folder == "" or folder == candidate.marker.path):
        raise NoCheckpointError(
            "CheckpointNotFound", f"checkpoint.resume is {uri}, and there is no committed checkpoint at this address",
            hint="write the uri of a folder step-... that holds a _COMMITTED object",
        )  # fmt: skip
    problem = _try_to_restore(other_tree, candidate, facts, target, result, is_wanted, byte_counter)
    if problem is not None:
        raise NoCheckpointError(
            "NoLoadableCheckpoint", f"checkpoint.resume is {uri}, and this checkpoint is damaged: {problem}"
        )
    return result


def _parse_checkpoint_uri(uri: str) -> tuple[str, str, int]:
    """Return the root (with the query of a web address), the incarnation's folder (empty if the URI does not name it) and step."""
    address, query = split_query(uri)
    parts = address.rstrip("/").split("/")
    for index in range(len(parts) - 1, 0, -1):
        step = step_of(parts[index])
        if step is not None and parts[index - 1] == Storage.CHECKPOINTS:
            return "/".join(parts[: index - 1]) + query, "/".join(parts[index + 1 :]), step
    raise ConfigError(
        "ResumeInvalid", f"checkpoint.resume is {redact_source(uri)!r}, which does not name a checkpoint",
        hint="write auto, never or <root>/checkpoints/step-00000100",
    )  # fmt: skip


def fetch_verified(
    tree: CheckpointTree,
    folder: str,
    manifest: Manifest,
    target: Path,
    is_wanted: Callable[[str], bool],
    byte_counter: ByteCounter | None = None,
) -> str | None:
    """Download the wanted files and compare them with the manifest; returns the first difference, or None.

    A file that differs is removed from the disk.
    """

    def fetch(entry: FileEntry) -> str | None:
        key = join(folder, entry.path)
        sha256 = tree.store.download(key, target / entry.path, byte_counter=byte_counter)
        if sha256 is None:
            return f"{tree.uri(key)} is missing"
        if sha256 != entry.sha256:
            (target / entry.path).unlink()
            return f"{tree.uri(key)} is damaged: its sha256 differs from the manifest"
        return None

    outside_paths = [entry.path for entry in manifest.files if not is_inside(entry.path)]
    if outside_paths:
        return f"{tree.uri(join(folder, Storage.MANIFEST))} lists {outside_paths[0]!r}, which is not a path inside the checkpoint"
    target.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in manifest.files if is_wanted(entry.path)]
    large_entries = [entry for entry in entries if entry.size > LARGE_FILE_BYTES]
    small_entries = [entry for entry in entries if entry.size <= LARGE_FILE_BYTES]
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
        problems = [problem for problem in pool.map(fetch, small_entries) if problem]
    # Large files are downloaded one at a time, because each download holds several ranges of the file in memory.
    problems += [problem for problem in map(fetch, large_entries) if problem]
    return problems[0] if problems else None


def is_inside(path: str) -> bool:
    """Whether a path of a manifest stays inside the checkpoint's folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and not any(part in ("", ".", "..") for part in parts)


MUST_MATCH = {
    "model_revision": "base model",
    "dataset_digest": "training data",
    "method": "method",
    "trainer": "objective",
    "effective_batch": "effective batch",
}


INPUTS_THAT_MUST_MATCH = ("tokenizer", "reference model", "adapter", TRAINING_IMAGES)
"""Inputs whose contents must not have changed since the checkpoint was made."""


def check_compatible(saved_facts: RunFacts, run_facts: RunFacts, uri: str) -> None:
    """Check that the run may continue from a checkpoint. `saved_facts` are the facts in the checkpoint, `run_facts` those of this run.

    Errors: ConfigError `CheckpointIncompatible` if the resumed run would train something different.
    """
    for name, word in MUST_MATCH.items():
        saved_value, run_value = getattr(saved_facts, name), getattr(run_facts, name)
        if saved_value and run_value and saved_value != run_value:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {word}: {saved_value} in the checkpoint, {run_value} in this run",
                hint="restore the earlier value, or write checkpoint.resume: never to start again",
            )  # fmt: skip
    for word in INPUTS_THAT_MUST_MATCH:
        saved_value, run_value = saved_facts.other_inputs.get(word), run_facts.other_inputs.get(word)
        if saved_value and run_value and saved_value != run_value:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {word}: the contents of its source have changed since",
                hint="restore the earlier contents, or write checkpoint.resume: never to start again",
            )  # fmt: skip
    uses_deepspeed = StrategyType.DEEPSPEED in (saved_facts.strategy, run_facts.strategy)
    if uses_deepspeed and (saved_facts.world_size != run_facts.world_size or saved_facts.strategy != run_facts.strategy):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {saved_facts.strategy} on {saved_facts.world_size} ranks, "
            f"this run uses {run_facts.strategy} on {run_facts.world_size}: DeepSpeed cannot split its optimizer state for another number of ranks or strategy",
            hint="use the same strategy and number of ranks, or fsdp",
        )  # fmt: skip
    if saved_facts.strategy and run_facts.strategy and (saved_facts.strategy == StrategyType.FSDP) != (run_facts.strategy == StrategyType.FSDP):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {saved_facts.strategy}, this run uses {run_facts.strategy}: fsdp stores the optimizer's state in another form",
            hint="use the same strategy, or start from the checkpoint's weights: write its folder in model.source or method.adapter.source",
        )  # fmt: skip


def changed_inputs(saved_facts: RunFacts, run_facts: RunFacts) -> list[str]:
    """Return the inputs whose contents have changed since the checkpoint was made. Added and removed inputs are not compared."""
    return [name for name, value in run_facts.other_inputs.items() if saved_facts.other_inputs.get(name, value) != value]


def inexact_reason(saved_facts: RunFacts, run_facts: RunFacts) -> str | None:
    """Return why the resumed run will differ from an uninterrupted run, or None if both will be equal bit by bit."""
    if saved_facts.world_size != run_facts.world_size:
        ranks = f"{saved_facts.world_size} ranks made the checkpoint, and {run_facts.world_size} ranks resume"
        return f"{ranks}: the data and batches are the same, the random numbers differ"
    if saved_facts.micro_batch != run_facts.micro_batch:
        return "the batch is split differently: the data is the same, but sums are computed in another order"
    if saved_facts.learning_rate is not None and saved_facts.learning_rate != run_facts.learning_rate:
        return (
            f"learningRate was {saved_facts.learning_rate:g} until the checkpoint and is {run_facts.learning_rate:g} from there on"
        )
    settings = [group for group, value in run_facts.settings.items() if saved_facts.settings.get(group, value) != value]
    if settings:
        return f"the checkpoint was made with other settings in {', '.join(settings)}"
    if inputs := changed_inputs(saved_facts, run_facts):
        return f"the checkpoint was made with other {', '.join(inputs)}"
    changed_packages = [name for name, version in run_facts.versions.items() if saved_facts.versions.get(name, version) != version]
    if changed_packages:
        changes = (f"{name} {saved_facts.versions[name]} -> {run_facts.versions[name]}" for name in changed_packages)
        return f"the checkpoint was made with other versions: {', '.join(changes)}"
    return None
