"""Measures the free space of the pod, limited by the file system and by the pod's ephemeral-storage limit."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from finetune_api.names import Env


def free_bytes(work_folder: Path) -> int:
    """Return the bytes that may still be written below the work folder. The result is negative if the pod has already exceeded its limit. The kubelet evicts
    a pod that exceeds its limit, even if the node's disk has free space.
    """
    existing_folder = work_folder
    while not existing_folder.exists():
        existing_folder = existing_folder.parent
    free_bytes_on_disk = shutil.disk_usage(existing_folder).free
    limit_text = os.environ.get(Env.DISK_LIMIT)
    return free_bytes_on_disk if limit_text is None else min(free_bytes_on_disk, int(limit_text) - _measure_used_bytes(work_folder))


def _measure_used_bytes(folder: Path) -> int:
    """Return the bytes on disk below a folder. A file with several hard links counts once, as in the kubelet's measurement."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Another process may remove files at the same time.
                status = Path(parent, name).lstat()
                sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())
