"""The defaults that `resolve_defaults` fills into a spec."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.base import find_nested_group
from finetune_api.defaults import PlatformDefaults, ResolvedSpec, keep_recorded_defaults, resolve_defaults
from finetune_api.rules import LORA_METHODS, check_spec, effective_batch
from finetune_api.rules.derived_values import get_constant_default
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.spec.enums import MethodType
from finetune_api.spec.method import Method

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def resolve_spec(change: dict[str, Any] | None = None, platform: PlatformDefaults | None = None) -> Any:
    return resolve_defaults(FineTuneJobSpec.model_validate(MINIMAL_SPEC | (change or {})), platform_defaults=platform)


def test_the_smallest_job_gets_the_documented_defaults() -> None:
    resolution = resolve_spec()
    spec = resolution.spec
    assert (spec.method.type, spec.method.lora.rank, spec.method.lora.alpha, spec.method.lora.dropout) == (
        "lora",
        16,
        32,
        0,
    )
    assert (spec.training.epochs, spec.training.batch_size_per_device, spec.training.gradient_accumulation_steps) == (
        3,
        4,
        4,
    )
    assert (spec.training.learning_rate, spec.training.scheduler, spec.training.warmup_ratio) == (2e-4, "cosine", 0.03)
    assert (spec.training.gradient_checkpointing, spec.training.seed, spec.dataset.packing) == ("enabled", 42, False)
    assert (spec.checkpoint.strategy, spec.checkpoint.steps, spec.checkpoint.keep, spec.checkpoint.resume) == (
        "steps",
        100,
        3,
        "auto",
    )
    assert (spec.tracking.logging_steps, spec.policy.retries, spec.resources.gpus_per_node) == (10, 3, 1)
    assert resolution.defaults["training.learningRate"] == 2e-4
    assert "model.source" not in resolution.defaults
    assert resolution.notes == []


@pytest.mark.parametrize(
    ("change", "rate"),
    [
        ({"method": {"type": "full"}}, 2e-5),
        ({"method": {"type": "spectrum"}}, 2e-5),
        ({"method": {"type": "qlora"}}, 2e-4),
        ({"trainer": {"type": "dpo"}}, 5e-6),
        ({"trainer": {"type": "orpo"}, "method": {"type": "full"}}, 5e-6),
        ({"trainer": {"type": "grpo"}}, 1e-6),
        ({"training": {"learningRate": 0.5}}, 0.5),
    ],
)
def test_the_learning_rate_depends_on_method_and_objective(change: dict[str, Any], rate: float) -> None:
    assert resolve_spec(change).spec.training.learning_rate == rate


def test_resolving_a_resolved_spec_changes_nothing() -> None:
    first_resolution = resolve_spec({"method": {"type": "qlora"}, "training": {"maxSteps": 40}})
    second_resolution = resolve_defaults(first_resolution.spec)
    assert second_resolution.spec == first_resolution.spec
    assert second_resolution.defaults == {}
    assert check_spec(first_resolution.spec) == []


@pytest.mark.parametrize("method", MethodType)
def test_only_the_options_of_the_jobs_own_method_get_defaults(method: MethodType) -> None:
    """If other methods' groups got defaults, a rule would refuse the spec, and trainers of earlier releases would refuse groups that they do not know."""
    change = {"type": method, **({"adapter": {"source": "org/adapter"}} if method is MethodType.ADAPTER else {})}
    options = resolve_spec({"method": change}).spec.method
    groups = {name for name, info in Method.model_fields.items() if find_nested_group(info.annotation)}
    expected_groups = {"lora"} if method in LORA_METHODS and method is not MethodType.ADAPTER else {method.value} & groups
    assert {name for name in groups if getattr(options, name) is not None} == expected_groups
    for name in expected_groups:
        group = getattr(options, name)
        for field in type(group).model_fields:
            default = get_constant_default(type(group), field)
            assert default is None or getattr(group, field) == default, f"method.{name}.{field}"


def test_spectrum_with_listed_layers_gets_no_defaults_for_measuring_layers() -> None:
    spectrum = resolve_spec({"method": {"type": "spectrum", "spectrum": {"layers": [0]}}}).spec.method.spectrum
    assert (spectrum.layers, spectrum.snr_threshold, spectrum.metric) == ([0], None, None)


def test_a_note_says_that_max_steps_takes_precedence_over_epochs() -> None:
    resolution = resolve_spec({"training": {"maxSteps": 40, "epochs": 2}})
    assert resolution.notes == ["training.epochs 2 has no effect, because training.maxSteps is 40"]


def test_configured_region_and_credentials_are_not_used_for_an_endpoint_of_the_job() -> None:
    configured_storage = StorageRoot(
        uri="s3://models/x", endpoint="https://s3.internal", region="eu", credentials_secret_ref={"name": "s3"}
    )
    platform = PlatformDefaults(storage=configured_storage)
    assert resolve_spec(None, platform).spec.storage == configured_storage
    storage = resolve_spec({"storage": {"endpoint": "https://elsewhere.example.com"}}, platform).spec.storage
    assert storage.to_wire() == {"endpoint": "https://elsewhere.example.com", "uri": "s3://models/x"}


@pytest.mark.parametrize(
    ("change", "expected", "is_default"),
    [
        ({}, None, False),
        ({"trainer": {"backend": "unsloth"}}, True, True),
        ({"trainer": {"backend": "unsloth"}, "model": {"source": "org/name", "ligerKernels": False}}, False, False),
        ({"model": {"source": "org/name", "ligerKernels": True}}, True, False),
    ],
)
def test_liger_kernels_have_a_default_only_with_backend_unsloth(change: dict[str, Any], expected: bool | None, is_default: bool) -> None:
    """If `model.ligerKernels` is absent, trainers of earlier releases read it as false. With backend unsloth, these trainers need the value true, which was
    their default.
    """
    resolution = resolve_spec(change)
    assert (resolution.spec.model.liger_kernels, "model.ligerKernels" in resolution.defaults) == (expected, is_default)


EARLIER_DEFAULTS = {"model.ligerKernels": False, "method.lora.dropout": 0.05}


@pytest.mark.parametrize(
    ("change", "recorded_defaults", "liger_kernels", "dropout"),
    [
        ({}, EARLIER_DEFAULTS, False, 0.05),
        ({}, {}, None, 0),
        ({"model": {"source": "org/name", "ligerKernels": True}}, EARLIER_DEFAULTS, True, 0.05),
        ({"method": {"lora": {"dropout": 0.2}}}, EARLIER_DEFAULTS, False, 0.2),
        ({"trainer": {"backend": "unsloth"}}, EARLIER_DEFAULTS, False, 0.05),
        ({}, {"resources.gpusPerNode": 8, "storage.region": "x", "removed.option": 1}, None, 0),
    ],
    ids=["earlier release", "new job", "user sets the kernels", "user sets the dropout", "backend unsloth", "fields with current defaults"],
)
def test_job_keeps_the_defaults_of_its_first_attempt(
    change: dict[str, Any], recorded_defaults: dict[str, Any], liger_kernels: bool | None, dropout: float
) -> None:
    current_resolution: ResolvedSpec = resolve_spec(change)
    kept_resolution = keep_recorded_defaults(current_resolution, recorded_defaults)
    assert (kept_resolution.spec.model.liger_kernels, kept_resolution.spec.method.lora and kept_resolution.spec.method.lora.dropout) == (liger_kernels, dropout)
    assert kept_resolution.spec.resources == current_resolution.spec.resources
    assert {path: value for path, value in kept_resolution.defaults.items() if path in recorded_defaults} == {
        path: value for path, value in recorded_defaults.items() if path in kept_resolution.defaults and path.partition(".")[0] in ("model", "method")
    } | {path: value for path, value in current_resolution.defaults.items() if path in recorded_defaults and path.startswith("resources.")}


@pytest.mark.parametrize(
    ("training", "resources", "expected"),
    [
        ({"effectiveBatchSize": 24}, {}, (4, 6)),
        ({"effectiveBatchSize": 24}, {"gpusPerNode": 8}, (3, 1)),
        ({"effectiveBatchSize": 26}, {"gpusPerNode": 2}, (1, 13)),
        ({"effectiveBatchSize": 24, "batchSizePerDevice": 8}, {}, (8, 3)),
        ({"effectiveBatchSize": 24, "gradientAccumulationSteps": 2}, {"gpusPerNode": 4}, (3, 2)),
        ({"effectiveBatchSize": 24, "gradientAccumulationSteps": 2, "batchSizePerDevice": 12}, {}, (12, 2)),
        ({"batchSizePerDevice": 8}, {}, (8, 4)),
    ],
)
def test_micro_batch_and_accumulation_are_computed_from_the_effective_batch(
    training: dict[str, Any], resources: dict[str, Any], expected: tuple[int, int]
) -> None:
    resolved_spec = resolve_spec({"training": training, "resources": {"gpusPerNode": 1} | resources})
    training_group = resolved_spec.spec.training
    assert (training_group.batch_size_per_device, training_group.gradient_accumulation_steps) == expected
    assert resolved_spec.spec.evaluation.batch_size_per_device == expected[0]


def test_ranks_that_share_each_sequence_count_as_one_in_the_effective_batch() -> None:
    distributed = {"strategy": "deepspeed", "contextParallelSize": 4}
    resolved_spec = resolve_spec({"training": {"effectiveBatchSize": 24}, "resources": {"gpusPerNode": 8}, "distributed": distributed})
    training = resolved_spec.spec.training
    assert (training.batch_size_per_device, training.gradient_accumulation_steps) == (4, 3), "two groups of four ranks"
    assert effective_batch(resolved_spec.spec) == 24


@pytest.mark.parametrize(
    ("training", "gpus", "text"),
    [
        ({"batchSizePerDevice": 4, "gradientAccumulationSteps": 4}, 1,
         "32, but batchSizePerDevice 4 x gradientAccumulationSteps 4 x 1 rank are 16 rows; "
         "remove effectiveBatchSize, batchSizePerDevice or gradientAccumulationSteps, or write `effectiveBatchSize: 16`"),
        ({"batchSizePerDevice": 6}, 1, "32 is not divisible by batchSizePerDevice 6 x 1 rank = 6; write 30 or 36"),
        ({}, 5, "32 is not divisible by 5 ranks; write 30 or 35"),
        ({}, 64, "32 is not divisible by 64 ranks; write 64"),
        ({"gradientAccumulationSteps": 5}, 2, "32 is not divisible by gradientAccumulationSteps 5 x 2 ranks = 10; write 30 or 40"),
        ({"batchSizePerDevice": 4, "gradientAccumulationSteps": 8}, 1, None),
        ({"effectiveBatchSize": 131074, "batchSizePerDevice": 1}, 1,
         "131074 needs more than 65536 accumulation steps, or more than 65536 rows in a micro-batch; write at most 65536"),
    ],
)  # fmt: skip
def test_an_effective_batch_that_contradicts_other_fields_is_refused(training: dict[str, Any], gpus: int, text: str | None) -> None:
    spec = FineTuneJobSpec.model_validate(
        {"model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}, "training": {"effectiveBatchSize": 32, **training},
         "resources": {"gpusPerNode": gpus}}
    )  # fmt: skip
    assert [str(problem) for problem in check_spec(spec)] == ([] if text is None else [f"spec.training.effectiveBatchSize: {text}"])
