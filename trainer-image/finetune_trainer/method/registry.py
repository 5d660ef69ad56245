"""Finds the class of a run's `method.type`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from finetune_api.rules import method_type_of
from finetune_api.spec.enums import MethodType

import finetune_trainer.method
from finetune_trainer.method.base import METHOD_CLASSES, Method, MethodContext


@cache
def all_methods() -> dict[MethodType, type[Method]]:
    """Return the class of every `method.type`. Imports all modules of this package, because each import registers classes."""
    for module in pkgutil.iter_modules(finetune_trainer.method.__path__, f"{finetune_trainer.method.__name__}."):
        importlib.import_module(module.name)
    return METHOD_CLASSES


def create_method(context: MethodContext) -> Method:
    """Create the method for the run's `method.type`."""
    return all_methods()[method_type_of(context.run.spec)](context)
