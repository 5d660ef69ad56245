"""Images into a node's containerd, moving as few bytes as possible.

A training image has gigabytes in a few layers that seldom change. Layers go in as hard links to the build's own files
(same file system, no copy); what the node has already is not sent again; only manifests travel.
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
from localcluster.oci import manifest_of

NAMESPACE = "k8s.io"
"""containerd's namespace for what the kubelet runs."""
IMPORTS = 3
"""How often an import is tried: what was linked for it may be collected as garbage before the image holds it."""


@dataclass(frozen=True)
class Containerd:
    """A containerd as seen from this machine. `root` is its persistent folder, `socket` a path that reaches it."""

    socket: str
    root: Path

    def ctr(self, *arguments: str, stdin: BinaryIO | None = None) -> str:
        """Run `ctr`, reading from the file `stdin`; its standard output. StartFailed with its words if it fails."""
        command = ["ctr", "-a", self.socket, "-n", NAMESPACE, *arguments]
        done = subprocess.run(command, stdin=stdin or subprocess.DEVNULL, capture_output=True)
        if done.returncode != 0:
            raise StartFailed(f"`ctr {' '.join(arguments)}` failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode()

    def answers(self) -> bool:
        """Whether it is up."""
        return subprocess.run(["ctr", "-a", self.socket, "version"], capture_output=True).returncode == 0

    def images(self) -> dict[str, str]:
        """Digest by name of all images."""
        rows = [line.split() for line in self.ctr("images", "ls").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def load(self, layout: Path, tag: str | None = None) -> str:
        """Bring an image of an OCI layout in and unpack it, unless it is there. Returns its name."""
        name, entry = manifest_of(layout, tag)
        if self.images().get(name) == entry["digest"]:
            return name
        for tries_left in reversed(range(IMPORTS)):
            try:
                self._import(layout, name, entry)
                break
            except StartFailed as error:
                if "not found" not in str(error) or not tries_left:
                    raise
        self._forget_untagged()
        return name

    def _import(self, layout: Path, name: str, entry: dict[str, Any]) -> None:
        """Link what is large, send the rest."""
        blobs = self._missing(layout, entry)
        remaining = [digest for digest in blobs if not self._link(layout, digest)]
        with tempfile.TemporaryFile() as archive:
            _write_archive(archive, layout, name, entry, remaining)
            archive.seek(0)
            self.ctr("images", "import", "-", stdin=archive)

    def _forget_untagged(self) -> None:
        """Let go of images whose tag went to a newer one: the kubelet's names for them would keep gigabytes."""
        images = self.images()
        for name in untagged(images):
            self.ctr("images", "rm", name)

    def _missing(self, layout: Path, entry: dict[str, Any]) -> list[str]:
        manifest = json.loads(blob(layout, entry["digest"]).read_text())
        have = set(self.ctr("content", "ls", "-q").split())
        wanted = [entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
        return [digest for digest in dict.fromkeys(wanted) if digest not in have]

    def _link(self, layout: Path, digest: str) -> bool:
        """Hard-link a blob into the store and make it known. False if it has to be sent (small, other file system)."""
        source = blob(layout, digest)
        if source.stat().st_size < 1 << 20:
            return False
        target = blob(self.root / "io.containerd.content.v1.content", digest)
        try:
            os.link(source, target)
        except FileExistsError:
            pass  # left by an image that was removed; the content is named by its hash
        except OSError:
            return False
        size = str(source.stat().st_size)
        with source.open("rb") as content:  # it seeks to the end and finds everything there: nothing is read
            self.ctr(
                "content", "ingest", "--expected-digest", digest, "--expected-size", size, f"link-{digest}",
                stdin=content,
            )
        return True

    def sweep(self) -> None:
        """Forget containers of an earlier life; images stay."""
        for container in self.ctr("containers", "ls", "-q").split():
            self.ctr("containers", "rm", container)


def untagged(images: dict[str, str]) -> list[str]:
    """Of digests by name, the names that are hashes of images which have no other name."""
    tagged = {digest for name, digest in images.items() if not name.startswith("sha256:")}
    return [name for name, digest in images.items() if name.startswith("sha256:") and digest not in tagged]


def blob(layout: Path, digest: str) -> Path:
    """The file of a blob in a layout or a content store."""
    return layout / "blobs" / digest.replace(":", "/")


def _write_archive(out: BinaryIO, layout: Path, name: str, entry: dict[str, Any], digests: list[str]) -> None:
    """An OCI archive of one image with only those blobs in it."""
    annotations = {**entry.get("annotations", {}), "io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [{**entry, "annotations": annotations}]}
    with tarfile.open(fileobj=out, mode="w") as archive:
        version = b'{"imageLayoutVersion":"1.0.0"}'
        for path, data in (("oci-layout", version), ("index.json", json.dumps(index).encode())):
            header = tarfile.TarInfo(path)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        for digest in digests:
            archive.add(blob(layout, digest), arcname=f"blobs/{digest.replace(':', '/')}")
