"""Write the result of a benchmark with its time, machine, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS_FOLDER = ROOT / "benchmarks" / "results"
RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "kopf", "kubernetes", "boto3")


def describe_machine() -> dict[str, Any]:
    """Return the processor, number of cores, memory and kernel of this machine."""
    cpu_name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_name, "cores": os.cpu_count(), "memoryGiB": round(memory_bytes / 2**30, 1), "kernel": platform.release()}


def read_package_versions(package_names: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Return the version of Python and the versions of the packages in `package_names` that are installed."""
    version_by_package = {"python": platform.python_version()}
    for name in package_names:
        try:
            version_by_package[name] = version(name)
        except PackageNotFoundError:
            continue
    return version_by_package


def read_commit() -> str:
    """Return the short hash of the checkout's commit, followed by `+` if tracked files have uncommitted changes."""
    try:
        head_process = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        status_process = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head_process.stdout.strip() + ("+" if status_process.stdout.strip() else "")


def extract_method(docstring: str | None) -> str:
    """Return the description of a benchmark's method: the text after `Method.` in its docstring."""
    return (docstring or "").split("Method.", 1)[1].strip()


def write_result(
    name: str, figures: dict[str, Any], *, method: str, machine: dict[str, Any] | None = None, versions: dict[str, str] | None = None
) -> Path:
    """Write `results/<name>.json`, which replaces the last result. Returns its path. By default, `machine` and `versions` describe this machine."""
    RESULTS_FOLDER.mkdir(parents=True, exist_ok=True)
    result_file = RESULTS_FOLDER / f"{name}.json"
    result = {
        "benchmark": name, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": read_commit(), "method": method,
        "machine": machine or describe_machine(), "versions": versions or read_package_versions(), "figures": figures,
    }  # fmt: skip
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    return result_file
