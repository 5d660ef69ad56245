"""How plans compare with real runs on a type of GPU, from the table that `benchmarks/recalibrate.py` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api import calibration_table
from finetune_api.gpus import GPU_TYPES, GpuType
from finetune_api.status import MemoryPlan

FEWEST_RUNS = 3
"""With fewer runs of a type of GPU, its plans are not calibrated."""
Table = Mapping[tuple[str, bool], tuple[int, float, float, float]]


@dataclass(frozen=True)
class Calibration:
    """Measured value / planned value of the runs on one type of GPU."""

    runs: int
    median: float
    lowest: float
    highest: float

    @property
    def margin(self) -> float:
        """Factor by which the bounds are widened. It is larger for fewer runs, because their lowest and highest ratios are less reliable."""
        return 1 + 1 / self.runs


def find_calibration(table: Table, gpu: GpuType, *, has_several_gpus: bool) -> Calibration | None:
    """Return the calibration for a type of GPU, or None if there are fewer than three runs."""
    name = next((name for name, one in GPU_TYPES.items() if one == gpu), "")
    entry = table.get((name, has_several_gpus))
    return Calibration(*entry) if entry is not None and entry[0] >= FEWEST_RUNS else None


def calibrate_memory(plan: MemoryPlan, gpu: GpuType, *, has_several_gpus: bool, table: Table = calibration_table.MEMORY) -> MemoryPlan:
    """Return a plan whose upper bound follows from the runs on this type of GPU. The expected peak and its parts stay.

    The bound is never below the expected peak, and it covers the highest measured peak.
    """
    known = find_calibration(table, gpu, has_several_gpus=has_several_gpus)
    if known is None:
        return plan
    upper = plan.expected_bytes * max(1.0, known.highest + (known.margin - 1) * (known.highest - known.lowest))
    return plan.model_copy(update={"upper_bytes": int(upper), "calibration_runs": known.runs})
