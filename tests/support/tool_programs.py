"""Installs programs that only tests need: Python packages in separate environments, and promtool from its Debian package."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localcluster.paths import cache_folder

REQUIREMENTS_FOLDER = Path(__file__).parents[2] / "requirements"


@contextmanager
def _lock(name: str) -> Iterator[None]:
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_environment(name: str) -> Path:
    """Create an environment with the packages of `requirements/NAME.lock`, unless it exists. Returns the path of its Python."""
    lock_file = REQUIREMENTS_FOLDER / f"{name}.lock"
    digest = hashlib.sha256(lock_file.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{sys.version_info[0]}.{sys.version_info[1]}-{digest}"
    python, ready_marker = folder / "bin" / "python", folder / ".ready"
    with _lock(name):
        if not ready_marker.exists():
            uv = next(iter(cache_folder().glob("uv-*/bin/uv")))
            subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
            subprocess.run([uv, "pip", "install", "-q", "--python", python, "--require-hashes", "-r", lock_file], check=True)
            ready_marker.touch()
    return python


def ensure_promtool() -> Path | None:
    """Return the path of promtool on the PATH or in Debian's package `prometheus`, or None if neither has it.

    The package is unpacked but not installed, because its installation would start a server. The package is used because `go install` cannot build promtool
    from the Go module of Prometheus.
    """
    if installed_path := shutil.which("promtool"):
        return Path(installed_path)
    path = cache_folder() / "promtool" / "usr/bin/promtool"
    with _lock("promtool"):
        if not path.exists() and shutil.which("apt-get"):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(["apt-get", "download", "-q", "prometheus"], cwd=folder, check=True, capture_output=True)
                (package,) = Path(folder).glob("*.deb")
                subprocess.run(["dpkg", "-x", package, cache_folder() / "promtool"], check=True)
    return path if path.exists() else None
