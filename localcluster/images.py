"""Build the project's images from its Dockerfiles, as OCI layouts that a node imports with hard links.

buildah builds the images; its layer cache lies outside the checkout. skopeo exports them as uncompressed OCI layouts. A node unpacks only new
layers. After a code change, it therefore reads megabytes instead of gigabytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from localcluster import paths, s3_pod
from localcluster.errors import BuildFailed, MissingRequirement
from localcluster.oci import manifest_of
from localcluster.requirements import IMAGE_PACKAGES, check_packages
from localcluster.s3 import find_program
from localcluster.steps import Step, silent

PUBLIC_BASE = "docker.io/library/python:3.11-slim-bookworm"
LOCAL_BASE = "localhost/finetune-base:bookworm-1"
"""Base image that debootstrap creates if PUBLIC_BASE cannot be pulled: the same Debian release with Debian's Python 3.11."""
CA_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
DEBIAN_CA = Path("/etc/ssl/certs/ca-certificates.crt")
MIN_FREE_GB = 40
"""If less disk space than this is free after a build, unused layers are removed."""
_UNUSED_FOLDERS = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log")
"""Folders that are emptied in the base image from debootstrap."""


class ImageName(StrEnum):
    """Images that can be built."""

    OPERATOR = "operator"
    TRAINER = "trainer"
    S3 = "s3"
    ALL = "all"


@dataclass(frozen=True)
class Recipe:
    """How to build one image of the project. `needs_gb` is the disk space for its first build, including the layout and the node's copy."""

    name: str
    dockerfile: str
    arguments: tuple[str, ...] = ()
    needs_gb: int = 2

    @property
    def tag(self) -> str:
        return f"localhost/{self.name}:dev"

    @property
    def layout(self) -> Path:
        return paths.cache() / "images" / self.name


RECIPES = {
    ImageName.OPERATOR: Recipe("finetune-operator", "operator/Dockerfile"),
    # The image contains no C compiler: only Triton needs one, for kernels on GPUs, and a local cluster has no GPUs.
    ImageName.TRAINER: Recipe("finetune-trainer", "trainer-image/Dockerfile", ("COMPILER=",), needs_gb=30),
}


@dataclass(frozen=True)
class BuiltImage:
    """An image and its OCI layout."""

    tag: str
    layout: Path


def build(which: Sequence[ImageName], step: Step = silent) -> list[BuiltImage]:
    """Build the images; unchanged layers come from the cache. Errors: MissingRequirement (packages, root, disk space), BuildFailed."""
    wanted = [ImageName.OPERATOR, ImageName.TRAINER, ImageName.S3] if ImageName.ALL in which else list(dict.fromkeys(which))
    built = []
    for image in wanted:
        if image is ImageName.S3:
            with step("build localhost/seaweedfs:dev"):
                built.append(BuiltImage(s3_pod.TAG, s3_pod.layout()))
        else:
            built.append(build_recipe(RECIPES[image], paths.CHECKOUT, step))
    return built


def build_recipe(recipe: Recipe, context: Path, step: Step = silent) -> BuiltImage:
    """Build one image from the folder `context` and export it. Errors: the same as of `build`."""
    check_packages(IMAGE_PACKAGES)
    if os.geteuid() != 0:
        raise MissingRequirement("building images needs root: run this command as root, or build with Docker and use kind")
    with lock_builds():
        if not recipe.layout.exists():
            check_disk(recipe)
        base = ensure_base(step)
        with step(f"build {recipe.tag}"):
            _run_build(recipe, context, base)
        with step(f"export {recipe.tag}"):
            _export(recipe)
        if _free_gb() < MIN_FREE_GB:
            buildah("rmi", "--prune")
    return BuiltImage(recipe.tag, recipe.layout)


def check_disk(recipe: Recipe) -> None:
    """Check that the disk has enough space for a first build. Errors: MissingRequirement."""
    free_gb = _free_gb()
    if free_gb < recipe.needs_gb:
        raise MissingRequirement(
            f"{recipe.tag} needs {recipe.needs_gb} GB of disk for its first build, but {paths.cache()} has only {free_gb} GB free: "
            f"free disk space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _free_gb() -> int:
    paths.cache().mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(paths.cache()).free >> 30


@contextlib.contextmanager
def lock_builds() -> Iterator[None]:
    """Hold the build lock of the machine, so that builds run one after the other."""
    layer_folder().mkdir(parents=True, exist_ok=True)
    with (layer_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def layer_folder() -> Path:
    """Folder in which buildah stores layers."""
    return paths.cache() / "buildah"


def buildah(*arguments: str | Path, timeout: float | None = None) -> str:
    """Run buildah with its layers in `layer_folder()`. Returns its output. Errors: BuildFailed if buildah fails or needs more than `timeout` seconds."""
    command = ["buildah", *_storage(), *(str(a) for a in arguments)]
    return _run(command, f"buildah {arguments[0]}", timeout)


def _storage() -> list[str]:
    return ["--root", str(layer_folder() / "root"), "--runroot", str(layer_folder() / "run"), "--storage-driver", "overlay"]


def _run(command: list[str], what: str, timeout: float | None = None) -> str:
    # /tmp may be too small: buildah writes gigabytes of temporary files.
    scratch = layer_folder() / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "TMPDIR": str(scratch)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{what} took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        log = layer_folder() / "last-failure.log"
        log.write_text(done.stdout + done.stderr)
        end = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-4:])
        raise BuildFailed(f"{what} failed ({done.returncode}): {end} (log: {log})")
    return done.stdout


def ensure_base(step: Step = silent) -> str:
    """Return the name of the base image: PUBLIC_BASE if it can be pulled, else LOCAL_BASE. Create the image if it does not exist."""
    images = json.loads(buildah("images", "--json") or "[]") or []
    known = {name for image in images for name in image.get("names") or []}
    for name in (PUBLIC_BASE, LOCAL_BASE):
        if name in known:
            return name
    with contextlib.suppress(BuildFailed), step(f"pull {PUBLIC_BASE}"):
        buildah("pull", "--quiet", PUBLIC_BASE, timeout=300)
        return PUBLIC_BASE
    with step("create a base image with debootstrap (the public one cannot be pulled)"):
        _debootstrap()
    return LOCAL_BASE


def _debootstrap() -> None:
    with tempfile.TemporaryDirectory(dir=layer_folder()) as scratch:
        root = Path(scratch) / "root"
        _run(
            ["debootstrap", "--variant=minbase", "--include=python3.11,ca-certificates", "bookworm", str(root)],
            "debootstrap",
        )
        for folder in _UNUSED_FOLDERS:
            for path in (root / folder).iterdir() if (root / folder).is_dir() else []:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        container = buildah("from", "--quiet", "scratch").strip()
        try:
            buildah("add", "--quiet", container, root, "/")
            buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", "--cmd", "/bin/bash", container)
            buildah("commit", "--quiet", "--disable-compression", container, LOCAL_BASE)
        finally:
            buildah("rm", container)


def _run_build(recipe: Recipe, context: Path, base: str) -> None:
    with tempfile.TemporaryDirectory(dir=layer_folder()) as scratch:
        shutil.copy2(find_program("uv", "the Python package uv"), scratch)
        arguments = [f"--build-arg={argument}" for argument in (f"BASE={base}", *recipe.arguments)]
        buildah(
            "bud", "--quiet", "--isolation", "chroot", "--network", "host", "--pull=never", "--layers",
            "--disable-compression", *arguments, *_ca_secret(), *_uv_cache(), "--build-context", f"uv={scratch}",
            "--tag", recipe.tag, "--file", context / recipe.dockerfile, context,
        )


def _ca_secret() -> list[str]:
    """Pass the CA certificates of this machine as a build secret. If a proxy re-signs TLS connections, downloads need these certificates."""
    named = [Path(os.environ[name]) for name in CA_FILES if os.environ.get(name)]
    for path in [*named, DEBIAN_CA]:
        if path.is_file():
            return ["--secret", f"id=ca,src={path}"]
    return []


def _uv_cache() -> list[str]:
    """Mount the user's uv cache, so that a build does not download cached packages again."""
    path = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    path.mkdir(parents=True, exist_ok=True)
    return ["--volume", f"{path}:/root/.cache/uv"]


def _export(recipe: Recipe) -> None:
    """Export the image to its OCI layout. skopeo skips existing blobs. Afterwards, remove the blobs of older images."""
    recipe.layout.parent.mkdir(parents=True, exist_ok=True)
    (recipe.layout / "index.json").unlink(missing_ok=True)
    source = f"containers-storage:[overlay@{layer_folder() / 'root'}+{layer_folder() / 'run'}]{recipe.tag}"
    command = [
        "skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers",
        source, f"oci:{recipe.layout}:{recipe.tag}",
    ]
    _run(command, f"export of {recipe.tag}")
    _, entry = manifest_of(recipe.layout, recipe.tag)
    folder = recipe.layout / "blobs" / "sha256"
    manifest = json.loads((folder / entry["digest"].partition(":")[2]).read_text())
    used = {entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    for path in folder.iterdir():
        if f"sha256:{path.name}" not in used:
            path.unlink()


