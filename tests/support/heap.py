"""Excludes loaded libraries from garbage collection.

accelerate runs a garbage collection at the start of every training. With torch, transformers, PEFT and TRL loaded, the collection visits more than a million
objects, which takes a third of a second. That is three quarters of the time of a tiny training run. The collection does not visit objects that `gc.freeze` has
excluded.
"""

from __future__ import annotations

import gc
import sys

_frozen_module_count = 0


def freeze_libraries() -> None:
    """Exclude all existing objects from later garbage collections of this process. Does nothing if no module was loaded since the last call."""
    global _frozen_module_count  # a global variable, because `gc.freeze` applies to the whole process
    if len(sys.modules) > _frozen_module_count:
        gc.collect()
        gc.freeze()
        _frozen_module_count = len(sys.modules)
