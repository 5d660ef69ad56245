"""Room on the pod's disk: what its file system has left, and what the pod's own limit leaves."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from finetune_api.names import Env


def free_bytes(work: Path) -> int:
    """Bytes that may still be written below the work folder.

    A pod that goes beyond its limit is evicted, however much its node's disk has left. Negative if it is beyond already.
    """
    place = work
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    limit = os.environ.get(Env.DISK_LIMIT)
    return free if limit is None else min(free, int(limit) - _used(work))


def _used(folder: Path) -> int:
    """Bytes on disk below a folder, a file with several names once: as the kubelet counts."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # files come and go meanwhile
                found = Path(parent, name).lstat()
                sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())
