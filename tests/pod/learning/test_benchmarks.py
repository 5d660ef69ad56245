"""The benchmarks of the trainer run here with a tiny model, so that they do not break unnoticed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from finetune_api.errors import ConfigError

pytestmark = pytest.mark.pod
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A benchmark imported as a module."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.mark.slow
def test_the_overhead_benchmark_runs() -> None:
    found = benchmark("trainer_overhead").measure(1, 3, hidden=64, layers=2, length=64, batch=2, method="lora")
    assert found["step"]["ratio"] > 0 and found["run"]["ratio"] > 0 and found["stepsEach"] == 3


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
    found = benchmark("gpu_throughput").main(options)
    assert found["ours"]["tokensPerSecond"] > 0 and found["bare"]["tokensPerSecond"] > 0
    assert found["ours"]["mfu"] is None and found["device"] == "cpu"


def test_the_throughput_benchmark_refuses_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        benchmark("gpu_throughput").main(["--shape", "tiny", "--length", "128", "--no-write"])
    assert caught.value.code == "DeviceAbsent"
