"""The job's tree in storage: what is committed, and the one way to commit.

Data lies below the incarnation that wrote it, so a zombie's bytes never mix with another's. The manifest follows the data,
every object is looked at, and the marker comes last, created only if there is none. Its answer may get lost: then the marker
is read, and one that names our manifest is our success, one that names another's means that we are fenced out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import PeerError, StorageError
from finetune_api.names import Storage

from finetune_trainer.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Marker,
    Part,
    base_of,
    entries_of,
    sha256_bytes,
    step_of,
)
from finetune_trainer.storage.base import Counter, Created, Stat, Store, join

PARTS = ".parts"
PART_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint (or model, step None), as its marker says."""

    step: int | None
    marker: Marker
    healthy: bool = False

    @property
    def folder(self) -> str:
        """Key of the folder with its files."""
        return join(base_of(self.step), self.marker.path)


class Fenced(PeerError):
    """Another incarnation committed this step: we are a zombie and must end."""


class Tree:
    """Reads and commits below one root. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def uri(self, key: str) -> str:
        """The full address of a key."""
        return f"{self.store.uri}/{key}"

    # ---- reading ----

    def committed(self) -> list[Committed]:
        """Every committed checkpoint, newest first. Folders without a marker are not seen."""
        marked: dict[int, bool] = {}
        for stat in self.store.list(f"{Storage.CHECKPOINTS}/"):
            _, folder, *rest = stat.key.split("/")
            step = step_of(folder)
            if step is None or len(rest) != 1:
                continue
            if rest[0] == Storage.COMMITTED:
                marked.setdefault(step, False)
            elif rest[0] == Storage.HEALTHY:
                marked[step] = True
        found = (self.marker(step, healthy) for step, healthy in sorted(marked.items(), reverse=True))
        return [one for one in found if one is not None]

    def marker(self, step: int | None, healthy: bool = False) -> Committed | None:
        """The committed checkpoint of a step (None: the final model), if there is one."""
        data = self.store.get(join(base_of(step), Storage.COMMITTED))
        marker = Marker.parse(data) if data is not None else None
        return Committed(step, marker, healthy) if marker else None

    def manifest(self, committed: Committed) -> Manifest | None:
        """The manifest that the marker names, or None if it is missing or is not that one."""
        data = self.store.get(join(committed.folder, Storage.MANIFEST))
        if data is None or sha256_bytes(data) != committed.marker.manifest_sha256:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValueError:
            return None

    # ---- writing ----

    def upload(self, base: str, incarnation: str, folder: Path, *, count: Counter | None = None) -> list[FileEntry]:
        """Write a folder's files below the incarnation; returns what was written."""
        entries = entries_of(folder)
        for entry in entries:
            self.store.put_file(folder / entry.path, join(base, incarnation, entry.path), count=count)
        return entries

    def report_part(self, base: str, incarnation: str, node: int, entries: list[FileEntry] | None) -> None:
        """Tell rank 0's pod what this pod has written; None: it will not bring its part."""
        part = Part(node=node, files=entries or [], dropped=entries is None)
        self.store.put(
            join(base, incarnation, PARTS, f"node-{node}.json"), part.model_dump_json(by_alias=True).encode()
        )

    def wait_parts(
        self, base: str, incarnation: str, nodes: int, timeout: float, give_up: Callable[[], bool]
    ) -> list[FileEntry]:
        """What the other pods (1 .. nodes-1) have written.

        Errors: PeerError `PartMissing` if one has not said so within `timeout` seconds or `give_up` says stop.
        """
        end = time.monotonic() + timeout
        files: list[FileEntry] = []
        for node in range(1, nodes):
            key = join(base, incarnation, PARTS, f"node-{node}.json")
            while (data := self.store.get(key)) is None:
                if time.monotonic() > end or give_up():
                    raise PeerError(
                        "PartMissing", f"pod {node} did not write its part of {base} within {timeout:.0f} s"
                    )
                time.sleep(PART_POLL_SECONDS)
            part = Part.model_validate_json(data)
            if part.dropped:
                raise PeerError("PartMissing", f"pod {node} skipped {base}: its storage is too slow")
            files += part.files
        return files

    def commit(self, base: str, manifest: Manifest) -> Marker:
        """Write the manifest, look at every object, write the marker.

        Errors: StorageError `UploadIncomplete` if an object is missing or has another size; Fenced if the step is
        another incarnation's.
        """
        folder = join(base, manifest.incarnation)
        data = manifest.to_bytes()
        marker = Marker(attempt=manifest.attempt, path=manifest.incarnation, manifest_sha256=sha256_bytes(data))
        self.store.put(join(folder, Storage.MANIFEST), data)
        self._look(folder, manifest)
        key = join(base, Storage.COMMITTED)
        if self.store.create(key, marker.to_bytes()) is Created.EXISTS:
            found = Marker.parse(self.store.get(key) or b"")
            if found is None or found.manifest_sha256 != marker.manifest_sha256:
                other = found.path if found else "somebody"
                raise Fenced(
                    "FencedOut", f"{base} was committed by {other}; this is {manifest.incarnation}, which must end"
                )
        self.store.delete([stat.key for stat in self.store.list(join(folder, PARTS) + "/")])
        return marker

    def _look(self, folder: str, manifest: Manifest) -> None:
        sizes: dict[str, Stat] = {stat.key: stat for stat in self.store.list(folder + "/")}
        for entry in manifest.files:
            stat = sizes.get(join(folder, entry.path)) or self.store.stat(join(folder, entry.path))
            if stat is None or stat.size != entry.size:
                found = "is missing" if stat is None else f"has {stat.size} bytes instead of {entry.size}"
                raise StorageError("UploadIncomplete", f"{self.uri(join(folder, entry.path))} {found} after its upload")

    def mark_healthy(self, step: int) -> None:
        """The steps after this checkpoint were finite too."""
        self.store.put(join(base_of(step), Storage.HEALTHY), b"{}")

    def remove(self, step: int) -> None:
        """Take a checkpoint away: first it stops existing, then its bytes go."""
        base = base_of(step)
        self.store.delete([join(base, Storage.COMMITTED)])
        self.store.delete([join(base, Storage.HEALTHY)])
        keys = [stat.key for stat in self.store.list(base + "/")]
        manifests = [key for key in keys if key.endswith("/" + Storage.MANIFEST)]
        self.store.delete(manifests)
        self.store.delete([key for key in keys if key not in manifests])

    def sweep(self) -> int:
        """Remove what killed incarnations left: data that no marker names, and half-finished multipart uploads.

        To be called before this incarnation writes anything, and only when no other one is alive.
        """
        swept = self.store.sweep(f"{Storage.CHECKPOINTS}/")
        kept = {one.step: one.marker.path for one in self.committed()}
        garbage: list[str] = []
        for stat in self.store.list(f"{Storage.CHECKPOINTS}/"):
            _, folder, *rest = stat.key.split("/")
            step = step_of(folder)
            if step is None or not rest:
                continue
            whole = step in kept and (len(rest) == 1 or rest[0] == kept[step])
            if not whole:
                garbage.append(stat.key)
        self.store.delete(garbage)
        return swept + len(garbage)
