"""Time from `kubectl apply` to the first optimizer step, by stage.

The cluster must contain the operator and the demo's model and data. `make demo KEEP=1` creates such a cluster. Then run

    python benchmarks/first_step.py --kubeconfig ... --namespace finetune-demo --runs 5

Method. The manifest is applied under a new name. One thread watches Jobs, and another thread watches pods. They record when the Job and the
running pod are first seen, on the monotonic clock. While the pod runs, its `/progress` is requested every 20 ms through the API server's pod
proxy until it reports step 1. The pod measures its own stages. A run starts only after the pods of the previous run are gone, because they
would occupy CPU cores. The first run warms the page cache and is not counted; medians of the other runs are reported.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record
from finetune_api import names
from finetune_api.attempt_secret import derive_progress_token
from finetune_api.pod import ProgressReport
from kubernetes import client, config, watch
from pydantic import ValidationError
from ruamel.yaml import YAML

POLL_SECONDS = 0.02
DELETION_POLL_SECONDS = 0.2
TIMEOUT_SECONDS = 300


class FirstStepNotReached(Exception):
    """A run did not reach its first step. The message names the stage that did not finish."""


@dataclass
class Timeline:
    """The times at which this program first saw each event of one run, in seconds of the monotonic clock."""

    applied_at: float = 0.0
    job_seen_at: float | None = None
    running_seen_at: float | None = None
    first_step_at: float | None = None
    pod_name: str | None = None
    pod_timings: dict[str, float] = field(default_factory=dict)

    def compute_stage_seconds(self) -> dict[str, float]:
        """Return the duration of each stage in seconds."""
        assert self.job_seen_at and self.running_seen_at and self.first_step_at
        observed_seconds = {
            "admission": self.job_seen_at - self.applied_at, "podStart": self.running_seen_at - self.job_seen_at,
            "inPod": self.first_step_at - self.running_seen_at, "total": self.first_step_at - self.applied_at,
        }  # fmt: skip
        pod_seconds = {f"pod.{name}": seconds for name, seconds in self.pod_timings.items()}
        return {name: round(seconds, 2) for name, seconds in (observed_seconds | pod_seconds).items()}


class Run:
    """One run: applies the manifest under a new name, and measures the stages."""

    def __init__(self, manifest: dict[str, Any], namespace: str, name: str) -> None:
        self._core_api, self._batch_api, self._custom_objects_api = client.CoreV1Api(), client.BatchV1Api(), client.CustomObjectsApi()
        self._namespace, self._name = namespace, name
        self._manifest = manifest | {"metadata": {"name": name}}
        self._timeline = Timeline()
        self._pod_is_running = threading.Event()

    def measure(self) -> dict[str, float]:
        """Apply the manifest, wait for the first step, delete the job and wait until its pods are gone. Errors: FirstStepNotReached."""
        selector = f"{names.Label.JOB_NAME.value}={self._name}"
        for target in (self._watch_jobs, self._watch_pods):
            threading.Thread(target=target, args=(selector,), daemon=True).start()
        self._timeline.applied_at = time.monotonic()
        collection_arguments = (names.GROUP, names.VERSION, self._namespace, names.PLURAL)
        self._custom_objects_api.create_namespaced_custom_object(*collection_arguments, self._manifest)
        try:
            if not self._pod_is_running.wait(TIMEOUT_SECONDS):
                raise FirstStepNotReached(f"no pod of {self._name} ran within {TIMEOUT_SECONDS} s")
            self._wait_for_first_step()
        finally:
            self._custom_objects_api.delete_namespaced_custom_object(*collection_arguments, self._name)
            self._wait_until_pods_are_gone(selector)
        return self._timeline.compute_stage_seconds()

    def _wait_until_pods_are_gone(self, selector: str) -> None:
        """Wait until the run has no pods. Errors: FirstStepNotReached."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._core_api.list_namespaced_pod(self._namespace, label_selector=selector).items:
            if time.monotonic() > deadline:
                raise FirstStepNotReached(f"pods of {self._name} still exist {TIMEOUT_SECONDS} s after its deletion")
            time.sleep(DELETION_POLL_SECONDS)

    def _watch_jobs(self, selector: str) -> None:
        for _ in watch.Watch().stream(self._batch_api.list_namespaced_job, self._namespace, label_selector=selector):
            self._timeline.job_seen_at = time.monotonic()
            return

    def _watch_pods(self, selector: str) -> None:
        for event in watch.Watch().stream(self._core_api.list_namespaced_pod, self._namespace, label_selector=selector):
            pod = event["object"]
            if pod.status.phase == "Running":
                self._timeline.running_seen_at, self._timeline.pod_name = time.monotonic(), pod.metadata.name
                self._pod_is_running.set()
                return

    def _add_token_header(self) -> None:
        """Derive the progress token from the attempt's Secret, and add it to the headers of all further requests."""
        pod = self._core_api.read_namespaced_pod(self._timeline.pod_name, self._namespace)
        job = self._batch_api.read_namespaced_job(pod.metadata.labels["batch.kubernetes.io/job-name"], self._namespace)
        secret_name = job.metadata.annotations.get(names.Annotation.ATTEMPT_SECRET)
        if secret_name is not None:
            secret_data = self._core_api.read_namespaced_secret(secret_name, self._namespace).data
            attempt_secret = base64.b64decode(secret_data[names.ATTEMPT_SECRET_KEY]).decode()
            self._core_api.api_client.set_default_header(names.PROGRESS_TOKEN_HEADER, derive_progress_token(attempt_secret))

    def _wait_for_first_step(self) -> None:
        """Request the pod's progress until it reports a finished step."""
        self._add_token_header()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            report = self._read_report()
            if report is not None and (report.progress.step or 0) >= 1:
                self._timeline.first_step_at = time.monotonic()
                self._timeline.pod_timings = report.timings
                return
            time.sleep(POLL_SECONDS)
        raise FirstStepNotReached(f"pod {self._timeline.pod_name} has finished no step within {TIMEOUT_SECONDS} s")

    def _read_report(self) -> ProgressReport | None:
        pod_address = f"{self._timeline.pod_name}:{names.PROGRESS_PORT}"
        try:
            response = self._core_api.connect_get_namespaced_pod_proxy_with_path(
                pod_address, self._namespace, names.HttpPath.PROGRESS.value.lstrip("/"), _preload_content=False
            )
            return ProgressReport.model_validate_json(response.data)  # type: ignore[attr-defined]  # the stub does not know `_preload_content`
        except (client.ApiException, ValidationError):
            return None


def compute_median_stage_seconds(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median duration of each stage in seconds. The median of a stage ignores runs that did not measure this stage."""
    stage_names = dict.fromkeys(name for run in runs for name in run)
    return {name: round(statistics.median([run[name] for run in runs if name in run]), 2) for name in stage_names}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kubeconfig", default=None)
    parser.add_argument("--namespace", default="finetune-demo")
    parser.add_argument("--manifest", type=Path, default=record.ROOT / "examples" / "quickstart.yaml")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    config.load_kube_config(options.kubeconfig)
    manifest = YAML(typ="safe").load(options.manifest.read_text())
    runs: list[dict[str, float]] = []
    for number in range(options.runs + 1):
        seconds_by_stage = Run(manifest, options.namespace, f"first-step-{number}-{int(time.time()) % 100000}").measure()
        print("warm-up" if number == 0 else f"run {number}", json.dumps(seconds_by_stage), flush=True)
        runs += [seconds_by_stage] if number else []
    path = record.write_result("first_step", {"median": compute_median_stage_seconds(runs), "runs": runs}, method=record.extract_method(__doc__))
    print(json.dumps(compute_median_stage_seconds(runs), indent=1))
    print(f"written: {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
