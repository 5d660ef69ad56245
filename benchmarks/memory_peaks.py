"""Measured memory peaks of small training runs on a CPU, compared with the memory plan's estimates.

    python benchmarks/memory_peaks.py --runs 100

Method. Each run has a random configuration: family (Llama, Qwen2, Qwen3, Gemma, Mixtral), sizes, method (full, LoRA, QLoRA), optimizer,
precision, recomputation, packing or padding, attention, loss and accumulation. It trains two steps with transformers, PEFT and TRL's loss on
random weights. torch's profiler records each allocation; the peak is measured from the first forward pass on. The estimate uses only the
configuration, which follows from the run's seed. `tests/unit/api/test_memory_plan.py` computes the estimates of all seeds again.
"""

from __future__ import annotations

import argparse
from typing import Any

import record
from finetune_api.memory.replay import replay
from lib.memory_runs import SmallRun, measure_peak, summarise_errors

RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def measure(seed: int) -> dict[str, Any]:
    """Run the configuration of a seed. Returns the measured and the estimated peak in bytes."""
    run = SmallRun.draw(seed)
    measured_bytes = measure_peak(run)
    return {"seed": seed, "measuredBytes": measured_bytes, "expectedBytes": replay(run.as_step()).total_bytes}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=1000)
    options = parser.parse_args()
    peaks = []
    for seed in range(options.first_seed, options.first_seed + options.runs):
        peaks.append(measure(seed))
        print(seed, f"{peaks[-1]['expectedBytes'] / peaks[-1]['measuredBytes'] - 1:+.2%}", flush=True)
    figures = {**summarise_errors(peaks), "peaks": peaks}
    record.write_result("memory_peaks", figures, method=record.extract_method(__doc__), versions=record.read_package_versions(RECORDED_PACKAGES))


if __name__ == "__main__":
    main()
