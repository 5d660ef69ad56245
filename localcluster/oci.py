"""Write OCI image layouts of statically linked programs, without an image builder."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcluster.errors import ImageNotFound

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class Image:
    """Content of a small image: source files by their path in the image, entry point, and user."""

    tag: str
    file_by_image_path: Mapping[str, Path]
    entrypoint: Sequence[str]
    user: str = "65532:65532"


def write_layout(folder: Path, image: Image) -> Path:
    """Write `image` as an uncompressed, reproducible OCI layout into `folder`, unless the layout exists. Returns `folder`."""
    if (folder / "index.json").exists():
        return folder
    unfinished_layout = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished_layout, ignore_errors=True)
    blobs_folder = unfinished_layout / "blobs" / "sha256"
    blobs_folder.mkdir(parents=True)
    layer_descriptor = _write_layer_blob(blobs_folder, image.file_by_image_path)
    config_descriptor = _write_json_blob(blobs_folder, {
        "architecture": ARCHITECTURE, "os": "linux",
        "config": {"Entrypoint": list(image.entrypoint), "User": image.user, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer_descriptor["digest"]]},
    }, _CONFIG_TYPE)
    manifest_descriptor = _write_json_blob(
        blobs_folder, {"schemaVersion": 2, "mediaType": _MANIFEST_TYPE, "config": config_descriptor, "layers": [layer_descriptor]}, _MANIFEST_TYPE
    )
    index = {"schemaVersion": 2, "manifests": [{**manifest_descriptor, "annotations": {REF_NAME_ANNOTATION: image.tag}}]}
    (unfinished_layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (unfinished_layout / "index.json").write_text(json.dumps(index))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished_layout.rename(folder)
    return folder


def find_index_entry(layout_folder: Path, tag: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the tag and the index entry of the image `tag` in a layout. If `tag` is None, return the tag and the index entry of the newest image.

    Errors: ImageNotFound if the folder is not a layout or does not contain the image.
    """
    try:
        entries = json.loads((layout_folder / "index.json").read_text())["manifests"]
    except (OSError, ValueError, KeyError):
        raise ImageNotFound(f"{layout_folder} is not an OCI image layout: it has no index.json") from None
    named_entries = [(entry.get("annotations", {}).get(REF_NAME_ANNOTATION), entry) for entry in entries]
    matching_entries = [(name, entry) for name, entry in named_entries if name and tag in (None, name)]
    if not matching_entries:
        raise ImageNotFound(f"{layout_folder} contains {[n for n, _ in named_entries]}, not {tag or 'an image with a name'}")
    return matching_entries[-1]


def _write_layer_blob(blobs_folder: Path, file_by_image_path: Mapping[str, Path]) -> dict[str, Any]:
    unfinished_blob = blobs_folder / "layer"
    with tarfile.open(unfinished_blob, "w") as archive:
        for name, source_file in sorted(file_by_image_path.items()):
            file_entry = tarfile.TarInfo(name.lstrip("/"))
            file_entry.size, file_entry.mode = source_file.stat().st_size, 0o755
            with source_file.open("rb") as content:
                archive.addfile(file_entry, content)
        tmp_folder_entry = tarfile.TarInfo("tmp")
        tmp_folder_entry.type, tmp_folder_entry.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(tmp_folder_entry, io.BytesIO())
    with unfinished_blob.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    size = unfinished_blob.stat().st_size
    unfinished_blob.rename(blobs_folder / digest)
    return {"mediaType": _LAYER_TYPE, "digest": f"sha256:{digest}", "size": size}


def _write_json_blob(blobs_folder: Path, content: Any, media_type: str) -> dict[str, Any]:
    encoded_content = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(encoded_content).hexdigest()
    (blobs_folder / digest).write_bytes(encoded_content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(encoded_content)}
