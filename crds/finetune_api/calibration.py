"""Correct plans with the values that were measured in earlier runs on the same type of GPU. `benchmarks/recalibrate.py` writes the table of these runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api import calibration_table
from finetune_api.gpus import GPU_TYPES, GpuType
from finetune_api.status import MemoryPlan

MIN_CALIBRATION_RUNS = 3
"""Minimum number of measured runs on a type of GPU; with fewer runs, plans for this type of GPU are not calibrated."""
CalibrationTable = Mapping[tuple[str, bool], tuple[int, float, float, float]]
"""Maps (type of GPU, whether the runs had several GPUs) to (number of runs; median, lowest and highest ratio of measured to planned value)."""


@dataclass(frozen=True)
class Calibration:
    """The ratios of measured to planned value in the runs on one type of GPU: median, lowest and highest ratio."""

    run_count: int
    median_ratio: float
    lowest_ratio: float
    highest_ratio: float

    @property
    def widening_factor(self) -> float:
        """Factor by which bounds are widened. With few runs, the lowest and highest ratios are less reliable, so the factor is larger."""
        return 1 + 1 / self.run_count


def find_calibration(table: CalibrationTable, gpu: GpuType, *, has_several_gpus: bool) -> Calibration | None:
    """Return the calibration for a type of GPU, or None if the table has fewer than MIN_CALIBRATION_RUNS runs on it."""
    gpu_type_name = next((name for name, known_gpu in GPU_TYPES.items() if known_gpu == gpu), "")
    table_row = table.get((gpu_type_name, has_several_gpus))
    return Calibration(*table_row) if table_row is not None and table_row[0] >= MIN_CALIBRATION_RUNS else None


def calibrate_memory(plan: MemoryPlan, gpu: GpuType, *, has_several_gpus: bool, table: CalibrationTable = calibration_table.MEMORY) -> MemoryPlan:
    """Return the plan with an upper bound that is computed from the runs on this type of GPU. The expected peak and its parts do not change.

    The upper bound is at least the expected peak, and at least the expected peak times the highest ratio of these runs. If the table has fewer than
    MIN_CALIBRATION_RUNS runs on this type of GPU, the plan is returned unchanged.
    """
    calibration = find_calibration(table, gpu, has_several_gpus=has_several_gpus)
    if calibration is None:
        return plan
    ratio_spread = calibration.highest_ratio - calibration.lowest_ratio
    upper_bytes = plan.expected_bytes * max(1.0, calibration.highest_ratio + (calibration.widening_factor - 1) * ratio_spread)
    return plan.model_copy(update={"upper_bytes": int(upper_bytes), "calibration_runs": calibration.run_count})
