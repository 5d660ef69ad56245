"""Computes the digest of the images that the rows of a data set name.

The digest covers the contents of exactly these files. Other files in the same folders do not change it. Images inside the data files (data URIs, bytes) are
covered by the digest of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_trainer.supervisor.file_digests import FileDigests

THREADS = 4
"""hashlib computes without Python's lock, so that several files are read and hashed at the same time."""
FILES_PER_REPORT = 500


def image_set_digest(images: Mapping[Path, str], digests: FileDigests, report: Callable[[str], None]) -> str:
    """Return a sha256 over name and sha256 of each image. `images`: the name of each file, relative to the folder of the images.

    `digests` has the sha256 of the files that were downloaded from a store. Other files are read. `report` receives the progress.
    """
    paths, lines = sorted(images), list[str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for path, sha256 in zip(paths, pool.map(digests.of, paths), strict=True):
            lines.append(f"{images[path]}\0{sha256}")
            if len(lines) % FILES_PER_REPORT == 0:
                report(f"{len(lines)} of {len(paths)} images compared by content")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
