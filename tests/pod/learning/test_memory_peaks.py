"""The memory plan predicts the measured memory peak of small training runs."""

from __future__ import annotations

import pytest
from finetune_api.memory.replay import replay

from benchmarks.lib.memory_runs import SmallRun, measure_peak
from benchmarks.lib.preference_runs import PreferenceRun, measure_preference_peak
from tests.support.slices import quick_slice

SEEDS = (1001, 1006, 1007, 1014, 1018, 1030, 1044, 1089)
"""Seeds of short runs of benchmarks/memory_peaks.py. Together they cover all model families, full training, LoRA and QLoRA, three optimizers,
three precisions, and runs with and without recomputation."""
PREFERENCE_SEEDS = (2001, 2003, 2004, 2020, 2034, 2049)
"""Seeds of short runs of benchmarks/memory_peaks_preferences.py. Together they cover dpo, orpo, kto and reward, and the kinds of reference models."""


@pytest.mark.parametrize("seed", quick_slice(SEEDS, (1007, 1014, 1044)))
def test_a_measured_peak_agrees_with_the_plan(seed: int) -> None:
    run = SmallRun.draw(seed)
    assert replay(run.as_step()).total_bytes / measure_peak(run) == pytest.approx(1, abs=0.05), run


@pytest.mark.parametrize("seed", quick_slice(PREFERENCE_SEEDS, (2001,)))
def test_a_measured_peak_of_a_preference_objective_agrees_with_the_plan(seed: int) -> None:
    run = PreferenceRun.draw(seed)
    assert replay(run.as_step()).total_bytes / measure_preference_peak(run) == pytest.approx(1, abs=0.05), run
