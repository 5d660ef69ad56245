"""Starts real servers for the tests of trackers: MLflow in a separate Python environment, and FerretDB instead of MongoDB.

FerretDB implements MongoDB's protocol and stores documents in SQLite. The tests use FerretDB, because there is no freely licensed package of the MongoDB
server. `python -m tests.support.tracker_servers` installs MLflow and builds FerretDB into the cache.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from localcluster.build import ensure_built
from localcluster.ports import find_free_ports
from localcluster.processes import Lifetime, Server, spawn
from tests.support.tool_programs import ensure_environment

START_SECONDS = 300
MLFLOW_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""With these environment variables, the MLflow server sends no usage data and starts no worker processes for its job queue."""


def ensure_mlflow_server() -> Path:
    """Create an environment with the locked packages of the MLflow server, unless it exists. Returns the path of its Python."""
    return ensure_environment("mlflow-server")


class TrackerServer:
    """A server process that a test can stop and start again with the same port and data."""

    def __init__(self, name: str, folder: Path, make_command: Callable[[int, Path], list[str | Path]], is_ready: Callable[[int], bool]) -> None:
        self._name, self._folder, self._make_command, self._is_ready = name, folder, make_command, is_ready
        self.port = find_free_ports(1)[0]
        self._server: Server | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> Self:
        """Start the server, and wait until it answers."""
        env = {**os.environ, "HOME": str(self._folder), "DO_NOT_TRACK": "true", **MLFLOW_ENVIRONMENT}
        env.pop("PYTHONPATH", None)
        self._server = spawn(
            self._name, self._make_command(self.port, self._folder), owner=self._folder, log=self._folder / "log", lifetime=Lifetime.UNTIL_PARENT_ENDS,
            env=env, working_folder=self._folder,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(self.port):
            self._server.check_running()
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        return self

    def stop(self) -> None:
        """Kill the server and its worker processes."""
        if self._server is not None and self._server.process.poll() is None:
            os.killpg(self._server.process.pid, 9)
            self._server.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


def make_mlflow_server(folder: Path, host: str = "127.0.0.1", run_in: Sequence[str] = (), allowed_hosts: str | None = None) -> TrackerServer:
    """Return an MLflow server with an SQLite database. It listens on `host`.

    `run_in` is a command prefix with which the server runs in another network namespace. `allowed_hosts` are the host names that clients may use.
    """
    python = ensure_mlflow_server()

    def make_command(port: int, folder: Path) -> list[str | Path]:
        return [
            *run_in, python, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder / "artifacts"),
            *(["--allowed-hosts", allowed_hosts] if allowed_hosts else []),
        ]  # fmt: skip

    def is_ready(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    return TrackerServer("mlflow", folder, make_command, is_ready)


def make_mongodb_server(folder: Path) -> TrackerServer:
    """Return a FerretDB server, which stands in for MongoDB."""
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    program = ensure_built("mongodb")

    def is_ready(port: int) -> bool:
        try:
            with MongoClient("127.0.0.1", port, serverSelectionTimeoutMS=500) as client:
                return bool(client.admin.command("ping")["ok"])
        except PyMongoError:
            return False

    return TrackerServer("mongodb", folder, lambda port, folder: [program, f"127.0.0.1:{port}", str(folder)], is_ready)


if __name__ == "__main__":
    ensure_mlflow_server()
    ensure_built("mongodb")
