"""Host memory that the pod may still use, limited by the machine and by the container's cgroup."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMIT_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Files of the cgroup with the limit, the usage and its details: version 2, then version 1."""
RECLAIMABLE_FIELDS = ("inactive_file", "total_inactive_file")
"""Names of the file cache that the kernel drops when memory is needed: version 2, then version 1."""


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes that processes of this pod may still allocate."""
    on_machine = psutil.virtual_memory().available
    return min([on_machine, *_below_limit(cgroup)])


def _below_limit(cgroup: Path) -> list[int]:
    """Bytes between the usage and the cgroup's limit; empty without a limit."""
    for limit_file, usage_file, details_file in LIMIT_FILES:
        with contextlib.suppress(OSError, ValueError):  # version 2 writes `max` if there is no limit
            limit, usage = int((cgroup / limit_file).read_text()), int((cgroup / usage_file).read_text())
            details = dict(line.split() for line in (cgroup / details_file).read_text().splitlines())
            reclaimable = next((int(details[name]) for name in RECLAIMABLE_FIELDS if name in details), 0)
            return [limit - usage + reclaimable]
    return []
