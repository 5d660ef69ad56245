"""Checks the files of the adapters in `output.combineAdapters`, and loads each adapter scaled by its `weight`.

The merged model is exact: the matrix `W` of each layer becomes `W + sum(weight * scaling * B A)`. The sum is over all adapters that adapt the layer. PEFT's own
functions combine adapters into one new adapter, which has a larger rank (`cat`) or only approximates the sum (`linear`, `svd`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source

from finetune_trainer.verification.artefact_checks import ADAPTER_CONFIG, find_adapter_fault

TRAINED_ADAPTER = "default"
"""PEFT's name of the adapter that was trained."""


def combined_adapter_name(adapter_index: int) -> str:
    """Return the name of an adapter of `output.combineAdapters`, for PEFT, messages and the lineage statement. `adapter_index`: counted from 0."""
    return f"combined adapter {adapter_index}"


def require_combinable(folder: Path, base: Path, field: str, source: str) -> None:
    """Check the files of an adapter that will be combined with the trained adapter. This function does not import torch.

    Errors: ConfigError `AdapterNotCombinable`.
    """
    shown_source = redact_source(source)
    fault = find_adapter_fault(folder, base)
    if fault is not None:
        raise ConfigError(
            "AdapterNotCombinable", f"{field} is {shown_source}: {fault.message}", hint="write the folder of a LoRA adapter for the model of model.source"
        )
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    is_used_by_feature = {
        f"the method {config.get('peft_type')}": config.get("peft_type") != "LORA", "DoRA": bool(config.get("use_dora")),
        "trained biases": config.get("bias") not in (None, "none"), "modules that were trained in full": bool(config.get("modules_to_save")),
        "new tokens": bool(config.get("trainable_token_indices")), "adapters of experts": bool(config.get("target_parameters")),
    }  # fmt: skip
    used_features = [name for name, is_used in is_used_by_feature.items() if is_used]
    if used_features:
        raise ConfigError(
            "AdapterNotCombinable", f"{field} is {shown_source}, an adapter with {' and '.join(used_features)}: only plain LoRA adapters can be combined",
            hint="remove this adapter from output.combineAdapters",
        )  # fmt: skip


def load_combined_adapters(peft_model: Any, run: RunConfig, folders: Sequence[Path]) -> list[str]:
    """Load the adapters of `output.combineAdapters` into a PEFT model, and multiply the scaling of each adapter by its `weight`.

    Returns PEFT's names of all adapters, with the trained adapter first.
    """
    weight_by_adapter = {TRAINED_ADAPTER: 1.0 if run.spec.output.adapter_weight is None else run.spec.output.adapter_weight}
    for number, (item, folder) in enumerate(zip(run.spec.output.combine_adapters or [], folders, strict=True)):
        peft_model.load_adapter(folder, adapter_name=combined_adapter_name(number))
        weight_by_adapter[combined_adapter_name(number)] = 1.0 if item.weight is None else item.weight
    for module in peft_model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            scaling.update({name: value * weight_by_adapter[name] for name, value in scaling.items()})
    return list(weight_by_adapter)
