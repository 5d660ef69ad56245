"""Imports the heavy libraries that a job needs, and hides libraries that the job does not need.

Ranks import their libraries while the supervisor downloads the inputs. bitsandbytes and deepspeed take seconds to import. peft imports bitsandbytes
if it is installed; accelerate imports deepspeed whenever a model is saved; transformers imports torchvision; TRL imports wandb and mlflow. If a job
does not need one of these packages, the package's entry in `sys.modules` is set to None, so that `importlib` reports it as not installed. scipy and
boto3 are hidden only while transformers and peft are imported: transformers would import scipy for object detection losses, which takes half a second,
and accelerate would import boto3 for a command that configures SageMaker.

The garbage collector pauses during the imports. The imports create about a million objects that live as long as the process. Repeated collections
would examine all of these objects each time, which takes a fifth of the time of the imports.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import base_bits
from finetune_api.spec.enums import Modality, StrategyType, TrainerBackend

LIBRARY_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
"""Variables that the libraries read on import. A rank never accesses a hub, because the supervisor has downloaded all inputs."""
BITSANDBYTES_OPTIMIZER = re.compile("8bit|paged|bnb|^ademamix|^lion")
"""Matches the names of bitsandbytes' optimizers. The pattern also matches two 8-bit optimizers of torchao."""


def needs_bitsandbytes(run: RunConfig) -> bool:
    """Whether the job needs bitsandbytes for a quantised base model, for its optimizer or for unsloth."""
    spec = run.spec
    is_needed_by_optimizer = BITSANDBYTES_OPTIMIZER.search(spec.training.optimizer or "") is not None
    return base_bits(spec) is not None or is_needed_by_optimizer or spec.trainer.backend is TrainerBackend.UNSLOTH


def needs_deepspeed(run: RunConfig) -> bool:
    """Whether the job uses DeepSpeed."""
    return run.spec.distributed.strategy is StrategyType.DEEPSPEED


def preload(run: RunConfig, objective_module: str) -> None:
    """Hide the libraries that the job does not need. Import the libraries that the job needs, and `objective_module`."""
    hide_unneeded_libraries(run)
    import_libraries("datasets", objective_module)


def import_libraries(*other_modules: str) -> None:
    """Import torch, transformers and peft, and then `other_modules`. Call `hide_unneeded_libraries` before this function."""
    with garbage_collection_paused(), hide_temporarily("scipy", "boto3", module_that_needs_it="transformers"):
        for name in ("torch", "transformers"):
            importlib.import_module(name)
        reuse_list_of_models()
        for name in ("peft", *other_modules):
            importlib.import_module(name)
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401  transformers loads these names on access
    importlib.import_module("transformers.utils.import_utils").is_scipy_available.cache_clear()


def reuse_list_of_models() -> None:
    """Let `transformers.models` use the list of model classes that the import of `transformers` has already made.

    transformers reads its more than 1,600 model files twice to list their classes: once for the package `transformers`, with module names
    that begin with `models.`, and once for `transformers.models`, without this prefix. This function derives the second list from the first,
    which saves a tenth of the time of all imports (transformers 5.23). The function does nothing if `transformers.models` is already imported.
    """
    if "transformers.models" in sys.modules:
        return
    import_utils: Any = importlib.import_module("transformers.utils.import_utils")
    folder = Path(import_utils.__file__).parents[1] / "models"
    define_structure, prefix = import_utils.define_import_structure, f"{folder.name}."
    prefixed_structure = define_structure(folder, prefix=folder.name)  # returns a cached result, because transformers has already made the same call
    models_structure = {
        requirements: {module.removeprefix(prefix): classes for module, classes in modules.items() if module.startswith(prefix)}
        for requirements, modules in prefixed_structure.items()
    }  # Modules without the prefix are left out: transformers has added them, but they hold no models.

    def list_models(path: str, prefix: str | None = None) -> object:
        return models_structure if prefix is None and Path(path) == folder / "__init__.py" else define_structure(path, prefix)

    import_utils.define_import_structure = list_models
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = define_structure


def hide_unneeded_libraries(run: RunConfig, *, keeps_bitsandbytes: bool = False) -> None:
    """Set the environment variables that the libraries read, and hide the libraries that the job does not need.

    `keeps_bitsandbytes`: whether bitsandbytes is needed even if the spec does not need it, because another job quantised the base model.
    """
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    thread_count = run.spec.dataset.num_proc
    if thread_count is not None:
        os.environ["RAYON_NUM_THREADS"] = str(thread_count)  # The thread pool of tokenizers reads this variable only once.
    needed_packages = {
        "bitsandbytes": keeps_bitsandbytes or needs_bitsandbytes(run),
        "deepspeed": needs_deepspeed(run),
        "torchvision": run.spec.model.modality is Modality.VISION_LANGUAGE,
        "wandb": False,  # Another process sends values to trackers (`finetune_trainer.trackers`).
        "mlflow": False,
    }
    for name, is_needed in needed_packages.items():
        if not is_needed:
            _hide_package(name)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector within the context. Frozen objects stay frozen if no module is imported within the context."""
    was_enabled, module_count = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if len(sys.modules) > module_count:
                # freeze() and unfreeze() together move all objects to the oldest generation, so that the next collections of the younger
                # generations need not examine these objects.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@contextmanager
def hide_temporarily(*names: str, module_that_needs_it: str) -> Iterator[None]:
    """Hide packages while the package `module_that_needs_it` is imported for the first time. Packages that are already imported stay visible."""
    hidden_names = [] if module_that_needs_it in sys.modules else [name for name in names if name not in sys.modules]
    for name in hidden_names:
        _hide_package(name)
    try:
        yield
    finally:
        for name in hidden_names:
            del sys.modules[name]


def _hide_package(name: str) -> None:
    """Make the package `name` appear as not installed, unless it is already imported (in tests with several jobs per process)."""
    if sys.modules.get(name) is None:
        sys.modules[name] = None  # type: ignore[assignment]  # the documented way to block an import
