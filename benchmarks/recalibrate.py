"""Collect the ratios of measured to planned values of finished jobs, and write the table with which plans are calibrated.

    kubectl get finetunejobs -A -o json > jobs.json
    .venv/bin/python benchmarks/recalibrate.py jobs.json

Method. Each job that trained successfully has planned work, planned memory and measured values in `status.plan`. The program adds one line for each such job
to `benchmarks/calibration_runs.jsonl`: type and number of GPUs, and the ratio of measured to planned value for the time of a step and for the peak of memory.
The planned time is computed again from the planned work, but without the calibration table, because the new table must not depend on the old one. A line
contains a hash of the job's uid, but no name and no address. Then the program writes `crds/finetune_api/calibration_table.py`: for each type of GPU, the
number of runs and the median, lowest and highest ratio. Plans use only entries of at least three runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_api.gpus import GPU_TYPES, find_gpu_type
from finetune_api.names import Phase
from finetune_api.status import FineTuneJobStatus
from finetune_api.time_plan import plan_time
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parent.parent
RUNS_FILE = ROOT / "benchmarks" / "calibration_runs.jsonl"
TABLE_FILE = ROOT / "crds" / "finetune_api" / "calibration_table.py"
TABLE_MODULE_TEMPLATE = '''"""Written by benchmarks/recalibrate.py from benchmarks/calibration_runs.jsonl. Do not edit it by hand.

Each entry has the number of runs, and the median, lowest and highest ratio of measured to planned value. {summary}
"""

from __future__ import annotations

TIME: dict[tuple[str, bool], tuple[int, float, float, float]] = {time}
"""Ratios for the time of an optimizer step, by type of GPU and by whether the run had several GPUs."""
MEMORY: dict[tuple[str, bool], tuple[int, float, float, float]] = {memory}
"""Ratios for the memory peak of the first rank's GPU, by type of GPU and by whether the run had several GPUs."""
'''


@dataclass(frozen=True)
class Run:
    """The ratios of one job: a line of `benchmarks/calibration_runs.jsonl`."""

    run: str
    """Hash of the job's uid."""
    gpu: str
    """Type of the GPUs, as in `finetune_api.gpus`."""
    gpus: int
    time_ratio: float | None = None
    """Measured time of an optimizer step divided by the planned time."""
    memory_ratio: float | None = None
    """Measured peak of memory divided by the planned peak."""


def read_jobs(content: Any) -> list[dict[str, Any]]:
    """Return the FineTuneJobs in a JSON document, which is one object or a list as kubectl writes it."""
    items = content.get("items") if isinstance(content, dict) and content.get("kind", "").endswith("List") else [content]
    return [item for item in items or [] if isinstance(item, dict) and item.get("kind") == "FineTuneJob"]


def read_run_of_job(job: dict[str, Any]) -> Run | None:
    """Return the ratios of a job, or None if it has no measured values or its type of GPU is unknown."""
    try:
        status = FineTuneJobStatus.model_validate(job.get("status") or {})
    except ValidationError:
        return None
    plan, resolved = status.plan, status.resolved
    gpu_type = find_gpu_type((resolved.device if resolved else None) or "")
    if status.phase is not Phase.SUCCEEDED or plan is None or plan.measured is None or gpu_type is None:
        return None
    gpu_count, time_ratio, memory_ratio = (resolved.world_size if resolved else None) or 1, None, None
    if plan.work is not None and plan.measured.seconds and plan.measured.steps:
        planned_step_seconds = plan_time(plan.work, gpu_type, gpu_count, table={}).expected_seconds / plan.work.steps
        time_ratio = round(plan.measured.seconds / plan.measured.steps / planned_step_seconds, 4)
    if plan.memory is not None and plan.measured.memory_bytes:
        memory_ratio = round(plan.measured.memory_bytes / plan.memory.expected_bytes, 4)
    if time_ratio is None and memory_ratio is None:
        return None
    gpu_name = next(name for name, known_type in GPU_TYPES.items() if known_type == gpu_type)
    uid = str((job.get("metadata") or {}).get("uid"))
    return Run(hashlib.sha256(uid.encode()).hexdigest()[:16], gpu_name, gpu_count, time_ratio, memory_ratio)


def summarise_ratios(runs: Iterable[Run], ratio_name: str) -> dict[tuple[str, bool], tuple[int, float, float, float]]:
    """Return the number of runs and the median, lowest and highest ratio. The key is the type of GPU, and whether the runs had several GPUs.

    `ratio_name`: `time_ratio` or `memory_ratio`."""
    ratios_by_gpu: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for run in runs:
        if (ratio := getattr(run, ratio_name)) is not None:
            ratios_by_gpu[run.gpu, run.gpus > 1].append(ratio)
    return {key: (len(ratios), round(statistics.median(ratios), 4), min(ratios), max(ratios)) for key, ratios in sorted(ratios_by_gpu.items())}


def format_table_module(runs: Sequence[Run]) -> str:
    """Return the text of the module with the table."""
    table_texts = {}
    for name, ratio_name in (("time", "time_ratio"), ("memory", "memory_ratio")):
        entries = [f"    {key!r}: {entry!r},".replace("'", '"') for key, entry in summarise_ratios(runs, ratio_name).items()]
        table_texts[name] = "\n".join(["{", *entries, "}"]) if entries else "{}"
    return TABLE_MODULE_TEMPLATE.format(summary=f"{len(runs)} runs." if runs else "No run was recorded yet.", **table_texts)


def read_runs(runs_file: Path) -> list[Run]:
    """Return the runs in the file, or an empty list if it does not exist."""
    return [Run(**json.loads(line)) for line in runs_file.read_text().splitlines() if line] if runs_file.exists() else []


def add_runs(recorded_runs: Sequence[Run], new_runs: Iterable[Run]) -> list[Run]:
    """Return the recorded and the new runs. A new run replaces the recorded run of the same job."""
    return list({run.run: run for run in (*recorded_runs, *new_runs)}.values())


def main(arguments: Sequence[str]) -> int:
    """Add the runs of the given files, and write the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON of FineTuneJobs; without files, the table is written again")
    parser.add_argument("--runs", type=Path, default=RUNS_FILE, help="file of the recorded runs")
    parser.add_argument("--table", type=Path, default=TABLE_FILE, help="module with the table")
    options = parser.parse_args(arguments)
    jobs = []
    for file in options.files:
        try:
            jobs += read_jobs(json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            print(f"{file} is not a JSON file: {error}; write the output of `kubectl get finetunejobs -A -o json` to it", file=sys.stderr)
            return 1
    new_runs = [run for job in jobs if (run := read_run_of_job(job)) is not None]
    runs = add_runs(read_runs(options.runs), new_runs)
    if runs:
        options.runs.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    options.table.write_text(format_table_module(runs))
    print(f"{len(new_runs)} of {len(jobs)} jobs have measured values; the table follows from {len(runs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
