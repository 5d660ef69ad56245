"""A rank is killed at a random step. The next attempt resumes, and has the same result as an uninterrupted run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import ResumeConfig
from proxied_tree import ProxiedTree, compute_expected_states, make_toy_pod, read_final_state, read_logged_states

from localcluster.s3 import S3Endpoint

STEPS, STEPS_PER_CHECKPOINT = 60, 7
pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.parametrize("seed", range(50))
def test_a_rank_killed_at_a_random_step_loses_only_steps_after_the_newest_checkpoint(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, s3_server: S3Endpoint, seed: int
) -> None:
    killed_step = random.Random(seed).randint(1, STEPS)
    script = {"steps": STEPS, "every": STEPS_PER_CHECKPOINT, "pause": 0.002}
    spec = {**spec, "checkpoint": {"steps": STEPS_PER_CHECKPOINT, "keep": 0}}
    with make_toy_pod(tmp_path / "one", spec, storage, s3_server, script | {"at": {f"0:{killed_step}": "die"}}) as first_pod:
        assert first_pod.end() == 74, first_pod.text[-3000:]
    newest_step = (killed_step - 1) // STEPS_PER_CHECKPOINT * STEPS_PER_CHECKPOINT
    assert first_pod.termination_message().committed_step == (newest_step or None), "checkpoints that were staged before the kill must be uploaded"
    assert storage.verify_all(tmp_path / "check")[:1] == ([newest_step] if newest_step else [])

    resume = ResumeConfig(mode="auto", expect_step=newest_step)
    with make_toy_pod(tmp_path / "two", spec, storage, s3_server, script, attempt=2, resume=resume) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-3000:]
    assert second_pod.termination_message().resumed_from_step == (newest_step or None)
    assert read_logged_states(storage) == compute_expected_states(STEPS)
    assert read_final_state(storage) == compute_expected_states(STEPS)[STEPS]
