"""Low-rank adapters (LoRA, QLoRA, DoRA and their variants), on plain and on quantised base models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.rules import INITS_CHANGING_BASE
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, OutputKind

from finetune_trainer import vocabulary
from finetune_trainer.library_internals import expose_head_bias, reinterpreted_lora_targets
from finetune_trainer.method import eva, loftq
from finetune_trainer.method.base import TrainableModel
from finetune_trainer.method.experts import ALL_EXPERTS, expert_parameter_names, layers_without_adapter
from finetune_trainer.method.peft_method import ADAPTER_NAME, PeftMethod, linear_layer_names, peft_task_type
from finetune_trainer.method.precision import leave_conversion_to_autocast
from finetune_trainer.method.vision_parts import PATTERN_WITHOUT_MATCH, TrainedParts
from finetune_trainer.model import load_model

ALL_LINEAR = "all-linear"
"""PEFT's value of `target_modules` for all linear layers except the head."""
HEAD_NAMES = ("lm_head", "embed_out", "output", "score")
PEFT_BIAS = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}
PEFT_INIT = {
    LoraInit.DEFAULT: True, LoraInit.GAUSSIAN: "gaussian", LoraInit.PISSA: "pissa", LoraInit.OLORA: "olora", LoraInit.EVA: "eva",
    LoraInit.LOFTQ: True,
}  # fmt: skip
"""PEFT's `init_lora_weights` for each `method.lora.init`. LoftQ starts with PEFT's default; `after_apply` then replaces the weights."""


class Lora(PeftMethod, types=(MethodType.LORA, MethodType.QLORA, MethodType.DORA)):
    """Puts adapters on linear layers. All other weights are frozen, except the embedding rows of new tokens."""

    @property
    def init(self) -> LoraInit:
        """The initialisation of the adapters: `method.lora.init`."""
        lora = self.context.run.spec.method.lora
        return (lora.init if lora else None) or LoraInit.DEFAULT

    def apply(self, model: Any) -> TrainableModel:
        """Wrap the model with PEFT.

        PiSSA and OLoRA move a part of the base weights into the adapter. So the initial adapter is saved: it is needed after training to
        convert the final adapter to an adapter for the unchanged base model. The converted adapter has twice the rank.
        Errors: ConfigError TargetModulesMissing, LoraOnHead, NewTokensTwice, InitUnavailable.
        """
        from peft import get_peft_model

        config = self.peft_config(model)
        notes = self._describe_parts_without_adapter(model)
        self._require_supported_experts(model, config)
        if self.init in INITS_CHANGING_BASE and getattr(model, "is_quantized", False):
            raise ConfigError(
                "InitUnavailable", f"method.lora.init {self.init} subtracts a part of the base weights, but the model is stored quantised",
                hint="give the unquantised model, or remove init",
            )  # fmt: skip
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=not self.keeps_base_dtype)
        if self.context.new_token_ids:
            # If the vocabulary size differs from that of the base model at this path, PEFT saves the complete embeddings with each
            # adapter. New tokens change the vocabulary size, so the path is removed from the adapter's configuration.
            config.base_model_name_or_path = ""
            expose_head_bias(peft_model)
        trainable = TrainableModel(peft_model, OutputKind.ADAPTER, notes=notes)
        if self.init in INITS_CHANGING_BASE:
            require_splittable_layers(peft_model, self.init, config.r)
            trainable.initial_adapter = self.context.inputs.output_dir.parent / "initial-adapter"
            config.init_lora_weights = True
            # All ranks of a pod would write to the same folder. Rank 0 reads it at the end.
            is_writer = int(os.environ.get("LOCAL_RANK", "0")) == 0
            peft_model.save_pretrained(trainable.initial_adapter, is_main_process=is_writer)
            config.init_lora_weights = PEFT_INIT[self.init]
            trainable.notes.append(
                f"init {self.init}: the final adapter is written for the unchanged base model, with twice the rank"
            )
        return trainable

    def after_apply(self, trainable: TrainableModel) -> None:
        """Set dtypes and initial values. For LoftQ, also load the unquantised model and correct the quantisation error."""
        context = self.context
        if self.init is LoraInit.LOFTQ and not context.is_resumed:
            unquantized_model, _ = load_model(
                context.run, context.inputs, context.hardware, model_kind=context.model_kind, quantize=False
            )
            loftq.correct_quantization_error(trainable.model, unquantized_model)
            trainable.notes.append("init loftq: the adapter corrects the 4-bit quantisation error of this base model")
        super().after_apply(trainable)
        if (context.hardware.computes_in_bf16 or context.hardware.computes_in_fp16) and context.strategy.uses_autocast:
            leave_conversion_to_autocast(trainable.model)

    def on_trainer_created(self, trainer: Any) -> None:
        """For EVA, compute the initial adapters from training data. After EVA, reset the random seed, because EVA has drawn random numbers."""
        super().on_trainer_created(trainer)
        if self.init is LoraInit.EVA and not self.context.is_resumed:
            from transformers import set_seed

            eva.initialize_from_inputs(trainer)
            set_seed(trainer.args.seed)

    def peft_config(self, model: Any) -> Any:
        """Convert `method.lora` to PEFT's LoraConfig. Errors: ConfigError TargetModulesMissing, LoraOnHead, NewTokensTwice."""
        from peft import EvaConfig, LoraConfig

        method = self.context.run.spec.method
        lora = method.lora
        assert lora is not None, "finetune_api.defaults fills method.lora for these methods"
        targets, parts = target_modules(model, lora.target_modules), TrainedParts.of(self.context.run)
        excluded_pattern = None if parts is None else parts.excluded_names_pattern(model)
        if parts is not None:
            parts.require_targets(model, targets, linear_layer_names(model))
        return LoraConfig(
            task_type=peft_task_type(model),
            r=lora.rank or 16,
            lora_alpha=32 if lora.alpha is None else lora.alpha,
            lora_dropout=lora.dropout or 0.0,
            target_modules=targets,
            exclude_modules=None if excluded_pattern == PATTERN_WITHOUT_MATCH else excluded_pattern,
            target_parameters=target_parameters(model, lora.target_parameters),
            modules_to_save=modules_to_save(model, lora.modules_to_save),
            bias=PEFT_BIAS[lora.bias or LoraBias.NONE],
            use_rslora=lora.rank_stabilized is True,
            use_dora=lora.use_dora is True or method.type is MethodType.DORA,
            init_lora_weights=PEFT_INIT[self.init],
            trainable_token_indices=self.trained_embedding_rows(model),
            eva_config=EvaConfig(rho=1.0) if self.init is LoraInit.EVA else None,
        )

    def _describe_parts_without_adapter(self, model: Any) -> list[str]:
        """Return notes about parts of the model that have no adapter, although a user may expect one."""
        lora, experts, parts = self.context.run.spec.method.lora, expert_parameter_names(model), TrainedParts.of(self.context.run)
        notes = [] if parts is None else parts.describe_frozen_parts(model)
        requested_names = (lora.target_modules if lora else None) or ()
        if experts and not (lora and lora.target_parameters) and not reinterpreted_lora_targets(model).intersection(requested_names):
            notes.append(
                f"the routed experts ({', '.join(experts)}) have no adapter, so their weights do not change; "
                f"to train adapters for them, write `targetParameters: [{ALL_EXPERTS}]` in method.lora"
            )
        if _selects_all_layers(requested_names):
            notes += [f"layers named {', '.join(names)} have no adapter: {reason}" for reason, names in layers_without_adapter(model).items()]
        return notes

    def _require_supported_experts(self, model: Any, config: Any) -> None:
        """Check that the strategy does not shard adapters of experts, and that they have no dropout, which PEFT cannot compute for them.

        Errors: ConfigError ExpertsSharded, DropoutOnExperts.
        """
        if config.target_parameters and self.context.strategy.name in ("fsdp", "deepspeed"):
            raise ConfigError(
                "ExpertsSharded", f"adapters of method.lora.targetParameters are not tested with the strategy {self.context.strategy.name}",
                hint="write `distributed: {strategy: ddp}`, or remove targetParameters",
            )  # fmt: skip
        lora = self.context.run.spec.method.lora
        expert_names = reinterpreted_lora_targets(model).intersection((lora.target_modules if lora else None) or ())
        if lora is not None and lora.dropout and expert_names:
            raise ConfigError(
                "DropoutOnExperts",
                f"method.lora.targetModules names {', '.join(sorted(expert_names))}, the routed experts of this model, "
                "but adapters of experts cannot have dropout",
                hint="write `dropout: 0`, or remove these names",
            )  # fmt: skip

    def trained_embedding_rows(self, model: Any) -> dict[str, list[int]] | None:
        """Return the rows of `model.newTokens` in the embeddings and the head: row indices by module name. None if there are no new tokens.

        Modules in `modulesToSave` are left out, because all their rows are trained anyway. Errors: ConfigError NewTokensTwice.
        """
        lora = self.context.run.spec.method.lora
        if not self.context.new_token_ids or lora is None:
            return None
        embedding_names = vocabulary.embedding_names(model)
        embeddings_selected_twice = [name for name in lora.target_modules or () if name.rsplit(".", 1)[-1] in embedding_names]
        if embeddings_selected_twice:
            raise ConfigError(
                "NewTokensTwice", f"method.lora.targetModules names {embeddings_selected_twice[0]}, but model.newTokens trains rows of this module",
                hint=f"remove targetModules or newTokens, or put {embeddings_selected_twice[0]} into method.lora.modulesToSave to train it in full",
            )  # fmt: skip
        saved_modules = lora.modules_to_save or ()
        return {name: list(self.context.new_token_ids) for name in embedding_names if name not in saved_modules} or None


def require_splittable_layers(model: Any, init: LoraInit, rank: int) -> None:
    """Refuse layers whose PiSSA or OLoRA adapter cannot be converted to an adapter for the unchanged base model.

    The conversion needs adapters of linear layers with the rank of the spec. In PEFT 0.21, OLoRA computes wrong adapters for transposed
    weights (inputs first, as in GPT-2's Conv1D). For square weights, the shapes of the adapter do not show this error, so all transposed weights are refused.
    Errors: ConfigError InitUnavailable for embeddings, transposed weights (OLoRA), and ranks above a dimension of a layer.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        input_count, output_count = layer.in_features, layer.out_features
        shapes = [
            tuple(matrices[ADAPTER_NAME].weight.shape)
            for matrices in (layer.lora_A, layer.lora_B)
            if ADAPTER_NAME in matrices
        ]
        is_transposed = getattr(layer, "fan_in_fan_out", False)
        if (init == LoraInit.OLORA and is_transposed) or shapes != [(rank, input_count), (output_count, rank)]:
            layer_class = type(layer.get_base_layer()).__name__
            raise ConfigError(
                "InitUnavailable",
                f"method.lora.init {init} cannot initialise an adapter of rank {rank} on {name} ({layer_class}, {input_count} x {output_count})",
                hint="name linear layers in method.lora.targetModules, write a rank that is not above their smaller dimension, or remove init",
            )  # fmt: skip


def _selects_all_layers(requested_names: Sequence[str] | None) -> bool:
    return not requested_names or list(requested_names) == [ALL_LINEAR]


def target_modules(model: Any, requested_names: Sequence[str] | None) -> str | list[str]:
    """Return the target modules for PEFT's configuration. Errors: ConfigError TargetModulesMissing for unknown names, LoraOnHead."""
    if _selects_all_layers(requested_names):
        left_out_names = [name for names in layers_without_adapter(model).values() for name in names]
        # With `all-linear`, PEFT would also put adapters on the experts and routers of some model types, so the layers are named instead.
        must_name_layers = left_out_names or expert_parameter_names(model)
        return [name for name in linear_layer_names(model) if name not in (*left_out_names, *HEAD_NAMES)] if must_name_layers else ALL_LINEAR
    head_names = [name for name in requested_names if name.rsplit(".", 1)[-1] in HEAD_NAMES and _is_head(model, name)]
    if head_names:
        raise ConfigError(
            "LoraOnHead", f"method.lora.targetModules names the head {head_names[0]}, but an adapter on the head would never learn, "
            "because the loss bypasses the adapter",
            hint=f"put {head_names[0]} into method.lora.modulesToSave to train it in full",
        )  # fmt: skip
    _require_modules(model, requested_names, "method.lora.targetModules", linear_layer_names(model))
    return list(requested_names)


def target_parameters(model: Any, requested_names: Sequence[str] | None) -> list[str] | None:
    """Return the target parameters for PEFT's configuration. Errors: ConfigError TargetParametersMissing for unknown names."""
    if not requested_names:
        return None
    expert_names = expert_parameter_names(model)
    parameter_names = [name for name, _ in model.named_parameters()]
    absent_names = [
        name for name in requested_names
        if not (expert_names if name == ALL_EXPERTS else any(full_name == name or full_name.endswith("." + name) for full_name in parameter_names))
    ]  # fmt: skip
    if absent_names:
        hint = f"name parameters of the model, such as {', '.join(expert_names)}" if expert_names else "the model has no routed experts"
        raise ConfigError(
            "TargetParametersMissing", f"method.lora.targetParameters names {', '.join(absent_names)}, but the model has no such parameter",
            hint=f"{hint}, or remove the field",
        )  # fmt: skip
    return sorted({parameter for name in requested_names for parameter in (expert_names if name == ALL_EXPERTS else [name])})


def modules_to_save(model: Any, requested_names: Sequence[str] | None) -> list[str] | None:
    """Return the modules to train in full together with the adapter. Errors: ConfigError TargetModulesMissing for unknown names."""
    if not requested_names:
        return None
    last_name_parts = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    available_names = [name for name in last_name_parts if not name.isdigit()]
    _require_modules(model, requested_names, "method.lora.modulesToSave", available_names)
    return list(requested_names)


def _require_modules(model: Any, requested_names: Sequence[str], field: str, available_names: Sequence[str]) -> None:
    """Refuse names in `field` that no module of the model has. Errors: ConfigError TargetModulesMissing with `available_names`."""
    module_names = [name for name, _ in model.named_modules()]
    absent_names = [
        module for module in requested_names if not any(name == module or name.endswith("." + module) for name in module_names)
    ]
    if absent_names:
        raise ConfigError(
            "TargetModulesMissing", f"{field} names {', '.join(absent_names)}, but the model has no such module",
            hint=f"name modules of the model ({', '.join(available_names)}), or remove the field",
        )  # fmt: skip


def _is_head(model: Any, name: str) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and any(
        module is head for full_name, module in model.named_modules() if full_name == name or full_name.endswith("." + name)
    )
