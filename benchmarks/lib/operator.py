"""Run the operator as a process, read its metrics, and serve progress reports of simulated pods."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from localcluster import Endpoint
from localcluster.ports import find_free_ports

METRIC_PREFIX = "finetune_operator"
WRITE_VERBS = ("create", "update", "patch", "delete")


class Operator:
    """Runs the operator with its default configuration, except for addresses, while its context is active."""

    def __init__(self, endpoint: Endpoint, folder: Path, progress_url: str) -> None:
        self._endpoint, self._folder, self._progress_url = endpoint, folder, progress_url
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def start(self) -> float:
        """Start the operator. Returns the seconds until the first reconcile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port = find_free_ports(1)[0]
        config_file = self._folder / "config.yaml"
        config_file.write_text(json.dumps({
            "storage": {"uri": "s3://bucket/prefix"}, "trainer": {"image": "example.org/trainer:1"},
            "http": {"host": "127.0.0.1", "port": self._port}, "scrape": {"url": self._progress_url},
        }))  # fmt: skip
        command = [sys.executable, "-m", "finetune_operator", "--config", str(config_file)]
        environment = {**os.environ, "KUBECONFIG": str(self._endpoint.kubeconfig)}
        started_at = time.monotonic()
        with (self._folder / "operator.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while True:
            metric_samples = self.read_metrics()
            if metric_samples.get(f"{METRIC_PREFIX}_leader") == 1 and (
                not metric_samples.get(f"{METRIC_PREFIX}_queue_depth") or _sum_samples(metric_samples, f"{METRIC_PREFIX}_reconcile_seconds_count")
            ):
                return time.monotonic() - started_at
            if self._process.poll() is not None:
                raise RuntimeError(f"the operator ended: see {self._folder / 'operator.log'}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the operator with SIGTERM."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the operator is not started"
        return self._process.pid

    def read_metrics(self) -> dict[str, float]:
        """Return the metric samples by `name{labels}`, or an empty dict if the operator does not respond."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as response:
                metrics_text = response.read().decode()
        except (urllib.error.URLError, OSError):
            return {}
        sample_parts = (line.rpartition(" ") for line in metrics_text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in sample_parts}

    def count_requests(self) -> Counter[str]:
        """Return the number of requests that the operator has sent to the API server, by `verb resource`."""
        counts: Counter[str] = Counter()
        for name, value in self.read_metrics().items():
            if name.startswith(f"{METRIC_PREFIX}_api_requests_total{{"):
                labels = dict(part.split("=", 1) for part in name.partition("{")[2].rstrip("}").split(","))
                counts[f"{_strip_quotes(labels['verb'])} {_strip_quotes(labels['resource'])}"] += int(value)
        return counts

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def count_writes(requests: Counter[str]) -> int:
    """Count write requests, except those for events: the operator sends events in the background and may drop them."""
    return sum(count for label, count in requests.items() if label.startswith(WRITE_VERBS) and not label.endswith(" events"))


def _strip_quotes(text: str) -> str:
    return text.strip('"')


def _sum_samples(samples: dict[str, float], name: str) -> float:
    return sum(value for label, value in samples.items() if label.partition("{")[0] == name)


class LagSampler:
    """Reads the operator's metric for the event-loop lag once a second, while its async context is active."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator
        self.samples: list[float] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._read_samples())
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._task.cancel()

    async def _read_samples(self) -> None:
        while True:
            samples = await asyncio.to_thread(self._operator.read_metrics)
            if f"{METRIC_PREFIX}_event_loop_lag_seconds" in samples:
                self.samples.append(samples[f"{METRIC_PREFIX}_event_loop_lag_seconds"])
            await asyncio.sleep(1)


class ProgressServer:
    """Serves /progress for all simulated pods. The reported step is the number of seconds since the server started."""

    def __init__(self) -> None:
        self.uids: dict[tuple[str, str], str] = {}
        """UIDs of the FineTuneJobs, by namespace and name."""
        self.started_at = time.time()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{{namespace}}/{{pod}}{{path}}"

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._respond, access_log=None), shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._runner.cleanup()

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        namespace, pod, *_ = request.path.strip("/").split("/")
        job, attempt, *_ = pod.rsplit("-", 3)
        uid = self.uids.get((namespace, job))
        if uid is None:
            raise web.HTTPNotFound
        report: dict[str, Any] = {
            "attempt": int(attempt), "uid": uid, "stage": "training",
            "progress": {"step": self.compute_current_step(), "totalSteps": 1_000_000, "epoch": 0.1, "tokensPerSecond": 1000},
            "metrics": {"trainLoss": 1.0, "learningRate": 1e-4},
        }  # fmt: skip
        return web.Response(body=json.dumps(report), content_type="application/json")

    def compute_current_step(self) -> int:
        """Return the step that all pods report now."""
        return 1 + int(time.time() - self.started_at)
