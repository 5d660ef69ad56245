"""The interface of a method, and the check that a method trains at least one parameter.

A method is a subclass of `Method` in a module of this package. `class Full(Method, types=(MethodType.FULL,))` registers it for
`method.type: full`. There is no other list of methods.
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
from finetune_trainer.library_internals import copied_modules
from finetune_trainer.method.precision import require_scalable_weights
from finetune_trainer.model import count_parameters

METHOD_CLASSES: dict[MethodType, type[Method]] = {}
"""The class of every `method.type`. Importing a module of this package adds its classes (see `registry`)."""


@dataclass(frozen=True)
class MethodContext:
    """Inputs of a method."""

    run: RunConfig
    inputs: Inputs
    hardware: Hardware
    strategy: DistributedStrategy
    model_kind: str = "causal"
    """Head of the model: argument `kind` of `model.load_model`."""
    new_token_ids: tuple[int, ...] = ()
    """Token ids of `model.newTokens`. Their embedding rows are trained."""
    is_resumed: bool = False
    """Whether the trained weights will be loaded from a checkpoint. If so, no initial weights are computed."""


@dataclass
class TrainableModel:
    """A model in which exactly the trained parameters require gradients."""

    model: Any
    kind: OutputKind
    """Whether the final artefact is an adapter or a complete model."""
    trainable: int = 0
    """Number of trained values."""
    total: int = 0
    """Number of all values."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    extra_files: dict[str, str] = field(default_factory=dict)
    """Additional text files of the final artefact, by name."""
    initial_adapter: Path | None = None
    """Folder with the untrained adapter if its initialisation changes the base model (PiSSA, OLoRA)."""


class Method:
    """Base class of methods. The hooks run in the order of their definition. Only `apply` has no default."""

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
        """Read the unquantised weights if the method needs them. Returns the modules to leave unquantised when the base model is loaded."""
        return ()

    def apply(self, model: Any) -> TrainableModel:
        """Freeze, wrap or select parameters. Errors: ConfigError if the model cannot be trained with these settings."""
        raise NotImplementedError

    def after_apply(self, trainable: TrainableModel) -> None:
        """Set the dtype and the initial values of the trained weights. Called before the Trainer is built."""

    def trainer_construction(self, model: Any) -> AbstractContextManager[None]:
        """Return a context manager for building the Trainer on the base model `model`."""
        return nullcontext()

    def on_trainer_created(self, trainer: Any) -> None:
        """Check the model, and undo unwanted changes by the Trainer's constructor. Errors: ConfigError HalfWeights."""
        # DeepSpeed scales the loss itself and keeps its own 32-bit copies.
        if self.context.hardware.fp16 and self.context.strategy.name != "deepspeed":
            require_scalable_weights(trainer.model)

    def make_trainable(self, model: Any) -> TrainableModel:
        """Run `apply` and `after_apply`, and count the trained values.

        Errors: ConfigError StrategyAndMethod; errors of `apply`; InternalError NothingTrainable.
        """
        trainable = self.apply(model)
        trainable.trainable, trainable.total = count_parameters(trainable.model)
        if trainable.trainable == 0:
            raise InternalError(
                "NothingTrainable", f"method {self.context.run.spec.method.type} left no parameter to train"
            )
        if self.context.strategy.name == "fsdp":
            require_unshared_copies(trainable.model)
        self.after_apply(trainable)
        return trainable


def require_unshared_copies(model: Any) -> None:
    """Refuse `modulesToSave` if a module in it shares its weight with another module, because FSDP cannot shard shared weights.

    Errors: ConfigError StrategyAndMethod.
    """
    if not hasattr(model, "peft_config"):
        return
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, original in copied_modules(model).items():
        if any(uses[id(parameter)] > 1 for parameter in original.parameters()):
            raise ConfigError(
                "StrategyAndMethod",
                f"method.lora.modulesToSave names {name.rsplit('.', 1)[-1]}, but this module shares its weight with another module: FSDP cannot shard it",
                hint="remove the module from modulesToSave, or write `distributed: {strategy: ddp}` or deepspeed",
            )  # fmt: skip
