"""Continue training an existing adapter, whatever made it, on the base it was made for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind

from finetune_trainer.inputs import Inputs
from finetune_trainer.method.base import Applied
from finetune_trainer.method.lora import show_bias

CONFIG = "adapter_config.json"
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


def apply(
    run: RunConfig, inputs: Inputs, model: Any, *, keep_dtype: bool = False, new_ids: Sequence[int] = ()
) -> Applied:
    """Load the adapter with its weights trainable.

    Errors: NotFoundError AdapterUnreadable (class Model); ConfigError AdapterNotContinuable, AdapterOfAnotherBase,
    NewTokensNotTrained.
    """
    from peft import PeftModel

    source = run.spec.method.adapter.source if run.spec.method.adapter else None
    folder = inputs.adapter
    try:
        assert folder is not None, "the supervisor fetches method.adapter.source"
        config = json.loads((folder / CONFIG).read_text())
        kind = config.get("peft_type", "")
    except (OSError, ValueError):
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: there is no readable {CONFIG}",
            hint="give the folder that holds adapter_config.json and adapter_model.safetensors", failure_class=FailureClass.MODEL,
        ) from None  # fmt: skip
    if kind in PROMPT_LEARNING:
        raise ConfigError(
            "AdapterNotContinuable", f"{source} is a {kind.lower().replace('_', ' ')} adapter, which PEFT cannot go on training",
            hint="train a new one, or continue a LoRA or IA3 adapter",
        )  # fmt: skip
    trained = config.get("trainable_token_indices") or {}
    if any(set(new_ids) - set(ids) for ids in trained.values()) or (new_ids and not trained):
        raise ConfigError(
            "NewTokensNotTrained", f"{source} trains no rows for model.newTokens, and an adapter that exists gets no new ones",
            hint="remove newTokens, give the ones that the adapter was made with, or write method lora",
        )  # fmt: skip
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=not keep_dtype)
    except (RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            "AdapterOfAnotherBase", f"{source} does not fit {run.spec.model.source}: {first}",
            hint="give the base that the adapter was trained on",
        ) from error  # fmt: skip
    show_bias(wrapped)
    return Applied(wrapped, OutputKind.ADAPTER, notes=[f"continues the {kind} adapter of {source}"])
