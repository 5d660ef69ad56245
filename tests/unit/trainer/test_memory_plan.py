"""The memory plan of a run, and the measured peak beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.defaults import resolve_defaults
from finetune_api.spec import FineTuneJobSpec

torch = pytest.importorskip("torch")
from finetune_trainer.channel import Channel  # noqa: E402 - the module needs torch
from finetune_trainer.memory_plan import MeasuredMemory, plan_run, plan_work_of_run  # noqa: E402 - the module needs torch
from transformers import AutoConfig  # noqa: E402 - the module needs torch

KNOWN = {"attention": "varlen", "longest_tokens": 512, "uses_liger": True, "recomputes": True, "kept_layer_tokens": None}


def run_of(**groups: Any) -> Any:
    spec = {"model": {"source": "org/m"}, "dataset": {"train": "s3://d/t.jsonl"}, "resources": {"gpusPerNode": 1}, **groups}
    return SimpleNamespace(spec=resolve_defaults(FineTuneJobSpec.model_validate(spec)).spec)


def config_of(model_type: str = "llama") -> Any:
    return AutoConfig.for_model(
        model_type, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000
    )


def test_the_plan_knows_which_layers_recompute() -> None:
    # The largest micro-batch has 4 x 512 tokens. Activations of 5 layers fit, and one place is left for the layer that is recomputed.
    all_kept, some_kept, none_kept = (
        plan_run(run_of(), config_of(), **(KNOWN | {"recomputes": recomputes, "kept_layer_tokens": kept}))
        for recomputes, kept in ((False, None), (True, 5 * 2048), (True, None))
    )
    assert all_kept is not None and some_kept is not None and none_kept is not None
    assert all_kept.parts.activations > some_kept.parts.activations > none_kept.parts.activations
    assert all_kept.parts.weights == some_kept.parts.weights == none_kept.parts.weights


def test_the_plan_of_a_configuration_of_transformers_has_its_sizes() -> None:
    plan = plan_run(run_of(), config_of("qwen3"), **KNOWN)
    assert plan is not None
    layers = 8 * (3 * 512 * 2048 + 2 * 512 * 8 * 128 + 2 * 512 * 2 * 128 + 2 * 512 + 2 * 128)
    adapters = 8 * 16 * (2 * (512 + 1024) + 2 * (512 + 256) + 3 * (512 + 2048))
    assert plan.parts.weights == 2 * (layers + 2 * 1000 * 512 + 512) + 4 * adapters


def test_a_run_that_the_plan_does_not_know_has_none() -> None:
    assert plan_run(run_of(trainer={"type": "dpo"}), config_of(), **KNOWN) is None
    assert plan_run(run_of(), AutoConfig.for_model("gpt2"), **KNOWN) is None


def test_the_work_of_a_run_follows_from_its_counts() -> None:
    counts = {"rows": {"train": 160}, "tokens": {"train": {"tokens": 16_000}}}
    work = plan_work_of_run(run_of(), config_of(), counts, None)
    assert work is not None and (work.steps, work.tokens) == (3 * 160 // 16, 3 * 16_000)
    assert plan_work_of_run(run_of(), config_of(), {"rows": {"train": 160}}, None) is None
    assert plan_work_of_run(run_of(), AutoConfig.for_model("gpt2"), counts, None) is None


@pytest.mark.parametrize(("local_rank", "reported"), [(0, [75, 80]), (1, [])], ids=["local rank 0", "another rank"])
def test_the_measured_peak_contains_memory_outside_torch_and_is_reported_when_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: int, reported: list[int]
) -> None:
    free, reserved_peaks = iter([30, 30, 32, 30]), iter([65, 65, 66, 70])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(reserved_peaks))
    channel = Channel.create_recording(tmp_path, local_rank=local_rank)
    callback = MeasuredMemory(channel, torch.device("cuda", 0))
    for _ in range(4):
        callback.on_log(None, None, None)
    assert [message["value"]["measured"]["memoryBytes"] for message in channel.sent] == reported
