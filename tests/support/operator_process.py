"""Runs the operator as a process with a configuration file. A test can stop, kill and signal the process, and read its log and metrics."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from localcluster.ports import find_free_ports

CHECKOUT_FOLDER = Path(__file__).resolve().parents[2]
FAST_CONFIG: dict[str, Any] = {
    "storage": {"uri": "s3://bucket/prefix", "endpoint": "http://127.0.0.1:1"},
    "trainer": {"image": "example.org/trainer:1"},
    "resyncSeconds": 5,
    "progressSeconds": 1,
    "lostNodeSeconds": 1,
    "retry": {"baseSeconds": 0.2, "maxSeconds": 2},
    "scrape": {"intervalSeconds": 0.2, "startingIntervalSeconds": 0.2, "timeoutSeconds": 2},
    "log": {"format": "json", "level": "info"},
}
"""A configuration of the operator with short intervals and timeouts, so that tests are fast."""
KILL_VARIABLE = "FINETUNE_TEST_KILL_FILE"
ERROR_LINE_PATTERN = re.compile(
    r'"level": ?"(?:error|critical)"|Traceback \(most recent call last\)| \[?(?:ERROR|CRITICAL)\b', re.I
)


def merge_mappings(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values of `overrides`. Nested mappings are merged."""
    merged = dict(base)
    for key, value in overrides.items():
        are_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_mappings(merged[key], value) if are_mappings else value
    return merged


@dataclass
class OperatorProcess:
    """One operator process. A `with` block starts the process at its beginning and kills it at its end. `config` is merged into FAST_CONFIG."""

    folder: Path
    kubeconfig: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    command_prefix: tuple[str, ...] = ()
    """Command and arguments that are put before the operator's command, for example `faketime` with its arguments."""
    _process: subprocess.Popen[bytes] | None = None
    port: int = 0

    def start(self, *, wait_until_ready: bool = True) -> Self:
        """Start the process and, if `wait_until_ready`, wait until /readyz succeeds. Errors: AssertionError if the process exits before it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = find_free_ports(1)[0]
        config = merge_mappings(merge_mappings(FAST_CONFIG, self.config), {"http": {"host": "127.0.0.1", "port": self.port}})
        config_path = self.folder / "config.yaml"
        config_path.write_text(json.dumps(config))
        python_path = os.pathsep.join(str(CHECKOUT_FOLDER / name) for name in ("crds", "operator"))
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        env |= dict(self.env) | {KILL_VARIABLE: str(self.folder / "kill-at")}
        argv = [*self.command_prefix, sys.executable, "-m", "finetune_operator", "--config", str(config_path)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        if wait_until_ready:
            self.wait_ready()
        return self

    def kill_at(self, point: str) -> None:
        """Make the process kill itself as soon as its code reaches the kill point `point`."""
        unfinished_file = self.folder / "kill-at.new"
        unfinished_file.write_text(point)
        unfinished_file.rename(self.folder / "kill-at")

    @property
    def log_path(self) -> Path:
        return self.folder / "operator.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None, "the operator was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until /readyz returns 200."""
        deadline = time.monotonic() + timeout
        while self.read_status_code("/readyz") != 200:
            assert self.is_running, f"the operator exited during its start: {self.log[-3000:]}"
            assert time.monotonic() < deadline, f"the operator was not ready in {timeout:.0f} s: {self.log[-3000:]}"
            time.sleep(0.05)

    def read_status_code(self, path: str) -> int:
        """Return the status code of a GET request to the operator's HTTP port; 0 if there is no response."""
        return self._get(path)[0]

    def read_metrics(self) -> dict[str, float]:
        """Return the metrics of /metrics. The keys are `name{labels}`."""
        text = self._get("/metrics")[1]
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""

    def wait_end(self, timeout: float = 30.0) -> int:
        """Wait until the process exits by itself. Returns its exit code, or the negative signal number if a signal has killed it."""
        assert self._process is not None, "the operator was not started"
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the operator did not end in {timeout:.0f} s: {self.log[-3000:]}") from None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the operator was not started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has exited. Does nothing if the process has already exited."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self, timeout: float = 20.0) -> int:
        """Send SIGTERM and return the exit code. If the process does not exit within `timeout` seconds, kill it and raise AssertionError."""
        assert self._process is not None, "the operator was not started"
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the operator ignored SIGTERM for {timeout:.0f} s: {self.log[-3000:]}") from None

    def find_error_lines(self, allowed: Iterable[str] = ()) -> list[str]:
        """Return the log lines that contain an error or start a traceback. Lines that match a regular expression in `allowed` are left out."""
        allowed_patterns = [re.compile(expression) for expression in allowed]
        return [
            line for line in self.log.splitlines()
            if ERROR_LINE_PATTERN.search(line) and not any(expression.search(line) for expression in allowed_patterns)
        ]  # fmt: skip

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.kill()
