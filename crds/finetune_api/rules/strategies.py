"""Rules for ranks and distributed strategies, and the options that each strategy does not support."""

from __future__ import annotations

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    INITS_CHANGING_BASE,
    INITS_NEEDING_WHOLE_WEIGHTS,
    OUTPUT_HEADS,
    PROMPT_METHODS,
    base_bits,
    gpus_per_node,
    method_type_of,
    trainer_type_of,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    Backend,
    FsdpStateDict,
    MethodType,
    Strategy,
    TrainerType,
)


@rule("RanksAndGpus")
def ranks_and_gpus(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    gpus, ranks = gpus_per_node(spec), spec.resources.processes_per_node
    if target is ExecutionTarget.CLUSTER and gpus > 0 and ranks not in (None, gpus):
        yield (
            "resources.processesPerNode",
            f"{ranks}, but resources.gpusPerNode is {gpus}: every rank needs its own GPU, and a GPU without a rank stays idle",
            f"write {gpus}, or remove it",
        )


@rule("StrategyAndRanks")
def strategy_and_ranks(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    strategy, ranks = spec.distributed.strategy, world_size(spec)
    if strategy is Strategy.NONE and ranks > 1:
        yield (
            "distributed.strategy",
            f"none, but there are {ranks} ranks, each of which would train its own model",
            "write ddp, fsdp or deepspeed, or remove it",
        )
    if strategy is Strategy.FSDP and ranks == 1:
        yield (
            "distributed.strategy",
            "fsdp, but there is only one rank, so nothing can be sharded",
            "raise resources.gpusPerNode or resources.nodes, or remove it",
        )
    if spec.distributed.deepspeed is not None and strategy is not Strategy.DEEPSPEED:
        yield (
            "distributed.deepspeed",
            f"it is only read with strategy deepspeed, and the strategy is {strategy or 'not given'}",
            "write `strategy: deepspeed`, or remove it",
        )
    if spec.distributed.fsdp is not None and strategy is not Strategy.FSDP:
        yield (
            "distributed.fsdp",
            f"it is only read with strategy fsdp, and the strategy is {strategy or 'not given'}",
            "write `strategy: fsdp`, or remove it",
        )
    deepspeed = spec.distributed.deepspeed
    if deepspeed is not None and deepspeed.offload_parameters and deepspeed.zero_stage not in (None, 3):
        yield (
            "distributed.deepspeed.offloadParameters",
            f"true, but zeroStage is {deepspeed.zero_stage}: only stage 3 shards parameters",
            "write `zeroStage: 3`, or remove it",
        )
    if deepspeed is not None and deepspeed.offload_optimizer and deepspeed.zero_stage == 0:
        yield (
            "distributed.deepspeed.offloadOptimizer",
            "true, but with zeroStage 0 DeepSpeed does not manage the optimizer state",
            "write `zeroStage: 1` or more, or remove it",
        )


def incompatible_with_fsdp(spec: FineTuneJobSpec) -> Findings:
    """Yield the problems that a spec has with FSDP."""
    method, bits = method_type_of(spec), base_bits(spec)
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"method {method} uses its virtual tokens outside the layers that FSDP gathers",
            "write `distributed: {strategy: ddp}`: sharding so few trained parameters saves no memory",
        )
    if method is MethodType.SPECTRUM and bits:
        yield (
            "model.quantization.bits",
            "spectrum trains unquantised weights next to quantised ones, and FSDP needs one data type per layer",
            "write `distributed: {strategy: ddp}`, or remove model.quantization: FSDP shards whole weights, too",
        )
    if bits == 8:
        yield (
            "model.quantization.bits",
            "model.quantization.bits is 8, and 8-bit weights cannot be sharded",
            "write bits 4, or `distributed: {strategy: ddp}`",
        )
    if spec.method.lora is not None and spec.method.lora.init in INITS_CHANGING_BASE:
        yield (
            "method.lora.init",
            f"method.lora.init {spec.method.lora.init} needs whole adapters when the result is saved, and with FSDP each rank holds only a slice",
            "remove it, or write `distributed: {strategy: ddp}`",
        )
    # The loss reads the head's weight without calling the head's forward. With an adapter, FSDP then does not sum the head's gradients
    # over the ranks.
    for name in (spec.method.lora and spec.method.lora.modules_to_save) or []:
        if name.rsplit(".", 1)[-1] in OUTPUT_HEADS and trainer_type_of(spec) is not TrainerType.REWARD:
            yield (
                "method.lora.modulesToSave",
                f"it contains the head {name}: each rank would train its slice of the head only on its own rows",
                "remove it, or write `distributed: {strategy: ddp}`",
            )
    if spec.training.optimizer not in (None, *OPTIMIZERS_FOR_SHARDED_WEIGHTS):
        yield (
            "training.optimizer",
            f"it is {spec.training.optimizer}, which cannot update the weight slices of FSDP",
            f"write one of {', '.join(OPTIMIZERS_FOR_SHARDED_WEIGHTS)}, or `distributed: {{strategy: deepspeed}}`",
        )


OPTIMIZERS_FOR_SHARDED_WEIGHTS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that can update FSDP's weight slices: the optimizers of torch itself."""


def incompatible_with_deepspeed(spec: FineTuneJobSpec) -> Findings:
    """Yield the problems that a spec has with DeepSpeed at any ZeRO stage."""
    if spec.training.optimizer == "adagrad":
        yield (
            "training.optimizer",
            "it is adagrad, which creates its state before DeepSpeed has prepared the weights",
            "write adamw_torch_fused",
        )


def incompatible_with_zero3(spec: FineTuneJobSpec) -> Findings:
    """Yield the problems that a spec has with ZeRO stage 3, where no rank holds whole weights."""
    method, lora = method_type_of(spec), spec.method.lora
    hint = "write zeroStage 2, or use fsdp"
    if base_bits(spec):
        yield (
            "distributed.deepspeed.zeroStage",
            "ZeRO stage 3 cannot shard a quantised base",
            "write zeroStage 2, or remove model.quantization",
        )
    if method is MethodType.SPECTRUM:
        yield "method.type", "spectrum measures whole weight matrices, which no rank holds with ZeRO stage 3", hint
    if method in PROMPT_METHODS:
        yield (
            "method.type",
            f"{method} uses its virtual tokens outside the layers that ZeRO stage 3 gathers",
            "write zeroStage 2, or `distributed: {strategy: ddp}`",
        )
    if method is MethodType.IA3 and trainer_type_of(spec) is TrainerType.KTO:
        yield (
            "method.type",
            "ZeRO stage 3 prefetches parameters in the order of the previous step, and kto uses the parameters of ia3 in a changing order",
            "write zeroStage 2, or method lora",
        )
    if lora is not None and lora.init in INITS_NEEDING_WHOLE_WEIGHTS:
        yield (
            "method.lora.init",
            f"method.lora.init {lora.init} factorises whole weights, which no rank holds with ZeRO stage 3",
            hint,
        )


@rule("StrategyAndMethod")
def strategy_and_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    deepspeed = spec.distributed.deepspeed
    if spec.distributed.strategy is Strategy.FSDP:
        yield from incompatible_with_fsdp(spec)
    if spec.distributed.strategy is Strategy.DEEPSPEED:
        yield from incompatible_with_deepspeed(spec)
    if spec.distributed.strategy is Strategy.DEEPSPEED and deepspeed is not None and deepspeed.zero_stage == 3:
        yield from incompatible_with_zero3(spec)


@rule("StateDictUnavailable")
def state_dict(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    fsdp = spec.distributed.fsdp
    if fsdp is not None and fsdp.state_dict is FsdpStateDict.LOCAL:
        yield (
            "distributed.fsdp.stateDict",
            "it is local, which FSDP version 2 does not support",
            "write sharded, which also stores one file per rank, or full",
        )


@rule(
    "BackendAndStrategy",
    cel="!(has(self.trainer) && has(self.trainer.backend) && self.trainer.backend == 'unsloth') || !has(self.distributed) || !has(self.distributed.strategy) || self.distributed.strategy == 'none'",
    message="trainer.backend unsloth is the single-GPU path: remove distributed.strategy, or write backend transformers",
)
def backend_and_strategy(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.trainer.backend is not Backend.UNSLOTH:
        return
    if spec.distributed.strategy not in (None, Strategy.NONE):
        yield (
            "trainer.backend",
            f"unsloth is the single-GPU path, and distributed.strategy is {spec.distributed.strategy}",
            "write `backend: transformers`, or remove the strategy",
        )
    elif world_size(spec) > 1:
        yield (
            "trainer.backend",
            f"unsloth is the single-GPU path, and resources request {world_size(spec)} ranks",
            "write `backend: transformers`, or request one GPU",
        )
