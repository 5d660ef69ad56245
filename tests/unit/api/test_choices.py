"""Values that the plan chooses for a job, values that it never changes, and jobs that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.defaults import ResolvedSpec, resolve_defaults
from finetune_api.errors import ConfigError
from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape, parse_model_shape
from finetune_api.memory.choices import GPU_TYPES_WITH_PADDING, Decision, choose_values
from finetune_api.memory.description import RunFacts
from finetune_api.pod import GpuPool
from finetune_api.rules import check_spec, effective_batch
from finetune_api.spec import FineTuneJobSpec
from finetune_api.time_plan import DataSize

GIB = 2**30
SMALL_MODEL = parse_model_shape({
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": True, "dtype": "bfloat16",
})  # fmt: skip
POOL, GPUS, STRATEGY = "resources.nodePool", "resources.gpusPerNode", "distributed.strategy"
MICRO, ACCUMULATION, CHECKPOINTING = "training.batchSizePerDevice", "training.gradientAccumulationSteps", "training.gradientCheckpointing"


def resolve(**groups: dict[str, Any]) -> ResolvedSpec:
    """Return the resolved spec of a small job that has these spec groups."""
    spec: dict[str, Any] = {"model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}} | groups
    parsed_spec = FineTuneJobSpec.model_validate(spec)
    assert check_spec(parsed_spec) == []
    return resolve_defaults(parsed_spec)


def make_pool(gibibytes: float | None, name: str = "a", **fields: Any) -> GpuPool:
    """Return a pool whose GPUs have this much memory. If the plan chooses no pool, the job uses pool `a`."""
    return GpuPool(name=name, memory_bytes=None if gibibytes is None else int(gibibytes * GIB), **{"is_current": name == "a", **fields})


def decide(*pools: GpuPool, shape: ModelShape = SMALL_MODEL, longest_row: int | None = None, **groups: dict[str, Any]) -> Decision:
    """Return the plan's decision for a job that may use these pools. `longest_row` is the number of tokens in the longest row."""
    return choose_values(resolve(**groups), shape, pools, RunFacts(longest_tokens=longest_row))


def get_chosen_values(decision: Decision) -> dict[str, Any]:
    return {choice.field: choice.value for choice in decision.choices}


FULL_METHOD = {"method": {"type": "full"}}


@pytest.mark.parametrize(
    ("gibibytes", "groups", "expected"),
    [
        (80, {}, {MICRO: 16, ACCUMULATION: 1, CHECKPOINTING: "disabled"}),
        (10, {}, {MICRO: 8, ACCUMULATION: 2, CHECKPOINTING: "disabled"}),
        (2.5, {}, {MICRO: 1, ACCUMULATION: 16, CHECKPOINTING: "disabled"}),
        (2, {}, {MICRO: 2, ACCUMULATION: 8, CHECKPOINTING: "enabled"}),
        (80, {"training": {"effectiveBatchSize": 24}}, {MICRO: 24, ACCUMULATION: 1, CHECKPOINTING: "disabled"}),
        (80, {"training": {"effectiveBatchSize": 24, "gradientAccumulationSteps": 6}}, {MICRO: 4, CHECKPOINTING: "disabled"}),
        (80, {"training": {"effectiveBatchSize": 24, "batchSizePerDevice": 2}}, {ACCUMULATION: 12, CHECKPOINTING: "disabled"}),
        (80, {"training": {"batchSizePerDevice": 2}}, {ACCUMULATION: 4, CHECKPOINTING: "disabled"}),
        (80, {"training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 3}}, {CHECKPOINTING: "disabled"}),
        (80, {"training": {"gradientCheckpointing": "enabled"}}, {MICRO: 16, ACCUMULATION: 1}),
        (80, {"training": {"checkpointEveryNLayers": 2}}, {MICRO: 16, ACCUMULATION: 1, CHECKPOINTING: "enabled"}),
        (80, {"model": {"source": "org/m", "attention": "sdpa"}}, {MICRO: 4, ACCUMULATION: 4, CHECKPOINTING: "disabled"}),
        (80, {"method": {"type": "prefixTuning"}}, {MICRO: 4, ACCUMULATION: 4, CHECKPOINTING: "disabled"}),
    ],
)
def test_batch_and_recomputation_are_chosen_without_changing_the_effective_batch(gibibytes: float, groups: dict[str, Any], expected: dict[str, Any]) -> None:
    decision = decide(make_pool(gibibytes), resources={"gpusPerNode": 1, "nodePool": "a"}, **groups)
    assert get_chosen_values(decision) == expected
    assert effective_batch(decision.resolved.spec) == effective_batch(resolve(**groups).spec)
    assert decision.plan.fits(int(gibibytes * GIB)) and decision.refusal is None and decision.changes == ()


def test_a_larger_micro_batch_is_chosen_for_short_rows() -> None:
    micro_batches = [get_chosen_values(decide(make_pool(2.2), longest_row=tokens, resources={"gpusPerNode": 1}))[MICRO] for tokens in (2048, 200)]
    assert micro_batches == [1, 8]


@pytest.mark.parametrize(
    ("gibibytes", "gpus_per_node", "groups", "expected"),
    [
        (30, 8, FULL_METHOD, {GPUS: 1, STRATEGY: None}),
        (6, 8, FULL_METHOD, {GPUS: 2, STRATEGY: "fsdp"}),
        (5, 8, FULL_METHOD, {GPUS: 4, STRATEGY: "fsdp"}),
        (5, 8, FULL_METHOD | {"resources": {"gpusPerNode": 4}}, {GPUS: None, STRATEGY: "fsdp"}),
        (30, 8, FULL_METHOD | {"resources": {"gpusPerNode": 4}}, {GPUS: None, STRATEGY: "ddp"}),
        (30, 8, FULL_METHOD | {"resources": {"gpusPerNode": 4}, "distributed": {"strategy": "fsdp"}}, {GPUS: None, STRATEGY: None}),
    ],
)
def test_the_smallest_sufficient_number_of_gpus_is_chosen(gibibytes: float, gpus_per_node: int, groups: dict[str, Any], expected: dict[str, Any]) -> None:
    decision = decide(make_pool(gibibytes, gpus_per_node=gpus_per_node), **groups)
    assert {path: get_chosen_values(decision).get(path) for path in expected} == expected
    assert effective_batch(decision.resolved.spec) == effective_batch(resolve(**groups).spec)


def test_the_number_of_gpus_is_limited_by_the_effective_batch() -> None:
    groups = FULL_METHOD | {"training": {"effectiveBatchSize": 9}}
    decision = decide(make_pool(4.5, gpus_per_node=8), **groups)
    assert (get_chosen_values(decision)[GPUS], get_chosen_values(decision)[MICRO] * get_chosen_values(decision)[ACCUMULATION]) == (3, 3)
    refusing_decision = decide(make_pool(4.5, gpus_per_node=2), **groups)
    assert refusing_decision.refusal is not None and refusing_decision.choices == ()


L4, H100 = ({"gpu_type": name} for name in ("l4-24gb", "h100-80gb"))


@pytest.mark.parametrize(
    ("pools", "groups", "chosen_name", "reason"),
    [
        ((make_pool(24, **L4, price_per_gpu_hour=1), make_pool(80, "b", **H100, price_per_gpu_hour=4)), {}, "b", "the lowest expected cost of 2 pools"),
        ((make_pool(24, **L4, price_per_gpu_hour=1), make_pool(80, "b", **H100, price_per_gpu_hour=40)), {}, "a", "the lowest expected cost of 2 pools"),
        ((make_pool(24, **L4), make_pool(80, "b", **H100)), {}, "a", "the default pool of the platform"),
        ((make_pool(24, **L4, is_current=False), make_pool(80, "b", **H100)), {}, "b", "the least expected GPU time of 2 pools"),
        ((make_pool(1, **L4), make_pool(80, "b", **H100)), {}, "b", "the only one of 2 pools on which the job fits"),
        ((make_pool(24, **L4), make_pool(None, "b", **H100)), {}, "a", "the only pool with a known GPU memory"),
        ((make_pool(24, **L4), make_pool(80, "b", **H100)), {"resources": {"nodePool": "a"}}, None, ""),
    ],
)
def test_a_pool_is_chosen_with_a_reason(pools: tuple[GpuPool, ...], groups: dict[str, Any], chosen_name: str | None, reason: str) -> None:
    chosen_pool = next((choice for choice in decide(*pools, **groups).choices if choice.field == POOL), None)
    assert (chosen_pool.value if chosen_pool else None, chosen_pool.reason[: len(reason)] if chosen_pool else "") == (chosen_name, reason)


def test_a_job_with_a_reference_model_of_unknown_size_is_not_refused() -> None:
    """The plan assumes that the reference model is as large as the trained model, but the reference model may be smaller."""
    trainer = {"type": "dpo"}
    assert decide(make_pool(1), **PAIRS, trainer=trainer).refusal is not None
    assert decide(make_pool(1), **PAIRS, trainer=trainer | {"dpo": {"referenceModel": "org/small"}}).refusal is None


def test_a_job_that_fits_no_pool_is_refused_with_three_changes_that_fit() -> None:
    user_values = {"training": {"batchSizePerDevice": 8, "gradientAccumulationSteps": 2}, "resources": {"nodePool": "a", "gpusPerNode": 1}}
    decision = decide(make_pool(2.2), make_pool(80, "b"), **user_values)
    assert decision.refusal is not None
    assert (decision.refusal.code, int(decision.refusal.exit_code), decision.choices) == ("DoesNotFit", 64, ())
    assert decision.refusal.message == (
        "the job is expected to need at least 3.13 GB on each GPU, but no pool that it may use has so much GPU memory: a (2.36 GB)"
    )
    assert decision.refusal.hint == (
        "write resources.nodePool: b (3.35 GB at most); or training.batchSizePerDevice: 2, training.gradientAccumulationSteps: 8 (1.87 GB at most); or "
        "method.type: qlora, training.batchSizePerDevice: 4, training.gradientAccumulationSteps: 4 (2.01 GB at most)"
    )


def test_a_job_is_not_refused_if_only_the_upper_bound_of_its_peak_does_not_fit() -> None:
    decision = decide(make_pool(1.5), resources={"gpusPerNode": 1, "nodePool": "a"})
    assert decision.refusal is None and get_chosen_values(decision) == {MICRO: 1, ACCUMULATION: 16, CHECKPOINTING: "enabled"}
    assert decision.choices[0].reason == (
        "needs the least memory: the expected 1.52 GB fit into the 1.61 GB of each GPU, but the upper bound of 1.63 GB does not"
    )
    assert [change.values_by_path for change in decision.changes] == [{"method.type": "qlora"}, {"dataset.maxSequenceLength": 1024}]


@pytest.mark.parametrize(
    ("pools", "groups", "code", "message"),
    [
        ((), {}, "GpuMemoryUnknown", "the memory of the GPUs is not known"),
        ((make_pool(None), make_pool(80, "b")), {}, "GpuMemoryUnknown", "the memory of the GPUs of pool a is not known"),
        ((make_pool(1), make_pool(None, "b")), {}, "GpuMemoryUnknown", "the memory of the GPUs of pool b is not known"),
        ((make_pool(80),), {"resources": {"gpusPerNode": 0}}, "ChoicesNotPlanned", "the job uses no GPU"),
        ((make_pool(80),), {"checkpoint": {"resume": "s3://models/checkpoints/step-00000100"}}, "ChoicesNotPlanned", "checkpoint.resume decides"),
        (
            (make_pool(80),), {"distributed": {"strategy": "deepspeed", "deepspeed": {"configRef": {"name": "c", "key": "k"}}}}, "ChoicesNotPlanned",
            "distributed.deepspeed.configRef decides",
        ),
        (
            (make_pool(80),), {"trainer": {"type": "grpo", "rewards": [{"builtin": "regex", "parameters": {"pattern": "a"}}]}}, "ObjectiveNotPlanned",
            "trainer.type is grpo",
        ),
    ],
)  # fmt: skip
def test_the_error_says_why_a_job_has_no_plan(pools: tuple[GpuPool, ...], groups: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        decide(*pools, **groups)
    assert (raised.value.code, raised.value.message[: len(message)]) == (code, message)


PAIRS: dict[str, Any] = {"dataset": {"train": "s3://data/t.jsonl", "format": "preference"}}
KTO: dict[str, Any] = {"trainer": {"type": "kto"}, "dataset": {"train": "s3://data/t.jsonl", "format": "unpairedPreference"}}


@pytest.mark.parametrize(
    ("gibibytes", "groups", "expected"),
    [
        (80, {"trainer": {"type": "dpo"}}, {MICRO: 4, ACCUMULATION: 4, CHECKPOINTING: "disabled"}),
        (5, {"trainer": {"type": "dpo"}}, {MICRO: 1, ACCUMULATION: 16, CHECKPOINTING: "disabled"}),
        (80, KTO, {MICRO: 4, ACCUMULATION: 4, CHECKPOINTING: "disabled"}),
    ],
)  # fmt: skip
def test_values_are_chosen_for_preference_objectives(gibibytes: float, groups: dict[str, Any], expected: dict[str, Any]) -> None:
    """The plan does not choose a larger micro-batch than the default, because it does not know how much padding a larger micro-batch would contain."""
    assert get_chosen_values(decide(make_pool(gibibytes), **PAIRS | groups)) == {POOL: "a", GPUS: 1, **expected}


def test_a_kto_micro_batch_has_at_least_two_rows() -> None:
    decision = decide(make_pool(2), **KTO)
    assert decision.refusal is None and decision.resolved.spec.training.batch_size_per_device == 2


def test_choices_become_defaults_of_the_resolved_spec() -> None:
    spec = FineTuneJobSpec.model_validate({"model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}})
    resolved_spec = resolve_defaults(spec, choices={GPUS: 2, MICRO: 8, ACCUMULATION: 1, POOL: "b", "training.epochs": 5})
    training, resources = resolved_spec.spec.training, resolved_spec.spec.resources
    assert (training.batch_size_per_device, training.gradient_accumulation_steps, training.epochs, resources.node_pool) == (8, 1, 5, "b")
    assert (resources.processes_per_node, resolved_spec.spec.distributed.strategy, resolved_spec.defaults[POOL]) == (2, "ddp", "b")
    assert resolved_spec.spec.evaluation.batch_size_per_device == 4, "the plan does not include the memory of evaluations"
    user_spec = spec.with_values({MICRO: 1})
    kept_spec = resolve_defaults(user_spec, choices={MICRO: 8})
    assert (kept_spec.spec.training.batch_size_per_device, MICRO in kept_spec.defaults, kept_spec.spec.evaluation.batch_size_per_device) == (1, False, 1)


@pytest.mark.parametrize("name", sorted(GPU_TYPES))
def test_the_chosen_micro_batch_fits_on_every_type_of_gpu(name: str) -> None:
    decision = choose_values(
        resolve(), SMALL_MODEL, [GpuPool(name="a", memory_bytes=GPU_TYPES[name].memory_bytes, gpu_type=name)], RunFacts(longest_tokens=900),
        DataSize(5000, 900_000),
    )
    assert decision.plan.fits(GPU_TYPES[name].memory_bytes) and get_chosen_values(decision)[MICRO] == (4 if name in GPU_TYPES_WITH_PADDING else 16)


CONTEXT_PARALLEL: dict[str, Any] = {"distributed": {"strategy": "deepspeed", "contextParallelSize": 2}, "resources": {"gpusPerNode": 4}}


def test_ranks_that_share_each_sequence_count_as_one_in_the_effective_batch() -> None:
    spec = resolve(training={"effectiveBatchSize": 64}, **CONTEXT_PARALLEL).spec
    assert (spec.training.batch_size_per_device, spec.training.gradient_accumulation_steps, effective_batch(spec)) == (4, 8, 64)
    indivisible_spec = FineTuneJobSpec.model_validate({
        "model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}, "training": {"effectiveBatchSize": 3}, **CONTEXT_PARALLEL
    })  # fmt: skip
    assert ["3 is not divisible by 2 groups of 2 ranks" in str(problem) for problem in check_spec(indivisible_spec)] == [True]


def test_a_job_whose_ranks_share_each_sequence_is_not_refused_by_the_plan() -> None:
    """The plan cannot compute the memory that a rank needs for its part of a sequence, so it must not refuse a job that fits only because ranks share each
    sequence.
    """
    with pytest.raises(ConfigError, match="contextParallelSize is 2") as error:
        decide(make_pool(1), **CONTEXT_PARALLEL)
    assert error.value.code == "MethodNotPlanned"


@pytest.mark.parametrize(("gpu_type", "micro_batch"), [("t4-16gb", 4), ("v100-32gb", 4), ("a10-24gb", 16)])
def test_the_micro_batch_is_not_raised_on_gpus_that_need_padded_rows(gpu_type: str, micro_batch: int) -> None:
    assert get_chosen_values(decide(make_pool(14.9, gpu_type=gpu_type), resources={"gpusPerNode": 1}))[MICRO] == micro_batch
