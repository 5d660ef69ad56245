"""Choosing the method, and what every method has to prove: that something is trained, and only what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.inputs import Inputs


@dataclass
class Applied:
    """A model ready to be trained."""

    model: Any
    kind: OutputKind
    """What the final artefact is: an adapter, which needs the base, or a model."""
    trainable: int = 0
    total: int = 0
    notes: list[str] = field(default_factory=list)
    extra_files: dict[str, str] = field(default_factory=dict)
    """Text files that belong to the final artefact, by name."""
    initial_adapter: Path | None = None
    """Where the adapter's start is kept, if the base was changed to make up for it."""


def apply(
    run: RunConfig, inputs: Inputs, model: Any, *, keep_dtype: bool = False, fsdp: bool = False, selection: Any = None,
    new_ids: Sequence[int] = (),
) -> Applied:  # fmt: skip
    """Freeze, wrap or select, as `method.type` says. `keep_dtype`: adapters take the base's type (ZeRO-3 mixes none).
    `fsdp`: FSDP will shard the model.

    `selection`: modules that spectrum chose before a quantised base was loaded. `new_ids`: tokens whose rows are trained.

    Errors: ConfigError with the reason for everything that cannot be trained as asked.
    """
    from finetune_trainer.method import adapter, full, lora, prompt, spectrum

    match run.spec.method.type or MethodType.LORA:
        case MethodType.FULL:
            applied = full.apply(run, model)
        case MethodType.LORA | MethodType.QLORA | MethodType.DORA:
            applied = lora.apply(run, inputs, model, keep_dtype=keep_dtype, new_ids=new_ids)
        case MethodType.ADAPTER:
            applied = adapter.apply(run, inputs, model, keep_dtype=keep_dtype, new_ids=new_ids)
        case MethodType.SPECTRUM:
            applied = spectrum.apply(run, inputs, model, selection)
        case MethodType.PREFIX_TUNING | MethodType.PROMPT_TUNING:
            applied = prompt.apply(run, model)
        case MethodType.IA3:
            applied = lora.apply_ia3(run, model)
        case other:
            raise ConfigError(
                "NotSupportedYet", f"method.type {other} cannot be trained by this version", hint="write lora"
            )
    applied.trainable, applied.total = count(applied.model)
    if applied.trainable == 0:
        raise InternalError("NothingTrainable", f"method {run.spec.method.type} left no parameter to train")
    if fsdp and hasattr(applied.model, "peft_config"):
        _require_apart(applied.model)
    return applied


def _require_apart(model: Any) -> None:
    """FSDP shards a module that is copied for training apart from all others, and cannot where its weight is another's, too.

    Errors: ConfigError StrategyAndMethod.
    """
    from peft.utils.other import ModulesToSaveWrapper

    every = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(
            every[id(one)] > 1 for one in module.original_module.parameters()
        ):
            raise ConfigError(
                "StrategyAndMethod",
                f"{name.rsplit('.', 1)[-1]} is trained in full beside the adapter (modulesToSave), and shares its weight, which FSDP cannot shard",
                hint="leave it out, or write `distributed: {strategy: ddp}` or deepspeed",
            )  # fmt: skip


def widen(model: Any) -> None:
    """Give 16-bit weights that are trained 32 bits: their small updates would vanish, and fp16's scaler refuses them.

    PEFT does so for its own layers, and not for modules that are trained in full beside them (`modulesToSave`, a reward
    model's head, biases). Autocast brings 16-bit inputs and 32-bit weights together.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.element_size() < 4:
            parameter.data = parameter.data.float()


def require_scalable(model: Any) -> None:
    """For fp16 with torch's own loss scaling, which divides gradients of 32 bits only. Errors: ConfigError HalfWeights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and str(parameter.dtype) == "torch.float16":
            raise ConfigError(
                "HalfWeights", f"{name} is trained in float16, as model.dtype says, and the loss scaling of fp16 needs 32 bits",
                hint="leave model.dtype out, or write `training: {mixedPrecision: bf16}`",
            )  # fmt: skip


def count(model: Any) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(one for one, trained in sizes if trained), sum(one for one, _ in sizes)


def size(parameter: Any) -> int:
    """Numbers in a parameter. 4-bit weights count as the numbers they stand for; ZeRO-3 parameters by their full size."""
    found = int(getattr(parameter, "ds_numel", None) or parameter.numel())
    return found * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else found
