"""The memory plan of a run, its measured peak, and the advice after its GPU had no memory left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.defaults import resolve_defaults
from finetune_api.memory.ladder import RefusedAllocation
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import MemoryPlan

torch = pytest.importorskip("torch")
from finetune_trainer.channel import Channel  # noqa: E402 - the module needs torch
from finetune_trainer.memory_plan import (  # noqa: E402 - the module needs torch
    MeasuredMemory,
    advise_after_out_of_memory,
    collect_memory_facts,
    describe_refused_allocation,
    plan_memory_of_run,
    plan_work_of_run,
)
from finetune_trainer.train import TrainingSession  # noqa: E402 - the module needs torch
from transformers import AutoConfig  # noqa: E402 - the module needs torch

KNOWN_FACTS = {"attention": "varlen", "longest_tokens": 512, "uses_liger": True, "recomputes": True, "kept_layer_tokens": None}


def make_fake_run(**groups: Any) -> Any:
    spec = {"model": {"source": "org/m"}, "dataset": {"train": "s3://d/t.jsonl"}, "resources": {"gpusPerNode": 1}, **groups}
    return SimpleNamespace(spec=resolve_defaults(FineTuneJobSpec.model_validate(spec)).spec, defaults=[])


def make_config(model_type: str = "llama") -> Any:
    return AutoConfig.for_model(
        model_type, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000
    )


def plan_from_facts(run: Any, config: Any, **known_facts: Any) -> MemoryPlan | None:
    return plan_memory_of_run(run, config, collect_memory_facts(run, config, **known_facts))


def test_the_plan_knows_which_layers_recompute() -> None:
    # The largest micro-batch has 4 x 512 tokens. Activations of 5 layers fit: 4 layers keep theirs, and one layer at a time is recomputed.
    all_kept, some_kept, none_kept = (
        plan_from_facts(make_fake_run(), make_config(), **(KNOWN_FACTS | {"recomputes": recomputes, "kept_layer_tokens": kept}))
        for recomputes, kept in ((False, None), (True, 5 * 2048), (True, None))
    )
    assert all_kept is not None and some_kept is not None and none_kept is not None
    assert all_kept.parts.activations > some_kept.parts.activations > none_kept.parts.activations
    assert all_kept.parts.weights == some_kept.parts.weights == none_kept.parts.weights


def test_the_plan_uses_the_sizes_in_the_configuration_of_the_model() -> None:
    plan = plan_from_facts(make_fake_run(), make_config("qwen3"), **KNOWN_FACTS)
    assert plan is not None
    layer_parameters = 8 * (3 * 512 * 2048 + 2 * 512 * 8 * 128 + 2 * 512 * 2 * 128 + 2 * 512 + 2 * 128)
    adapter_parameters = 8 * 16 * (2 * (512 + 1024) + 2 * (512 + 256) + 3 * (512 + 2048))
    assert plan.parts.weights == 2 * (layer_parameters + 2 * 1000 * 512 + 512) + 4 * adapter_parameters


def test_the_plan_of_a_dpo_run_has_two_padded_sequences_for_each_row_and_a_reference_model() -> None:
    known_facts = KNOWN_FACTS | {"attention": "sdpa"}
    sft_plan, dpo_plan = (
        plan_from_facts(
            make_fake_run(trainer={"type": objective}, method={"type": "full"}, training={"batchSizePerDevice": rows}), make_config(), **known_facts
        )
        for objective, rows in (("sft", 8), ("dpo", 4))
    )
    assert sft_plan is not None and dpo_plan is not None
    assert dpo_plan.parts.weights == 2 * sft_plan.parts.weights
    assert dpo_plan.parts.buffers == sft_plan.parts.buffers


def test_a_kind_of_run_that_the_plan_does_not_know_has_no_plan() -> None:
    assert plan_from_facts(make_fake_run(trainer={"type": "grpo"}), make_config(), **KNOWN_FACTS) is None
    assert plan_from_facts(make_fake_run(), AutoConfig.for_model("gpt2"), **KNOWN_FACTS) is None


def test_the_work_of_a_run_follows_from_its_counts_of_rows_and_tokens() -> None:
    counts = {"rows": {"train": 160}, "tokens": {"train": {"tokens": 16_000}}}
    work = plan_work_of_run(make_fake_run(), make_config(), counts, None)
    assert work is not None and (work.steps, work.tokens) == (3 * 160 // 16, 3 * 16_000)
    assert plan_work_of_run(make_fake_run(), make_config(), {"rows": {"train": 160}}, None) is None
    assert plan_work_of_run(make_fake_run(), AutoConfig.for_model("gpt2"), counts, None) is None


@pytest.mark.parametrize(("local_rank", "reported_bytes"), [(0, [75, 80]), (1, [])], ids=["local rank 0", "another rank"])
def test_the_measured_peak_contains_memory_outside_torch_and_is_reported_when_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: int, reported_bytes: list[int]
) -> None:
    free, reserved_peaks = iter([30, 30, 32, 30]), iter([65, 65, 66, 70])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(reserved_peaks))
    channel = Channel.create_recording(tmp_path, local_rank=local_rank)
    callback = MeasuredMemory(channel, torch.device("cuda", 0))
    for _ in range(4):
        callback.on_log(None, None, None)
    assert [message["value"]["measured"]["memoryBytes"] for message in channel.sent] == reported_bytes


@pytest.mark.parametrize(
    ("message", "requested_bytes"),
    [
        ("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB", 3 * 2**29),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * 2**20), ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("CUDA error: out of memory", 0),
    ],
)  # fmt: skip
def test_the_needed_memory_contains_the_refused_request_but_not_other_programs(monkeypatch: pytest.MonkeyPatch, message: str, requested_bytes: int) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * gib, 80 * gib))  # 79 GiB are in use, 29 of them by another program
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 50 * gib - 500 * 2**20)
    refused_allocation = describe_refused_allocation(torch.OutOfMemoryError(message), torch.device("cuda", 0))
    assert refused_allocation == RefusedAllocation(needed_bytes=50 * gib + requested_bytes, available_bytes=51 * gib)


def test_advice_follows_from_the_facts_of_the_run() -> None:
    run, config = make_fake_run(), make_config()
    facts = collect_memory_facts(run, config, **(KNOWN_FACTS | {"recomputes": False}))
    plan = plan_memory_of_run(run, config, facts)
    assert plan is not None
    advice = advise_after_out_of_memory(run, config, facts, RefusedAllocation(plan.expected_bytes + 2, plan.expected_bytes + 1))
    # All layers kept their activations. The same micro-batch fits if the layers recompute their activations.
    assert (advice.planned_bytes, advice.batch_size_per_device, advice.gradient_checkpointing, advice.fits) == (plan.expected_bytes, 4, "enabled", True)


def test_advice_enables_recomputation_only_if_the_user_did_not_disable_it() -> None:
    run, config = make_fake_run(training={"batchSizePerDevice": 4, "gradientCheckpointing": "disabled"}), make_config()
    facts = collect_memory_facts(run, config, **(KNOWN_FACTS | {"recomputes": False}))
    plan = plan_memory_of_run(run, config, facts)
    assert plan is not None
    refused_allocation = RefusedAllocation(plan.expected_bytes + 2, plan.expected_bytes + 1)
    advice_by_origin = [
        advise_after_out_of_memory(SimpleNamespace(spec=run.spec, defaults=defaults), config, facts, refused_allocation)
        for defaults in ([], ["training.gradientCheckpointing"])
    ]
    assert [(advice.batch_size_per_device, advice.gradient_checkpointing) for advice in advice_by_origin] == [(2, None), (4, "enabled")]


def make_failed_session(monkeypatch: pytest.MonkeyPatch, channel: Channel, *, device: str = "cuda", is_training: bool = True, trainer_type: str = "sft") -> Any:
    """Return a training session whose GPU has no memory left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 70 * 2**30)
    session = object.__new__(TrainingSession)
    run, config = make_fake_run(trainer={"type": trainer_type}), make_config()
    session.run, session.config, session.channel = run, config, channel
    session.memory_facts = collect_memory_facts(run, config, **(KNOWN_FACTS | {"recomputes": False}))
    session.hardware = SimpleNamespace(device=torch.device(device))
    session.trainer = SimpleNamespace(model=SimpleNamespace(training=is_training))
    return session


@pytest.mark.parametrize(
    ("case", "messages"),
    [({}, ["outOfMemory"]), ({"is_training": False}, []), ({"device": "cpu"}, []), ({"trainer_type": "dpo"}, ["outOfMemory"]), ({"trainer_type": "grpo"}, [])],
    ids=["training", "evaluation", "without a GPU", "dpo", "an objective without a plan"],
)
def test_only_a_planned_optimizer_step_on_a_gpu_sends_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], messages: list[str]
) -> None:
    channel = Channel.create_recording(tmp_path)
    session = make_failed_session(monkeypatch, channel, **case)
    with pytest.raises(torch.OutOfMemoryError), session._advice_after_out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert [message["kind"] for message in channel.sent] == messages
    if messages:
        assert channel.sent[0]["value"]["neededBytes"] == 72 * 2**30 + 500 * 2**20
