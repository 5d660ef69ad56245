"""Load images into a node's containerd while copying as few bytes as possible.

A training image has a few layers of several gigabytes that seldom change. Large blobs are hard-linked from the build's layout, blobs that the
node already has are skipped, and only small blobs are copied.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from localcluster.errors import StartFailed
from localcluster.oci import find_index_entry

CONTAINERD_NAMESPACE = "k8s.io"
"""containerd namespace that the kubelet uses."""
MAX_IMPORT_ATTEMPTS = 3
"""Maximum number of import attempts: containerd may garbage-collect linked blobs before the image refers to them."""


@dataclass(frozen=True)
class ContainerdImageStore:
    """Client of one node's containerd. `data_folder` is containerd's data folder, `socket_path` is its socket; both are paths on this machine."""

    socket_path: str
    data_folder: Path

    def run_ctr(self, *arguments: str, stdin: BinaryIO | None = None) -> str:
        """Run `ctr` with `stdin` as standard input. Returns its standard output. Errors: StartFailed with the error output."""
        command = ["ctr", "-a", self.socket_path, "-n", CONTAINERD_NAMESPACE, *arguments]
        result = subprocess.run(command, stdin=stdin or subprocess.DEVNULL, capture_output=True)
        if result.returncode != 0:
            raise StartFailed(f"`ctr {' '.join(arguments)}` failed: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout.decode()

    def is_responding(self) -> bool:
        return subprocess.run(["ctr", "-a", self.socket_path, "version"], capture_output=True).returncode == 0

    def list_images(self) -> dict[str, str]:
        """Return the digest of each image, by image name."""
        rows = [line.split() for line in self.run_ctr("images", "ls").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def load(self, layout_folder: Path, tag: str | None = None) -> str:
        """Import and unpack an image from an OCI layout, unless containerd already has the image. Returns the image's name."""
        name, index_entry = find_index_entry(layout_folder, tag)
        if self.list_images().get(name) == index_entry["digest"]:
            return name
        for tries_left in reversed(range(MAX_IMPORT_ATTEMPTS)):
            try:
                self._import_image(layout_folder, name, index_entry)
                break
            except StartFailed as error:
                if "not found" not in str(error) or not tries_left:
                    raise
        self._remove_untagged_images()
        return name

    def _import_image(self, layout_folder: Path, name: str, index_entry: dict[str, Any]) -> None:
        """Import an image into containerd: hard-link its large blobs, and send its other missing blobs as an archive."""
        missing_digests = self._list_missing_digests(layout_folder, index_entry)
        digests_to_copy = [digest for digest in missing_digests if not self._try_hard_link(layout_folder, digest)]
        with tempfile.TemporaryFile() as archive:
            _write_archive(archive, layout_folder, name, index_entry, digests_to_copy)
            archive.seek(0)
            self.run_ctr("images", "import", "-", stdin=archive)

    def _remove_untagged_images(self) -> None:
        """Remove images whose tag now belongs to a newer image. Otherwise they would occupy gigabytes of disk under the names `sha256:...`."""
        digest_by_name = self.list_images()
        for name in find_untagged_names(digest_by_name):
            self.run_ctr("images", "rm", name)

    def _list_missing_digests(self, layout_folder: Path, index_entry: dict[str, Any]) -> list[str]:
        manifest = json.loads(get_blob_path(layout_folder, index_entry["digest"]).read_text())
        existing_digests = set(self.run_ctr("content", "ls", "-q").split())
        image_digests = [index_entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
        return [digest for digest in dict.fromkeys(image_digests) if digest not in existing_digests]

    def _try_hard_link(self, layout_folder: Path, digest: str) -> bool:
        """Hard-link a blob into the content store and register it. Returns False if the blob is small or on another file system."""
        source_blob = get_blob_path(layout_folder, digest)
        if source_blob.stat().st_size < 1 << 20:
            return False
        target_blob = get_blob_path(self.data_folder / "io.containerd.content.v1.content", digest)
        try:
            os.link(source_blob, target_blob)
        except FileExistsError:
            pass  # a removed image has left this file; the content is the same, because the file's name is the hash of the content
        except OSError:
            return False
        size_text = str(source_blob.stat().st_size)
        with source_blob.open("rb") as content:  # ctr copies nothing, because the content store already has all bytes
            self.run_ctr(
                "content", "ingest", "--expected-digest", digest, "--expected-size", size_text, f"link-{digest}",
                stdin=content,
            )
        return True

    def remove_containers(self) -> None:
        """Remove the containers of an earlier cluster, but not the images."""
        for container in self.run_ctr("containers", "ls", "-q").split():
            self.run_ctr("containers", "rm", container)


def find_untagged_names(digest_by_name: dict[str, str]) -> list[str]:
    """Return the names of the images without a tag, whose only name is their hash. `digest_by_name` maps names to digests."""
    tagged_digests = {digest for name, digest in digest_by_name.items() if not name.startswith("sha256:")}
    return [name for name, digest in digest_by_name.items() if name.startswith("sha256:") and digest not in tagged_digests]


def get_blob_path(layout_folder: Path, digest: str) -> Path:
    """Return the path of a blob in a layout or a content store."""
    return layout_folder / "blobs" / digest.replace(":", "/")


def _write_archive(archive_file: BinaryIO, layout_folder: Path, name: str, index_entry: dict[str, Any], digests: list[str]) -> None:
    """Write an OCI archive of one image. The archive contains only the blobs in `digests`."""
    annotations = {**index_entry.get("annotations", {}), "io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [{**index_entry, "annotations": annotations}]}
    with tarfile.open(fileobj=archive_file, mode="w") as archive:
        layout_version = b'{"imageLayoutVersion":"1.0.0"}'
        for path, content in (("oci-layout", layout_version), ("index.json", json.dumps(index).encode())):
            tar_header = tarfile.TarInfo(path)
            tar_header.size = len(content)
            archive.addfile(tar_header, io.BytesIO(content))
        for digest in digests:
            archive.add(get_blob_path(layout_folder, digest), arcname=f"blobs/{digest.replace(':', '/')}")
