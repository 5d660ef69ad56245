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
REF_NAME = "org.opencontainers.image.ref.name"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True)
class Image:
    """Content of a small image: source files by their path in the image, entry point, and user."""

    tag: str
    files: Mapping[str, Path]
    entrypoint: Sequence[str]
    user: str = "65532:65532"


def write_layout(folder: Path, image: Image) -> Path:
    """Write `image` as an uncompressed, reproducible OCI layout into `folder`, unless the layout exists. Returns `folder`."""
    if (folder / "index.json").exists():
        return folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    blobs = unfinished / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layer = _write_layer_blob(blobs, image.files)
    config = _write_json_blob(blobs, {
        "architecture": ARCHITECTURE, "os": "linux",
        "config": {"Entrypoint": list(image.entrypoint), "User": image.user, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }, _CONFIG)
    manifest = _write_json_blob(
        blobs, {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": [layer]}, _MANIFEST
    )
    index = {"schemaVersion": 2, "manifests": [{**manifest, "annotations": {REF_NAME: image.tag}}]}
    (unfinished / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (unfinished / "index.json").write_text(json.dumps(index))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def manifest_of(layout: Path, tag: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the tag and the index entry of the image `tag` in a layout. If `tag` is None, return those of the newest image.

    Errors: ImageNotFound if the folder is not a layout or does not contain the image.
    """
    try:
        entries = json.loads((layout / "index.json").read_text())["manifests"]
    except (OSError, ValueError, KeyError):
        raise ImageNotFound(f"{layout} is not an OCI image layout: it has no index.json") from None
    named = [(entry.get("annotations", {}).get(REF_NAME), entry) for entry in entries]
    matching = [(name, entry) for name, entry in named if name and tag in (None, name)]
    if not matching:
        raise ImageNotFound(f"{layout} contains {[n for n, _ in named]}, not {tag or 'an image with a name'}")
    return matching[-1]


def _write_layer_blob(blobs: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    unnamed = blobs / "layer"
    with tarfile.open(unnamed, "w") as archive:
        for name, source in sorted(files.items()):
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as content:
                archive.addfile(entry, content)
        scratch = tarfile.TarInfo("tmp")
        scratch.type, scratch.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(scratch, io.BytesIO())
    with unnamed.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    size = unnamed.stat().st_size
    unnamed.rename(blobs / digest)
    return {"mediaType": _LAYER, "digest": f"sha256:{digest}", "size": size}


def _write_json_blob(blobs: Path, content: Any, media_type: str) -> dict[str, Any]:
    data = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
