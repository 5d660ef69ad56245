"""A small run of the benchmark that kills again and again: rank, agent, pod or a stop, and the end is the one of an undisturbed run."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pytest

from benchmarks import punisher
from benchmarks.lib.bench_pods import bench

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_run_that_is_punished_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    options = argparse.Namespace(steps=60, every=2, kills=15, pause=0.05)
    ledger = punisher.Ledger()
    with bench(tmp_path) as place:
        while not ledger.done:
            punisher.attempt(place, options, ledger, random.Random(ledger.attempt))
        figures = punisher.figures_of(place, options, ledger)
    assert figures["curveEqual"] and figures["statesCompared"] >= 60
    assert ledger.kills > 5 and sum(ledger.codes.values()) == ledger.attempt
    assert {code.split()[1] for code in ledger.codes} <= {"0", "74", "75", "-9"}, ledger.codes
    assert figures["stepsLost"]["most"] <= 3 * options.every
