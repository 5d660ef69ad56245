"""A gang of two pods: rank 0's pod commits what both bring in, and a stop of either stops both at the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import Resume, RunConfig
from finetune_trainer.agent import free_port
from pod_buckets import Bucket
from pod_harness import Pod, run_config
from stories import spec_of, story, traced, undisturbed

from localcluster.s3 import S3Endpoint

VARIANT = "windows"


def case(phase: str, signalled: int, stop: int, *, quick: bool = False) -> Any:
    marks = [] if quick else [pytest.mark.faults]
    return pytest.param(phase, signalled, stop, marks=marks, id=f"{phase}-pod-{signalled}")


@pytest.mark.parametrize(
    ("phase", "signalled", "stop"),
    [
        case("accumulation:12", 1, 12, quick=True), case("forward:12", 0, 12), case("forward:12", 1, 12),
        case("accumulation:12", 0, 12), case("save:8", 0, 9), case("save:8", 1, 9),
    ],
)  # fmt: skip
def test_a_stop_of_one_pod_stops_both_at_the_same_step_and_nothing_is_lost(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, phase: str, signalled: int, stop: int,
) -> None:  # fmt: skip
    """The signalled pod is in that phase, and the other waits for it in the next collective operation."""
    whole = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 2, VARIANT)
    spec = spec_of(model, rows, "lora", VARIANT)

    def gang(attempt: int, expect: int, hold: str = "") -> list[Pod]:
        run: RunConfig = run_config(
            spec, bucket.target(), nodes=2, attempt=attempt, master_port=free_port(), resume=Resume(mode="auto", expect_step=expect)
        )  # fmt: skip
        return [
            traced(
                run,
                tmp_path / f"attempt-{attempt}-{node}",
                bucket,
                hold=hold if node == signalled else "",
                node_rank=node,
            )
            for node in (0, 1)
        ]

    first = gang(1, 0, phase)
    with first[0], first[1]:
        first[signalled].wait_until((first[signalled].folder / "work" / "held").exists)
        first[signalled].terminate()
        # A kubelet ends only the pod it was told to; the other learns of it from the gang.
        assert [pod.end() for pod in first] == [75, 75], first[0].text[-3000:] + first[1].text[-3000:]
    words = [pod.words() for pod in first]
    assert words[0].step == words[1].step == words[0].committed_step == stop

    second = gang(2, stop)
    with second[0], second[1]:
        assert [pod.end() for pod in second] == [0, 0], second[0].text[-3000:] + second[1].text[-3000:]
    assert second[0].words().resumed_from_step == stop
    assert story(bucket, [*first, *second], second[0].words()) == whole
