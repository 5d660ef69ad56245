"""Tests: a rank is killed at a random step. The next attempt resumes and has the same result as an uninterrupted run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import ResumeConfig
from proxied_tree import ProxiedTree, final_state, logged_states, states, toy

from localcluster.s3 import S3Endpoint

STEPS, EVERY = 60, 7
pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.parametrize("seed", range(50))
def test_a_rank_killed_at_a_random_step_loses_only_steps_after_the_newest_checkpoint(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, s3_server: S3Endpoint, seed: int
) -> None:
    killed_step = random.Random(seed).randint(1, STEPS)
    script = {"steps": STEPS, "every": EVERY, "pause": 0.002}
    spec = {**spec, "checkpoint": {"steps": EVERY, "keep": 0}}
    with toy(tmp_path / "one", spec, storage, s3_server, script | {"at": {f"0:{killed_step}": "die"}}) as first:
        assert first.end() == 74, first.text[-3000:]
    newest = (killed_step - 1) // EVERY * EVERY
    assert first.termination_message().committed_step == (newest or None), "checkpoints that were staged before the kill must be uploaded"
    assert storage.verify_all(tmp_path / "check")[:1] == ([newest] if newest else [])

    resume = ResumeConfig(mode="auto", expect_step=newest)
    with toy(tmp_path / "two", spec, storage, s3_server, script, attempt=2, resume=resume) as second:
        assert second.end() == 0, second.text[-3000:]
    assert second.termination_message().resumed_from_step == (newest or None)
    assert logged_states(storage) == states(STEPS)
    assert final_state(storage) == states(STEPS)[STEPS]
