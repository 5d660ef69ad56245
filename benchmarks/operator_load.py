"""The operator under load: a burst of jobs, many finished ones, a restart among them, many running ones. Real API server, played pods.

    python benchmarks/operator_load.py --parts burst --jobs 1000 --rounds 1
    python benchmarks/operator_load.py --parts idle,restart --finished 2000
    python benchmarks/operator_load.py --parts steady --jobs 1000

Method. etcd, kube-apiserver, kube-controller-manager and kube-scheduler of the local cluster run on this machine with raised
client limits, in both arms the same; the operator has its shipped configuration.
burst: three arms take turns, each with 20 clients and one pod a job, in a new namespace each time: `bare` creates the plainest Jobs
there are, `same-pod` creates Jobs as the operator makes them, to the letter, but nobody's (what somebody would apply who runs the same
training without an operator), `ours` creates FineTuneJobs. `ratios` are against `bare`, `ratiosSamePod` against `same-pod`: the second
are what the operator costs, the first also what it costs that a pod which trains has volumes, a probe, limits and a security context.
Two watches note when Jobs and pods are first seen. When all pods exist, the scheduler starts, KWOK lets
pods that are bound run and end with success, and a watch notes when all Jobs are Complete, or all FineTuneJobs Succeeded.
idle, restart: one job really runs; copies of it are written, finished, each with two pods, while no operator runs. Then one starts,
nothing happens for a while, and it is started again.
steady: jobs run that tell a new step each second; staleness is the age of the step in status.
CPU is read from /proc of every program but this one and KWOK. Requests are the operator's own count; events are reported split_query from
writes. A machine that was busy before (`loadBefore` is its load average then) makes all but the counts meaningless.
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
from lib import leftovers
from lib.kwok import LASTING, Kwok, make_nodes
from lib.load import Client, Object, Seen, condition_true, percentile
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
LEFT, PODS_LEFT = "left", 2
"""Namespace of the finished jobs, and pods of each."""


@dataclass(frozen=True)
class Size:
    """How much."""

    parts: tuple[str, ...]
    jobs: int
    finished: int
    rounds: int
    clients: int
    idle_seconds: float
    steady_seconds: float
    patience: float


@dataclass(frozen=True)
class Arm:
    """What is created, and when it counts as done."""

    name: str
    root: str
    plural: str
    body: Callable[[str], Object]
    done: Callable[[Object], bool]


def bare_job(name: str) -> Object:
    """A Job of one pod, as plain as ours is."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "example.org/trainer:1"}]}
    spec = {"completions": 1, "parallelism": 1, "completionMode": "Indexed", "backoffLimit": 0}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
    return body | {"spec": spec | {"podReplacementPolicy": "Failed", "template": {"spec": pod}}}


def same_pod(job: Object) -> Arm:
    """Jobs like this one, which the operator made; the label by which it finds its own has another value."""
    by_hand = {names.Label.MANAGED_BY.value: "hand"}
    return Arm("same-pod", BARE.root, BARE.plural, lambda name: leftovers.copied_job(job, name, by_hand), BARE.done)


def finetunejob(name: str) -> Object:
    """A FineTuneJob of one pod."""
    spec = {
        "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}, "resources": {"gpusPerNode": 0},
    }  # fmt: skip
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


BARE = Arm("bare", "/apis/batch/v1", "jobs", bare_job, condition_true("Complete"))
OURS = Arm("ours", FTJ, names.PLURAL, finetunejob, condition_true("Succeeded"))


class Bench:
    """The machine under test, and what is measured on it."""

    def __init__(self, size: Size, folder: Path, endpoint: Endpoint, plane: FastControlPlane, client: Client) -> None:
        self._size, self._folder, self._endpoint, self._plane, self._client = size, folder, endpoint, plane, client
        self._progress = ProgressServer()

    async def run(self) -> dict[str, Any]:
        """The wanted parts, one after another."""
        parts = {"burst": self._burst, "idle": self._idle, "restart": self._restart, "steady": self._steady}
        await self._install()
        figures: dict[str, Any] = {}
        async with self._progress:
            operator = Operator(self._endpoint, self._folder / "operator", self._progress.url)
            with operator, Kwok(self._endpoint, self._folder / "kwok"):
                if {"idle", "restart"} & set(self._size.parts):
                    await self._leave_finished_jobs(operator)
                for name, part in parts.items():
                    if name in self._size.parts:
                        say(name)
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
        arms = (BARE, same_pod(await self._job_of_ours()), OURS)
        rounds: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
        async with LagSampler(operator) as lag:
            for number in range(self._size.rounds):
                for arm in arms:
                    say(f"burst {number + 1}/{self._size.rounds}: {arm.name}")
                    rounds[arm.name].append(await self._one_burst(operator, arm, f"{arm.name}-{number}"))
                    say(f"  {rounds[arm.name][-1]}")
        middle = {name: middle_of(found) for name, found in rounds.items()}
        keys = ("jobsExist", "podsExist", "allDone", "cpuMsPerJobToPods", "cpuMsPerJobToEnd")
        ratios = {
            name: {key: round(middle["ours"][key] / middle[name][key], 2) for key in keys if middle[name][key]}
            for name in ("bare", "same-pod")
        }  # fmt: skip
        return {
            "rounds": rounds, "ratios": ratios["bare"], "ratiosSamePod": ratios["same-pod"], **middle,
            "loopLagP99": round(percentile(lag.samples, 0.99), 3),
            "rssPeakMB": round(memory_bytes(operator.pid, "VmHWM") / 1e6, 1),
        }  # fmt: skip

    async def _job_of_ours(self) -> Object:
        """The Job that the operator makes of one FineTuneJob of the burst."""
        namespace = "model-of-burst"
        await self._namespace(namespace)
        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        async with Seen(self._client, jobs) as seen:
            await self._client.send("POST", f"{FTJ}/namespaces/{namespace}/{names.PLURAL}", finetunejob("model"))
            await seen.wait(1, self._size.patience)
        return (await self._client.list(jobs))[0]

    async def _one_burst(self, operator: Operator, arm: Arm, namespace: str) -> dict[str, Any]:
        size, count = self._size, self._size.jobs
        await self._namespace(namespace)
        bodies = [arm.body(f"j{number}") for number in range(count)]
        jobs_path, pods_path = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
        things = f"{arm.root}/namespaces/{namespace}/{arm.plural}"
        async with Seen(self._client, jobs_path) as jobs, Seen(self._client, pods_path) as pods:
            usage, requests, begun = self._usage(operator), operator.requests(), time.monotonic()
            sent = await self._client.create_all(things, bodies, size.clients)
            created = time.monotonic()
            jobs_exist = await jobs.wait(count, size.patience)
            pods_exist = await pods.wait(count, size.patience)
            to_pods, requests_to_pods = self._usage(operator).since(usage), operator.requests() - requests
        waits = [moment - sent[name.split("-")[0]] for name, moment in pods.moments.items()]
        async with Seen(self._client, things, arm.done) as done:
            started = time.monotonic()
            with self._plane.scheduling():
                ended = await done.wait(count, size.patience)
                await asyncio.sleep(2)  # what is written after the end belongs to the job, too
                used = self._usage(operator)
        to_end, life = used.since(usage), operator.requests() - requests
        return {
            "created": round(created - begun, 2), "jobsExist": round(jobs_exist - begun, 2),
            "podsExist": round(pods_exist - begun, 2), "allDone": round(ended - started, 2),
            "podWaitP50": round(percentile(waits, 0.5), 3), "podWaitP99": round(percentile(waits, 0.99), 3),
            "cpuMsPerJobToPods": per_job(sum(to_pods.values()), count), "cpuSecondsToPods": to_pods,
            "cpuMsPerJobToEnd": per_job(sum(to_end.values()), count), "cpuSecondsToEnd": to_end,
            "writesPerJobToPods": round(writes(requests_to_pods) / count, 2),
            "writesPerJobOfALife": round(writes(life) / count, 2), "requestsPerJob": shares(life, count),
        }  # fmt: skip

    async def _namespace(self, namespace: str) -> None:
        """A new one. Pods are refused until it has its default account."""
        await self._client.send("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        for _ in range(600):
            try:
                await self._client.send("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
                return
            except RuntimeError:
                await asyncio.sleep(0.05)
        raise TimeoutError(f"{namespace} has no default account")

    # -- idle, restart, steady -----------------------------------------------------------------------------------------

    async def _leave_finished_jobs(self, operator: Operator) -> None:
        say(f"{self._size.finished} finished jobs")
        for namespace in ("model", LEFT):
            await self._namespace(namespace)
        things = f"{FTJ}/namespaces/model/{names.PLURAL}"
        async with Seen(self._client, things, OURS.done) as done:
            await self._client.send("POST", things, finetunejob("model"))
            with self._plane.scheduling():
                await done.wait(1, self._size.patience)
        found = await leftovers.model(self._client, "model")
        operator.stop()
        await leftovers.write(self._client, LEFT, found, self._size.finished, PODS_LEFT, self._size.clients)
        await asyncio.to_thread(operator.start)

    async def _idle(self, operator: Operator) -> dict[str, Any]:
        await asyncio.sleep(min(15, self._size.idle_seconds))
        usage, requests, begun = self._usage(operator), operator.requests(), time.monotonic()
        async with LagSampler(operator) as lag:
            await asyncio.sleep(self._size.idle_seconds)
        spent = operator.requests() - requests
        return {
            "finishedJobs": self._size.finished, "seconds": round(time.monotonic() - begun, 1),
            "writes": writes(spent), "requests": dict(spent),
            "cpuShare": round(self._usage(operator).since(usage)["operator"] / self._size.idle_seconds, 4),
            "loopLagP99": round(percentile(lag.samples, 0.99), 3),
        }  # fmt: skip

    async def _restart(self, operator: Operator) -> dict[str, Any]:
        operator.stop()
        seconds = await asyncio.to_thread(operator.start)
        pods = await self._client.list(f"/api/v1/namespaces/{LEFT}/pods")
        return {
            "finishedJobs": self._size.finished, "pods": len(pods), "firstLookSeconds": round(seconds, 2),
            "rssMB": round(memory_bytes(operator.pid) / 1e6, 1),
        }  # fmt: skip

    async def _steady(self, operator: Operator) -> dict[str, Any]:
        size, namespace, progress = self._size, LASTING, self._progress
        await self._namespace(namespace)
        things = f"{FTJ}/namespaces/{namespace}/{names.PLURAL}"
        await self._client.create_all(things, [finetunejob(f"j{n}") for n in range(size.jobs)], size.clients)
        for body in await self._client.list(things):
            progress.uids[namespace, body["metadata"]["name"]] = body["metadata"]["uid"]
        with self._plane.scheduling():
            async with Seen(self._client, things, _has_step) as stepping:
                await stepping.wait(size.jobs, size.patience)
            usage, requests = self._usage(operator), operator.requests()
            ages: list[float] = []
            begun = time.monotonic()
            async with LagSampler(operator) as lag:
                while time.monotonic() - begun < size.steady_seconds:
                    await asyncio.sleep(min(5.0, size.steady_seconds / 2))
                    for body in await self._client.list(things):
                        ages.append(progress.now() - body["status"]["progress"]["step"])
            seconds = time.monotonic() - begun
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


def middle_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Median of every plain figure over the rounds."""
    plain = [key for key, value in rounds[0].items() if isinstance(value, int | float)]
    return {key: round(statistics.median(one[key] for one in rounds), 3) for key in plain}


def per_job(seconds: float, count: int) -> float:
    """CPU milliseconds a job."""
    return round(1000 * seconds / count, 2)


def shares(requests: Counter[str], count: int) -> dict[str, float]:
    """Requests a job, by verb and resource."""
    return {label: round(number / count, 2) for label, number in sorted(requests.items()) if number}


def say(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"{text}\n")


# -- budgets -----------------------------------------------------------------------------------------------------------


def judge(figures: dict[str, Any], budgets: dict[str, Any]) -> list[dict[str, Any]]:
    """Each budget of a measured part with its figure: it holds up to its limit; between limit and limit plus margin it is noise."""
    verdicts = []
    for path, budget in budgets.items():
        value: Any = figures
        parts = path.split(".")
        if parts[0] not in figures:
            continue
        for part in parts:
            value = value[part]
        limit, margin = budget["limit"], budget.get("margin", 0)
        verdict = "holds" if value <= limit else ("within its margin" if value <= limit * (1 + margin) else "BROKEN")
        verdicts.append({"figure": path, "measured": value, "limit": limit, "verdict": verdict, "why": budget["why"]})
    return verdicts


def write(found: dict[str, Any]) -> Path:
    """Write the measured parts beside those of earlier runs; every part says when, from what and how large it was measured."""
    path = record.RESULTS / "operator_load.json"
    known = json.loads(path.read_text())["figures"] if path.exists() else {}
    figures = {part: known[part] for part in PARTS if part in known} | found
    verdicts = judge(figures, json.loads(BUDGETS.read_text()))
    return record.write("operator_load", figures | {"budgets": verdicts}, method=record.method(__doc__))


async def measure(size: Size) -> dict[str, Any]:
    """Build the machine under test, measure, take it down."""
    with tempfile.TemporaryDirectory(prefix="operator-load-") as name:
        folder = Path(name)
        plane = FastControlPlane(folder / "state")
        with plane as endpoint:
            async with Client(endpoint) as client:
                return await Bench(size, folder, endpoint, plane, client).run()


def main() -> int:
    """Returns 1 if a budget is broken."""
    options = arguments()
    size = Size(
        tuple(options.parts.split(",")), options.jobs, options.finished, options.rounds, options.clients,
        options.idle_seconds, options.steady_seconds, options.timeout,
    )  # fmt: skip
    about = {"size": vars(size), "loadBefore": round(os.getloadavg()[0], 2), "commit": record.commit()}
    figures = asyncio.run(measure(size))
    verdicts = judge(figures, json.loads(BUDGETS.read_text()))
    for one in verdicts:
        print(f"{one['verdict']:18} {one['figure']:38} {one['measured']:>10} (limit {one['limit']}): {one['why']}")
    found = {part: value | about for part, value in figures.items()}
    if options.output:
        options.output.write_text(json.dumps(found | {"budgets": verdicts}, indent=1))
    else:
        print(f"written: {write(found).relative_to(ROOT)}")
    return int(any(one["verdict"] == "BROKEN" for one in verdicts) and not options.lenient)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of one burst, and running jobs of the steady part")
    parser.add_argument("--finished", type=int, default=2000, help="finished jobs of the parts idle and restart")
    parser.add_argument("--rounds", type=int, default=2, help="turns of the two arms")
    parser.add_argument("--clients", type=int, default=20, help="clients that create at the same time")
    parser.add_argument("--idle-seconds", type=float, default=60)
    parser.add_argument("--steady-seconds", type=float, default=60)
    parser.add_argument("--timeout", type=float, default=300, help="seconds that any one wait may take")
    parser.add_argument("--output", type=Path, help="file for the figures, instead of benchmarks/results")
    parser.add_argument("--lenient", action="store_true", help="exit with 0 even if a budget is broken")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
