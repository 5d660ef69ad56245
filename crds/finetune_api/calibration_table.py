"""Written by benchmarks/recalibrate.py from benchmarks/calibration_runs.jsonl. Do not edit it by hand.

Each entry has the number of runs, and the median, lowest and highest ratio of measured to planned value. No run was recorded yet.
"""

from __future__ import annotations

TIME: dict[tuple[str, bool], tuple[int, float, float, float]] = {}
"""Ratios for the time of an optimizer step, by type of GPU and by whether the run had several GPUs."""
MEMORY: dict[tuple[str, bool], tuple[int, float, float, float]] = {}
"""Ratios for the memory peak of the first rank's GPU, by type of GPU and by whether the run had several GPUs."""
