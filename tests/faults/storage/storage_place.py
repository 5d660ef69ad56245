"""A job's tree in a store, seen through the faults and as it truly is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.manifest import Manifest, prefix_of
from finetune_trainer.checkpoint.tree import Tree
from pod_harness import PYTHONPATH, Pod, run_config
from toy_rank import link

from localcluster.s3 import S3Endpoint

PODS = Path(__file__).parents[2] / "pod"


@dataclass
class Connection:
    """The same tree twice: as the pod sees it through the proxy, and as it truly is."""

    through: Tree
    truly: Tree
    client: Any
    bucket: str

    def commit(
        self, step: int | None, folder: Path, incarnation: str = "a1-00000000", attempt: int = 1, **facts: Any
    ) -> Manifest:
        """Upload and commit a folder through the proxy."""
        base = prefix_of(step)
        entries = self.through.upload(base, incarnation, folder)
        manifest = Manifest(step=step or 0, attempt=attempt, incarnation=incarnation, files=entries, **facts)
        self.through.commit(base, manifest)
        return manifest

    def whole(self, folder: Path) -> list[int]:
        """Committed steps, each checked byte by byte against its manifest; fails if one is not what it says."""
        from finetune_trainer.checkpoint.restore import fetch_verified

        steps = []
        for committed in self.truly.committed():
            manifest = self.truly.manifest(committed)
            assert manifest is not None, committed
            problem = fetch_verified(
                self.truly, committed.folder, manifest, folder / committed.folder, lambda path: True
            )
            assert problem is None, problem
            steps.append(manifest.step)
        return steps


def states(steps: int) -> dict[int, str]:
    """State of rank 0 after each step of a run of toy ranks that nothing happens to."""
    found, chain = {}, ""
    for step in range(1, steps + 1):
        found[step] = chain = link(chain, 0, step)
    return found


def logged_states(place: Connection) -> dict[int, str]:
    """State by step as all attempts logged it; what two logged must be the same."""
    found: dict[int, str] = {}
    for stat in place.truly.store.list("metrics/"):
        for line in (place.truly.store.get(stat.key) or b"").decode().splitlines():
            value = json.loads(line)
            assert found.setdefault(value["step"], value["chain"]) == value["chain"], value
    return found


def final_state(place: Connection) -> str:
    """State of rank 0 in the committed model."""
    model = place.truly.marker(None)
    assert model is not None, "no model is committed"
    return (place.truly.store.get(f"{model.folder}/chain-0") or b"").decode()


def toy(
    folder: Path, spec: dict[str, Any], place: Connection, server: S3Endpoint, script: dict[str, Any], **run: Any
) -> Pod:
    """A pod of ranks that count (tests/pod/toy_rank.py), with its root in the store as seen through the faults."""
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    env = {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(PODS)]), "FINETUNE_TRAINER_MODULE": "toy_rank",
        "TOY_SCRIPT": json.dumps(script), "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }  # fmt: skip
    return Pod(run_config(spec, StoreTarget.model_validate(target.model_dump()), **run), folder / "pod", env)
