"""Run the benchmarks of the trainer with a tiny model, so that a test fails if a change breaks a benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.pod
BENCHMARKS_FOLDER = Path(__file__).parents[3] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """Import a program of the benchmarks folder as a module."""
    if str(BENCHMARKS_FOLDER) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS_FOLDER))
    return importlib.import_module(name)


@pytest.mark.slow
def test_the_overhead_benchmark_runs() -> None:
    measure_pairs = load_benchmark("trainer_overhead").measure_pairs
    figures = measure_pairs(1, 3, hidden_size=64, layer_count=2, sequence_length=64, batch_size=2, method="lora")
    assert figures["step"]["ratio"] > 0 and figures["run"]["ratio"] > 0 and figures["stepsEach"] == 3


def test_the_host_overhead_benchmark_runs() -> None:
    figures = load_benchmark("host_overhead").measure(1, 2, layer_count=2)
    assert set(figures["overheadMs"]) == {"ours", "libraries"} and figures["modules"] > 100
    assert all(figures[name]["stepMs"] > 0 for name in ("ours", "libraries", "plain"))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["packed", "chat"])
def test_all_arms_of_the_throughput_benchmark_start_with_the_same_loss(data: str, tmp_path: Path) -> None:
    size = ["--shape", "tiny", "--device", "cpu", "--length", "256", "--batch", "2", "--steps", "4", "--warmup-steps", "1"]
    arms = ["--arms", "ours; bare; tuned, sdpa"]
    options = [*size, *arms, "--data", data, "--output", str(tmp_path / "figures.json"), "--no-write"]
    figures = load_benchmark("gpu_throughput").main(options)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    results = figures["arms"]
    assert [arm["error"] for arm in results.values()] == [None, None, None]
    assert all(arm["tokensPerSecond"] > 0 and arm["mfu"] is None for arm in results.values())
    # In the benchmark with chat data, the tuned arms pack the rows, so their batches differ. All other arms train on the same batches.
    comparable_losses = [results[name]["firstLoss"] for name in results if data == "packed" or "tuned" not in name]
    assert comparable_losses == pytest.approx([comparable_losses[0]] * len(comparable_losses), abs=1e-6)


def test_the_throughput_benchmark_refuses_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        load_benchmark("gpu_throughput").main(["--shape", "tiny", "--length", "128", "--no-write"])


@pytest.mark.parametrize(("benchmark", "parser", "text"), [("gpu_throughput", "parse_arms", "ours; our"), ("gpu_cells", "parse_cells", "memory")])
def test_an_unknown_arm_or_cell_is_refused_with_the_known_names(benchmark: str, parser: str, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="there is no .*: write one of .*"):
        getattr(load_benchmark(benchmark), parser)(text)


def make_cell(command: list[str], seconds: float = 60) -> Any:
    """Return a benchmark cell that runs this command for at most `seconds`."""
    return load_benchmark("gpu_cells").Cell("cell", lambda output, is_rehearsal: command, seconds)


def test_a_cell_that_exceeds_its_time_limit_keeps_the_results_that_it_has_written(tmp_path: Path) -> None:
    benchmark = load_benchmark("gpu_cells")
    script = f"import time; open({str(tmp_path / 'cell.json')!r}, 'w').write('{{\"a\": 1}}'); time.sleep(600)"
    result = benchmark.run_cell(make_cell([sys.executable, "-c", script]), tmp_path, 2, is_rehearsal=True)
    assert (result["status"], result["figures"]) == ("out of time", {"a": 1})


@pytest.mark.parametrize(
    ("figures", "has_result"),
    [
        (None, False),
        ({}, False),
        ({"device": "cpu"}, True),
        ({"test_a": {"status": "failed"}}, False),
        ({"test_a": {"status": "failed"}, "test_b": {"status": "passed"}}, True),
        ({"arms": {"ours": {"error": "OutOfMemoryError"}}}, False),
        ({"arms": {"ours": {"error": "OutOfMemoryError"}, "bare": {"error": None}}}, True),
    ],
)
def test_a_cell_has_a_result_if_at_least_one_part_of_it_worked(figures: Any, has_result: bool) -> None:
    assert load_benchmark("gpu_cells").has_result(figures) is has_result


def test_a_later_run_replaces_only_the_results_of_the_cells_that_it_measured(tmp_path: Path) -> None:
    first_file, second_file = tmp_path / "1.json", tmp_path / "2.json"
    first_file.write_text(json.dumps({"cells": {"a": {"status": "passed", "figures": {"x": 1}}, "b": {"status": "failed", "figures": {"x": 1}}}}))
    second_file.write_text(json.dumps({"cells": {"b": {"status": "passed", "figures": {"x": 2}}, "a": {"status": "failed", "figures": None}}}))
    merged_cells = load_benchmark("gpu_cells").merge_results([first_file, second_file])
    assert {name: cell["figures"] for name, cell in merged_cells.items()} == {"a": {"x": 1}, "b": {"x": 2}}
