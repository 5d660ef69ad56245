"""Measured memory peaks of small training runs of dpo, orpo, kto and reward on a CPU, compared with the memory plan's estimates.

    python benchmarks/memory_peaks_preferences.py --runs 80

Method. The runs alternate between the four objectives. Each run has a random configuration: family (Llama, Qwen2, Qwen3, Gemma, Mixtral), sizes, method
(full, LoRA, QLoRA), optimizer, precision, recomputation, attention, rows, accumulation, and for adapters whether a separate reference model is used.
It trains two steps with this project's Trainer for the objective, on a model with random weights and on random rows. torch's profiler
records each allocation; the peak is measured from the beginning of training on. The estimate uses only the configuration, which follows from the run's
seed. `tests/unit/api/test_memory_plan_preferences.py` computes the estimates of all seeds again.
"""

from __future__ import annotations

import argparse
from typing import Any

import record
from finetune_api.memory.replay import replay
from lib.memory_runs import summarise_errors
from lib.preference_runs import PREFERENCE_OBJECTIVES, PreferenceRun, measure_preference_peak

RECORDED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def measure(seed: int) -> dict[str, Any]:
    """Run the configuration of a seed. Returns the measured and the estimated peak in bytes."""
    run = PreferenceRun.draw(seed)
    measured_bytes = measure_preference_peak(run)
    return {"seed": seed, "objective": run.objective.value, "measuredBytes": measured_bytes, "expectedBytes": replay(run.as_step()).total_bytes}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=80)
    parser.add_argument("--first-seed", type=int, default=2000)
    options = parser.parse_args()
    peaks = []
    for seed in range(options.first_seed, options.first_seed + options.runs):
        peaks.append(measure(seed))
        print(seed, peaks[-1]["objective"], f"{peaks[-1]['expectedBytes'] / peaks[-1]['measuredBytes'] - 1:+.2%}", flush=True)
    errors_by_objective = {
        objective.value: summarise_errors([peak for peak in peaks if peak["objective"] == objective.value])
        for objective in PREFERENCE_OBJECTIVES
        if any(peak["objective"] == objective.value for peak in peaks)
    }
    figures = {**summarise_errors(peaks), "byObjective": errors_by_objective, "peaks": peaks}
    record.write_result("memory_peaks_preferences", figures, method=record.extract_method(__doc__), versions=record.read_package_versions(RECORDED_PACKAGES))


if __name__ == "__main__":
    main()
