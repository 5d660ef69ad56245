"""Folders outside the checkout, so that all clones on a machine share cached files."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT_FOLDER = Path(__file__).resolve().parent.parent


def cache_folder() -> Path:
    """Return the project's cache folder, which contains only files that can be created again: binaries, image layers, clusters."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return user_cache / "finetune-operator"


def get_default_state_folder(name: str) -> Path:
    """Return the default state folder of the cluster `name`."""
    return cache_folder() / "clusters" / name
