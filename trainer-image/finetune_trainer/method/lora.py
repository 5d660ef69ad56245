"""Low-rank adapters (LoRA, QLoRA, DoRA and their variants) and IA3, on plain and on quantised bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.rules import INITS_CHANGING_BASE
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, OutputKind

from finetune_trainer import vocabulary
from finetune_trainer.inputs import Inputs
from finetune_trainer.method.base import Applied

ALL_LINEAR = "all-linear"
NAME = "default"
"""PEFT's name for the adapter that is trained."""
HEADS = ("lm_head", "embed_out", "output", "score")
INIT = {
    LoraInit.DEFAULT: True, LoraInit.GAUSSIAN: "gaussian", LoraInit.PISSA: "pissa", LoraInit.OLORA: "olora", LoraInit.EVA: "eva",
    LoraInit.LOFTQ: True,
}  # fmt: skip


def apply(
    run: RunConfig, inputs: Inputs, model: Any, *, keep_dtype: bool = False, new_ids: Sequence[int] = ()
) -> Applied:
    """Put adapters on the asked linear layers and freeze the rest, but for the rows of new tokens.

    PiSSA and OLoRA move a part of the base into the adapter. Their start is kept, so that the final adapter can be written as
    a difference to the untouched base (of twice the rank).
    Errors: ConfigError TargetModulesMissing, LoraOnHead, NewTokensTwice, InitUnavailable.
    """
    from peft import get_peft_model

    init = run.spec.method.lora.init if run.spec.method.lora else None
    config = lora_config(run, model, new_ids)
    if init in INITS_CHANGING_BASE and getattr(model, "is_quantized", False):
        raise ConfigError(
            "InitUnavailable", f"method.lora.init {init} takes a part of the base away, and the model is stored quantised",
            hint="give the unquantised model, or leave init out",
        )  # fmt: skip
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype)
    if new_ids:
        # PEFT compares the vocabulary with that of the base it finds by this name, and would save all rows with each adapter.
        config.base_model_name_or_path = ""
        show_bias(wrapped)
    applied = Applied(wrapped, OutputKind.ADAPTER)
    if init in INITS_CHANGING_BASE:
        _require_plain(wrapped, init, config.r)
        applied.initial_adapter = inputs.output_dir.parent / "initial-adapter"
        config.init_lora_weights = True
        wrapped.save_pretrained(applied.initial_adapter)
        config.init_lora_weights = INIT[init]
        applied.notes.append(f"init {init}: the final adapter is written for the untouched base, with twice the rank")
    return applied


def _require_plain(wrapped: Any, init: str, rank: int) -> None:
    """What is published is computed from A and B of linear layers, all of the asked rank: there must be nothing else.

    OLoRA (PEFT 0.21) splits a weight as it lies: one that lies the other way round (inputs first) gets a start that is not its
    own, which shapes do not show where both sides are equal.
    Errors: ConfigError InitUnavailable for embeddings, layers whose weight lies the other way round (OLoRA), and ranks above a
    layer's sides.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in wrapped.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        sides = (layer.in_features, layer.out_features)
        made = [tuple(part[NAME].weight.shape) for part in (layer.lora_A, layer.lora_B) if NAME in part]
        turned = init == LoraInit.OLORA and getattr(layer, "fan_in_fan_out", False)
        if turned or made != [(rank, sides[0]), (sides[1], rank)]:
            kind = type(layer.get_base_layer()).__name__
            raise ConfigError(
                "InitUnavailable", f"method.lora.init {init} cannot start an adapter of rank {rank} on {name}, a {kind} of {sides[0]} x {sides[1]}",
                hint="name linear layers in method.lora.targetModules, write a rank that is no higher than their sides, or leave init out",
            )  # fmt: skip


def lora_config(run: RunConfig, model: Any, new_ids: Sequence[int] = ()) -> Any:
    """PEFT's configuration from `method.lora`."""
    from peft import EvaConfig, LoraConfig

    spec = run.spec.method.lora
    assert spec is not None, "the resolver fills method.lora for this method"
    dora = spec.use_dora is True or run.spec.method.type is MethodType.DORA
    bias = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}[spec.bias or LoraBias.NONE]
    return LoraConfig(
        task_type=task_of(model),
        r=spec.rank or 16,
        lora_alpha=32 if spec.alpha is None else spec.alpha,
        lora_dropout=0.05 if spec.dropout is None else spec.dropout,
        target_modules=targets(model, spec.target_modules),
        modules_to_save=saved_modules(model, spec.modules_to_save),
        bias=bias,
        use_rslora=spec.rank_stabilized is True,
        use_dora=dora,
        init_lora_weights=INIT[spec.init or LoraInit.DEFAULT],
        trainable_token_indices=token_rows(run, model, new_ids),
        eva_config=EvaConfig(rho=1.0) if spec.init is LoraInit.EVA else None,
    )


def token_rows(run: RunConfig, model: Any, new_ids: Sequence[int]) -> dict[str, list[int]] | None:
    """Rows of the embeddings and of the head that are trained, by module; None: none are.

    Modules that are trained in full have them anyway. Errors: ConfigError NewTokensTwice.
    """
    spec = run.spec.method.lora
    if not new_ids or spec is None:
        return None
    ends = vocabulary.names(model)
    twice = [name for name in spec.target_modules or () if name.rsplit(".", 1)[-1] in ends]
    if twice:
        raise ConfigError(
            "NewTokensTwice", f"method.lora.targetModules names {twice[0]}, and model.newTokens trains rows of it",
            hint=f"remove one of the two, or put {twice[0]} into method.lora.modulesToSave to train it in full",
        )  # fmt: skip
    return {name: list(new_ids) for name in ends if name not in (spec.modules_to_save or ())} or None


def show_bias(model: Any) -> None:
    """Let a head with trained rows be asked for its bias, as the loss does: PEFT's wrapper (0.21) shows the weight only."""
    head = model.get_base_model().get_output_embeddings()
    if type(head).__name__ == "TrainableTokensWrapper":
        head.bias = head.original_module.bias


def task_of(model: Any) -> Any:
    """PEFT's word for what the model does: with a score for a sequence, its head is trained and saved with the adapter."""
    from peft import TaskType

    return TaskType.SEQ_CLS if "SequenceClassification" in type(model).__name__ else TaskType.CAUSAL_LM


def starts_with(run: RunConfig, init: LoraInit) -> bool:
    """Whether adapters start in that way."""
    lora = run.spec.method.lora
    return lora is not None and lora.init is init


def start_eva(trainer: Any) -> None:
    """Start A with the principal directions of what each layer is given, over the first batches of the training data.

    The init word alone leaves A random, without an error; this call is what makes EVA. Every layer keeps the asked rank
    (rho 1). Errors: ConfigError InitUnavailable for packed rows, in which padding cannot be told, for ranks above what a layer or
    a batch has, and where nothing settles.
    """
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer

    if getattr(trainer.args, "packing", False):
        raise ConfigError(
            "InitUnavailable", "method.lora.init eva looks at rows one by one, and dataset.packing joins them",
            hint="leave packing out, or write another init",
        )  # fmt: skip
    model, place = trainer.model, next(trainer.model.parameters()).device
    rank, least = model.peft_config[NAME].r, min(x.in_features for x in model.modules() if isinstance(x, LoraLayer))
    if rank > least:
        raise ConfigError(
            "InitUnavailable", f"method.lora.init eva looks for {rank} directions (method.lora.rank), and a layer is given {least} numbers",
            hint=f"write a rank of at most {least}, or another init",
        )  # fmt: skip
    if place != trainer.args.device:  # sharded models come to the GPU when training begins
        model.to(trainer.args.device)
    initialize_lora_eva_weights(
        model, dataloader=_Inputs(trainer, rank), show_progress_bar=False,
        gather_distributed_inputs=trainer.accelerator.num_processes > 1,
    )  # fmt: skip
    if place != trainer.args.device:
        model.to(place)


EVA_BATCHES = 2000
"""Batches of all ranks after which directions that have not settled are given up: they settle within some hundreds."""


class _Inputs:
    """Batches of the training data, in order, without their labels, over and over: PEFT looks until nothing changes any more.

    It passes over batches with fewer tokens than the rank without a word, and would look for ever if all are.
    Errors: ConfigError InitUnavailable.
    """

    def __init__(self, trainer: Any, rank: int):
        self._trainer, self._rank = trainer, rank

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = most = 0
        while True:
            for batch in self._trainer.get_train_dataloader():
                found = {name: batch[name].to(self._trainer.args.device) for name in ("input_ids", "attention_mask")}
                most = max(most, int(self._trainer.accelerator.reduce(found["attention_mask"].sum(), reduction="sum")))
                seen += 1
                if seen > EVA_BATCHES:
                    break
                yield found
            if most < self._rank:
                raise ConfigError(
                    "InitUnavailable",
                    f"method.lora.init eva looks for {self._rank} directions (method.lora.rank) in batches of which none has more than {most} tokens",
                    hint="lower the rank, raise training.batchSizePerDevice, or write another init",
                )
            if seen > EVA_BATCHES:
                raise ConfigError(
                    "InitUnavailable", f"method.lora.init eva has found no {self._rank} directions that stay the same in {EVA_BATCHES} batches",
                    hint="lower method.lora.rank, raise training.batchSizePerDevice, or write another init",
                )  # fmt: skip

    def __len__(self) -> int:
        return len(self._trainer.get_train_dataloader())


def targets(model: Any, asked: Sequence[str] | None) -> str | list[str]:
    """Target modules as PEFT wants them: every name must be there. Errors: ConfigError TargetModulesMissing, LoraOnHead."""
    if not asked or list(asked) == [ALL_LINEAR]:
        return ALL_LINEAR
    heads = [name for name in asked if name.rsplit(".", 1)[-1] in HEADS and _is_head(model, name)]
    if heads:
        raise ConfigError(
            "LoraOnHead", f"method.lora.targetModules names the head {heads[0]}: the loss reads its weight directly, so an adapter there never learns",
            hint=f"put {heads[0]} into method.lora.modulesToSave to train it in full",
        )  # fmt: skip
    _require(model, asked, "method.lora.targetModules", linear_names(model))
    return list(asked)


def saved_modules(model: Any, asked: Sequence[str] | None) -> list[str] | None:
    """Modules trained in full beside the adapter: every name must be there. Errors: ConfigError TargetModulesMissing."""
    if not asked:
        return None
    last = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    _require(model, asked, "method.lora.modulesToSave", [name for name in last if not name.isdigit()])
    return list(asked)


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of linear layers, 4- and 8-bit ones included."""
    kinds = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1D")
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module).__name__ in kinds})


def _require(model: Any, asked: Sequence[str], path: str, there: Sequence[str]) -> None:
    every = [name for name, _ in model.named_modules()]
    absent = [one for one in asked if not any(name == one or name.endswith("." + one) for name in every)]
    if absent:
        raise ConfigError(
            "TargetModulesMissing", f"{path} names {', '.join(absent)}, which the model does not have",
            hint=f"it has {', '.join(there)}; or leave the field out",
        )  # fmt: skip


def _is_head(model: Any, name: str) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and any(
        module is head for full, module in model.named_modules() if full == name or full.endswith("." + name)
    )


def apply_ia3(run: RunConfig, model: Any) -> Applied:
    """Learned scales on keys, values and the MLP's inner activations."""
    from peft import IA3Config, get_peft_model

    names = linear_names(model)
    inner = [name for name in ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2") if name in names][:1]
    attention = [name for name in ("k_proj", "v_proj", "query_key_value", "c_attn") if name in names]
    if not inner or not attention:
        raise ConfigError(
            "TargetModulesMissing", f"ia3 finds no key, value and MLP layers by name; the model has {', '.join(names)}",
            hint="write method lora, which finds its layers by type",
        )  # fmt: skip
    config = IA3Config(task_type=task_of(model), target_modules=[*attention, *inner], feedforward_modules=inner)
    return Applied(get_peft_model(model, config), OutputKind.ADAPTER)
