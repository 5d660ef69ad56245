"""Start time of the command line: `finetune --help` and the common offline commands.

    python benchmarks/cli_startup.py --runs 20

Method. The commands run alternately, each as a new process, and are timed on the monotonic clock. The first round warms the page cache
and is not counted. For the other rounds, the result contains the median and maximum duration and the median CPU time, which hardly depends
on other programs on the machine. The target is 0.4 s for `--help`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

JOB_YAML = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec: {model: {source: org/m}, dataset: {train: "s3://data/t.jsonl"}}
"""
ENV_FILE_TEXT = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/t.jsonl\nDATASET_TYPE=instruction_jsonl\n"


def measure_commands(commands: dict[str, list[str]], run_count: int) -> dict[str, dict[str, float]]:
    """Run each command `run_count` times. Returns the median and worst duration and the median CPU time of each command, in seconds."""
    samples_by_command: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for round_number in range(run_count + 1):
        for name, arguments in commands.items():
            started_at, cpu_seconds_before = time.perf_counter(), measure_children_cpu_seconds()
            subprocess.run([sys.executable, "-m", "finetune_cli", *arguments], check=True, capture_output=True)
            if round_number:
                samples_by_command[name].append((time.perf_counter() - started_at, measure_children_cpu_seconds() - cpu_seconds_before))
    return {
        name: {
            "medianSeconds": round(statistics.median(wall for wall, _ in samples), 3),
            "worstSeconds": round(max(wall for wall, _ in samples), 3),
            "medianCpuSeconds": round(statistics.median(cpu for _, cpu in samples), 3),
        }
        for name, samples in samples_by_command.items()
    }


def measure_children_cpu_seconds() -> float:
    """Return the CPU seconds (user and system) of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job_file, env_file = Path(folder, "job.yaml"), Path(folder, "train.env")
        job_file.write_text(JOB_YAML, encoding="utf-8")
        env_file.write_text(ENV_FILE_TEXT, encoding="utf-8")
        commands = {
            "help": ["--help"],
            "validate": ["validate", str(job_file)],
            "explain": ["explain", "training.learningRate"],
            "import": ["import", str(env_file)],
        }
        figures = {"runs": options.runs, **measure_commands(commands, options.runs)}
    print(json.dumps(figures, indent=1))
    if not options.no_write:
        print(record.write_result("cli_startup", figures, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
