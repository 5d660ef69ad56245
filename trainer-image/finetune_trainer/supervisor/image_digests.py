"""Computes the digest of the images that the rows of a data set name.

The digest covers the contents of exactly these images. Other files in the same folders do not change the digest. Images inside the data files (data
URIs, bytes) are covered by the digest of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_trainer.supervisor.file_digests import FileDigests

HASH_THREADS = 4
"""Number of files that are read and hashed at the same time. (hashlib releases Python's global lock while it computes.)"""
IMAGES_PER_REPORT = 500


def compute_image_set_digest(name_by_image: Mapping[Path, str], digests: FileDigests, report_progress: Callable[[str], None]) -> str:
    """Return a sha256 over the name and the sha256 of each image. `name_by_image` maps each file to its name, relative to the folder of the images.

    `digests` contains the sha256 of files that were downloaded from a store. All other files are read and hashed.
    """
    images, lines = sorted(name_by_image), list[str]()
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for path, sha256 in zip(images, pool.map(digests.get_sha256, images), strict=True):
            lines.append(f"{name_by_image[path]}\0{sha256}")
            if len(lines) % IMAGES_PER_REPORT == 0:
                report_progress(f"{len(lines)} of {len(images)} images compared by content")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
