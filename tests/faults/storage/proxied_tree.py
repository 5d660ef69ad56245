"""Gives tests access to a job's stored checkpoints, through the fault proxy and directly."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.manifest import Manifest, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree
from pod_harness import PYTHONPATH, Pod, run_config
from toy_rank import next_chain

from localcluster.s3 import S3Endpoint

POD_TESTS_FOLDER = Path(__file__).parents[2] / "pod"


@dataclass
class ProxiedTree:
    """The storage of one job.

    `proxied_tree` reads and writes this storage through the fault proxy, as the pod does; `direct_tree` does so without the proxy.
    """

    proxied_tree: CheckpointTree
    direct_tree: CheckpointTree
    client: Any
    bucket: str

    def commit(
        self, step: int | None, folder: Path, incarnation: str = "a1-00000000", attempt: int = 1, **manifest_fields: Any
    ) -> Manifest:
        """Upload and commit a folder through the proxy."""
        folder_key = checkpoint_folder_key(step)
        entries = self.proxied_tree.upload(folder_key, incarnation, folder)
        manifest = Manifest(step=step or 0, attempt=attempt, incarnation=incarnation, files=entries, **manifest_fields)
        self.proxied_tree.commit(folder_key, manifest)
        return manifest

    def verify_all(self, folder: Path) -> list[int]:
        """Verify every committed checkpoint against its manifest. Returns the verified steps, newest first."""
        from finetune_trainer.checkpoint.restore import fetch_verified

        steps = []
        for committed in self.direct_tree.list_committed():
            manifest = self.direct_tree.read_manifest(committed)
            assert manifest is not None, committed
            problem = fetch_verified(
                self.direct_tree, committed.folder, manifest, folder / committed.folder, lambda path: True
            )
            assert problem is None, problem
            steps.append(manifest.step)
        return steps


def compute_expected_states(step_count: int) -> dict[int, str]:
    """Return the state of rank 0 after each step of an uninterrupted run of toy ranks."""
    states_by_step, state = {}, ""
    for step in range(1, step_count + 1):
        states_by_step[step] = state = next_chain(state, 0, step)
    return states_by_step


def read_logged_states(storage: ProxiedTree) -> dict[int, str]:
    """Return the state after each step from the logs of all attempts. Attempts that have logged the same step must have logged the same state."""
    states_by_step: dict[int, str] = {}
    for stat in storage.direct_tree.store.list("metrics/a"):
        for line in (storage.direct_tree.store.get(stat.key) or b"").decode().splitlines():
            entry = json.loads(line)
            assert states_by_step.setdefault(entry["step"], entry["chain"]) == entry["chain"], entry
    return states_by_step


def read_final_state(storage: ProxiedTree) -> str:
    """Return the state of rank 0 in the committed model."""
    model = storage.direct_tree.get_committed(None)
    assert model is not None, "no model is committed"
    return (storage.direct_tree.store.get(f"{model.folder}/chain-0") or b"").decode()


def make_toy_pod(
    folder: Path, spec: dict[str, Any], storage: ProxiedTree, server: S3Endpoint, script: dict[str, Any], **run: Any
) -> Pod:
    """Create a pod of toy ranks (tests/pod/toy_rank.py) that stores its checkpoints through the proxy."""
    target = storage.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    env = {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(POD_TESTS_FOLDER)]), "FINETUNE_TRAINER_MODULE": "toy_rank",
        "TOY_SCRIPT": json.dumps(script), "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }  # fmt: skip
    return Pod(run_config(spec, StoreTarget.model_validate(target.model_dump()), **run), folder / "pod", env)
