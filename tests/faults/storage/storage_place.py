"""A job's tree in a store, seen through the faults and as it truly is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.checkpoint.manifest import Manifest, base_of
from finetune_trainer.checkpoint.tree import Tree


@dataclass
class Place:
    """The same tree twice: as the pod sees it through the proxy, and as it truly is."""

    through: Tree
    truly: Tree
    client: Any
    bucket: str

    def commit(
        self, step: int | None, folder: Path, incarnation: str = "a1-00000000", attempt: int = 1, **facts: Any
    ) -> Manifest:
        """Upload and commit a folder through the proxy."""
        base = base_of(step)
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
