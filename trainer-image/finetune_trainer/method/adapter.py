"""Continue training an existing adapter, whatever made it, on the base it was made for.

PEFT only warns where a file and the model do not fit each other, and trains what it has made up itself. Here every weight that
is trained must come from the file, and every weight of the file must have a place.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules.methods import keeps_reference_adapter
from finetune_api.sources import redact_source
from finetune_api.spec.enums import OutputKind

from finetune_trainer.inputs import Inputs
from finetune_trainer.method.base import Applied
from finetune_trainer.method.lora import show_bias

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How PEFT's words begin for starts that change the base again whenever such an adapter is added."""


def apply(
    run: RunConfig, inputs: Inputs, model: Any, *, keep_dtype: bool = False, new_ids: Sequence[int] = ()
) -> Applied:
    """Load the adapter with its weights trainable.

    Errors: NotFoundError AdapterUnreadable (class Model); ConfigError AdapterNotContinuable, AdapterOfAnotherBase,
    NewTokensNotTrained.
    """
    source = redact_source((run.spec.method.adapter.source if run.spec.method.adapter else None) or "")
    base = redact_source(run.spec.model.source or "")
    folder = inputs.adapter
    assert folder is not None, "the supervisor fetches method.adapter.source"
    config = _config(folder, source)
    _require_continuable(config, run, source)
    trained = config.get("trainable_token_indices") or {}  # PEFT takes a bare list, too: rows of the embeddings
    rows = list(trained.values()) if isinstance(trained, dict) else [trained]
    if any(set(new_ids) - set(ids) for ids in rows) or (new_ids and not trained):
        raise ConfigError(
            "NewTokensNotTrained", f"{source} trains no rows for model.newTokens, and an adapter that exists gets no new ones",
            hint="remove newTokens, give the ones that the adapter was made with, or write method lora",
        )  # fmt: skip
    weights = _weights(folder, source)
    try:
        wrapped = _loaded(model, folder, weights, f"{source} does not fit {base}", keep_dtype)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).strip().split("\n")]
        told = next((line for line in lines if "size mismatch" in line), lines[0])[:200]
        raise ConfigError(
            "AdapterOfAnotherBase", f"{source} does not fit {base}: {told}",
            hint="give the base that the adapter was trained on",
        ) from error  # fmt: skip
    show_bias(wrapped)
    return Applied(wrapped, OutputKind.ADAPTER, notes=[f"continues the {config['peft_type']} adapter of {source}"])


def _config(folder: Path, source: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: there is no readable {CONFIG}",
            hint=f"give the folder that holds {CONFIG} and {WEIGHTS[0]}", failure_class=FailureClass.MODEL,
        )  # fmt: skip
    return config


def _require_continuable(config: Mapping[str, Any], run: RunConfig, source: str) -> None:
    """Errors: ConfigError AdapterNotContinuable for kinds that PEFT cannot train on, or not beside a reference."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, bias, init = config.get("peft_type", ""), config.get("bias") or "none", config.get("init_lora_weights")
    if kind in PROMPT_LEARNING or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(
            "AdapterNotContinuable", f"{source} is a {str(kind).lower().replace('_', ' ') or 'nameless'} adapter, which PEFT cannot go on training",
            hint="train a new one, or continue a LoRA or IA3 adapter",
        )  # fmt: skip
    if not keeps_reference_adapter(run.spec):
        return
    why = f"its biases ({bias}) have no second copy" if bias != "none" else ""
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        why = f"its init {init} changes the base again for the second copy"
    if why:
        raise ConfigError(
            "AdapterNotContinuable", f"{run.spec.trainer.type} keeps a second copy of {source} as the reference, and {why}",
            hint="continue it with trainer.type sft, or merge it into the base and write method lora",
        )  # fmt: skip


def _weights(folder: Path, source: str) -> dict[str, Any]:
    """Tensors by their names in the file. Errors: NotFoundError AdapterUnreadable."""
    from peft.utils.save_and_load import load_peft_weights
    from safetensors import SafetensorError

    found = [name for name in WEIGHTS if (folder / name).exists()]
    try:
        weights = load_peft_weights(str(folder), device="cpu") if found else {}
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: {found[0]} cannot be read: {str(error).strip().splitlines()[0][:200]}",
            hint="upload the file again: it is cut short, or something else", failure_class=FailureClass.MODEL,
        ) from error  # fmt: skip
    if not weights:
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: there are no weights beside {CONFIG}",
            hint=f"give the folder that holds {CONFIG} and {WEIGHTS[0]}", failure_class=FailureClass.MODEL,
        )  # fmt: skip
    return dict(weights)


def _loaded(model: Any, folder: Path, weights: Mapping[str, Any], unfit: str, keep_dtype: bool) -> Any:
    """The model with the adapter, trainable. Errors: ConfigError AdapterOfAnotherBase, AdapterNotContinuable; PEFT's own."""
    import torch
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict

    base = dict(model.named_parameters(remove_duplicate=False))
    inside = {name: base[name] for name in map(_plain, weights) if name in base}
    before = {name: parameter.detach().clone() for name, parameter in inside.items()}
    wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=not keep_dtype)
    loaded = set_peft_model_state_dict(wrapped, dict(weights))  # once more, since only this tells what has no place
    absent, strange = _absent(wrapped, set(loaded.missing_keys)), sorted(loaded.unexpected_keys)
    if absent or strange:
        told = [f"{len(absent)} weights are not in its file, first {absent[0]}"] if absent else []
        told += [f"{len(strange)} of its file have no place, first {strange[0]}"] if strange else []
        raise ConfigError(
            "AdapterOfAnotherBase", f"{unfit}: {'; '.join(told)}", hint="give the base that the adapter was trained on, and all of its file"
        )  # fmt: skip
    changed = [
        name for name, one in inside.items() if not one.requires_grad and not torch.equal(one.detach(), before[name])
    ]
    if changed:
        raise ConfigError(
            "AdapterNotContinuable", f"{unfit} as it is: its file holds {', '.join(changed[:4])} with other values, which would be missing beside the result",
            hint="put them into the base, or give the base that has them",
        )  # fmt: skip
    return wrapped


def _absent(wrapped: Any, missing: Set[str]) -> list[str]:
    """Trained parameters of which no name was in the file: one that layers share (VB-LoRA's bank) is there under one of its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in wrapped.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return sorted(several[0] for several in names.values() if missing.issuperset(several))


def _plain(name: str) -> str:
    """A weight's name in the file as the base calls it, if it is one of the base."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
