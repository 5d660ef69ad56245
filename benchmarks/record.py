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
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "kopf", "kubernetes", "boto3")


def machine() -> dict[str, Any]:
    """Cores, memory and processor of this machine."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memoryGiB": round(memory / 2**30, 1), "kernel": platform.release()}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed packages."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str:
    """Commit of the checkout; a `+` is appended if tracked files have uncommitted changes."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def method(doc: str | None) -> str:
    """Return the description of a benchmark's method: the text after `Method.` in its docstring."""
    return (doc or "").split("Method.", 1)[1].strip()


def write(name: str, figures: dict[str, Any], *, method: str) -> Path:
    """Write `results/<name>.json`, which replaces the last result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name, "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(), "method": method,
        "machine": machine(), "versions": versions(), "figures": figures,
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
