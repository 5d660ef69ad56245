"""Rules for `trainer.grpo.generation`, which selects the program that generates the completions for grpo."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    PROMPT_METHODS,
    base_bits,
    generation_server,
    given_bits,
    gpus_per_node,
    is_vision_language,
    method_type_of,
    value_or_default,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import MethodType, StrategyType
from finetune_api.spec.trainer import Generation

GENERATION_PATH = "trainer.grpo.generation"
WITHOUT_SERVER_HINT = "write `backend: transformers`"
UNMERGED_METHODS = (*PROMPT_METHODS, MethodType.IA3)
"""Methods whose adapters the trainer cannot merge into the weights that it sends to the vLLM server."""


@rule("GenerationOptionWithoutEffect")
def check_options_without_server(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    generation = spec.trainer.grpo.generation if spec.trainer.grpo else None
    if generation is None or generation_server(spec) is not None:
        return
    for name, info in Generation.model_fields.items():
        if name != "backend" and getattr(generation, name) is not None:
            field = info.alias or name
            yield f"{GENERATION_PATH}.{field}", f"{field} has an effect only with backend vllm", f"write `backend: vllm`, or remove {field}"


@rule("GenerationServerUnsupported")
def check_generation_server(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if generation_server(spec) is None:
        return
    for path, value, reason, hint in _find_unsupported_options(spec, target):
        yield path, f"{value}, but with trainer.grpo.generation.backend vllm {reason}", hint


def _find_unsupported_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Iterator[tuple[str, str, str, str]]:
    """Yield (path, value, reason, hint) of each option that cannot be combined with a vLLM server."""
    method, strategy, bits = method_type_of(spec), spec.distributed.strategy, base_bits(spec)
    if target is ExecutionTarget.LOCAL:
        yield f"{GENERATION_PATH}.backend", "vllm", "only the operator can start the server", WITHOUT_SERVER_HINT
    if (spec.resources.nodes or 1) > 1:
        yield (
            "resources.nodes", str(spec.resources.nodes), "the job must have one node, because server and trainer share a pod",
            f"write `nodes: 1`, or {WITHOUT_SERVER_HINT}",
        )  # fmt: skip
    if strategy in (StrategyType.FSDP, StrategyType.DEEPSPEED):
        yield "distributed.strategy", strategy, "each rank must hold all weights", f"write `strategy: ddp`, or {WITHOUT_SERVER_HINT}"
    if method in UNMERGED_METHODS:
        yield "method.type", method, "the trainer must merge the adapter into the weights that it sends to the server", f"write method lora, or {WITHOUT_SERVER_HINT}"
    if spec.phases.train is False:
        yield f"{GENERATION_PATH}.backend", "vllm", "the job must train, because completions are generated only during training", f"remove {GENERATION_PATH}, or remove `phases.train: false`"
    if bits is not None:
        if method is MethodType.QLORA:
            path, value = "method.type", str(method)
        elif given_bits(spec) is not None:
            path, value = "model.quantization.bits", str(bits)
        else:
            path, value = "method.lora", "LoftQ quantises the base model"
        yield path, value, "the weights must not be quantised", f"write method lora without quantization, or {WITHOUT_SERVER_HINT}"
    if spec.model.new_tokens:
        yield "model.newTokens", f"{len(spec.model.new_tokens)} tokens", "the model must keep the vocabulary of the base model", WITHOUT_SERVER_HINT
    if is_vision_language(spec):
        yield "model.modality", "visionLanguage", "only language models are supported", WITHOUT_SERVER_HINT
    if spec.model.trust_remote_code:
        yield "model.trustRemoteCode", "true", "only model types that vLLM supports without remote code are possible", f"write `trustRemoteCode: false`, or {WITHOUT_SERVER_HINT}"


@rule("GenerationGpus")
def check_generation_gpus(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    server = generation_server(spec)
    if server is None:
        return
    server_gpu_count, trainer_gpu_count = int(value_or_default(server, "gpus")), gpus_per_node(spec)
    if server_gpu_count and not trainer_gpu_count:
        yield f"{GENERATION_PATH}.gpus", f"{server_gpu_count}, but resources.gpusPerNode is 0, so the trainer runs on CPUs", "write `gpus: 0`, or request GPUs for the trainer"
    if trainer_gpu_count and not server_gpu_count:
        yield f"{GENERATION_PATH}.gpus", f"0, but resources.gpusPerNode is {trainer_gpu_count}: the server would be slower than the trainer", "write `gpus: 1` or more"
