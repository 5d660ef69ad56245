"""Where things lie outside the checkout, so that a fresh clone finds what an older one made."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def cache() -> Path:
    """Everything that may be thrown away and made again: binaries, image layers, clusters."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "finetune-operator"


def state(name: str) -> Path:
    """The state folder of the cluster called `name`."""
    return cache() / "clusters" / name
