"""Finds the method that a run asks for."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from finetune_api.rules import method_of
from finetune_api.spec.enums import MethodType

import finetune_trainer.method
from finetune_trainer.method.base import METHODS, Method, MethodContext


@cache
def all_methods() -> dict[MethodType, type[Method]]:
    """Every `method.type` with its class. Imports each module of this package, which registers what it defines."""
    for module in pkgutil.iter_modules(finetune_trainer.method.__path__, f"{finetune_trainer.method.__name__}."):
        importlib.import_module(module.name)
    return METHODS


def create_method(context: MethodContext) -> Method:
    """The method of the run's `method.type`."""
    return all_methods()[method_of(context.run.spec)](context)
