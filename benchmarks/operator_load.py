"""Measure the operator under load: a burst of jobs, many finished jobs, a restart, many running jobs.

    python benchmarks/operator_load.py --parts burst --jobs 1000 --rounds 1
    python benchmarks/operator_load.py --parts idle,restart --finished 2000
    python benchmarks/operator_load.py --parts steady --jobs 1000

Method. KWOK simulates pods. etcd, kube-apiserver, kube-controller-manager and kube-scheduler of the local cluster run on this machine with
raised client limits, equal for all variants. The operator has its default configuration.
burst: three variants run alternately, each in a new namespace, with 20 clients and one pod per job. `bare` creates minimal Jobs. `same-pod`
creates the same Jobs as the operator, but without FineTuneJobs. `ours` creates FineTuneJobs. `ratiosSamePod` (ours divided by same-pod) is
the cost of the operator. `ratios` (ours divided by bare) also includes the cost of the pod's volumes, probe, limits and security context.
Two watches record when Jobs and pods are first seen. When all pods exist, the scheduler starts, and KWOK lets scheduled pods run and
succeed. A watch records when all Jobs are Complete or all FineTuneJobs have Succeeded.
idle, restart: one job runs until it succeeds. While the operator is stopped, many copies of the finished job are written, each with two
pods. Then the operator starts, is idle for a while, and is restarted.
steady: running jobs report a new step each second; staleness is the age of the step in the status.
The CPU time of the control plane and of the operator is read from /proc. The operator counts its requests; requests for events are not
counted as writes. `loadBefore` is the load average before the benchmark. If it is high, only the counts of requests are meaningful.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from finetune_api import names
from lib import finished_jobs
from lib.kwok import STEADY_NAMESPACE, Kwok, make_nodes
from lib.load import Client, FirstSeen, Object, condition_true, percentile
from lib.operator import LagSampler, Operator, ProgressServer, writes
from lib.plane import FastControlPlane, Usage, memory_bytes
from ruamel.yaml import YAML

from localcluster import Endpoint

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = ROOT / "benchmarks" / "budgets" / "operator_load.json"
FTJ = f"/apis/{names.API_VERSION}"
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
PARTS = ("burst", "idle", "restart", "steady")
FINISHED_NAMESPACE, PODS_PER_FINISHED_JOB = "left", 2


@dataclass(frozen=True)
class LoadOptions:
    """Size of the measurement."""

    parts: tuple[str, ...]
    jobs: int
    finished: int
    rounds: int
    clients: int
    idle_seconds: float
    steady_seconds: float
    timeout_seconds: float


@dataclass(frozen=True)
class Variant:
    """The kind of objects that a burst creates. `done` returns whether an object has finished."""

    name: str
    root: str
    plural: str
    body: Callable[[str], Object]
    done: Callable[[Object], bool]


def bare_job(name: str) -> Object:
    """A minimal Job with one pod."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "example.org/trainer:1"}]}
    spec = {"completions": 1, "parallelism": 1, "completionMode": "Indexed", "backoffLimit": 0}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
    return body | {"spec": spec | {"podReplacementPolicy": "Failed", "template": {"spec": pod}}}


def same_pod(job: Object) -> Variant:
    """Create copies of the operator's Job `job`. Another value of the managed-by label keeps the operator from selecting them."""
    by_hand = {names.Label.MANAGED_BY.value: "hand"}
    return Variant("same-pod", BARE.root, BARE.plural, lambda name: finished_jobs.copy_job(job, name, by_hand), BARE.done)


def finetunejob(name: str) -> Object:
    """A FineTuneJob with one pod."""
    spec = {
        "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}, "resources": {"gpusPerNode": 0},
    }  # fmt: skip
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


BARE = Variant("bare", "/apis/batch/v1", "jobs", bare_job, condition_true("Complete"))
OURS = Variant("ours", FTJ, names.PLURAL, finetunejob, condition_true("Succeeded"))


class LoadBenchmark:
    """Measures the operator on one control plane."""

    def __init__(self, size: LoadOptions, folder: Path, endpoint: Endpoint, plane: FastControlPlane, client: Client) -> None:
        self._size, self._folder, self._endpoint, self._plane, self._client = size, folder, endpoint, plane, client
        self._progress = ProgressServer()

    async def run(self) -> dict[str, Any]:
        """Run the chosen parts, one after another."""
        parts = {"burst": self._burst, "idle": self._idle, "restart": self._restart, "steady": self._steady}
        await self._install()
        figures: dict[str, Any] = {}
        async with self._progress:
            operator = Operator(self._endpoint, self._folder / "operator", self._progress.url)
            with operator, Kwok(self._endpoint, self._folder / "kwok"):
                if {"idle", "restart"} & set(self._size.parts):
                    await self._write_finished_jobs(operator)
                for name, part in parts.items():
                    if name in self._size.parts:
                        print_progress(name)
                        figures[name] = await part(operator)
        return figures

    async def _install(self) -> None:
        crd = YAML(typ="safe").load((ROOT / "crds" / "finetunejobs.yaml").read_text())
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
        await self._client.send("PATCH", f"{path}?fieldManager=bench", crd, APPLY)
        for _ in range(600):
            try:
                await self._client.send("GET", f"{FTJ}/{names.PLURAL}")
                break
            except RuntimeError:
                await asyncio.sleep(0.1)
        await make_nodes(self._client, 4)

    def _usage(self, operator: Operator) -> Usage:
        return Usage.of(self._plane.pids | {"operator": operator.pid})

    # -- burst ---------------------------------------------------------------------------------------------------------

    async def _burst(self, operator: Operator) -> dict[str, Any]:
        variants = (BARE, same_pod(await self._job_of_the_operator()), OURS)
        rounds: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
        async with LagSampler(operator) as lag:
            for number in range(self._size.rounds):
                for variant in variants:
                    print_progress(f"burst {number + 1}/{self._size.rounds}: {variant.name}")
                    rounds[variant.name].append(await self._run_burst(operator, variant, f"{variant.name}-{number}"))
                    print_progress(f"  {rounds[variant.name][-1]}")
        medians = {name: medians_of(results) for name, results in rounds.items()}
        keys = ("jobsExist", "podsExist", "allDone", "cpuMsPerJobToPods", "cpuMsPerJobToEnd")
        ratios = {
            name: {key: round(medians["ours"][key] / medians[name][key], 2) for key in keys if medians[name][key]}
            for name in ("bare", "same-pod")
        }  # fmt: skip
        return {
            "rounds": rounds, "ratios": ratios["bare"], "ratiosSamePod": ratios["same-pod"], **medians,
            "loopLagP99": round(percentile(lag.samples, 0.99), 3),
            "rssPeakMB": round(memory_bytes(operator.pid, "VmHWM") / 1e6, 1),
        }  # fmt: skip

    async def _job_of_the_operator(self) -> Object:
        """Return the Job that the operator creates for a FineTuneJob of the burst."""
        namespace = "model-of-burst"
        await self._create_namespace(namespace)
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        async with FirstSeen(self._client, jobs) as seen:
            await self._client.send("POST", f"{FTJ}/namespaces/{namespace}/{names.PLURAL}", finetunejob("model"))
            await seen.wait(1, self._size.timeout_seconds)
        return (await self._client.list(jobs))[0]

    async def _run_burst(self, operator: Operator, variant: Variant, namespace: str) -> dict[str, Any]:
        size, count = self._size, self._size.jobs
        await self._create_namespace(namespace)
        bodies = [variant.body(f"j{number}") for number in range(count)]
        jobs_path, pods_path = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
        collection = f"{variant.root}/namespaces/{namespace}/{variant.plural}"
        async with FirstSeen(self._client, jobs_path) as jobs, FirstSeen(self._client, pods_path) as pods:
            usage, requests, began = self._usage(operator), operator.requests(), time.monotonic()
            sent = await self._client.create_all(collection, bodies, size.clients)
            created = time.monotonic()
            jobs_exist = await jobs.wait(count, size.timeout_seconds)
            pods_exist = await pods.wait(count, size.timeout_seconds)
            to_pods, requests_to_pods = self._usage(operator).since(usage), operator.requests() - requests
        waits = [moment - sent[name.split("-")[0]] for name, moment in pods.first_seen.items()]
        async with FirstSeen(self._client, collection, variant.done) as done:
            started = time.monotonic()
            with self._plane.scheduling():
                ended = await done.wait(count, size.timeout_seconds)
                await asyncio.sleep(2)  # the operator also writes shortly after the end of a job
                used = self._usage(operator)
        to_end, requests_to_end = used.since(usage), operator.requests() - requests
        return {
            "created": round(created - began, 2), "jobsExist": round(jobs_exist - began, 2),
            "podsExist": round(pods_exist - began, 2), "allDone": round(ended - started, 2),
            "podWaitP50": round(percentile(waits, 0.5), 3), "podWaitP99": round(percentile(waits, 0.99), 3),
            "cpuMsPerJobToPods": per_job(sum(to_pods.values()), count), "cpuSecondsToPods": to_pods,
            "cpuMsPerJobToEnd": per_job(sum(to_end.values()), count), "cpuSecondsToEnd": to_end,
            "writesPerJobToPods": round(writes(requests_to_pods) / count, 2),
            "writesPerJobToEnd": round(writes(requests_to_end) / count, 2), "requestsPerJob": requests_per_job(requests_to_end, count),
        }  # fmt: skip

    async def _create_namespace(self, namespace: str) -> None:
        """Create a namespace and wait for its default ServiceAccount: until it exists, the API server refuses pods."""
        await self._client.send("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        for _ in range(600):
            try:
                await self._client.send("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
                return
            except RuntimeError:
                await asyncio.sleep(0.05)
        raise TimeoutError(f"{namespace} has no default ServiceAccount")

    # -- idle, restart, steady -----------------------------------------------------------------------------------------

    async def _write_finished_jobs(self, operator: Operator) -> None:
        print_progress(f"{self._size.finished} finished jobs")
        for namespace in ("model", FINISHED_NAMESPACE):
            await self._create_namespace(namespace)
        collection = f"{FTJ}/namespaces/model/{names.PLURAL}"
        async with FirstSeen(self._client, collection, OURS.done) as done:
            await self._client.send("POST", collection, finetunejob("model"))
            with self._plane.scheduling():
                await done.wait(1, self._size.timeout_seconds)
        finished_job = await finished_jobs.read_finished_job(self._client, "model")
        operator.stop()
        await finished_jobs.write_copies(
            self._client, FINISHED_NAMESPACE, finished_job, self._size.finished, PODS_PER_FINISHED_JOB, self._size.clients
        )
        await asyncio.to_thread(operator.start)

    async def _idle(self, operator: Operator) -> dict[str, Any]:
        await asyncio.sleep(min(15, self._size.idle_seconds))
        usage, requests, began = self._usage(operator), operator.requests(), time.monotonic()
        async with LagSampler(operator) as lag:
            await asyncio.sleep(self._size.idle_seconds)
        spent = operator.requests() - requests
        return {
            "finishedJobs": self._size.finished, "seconds": round(time.monotonic() - began, 1),
            "writes": writes(spent), "requests": dict(spent),
            "cpuShare": round(self._usage(operator).since(usage)["operator"] / self._size.idle_seconds, 4),
            "loopLagP99": round(percentile(lag.samples, 0.99), 3),
        }  # fmt: skip

    async def _restart(self, operator: Operator) -> dict[str, Any]:
        operator.stop()
        seconds = await asyncio.to_thread(operator.start)
        pods = await self._client.list(f"/api/v1/namespaces/{FINISHED_NAMESPACE}/pods")
        return {
            "finishedJobs": self._size.finished, "pods": len(pods), "firstReconcileSeconds": round(seconds, 2),
            "rssMB": round(memory_bytes(operator.pid) / 1e6, 1),
        }  # fmt: skip

    async def _steady(self, operator: Operator) -> dict[str, Any]:
        size, namespace, progress = self._size, STEADY_NAMESPACE, self._progress
        await self._create_namespace(namespace)
        collection = f"{FTJ}/namespaces/{namespace}/{names.PLURAL}"
        await self._client.create_all(collection, [finetunejob(f"j{n}") for n in range(size.jobs)], size.clients)
        for body in await self._client.list(collection):
            progress.uids[namespace, body["metadata"]["name"]] = body["metadata"]["uid"]
        with self._plane.scheduling():
            async with FirstSeen(self._client, collection, _has_step) as stepping:
                await stepping.wait(size.jobs, size.timeout_seconds)
            usage, requests = self._usage(operator), operator.requests()
            ages: list[float] = []
            began = time.monotonic()
            async with LagSampler(operator) as lag:
                while time.monotonic() - began < size.steady_seconds:
                    await asyncio.sleep(min(5.0, size.steady_seconds / 2))
                    for body in await self._client.list(collection):
                        ages.append(progress.now() - body["status"]["progress"]["step"])
            seconds = time.monotonic() - began
            spent, used = operator.requests() - requests, self._usage(operator).since(usage)
        return {
            "runningJobs": size.jobs, "seconds": round(seconds, 1),
            "writesPerSecond": round(writes(spent) / seconds, 1),
            "writesPerJobAndMinute": round(writes(spent) / size.jobs / seconds * 60, 2),
            "operatorCpuShare": round(used["operator"] / seconds, 3),
            "stalenessP50": percentile(ages, 0.5), "stalenessP99": percentile(ages, 0.99),
            "loopLagP99": round(percentile(lag.samples, 0.99), 3),
            "rssPeakMB": round(memory_bytes(operator.pid, "VmHWM") / 1e6, 1),
        }  # fmt: skip


def _has_step(body: Object) -> bool:
    return bool(((body.get("status") or {}).get("progress") or {}).get("step"))


def medians_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Median of each number over the rounds."""
    plain = [key for key, value in rounds[0].items() if isinstance(value, int | float)]
    return {key: round(statistics.median(result[key] for result in rounds), 3) for key in plain}


def per_job(seconds: float, count: int) -> float:
    """CPU milliseconds per job."""
    return round(1000 * seconds / count, 2)


def requests_per_job(requests: Counter[str], count: int) -> dict[str, float]:
    """Requests per job, by verb and resource."""
    return {label: round(number / count, 2) for label, number in sorted(requests.items()) if number}


def print_progress(text: str) -> None:
    """Print the progress of the benchmark."""
    sys.stderr.write(f"{text}\n")


# -- budgets -----------------------------------------------------------------------------------------------------------


def check_budgets(figures: dict[str, Any], budgets: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the figures of the measured parts with their budgets. A figure above its limit by at most the margin counts as noise."""
    verdicts = []
    for path, budget in budgets.items():
        value: Any = figures
        parts = path.split(".")
        if parts[0] not in figures:
            continue
        for part in parts:
            value = value[part]
        limit, margin = budget["limit"], budget.get("margin", 0)
        verdict = "holds" if value <= limit else ("within its margin" if value <= limit * (1 + margin) else "EXCEEDED")
        verdicts.append({"figure": path, "measured": value, "limit": limit, "verdict": verdict, "why": budget["why"]})
    return verdicts


def write(measured: dict[str, Any]) -> Path:
    """Write the measured parts, each with its size, load and commit. A part that was not measured keeps its earlier figures."""
    path = record.RESULTS / "operator_load.json"
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    figures = {part: known[part] for part in PARTS if part in known} | measured
    verdicts = check_budgets(figures, json.loads(BUDGETS.read_text()))
    return record.write("operator_load", figures | {"budgets": verdicts}, method=record.method(__doc__))


async def measure(size: LoadOptions) -> dict[str, Any]:
    """Start a control plane, run the benchmark, and stop the control plane."""
    with tempfile.TemporaryDirectory(prefix="operator-load-") as name:
        folder = Path(name)
        plane = FastControlPlane(folder / "state")
        with plane as endpoint:
            async with Client(endpoint) as client:
                return await LoadBenchmark(size, folder, endpoint, plane, client).run()


def main() -> int:
    """Run the benchmark. Returns 1 if a budget is exceeded, else 0."""
    options = arguments()
    size = LoadOptions(
        tuple(options.parts.split(",")), options.jobs, options.finished, options.rounds, options.clients,
        options.idle_seconds, options.steady_seconds, options.timeout,
    )  # fmt: skip
    about = {"size": vars(size), "loadBefore": round(os.getloadavg()[0], 2), "commit": record.commit()}
    figures = asyncio.run(measure(size))
    verdicts = check_budgets(figures, json.loads(BUDGETS.read_text()))
    for verdict in verdicts:
        print(f"{verdict['verdict']:18} {verdict['figure']:38} {verdict['measured']:>10} (limit {verdict['limit']}): {verdict['why']}")
    measured = {part: value | about for part, value in figures.items()}
    if options.output:
        options.output.write_text(json.dumps(measured | {"budgets": verdicts}, indent=1))
    else:
        print(f"written: {write(measured).relative_to(ROOT)}")
    return int(any(verdict["verdict"] == "EXCEEDED" for verdict in verdicts) and not options.lenient)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"parts to measure, of {', '.join(PARTS)}; default: all")
    parser.add_argument("--jobs", type=int, default=1000, help="number of jobs in one burst, and of running jobs in the steady part")
    parser.add_argument("--finished", type=int, default=2000, help="number of finished jobs in the parts idle and restart")
    parser.add_argument("--rounds", type=int, default=2, help="bursts of each variant")
    parser.add_argument("--clients", type=int, default=20, help="clients that create objects at the same time")
    parser.add_argument("--idle-seconds", type=float, default=60)
    parser.add_argument("--steady-seconds", type=float, default=60)
    parser.add_argument("--timeout", type=float, default=300, help="longest wait in seconds")
    parser.add_argument("--output", type=Path, help="write the figures to this file instead of benchmarks/results")
    parser.add_argument("--lenient", action="store_true", help="exit with 0 even if a budget is exceeded")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
