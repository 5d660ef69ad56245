"""A gang of two pods: rank 0's pod commits what both bring in, and a stop of either stops both at the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.pod import Resume
from finetune_trainer.agent import free_port
from pod_buckets import Bucket
from pod_harness import Pod, run_config
from test_resume import EVERY, curve, spec_of, undisturbed, weights

from localcluster.s3 import S3Endpoint


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_stop_of_one_pod_stops_both_at_the_same_step_and_nothing_is_lost(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, signalled: int,
) -> None:  # fmt: skip
    losses, final = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 2)
    spec = spec_of(model, rows, "lora")

    def gang(attempt: int, expect: int) -> list[Pod]:
        run = run_config(
            spec, bucket.target(), nodes=2, attempt=attempt, master_port=free_port(), resume=Resume(mode="auto", expect_step=expect)
        )  # fmt: skip
        return [Pod(run, tmp_path / f"attempt-{attempt}-{node}", bucket.env, node_rank=node) for node in (0, 1)]

    first = gang(1, 0)
    with first[0], first[1]:
        first[0].wait_committed(EVERY)
        first[signalled].terminate()
        # A kubelet ends only the pod it was told to; the other learns of it from the gang.
        assert [pod.end() for pod in first] == [75, 75], first[0].text[-3000:] + first[1].text[-3000:]
    words = [pod.words() for pod in first]
    assert words[0].step == words[1].step == words[0].committed_step

    second = gang(2, EVERY)
    with second[0], second[1]:
        assert [pod.end() for pod in second] == [0, 0], second[0].text[-3000:] + second[1].text[-3000:]
    assert second[0].words().resumed_from_step == words[0].step
    assert curve(bucket) == losses
    assert weights(bucket, second[0].words()) == final
