"""Written by benchmarks/recalibrate.py from benchmarks/calibration_runs.jsonl. Do not edit it by hand.

Each entry: number of runs; median, lowest and highest of measured / planned. No run was recorded yet.
"""

from __future__ import annotations

TIME: dict[tuple[str, bool], tuple[int, float, float, float]] = {}
"""Seconds of the optimizer steps, by type of GPU and whether the run had several GPUs."""
MEMORY: dict[tuple[str, bool], tuple[int, float, float, float]] = {}
"""Peak of memory of the first rank's GPU, by type of GPU and whether the run had several GPUs."""
