"""Continues the training of an existing PEFT adapter on its base model.

If the adapter file lacks a weight, PEFT only warns, and trains a randomly initialised weight instead. So this module checks that
every trained weight comes from the file, and that the model has every weight of the file.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules.methods import keeps_reference_adapter
from finetune_api.sources import redact_source
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.library_internals import continuable_adapter_types, expose_head_bias
from finetune_trainer.method.base import TrainableModel
from finetune_trainer.method.peft_method import PeftMethod

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of those values of `init_lora_weights` for which PEFT changes the base model whenever it adds the adapter."""


class ExistingAdapter(PeftMethod, types=(MethodType.ADAPTER,)):
    """Loads the adapter at `method.adapter.source` and trains its weights."""

    def apply(self, model: Any) -> TrainableModel:
        """Load the adapter, and check that its file fits the model.

        Errors: NotFoundError AdapterUnreadable (class Model); ConfigError AdapterNotContinuable, AdapterOfAnotherBase,
        NewTokensNotTrained.
        """
        run, folder = self.context.run, self.context.inputs.adapter
        source = redact_source((run.spec.method.adapter.source if run.spec.method.adapter else None) or "")
        base_source = redact_source(run.spec.model.source or "")
        assert folder is not None, "the supervisor downloads method.adapter.source"
        config = _read_config(folder, source)
        _require_continuable(config, run, source)
        self._require_new_tokens(config, source)
        weights = _read_weights(folder, source)
        try:
            peft_model = self._load_adapter(model, folder, weights, f"{source} does not fit {base_source}")
        except (RuntimeError, ValueError, KeyError) as error:
            lines = [line.strip() for line in str(error).strip().split("\n")]
            reason = next((line for line in lines if "size mismatch" in line), lines[0])[:200]
            raise ConfigError(
                "AdapterOfAnotherBase", f"{source} does not fit {base_source}: {reason}",
                hint="give the base model of the adapter",
            ) from error  # fmt: skip
        expose_head_bias(peft_model)
        notes = [f"continues the {config['peft_type']} adapter of {source}"]
        return TrainableModel(peft_model, OutputKind.ADAPTER, notes=notes)

    def _require_new_tokens(self, config: Mapping[str, Any], source: str) -> None:
        """Check that the adapter already trains the rows of `model.newTokens`. Errors: ConfigError NewTokensNotTrained."""
        new_token_ids = self.context.new_token_ids
        # `trainable_token_indices` is either one list of rows for the embeddings, or a list of rows for each module name.
        trained_rows = config.get("trainable_token_indices") or {}
        rows_by_module = list(trained_rows.values()) if isinstance(trained_rows, dict) else [trained_rows]
        if any(set(new_token_ids) - set(ids) for ids in rows_by_module) or (new_token_ids and not trained_rows):
            raise ConfigError(
                "NewTokensNotTrained", f"{source} does not train the rows of model.newTokens, and rows cannot be added to an existing adapter",
                hint="remove newTokens, give only tokens that the adapter was trained with, or write method lora",
            )  # fmt: skip

    def _load_adapter(self, model: Any, folder: Path, weights: Mapping[str, Any], error_prefix: str) -> Any:
        """Return the model with the adapter and its trainable weights. Errors: ConfigError AdapterOfAnotherBase, AdapterNotContinuable; errors of PEFT."""
        import torch
        from peft import PeftModel
        from peft.utils.save_and_load import set_peft_model_state_dict

        base_parameters = dict(model.named_parameters(remove_duplicate=False))
        base_weights = {name: base_parameters[name] for name in map(_to_base_name, weights) if name in base_parameters}
        weights_before = {name: parameter.detach().clone() for name, parameter in base_weights.items()}
        peft_model = PeftModel.from_pretrained(
            model, folder, is_trainable=True, autocast_adapter_dtype=not self.keeps_base_dtype
        )
        # The weights are loaded a second time, because only this call returns the missing and unexpected keys.
        saved_weights: Any = set_peft_model_state_dict(peft_model, dict(weights))
        _require_all_keys(
            _list_absent_weights(peft_model, set(saved_weights.missing_keys)), sorted(saved_weights.unexpected_keys), error_prefix
        )
        changed_names = [
            name
            for name, parameter in base_weights.items()
            if not parameter.requires_grad and not torch.equal(parameter.detach(), weights_before[name])
        ]
        if changed_names:
            raise ConfigError(
                "AdapterNotContinuable",
                f"{error_prefix}: the adapter file changes the frozen base weights {', '.join(changed_names[:4])}, "
                "but the resulting adapter would not contain them",
                hint="merge these weights into the base model, or give the base model that already has them",
            )  # fmt: skip
        return peft_model


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: there is no readable {CONFIG_FILE}",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHT_FILES[0]}", failure_class=FailureClass.MODEL,
        )  # fmt: skip
    return config


def _require_continuable(config: Mapping[str, Any], run: RunConfig, source: str) -> None:
    """Check that PEFT can continue training the adapter, and can load a second copy of it if the objective needs one as its reference.

    Errors: ConfigError AdapterNotContinuable.
    """
    peft_type, bias, init_method = config.get("peft_type", ""), config.get("bias") or "none", config.get("init_lora_weights")
    if peft_type in PROMPT_LEARNING or peft_type not in continuable_adapter_types():
        raise ConfigError(
            "AdapterNotContinuable", f"{source} is a {str(peft_type).lower().replace('_', ' ') or 'nameless'} adapter, and PEFT cannot continue its training",
            hint="train a new adapter, or continue a LoRA or IA3 adapter",
        )  # fmt: skip
    if not keeps_reference_adapter(run.spec):
        return
    reason = f"PEFT supports only one copy of trained biases (bias {bias})" if bias != "none" else ""
    if isinstance(init_method, str) and init_method.lower().startswith(BASE_CHANGING_INITS):
        reason = f"the second copy would change the base model again (init {init_method})"
    if reason:
        raise ConfigError(
            "AdapterNotContinuable", f"{run.spec.trainer.type} keeps a second copy of {source} as the reference, but {reason}",
            hint="continue the adapter with trainer.type sft, or merge it into the base model and write method lora",
        )  # fmt: skip


def _read_weights(folder: Path, source: str) -> dict[str, Any]:
    """Return the tensors of the adapter file, by their names in the file. Errors: NotFoundError AdapterUnreadable."""
    from peft.utils.save_and_load import load_peft_weights
    from safetensors import SafetensorError

    existing_files = [name for name in WEIGHT_FILES if (folder / name).exists()]
    try:
        weights = load_peft_weights(str(folder), device="cpu") if existing_files else {}
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: {existing_files[0]} cannot be read: {str(error).strip().splitlines()[0][:200]}",
            hint="the file is truncated or not a weight file: upload it again", failure_class=FailureClass.MODEL,
        ) from error  # fmt: skip
    if not weights:
        raise NotFoundError(
            "AdapterUnreadable", f"method.adapter.source {source}: there are no weights next to {CONFIG_FILE}",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHT_FILES[0]}", failure_class=FailureClass.MODEL,
        )  # fmt: skip
    return dict(weights)


def _require_all_keys(absent_names: list[str], unexpected_names: list[str], error_prefix: str) -> None:
    """Refuse an adapter file that lacks adapter weights of the model, or has other adapter weights. Errors: ConfigError AdapterOfAnotherBase."""
    reasons = [f"{len(absent_names)} weights are not in the adapter file, first {absent_names[0]}"] if absent_names else []
    if unexpected_names:
        reasons.append(f"{len(unexpected_names)} weights of the adapter file are not in the model, first {unexpected_names[0]}")
    if reasons:
        raise ConfigError(
            "AdapterOfAnotherBase", f"{error_prefix}: {'; '.join(reasons)}",
            hint="give the base model of the adapter, and the complete adapter file",
        )  # fmt: skip


def _list_absent_weights(peft_model: Any, missing_names: set[str]) -> list[str]:
    """Return a name of each trained parameter that the adapter file lacks.

    A parameter that layers share, such as VB-LoRA's vector bank, has several names. The adapter file needs to contain only one of these names.
    """
    names_by_parameter: dict[int, list[str]] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names_by_parameter.setdefault(id(parameter), []).append(name)
    return sorted(aliases[0] for aliases in names_by_parameter.values() if missing_names.issuperset(aliases))


def _to_base_name(name: str) -> str:
    """Convert the name of a weight in an adapter file to its name in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
