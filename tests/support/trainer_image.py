"""Runs Python in the built trainer image, with the restrictions of a trainer pod but without a cluster.

A trainer pod runs as uid 10001 without capabilities, on a read-only root file system. The containers that this module starts have the same restrictions. In
addition, their only network interface is loopback. buildah builds the image, and runc runs the containers.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import IO, Any

from finetune_api.names import TRAINER_UID

from localcluster import images, paths
from localcluster.requirements import find_executable
from localcluster.steps import show_step
from tests.support.cells import CHECKOUT_FOLDER, PythonRunner

CHECKOUT_IN_CONTAINER = "/checkout"
PACKAGES_IN_IMAGE = ("crds/finetune_api", "trainer-image/finetune_trainer")
"""Packages that both the checkout and the image contain. In a container, the copies of these packages in the checkout are hidden by the copies in the image,
which are mounted over them.
"""
NAME_PREFIX = "finetune-test-"
TEST_PACKAGES = ("pytest", "pluggy", "iniconfig", "hypothesis", "sortedcontainers", "pytest-asyncio", "pytest-timeout", "cryptography", "cffi", "pycparser")
"""Packages that the tests need but the image does not contain."""
PASSED_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")
"""Environment variables of the test process that are also set in the containers, because they adapt libraries to this machine."""
SITE_PACKAGES = "/opt/venv/lib/python3.11/site-packages"
"""Folder of the installed packages in the image."""
_container_numbers = itertools.count()


@dataclass(frozen=True)
class TrainerImage:
    """The trainer image, mounted as a folder of this machine."""

    root: Path
    """The image's root file system."""
    environment: Mapping[str, str]
    """The environment variables that the image sets."""
    working_folder: str
    user: str

    def run(
        self, command: Sequence[str], shared_folder: Path, output: IO[bytes], *, environment: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> int:  # fmt: skip
        """Run a command in a new container. Returns its exit code.

        `shared_folder` is mounted at the same path in the container, and the container's user becomes the owner of all files in it. Errors:
        subprocess.TimeoutExpired.
        """
        for path in [shared_folder, *shared_folder.rglob("*")]:
            os.chown(path, TRAINER_UID, TRAINER_UID, follow_symlinks=False)
        name = f"{NAME_PREFIX}{os.getpid()}-{next(_container_numbers)}"
        with tempfile.TemporaryDirectory(prefix=name) as bundle:
            hosts = Path(bundle) / "hosts"
            hosts.write_text("127.0.0.1 localhost trainer\n")
            mounts = [
                _make_bind_mount(hosts, "/etc/hosts"), _make_bind_mount(CHECKOUT_FOLDER, CHECKOUT_IN_CONTAINER),
                *(_make_bind_mount(self.root / "app" / Path(path).name, f"{CHECKOUT_IN_CONTAINER}/{path}") for path in PACKAGES_IN_IMAGE),
                _make_bind_mount(shared_folder, str(shared_folder), is_writable=True),
            ]  # fmt: skip
            configuration = self._make_container_configuration(command, environment or {}, mounts)
            (Path(bundle) / "config.json").write_text(json.dumps(configuration))
            try:
                return subprocess.run(
                    _make_runc_command("run", "--bundle", bundle, name), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
                ).returncode
            finally:
                subprocess.run(_make_runc_command("delete", "--force", name), capture_output=True)

    def run_pytest(self, arguments: Sequence[str], shared_folder: Path, output: IO[bytes], *, timeout: float) -> int:
        """Run tests of this checkout with the Python and libraries of the image. The packages in TEST_PACKAGES, such as pytest, are copied from the current
        Python environment, because the image does not have them. Returns its exit code.
        """
        packages = shared_folder / "test-packages"
        for name in TEST_PACKAGES:
            for file in distribution(name).files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    (packages / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(str(file.locate()), packages / file)
        command = [
            "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", CHECKOUT_IN_CONTAINER, "--basetemp", str(shared_folder / "pytest"),
            *(f"{CHECKOUT_IN_CONTAINER}/{argument}" if argument.startswith("tests/") else argument for argument in arguments),
        ]  # fmt: skip
        environment = {"PYTHONPATH": f"{self.environment['PYTHONPATH']}:{CHECKOUT_IN_CONTAINER}:{packages}", "CI": "1", "HF_HUB_OFFLINE": "1"}
        return self.run(command, shared_folder, output, environment=environment, timeout=timeout)

    def python_runner(self, shared_folder: Path) -> PythonRunner:
        """Return a function that runs the image's Python with the image's trainer and this checkout's test helpers."""

        def run_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes], timeout: float) -> int:
            variables = {**environment, "PYTHONPATH": f"{self.environment['PYTHONPATH']}:{CHECKOUT_IN_CONTAINER}"}
            return self.run(["python", *arguments], shared_folder, output, environment=variables, timeout=timeout)

        return run_python

    def _make_container_configuration(self, command: Sequence[str], environment: Mapping[str, str], mounts: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the `config.json` of a container: https://github.com/opencontainers/runtime-spec/blob/v1.0.2/config.md"""
        user, group = (int(number) for number in self.user.split(":"))
        passed_variables = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        variables = {**self.environment, **passed_variables, **environment}
        return {
            "ociVersion": "1.0.2",
            "hostname": "trainer",
            "root": {"path": str(self.root), "readonly": True},
            "process": {
                "args": list(command), "cwd": self.working_folder, "env": [f"{name}={value}" for name, value in variables.items()],
                "user": {"uid": user, "gid": group}, "capabilities": {}, "noNewPrivileges": True,
            },
            "mounts": [
                _make_special_mount("proc", "/proc", "nosuid,noexec,nodev"), _make_special_mount("sysfs", "/sys", "nosuid,noexec,nodev,ro"),
                _make_special_mount("tmpfs", "/dev", "nosuid,mode=755,size=65536k"), _make_special_mount("devpts", "/dev/pts", "newinstance,ptmxmode=0666"),
                _make_special_mount("tmpfs", "/dev/shm", "nosuid,nodev,mode=1777"), _make_special_mount("tmpfs", "/tmp", "nosuid,nodev,mode=1777"),
                *mounts,
            ],
            "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]},
        }  # fmt: skip


def _make_bind_mount(source: Path, destination: str, *, is_writable: bool = False) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": destination, "options": ["rbind", "rw" if is_writable else "ro"]}


def _make_special_mount(kind: str, destination: str, options: str) -> dict[str, Any]:
    return {"type": kind, "source": kind, "destination": destination, "options": options.split(",")}


def _make_runc_command(*arguments: str) -> list[str]:
    return [find_executable("runc") or "runc", "--root", str(paths.cache_folder() / "test-containers"), *arguments]


@contextmanager
def open_trainer_image() -> Iterator[TrainerImage]:
    """Build the trainer image of this checkout and mount it. Image layers that have not changed since the last build come from the build cache."""
    _remove_abandoned_containers()
    images.build_images([images.ImageName.TRAINER], show_step)
    with _mount_image() as image:
        yield image


@contextmanager
def open_broken_trainer_image(removed_folder: str) -> Iterator[TrainerImage]:
    """Mount the trainer image and delete one folder of its installed packages."""
    with _mount_image() as image:
        shutil.rmtree(image.root / SITE_PACKAGES.lstrip("/") / removed_folder)
        yield image


@contextmanager
def _mount_image() -> Iterator[TrainerImage]:
    """Mount the trainer image. Changes below the mounted root do not change the image."""
    name = f"{NAME_PREFIX}{os.getpid()}-{next(_container_numbers)}"
    images.run_buildah("from", "--quiet", "--pull=never", "--name", name, images.RECIPE_BY_IMAGE[images.ImageName.TRAINER].tag)
    try:
        config = json.loads(images.run_buildah("inspect", name))["OCIv1"]["config"]
        variables = dict(variable.split("=", 1) for variable in config["Env"])
        yield TrainerImage(Path(images.run_buildah("mount", name).strip()), variables, config["WorkingDir"], config["User"])
    finally:
        images.run_buildah("rm", name)


def _remove_abandoned_containers() -> None:
    """Remove the containers that killed test processes have left behind."""
    container_names = subprocess.run(_make_runc_command("list", "--quiet"), capture_output=True, text=True).stdout.split()
    for name in container_names:
        if _is_abandoned(name):
            subprocess.run(_make_runc_command("delete", "--force", name), capture_output=True)
    for container in json.loads(images.run_buildah("containers", "--json") or "[]") or []:
        if _is_abandoned(container["containername"]):
            images.run_buildah("rm", container["containername"])


def _is_abandoned(name: str) -> bool:
    owner_pid = name.removeprefix(NAME_PREFIX).partition("-")[0]
    return name.startswith(NAME_PREFIX) and not Path(f"/proc/{owner_pid}").exists()
