"""Build the files of a release from the last commit: wheel, chart, CRD, kubectl plugin, bills of materials and checksums.

    python scripts/release.py dist/release [--url https://host/releases/v0.2.0] [--image NAME@sha256:DIGEST ...]

The same commit and locked packages always give the same bytes: all times are SOURCE_DATE_EPOCH (default: the time of the commit), and owners,
permissions and the order of files are fixed. Images are built and pushed separately, because only the registry knows their digests.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sbom
import yaml
from finetune_api.names import RELEASE
from packages import ROOT, MissingPackage

CHART_FOLDER = Path("helm/finetune-operator")
CRD_FILE = Path("crds/finetunejobs.yaml")
CHECKSUMS_FILE_NAME = "SHA256SUMS"
LAUNCHER_FILE = Path("scripts/krew/kubectl-finetune")
IMAGE_PATTERN = re.compile(r"[a-z0-9][a-z0-9./:_-]*@sha256:[0-9a-f]{64}")
OLDEST_ZIP_EPOCH_SECONDS = 315532800
"""1980-01-01 in seconds since 1970: the earliest time that a zip file can contain."""


class ReleaseError(Exception):
    """The release cannot be built. The message says what to change."""


@dataclass(frozen=True)
class ReleaseFile:
    """A file in an archive. `is_program`: whether it is executable."""

    name: str
    content: bytes
    is_program: bool = False


def build_release(folder: Path, url: str | None, images: Iterable[str]) -> list[Path]:
    """Write all files of the release to `folder`, and remove what it contained before. Returns the paths of the files. Errors: ReleaseError, MissingPackage."""
    image_references = sorted(images)
    if invalid_references := [image for image in image_references if not IMAGE_PATTERN.fullmatch(image)]:
        raise ReleaseError(f"--image {invalid_references[0]}: write name@sha256:digest, with the digest that the registry printed")
    if url is not None and not url.startswith("https://"):
        raise ReleaseError(f"--url {url}: write the https:// address of the folder from which users download the files")
    if folder.exists() and any(folder.iterdir()) and not (folder / CHECKSUMS_FILE_NAME).exists():
        raise ReleaseError(f"{folder} is not empty and contains no release: give a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    epoch_seconds = read_source_date_epoch()
    with tempfile.TemporaryDirectory() as temporary_folder:
        source_folder = Path(temporary_folder) / "source"
        export_commit(source_folder)
        wheel_file = build_wheel(source_folder, folder, epoch_seconds)
        write_tar(folder / f"finetune-operator-{RELEASE}.tgz", read_chart_files(source_folder / CHART_FOLDER), epoch_seconds)
        plugin_archive = folder / f"kubectl-finetune-{RELEASE}.tar.gz"
        write_tar(plugin_archive, read_plugin_files(source_folder, wheel_file), epoch_seconds)
        shutil.copyfile(source_folder / CRD_FILE, folder / CRD_FILE.name)
    sbom.write_files(folder)
    if image_references:
        (folder / "images.txt").write_text("\n".join(image_references) + "\n", "utf-8")
    if url is not None:
        (folder / "finetune.yaml").write_text(make_krew_manifest(plugin_archive, url.rstrip("/")), "utf-8")
    return [*sorted(folder.iterdir()), write_checksums(folder)]


def read_source_date_epoch() -> int:
    """Return the time that all files of a release get, in seconds since 1970: SOURCE_DATE_EPOCH, or the time of the last commit."""
    epoch_text = os.environ.get("SOURCE_DATE_EPOCH") or run_git("log", "-1", "--format=%ct").decode().strip()
    if not epoch_text.isdecimal():
        raise ReleaseError(f"SOURCE_DATE_EPOCH is {epoch_text}: write the seconds since 1970 as a number")
    return max(int(epoch_text), OLDEST_ZIP_EPOCH_SECONDS)


def run_git(*arguments: str) -> bytes:
    completed_process = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False)
    if completed_process.returncode:
        raise ReleaseError(f"git {arguments[0]} failed: {completed_process.stderr.decode().strip()}; build a release in a clone of the repository")
    return completed_process.stdout


def export_commit(folder: Path) -> None:
    """Write the files of the last commit to `folder`."""
    if run_git("status", "--porcelain", "--untracked-files=no").strip():
        print("release: the release contains the files of the last commit, without the uncommitted changes", file=sys.stderr)
    with tarfile.open(fileobj=io.BytesIO(run_git("archive", "HEAD"))) as archive:
        archive.extractall(folder, filter="data")


def build_wheel(source_folder: Path, release_folder: Path, epoch_seconds: int) -> Path:
    """Build the wheel, and repack it into `release_folder`, so that the times, permissions and order of its files are fixed. Returns its path."""
    build_program = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    built_wheel_folder = source_folder.parent / "wheel"
    built_wheel_folder.mkdir()
    completed_process = subprocess.run(
        [sys.executable, "-c", build_program, built_wheel_folder], cwd=source_folder, capture_output=True, text=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch_seconds)},
    )
    if completed_process.returncode:
        raise ReleaseError(f"the wheel could not be built: {completed_process.stderr.strip()[-2000:]}")
    (unordered_wheel,) = built_wheel_folder.glob("*.whl")
    ordered_wheel = release_folder / unordered_wheel.name
    with zipfile.ZipFile(unordered_wheel) as old_archive, zipfile.ZipFile(ordered_wheel, "w", zipfile.ZIP_DEFLATED) as new_archive:
        for name in sorted(old_archive.namelist()):
            entry = zipfile.ZipInfo(name, time.gmtime(epoch_seconds)[:6])
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o100644 << 16, 3
            new_archive.writestr(entry, old_archive.read(name))
    return ordered_wheel


def read_chart_files(chart_folder: Path) -> list[ReleaseFile]:
    """Return the files of the chart, below a folder with the chart's name. Files that match `.helmignore` are left out."""
    ignored_patterns = [*(chart_folder / ".helmignore").read_text("utf-8").split(), ".helmignore"]
    names = sorted(path.relative_to(chart_folder).as_posix() for path in chart_folder.rglob("*") if path.is_file())
    included_names = [name for name in names if not any(fnmatch.fnmatch(Path(name).name, pattern.rstrip("/")) for pattern in ignored_patterns)]
    # Helm expects Chart.yaml to be the first file of the archive.
    ordered_names = sorted(included_names, key=lambda name: (name != "Chart.yaml", name))
    return [ReleaseFile(f"{chart_folder.name}/{name}", (chart_folder / name).read_bytes()) for name in ordered_names]


def read_plugin_files(source_folder: Path, wheel_file: Path) -> list[ReleaseFile]:
    """Return the files of the kubectl plugin: a launcher, the wheel, the locked requirements and the licence."""
    return [
        ReleaseFile("kubectl-finetune", (source_folder / LAUNCHER_FILE).read_bytes(), is_program=True), ReleaseFile(wheel_file.name, wheel_file.read_bytes()),
        ReleaseFile("requirements.lock", (source_folder / "requirements/cli.lock").read_bytes()),
        ReleaseFile("LICENSE", (source_folder / "LICENSE").read_bytes()),
    ]  # fmt: skip


def write_tar(path: Path, files: Iterable[ReleaseFile], epoch_seconds: int) -> None:
    """Write a gzip-compressed tar archive with fixed times, owners and permissions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mtime, entry.mode = len(file.content), epoch_seconds, 0o755 if file.is_program else 0o644
            archive.addfile(entry, io.BytesIO(file.content))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=epoch_seconds))


def make_krew_manifest(plugin_archive: Path, url: str) -> str:
    """Return the manifest of the kubectl plugin for a krew index."""
    platform_entry = {
        "selector": {"matchExpressions": [{"key": "os", "operator": "In", "values": ["darwin", "linux"]}]},
        "uri": f"{url}/{plugin_archive.name}", "sha256": hashlib.sha256(plugin_archive.read_bytes()).hexdigest(),
        "files": [{"from": "*", "to": "."}], "bin": "kubectl-finetune",
    }  # fmt: skip
    manifest = {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2", "kind": "Plugin", "metadata": {"name": "finetune"},
        "spec": {
            "version": f"v{RELEASE}", "homepage": url, "shortDescription": "Create, watch and import fine-tuning jobs",
            "description": "Creates, validates, watches and imports FineTuneJobs of the finetune-operator, and reads their results from storage.",
            "caveats": "Needs Python 3.11 or newer. The first start installs locked Python packages from your package index.",
            "platforms": [platform_entry],
        },
    }  # fmt: skip
    return str(yaml.safe_dump(manifest, sort_keys=False, width=160))


def write_checksums(folder: Path) -> Path:
    """Write the file SHA256SUMS, which `sha256sum --check` reads. Returns its path."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE_NAME).write_text("".join(lines), "utf-8")
    return folder / CHECKSUMS_FILE_NAME


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="release", description="Build the files of a release from the last commit.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", help="https:// address from which users download the files. Without --url, no krew manifest is written.")
    parser.add_argument("--image", action="append", default=[], help="pushed image: name@sha256:digest; may be repeated")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(map(str, build_release(options.folder, options.url, options.image))))
    except (ReleaseError, MissingPackage) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
