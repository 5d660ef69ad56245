"""A worker killed at random steps: the next attempt goes on from the newest checkpoint, loses less than an interval, and ends the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import Resume
from storage_place import Place, toy
from toy_rank import link

from localcluster.s3 import S3Endpoint

STEPS, EVERY = 60, 7
pytestmark = [pytest.mark.faults, pytest.mark.slow]


def states() -> dict[int, str]:
    """State after each step of a run that nothing happens to."""
    found = {0: ""}
    for step in range(1, STEPS + 1):
        found[step] = link(found[step - 1], 0, step)
    return found


@pytest.mark.parametrize("seed", range(50))
def test_killed_at_a_random_step(
    tmp_path: Path, spec: dict[str, Any], place: Place, s3_server: S3Endpoint, seed: int
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
    logged = logged_states(place)
    assert logged == {step: state for step, state in states().items() if step}
    model = place.truly.marker(None)
    assert model is not None
    assert place.truly.store.get(f"{model.folder}/chain-0") == states()[STEPS].encode()


def logged_states(place: Place) -> dict[int, str]:
    """State by step as all attempts logged it; what two logged must be the same."""
    found: dict[int, str] = {}
    for stat in place.truly.store.list("metrics/"):
        for line in (place.truly.store.get(stat.key) or b"").decode().splitlines():
            value = json.loads(line)
            assert found.setdefault(value["step"], value["chain"]) == value["chain"], value
    return found
