"""The functions that the installed programs call. All slow imports happen inside `_run`, so that Ctrl-C during an import prints no traceback."""

from __future__ import annotations

import importlib
import sys

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""


def main() -> None:
    """Run the program `finetune` or `kubectl-finetune`."""
    _run("main")


def kubectl_complete() -> None:
    """Run `kubectl_complete-finetune`: kubectl calls this program for shell completion of the plugin."""
    _run("kubectl_complete")


def _run(function_name: str) -> None:
    try:
        getattr(importlib.import_module("finetune_cli.main"), function_name)()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
