"""Which parts of mixture-of-experts models and state-space models get LoRA adapters.

transformers v5 keeps the weights of all routed experts of a layer in parameters with three dimensions: experts, rows and columns. They are no linear
layers, so `all-linear` does not contain them; `method.lora.targetParameters` names them. Routers choose the experts of a token: a small
change of a router changes the output in jumps, so `all-linear` leaves out routers that are linear layers.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.library_internals import reinterpreted_lora_targets

ALL_EXPERTS = "all-experts"
"""The value of `method.lora.targetParameters` for the weights of all routed experts."""
EXPERT_DIMENSIONS = 3
STATE_SPACE_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
STATE_SPACE_NAMES = ("out_proj", "conv1d")
"""Modules of `STATE_SPACE_TYPES` models that cannot have an adapter: a kernel reads their weights directly and ignores adapters.

PEFT refuses these modules.
"""


def expert_parameter_names(model: Any) -> list[str]:
    """Names of the weights of routed experts, without the part that differs between layers: `mlp.experts.down_proj`."""
    names = {
        f"{'.'.join(module_name.rsplit('.', 2)[-2:])}.{name}"
        for module_name, module in model.named_modules()
        if "Experts" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == EXPERT_DIMENSIONS
    }
    return sorted(names)


def layers_without_adapter(model: Any) -> dict[str, list[str]]:
    """Return the linear layers that `all-linear` leaves out: by reason, the sorted last parts of their names."""
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    routers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "Router" in type(module).__name__}
    state_space = STATE_SPACE_NAMES if getattr(model.config, "model_type", None) in STATE_SPACE_TYPES else ()
    reasons = {
        "PEFT interprets these names as the routed experts": reinterpreted_lora_targets(model),
        "the kernel of state-space layers reads these weights directly": state_space,
        "routers choose the experts of a token": routers,
    }
    return {reason: sorted(linear.intersection(names)) for reason, names in reasons.items() if linear.intersection(names)}
