"""A worker killed at random steps: the next attempt goes on from the newest checkpoint, loses less than an interval, and ends the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import Resume
from storage_place import Connection, final_state, logged_states, states, toy

from localcluster.s3 import S3Endpoint

STEPS, EVERY = 60, 7
pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.parametrize("seed", range(50))
def test_killed_at_a_random_step(
    tmp_path: Path, spec: dict[str, Any], place: Connection, s3_server: S3Endpoint, seed: int
) -> None:
    at = random.Random(seed).randint(1, STEPS)
    script = {"steps": STEPS, "every": EVERY, "pause": 0.002}
    quick = {**spec, "checkpoint": {"steps": EVERY, "keep": 0}}
    with toy(tmp_path / "one", quick, place, s3_server, script | {"at": {f"0:{at}": "die"}}) as first:
        assert first.end() == 74, first.text[-3000:]
    newest = (at - 1) // EVERY * EVERY
    assert first.words().committed_step == (newest or None), "what was staged is brought home"
    assert place.whole(tmp_path / "check")[:1] == ([newest] if newest else [])

    again = Resume(mode="auto", expect_step=newest)
    with toy(tmp_path / "two", quick, place, s3_server, script, attempt=2, resume=again) as second:
        assert second.end() == 0, second.text[-3000:]
    assert second.words().resumed_from_step == (newest or None)
    assert logged_states(place) == states(STEPS)
    assert final_state(place) == states(STEPS)[STEPS]
