"""Measures the host memory that the pod may still use, limited by the machine and by the container's cgroup."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

CGROUP_FOLDER = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files of the cgroup that hold the memory limit, the usage and the details of the usage: for cgroup version 2, then for version 1."""
RECLAIMABLE_FIELDS = ("inactive_file", "total_inactive_file")
"""Fields in the file with the details that hold the bytes of file cache that the kernel can drop: for cgroup version 2, then for version 1."""


def available_bytes(cgroup: Path = CGROUP_FOLDER) -> int:
    """Return the bytes that processes of this pod may still allocate."""
    available_bytes_of_machine = psutil.virtual_memory().available
    return min([available_bytes_of_machine, *_list_bytes_below_limit(cgroup)])


def _list_bytes_below_limit(cgroup: Path) -> list[int]:
    """Return a list with the bytes that are left below the cgroup's limit. Empty if the cgroup has no limit."""
    for limit_file, usage_file, details_file in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # version 2 writes `max` if there is no limit
            limit_bytes, usage_bytes = int((cgroup / limit_file).read_text()), int((cgroup / usage_file).read_text())
            details = dict(line.split() for line in (cgroup / details_file).read_text().splitlines())
            reclaimable_bytes = next((int(details[name]) for name in RECLAIMABLE_FIELDS if name in details), 0)
            return [limit_bytes - usage_bytes + reclaimable_bytes]
    return []
