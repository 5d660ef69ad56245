"""Finds and downloads the newest committed checkpoint that is complete, undamaged and belongs to this run.

A checkpoint is downloaded only if it is trusted (`find_reason_for_distrust`). Every file is hashed during the download, and the hash is
compared with the manifest. A damaged or forged checkpoint is reported, and the previous checkpoint is tried. If the job had made progress and no
checkpoint can be loaded, the pod exits with 73 instead of starting from zero. A checkpoint is used even if it is not marked healthy, because the pod that
saved it may have ended before it could set the mark. A checkpoint whose loss is not finite is never saved. After a rollback, checkpoints later than
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

from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, RunFacts, checkpoint_folder_key, parse_step
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.storage.base import ByteCounter, join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import split_query

DOWNLOAD_THREADS = 4
LARGE_FILE_BYTES = 32 << 20
"""Files above this size are downloaded one at a time."""


@dataclass
class RestoreResult:
    """What a restore has found and downloaded. `checkpoint` is None if the run starts from zero."""

    checkpoint: CommittedCheckpoint | None = None
    manifest: Manifest | None = None
    local_folder: Path | None = None
    uri: str = ""
    is_exact: bool = True
    """Whether the resumed run equals an uninterrupted run bit by bit."""
    inexact_reason: str | None = None
    """Why the resumed run differs from an uninterrupted run; None if `is_exact`."""
    changed_inputs: list[str] = field(default_factory=list)
    """Names of inputs that have changed since the checkpoint, such as `validation data`. Base model and training data are never among them."""
    damage_messages: list[str] = field(default_factory=list)
    """One message for each checkpoint that is damaged or not trusted, with the address of the object."""
    ancestor_checkpoints: list[CommittedCheckpoint] = field(default_factory=list)
    """The job's own checkpoints up to the restored step."""
    skipped_checkpoints: list[CommittedCheckpoint] = field(default_factory=list)
    """The job's own checkpoints after the restored step. Each of them is damaged or not trusted, or it is later than the step of a rollback."""

    @property
    def step(self) -> int:
        """The step from which the run continues; 0 without a checkpoint."""
        return self.manifest.step if self.manifest else 0


def restore(
    tree: CheckpointTree, resume_config: ResumeConfig, run_facts: RunFacts, checkpoints_folder: Path, *, is_wanted: Callable[[str], bool] = lambda path: True,
    byte_counter: ByteCounter | None = None, attempt: int | None = None,
) -> RestoreResult:  # fmt: skip
    """Find, check and download the checkpoint to resume from.

    `is_wanted` selects by path the files that this pod needs; `attempt` is the number of this pod's attempt. A URI in `checkpoint.resume`
    is used only while the job has no checkpoints of its own. This function lists the job's own checkpoints in storage, because the operator may not
    know the newest checkpoint. For example, a queue may reclaim the quota of a running job and start the same attempt again later.

    Errors: NoCheckpointError with code `NoLoadableCheckpoint` if the job has made progress and no checkpoint can be loaded. ConfigError
    with code `CheckpointIncompatible` if the newest undamaged checkpoint belongs to a different run; the error's message names the difference.
    """
    own_checkpoints, unreadable_steps = tree.list_committed_and_damaged()
    restore_result = RestoreResult(skipped_checkpoints=own_checkpoints)
    if resume_config.max_step is None:
        candidates = own_checkpoints
    else:
        # Checkpoints of attempts that began after the rollback remain candidates. If `run.json` does not name the first of these attempts, only the
        # current attempt is known to have begun after the rollback.
        first_attempt = resume_config.rolled_back_attempt or attempt
        candidates = [
            checkpoint for checkpoint in own_checkpoints
            if (checkpoint.step or 0) <= resume_config.max_step or (first_attempt is not None and checkpoint.marker.attempt >= first_attempt)
        ]  # fmt: skip
        unreadable_steps = [step for step in unreadable_steps if step <= resume_config.max_step]
    restore_result.damage_messages += [f"{tree.uri(join_key(checkpoint_folder_key(step), Storage.COMMITTED))} is damaged" for step in unreadable_steps]
    if resume_config.mode not in ("auto", "never") and not candidates and not unreadable_steps:
        return _restore_from_uri(resume_config.mode, run_facts, checkpoints_folder, tree, is_wanted, byte_counter, restore_result)
    for candidate in candidates:
        problem = find_reason_for_distrust(tree, candidate, resume_config, run_facts.strategy)
        if problem is None:
            problem = _try_to_restore(tree, candidate, run_facts, checkpoints_folder, restore_result, is_wanted, byte_counter)
        if problem is None:
            restore_result.ancestor_checkpoints = [checkpoint for checkpoint in own_checkpoints if (checkpoint.step or 0) <= restore_result.step]
            restore_result.skipped_checkpoints = [checkpoint for checkpoint in own_checkpoints if (checkpoint.step or 0) > restore_result.step]
            return restore_result
        restore_result.damage_messages.append(problem)
    if candidates or unreadable_steps or resume_config.expect_step > 0:
        reasons = "; ".join(restore_result.damage_messages) or "storage holds no checkpoint"
        reached_step = resume_config.expect_step or max([*(candidate.step or 0 for candidate in candidates), *unreadable_steps])
        raise NoCheckpointError(
            "NoLoadableCheckpoint", f"the job had reached step {reached_step}, and no checkpoint can be loaded: {reasons}",
            hint="restore the objects in storage, or create a new FineTuneJob, which continues from the checkpoint that its checkpoint.resume names "
            "(name one that you trust); without checkpoint.resume, the new job starts at step 0",
        )  # fmt: skip
    return restore_result


def find_reason_for_distrust(tree: CheckpointTree, candidate: CommittedCheckpoint, resume_config: ResumeConfig, strategy: str) -> str | None:
    """Return why a checkpoint in the job's own folder may be forged, or None if it is trusted. Only trusted checkpoints are downloaded.

    `known_checkpoints` has the sha256 of the manifest of each checkpoint in the job's status. A checkpoint that is not in the status is trusted if it is
    signed with the job's key. Without a key, or if the strategy's checkpoints cannot contain code, a checkpoint that is not in the status is always
    trusted, so that no progress is lost.
    """
    uri, sha256 = tree.uri(candidate.folder), candidate.marker.manifest_sha256
    known_sha256 = resume_config.known_checkpoints.get("/".join(candidate.folder.split("/")[-2:]))
    if known_sha256 is not None:
        if known_sha256 == sha256:
            return None
        return f"{uri} is not the checkpoint that this job committed: its manifest has sha256 {sha256}, but the job's status has {known_sha256}"
    if strategy in PICKLING_STRATEGIES and tree.can_sign and not tree.is_signed(candidate):
        return f"{uri} is neither in the job's status nor signed by this job, and a forged checkpoint of {strategy} can run code"
    return None


def _try_to_restore(
    tree: CheckpointTree, candidate: CommittedCheckpoint, run_facts: RunFacts, checkpoints_folder: Path, restore_result: RestoreResult,
    is_wanted: Callable[[str], bool], byte_counter: ByteCounter | None,
) -> str | None:  # fmt: skip
    """Download one checkpoint and fill in `restore_result`. Return why the checkpoint cannot be used, or None if it was restored."""
    manifest = tree.read_manifest(candidate)
    if manifest is None:
        return (
            f"{tree.uri(join_key(candidate.folder, Storage.MANIFEST))} is missing or is not the manifest that was committed"
        )
    check_compatible(manifest.facts, run_facts, tree.uri(candidate.folder))
    folder = checkpoints_folder / f"checkpoint-{manifest.step}"
    problem = fetch_verified(tree, candidate.folder, manifest, folder, is_wanted, byte_counter)
    if problem is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return problem
    restore_result.checkpoint, restore_result.manifest, restore_result.local_folder = candidate, manifest, folder
    restore_result.uri, restore_result.inexact_reason = tree.uri(candidate.folder), find_inexact_reason(manifest.facts, run_facts)
    restore_result.is_exact, restore_result.changed_inputs = restore_result.inexact_reason is None, find_changed_inputs(manifest.facts, run_facts)
    return None


def open_other_job(tree: CheckpointTree, job_uri: str) -> CheckpointTree:
    """Open the folder of another job. A folder in S3 is read with the storage connection of this job."""
    own_target = getattr(tree.store, "target", None)
    if own_target and job_uri.startswith("s3://"):
        return CheckpointTree(open_store(own_target.model_copy(update={"uri": job_uri})))
    return CheckpointTree(open_store(StoreTarget(uri=job_uri, ca_bundle=own_target.ca_bundle if own_target else None)))


def _restore_from_uri(
    uri: str, run_facts: RunFacts, checkpoints_folder: Path, tree: CheckpointTree, is_wanted: Callable[[str], bool], byte_counter: ByteCounter | None,
    restore_result: RestoreResult,
) -> RestoreResult:  # fmt: skip
    """Restore the checkpoint at the URI in `checkpoint.resume`. The URI names the folder of a step or of one incarnation of a step."""
    job_uri, incarnation_folder, step = _parse_checkpoint_uri(uri)
    other_tree = open_other_job(tree, job_uri)
    candidate = other_tree.get_committed(step)
    uri = redact_source(uri)
    if candidate is None or not (incarnation_folder == "" or incarnation_folder == candidate.marker.path):
        raise NoCheckpointError(
            "CheckpointNotFound", f"checkpoint.resume is {uri}, and there is no committed checkpoint at this address",
            hint="write the URI of a folder step-... that holds a _COMMITTED object",
        )  # fmt: skip
    problem = _try_to_restore(other_tree, candidate, run_facts, checkpoints_folder, restore_result, is_wanted, byte_counter)
    if problem is not None:
        raise NoCheckpointError(
            "NoLoadableCheckpoint", f"checkpoint.resume is {uri}, and this checkpoint is damaged: {problem}"
        )
    return restore_result


def _parse_checkpoint_uri(uri: str) -> tuple[str, str, int]:
    """Return the root (a web address keeps its query), the incarnation's folder (empty if the URI does not name an incarnation) and the step."""
    address, query = split_query(uri)
    uri_parts = address.rstrip("/").split("/")
    for index in range(len(uri_parts) - 1, 0, -1):
        step = parse_step(uri_parts[index])
        if step is not None and uri_parts[index - 1] == Storage.CHECKPOINTS:
            return "/".join(uri_parts[: index - 1]) + query, "/".join(uri_parts[index + 1 :]), step
    raise ConfigError(
        "ResumeInvalid", f"checkpoint.resume is {redact_source(uri)!r}, which does not name a checkpoint",
        hint="write auto, never or <root>/checkpoints/step-00000100",
    )  # fmt: skip


def fetch_verified(
    tree: CheckpointTree,
    folder_key: str,
    manifest: Manifest,
    target_folder: Path,
    is_wanted: Callable[[str], bool],
    byte_counter: ByteCounter | None = None,
) -> str | None:
    """Download the wanted files and compare them with the manifest. Return the first problem, or None if there is none.

    A file that differs from the manifest is removed from the disk.
    """

    def fetch(entry: FileEntry) -> str | None:
        key = join_key(folder_key, entry.path)
        sha256 = tree.store.download(key, target_folder / entry.path, byte_counter=byte_counter)
        if sha256 is None:
            return f"{tree.uri(key)} is missing"
        if sha256 != entry.sha256:
            (target_folder / entry.path).unlink()
            return f"{tree.uri(key)} is damaged: its sha256 differs from the manifest"
        return None

    outside_paths = [entry.path for entry in manifest.files if not is_path_inside_checkpoint(entry.path)]
    if outside_paths:
        return f"{tree.uri(join_key(folder_key, Storage.MANIFEST))} lists {outside_paths[0]!r}, which is not a path inside the checkpoint"
    target_folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in manifest.files if is_wanted(entry.path)]
    large_entries = [entry for entry in entries if entry.size > LARGE_FILE_BYTES]
    small_entries = [entry for entry in entries if entry.size <= LARGE_FILE_BYTES]
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
        problems = [problem for problem in pool.map(fetch, small_entries) if problem]
    # Large files are downloaded one at a time, because each download holds several ranges of the file in memory.
    problems += [problem for problem in map(fetch, large_entries) if problem]
    return problems[0] if problems else None


def is_path_inside_checkpoint(path: str) -> bool:
    """Whether a path in a manifest names a file inside the checkpoint's folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and not any(part in ("", ".", "..") for part in parts)


FACTS_THAT_MUST_MATCH = {
    "model_revision": "base model",
    "dataset_digest": "training data",
    "method": "method",
    "trainer": "objective",
    "effective_batch": "effective batch",
}
"""Facts that a resumed run must not change, with their names in messages."""
INPUTS_THAT_MUST_MATCH = ("tokenizer", "reference model", "adapter", TRAINING_IMAGES)
"""Inputs whose contents a resumed run must not change."""


def check_compatible(saved_facts: RunFacts, run_facts: RunFacts, uri: str) -> None:
    """Check that the run may continue from a checkpoint. `saved_facts` are the facts in the checkpoint, `run_facts` those of this run.

    Errors: ConfigError `CheckpointIncompatible` if the two runs differ in a fact or input that a resumed run must not change.
    """
    for name, shown_name in FACTS_THAT_MUST_MATCH.items():
        saved_value, run_value = getattr(saved_facts, name), getattr(run_facts, name)
        if saved_value and run_value and saved_value != run_value:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {shown_name}: {saved_value} in the checkpoint, {run_value} in this run",
                hint="restore the earlier value, or write checkpoint.resume: never to start again",
            )  # fmt: skip
    for input_name in INPUTS_THAT_MUST_MATCH:
        saved_value, run_value = saved_facts.other_inputs.get(input_name), run_facts.other_inputs.get(input_name)
        if saved_value and run_value and saved_value != run_value:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {input_name}: the contents of its source have changed since the checkpoint",
                hint="restore the earlier contents, or write checkpoint.resume: never to start again",
            )  # fmt: skip
    uses_deepspeed = StrategyType.DEEPSPEED in (saved_facts.strategy, run_facts.strategy)
    if uses_deepspeed and (saved_facts.world_size != run_facts.world_size or saved_facts.strategy != run_facts.strategy):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {saved_facts.strategy} on {saved_facts.world_size} ranks, but "
            f"this run uses {run_facts.strategy} on {run_facts.world_size}: DeepSpeed cannot split its optimizer state for another number of ranks or strategy",
            hint="use the same strategy and number of ranks, or fsdp",
        )  # fmt: skip
    if saved_facts.strategy and run_facts.strategy and (saved_facts.strategy == StrategyType.FSDP) != (run_facts.strategy == StrategyType.FSDP):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {saved_facts.strategy}, but this run uses {run_facts.strategy}: fsdp stores the optimizer's state in another form",
            hint="use the same strategy, or start from the checkpoint's weights: write its folder in model.source or method.adapter.source",
        )  # fmt: skip


def find_changed_inputs(saved_facts: RunFacts, run_facts: RunFacts) -> list[str]:
    """Return the names of the inputs whose contents have changed since the checkpoint. Added and removed inputs are not compared."""
    return [name for name, value in run_facts.other_inputs.items() if saved_facts.other_inputs.get(name, value) != value]


def find_inexact_reason(saved_facts: RunFacts, run_facts: RunFacts) -> str | None:
    """Return why the resumed run will differ from an uninterrupted run, or None if both will be equal bit by bit."""
    if saved_facts.world_size != run_facts.world_size:
        rank_change = f"{saved_facts.world_size} ranks made the checkpoint, and {run_facts.world_size} ranks resume"
        return f"{rank_change}: the data and batches are the same, but the random numbers differ"
    if saved_facts.micro_batch != run_facts.micro_batch:
        return "the batch is split into micro-batches of another size: the data is the same, but sums are computed in another order"
    if saved_facts.learning_rate is not None and saved_facts.learning_rate != run_facts.learning_rate:
        return (
            f"learningRate was {saved_facts.learning_rate:g} until the checkpoint and is {run_facts.learning_rate:g} from there on"
        )
    changed_settings = [field for field, value in run_facts.settings.items() if saved_facts.settings.get(field, value) != value]
    if changed_settings:
        return f"the checkpoint was made with other settings in {', '.join(changed_settings)}"
    if changed_inputs := find_changed_inputs(saved_facts, run_facts):
        return f"the checkpoint was made with other {', '.join(changed_inputs)}"
    changed_packages = [name for name, version in run_facts.versions.items() if saved_facts.versions.get(name, version) != version]
    if changed_packages:
        package_changes = (f"{name} {saved_facts.versions[name]} -> {run_facts.versions[name]}" for name in changed_packages)
        return f"the checkpoint was made with other versions: {', '.join(package_changes)}"
    return None
