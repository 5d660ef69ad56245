"""Folders outside the checkout, so that all clones on a machine share cached files."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """Folder of files that can be created again: binaries, image layers, clusters."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "finetune-operator"


def state(name: str) -> Path:
    """State folder of the cluster `name`."""
    return cache() / "clusters" / name
