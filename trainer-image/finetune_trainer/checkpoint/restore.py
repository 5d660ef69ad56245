"""Where an attempt starts: the newest committed checkpoint that is whole, right and belongs to this run.

Every byte is hashed while it comes down and compared with the manifest. A damaged checkpoint is named and the one before it
is tried. If progress existed and nothing loads, the pod ends with 73: never a silent start from zero. Health that is not
known yet (the pod died before the next window) does not keep a checkpoint out: its own window was finite, or it would not
have been committed; to go further back is what `resume.maxStep` is for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.errors import ConfigError, NoCheckpointError
from finetune_api.names import Storage
from finetune_api.pod import Resume
from finetune_api.sources import redact_source
from finetune_api.spec.enums import Strategy

from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, RunFacts, base_of, step_of
from finetune_trainer.checkpoint.tree import Committed, Tree
from finetune_trainer.storage.base import Counter, join
from finetune_trainer.storage.web import apart

THREADS = 4
LARGE = 32 << 20
"""Bytes from which a file is fetched by itself."""


@dataclass
class Restored:
    """What was found: the checkpoint (None: start from zero) and what had to be passed over."""

    committed: Committed | None = None
    manifest: Manifest | None = None
    path: Path | None = None
    uri: str = ""
    exact: bool = True
    note: str | None = None
    damaged: list[str] = field(default_factory=list)
    """One sentence for each checkpoint that did not verify, naming the object."""
    before: list[Committed] = field(default_factory=list)
    """The job's own checkpoints up to the one that was taken: this attempt goes on from them."""
    passed: list[Committed] = field(default_factory=list)
    """The job's own checkpoints that this attempt does not go on from: damaged, or behind a rollback."""

    @property
    def step(self) -> int:
        """Step to go on from; 0: from the start."""
        return self.manifest.step if self.manifest else 0


def restore(
    tree: Tree, resume: Resume, facts: RunFacts, target: Path, *, wanted: Callable[[str], bool] = lambda path: True,
    count: Counter | None = None, attempt: int | None = None,
) -> Restored:  # fmt: skip
    """Find, check and download. `wanted` says which files this pod needs, `attempt` which attempt it is a life of.

    What the job has committed itself comes before anything that `checkpoint.resume` says: that is how the job begins, and a life
    of it may end without the operator's knowing (a queue that takes back its quota starts the same attempt again).

    Errors: NoCheckpointError `NoLoadableCheckpoint` if there was progress and nothing loads; ConfigError
    `CheckpointIncompatible` if the newest whole checkpoint is of another run, naming the difference.
    """
    own, unreadable = tree.survey()
    result = Restored(passed=own)
    if resume.max_step is None:
        candidates = own
    else:
        # What this very attempt committed after the rollback, in another life, is its own past.
        candidates = [one for one in own if (one.step or 0) <= resume.max_step or one.marker.attempt == attempt]
        unreadable = [step for step in unreadable if step <= resume.max_step]
    result.damaged += [f"{tree.uri(join(base_of(step), Storage.COMMITTED))} is damaged" for step in unreadable]
    if resume.mode not in ("auto", "never") and not candidates and not unreadable:
        return _restore_named(resume.mode, facts, target, tree, wanted, count, result)
    for candidate in candidates:
        problem = _try(tree, candidate, facts, target, result, wanted, count)
        if problem is None:
            result.before = [one for one in own if (one.step or 0) <= result.step]
            result.passed = [one for one in own if (one.step or 0) > result.step]
            return result
        result.damaged.append(problem)
    if candidates or unreadable or resume.expect_step > 0:
        seen = "; ".join(result.damaged) or "storage holds none"
        reached = resume.expect_step or max([*(one.step or 0 for one in candidates), *unreadable])
        raise NoCheckpointError(
            "NoLoadableCheckpoint", f"the job had come to step {reached}, and no checkpoint can be loaded: {seen}",
            hint="restore the objects, or create a new FineTuneJob to start again",
        )  # fmt: skip
    return result


def _try(
    tree: Tree, candidate: Committed, facts: RunFacts, target: Path, result: Restored, wanted: Callable[[str], bool],
    count: Counter | None,
) -> str | None:  # fmt: skip
    """Fill `result` from one checkpoint; returns what is wrong with it, if anything is."""
    manifest = tree.manifest(candidate)
    if manifest is None:
        return f"{tree.uri(join(candidate.folder, Storage.MANIFEST))} is missing or not the one that was committed"
    exact, note = compatible(manifest.facts, facts, tree.uri(candidate.folder))
    folder = target / f"checkpoint-{manifest.step}"
    problem = fetch_verified(tree, candidate.folder, manifest, folder, wanted, count)
    if problem is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return problem
    result.committed, result.manifest, result.path = candidate, manifest, folder
    result.uri, result.exact, result.note = tree.uri(candidate.folder), exact, note
    return None


def _restore_named(
    uri: str, facts: RunFacts, target: Path, tree: Tree, wanted: Callable[[str], bool], count: Counter | None,
    result: Restored,
) -> Restored:  # fmt: skip
    """Resume from a checkpoint named by its uri: a step's folder, or the incarnation's inside it."""
    from finetune_api.pod import StoreTarget

    from finetune_trainer.storage.roots import open_store

    root, folder, step = _split(uri)
    origin = getattr(tree.store, "target", None)
    if origin and root.startswith("s3://"):
        there = origin.model_copy(update={"uri": root})
    else:
        there = StoreTarget(uri=root, ca_bundle=origin.ca_bundle if origin else None)
    other = Tree(open_store(there))
    candidate = other.marker(step)
    uri = redact_source(uri)
    if candidate is None or not (folder == "" or folder == candidate.marker.path):
        raise NoCheckpointError(
            "CheckpointNotFound", f"checkpoint.resume names {uri}, where no committed checkpoint is",
            hint="write the uri of a folder step-... that holds a _COMMITTED object",
        )  # fmt: skip
    problem = _try(other, candidate, facts, target, result, wanted, count)
    if problem is not None:
        raise NoCheckpointError("NoLoadableCheckpoint", f"checkpoint.resume names {uri}, which is damaged: {problem}")
    return result


def _split(uri: str) -> tuple[str, str, int]:
    """Root (with the query of a web address), incarnation's folder if it is named, and step."""
    place, query = apart(uri)
    parts = place.rstrip("/").split("/")
    for index in range(len(parts) - 1, 0, -1):
        step = step_of(parts[index])
        if step is not None and parts[index - 1] == Storage.CHECKPOINTS:
            return "/".join(parts[: index - 1]) + query, "/".join(parts[index + 1 :]), step
    raise ConfigError(
        "ResumeInvalid", f"checkpoint.resume is {redact_source(uri)!r}, which does not name a checkpoint",
        hint="write auto, never or <root>/checkpoints/step-00000100",
    )  # fmt: skip


def fetch_verified(
    tree: Tree,
    folder: str,
    manifest: Manifest,
    target: Path,
    wanted: Callable[[str], bool],
    count: Counter | None = None,
) -> str | None:
    """Download the wanted files and compare them with the manifest; returns what differs, naming the object."""

    def fetch(entry: FileEntry) -> str | None:
        key = join(folder, entry.path)
        found = tree.store.download(key, target / entry.path, count=count)
        if found is None:
            return f"{tree.uri(key)} is missing"
        return None if found == entry.sha256 else f"{tree.uri(key)} is damaged: its sha256 is not the manifest's"

    outside = [entry.path for entry in manifest.files if not is_inside(entry.path)]
    if outside:
        return (
            f"{tree.uri(join(folder, Storage.MANIFEST))} names {outside[0]!r}, which is no path inside the checkpoint"
        )
    target.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in manifest.files if wanted(entry.path)]
    large = [entry for entry in entries if entry.size > LARGE]
    small = [entry for entry in entries if entry.size <= LARGE]
    with ThreadPoolExecutor(THREADS) as pool:
        problems = [problem for problem in pool.map(fetch, small) if problem]
    # One after another: each is read in many ranges at once, which are held in memory.
    problems += [problem for problem in map(fetch, large) if problem]
    return problems[0] if problems else None


def is_inside(path: str) -> bool:
    """Whether a manifest's path stays below the checkpoint's folder."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and not any(part in ("", ".", "..") for part in parts)


MUST_MATCH = {
    "model_revision": "base model",
    "dataset_digest": "training data",
    "method": "method",
    "trainer": "objective",
    "effective_batch": "effective batch",
}


REPLACED = ("tokenizer", "reference model", "adapter")
"""Beside base model and data: with another one there, the rest of the run would learn something else."""


def compatible(found: RunFacts, now: RunFacts, uri: str) -> tuple[bool, str | None]:
    """Whether a resumed run will equal an undisturbed one bit by bit, and why not.

    Errors: ConfigError `CheckpointIncompatible` where going on would train something else without saying so.
    """
    for name, word in MUST_MATCH.items():
        before, after = getattr(found, name), getattr(now, name)
        if before and after and before != after:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {word}: {before} there, {after} now",
                hint="keep it as it was, or start with checkpoint.resume: never",
            )  # fmt: skip
    for word in REPLACED:
        before, after = found.beside.get(word), now.beside.get(word)
        if before and after and before != after:
            raise ConfigError(
                "CheckpointIncompatible", f"{uri} was made with another {word}: what its source holds has changed since",
                hint="put back what was there, or start with checkpoint.resume: never",
            )  # fmt: skip
    sharded = Strategy.DEEPSPEED in (found.strategy, now.strategy)
    if sharded and (found.world_size != now.world_size or found.strategy != now.strategy):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {found.strategy} on {found.world_size} ranks, now it is {now.strategy} on {now.world_size}: "
            "DeepSpeed's optimizer state cannot be split anew",
            hint="use the same strategy and number of ranks, or fsdp",
        )  # fmt: skip
    if found.strategy and now.strategy and (found.strategy == Strategy.FSDP) != (now.strategy == Strategy.FSDP):
        raise ConfigError(
            "CheckpointIncompatible",
            f"{uri} was made by {found.strategy}, now it is {now.strategy}: fsdp keeps the optimizer's state in another form",
            hint="use the same strategy, or take its weights: name the folder in model.source or method.adapter.source",
        )  # fmt: skip
    return _exactness(found, now)


def _exactness(found: RunFacts, now: RunFacts) -> tuple[bool, str | None]:
    if found.world_size != now.world_size:
        return (
            False,
            f"{found.world_size} ranks made the checkpoint, {now.world_size} go on: same data and batches, other random numbers",
        )
    if found.micro_batch != now.micro_batch:
        return False, "the batch is split otherwise: same data, sums in another order"
    if found.learning_rate is not None and found.learning_rate != now.learning_rate:
        return False, f"learningRate {found.learning_rate:g} until there, {now.learning_rate:g} from there on"
    others = [group for group, value in now.settings.items() if found.settings.get(group, value) != value]
    if others:
        return False, f"made with other settings in {', '.join(others)}"
    replaced = [word for word, value in now.beside.items() if found.beside.get(word, value) != value]
    if replaced:
        return False, f"made with other {', '.join(replaced)}"
    changed = [name for name, version in now.versions.items() if found.versions.get(name, version) != version]
    if changed:
        return False, "other versions: " + ", ".join(
            f"{name} {found.versions[name]} -> {now.versions[name]}" for name in changed
        )
    return True, None
