"""The store fails while a pod trains: training continues, the status names the problem, and no incomplete checkpoint is visible."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import ResumeConfig
from finetune_trainer.processes import descendants
from pod_harness import Pod
from proxied_tree import ProxiedTree, make_toy_pod

from localcluster.s3 import S3Endpoint
from tests.support.s3proxy import Bandwidth, Latency, Reset, S3Proxy, Status
from tests.support.slices import quick_slice


def test_checkpoints_are_skipped_if_the_store_is_slow(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """A checkpoint of 4 MB is due every 50 ms, but the store accepts only 4 MB per second."""
    proxy.fault(Bandwidth(4e6), operation="PutObject")
    max_staged_count = 0
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 200, "every": 5, "bytes": 4_000_000}) as pod:
        staged_folder = pod.folder / "work" / "staged"

        def has_ended() -> bool:
            nonlocal max_staged_count
            max_staged_count = max(max_staged_count, len(list(staged_folder.glob("step-*"))) if staged_folder.exists() else 0)
            return pod.process is not None and pod.process.poll() is not None

        pod.wait_until(has_ended, 120)
    termination = pod.termination_message()
    assert termination.exit_code == 0, pod.text[-3000:]
    steps = storage.verify_all(tmp_path / "check")
    assert steps[0] == 200 and len(steps) < 30
    assert max_staged_count <= 3, "at most one checkpoint is uploaded, one is queued and one is staged at the same time"
    assert termination.resolved is not None and any("skipped" in note for note in termination.resolved.notes or [])


def test_training_survives_an_outage_of_the_store(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """The last committed checkpoint remains during the outage. Later checkpoints are committed after the outage."""
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 500, "every": 10}) as pod:
        pod.wait_committed(10)
        outage = proxy.fault(Reset())
        step_before = pod.step()
        pod.wait_step(step_before + 30)
        committed_steps = [committed.step or 0 for committed in storage.direct_tree.list_committed()]
        assert max(committed_steps) <= step_before + 10
        outage.remove()
        assert outage.hits > 0
        assert pod.end() == 0, pod.text[-3000:]
    assert storage.verify_all(tmp_path / "check")[0] == 500


def test_a_pod_that_may_not_write_the_final_model_exits_with_77(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """Only objects below /model/ cannot be written. The termination message names the missing permission, and the checkpoints remain."""
    proxy.fault(Status(403, "AccessDenied"), operation="PutObject", key="/model/")
    with make_toy_pod(tmp_path, spec, storage, s3_server, {}) as pod:
        assert pod.end() == 77, pod.text[-3000:]
    termination = pod.termination_message()
    assert (termination.code, termination.class_, termination.committed_step) == ("PermissionDenied", FailureClass.STORAGE, 20)
    assert "s3:PutObject" in (termination.message or "")
    assert storage.verify_all(tmp_path / "check")[0] == 20


def test_a_pod_whose_credentials_expire_during_training_exits_with_77(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 200, "every": 5}) as pod:
        pod.wait_committed(5)
        proxy.fault(Status(400, "ExpiredToken"))
        assert pod.end() == 77, pod.text[-3000:]
    termination = pod.termination_message()
    assert (termination.code, termination.class_) == ("CredentialsExpired", FailureClass.STORAGE)
    assert termination.committed_step is not None and termination.committed_step >= 5


@pytest.mark.faults
def test_a_pod_whose_store_stays_unavailable_exits_with_69(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    pod = make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 300, "every": 5})
    pod.env["FINETUNE_FINAL_UPLOAD_TIMEOUT_SECONDS"] = "1"
    with pod:
        pod.wait_committed(5)
        proxy.fault(Reset())
        assert pod.end(500) == 69, pod.text[-3000:]
    termination = pod.termination_message()
    assert termination.class_ is FailureClass.STORAGE
    assert storage.verify_all(tmp_path / "check")[0] == termination.committed_step


def test_training_ends_when_no_checkpoint_can_be_stored_for_too_long(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """Without the limit `FINETUNE_UNSAVED_TIMEOUT_SECONDS`, a run could train for days and lose all its steps."""
    pod = make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 10_000_000, "every": 10})
    pod.env["FINETUNE_UNSAVED_TIMEOUT_SECONDS"] = "1"
    spec_with_short_timeout = pod.run.spec.model_copy(update={"policy": pod.run.spec.policy.model_copy(update={"stall_timeout_seconds": 2})})
    pod.run = pod.run.model_copy(update={"spec": spec_with_short_timeout})
    with pod:
        pod.wait_committed(10)
        proxy.fault(Status(403, "AccessDenied"), operation="PutObject", key="checkpoints/")
        assert pod.end(60) == 69, pod.text[-3000:]
    termination = pod.termination_message()
    assert (termination.code, termination.class_) == ("CheckpointsNotSaved", FailureClass.STORAGE)
    assert "PermissionDenied" in (termination.message or "")
    assert storage.verify_all(tmp_path / "check")[0] == termination.committed_step


@pytest.mark.slow  # test_kill_points.py and tests/pod/test_resume.py have similar tests, which also kill pods
def test_a_checkpoint_is_not_visible_if_the_pod_is_killed_during_its_upload(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """The next attempt removes the incomplete data and resumes from the previous checkpoint."""
    with make_toy_pod(
        tmp_path, spec, storage, s3_server, {"steps": 100000, "every": 20, "pause": 0.02, "bytes": 2_000_000}
    ) as pod:
        pod.wait_committed(20)
        slow_uploads = proxy.fault(Bandwidth(100_000), operation="PutObject")
        pod.wait_step((pod.step() // 20 + 2) * 20 + 1)
        pod.kill()
    slow_uploads.remove()
    steps = storage.verify_all(tmp_path / "check")
    second_script = {"steps": steps[0] + 3, "every": 20}
    second_folder = tmp_path / "again"
    with make_toy_pod(second_folder, spec, storage, s3_server, second_script, attempt=2, resume=ResumeConfig(mode="auto", expect_step=20)) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-3000:]
    assert second_pod.termination_message().resumed_from_step == steps[0]
    folders = {stat.key.split("/")[1] for stat in storage.direct_tree.store.list("checkpoints/")}
    assert folders == {f"step-{step:08d}" for step in steps}


@pytest.mark.faults
def test_many_store_errors_do_not_delay_training(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """30 % of the requests fail with SlowDown, 10 % fail with status 500, and 10 % of the connections are reset.

    Checkpoints are committed late, but training is not delayed.
    """
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 300, "every": 50, "pause": 0.02}) as pod:
        pod.wait_committed(50)
        rules = [
            proxy.fault(Status(503, "SlowDown"), probability=0.3),
            proxy.fault(Status(500, "InternalError"), probability=0.1),
            proxy.fault(Reset(), probability=0.1),
        ]
        pod.wait_until(lambda: read_storage_retries(pod) > 0)
        assert pod.end(580) == 0, pod.text[-3000:]
    assert all(rule.hits > 0 for rule in rules)
    assert storage.verify_all(tmp_path / "check")[0] == 300


def read_storage_retries(pod: Pod) -> float:
    match = re.search(rb"^finetune_trainer_storage_retries_total (\S+)$", pod.get("/metrics") or b"", re.MULTILINE)
    return float(match[1]) if match else 0


def test_a_stop_during_an_upload_loses_no_step(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """The pod finishes the running upload, and then uploads the checkpoint that the ranks save when they stop."""
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 100000, "every": 20, "bytes": 300_000}) as pod:
        pod.wait_committed(20)
        slow_upload = proxy.fault(Bandwidth(1e6), operation="PutObject", key="checkpoints/.*state-0")
        pod.wait_until(lambda: slow_upload.hits > 0)
        pod.terminate()
        assert pod.end() == 75, pod.text[-3000:]
    termination = pod.termination_message()
    assert (termination.code, termination.committed_step) == ("StoppedSaved", termination.step)
    assert storage.verify_all(tmp_path / "check")[0] == termination.step


def test_a_pod_whose_grace_period_is_too_short_for_the_last_save_exits_with_76(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """The pod ends at once, without a last checkpoint of its ranks. Committed checkpoints remain."""
    proxy.fault(Latency(0.5), operation="PutObject", key="checkpoints/")
    with make_toy_pod(tmp_path, spec, storage, s3_server, {"steps": 100000, "every": 20}, grace=1) as pod:
        pod.wait_committed(20)
        pod.terminate()
        assert pod.end() == 76, pod.text[-3000:]
    assert not (pod.folder / "work" / "stop").exists()
    termination = pod.termination_message()
    assert (termination.code, termination.class_) == ("StoppedUnsaved", FailureClass.PREEMPTED)
    assert termination.resolved is not None and any("GracePeriodSeconds" in note for note in termination.resolved.notes or [])
    assert storage.verify_all(tmp_path / "check")[0] >= 20


@pytest.mark.slow  # `make test` checks earlier attempts in test_two_attempts.py, and refused commits in test_commit.py
def test_a_stale_incarnation_ends_at_its_first_fenced_commit(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, s3_server: S3Endpoint
) -> None:
    """The pod of a lost node still runs after the next attempt has finished.

    The next commit of the stale pod is fenced: it changes nothing in the store, and the pod ends.
    """
    endless_script, second_script = {"steps": 10_000_000, "every": 10}, {"steps": 300, "every": 10}
    with make_toy_pod(tmp_path / "one", spec, storage, s3_server, endless_script) as stale_pod:
        stale_pod.wait_committed(10)
        assert stale_pod.process is not None
        frozen_pids = [stale_pod.process.pid, *descendants(stale_pod.process.pid)]
        for pid in frozen_pids:
            os.kill(pid, signal.SIGSTOP)
        resume = ResumeConfig(mode="auto", expect_step=10)
        with make_toy_pod(tmp_path / "two", spec, storage, s3_server, second_script, attempt=2, resume=resume) as second_pod:
            assert second_pod.end() == 0, second_pod.text[-3000:]
        tags_before = {stat.key: stat.tag for stat in storage.direct_tree.store.list("") if "/a2-" in stat.key or "/_" in stat.key}
        for pid in frozen_pids:
            os.kill(pid, signal.SIGCONT)
        assert stale_pod.end(60) == 74, "the stale pod continues to train although it is fenced\n" + stale_pod.text[-3000:]
    termination = stale_pod.termination_message()
    assert (termination.code, termination.class_, termination.origin) == ("FencedOut", FailureClass.INFRASTRUCTURE, True)
    tags_after = {stat.key: stat.tag for stat in storage.direct_tree.store.list("") if "/a2-" in stat.key or "/_" in stat.key}
    assert {key: tags_after.get(key) for key in tags_before} == tags_before, "the stale pod has changed an object of the second attempt"
    assert storage.verify_all(tmp_path / "check")[0] == 300


def test_a_damaged_checkpoint_is_replaced(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, s3_server: S3Endpoint
) -> None:
    """The next attempt resumes from the checkpoint before the damaged one. When it repeats the damaged step, it replaces the damaged checkpoint."""
    script = {"steps": 17, "every": 5}
    with make_toy_pod(tmp_path / "one", spec, storage, s3_server, script | {"at": {"0:17": "die"}}) as first_pod:
        assert first_pod.end() == 74, first_pod.text[-3000:]
    newest_checkpoint, previous_checkpoint = storage.direct_tree.list_committed()[:2]
    assert newest_checkpoint.step == 15 and previous_checkpoint.step is not None
    storage.direct_tree.store.put(f"{newest_checkpoint.folder}/state-0", b"x" * 1000)
    resume = ResumeConfig(mode="auto", expect_step=15)
    with make_toy_pod(tmp_path / "two", spec, storage, s3_server, script, attempt=2, resume=resume) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-3000:]
    assert second_pod.termination_message().resumed_from_step == previous_checkpoint.step
    assert storage.verify_all(tmp_path / "check")[0] == 15
    replaced_checkpoint = storage.direct_tree.get_committed(15)
    assert replaced_checkpoint is not None and replaced_checkpoint.marker.attempt == 2
    assert {stat.key.split("/")[2] for stat in storage.direct_tree.store.list("checkpoints/step-00000015/a")} == {
        replaced_checkpoint.marker.path
    }


@pytest.mark.slow  # `make test` checks a missing permission to delete in tests/unit/trainer/checkpoint
def test_an_attempt_without_permission_to_delete_succeeds(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    """The attempt cannot remove unfinished uploads, and says so in a note in the status."""
    proxy.fault(Status(403, "AccessDenied"), operation="DeleteObjects")
    proxy.fault(Status(403, "AccessDenied"), operation="ListMultipartUploads")
    storage.direct_tree.store.put("checkpoints/step-00000005/a1-deadbeef/half", b"left by a killed incarnation")
    with make_toy_pod(tmp_path, spec, storage, s3_server, {}, attempt=2) as pod:
        assert pod.end() == 0, pod.text[-3000:]
    termination = pod.termination_message()
    assert termination.resolved is not None
    notes = termination.resolved.notes or []
    assert any("could not be removed" in note and "s3:ListBucketMultipartUploads" in note for note in notes)
    assert storage.verify_all(tmp_path / "check")[0] == 20


@pytest.mark.slow  # `make test` checks retries in test_training_survives_an_outage_of_the_store
def test_a_store_that_is_busy_at_the_start_is_retried(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint
) -> None:
    with (
        proxy.fault(Status(503, "SlowDown"), operation="PutObject", key=r"\.probe/", max_hits=4) as busy_rule,
        make_toy_pod(tmp_path, spec, storage, s3_server, {}) as pod,
    ):
        assert pod.end() == 0, pod.text[-3000:]
    assert busy_rule.hits == 4
    assert storage.verify_all(tmp_path / "check")[0] == 20


@pytest.mark.parametrize("is_saved", quick_slice((True, False), (True,)))
def test_a_stop_during_the_upload_of_the_final_model_keeps_the_deadline(
    tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint, is_saved: bool
) -> None:
    """The ranks have already ended when the pod receives SIGTERM. The pod ends within its grace period, and reports whether all steps are saved."""
    proxy.fault(Latency(3600), operation="PutObject", key="/model/")
    script = {"steps": 20, "every": 5 if is_saved else 15}
    with make_toy_pod(tmp_path, spec, storage, s3_server, script, grace=3) as pod:
        pod.wait_until(lambda: b'stage="uploading"' in (pod.get("/metrics") or b"") and not pod.pids("train"))
        pod.wait_committed(20 if is_saved else 15)
        pod.terminate()
        assert pod.end(120) == (75 if is_saved else 76), pod.text[-3000:]
    termination = pod.termination_message()
    assert (termination.code, termination.committed_step) == (("StoppedSaved", 20) if is_saved else ("StoppedUnsaved", 15))
    assert storage.direct_tree.get_committed(None) is None
