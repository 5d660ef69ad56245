"""Writes a final model as an OCI image layout: a folder from which skopeo, ORAS and crane copy to a registry.

There are two forms. A ModelPack artefact holds each file as it is, for tools that know models. An image holds each file in a tar layer
below `/models`, so that Kubernetes can mount it as an image volume, and KServe can use it as a modelcar without further steps.

A model runs on every processor, but the image specification requires an architecture, and containerd refuses an image of another architecture than the
node's. So the image is an index with one manifest for each architecture, and all manifests have the same layers.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from finetune_api.names import ADAPTER_SHA256, Storage
from finetune_api.oci import (
    MANIFEST_TYPE,
    MODEL_TYPE,
    ModelFile,
    descriptor,
    digest_of,
    modelpack_artefact,
    to_bytes,
)
from finetune_api.spec.enums import OutputKind

from finetune_cli.downloads import Download, RemoteFile
from finetune_cli.job_storage import (
    CommittedFolder,
    JobStorage,
    StorageError,
    checked_file_list,
    list_committed_folders,
    read_manifest,
)
from finetune_cli.transfers import SilentProgress

LAYER_TYPE, IMAGE_CONFIG_TYPE = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.config.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARCHITECTURES = ("amd64", "arm64")
"""Architectures of nodes with GPUs, in the words of the image specification."""
MODELS_FOLDER = "models"
"""Folder of the files in an image. KServe expects models there."""
BLOBS = Path("blobs/sha256")
FILE_MODE = 0o644


class LayoutForm(StrEnum):
    """What the folder contains."""

    MODELPACK = "modelpack"
    IMAGE = "image"


@dataclass(frozen=True)
class WrittenLayout:
    """The artefact in the folder: its digest, and the bytes of its files."""

    digest: str
    total_bytes: int


def write_layout(storage: JobStorage, target: Path, form: LayoutForm, tag: str, report_file: Callable[[str, int], None]) -> WrittenLayout:
    """Download the merged model, or the final model if there is none, and write the layout to a new folder.

    `tag`: the name of the artefact in the layout. `report_file`: receives the path and the bytes of each file before its download.
    Raises StorageError if there is no committed model, or a file is damaged.
    """
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        layout = _write(storage, part, form, tag, report_file)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return layout


def _write(storage: JobStorage, target: Path, form: LayoutForm, tag: str, report_file: Callable[[str, int], None]) -> WrittenLayout:
    committed, manifest = _committed_model(storage)
    files = checked_file_list(storage.uri, manifest)
    (target / BLOBS).mkdir(parents=True)
    for entry in files:
        report_file(str(entry["path"]), int(entry["size"]))
        key = f"{committed.folder}/{committed.path}/{entry['path']}"
        file = RemoteFile(key, str(entry["path"]), int(entry["size"]), sha256=str(entry["sha256"]))
        Download(storage, file, target / BLOBS / file.sha256).run(SilentProgress(), overwrite=False)
    entries = [ModelFile(str(entry["path"]), int(entry["size"]), str(entry["sha256"])) for entry in files]
    entry = _pack_image(target, entries) if form is LayoutForm.IMAGE else _write_modelpack(target, manifest, entries)
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (target / "index.json").write_bytes(_index_of([entry]))
    (target / "oci-layout").write_bytes(to_bytes({"imageLayoutVersion": "1.0.0"}))
    return WrittenLayout(entry["digest"], sum(file.size for file in entries))


def _index_of(entries: list[dict[str, Any]]) -> bytes:
    return to_bytes({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries})


def _committed_model(storage: JobStorage) -> tuple[CommittedFolder, dict[str, Any]]:
    """Return the folder of the model to export, and its manifest."""
    folders = {committed.folder: committed for committed in list_committed_folders(storage)}
    model, merged = folders.get(Storage.MODEL), folders.get(Storage.MERGED)
    if merged is not None:
        manifest = read_manifest(storage, merged)
        # A merged model is left out if it was made from an adapter that another attempt has replaced.
        if model is None or (manifest.get("extra") or {}).get(ADAPTER_SHA256) == model.manifest_sha256:
            return merged, manifest
    if model is None:
        raise StorageError(f"there is no committed model below {storage.uri}; `finetune checkpoints` lists what is there")
    return model, read_manifest(storage, model)


def _write_modelpack(target: Path, manifest: dict[str, Any], files: list[ModelFile]) -> dict[str, Any]:
    """Write config and manifest of the artefact. Returns the descriptor of the manifest."""
    name = str(manifest.get("job") or "").split("/")[1:2]
    kind = OutputKind(manifest.get("kind") or OutputKind.MODEL)
    artefact = modelpack_artefact(name[0] if name else "model", kind, files)
    _write_blob(target, artefact.config)
    _write_blob(target, artefact.manifest)
    return {**descriptor(MANIFEST_TYPE, artefact.manifest), "artifactType": MODEL_TYPE}


def _pack_image(target: Path, files: list[ModelFile]) -> dict[str, Any]:
    """Replace each file by a tar layer with this file, and write one image for each architecture. Returns the descriptor of the images' index.

    All times and owners are constant, so equal models give equal digests.
    """
    ordered = sorted(files, key=lambda file: file.path)
    uses = Counter(file.sha256 for file in files)
    layers = []
    for file in ordered:
        layers.append(_pack_layer(target, file))
        uses[file.sha256] -= 1
        if not uses[file.sha256]:  # files with the same content share one downloaded blob
            (target / BLOBS / file.sha256).unlink()
    history = [{"created_by": f"finetune export: {file.path}"} for file in ordered]
    rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
    images = []
    for architecture in ARCHITECTURES:
        platform = {"architecture": architecture, "os": "linux"}
        config = to_bytes({**platform, "config": {}, "history": history, "rootfs": rootfs})
        manifest = to_bytes({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor(IMAGE_CONFIG_TYPE, config), "layers": layers})
        _write_blob(target, config)
        _write_blob(target, manifest)
        images.append({**descriptor(MANIFEST_TYPE, manifest), "platform": platform})
    index = _index_of(images)
    _write_blob(target, index)
    return descriptor(INDEX_TYPE, index)


def _pack_layer(target: Path, file: ModelFile) -> dict[str, Any]:
    """Write the tar layer of a file. Returns the layer's descriptor."""
    source, packed = target / BLOBS / file.sha256, target / f"{file.sha256}.tar"
    with packed.open("wb") as raw:
        writer = _HashingWriter(raw)
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as archive, source.open("rb") as content:
            entry = tarfile.TarInfo(f"{MODELS_FOLDER}/{file.path}")
            entry.size, entry.mode = file.size, FILE_MODE
            archive.addfile(entry, content)
    packed.rename(target / BLOBS / writer.sha256)
    return {"mediaType": LAYER_TYPE, "digest": f"sha256:{writer.sha256}", "size": writer.size}


class _HashingWriter:
    """A file for writing that also computes the sha256 and the size of the written data."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """sha256 (hex) of all written bytes."""
        return self._digest.hexdigest()


def _write_blob(target: Path, data: bytes) -> None:
    (target / BLOBS / digest_of(data).removeprefix("sha256:")).write_bytes(data)


