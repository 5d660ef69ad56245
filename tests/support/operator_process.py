"""The operator as users run it: a process with a configuration file, that can be killed, stopped, and its log read."""

from __future__ import annotations

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

from localcluster.ports import free_ports

CHECKOUT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {
    "storage": {"uri": "s3://bucket/prefix", "endpoint": "http://127.0.0.1:1"},
    "trainer": {"image": "example.org/trainer:1"},
    "resyncSeconds": 5,
    "progressSeconds": 1,
    "lostNodeSeconds": 1,
    "retry": {"baseSeconds": 0.2, "maxSeconds": 2},
    "scrape": {"intervalSeconds": 0.2, "startingIntervalSeconds": 0.2, "timeoutSeconds": 2},
    "log": {"format": "json", "level": "info"},
}
"""The configuration of production with its patience taken away."""
KILL_VARIABLE = "FINETUNE_TEST_KILL_FILE"
ALARMS = re.compile(
    r'"level": ?"(?:error|critical)"|Traceback \(most recent call last\)| \[?(?:ERROR|CRITICAL)\b', re.I
)


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` put over it, mappings inside included."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


@dataclass
class OperatorProcess:
    """One operator. A context manager: started at its begin, stopped at its end.

    `config` is laid over QUICK; `crash_at` names a point at which the process kills itself, once; `arm` names one later.
    """

    folder: Path
    kubeconfig: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    crash_at: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    """Words before the command: faketime, for one."""
    _process: subprocess.Popen[bytes] | None = None
    port: int = 0

    def start(self, *, ready: bool = True) -> Self:
        """Start it, and wait until it says that it is ready. AssertionError if it ends instead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_ports(1)[0]
        config = merged(merged(QUICK, self.config), {"http": {"host": "127.0.0.1", "port": self.port}})
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(config))
        packages = os.pathsep.join(str(CHECKOUT / name) for name in ("crds", "operator"))
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
        env |= dict(self.env) | {KILL_VARIABLE: str(self.folder / "kill-at")}
        if self.crash_at:
            self.arm(self.crash_at)
        argv = [*self.before, sys.executable, "-m", "finetune_operator", "--config", str(path)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        if ready:
            self.wait_ready()
        return self

    def arm(self, point: str) -> None:
        """It kills itself when it comes to that point next."""
        unfinished = self.folder / "kill-at.new"
        unfinished.write_text(point)
        unfinished.rename(self.folder / "kill-at")

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
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Until /readyz says yes."""
        deadline = time.monotonic() + timeout
        while self.probe("/readyz") != 200:
            assert self.alive, f"the operator ended while starting: {self.log[-3000:]}"
            assert time.monotonic() < deadline, f"the operator was not ready in {timeout:.0f} s: {self.log[-3000:]}"
            time.sleep(0.05)

    def probe(self, path: str) -> int:
        """Status code of a GET on its own port; 0: no answer."""
        return self._get(path)[0]

    def metrics(self) -> dict[str, float]:
        """Samples by `name{labels}`."""
        text = self._get("/metrics")[1]
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError:
            return 0, ""

    def wait_end(self, timeout: float = 30.0) -> int:
        """Exit code when it ends by itself; negative: the signal that ended it."""
        assert self._process is not None, "the operator was not started"
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the operator did not end in {timeout:.0f} s: {self.log[-3000:]}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it."""
        assert self._process is not None, "the operator was not started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut does. Twice is fine."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self, timeout: float = 20.0) -> int:
        """End it as a deployment does; returns its exit code."""
        assert self._process is not None, "the operator was not started"
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the operator ignored SIGTERM for {timeout:.0f} s: {self.log[-3000:]}") from None

    def alarms(self, allowed: Iterable[str] = ()) -> list[str]:
        """Lines of its log that a person would be woken by, but for those that match an expression in `allowed`."""
        fine = [re.compile(expression) for expression in allowed]
        return [
            line for line in self.log.splitlines()
            if ALARMS.search(line) and not any(expression.search(line) for expression in fine)
        ]  # fmt: skip

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.kill()
