"""The interface of a method, and the check that a method trains at least one parameter.

A method is a subclass of `Method` in a module of this package. The argument `types` in its class statement registers it, as in
`class Full(Method, types=(MethodType.FULL,))` for `method.type: full`. There is no other list of methods.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.distributed import DistributedStrategy
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.library_internals import find_copied_modules
from finetune_trainer.method.precision import require_scalable_weights
from finetune_trainer.model import count_parameters

METHOD_CLASSES: dict[MethodType, type[Method]] = {}
"""The class of every `method.type`. Importing a module of this package adds its classes (see `registry`)."""


@dataclass(frozen=True)
class MethodContext:
    """The inputs of a method."""

    run: RunConfig
    inputs: Inputs
    hardware: Hardware
    strategy: DistributedStrategy
    model_kind: str = "causal"
    """Head of the model: `causal` (next token) or `reward` (one score)."""
    new_token_ids: tuple[int, ...] = ()
    """Token ids of `model.newTokens`. The embedding rows of these tokens are trained."""
    is_resumed: bool = False
    """Whether the trained weights will be loaded from a checkpoint. If they will be loaded, methods skip the computation of initial weights."""


@dataclass
class TrainableModel:
    """A model in which exactly the trained parameters require gradients."""

    model: Any
    output_kind: OutputKind
    """Whether the final artefact is an adapter or a complete model."""
    trainable_count: int = 0
    """Number of trained weights."""
    total_count: int = 0
    """Number of all weights."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    extra_files: dict[str, str] = field(default_factory=dict)
    """Content of each additional text file of the final artefact, by file name."""
    initial_adapter: Path | None = None
    """Folder with the untrained adapter, if its initialisation changes the base model (PiSSA, OLoRA); else None."""


class Method:
    """The base class of methods. The hooks of a method run in the order in which this class defines them. A subclass must define `apply`."""

    def __init_subclass__(cls, types: tuple[MethodType, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        for method_type in types:
            assert method_type not in METHOD_CLASSES, (
                f"{METHOD_CLASSES[method_type].__name__} and {cls.__name__} both implement method.type {method_type}"
            )
            METHOD_CLASSES[method_type] = cls

    def __init__(self, context: MethodContext):
        self.context = context

    def before_load(self) -> tuple[str, ...]:
        """Return the names of the modules to leave unquantised when the base model is loaded.

        The hook may read the unquantised weights to choose these modules.
        """
        return ()

    def apply(self, model: Any) -> TrainableModel:
        """Return the model with exactly the trained parameters unfrozen. Errors: ConfigError if the model cannot be trained with these settings."""
        raise NotImplementedError

    def after_apply(self, trainable: TrainableModel) -> None:
        """Set the dtype and the initial values of the trained weights. This hook runs before the Trainer is built."""

    def trainer_construction(self, model: Any) -> AbstractContextManager[None]:
        """Return a context manager in which the Trainer is built. `model`: the base model."""
        return nullcontext()

    def on_trainer_created(self, trainer: Any) -> None:
        """Check the model, and undo changes that the Trainer's constructor made to the weights. Errors: ConfigError HalfWeights."""
        # The check is not needed with DeepSpeed, which scales the loss itself and trains its own 32-bit copies of the weights.
        if self.context.hardware.computes_in_fp16 and self.context.strategy.name != "deepspeed":
            require_scalable_weights(trainer.model)

    def make_trainable(self, model: Any) -> TrainableModel:
        """Run `apply` and `after_apply`, and count the trained values.

        Errors: ConfigError StrategyAndMethod; errors of `apply`; InternalError NothingTrainable.
        """
        trainable = self.apply(model)
        trainable.trainable_count, trainable.total_count = count_parameters(trainable.model)
        if trainable.trainable_count == 0:
            raise InternalError(
                "NothingTrainable", f"method {self.context.run.spec.method.type} left no parameter to train"
            )
        if self.context.strategy.name == "fsdp":
            require_unshared_saved_modules(trainable.model)
        self.after_apply(trainable)
        return trainable


def require_unshared_saved_modules(model: Any) -> None:
    """Refuse a module in `modulesToSave` that shares its weight with another module, because FSDP cannot shard shared weights.

    Errors: ConfigError StrategyAndMethod.
    """
    if not hasattr(model, "peft_config"):
        return
    use_counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, original_module in find_copied_modules(model).items():
        if any(use_counts[id(parameter)] > 1 for parameter in original_module.parameters()):
            raise ConfigError(
                "StrategyAndMethod",
                f"method.lora.modulesToSave names {name.rsplit('.', 1)[-1]}, but this module shares its weight with another module: FSDP cannot shard it",
                hint="remove the module from modulesToSave, or write `distributed: {strategy: ddp}` or deepspeed",
            )  # fmt: skip
