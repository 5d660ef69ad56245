"""Build the project's images from its Dockerfiles, as OCI layouts that a node imports with hard links.

buildah builds the images and keeps its layer cache outside the checkout. skopeo exports the images as uncompressed OCI layouts. A node unpacks only new
layers: after a code change, it reads megabytes instead of gigabytes.
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
from localcluster.oci import find_index_entry
from localcluster.requirements import IMAGE_PACKAGES, check_packages
from localcluster.s3 import find_program
from localcluster.steps import Step, silent_step

PUBLIC_BASE_IMAGE = "docker.io/library/python@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b"
"""Base image of the Dockerfiles: python:3.11-slim-bookworm of September 2026 (Python 3.11.16)."""
LOCAL_BASE_IMAGE = "localhost/finetune-base:bookworm-1"
"""Base image that debootstrap creates if PUBLIC_BASE_IMAGE cannot be pulled: the same Debian release with Debian's Python 3.11."""
CA_FILE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
DEBIAN_CA_FILE = Path("/etc/ssl/certs/ca-certificates.crt")
MIN_FREE_GB = 40
"""Disk space in GB: if less is free after a build, unused layers are removed."""
_UNUSED_FOLDERS = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log")
"""Folders that are emptied in the base image from debootstrap."""


class ImageName(StrEnum):
    """Images that can be built."""

    OPERATOR = "operator"
    TRAINER = "trainer"
    S3 = "s3"
    CLI = "cli"
    ALL = "all"
    """The images of the demo and the tests: operator, trainer and S3."""


@dataclass(frozen=True)
class ImageRecipe:
    """How to build one image of the project.

    `needed_disk_gb` is the disk space for the image's first build, including its OCI layout and its copy on a node.
    """

    name: str
    dockerfile: str
    build_arguments: tuple[str, ...] = ()
    needed_disk_gb: int = 2

    @property
    def tag(self) -> str:
        return f"localhost/{self.name}:dev"

    @property
    def layout_folder(self) -> Path:
        return paths.cache_folder() / "images" / self.name


RECIPE_BY_IMAGE = {
    ImageName.OPERATOR: ImageRecipe("finetune-operator", "operator/Dockerfile"),
    # The image contains no C compiler: only Triton needs one, for kernels on GPUs, and a local cluster has no GPUs.
    ImageName.TRAINER: ImageRecipe("finetune-trainer", "trainer-image/Dockerfile", ("COMPILER=",), needed_disk_gb=30),
    ImageName.CLI: ImageRecipe("finetune-cli", "cli/Dockerfile"),
}


@dataclass(frozen=True)
class BuiltImage:
    """A built image: its tag, and the folder of its OCI layout."""

    tag: str
    layout_folder: Path


def build_images(requested_images: Sequence[ImageName], step: Step = silent_step) -> list[BuiltImage]:
    """Build the images; unchanged layers come from the cache. Errors: MissingRequirement (packages, root, disk space), BuildFailed."""
    images_to_build = [ImageName.OPERATOR, ImageName.TRAINER, ImageName.S3] if ImageName.ALL in requested_images else list(dict.fromkeys(requested_images))
    built_images = []
    for image in images_to_build:
        if image is ImageName.S3:
            with step("build localhost/seaweedfs:dev"):
                built_images.append(BuiltImage(s3_pod.IMAGE_TAG, s3_pod.write_image_layout()))
        else:
            built_images.append(build_recipe(RECIPE_BY_IMAGE[image], paths.CHECKOUT_FOLDER, step))
    return built_images


def build_recipe(recipe: ImageRecipe, context: Path, step: Step = silent_step) -> BuiltImage:
    """Build one image from the folder `context` and export it. Raises the errors that `build_images` documents."""
    check_packages(IMAGE_PACKAGES)
    if os.geteuid() != 0:
        raise MissingRequirement("building images needs root: run this command as root, or build with Docker and use kind")
    with lock_builds():
        if _read_free_gb() < recipe.needed_disk_gb:
            remove_old_images()  # A changed lock file can make the build as large as the first one.
        if not recipe.layout_folder.exists():
            check_free_disk_space(recipe)
        base_image = ensure_base_image(step)
        with step(f"build {recipe.tag}"):
            _run_build(recipe, context, base_image)
        with step(f"export {recipe.tag}"):
            _export_layout(recipe)
        if _read_free_gb() < MIN_FREE_GB:
            remove_old_images()
    return BuiltImage(recipe.tag, recipe.layout_folder)


def remove_old_images() -> None:
    """Remove the containers of failed builds, the images without a tag, and their layers. The layers of the latest images stay in the cache.

    Call this function only while holding the build lock: the containers of a running build look like those of a failed build.
    """
    for container in json.loads(run_buildah("containers", "--json") or "[]") or []:
        if not container["imagename"]:  # A container that a test has mounted is based on an image with a name.
            run_buildah("rm", container["containername"])
    with contextlib.suppress(BuildFailed):  # buildah keeps an older image that a test has mounted; a later build removes it
        run_buildah("rmi", "--prune")


def check_free_disk_space(recipe: ImageRecipe) -> None:
    """Check that the disk has enough space for a first build. Errors: MissingRequirement."""
    free_gb = _read_free_gb()
    if free_gb < recipe.needed_disk_gb:
        raise MissingRequirement(
            f"{recipe.tag} needs {recipe.needed_disk_gb} GB of disk for its first build, but {paths.cache_folder()} has only {free_gb} GB free: "
            f"free disk space, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _read_free_gb() -> int:
    paths.cache_folder().mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(paths.cache_folder()).free >> 30


@contextlib.contextmanager
def lock_builds() -> Iterator[None]:
    """Hold the build lock of the machine, so that builds run one after the other."""
    get_layer_folder().mkdir(parents=True, exist_ok=True)
    with (get_layer_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def get_layer_folder() -> Path:
    """Return the folder in which buildah stores layers."""
    return paths.cache_folder() / "buildah"


def run_buildah(*arguments: str | Path, timeout: float | None = None) -> str:
    """Run buildah with its layers in `get_layer_folder()`. Returns its output. Errors: BuildFailed if buildah fails or needs more than `timeout` seconds."""
    command = ["buildah", *_make_storage_options(), *(str(a) for a in arguments)]
    return _run_command(command, f"buildah {arguments[0]}", timeout)


def _make_storage_options() -> list[str]:
    return ["--root", str(get_layer_folder() / "root"), "--runroot", str(get_layer_folder() / "run"), "--storage-driver", "overlay"]


def _run_command(command: list[str], description: str, timeout: float | None = None) -> str:
    # /tmp may be too small: buildah writes gigabytes of temporary files.
    temporary_folder = get_layer_folder() / "tmp"
    temporary_folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "TMPDIR": str(temporary_folder)}
    try:
        completed_process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{description} took longer than {timeout:.0f} s") from None
    if completed_process.returncode != 0:
        log_file = get_layer_folder() / "last-failure.log"
        log_file.write_text(completed_process.stdout + completed_process.stderr)
        log_tail = " | ".join((completed_process.stderr.strip() or completed_process.stdout.strip()).splitlines()[-4:])
        raise BuildFailed(f"{description} failed ({completed_process.returncode}): {log_tail} (log: {log_file})")
    return completed_process.stdout


def ensure_base_image(step: Step = silent_step) -> str:
    """Return the name of the base image: PUBLIC_BASE_IMAGE if it can be pulled, else LOCAL_BASE_IMAGE. Pull or create the base image if it does not exist."""
    images = json.loads(run_buildah("images", "--json") or "[]") or []
    existing_names = {name for image in images for name in image.get("names") or []}
    for name in (PUBLIC_BASE_IMAGE, LOCAL_BASE_IMAGE):
        if name in existing_names:
            return name
    with contextlib.suppress(BuildFailed), step(f"pull {PUBLIC_BASE_IMAGE}"):
        run_buildah("pull", "--quiet", PUBLIC_BASE_IMAGE, timeout=300)
        return PUBLIC_BASE_IMAGE
    with step("create a base image with debootstrap (the public base image cannot be pulled)"):
        _create_local_base()
    return LOCAL_BASE_IMAGE


def _create_local_base() -> None:
    with tempfile.TemporaryDirectory(dir=get_layer_folder()) as scratch:
        root_folder = Path(scratch) / "root"
        _run_command(
            ["debootstrap", "--variant=minbase", "--include=python3.11,ca-certificates", "bookworm", str(root_folder)],
            "debootstrap",
        )
        for folder in _UNUSED_FOLDERS:
            for path in (root_folder / folder).iterdir() if (root_folder / folder).is_dir() else []:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        container_name = run_buildah("from", "--quiet", "scratch").strip()
        try:
            run_buildah("add", "--quiet", container_name, root_folder, "/")
            run_buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", "--cmd", "/bin/bash", container_name)
            run_buildah("commit", "--quiet", "--disable-compression", container_name, LOCAL_BASE_IMAGE)
        finally:
            run_buildah("rm", container_name)


def _run_build(recipe: ImageRecipe, context: Path, base_image: str) -> None:
    with tempfile.TemporaryDirectory(dir=get_layer_folder()) as scratch:
        # This build context replaces the Dockerfiles' stage `uv`, because buildah 1.28 cannot mount a file from a stage that is in its cache.
        shutil.copy2(find_program("uv", "the Python package uv"), scratch)
        build_options = [f"--build-arg={argument}" for argument in (f"BASE={base_image}", *recipe.build_arguments)]
        run_buildah(
            "bud", "--quiet", "--isolation", "chroot", "--network", "host", "--pull=never", "--layers",
            "--disable-compression", *build_options, *_make_ca_secret_options(), *_make_uv_cache_options(), "--build-context", f"uv={scratch}",
            "--tag", recipe.tag, "--file", context / recipe.dockerfile, context,
        )


def _make_ca_secret_options() -> list[str]:
    """Return the buildah options that pass this machine's CA certificates as a build secret.

    Downloads in a build need these certificates if a proxy re-signs TLS connections.
    """
    configured_files = [Path(os.environ[name]) for name in CA_FILE_VARIABLES if os.environ.get(name)]
    for path in [*configured_files, DEBIAN_CA_FILE]:
        if path.is_file():
            return ["--secret", f"id=ca,src={path}"]
    return []


def _make_uv_cache_options() -> list[str]:
    """Return the buildah options that mount the user's uv cache, so that a build does not download cached packages again."""
    cache_path = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    cache_path.mkdir(parents=True, exist_ok=True)
    return ["--volume", f"{cache_path}:/root/.cache/uv"]


def _export_layout(recipe: ImageRecipe) -> None:
    """Export the image to its OCI layout. skopeo skips blobs that the layout already has. After the export, remove the blobs of older images."""
    recipe.layout_folder.parent.mkdir(parents=True, exist_ok=True)
    (recipe.layout_folder / "index.json").unlink(missing_ok=True)
    source_reference = f"containers-storage:[overlay@{get_layer_folder() / 'root'}+{get_layer_folder() / 'run'}]{recipe.tag}"
    command = [
        "skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers",
        source_reference, f"oci:{recipe.layout_folder}:{recipe.tag}",
    ]
    _run_command(command, f"export of {recipe.tag}")
    _, index_entry = find_index_entry(recipe.layout_folder, recipe.tag)
    blobs_folder = recipe.layout_folder / "blobs" / "sha256"
    manifest = json.loads((blobs_folder / index_entry["digest"].partition(":")[2]).read_text())
    used_digests = {index_entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
    for path in blobs_folder.iterdir():
        if f"sha256:{path.name}" not in used_digests:
            path.unlink()


