"""A gang of two pods: the pod of rank 0 commits the files of both pods. A stop of one pod stops both pods at the same step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import ResumeConfig, StoreTarget, TerminationMessage
from pod_buckets import Bucket
from pod_harness import Pod, run_config
from recorded_run import RecordedRun, make_spec, make_traced_pod, record_run, run_uninterrupted

from localcluster.ports import find_free_ports
from localcluster.s3 import S3Endpoint
from tests.support.s3proxy import Latency, S3Proxy


@dataclass(frozen=True)
class TwoPods:
    """A gang of two pods, and the expected record of its run."""

    spec: dict[str, Any]
    bucket: Bucket
    folder: Path
    expected_run: RecordedRun

    def start(self, attempt: int, expected_step: int, target: StoreTarget, *, hold_point: str = "", signalled_pod: int = 0) -> list[Pod]:
        """Create the two pods of an attempt. The pod `signalled_pod` pauses at `hold_point` until the ranks have agreed on a stop."""
        resume = ResumeConfig(mode="auto", expect_step=expected_step)
        run = run_config(self.spec, target, nodes=2, attempt=attempt, master_port=find_free_ports(1)[0], resume=resume)
        folders = [self.folder / f"attempt-{attempt}-{node}" for node in (0, 1)]
        return [
            make_traced_pod(run, folders[node], self.bucket, hold_point=hold_point if node == signalled_pod else "", node_rank=node)
            for node in (0, 1)
        ]

    def stop_one_pod(self, pods: list[Pod], signalled_pod: int) -> list[TerminationMessage]:
        """Send SIGTERM to one pod, as a kubelet does, and check that both pods stop after the same step. Returns both termination messages."""
        pods[signalled_pod].terminate()
        assert [pod.end() for pod in pods] == [75, 75], pods[0].text[-3000:] + pods[1].text[-3000:]
        terminations = [pod.termination_message() for pod in pods]
        assert terminations[0].step == terminations[1].step == terminations[0].committed_step
        return terminations

    def resume_and_compare(self, first_pods: list[Pod], start_step: int) -> None:
        """Run the next attempt from step `start_step`, and compare both attempts with an uninterrupted run."""
        second_pods = self.start(2, start_step, self.bucket.target())
        with second_pods[0], second_pods[1]:
            assert [pod.end() for pod in second_pods] == [0, 0], second_pods[0].text[-3000:] + second_pods[1].text[-3000:]
        assert second_pods[0].termination_message().resumed_from_step == start_step
        assert record_run(self.bucket, [*first_pods, *second_pods], second_pods[0].termination_message()) == self.expected_run


@pytest.fixture
def gang(
    request: pytest.FixtureRequest, s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> TwoPods:  # fmt: skip
    """A gang that trains the variant in the test's parameters (default: `windows`)."""
    variant = getattr(request, "param", "windows")
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 2, variant)
    return TwoPods(make_spec(model, rows, "lora", variant), bucket, tmp_path, expected_run)


def make_stop_case(phase: str, signalled_pod: int, stop_step: int, *, is_quick: bool = False, variant: str = "windows") -> Any:
    """Return one case of a parametrized test. `make test` runs only the quick cases."""
    marks = [] if is_quick else [pytest.mark.faults]
    return pytest.param(variant, phase, signalled_pod, stop_step, marks=marks, id=f"{phase}-pod-{signalled_pod}")


@pytest.mark.parametrize(
    ("gang", "phase", "signalled_pod", "stop_step"),
    [
        make_stop_case("accumulation:12", 1, 12), make_stop_case("forward:12", 0, 12), make_stop_case("forward:12", 1, 12),
        make_stop_case("accumulation:12", 0, 12), make_stop_case("save:8", 0, 9), make_stop_case("save:8", 1, 9),
        make_stop_case("evaluation:16", 0, 17, variant="best"), make_stop_case("evaluation:16", 1, 17, variant="best"),
    ],
    indirect=["gang"],
)  # fmt: skip
def test_a_stop_of_one_pod_stops_both_at_the_same_step(
    gang: TwoPods, phase: str, signalled_pod: int, stop_step: int
) -> None:
    """The signalled pod pauses in `phase`, so the other pod waits for it in the next collective operation."""
    first_pods = gang.start(1, 0, gang.bucket.target(), hold_point=phase, signalled_pod=signalled_pod)
    with first_pods[0], first_pods[1]:
        first_pods[signalled_pod].wait_until((first_pods[signalled_pod].folder / "work" / "held").exists)
        terminations = gang.stop_one_pod(first_pods, signalled_pod)
    assert terminations[0].committed_step == stop_step
    assert [key for key in gang.bucket.keys(f"checkpoints/step-{stop_step:08}/") if key.endswith("/manifest.hmac")] != []
    gang.resume_and_compare(first_pods, stop_step)


@pytest.mark.faults
@pytest.mark.parametrize("signalled_pod", [0, 1])
def test_a_stop_while_the_gang_uploads_commits_both_checkpoints(gang: TwoPods, s3_server: S3Endpoint, signalled_pod: int) -> None:
    """The pods finish the upload of the checkpoint of step 8, and then upload the checkpoint that the stop request causes."""
    with S3Proxy(s3_server.host_url) as proxy:
        slow_uploads = proxy.fault(Latency(1.0), operation="PutObject", key=r"checkpoints/step-0*8/")
        first_pods = gang.start(1, 0, gang.bucket.target(endpoint=proxy.url))
        with first_pods[0], first_pods[1]:
            first_pods[signalled_pod].wait_until(lambda: slow_uploads.hits > 0)
            terminations = gang.stop_one_pod(first_pods, signalled_pod)
    stop_step = terminations[0].committed_step
    assert stop_step is not None
    assert {f"step-{8:08}", f"step-{stop_step:08}"} <= {key.split("/")[1] for key in gang.bucket.keys("checkpoints/")}
    gang.resume_and_compare(first_pods, stop_step)
