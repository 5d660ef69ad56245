"""Writes a final model as an OCI image layout: a folder that skopeo, ORAS and crane can copy to a registry.

There are two forms. A ModelPack artefact stores each file unchanged, for tools that support ModelPack. An image stores each file in a tar layer
below `/models`, so that Kubernetes can mount it as an image volume, and KServe can use it as a modelcar.

A model does not depend on the processor architecture. But an image manifest must name an architecture, and containerd refuses an image whose
architecture differs from the node's architecture. Therefore, the layout has an index with one manifest for each architecture, and all these manifests
have the same layers.
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
    MANIFEST_MEDIA_TYPE,
    MODEL_MEDIA_TYPE,
    ModelFile,
    build_descriptor,
    build_modelpack_artefact,
    compute_digest,
    to_canonical_json,
)
from finetune_api.spec.enums import OutputKind

from finetune_cli.downloads import Download, RemoteFile
from finetune_cli.job_storage import (
    CommittedFolder,
    JobStorage,
    StorageError,
    list_committed_folders,
    read_file_list,
    read_manifest,
)
from finetune_cli.transfers import SilentProgress

LAYER_TYPE, IMAGE_CONFIG_TYPE = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.config.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ARCHITECTURES = ("amd64", "arm64")
"""Architectures of nodes with GPUs, with the names of the OCI image specification."""
MODELS_FOLDER = "models"
"""The folder in an image that holds the model's files. KServe expects models there."""
BLOBS_FOLDER = Path("blobs/sha256")
FILE_MODE = 0o644


class LayoutForm(StrEnum):
    """The form of the artefact in a layout: a ModelPack artefact or an image."""

    MODELPACK = "modelpack"
    IMAGE = "image"


@dataclass(frozen=True)
class WrittenLayout:
    """The result of `write_layout`: the artefact's digest, and the size of the model's files in bytes."""

    digest: str
    total_bytes: int


def write_layout(storage: JobStorage, target: Path, form: LayoutForm, tag: str, report_file: Callable[[str, int], None]) -> WrittenLayout:
    """Download the merged model (or the final model if there is no merged model), and write the layout to a new folder.

    `tag`: the name of the artefact in the layout. `report_file` is called with the path and size of each file before its download.
    Raises StorageError if there is no committed model, or a file is damaged.
    """
    unfinished_folder = target.with_name(f"{target.name}.part")
    shutil.rmtree(unfinished_folder, ignore_errors=True)
    try:
        layout = _write_files(storage, unfinished_folder, form, tag, report_file)
        unfinished_folder.rename(target)
    finally:
        shutil.rmtree(unfinished_folder, ignore_errors=True)
    return layout


def _write_files(storage: JobStorage, layout_folder: Path, form: LayoutForm, tag: str, report_file: Callable[[str, int], None]) -> WrittenLayout:
    committed_folder, manifest = _select_model(storage)
    file_entries = read_file_list(storage.uri, manifest)
    (layout_folder / BLOBS_FOLDER).mkdir(parents=True)
    for entry in file_entries:
        report_file(str(entry["path"]), int(entry["size"]))
        key = f"{committed_folder.folder}/{committed_folder.path}/{entry['path']}"
        file = RemoteFile(key, str(entry["path"]), int(entry["size"]), sha256=str(entry["sha256"]))
        Download(storage, file, layout_folder / BLOBS_FOLDER / file.sha256).run(SilentProgress(), overwrite=False)
    model_files = [ModelFile(str(entry["path"]), int(entry["size"]), str(entry["sha256"])) for entry in file_entries]
    descriptor = _pack_image(layout_folder, model_files) if form is LayoutForm.IMAGE else _write_modelpack(layout_folder, manifest, model_files)
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout_folder / "index.json").write_bytes(_build_index([descriptor]))
    (layout_folder / "oci-layout").write_bytes(to_canonical_json({"imageLayoutVersion": "1.0.0"}))
    return WrittenLayout(descriptor["digest"], sum(file.size for file in model_files))


def _build_index(descriptors: list[dict[str, Any]]) -> bytes:
    return to_canonical_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": descriptors})


def _select_model(storage: JobStorage) -> tuple[CommittedFolder, dict[str, Any]]:
    """Return the folder and the manifest of the model to export."""
    committed_folders_by_key = {committed_folder.folder: committed_folder for committed_folder in list_committed_folders(storage)}
    model_folder, merged_folder = committed_folders_by_key.get(Storage.MODEL), committed_folders_by_key.get(Storage.MERGED)
    if merged_folder is not None:
        manifest = read_manifest(storage, merged_folder)
        # A merged model is not exported if a later attempt has replaced the adapter from which it was merged.
        if model_folder is None or (manifest.get("extra") or {}).get(ADAPTER_SHA256) == model_folder.manifest_sha256:
            return merged_folder, manifest
    if model_folder is None:
        raise StorageError(f"there is no committed model below {storage.uri}; `finetune checkpoints` lists the checkpoints of a job")
    return model_folder, read_manifest(storage, model_folder)


def _write_modelpack(layout_folder: Path, manifest: dict[str, Any], files: list[ModelFile]) -> dict[str, Any]:
    """Write the config and the manifest of a ModelPack artefact. Returns the manifest's descriptor."""
    job_names = str(manifest.get("job") or "").split("/")[1:2]
    kind = OutputKind(manifest.get("kind") or OutputKind.MODEL)
    artefact = build_modelpack_artefact(job_names[0] if job_names else "model", kind, files)
    _write_blob(layout_folder, artefact.config)
    _write_blob(layout_folder, artefact.manifest)
    return {**build_descriptor(MANIFEST_MEDIA_TYPE, artefact.manifest), "artifactType": MODEL_MEDIA_TYPE}


def _pack_image(layout_folder: Path, files: list[ModelFile]) -> dict[str, Any]:
    """Replace each file by a tar layer that holds it, and write one image for each architecture. Returns the descriptor of the index of the images.

    The tar layers contain constant times and owners, so that equal models have equal digests.
    """
    ordered_files = sorted(files, key=lambda file: file.path)
    use_counts = Counter(file.sha256 for file in files)
    layers = []
    for file in ordered_files:
        layers.append(_pack_layer(layout_folder, file))
        use_counts[file.sha256] -= 1
        if not use_counts[file.sha256]:  # files with the same content share one downloaded blob
            (layout_folder / BLOBS_FOLDER / file.sha256).unlink()
    history = [{"created_by": f"finetune export: {file.path}"} for file in ordered_files]
    rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
    image_descriptors = []
    for architecture in ARCHITECTURES:
        platform = {"architecture": architecture, "os": "linux"}
        config_bytes = to_canonical_json({**platform, "config": {}, "history": history, "rootfs": rootfs})
        config_descriptor = build_descriptor(IMAGE_CONFIG_TYPE, config_bytes)
        manifest_bytes = to_canonical_json({"schemaVersion": 2, "mediaType": MANIFEST_MEDIA_TYPE, "config": config_descriptor, "layers": layers})
        _write_blob(layout_folder, config_bytes)
        _write_blob(layout_folder, manifest_bytes)
        image_descriptors.append({**build_descriptor(MANIFEST_MEDIA_TYPE, manifest_bytes), "platform": platform})
    index = _build_index(image_descriptors)
    _write_blob(layout_folder, index)
    return build_descriptor(INDEX_TYPE, index)


def _pack_layer(layout_folder: Path, file: ModelFile) -> dict[str, Any]:
    """Write a tar layer that holds a file. Returns the descriptor of the layer."""
    blob_file, tar_file = layout_folder / BLOBS_FOLDER / file.sha256, layout_folder / f"{file.sha256}.tar"
    with tar_file.open("wb") as tar_stream:
        writer = _HashingWriter(tar_stream)
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as archive, blob_file.open("rb") as blob_content:
            tar_entry = tarfile.TarInfo(f"{MODELS_FOLDER}/{file.path}")
            tar_entry.size, tar_entry.mode = file.size, FILE_MODE
            archive.addfile(tar_entry, blob_content)
    tar_file.rename(layout_folder / BLOBS_FOLDER / writer.sha256)
    return {"mediaType": LAYER_TYPE, "digest": f"sha256:{writer.sha256}", "size": writer.size}


class _HashingWriter:
    """A writable file that also computes the sha256 and the size of the written bytes."""

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


def _write_blob(layout_folder: Path, data: bytes) -> None:
    (layout_folder / BLOBS_FOLDER / compute_digest(data).removeprefix("sha256:")).write_bytes(data)


