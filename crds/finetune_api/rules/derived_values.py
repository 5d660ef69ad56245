"""Computes values from the user's spec and the constant defaults, for rules and for other defaults."""

from __future__ import annotations

import math
from typing import Any

from finetune_api.base import DEFAULT_KEY, Group
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import ConfigMapKeyRef
from finetune_api.spec.enums import (
    EvaluationMetric,
    ExportFormat,
    GateMetric,
    GenerationBackend,
    IntervalStrategy,
    LoraInit,
    MethodType,
    Modality,
    TrainerType,
)
from finetune_api.spec.results import Benchmark
from finetune_api.spec.trainer import Generation


def get_constant_default(group: type[Group], field: str) -> Any:
    """Return the constant default of a field, or None if the field has no constant default."""
    schema_extra = group.model_fields[field].json_schema_extra
    return schema_extra.get(DEFAULT_KEY) if isinstance(schema_extra, dict) else None


def value_or_default(group: Group, field: str) -> Any:
    """Return the user's value of a field, or the field's constant default if the user did not set it."""
    value = getattr(group, field)
    return get_constant_default(type(group), field) if value is None else value


def method_type_of(spec: FineTuneJobSpec) -> MethodType:
    """Return `method.type` or its default."""
    return MethodType(value_or_default(spec.method, "type"))


def trainer_type_of(spec: FineTuneJobSpec) -> TrainerType:
    """Return `trainer.type` (the objective) or its default."""
    return TrainerType(value_or_default(spec.trainer, "type"))


def is_vision_language(spec: FineTuneJobSpec) -> bool:
    """Whether the job trains a model for text and images."""
    return spec.model.modality is Modality.VISION_LANGUAGE


def given_bits(spec: FineTuneJobSpec) -> int | None:
    """Return the user's value of `model.quantization.bits`, or None."""
    return spec.model.quantization.bits if spec.model.quantization else None


def trains_base_weights(spec: FineTuneJobSpec) -> bool:
    """Whether the method trains weights of the base model instead of an adapter or prompt."""
    return method_type_of(spec) in BASE_WEIGHT_METHODS


def base_bits(spec: FineTuneJobSpec) -> int | None:
    """Return the bits per weight of the quantised base model. Some methods imply 4 bits. None: the base model is not quantised."""
    return given_bits(spec) or (4 if method_type_of(spec) is MethodType.QLORA or uses_loftq(spec) else None)


def uses_loftq(spec: FineTuneJobSpec) -> bool:
    """Whether LoftQ initialises the adapter. In `method.lora`, both `init: loftq` and the group `loftq` request LoftQ."""
    lora = spec.method.lora
    return lora is not None and (lora.loftq is not None or lora.init is LoraInit.LOFTQ)


INITS_NEEDING_WHOLE_WEIGHTS = (LoraInit.PISSA, LoraInit.OLORA, LoraInit.EVA)
"""Adapter initialisations that factorise whole weight matrices or activations."""
INITS_CHANGING_BASE = (LoraInit.PISSA, LoraInit.OLORA)
"""Adapter initialisations that move a part of the base weights into the adapter."""
LORA_METHODS = (MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.ADAPTER)
BASE_WEIGHT_METHODS = (MethodType.FULL, MethodType.SPECTRUM)
"""Methods that train weights of the base model. All other methods train an adapter or a prompt."""
PROMPT_METHODS = (MethodType.PREFIX_TUNING, MethodType.PROMPT_TUNING)
OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection")


def count_ranks_per_node(spec: FineTuneJobSpec) -> int:
    """Return the number of ranks in each pod."""
    return spec.resources.processes_per_node or gpus_per_node(spec) or 1


def gpus_per_node(spec: FineTuneJobSpec) -> int:
    """Return the number of GPUs that the trainer uses in each pod."""
    return int(value_or_default(spec.resources, "gpus_per_node"))


def generation_server(spec: FineTuneJobSpec) -> Generation | None:
    """Return the options of the vLLM server that generates the completions for grpo.

    None: the trainer generates the completions itself, or the objective is not grpo.
    """
    generation = spec.trainer.grpo.generation if spec.trainer.grpo else None
    return generation if generation is not None and generation.backend is GenerationBackend.VLLM else None


def gpus_per_pod(spec: FineTuneJobSpec) -> int:
    """Return the number of GPUs in each training pod: those of the trainer plus those of the vLLM server in the same pod."""
    server = generation_server(spec)
    return gpus_per_node(spec) + (int(value_or_default(server, "gpus")) if server is not None else 0)


def world_size(spec: FineTuneJobSpec) -> int:
    """Return the number of ranks in all pods together."""
    return int(value_or_default(spec.resources, "nodes")) * count_ranks_per_node(spec)


def compute_data_parallel_size(spec: FineTuneJobSpec) -> int:
    """Return how many ranks train on different rows. With context parallelism, the ranks that share a sequence count as one."""
    return max(1, world_size(spec) // (spec.distributed.context_parallel_size or 1))


def min_batch_size_per_device(spec: FineTuneJobSpec) -> int:
    """Return the minimum batch size per device.

    The minimum is 2 for kto, because kto compares the rows of one batch with each other; for all other objectives, it is 1.
    """
    return 2 if trainer_type_of(spec) is TrainerType.KTO else 1


def compute_batch_split(spec: FineTuneJobSpec) -> tuple[int, int]:
    """Return the micro-batch and the accumulation steps. A value that the user did not set is computed from `training.effectiveBatchSize` or from the defaults.

    If the user set only `training.effectiveBatchSize`, the micro-batch is the largest possible one that does not exceed the default of
    `training.batchSizePerDevice`.
    """
    training = spec.training
    micro_batch, accumulation = training.batch_size_per_device, training.gradient_accumulation_steps
    if training.effective_batch_size is None:
        return int(value_or_default(training, "batch_size_per_device")), int(value_or_default(training, "gradient_accumulation_steps"))
    rows_per_rank = max(1, training.effective_batch_size // compute_data_parallel_size(spec))
    if micro_batch is None and accumulation is None:
        default_micro_batch = int(value_or_default(training, "batch_size_per_device"))
        possible_micro_batches = [size for size in divisors(rows_per_rank) if size >= min_batch_size_per_device(spec)] or [rows_per_rank]
        micro_batch = max((size for size in possible_micro_batches if size <= default_micro_batch), default=min(possible_micro_batches))
    micro_batch = micro_batch or max(1, rows_per_rank // (accumulation or 1))
    return micro_batch, accumulation or max(1, rows_per_rank // micro_batch)


def effective_batch(spec: FineTuneJobSpec) -> int:
    """Return the number of rows in one optimizer step on all ranks together. The rows of ranks that share a sequence count once."""
    micro_batch, accumulation = compute_batch_split(spec)
    return micro_batch * accumulation * compute_data_parallel_size(spec)


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, in ascending order."""
    divisors_up_to_root = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*divisors_up_to_root, *(number // divisor for divisor in divisors_up_to_root)})


def has_validation_set(spec: FineTuneJobSpec) -> bool:
    """Whether the spec contains validation data."""
    split = spec.dataset.split
    return spec.dataset.validation is not None or bool(split and split.validation)


def has_test_set(spec: FineTuneJobSpec) -> bool:
    """Whether the spec contains a test set. The trainer uses the test set only after training."""
    split = spec.dataset.split
    return spec.dataset.test is not None or bool(split and split.test)


def evaluates_during_training(spec: FineTuneJobSpec) -> bool:
    """Whether the validation loss is measured during training."""
    if spec.evaluation.strategy is None:
        return has_validation_set(spec)
    return spec.evaluation.strategy is not IntervalStrategy.NO


def writes_predictions(spec: FineTuneJobSpec) -> bool:
    """Whether the trained model answers the questions of the test set after training, and the answers are stored."""
    return spec.phases.infer is True


def metrics_after_training(spec: FineTuneJobSpec) -> list[EvaluationMetric]:
    """Return the metrics that the job computes after training. With `phases.evaluate: false` the list is empty."""
    return [] if spec.phases.evaluate is False else list(spec.evaluation.metrics or [])


def benchmarks_after_training(spec: FineTuneJobSpec) -> list[Benchmark]:
    """Return the benchmarks that the job runs after training. With `phases.evaluate: false` the list is empty."""
    return [] if spec.phases.evaluate is False else list(spec.evaluation.benchmarks or [])
def prompts_to_compare(spec: FineTuneJobSpec) -> ConfigMapKeyRef | None:
    """Return the reference to the prompts that both the base model and the trained model answer after training. None: the spec has no prompts."""
    return spec.evaluation.comparison.prompts_ref if spec.evaluation.comparison else None


def verifies_artefacts(spec: FineTuneJobSpec) -> bool:
    """Whether the stored artefacts are compared with the trained model.

    If `output.verify` is not set, a job that does not train verifies artefacts only if it creates some itself: a merged model or manifests for servers.
    """
    if spec.output.verify is not None:
        return spec.output.verify
    return spec.phases.train is not False or spec.output.merge_adapter is True or bool(spec.output.serving)


def reads_rows_after_training(spec: FineTuneJobSpec) -> bool:
    """Whether a stage after training reads rows of the data: for metrics, predictions, compared answers, or the end tokens of benchmarks."""
    reads_questions = bool(metrics_after_training(spec)) or bool(benchmarks_after_training(spec))
    return reads_questions or writes_predictions(spec) or prompts_to_compare(spec) is not None


def compares_metrics(spec: FineTuneJobSpec) -> bool:
    """Whether the metrics of the base model are also computed: for `evaluation.comparison`, or for a gate with `notWorseThanBase`."""
    has_gate_against_base = any(gate.not_worse_than_base is not None for gate in spec.evaluation.gates or [])
    return bool(metrics_after_training(spec)) and (spec.evaluation.comparison is not None or has_gate_against_base)


def compares_answers(spec: FineTuneJobSpec) -> bool:
    """Whether answers of the base model and the trained model are stored: to the prompts of `promptsRef` or, without `promptsRef`, to the test questions."""
    return prompts_to_compare(spec) is not None or (spec.evaluation.comparison is not None and compares_metrics(spec))


JUDGE_METRICS = (
    EvaluationMetric.FACTUAL_CORRECTNESS, EvaluationMetric.ANSWER_ACCURACY, EvaluationMetric.ANSWER_RELEVANCY, EvaluationMetric.ANSWER_CORRECTNESS,
)  # fmt: skip
"""Metrics that need the judge model."""
JUDGE_EMBEDDING_METRICS = (EvaluationMetric.ANSWER_RELEVANCY, EvaluationMetric.ANSWER_CORRECTNESS)
"""Metrics that need the judge's embedding model."""
FRACTION_METRICS = (
    GateMetric.ACCURACY, GateMetric.F1, GateMetric.PRECISION, GateMetric.RECALL, GateMetric.ROUGE, GateMetric.FACTUAL_CORRECTNESS,
    GateMetric.ANSWER_ACCURACY, GateMetric.ANSWER_RELEVANCY, GateMetric.ANSWER_CORRECTNESS,
)  # fmt: skip
"""Metrics whose values are between 0 and 1."""
LOWER_IS_BETTER_METRICS = (GateMetric.LOSS, GateMetric.PERPLEXITY)
"""Metrics for which a lower value is better."""


def exports_oci(spec: FineTuneJobSpec) -> bool:
    """Whether the job stores the manifest of an OCI artefact next to the model."""
    return ExportFormat.OCI in (spec.output.export or [])


def pushes_to_hub(spec: FineTuneJobSpec) -> bool:
    """Whether the job pushes its final model to a model hub."""
    return spec.output.hub is not None and spec.output.hub.push is True
