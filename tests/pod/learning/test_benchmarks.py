"""Runs the benchmarks of the trainer with a tiny model, so that a test fails if a benchmark breaks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from finetune_api.errors import ConfigError

pytestmark = pytest.mark.pod
BENCHMARKS_FOLDER = Path(__file__).parents[3] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """Import a benchmark as a module."""
    if str(BENCHMARKS_FOLDER) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS_FOLDER))
    return importlib.import_module(name)


@pytest.mark.slow
def test_the_overhead_benchmark_runs() -> None:
    figures = load_benchmark("trainer_overhead").measure(1, 3, hidden=64, layers=2, length=64, batch=2, method="lora")
    assert figures["step"]["ratio"] > 0 and figures["run"]["ratio"] > 0 and figures["stepsEach"] == 3


@pytest.mark.slow
def test_the_throughput_benchmark_runs_on_a_cpu() -> None:
    options = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--length",
        "128",
        "--batch",
        "1",
        "--steps",
        "2",
        "--rounds",
        "1",
        "--no-write",
    ]
    figures = load_benchmark("gpu_throughput").main(options)
    assert figures["ours"]["tokensPerSecond"] > 0 and figures["bare"]["tokensPerSecond"] > 0
    assert figures["ours"]["mfu"] is None and figures["device"] == "cpu"


def test_the_throughput_benchmark_refuses_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        load_benchmark("gpu_throughput").main(["--shape", "tiny", "--length", "128", "--no-write"])
    assert caught.value.code == "DeviceAbsent"
