"""Free space for the pod: the smaller of what its file system and its ephemeral-storage limit leave."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from finetune_api.names import Env


def free_bytes(work: Path) -> int:
    """Bytes that may still be written below the work folder; negative if the limit is exceeded already.

    The kubelet evicts a pod that exceeds its limit, however much space the node's disk has left.
    """
    existing = work
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    limit = os.environ.get(Env.DISK_LIMIT)
    return free if limit is None else min(free, int(limit) - _used(work))


def _used(folder: Path) -> int:
    """Bytes on disk below a folder. A file with several names counts once, as the kubelet counts it."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # files may be removed meanwhile
                found = Path(parent, name).lstat()
                sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())
