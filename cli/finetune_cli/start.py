"""Where `finetune` begins. It loads nothing itself, so that Ctrl-C while modules load ends it as at any other time."""

from __future__ import annotations

import importlib
import sys

INTERRUPTED = 130


def main() -> None:
    """`finetune`."""
    _begin("main")


def kubectl_complete() -> None:
    """`kubectl_complete-finetune`, which kubectl calls."""
    _begin("kubectl_complete")


def _begin(name: str) -> None:
    try:
        getattr(importlib.import_module("finetune_cli.main"), name)()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
