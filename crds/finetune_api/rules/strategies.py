"""Rules for the number of ranks, and for options that a distributed strategy does not support."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    INITS_CHANGING_BASE,
    INITS_NEEDING_WHOLE_WEIGHTS,
    OUTPUT_HEADS,
    PROMPT_METHODS,
    base_bits,
    gpus_per_node,
    is_vision_language,
    method_type_of,
    trainer_type_of,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    AttentionImplementation,
    Device,
    FsdpStateDict,
    MethodType,
    StrategyType,
    TrainerBackend,
    TrainerType,
)


@rule("RanksAndGpus")
def check_ranks_and_gpus(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    gpu_count, rank_count = gpus_per_node(spec), spec.resources.processes_per_node
    if target is ExecutionTarget.CLUSTER and gpu_count > 0 and rank_count not in (None, gpu_count):
        yield (
            "resources.processesPerNode",
            f"{rank_count}, but resources.gpusPerNode is {gpu_count}: each GPU needs exactly one rank",
            f"write {gpu_count}, or remove processesPerNode",
        )


@rule("StrategyAndRanks")
def check_strategy_and_ranks(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    strategy, rank_count = spec.distributed.strategy, world_size(spec)
    if strategy is StrategyType.NONE and rank_count > 1:
        yield (
            "distributed.strategy",
            f"none, but the job has {rank_count} ranks, and each rank would train a separate model",
            "write ddp, fsdp or deepspeed, or remove strategy",
        )
    if strategy is StrategyType.FSDP and rank_count == 1:
        yield (
            "distributed.strategy",
            "fsdp, but the job has only one rank, and FSDP needs several ranks to shard a model",
            "raise resources.gpusPerNode or resources.nodes, or remove strategy",
        )
    if spec.distributed.deepspeed is not None and strategy is not StrategyType.DEEPSPEED:
        yield (
            "distributed.deepspeed",
            f"distributed.deepspeed has no effect, because distributed.strategy is {strategy or 'missing'}",
            "write `strategy: deepspeed`, or remove distributed.deepspeed",
        )
    if spec.distributed.fsdp is not None and strategy is not StrategyType.FSDP:
        yield (
            "distributed.fsdp",
            f"distributed.fsdp has no effect, because distributed.strategy is {strategy or 'missing'}",
            "write `strategy: fsdp`, or remove distributed.fsdp",
        )
    deepspeed = spec.distributed.deepspeed
    if deepspeed is not None and deepspeed.offload_parameters and deepspeed.zero_stage not in (None, 3):
        yield (
            "distributed.deepspeed.offloadParameters",
            f"true, but offloadParameters needs zeroStage 3 and zeroStage is {deepspeed.zero_stage}",
            "write `zeroStage: 3`, or remove offloadParameters",
        )
    if deepspeed is not None and deepspeed.offload_optimizer and deepspeed.zero_stage == 0:
        yield (
            "distributed.deepspeed.offloadOptimizer",
            "true, but DeepSpeed with zeroStage 0 does not manage the optimizer state",
            "write `zeroStage: 1` or more, or remove offloadOptimizer",
        )


def find_fsdp_conflicts(spec: FineTuneJobSpec) -> Findings:
    """Yield a problem for each option that FSDP does not support."""
    method, bits = method_type_of(spec), base_bits(spec)
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"method {method} uses virtual tokens outside the layers that FSDP gathers",
            "write `distributed: {strategy: ddp}`; this method trains so few parameters that sharding saves no memory",
        )
    if method is MethodType.SPECTRUM and bits:
        yield (
            "model.quantization.bits",
            "method spectrum trains unquantised weights in layers with quantised weights, but FSDP needs one data type per layer",
            "write `distributed: {strategy: ddp}`, or remove model.quantization",
        )
    if bits == 8:
        yield (
            "model.quantization.bits",
            "model.quantization.bits is 8, but FSDP cannot shard 8-bit weights",
            "write bits 4, or `distributed: {strategy: ddp}`",
        )
    if spec.method.lora is not None and spec.method.lora.init in INITS_CHANGING_BASE:
        yield (
            "method.lora.init",
            f"method.lora.init {spec.method.lora.init} needs the whole adapter to save the result, but with FSDP each rank has only a shard of it",
            "remove init, or write `distributed: {strategy: ddp}`",
        )
    # The loss uses the weight of the output head without calling the head's `forward`. Therefore FSDP does not sum the gradients of a head in
    # `modulesToSave` over all ranks.
    for name in (spec.method.lora and spec.method.lora.modules_to_save) or []:
        if name.rsplit(".", 1)[-1] in OUTPUT_HEADS and trainer_type_of(spec) is not TrainerType.REWARD:
            yield (
                "method.lora.modulesToSave",
                f"modulesToSave contains the output head {name}, but FSDP would train each shard of the head only on the rows of one rank",
                f"remove {name}, or write `distributed: {{strategy: ddp}}`",
            )
    if spec.training.optimizer not in (None, *OPTIMIZERS_FOR_SHARDED_WEIGHTS):
        yield (
            "training.optimizer",
            f"optimizer {spec.training.optimizer} cannot update weights that FSDP has sharded",
            f"write one of {', '.join(OPTIMIZERS_FOR_SHARDED_WEIGHTS)}, or `distributed: {{strategy: deepspeed}}`",
        )


OPTIMIZERS_FOR_SHARDED_WEIGHTS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that can update weights sharded by FSDP. All these optimizers are part of torch."""


def find_deepspeed_conflicts(spec: FineTuneJobSpec) -> Findings:
    """Yield a problem for each option that DeepSpeed does not support at any ZeRO stage."""
    if spec.training.optimizer == "adagrad":
        yield (
            "training.optimizer",
            "optimizer adagrad creates its state before DeepSpeed has prepared the weights",
            "write adamw_torch_fused",
        )


def find_zero3_conflicts(spec: FineTuneJobSpec) -> Findings:
    """Yield a problem for each option that ZeRO stage 3 does not support, because each rank has only a shard of each weight."""
    method, lora = method_type_of(spec), spec.method.lora
    hint = "write zeroStage 2, or `distributed: {strategy: fsdp}`"
    if base_bits(spec):
        yield (
            "distributed.deepspeed.zeroStage",
            "ZeRO stage 3 cannot shard a quantised base model",
            "write zeroStage 2, or remove model.quantization",
        )
    if method is MethodType.SPECTRUM:
        yield "method.type", "method spectrum needs whole weight matrices, but with ZeRO stage 3 each rank has only a shard of them", hint
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"{method} uses virtual tokens outside the layers that ZeRO stage 3 gathers",
            "write zeroStage 2, or `distributed: {strategy: ddp}`",
        )
    if method is MethodType.IA3 and trainer_type_of(spec) is TrainerType.KTO:
        yield (
            "method.type",
            "ZeRO stage 3 needs a constant order of parameters, but with kto the order of ia3's parameters changes between steps",
            "write zeroStage 2, or method lora",
        )
    if lora is not None and lora.init in INITS_NEEDING_WHOLE_WEIGHTS:
        yield (
            "method.lora.init",
            f"method.lora.init {lora.init} needs whole weight matrices, but with ZeRO stage 3 each rank has only a shard of them",
            hint,
        )


@rule("StrategyAndMethod")
def check_strategy_and_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    deepspeed = spec.distributed.deepspeed
    if spec.distributed.strategy is StrategyType.FSDP:
        yield from find_fsdp_conflicts(spec)
    if spec.distributed.strategy is StrategyType.DEEPSPEED:
        yield from find_deepspeed_conflicts(spec)
    if spec.distributed.strategy is StrategyType.DEEPSPEED and deepspeed is not None and deepspeed.zero_stage == 3:
        yield from find_zero3_conflicts(spec)


@rule("ContextParallel")
def check_context_parallel(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    group_size, rank_count = spec.distributed.context_parallel_size or 1, world_size(spec)
    if group_size == 1:
        return
    path, strategy = "distributed.contextParallelSize", spec.distributed.strategy
    if strategy is not StrategyType.DEEPSPEED:
        yield path, f"{group_size}, but distributed.strategy is {strategy or 'missing'}, and only DeepSpeed can split a sequence over several ranks", "write `strategy: deepspeed`"
    if rank_count == 1:
        yield path, f"{group_size}, but the job has 1 rank", f"write `gpusPerNode: {group_size}` in resources, or remove contextParallelSize"
    elif rank_count % group_size:
        yield path, f"{group_size}, but the job has {rank_count} ranks, which cannot be divided into groups of {group_size}", f"write a divisor of {rank_count}"
    for option, value, hint in _find_context_parallel_conflicts(spec):
        yield option, f"{value} cannot be combined with distributed.contextParallelSize {group_size}", f"{hint}, or remove contextParallelSize"


def _find_context_parallel_conflicts(spec: FineTuneJobSpec) -> Iterator[tuple[str, str, str]]:
    """Yield (path, value, hint) for each option that needs the whole sequence on one rank."""
    trainer, method, attention = trainer_type_of(spec), method_type_of(spec), spec.model.attention
    if trainer is not TrainerType.SFT:
        yield "trainer.type", f"{trainer} (it compares whole answers)", "write sft"
    if spec.dataset.packing:
        yield "dataset.packing", "true (the documents of a packed sequence would attend to each other)", "write `packing: false`"
    if is_vision_language(spec):
        yield "model.modality", "visionLanguage (an image cannot be split)", "train a text model"
    if method in PROMPT_METHODS:
        yield "method.type", f"{method} (its virtual tokens are not part of the sequence that the ranks split)", "write lora"
    if attention not in (None, AttentionImplementation.AUTO, AttentionImplementation.SDPA):
        yield "model.attention", f"{attention}", "write sdpa"


@rule("StateDictUnavailable")
def check_state_dict(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    fsdp = spec.distributed.fsdp
    if fsdp is not None and fsdp.state_dict is FsdpStateDict.LOCAL:
        yield (
            "distributed.fsdp.stateDict",
            "local, but FSDP version 2 does not support local state dicts",
            "write sharded, which also writes one file per rank, or write full",
        )


@rule(
    "BackendAndStrategy",
    cel="!(has(self.trainer) && has(self.trainer.backend) && self.trainer.backend == 'unsloth') || !has(self.distributed) || !has(self.distributed.strategy) || self.distributed.strategy == 'none'",
    message="trainer.backend unsloth supports only a single GPU: remove distributed.strategy, or write backend transformers",
)
def check_backend_and_strategy(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.trainer.backend is not TrainerBackend.UNSLOTH:
        return
    if spec.distributed.strategy not in (None, StrategyType.NONE):
        yield (
            "trainer.backend",
            f"unsloth supports only a single GPU, but distributed.strategy is {spec.distributed.strategy}",
            "write `backend: transformers`, or remove distributed.strategy",
        )
    elif world_size(spec) > 1:
        yield (
            "trainer.backend",
            f"unsloth supports only a single GPU, but spec.resources requests {world_size(spec)} ranks",
            "write `backend: transformers`, or request one GPU",
        )
    elif target is ExecutionTarget.CLUSTER and (spec.training.device is Device.CPU or gpus_per_node(spec) == 0):
        yield "trainer.backend", "unsloth needs a GPU, but the job runs on CPU", "write `backend: transformers`, or request one GPU"
