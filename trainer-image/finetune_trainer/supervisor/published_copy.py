"""Copies the final model and the result files to the folder of `output.dir`.

After each copied file, the list of all copied files is stored in the job's own folder. An attempt that continues an interrupted copy reads the list
and skips the listed files that have not changed since they were copied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from finetune_api.base import LenientModel
from finetune_api.names import Storage
from pydantic import TypeAdapter, ValidationError

from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.layout import CopyFolder
from finetune_trainer.storage.base import ByteCounter, Store, join_key

log = logging.getLogger(__name__)
COPIED_FILES_KEY = f"{Storage.RUN}/copied.json"


class CopiedFile(LenientModel):
    """A file that was copied."""

    source: str
    """What was copied: the identity of a committed model and the path of one of its files, or the key of one of the job's objects and its version tag."""
    tag: str
    """The version tag of the copy. If another job has replaced the copy, the tag in storage differs from this recorded tag."""


CopiedFilesAdapter = TypeAdapter(dict[str, CopiedFile])
"""Reads and writes the stored list of copied files: each `CopiedFile` by the key of its copy, relative to `storage.uri`."""


class PublishedCopy:
    """Copies files to one folder. `store` has the root `storage.uri`; `tree` contains the job's own files. Errors of all methods: those of storage."""

    def __init__(self, store: Store, folder: CopyFolder, tree: CheckpointTree, *, byte_counter: ByteCounter | None = None) -> None:
        """`byte_counter` may raise an exception to end the copy."""
        self._store, self._folder, self._tree, self._byte_counter = store, folder, tree, byte_counter
        self._copied_files = _read_copied_files(tree)

    def add_model(self, model_folder: Path, identity: str) -> None:
        """Copy the files of the final model. `identity`: sha256 of the manifest of the committed model."""
        for path in _list_files(model_folder):
            name = path.relative_to(model_folder).as_posix()
            self._add_file(path, self._folder.key_of_model_file(name), f"{identity}/{name}")

    def add_merged_model(self, merged_folder: Path, identity: str) -> None:
        """Copy the files of the merged model to the folder `merged_folder`. `identity`: URI of the committed merged model."""
        for path in _list_files(merged_folder):
            name = path.relative_to(merged_folder).as_posix()
            self._add_file(path, join_key(self._folder.key, Storage.MERGED, name), f"{identity}/{name}")

    def add_result(self, name: ResultFile, data: bytes) -> None:
        """Write a result file. Result files are small, so each attempt writes them again."""
        self._store.put(self._folder.key_of_result(name), data)

    def add_stored_files(self, prefix: str) -> None:
        """Copy the objects below a folder of the job in storage, such as `evaluation`."""
        for stat in self._tree.store.list(f"{prefix}/"):
            key = self._folder.key + stat.key.removeprefix(f"{prefix}/")

            def copy_object(source: str = stat.key, key: str = key) -> None:
                data = self._tree.store.get(source)
                if data is not None:
                    self._store.put(key, data)

            self._copy_once(key, f"{stat.key} {stat.tag}", stat.size, copy_object)

    def _add_file(self, path: Path, key: str, source: str) -> None:
        self._copy_once(key, source, path.stat().st_size, lambda: self._store.put_file(path, key, byte_counter=self._byte_counter))

    def _copy_once(self, key: str, source: str, size: int, copy_file: Callable[[], None]) -> None:
        """Copy a file of `size` bytes and record it, unless it was copied earlier and neither the source nor the copy has changed since then."""
        earlier_copy = self._copied_files.get(key)
        if earlier_copy is not None and earlier_copy.source == source:
            stored_object = self._store.stat(key)
            if stored_object is not None and (stored_object.size, stored_object.tag) == (size, earlier_copy.tag):
                return
        if self._byte_counter is not None:
            self._byte_counter(0)
        copy_file()
        stored_object = self._store.stat(key)
        if stored_object is not None:
            self._copied_files[key] = CopiedFile(source=source, tag=stored_object.tag)
            self._tree.store.put(COPIED_FILES_KEY, CopiedFilesAdapter.dump_json(self._copied_files, by_alias=True))


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read_copied_files(tree: CheckpointTree) -> dict[str, CopiedFile]:
    data = tree.store.get(COPIED_FILES_KEY)
    try:
        return CopiedFilesAdapter.validate_json(data) if data is not None else {}
    except ValidationError:
        log.warning("%s cannot be read: all files are copied again", COPIED_FILES_KEY)
        return {}
