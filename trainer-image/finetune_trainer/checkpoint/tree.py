"""The job's tree in storage: what is committed, and the one way to commit.

Data lies below the incarnation that wrote it, so a zombie's bytes never mix with another's. The manifest follows the data,
every object is looked at, and the marker comes last, created only if there is none. Its answer may get lost: then the marker
is read, and one that names our manifest is our success, one that names another's means that we are fenced out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import FineTuneError, PeerError, StorageError
from finetune_api.names import RUN_FILE_NAME, Storage, attempt_folder, attempt_of_folder

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

log = logging.getLogger(__name__)
PARTS = ".parts"
INCOMPLETE = "UploadIncomplete"
PART_POLL_SECONDS = 0.2
MARKER_LOOKS = 10
"""How often a marker is asked for that is there and cannot be read yet: some stores show what was written a moment later."""


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


@dataclass(frozen=True)
class Swept:
    """What a sweep did: objects and half-finished uploads that are gone, and why others stayed."""

    count: int
    problem: FineTuneError | None = None


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
        return self.survey()[0]

    def survey(self) -> tuple[list[Committed], list[int]]:
        """Every committed checkpoint, and the steps whose marker says nothing: they were committed and are damaged. Newest first."""
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
        found, damaged = [], []
        for step, healthy in sorted(marked.items(), reverse=True):
            data = self.store.get(join(base_of(step), Storage.COMMITTED))
            marker = Marker.parse(data) if data is not None else None
            if marker is not None:
                found.append(Committed(step, marker, healthy))
            elif data is not None:
                damaged.append(step)
        return found, damaged

    def marker(self, step: int | None, healthy: bool = False) -> Committed | None:
        """The committed checkpoint of a step (None: the final model), if there is one."""
        marker = self._marker(base_of(step))
        return Committed(step, marker, healthy) if marker else None

    def _marker(self, base: str) -> Marker | None:
        data = self.store.get(join(base, Storage.COMMITTED))
        return Marker.parse(data) if data is not None else None

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
                raise PeerError("PartMissing", f"pod {node} skipped its part of {base}, or could not store it")
            files += part.files
        return files

    @staticmethod
    def together(base: str, own: list[FileEntry], others: list[FileEntry]) -> list[FileEntry]:
        """The files of all pods. Errors: StorageError `PartsDiffer` if two wrote one file, and not the same one."""
        found: dict[str, FileEntry] = {}
        for entry in (*own, *others):
            before = found.setdefault(entry.path, entry)
            if before.sha256 != entry.sha256:
                raise StorageError("PartsDiffer", f"two pods wrote {entry.path} of {base}, and not the same bytes")
        return list(found.values())

    def commit(self, base: str, manifest: Manifest, *, instead_of: Marker | None = None) -> Marker:
        """Write the manifest, look at every object, write the marker.

        `instead_of`: the marker that was found here at the start and passed over; it gives way, and so does one that nobody can
        read, and one of an earlier attempt, which lives on out of the operator's reach.
        Errors: StorageError `UploadIncomplete` if an object is missing or has another size; Fenced if a later attempt has
        begun, or the step is another life's of the same attempt.
        """
        folder = join(base, manifest.incarnation)
        data = manifest.to_bytes()
        marker = Marker(attempt=manifest.attempt, path=manifest.incarnation, manifest_sha256=sha256_bytes(data))
        self.store.put(join(folder, Storage.MANIFEST), data)
        self._look(folder, manifest)
        self.require_newest(manifest.attempt)
        self._mark(base, marker, instead_of)
        try:
            if self._is_swept(folder, manifest):
                self._take_back(base, marker)
                raise Fenced("FencedOut", f"{base} was swept by another life; this is {marker.path}, which must end")
            self.store.delete([stat.key for stat in self.store.list(join(folder, PARTS) + "/")])
        except Fenced:
            raise
        except (
            FineTuneError
        ) as error:  # it is committed: what cannot be asked or tidied afterwards does not change that
            log.warning("%s is committed, and could not be looked at once more: %s", base, error)
        return marker

    def begin(self, attempt: int, run: bytes) -> None:
        """Tell what an attempt was told; from now on no earlier one commits anything."""
        self.store.put(join(Storage.RUN, attempt_folder(attempt), RUN_FILE_NAME), run)

    def require_newest(self, attempt: int) -> None:
        """Errors: Fenced if a later attempt has begun."""
        if self.superseded(attempt):
            raise Fenced("FencedOut", f"a later attempt has begun; this is attempt {attempt}, which must end")

    def superseded(self, attempt: int) -> bool:
        """Whether a later attempt has begun: it says so before it sweeps or writes anything else."""
        begun = (attempt_of_folder(stat.key.split("/")[1]) for stat in self.store.list(f"{Storage.RUN}/"))
        return any(number is not None and number > attempt for number in begun)

    def _take_back(self, base: str, marker: Marker) -> None:
        """Remove a marker whose data is gone. Whoever replaced it keeps his."""
        if self._marker(base) == marker:
            self.store.delete([join(base, Storage.COMMITTED)])

    def _mark(self, base: str, marker: Marker, instead_of: Marker | None) -> None:
        """Write the marker. Errors: Fenced; StorageError `MarkerUnreadable`."""
        key = join(base, Storage.COMMITTED)
        for _ in range(MARKER_LOOKS):
            if self.store.create(key, marker.to_bytes()) is Created.NEW:
                return
            data = self.store.get(key)
            if data is None:
                time.sleep(PART_POLL_SECONDS)
                continue
            found = Marker.parse(data)
            if found is not None and found.manifest_sha256 == marker.manifest_sha256:
                return
            if found is None or found == instead_of or found.attempt < marker.attempt:
                self._replace(base, marker)
                return
            raise Fenced("FencedOut", f"{base} was committed by {found.path}; this is {marker.path}, which must end")
        raise StorageError("MarkerUnreadable", f"{self.uri(key)} exists and cannot be read")

    def _replace(self, base: str, marker: Marker) -> None:
        """Put our marker in the place of one that was passed over; its health is not ours."""
        try:
            self.store.delete([join(base, Storage.HEALTHY)])
        except FineTuneError as error:
            log.warning("%s keeps the mark of a checkpoint that was passed over: %s", base, error)
        self.store.put(join(base, Storage.COMMITTED), marker.to_bytes())

    def _look(self, folder: str, manifest: Manifest) -> None:
        sizes: dict[str, Stat] = {stat.key: stat for stat in self.store.list(folder + "/")}
        for entry in manifest.files:
            stat = sizes.get(join(folder, entry.path))
            if stat is None or stat.size != entry.size:  # a listing may be behind
                stat = self.store.stat(join(folder, entry.path))
            if stat is None or stat.size != entry.size:
                found = "is missing" if stat is None else f"has {stat.size} bytes instead of {entry.size}"
                raise StorageError(INCOMPLETE, f"{self.uri(join(folder, entry.path))} {found} after its upload")

    def _is_swept(self, folder: str, manifest: Manifest) -> bool:
        """Whether another life's sweep has taken any of it."""
        if self.store.stat(join(folder, Storage.MANIFEST)) is None:
            return True
        try:
            self._look(folder, manifest)
        except StorageError as error:
            if error.code == INCOMPLETE:
                return True
            raise
        return False

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

    def sweep(self) -> Swept:
        """Remove what killed incarnations left: data that no marker names, and half-finished uploads.

        To be called before this incarnation writes anything, and only when no other one is alive. What cannot be removed
        stays and is told: it costs room, and nothing else.
        """
        count, problem = 0, None
        for sweep in (self._sweep_uploads, self._sweep_data):
            try:
                count += sweep()
            except FineTuneError as error:
                problem = problem or error
        return Swept(count, problem)

    def _sweep_uploads(self) -> int:
        return sum(self.store.sweep(f"{prefix}/") for prefix in (Storage.CHECKPOINTS, Storage.MODEL))

    def _sweep_data(self) -> int:
        unnamed = {base: keys for base, below in self._by_base().items() if (keys := self._unnamed(base, below))}
        self.store.delete([key for keys in unnamed.values() for key in keys])
        for base, keys in unnamed.items():
            self._unmark(base, keys)
        return sum(map(len, unnamed.values()))

    def _unmark(self, base: str, swept: list[str]) -> None:
        """Remove a marker that a zombie wrote, between our look and our delete, over what we have just removed.

        It looks at its data after its marker, we at its marker after its data: one of the two sees what the other did.
        """
        marker = self._marker(base)
        if marker is not None and any(key.startswith(join(base, marker.path) + "/") for key in swept):
            self._take_back(base, marker)

    def _by_base(self) -> dict[str, list[str]]:
        """Keys below each checkpoint's folder and the model's."""
        found: dict[str, list[str]] = {}
        for prefix in (Storage.CHECKPOINTS, Storage.MODEL):
            for stat in self.store.list(f"{prefix}/"):
                parts = stat.key.split("/")
                step = step_of(parts[1]) if prefix is Storage.CHECKPOINTS else None
                if prefix is Storage.MODEL or (step is not None and len(parts) > 2):
                    found.setdefault(base_of(step), []).append(stat.key)
        return found

    def _unnamed(self, base: str, keys: list[str]) -> list[str]:
        """Keys that the marker does not name. The marker is asked for by itself: a listing may be behind."""
        marked = join(base, Storage.COMMITTED)
        data = self.store.get(marked)
        if data is None:
            return keys if marked not in keys else []  # listed, and not to be read now: that it is damaged is not said
        marker = Marker.parse(data)
        if marker is None or join(base, marker.path, Storage.MANIFEST) not in keys:
            return []  # a damaged marker: which of these it meant is for a person to say
        own = (marked, join(base, Storage.HEALTHY))
        return [key for key in keys if key not in own and not key.startswith(join(base, marker.path) + "/")]
