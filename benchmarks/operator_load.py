"""Measure the operator under load: a burst of jobs, many finished jobs, a restart, many running jobs.

    python benchmarks/operator_load.py --parts burst --jobs 1000 --rounds 1
    python benchmarks/operator_load.py --parts idle,restart --finished 2000
    python benchmarks/operator_load.py --parts steady --jobs 1000

Method. KWOK simulates pods. etcd, kube-apiserver, kube-controller-manager and kube-scheduler of the local cluster run on this machine, with the
same raised client limits for all variants. The operator has its default configuration.
burst: three variants run alternately, each in a new namespace, with 20 clients and one pod per job. `bare` creates minimal Jobs. `same-pod`
creates the same Jobs as the operator, but without FineTuneJobs. `ours` creates FineTuneJobs. `ratiosSamePod` (ours divided by same-pod) is
the cost of the operator. `ratios` (ours divided by bare) also includes the cost of the pod's volumes, probe, limits and security context.
Two watches record when Jobs and pods are first seen. When all pods exist, the scheduler starts, and KWOK lets scheduled pods run and
succeed. A watch records when all Jobs are Complete or all FineTuneJobs have Succeeded.
idle, restart: one job runs until it succeeds. While the operator is stopped, many copies of the finished job are written, each with two
pods. Then the operator starts, is idle for a while, and is restarted.
steady: running jobs report a new step each second; staleness is the age of the step in the status.
The CPU time of the control plane and of the operator is read from /proc. The operator counts its requests; requests for events are not
counted as writes. `loadBefore` is the load average before the benchmark. If it is high, only the numbers of requests are meaningful.
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
from lib.kwok import STEADY_NAMESPACE, Kwok, create_nodes
from lib.load import Client, FirstSeenWatch, Object, compute_percentile, make_condition_test
from lib.operator import LagSampler, Operator, ProgressServer, count_writes
from lib.plane import CpuUsage, FastControlPlane, read_memory_bytes
from ruamel.yaml import YAML

from localcluster import Endpoint

ROOT = Path(__file__).resolve().parent.parent
BUDGETS_FILE = ROOT / "benchmarks" / "budgets" / "operator_load.json"
FINETUNEJOB_API_PATH = f"/apis/{names.API_VERSION}"
APPLY_PATCH_TYPE = "application/apply-patch+yaml"
PARTS = ("burst", "idle", "restart", "steady")
FINISHED_NAMESPACE, PODS_PER_FINISHED_JOB = "left", 2


@dataclass(frozen=True)
class LoadOptions:
    """What to measure, with how many jobs, rounds and clients, and for how long."""

    parts: tuple[str, ...]
    job_count: int
    finished_job_count: int
    round_count: int
    client_count: int
    idle_seconds: float
    steady_seconds: float
    timeout_seconds: float


@dataclass(frozen=True)
class BurstVariant:
    """The objects that a burst creates. `is_finished` says whether an object has finished."""

    name: str
    api_path: str
    plural: str
    make_body: Callable[[str], Object]
    is_finished: Callable[[Object], bool]


def make_bare_job(name: str) -> Object:
    """Return a minimal Job with one pod."""
    pod_spec = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": "example.org/trainer:1"}]}
    job_spec = {"completions": 1, "parallelism": 1, "completionMode": "Indexed", "backoffLimit": 0}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
    return job | {"spec": job_spec | {"podReplacementPolicy": "Failed", "template": {"spec": pod_spec}}}


def make_same_pod_variant(job: Object) -> BurstVariant:
    """Return a variant whose objects are copies of the operator's Job `job`. The copies have another label managed-by, so that the operator ignores them."""
    labels = {names.Label.MANAGED_BY.value: "hand"}
    return BurstVariant(
        "same-pod", BARE_JOB_VARIANT.api_path, BARE_JOB_VARIANT.plural, lambda name: finished_jobs.copy_job(job, name, labels), BARE_JOB_VARIANT.is_finished
    )


def make_finetunejob(name: str) -> Object:
    """Return a FineTuneJob with one pod."""
    spec = {
        "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}, "resources": {"gpusPerNode": 0},
    }  # fmt: skip
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


BARE_JOB_VARIANT = BurstVariant("bare", "/apis/batch/v1", "jobs", make_bare_job, make_condition_test("Complete"))
FINETUNEJOB_VARIANT = BurstVariant("ours", FINETUNEJOB_API_PATH, names.PLURAL, make_finetunejob, make_condition_test("Succeeded"))


class LoadBenchmark:
    """Measures the operator with one control plane."""

    def __init__(self, options: LoadOptions, folder: Path, endpoint: Endpoint, control_plane: FastControlPlane, client: Client) -> None:
        self._options, self._folder, self._endpoint, self._control_plane, self._client = options, folder, endpoint, control_plane, client
        self._progress = ProgressServer()

    async def run(self) -> dict[str, Any]:
        """Run the chosen parts one after the other. Returns the figures by part."""
        measure_by_part = {"burst": self._measure_burst, "idle": self._measure_idle, "restart": self._measure_restart, "steady": self._measure_steady}
        await self._install_crd_and_nodes()
        figures: dict[str, Any] = {}
        async with self._progress:
            operator = Operator(self._endpoint, self._folder / "operator", self._progress.url)
            with operator, Kwok(self._endpoint, self._folder / "kwok"):
                if {"idle", "restart"} & set(self._options.parts):
                    await self._write_finished_jobs(operator)
                for part_name, measure_part in measure_by_part.items():
                    if part_name in self._options.parts:
                        print_progress(part_name)
                        figures[part_name] = await measure_part(operator)
        return figures

    async def _install_crd_and_nodes(self) -> None:
        crd = YAML(typ="safe").load((ROOT / "crds" / "finetunejobs.yaml").read_text())
        crd_path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
        await self._client.send("PATCH", f"{crd_path}?fieldManager=bench", crd, APPLY_PATCH_TYPE)
        for _ in range(600):
            try:
                await self._client.send("GET", f"{FINETUNEJOB_API_PATH}/{names.PLURAL}")
                break
            except RuntimeError:
                await asyncio.sleep(0.1)
        await create_nodes(self._client, 4)

    def _measure_usage(self, operator: Operator) -> CpuUsage:
        return CpuUsage.measure(self._control_plane.pids | {"operator": operator.pid})

    # -- burst ---------------------------------------------------------------------------------------------------------

    async def _measure_burst(self, operator: Operator) -> dict[str, Any]:
        variants = (BARE_JOB_VARIANT, make_same_pod_variant(await self._create_operator_job()), FINETUNEJOB_VARIANT)
        rounds_by_variant: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
        async with LagSampler(operator) as lag_sampler:
            for number in range(self._options.round_count):
                for variant in variants:
                    print_progress(f"burst {number + 1}/{self._options.round_count}: {variant.name}")
                    rounds_by_variant[variant.name].append(await self._run_burst(operator, variant, f"{variant.name}-{number}"))
                    print_progress(f"  {rounds_by_variant[variant.name][-1]}")
        medians_by_variant = {name: compute_medians(round_figures) for name, round_figures in rounds_by_variant.items()}
        figure_names = ("jobsExist", "podsExist", "allDone", "cpuMsPerJobToPods", "cpuMsPerJobToEnd")
        ratios = {
            name: {key: round(medians_by_variant["ours"][key] / medians_by_variant[name][key], 2) for key in figure_names if medians_by_variant[name][key]}
            for name in ("bare", "same-pod")
        }  # fmt: skip
        return {
            "rounds": rounds_by_variant, "ratios": ratios["bare"], "ratiosSamePod": ratios["same-pod"], **medians_by_variant,
            "loopLagP99": round(compute_percentile(lag_sampler.samples, 0.99), 3),
            "rssPeakMB": round(read_memory_bytes(operator.pid, "VmHWM") / 1e6, 1),
        }  # fmt: skip

    async def _create_operator_job(self) -> Object:
        """Return the Job that the operator creates for a FineTuneJob of the burst."""
        namespace = "model-of-burst"
        await self._create_namespace(namespace)
        jobs_path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        async with FirstSeenWatch(self._client, jobs_path) as job_watch:
            await self._client.send("POST", f"{FINETUNEJOB_API_PATH}/namespaces/{namespace}/{names.PLURAL}", make_finetunejob("model"))
            await job_watch.wait_for_count(1, self._options.timeout_seconds)
        return (await self._client.list(jobs_path))[0]

    async def _run_burst(self, operator: Operator, variant: BurstVariant, namespace: str) -> dict[str, Any]:
        options, job_count = self._options, self._options.job_count
        await self._create_namespace(namespace)
        bodies = [variant.make_body(f"j{number}") for number in range(job_count)]
        jobs_path, pods_path = f"/apis/batch/v1/namespaces/{namespace}/jobs", f"/api/v1/namespaces/{namespace}/pods"
        collection_path = f"{variant.api_path}/namespaces/{namespace}/{variant.plural}"
        async with FirstSeenWatch(self._client, jobs_path) as job_watch, FirstSeenWatch(self._client, pods_path) as pod_watch:
            usage_at_start, requests_at_start, began_at = self._measure_usage(operator), operator.count_requests(), time.monotonic()
            sent_at_by_name = await self._client.create_all(collection_path, bodies, options.client_count)
            created_at = time.monotonic()
            jobs_seen_at = await job_watch.wait_for_count(job_count, options.timeout_seconds)
            pods_seen_at = await pod_watch.wait_for_count(job_count, options.timeout_seconds)
            cpu_seconds_to_pods = self._measure_usage(operator).compute_seconds_since(usage_at_start)
            requests_to_pods = operator.count_requests() - requests_at_start
        pod_wait_seconds = [seen_at - sent_at_by_name[name.split("-")[0]] for name, seen_at in pod_watch.first_seen_at.items()]
        async with FirstSeenWatch(self._client, collection_path, variant.is_finished) as finished_watch:
            scheduler_started_at = time.monotonic()
            with self._control_plane.run_scheduler():
                all_finished_at = await finished_watch.wait_for_count(job_count, options.timeout_seconds)
                await asyncio.sleep(2)  # shortly after the end of a job, the operator sends further writes, which must also be counted
                usage_at_end = self._measure_usage(operator)
        cpu_seconds_to_end, requests_to_end = usage_at_end.compute_seconds_since(usage_at_start), operator.count_requests() - requests_at_start
        return {
            "created": round(created_at - began_at, 2), "jobsExist": round(jobs_seen_at - began_at, 2),
            "podsExist": round(pods_seen_at - began_at, 2), "allDone": round(all_finished_at - scheduler_started_at, 2),
            "podWaitP50": round(compute_percentile(pod_wait_seconds, 0.5), 3), "podWaitP99": round(compute_percentile(pod_wait_seconds, 0.99), 3),
            "cpuMsPerJobToPods": convert_to_milliseconds_per_job(sum(cpu_seconds_to_pods.values()), job_count), "cpuSecondsToPods": cpu_seconds_to_pods,
            "cpuMsPerJobToEnd": convert_to_milliseconds_per_job(sum(cpu_seconds_to_end.values()), job_count), "cpuSecondsToEnd": cpu_seconds_to_end,
            "writesPerJobToPods": round(count_writes(requests_to_pods) / job_count, 2),
            "writesPerJobToEnd": round(count_writes(requests_to_end) / job_count, 2), "requestsPerJob": compute_requests_per_job(requests_to_end, job_count),
        }  # fmt: skip

    async def _create_namespace(self, namespace: str) -> None:
        """Create a namespace and wait for its default ServiceAccount, without which the API server refuses pods."""
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
        print_progress(f"{self._options.finished_job_count} finished jobs")
        for namespace in ("model", FINISHED_NAMESPACE):
            await self._create_namespace(namespace)
        collection_path = f"{FINETUNEJOB_API_PATH}/namespaces/model/{names.PLURAL}"
        async with FirstSeenWatch(self._client, collection_path, FINETUNEJOB_VARIANT.is_finished) as finished_watch:
            await self._client.send("POST", collection_path, make_finetunejob("model"))
            with self._control_plane.run_scheduler():
                await finished_watch.wait_for_count(1, self._options.timeout_seconds)
        finished_job = await finished_jobs.read_finished_job(self._client, "model")
        operator.stop()
        await finished_jobs.write_copies(
            self._client, FINISHED_NAMESPACE, finished_job, self._options.finished_job_count, PODS_PER_FINISHED_JOB, self._options.client_count
        )
        await asyncio.to_thread(operator.start)

    async def _measure_idle(self, operator: Operator) -> dict[str, Any]:
        await asyncio.sleep(min(15, self._options.idle_seconds))
        usage_at_start, requests_at_start, began_at = self._measure_usage(operator), operator.count_requests(), time.monotonic()
        async with LagSampler(operator) as lag_sampler:
            await asyncio.sleep(self._options.idle_seconds)
        new_requests = operator.count_requests() - requests_at_start
        return {
            "finishedJobs": self._options.finished_job_count, "seconds": round(time.monotonic() - began_at, 1),
            "writes": count_writes(new_requests), "requests": dict(new_requests),
            "cpuShare": round(self._measure_usage(operator).compute_seconds_since(usage_at_start)["operator"] / self._options.idle_seconds, 4),
            "loopLagP99": round(compute_percentile(lag_sampler.samples, 0.99), 3),
        }  # fmt: skip

    async def _measure_restart(self, operator: Operator) -> dict[str, Any]:
        operator.stop()
        first_reconcile_seconds = await asyncio.to_thread(operator.start)
        pods = await self._client.list(f"/api/v1/namespaces/{FINISHED_NAMESPACE}/pods")
        return {
            "finishedJobs": self._options.finished_job_count, "pods": len(pods), "firstReconcileSeconds": round(first_reconcile_seconds, 2),
            "rssMB": round(read_memory_bytes(operator.pid) / 1e6, 1),
        }  # fmt: skip

    async def _measure_steady(self, operator: Operator) -> dict[str, Any]:
        options, namespace, progress_server = self._options, STEADY_NAMESPACE, self._progress
        await self._create_namespace(namespace)
        collection_path = f"{FINETUNEJOB_API_PATH}/namespaces/{namespace}/{names.PLURAL}"
        await self._client.create_all(collection_path, [make_finetunejob(f"j{n}") for n in range(options.job_count)], options.client_count)
        for job in await self._client.list(collection_path):
            progress_server.uids[namespace, job["metadata"]["name"]] = job["metadata"]["uid"]
        with self._control_plane.run_scheduler():
            async with FirstSeenWatch(self._client, collection_path, _has_step) as step_watch:
                await step_watch.wait_for_count(options.job_count, options.timeout_seconds)
            usage_at_start, requests_at_start = self._measure_usage(operator), operator.count_requests()
            report_ages: list[float] = []
            began_at = time.monotonic()
            async with LagSampler(operator) as lag_sampler:
                while time.monotonic() - began_at < options.steady_seconds:
                    await asyncio.sleep(min(5.0, options.steady_seconds / 2))
                    for job in await self._client.list(collection_path):
                        report_ages.append(progress_server.compute_current_step() - job["status"]["progress"]["step"])
            measured_seconds = time.monotonic() - began_at
            new_requests, cpu_seconds = operator.count_requests() - requests_at_start, self._measure_usage(operator).compute_seconds_since(usage_at_start)
        return {
            "runningJobs": options.job_count, "seconds": round(measured_seconds, 1),
            "writesPerSecond": round(count_writes(new_requests) / measured_seconds, 1),
            "writesPerJobAndMinute": round(count_writes(new_requests) / options.job_count / measured_seconds * 60, 2),
            "operatorCpuShare": round(cpu_seconds["operator"] / measured_seconds, 3),
            "stalenessP50": compute_percentile(report_ages, 0.5), "stalenessP99": compute_percentile(report_ages, 0.99),
            "loopLagP99": round(compute_percentile(lag_sampler.samples, 0.99), 3),
            "rssPeakMB": round(read_memory_bytes(operator.pid, "VmHWM") / 1e6, 1),
        }  # fmt: skip


def _has_step(job: Object) -> bool:
    return bool(((job.get("status") or {}).get("progress") or {}).get("step"))


def compute_medians(round_figures: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each number over all rounds."""
    number_keys = [key for key, value in round_figures[0].items() if isinstance(value, int | float)]
    return {key: round(statistics.median(figures[key] for figures in round_figures), 3) for key in number_keys}


def convert_to_milliseconds_per_job(seconds: float, job_count: int) -> float:
    """Convert the CPU seconds of all jobs to milliseconds per job."""
    return round(1000 * seconds / job_count, 2)


def compute_requests_per_job(requests: Counter[str], job_count: int) -> dict[str, float]:
    """Return the number of requests per job, by verb and resource."""
    return {label: round(number / job_count, 2) for label, number in sorted(requests.items()) if number}


def print_progress(text: str) -> None:
    """Print a line on the progress of the benchmark to standard error."""
    sys.stderr.write(f"{text}\n")


# -- budgets -----------------------------------------------------------------------------------------------------------


def check_budgets(figures: dict[str, Any], budgets: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the figures of the measured parts with their budgets. A figure that exceeds its limit by at most the margin counts as noise."""
    verdicts = []
    for figure_path, budget in budgets.items():
        measured_value: Any = figures
        path_parts = figure_path.split(".")
        if path_parts[0] not in figures:
            continue
        for path_part in path_parts:
            measured_value = measured_value[path_part]
        limit, margin = budget["limit"], budget.get("margin", 0)
        verdict = "holds" if measured_value <= limit else ("within its margin" if measured_value <= limit * (1 + margin) else "EXCEEDED")
        verdicts.append({"figure": figure_path, "measured": measured_value, "limit": limit, "verdict": verdict, "why": budget["why"]})
    return verdicts


def write_figures(figures_by_part: dict[str, Any]) -> Path:
    """Write the figures of the measured parts, each with its size, load and commit. A part that was not measured keeps its earlier figures."""
    result_file = record.RESULTS_FOLDER / "operator_load.json"
    earlier_figures = json.loads(result_file.read_text())["figures"] if result_file.exists() else {}
    figures = {part: earlier_figures[part] for part in PARTS if part in earlier_figures} | figures_by_part
    verdicts = check_budgets(figures, json.loads(BUDGETS_FILE.read_text()))
    return record.write_result("operator_load", figures | {"budgets": verdicts}, method=record.extract_method(__doc__))


async def run_benchmark(options: LoadOptions) -> dict[str, Any]:
    """Start a control plane, run the benchmark, and stop the control plane."""
    with tempfile.TemporaryDirectory(prefix="operator-load-") as folder_name:
        folder = Path(folder_name)
        control_plane = FastControlPlane(folder / "state")
        with control_plane as endpoint:
            async with Client(endpoint) as client:
                return await LoadBenchmark(options, folder, endpoint, control_plane, client).run()


def main() -> int:
    """Run the benchmark. Returns 1 if a budget is exceeded, else 0."""
    options = parse_arguments()
    load_options = LoadOptions(
        tuple(options.parts.split(",")), options.jobs, options.finished, options.rounds, options.clients,
        options.idle_seconds, options.steady_seconds, options.timeout,
    )  # fmt: skip
    run_details = {"size": vars(load_options), "loadBefore": round(os.getloadavg()[0], 2), "commit": record.read_commit()}
    figures = asyncio.run(run_benchmark(load_options))
    verdicts = check_budgets(figures, json.loads(BUDGETS_FILE.read_text()))
    for verdict in verdicts:
        print(f"{verdict['verdict']:18} {verdict['figure']:38} {verdict['measured']:>10} (limit {verdict['limit']}): {verdict['why']}")
    figures_by_part = {part: part_figures | run_details for part, part_figures in figures.items()}
    if options.output:
        options.output.write_text(json.dumps(figures_by_part | {"budgets": verdicts}, indent=1))
    else:
        print(f"written: {write_figures(figures_by_part).relative_to(ROOT)}")
    return int(any(verdict["verdict"] == "EXCEEDED" for verdict in verdicts) and not options.lenient)


def parse_arguments() -> argparse.Namespace:
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
