"""Decides which modules and parameters of mixture-of-experts and state-space models get LoRA adapters.

transformers v5 stores the weights of all routed experts of a layer in parameters with three dimensions: experts, rows and columns. These
parameters are not linear layers, so `all-linear` does not include them; users name them in `method.lora.targetParameters`. `all-linear` also
leaves out routers. A router chooses the experts of a token, so even a small change of its weights can change the output abruptly.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.library_internals import reinterpreted_lora_targets

ALL_EXPERTS = "all-experts"
"""The value of `method.lora.targetParameters` for the weights of all routed experts."""
EXPERT_DIMENSIONS = 3
STATE_SPACE_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""The values of `config.model_type` for models with state-space layers."""
STATE_SPACE_NAMES = ("out_proj", "conv1d")
"""Modules of state-space layers that cannot have an adapter, because a kernel reads their weights directly. PEFT refuses these modules."""


def expert_parameter_names(model: Any) -> list[str]:
    """Return the names of the routed experts' weights, such as `mlp.experts.down_proj`. The names leave out the prefix that differs between layers."""
    names = {
        f"{'.'.join(module_name.rsplit('.', 2)[-2:])}.{name}"
        for module_name, module in model.named_modules()
        if "Experts" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == EXPERT_DIMENSIONS
    }
    return sorted(names)


def layers_without_adapter(model: Any) -> dict[str, list[str]]:
    """Return the linear layers that `all-linear` leaves out: for each reason, the last parts of the layers' names, sorted."""
    linear_names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "in_features")}
    router_names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "Router" in type(module).__name__}
    state_space_names = STATE_SPACE_NAMES if getattr(model.config, "model_type", None) in STATE_SPACE_MODEL_TYPES else ()
    reasons = {
        "PEFT interprets these names as the routed experts": reinterpreted_lora_targets(model),
        "the kernel of state-space layers reads these weights directly": state_space_names,
        "routers choose the experts of a token": router_names,
    }
    return {reason: sorted(linear_names.intersection(names)) for reason, names in reasons.items() if linear_names.intersection(names)}
