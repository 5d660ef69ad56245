"""Writes a finished run with a lineage statement into a local folder. The trainer's own code writes the files, but no training takes place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.defaults import PlatformDefaults, resolve_defaults
from finetune_api.lineage import TRAINING_IMAGES
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.spec.enums import OutputKind
from finetune_api.status import ResolvedConfig
from finetune_trainer.checkpoint.manifest import Manifest, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.inputs import Inputs
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder
from finetune_trainer.supervisor.fetch import compute_combined_digest, compute_fingerprint
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.lineage import Lineage
from finetune_trainer.supervisor.prepare import collect_run_facts
from finetune_trainer.supervisor.run_state import RunState

UID = "11111111-2222-3333-4444-555555555555"
INCARNATION = "a1-1f3c9a2b"
FILES = {"adapter_model.safetensors": b"weights" * 100, "adapter_config.json": b"{}", "tokenizer/vocab.json": b'{"a": 1}'}


def write_finished_run(folder: Path, uid: str = UID) -> Path:
    """Write a run with two checkpoints, a model and a lineage statement. Returns the job's folder in storage."""
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    root = folder / "store" / "team" / "bot" / uid
    run, tree = _make_run_config(folder, root, uid), CheckpointTree(open_store(StoreTarget(uri=f"file://{root}")))
    inputs = make_inputs(folder)
    facts = collect_run_facts(run, "0" * 64, inputs)
    tree.begin_attempt(1, run.to_bytes())
    for step in (10, 20, None):
        files_folder = folder / "files" / str(step)
        for name, content in (FILES if step is None else {"state.bin": b"%d" % step}).items():
            (files_folder / name).parent.mkdir(parents=True, exist_ok=True)
            (files_folder / name).write_bytes(content)
        entries = tree.upload(checkpoint_folder_key(step), INCARNATION, files_folder)
        kind = OutputKind.ADAPTER if step is None else None
        manifest = Manifest(job=f"team/bot/{uid}", incarnation=INCARNATION, step=step or 20, kind=kind, facts=facts, files=entries)
        tree.commit(checkpoint_folder_key(step), manifest)
    recorder = AttemptRecorder(run, tree, incarnation=INCARNATION, config_sha256="0" * 64, started_at=datetime(2026, 3, 1, tzinfo=UTC))
    recorder.record_start(0, ResolvedConfig())
    assert Lineage(run, tree, RunState(), FileDigests()).write_statement(inputs) == f"file://{root}/lineage/statement.json"
    return root


def _make_run_config(folder: Path, root: Path, uid: str) -> RunConfig:
    spec = {
        "model": {"source": f"file://{folder}/base"}, "resources": {"gpusPerNode": 0},
        "dataset": {"train": f"file://{folder}/train.jsonl", "test": "https://user:secret@host/test.jsonl?signature=abc"},
    }  # fmt: skip
    resolution = resolve_defaults(FineTuneJobSpec.model_validate(spec), platform_defaults=PlatformDefaults(storage=StorageRoot(uri=f"file://{folder}")))
    return RunConfig(
        name="bot", namespace="team", uid=uid, attempt=1, spec=resolution.spec, defaults=sorted(resolution.defaults),
        world=World(nodes=1, processes_per_node=1, gpus_per_node=0, master_address="127.0.0.1", master_port=0, rendezvous_id="x"),
        storage=StoreTarget(uri=f"file://{root}"), resume=ResumeConfig(mode="auto"), grace_seconds=60,
    )  # fmt: skip


def make_inputs(folder: Path) -> Inputs:
    train_files, test_files = [folder / "train.jsonl"], [folder / "test.jsonl"]
    return Inputs(
        model=folder / "base", train=train_files, test=test_files, model_revision=compute_fingerprint(folder / "base"),
        dataset_digest=compute_combined_digest(train_files, sha256_file), image_digests={TRAINING_IMAGES: "1" * 64}, output_dir=folder,
        config_maps=folder / "none",
    )  # fmt: skip


def model_folder(root: Path) -> Path:
    return root / "model" / INCARNATION


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    """Apply `edit` to the value in a JSON file, and write the file."""
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def edit_manifest(root: Path, edit: Callable[[Any], None]) -> None:
    """Change the model's manifest as an attacker with access to storage would: the commit marker and the statement's subjects are adapted to the changed
    manifest.
    """
    path = model_folder(root) / "manifest.json"
    edit_json(path, edit)
    manifest_bytes = path.read_bytes()
    digest = hashlib.sha256(manifest_bytes).hexdigest()
    edit_json(root / "model" / "_COMMITTED", lambda marker: marker.update(manifestSha256=digest))
    subjects = [{"name": file["path"], "digest": {"sha256": file["sha256"]}} for file in json.loads(manifest_bytes)["files"]]
    manifest_subject = {"name": "manifest.json", "digest": {"sha256": digest}}
    edit_json(root / "lineage" / "statement.json", lambda statement: statement.update(subject=[manifest_subject, *subjects]))
