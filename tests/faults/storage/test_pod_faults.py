"""A whole pod whose store misbehaves while it trains: training goes on, the status says what is wrong, nothing is half."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Do, FaultProxy, Rule
from finetune_api.names import FailureClass
from finetune_api.pod import StoreTarget
from pod_harness import PYTHONPATH, Pod, run_config, write_rows
from storage_place import Place
from tiny import make_tiny_model

from localcluster.s3 import S3Endpoint

PODS = Path(__file__).parents[2] / "pod"


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return {
        "model": {"source": f"file://{folder}/model"},
        "dataset": {"train": f"file://{folder}/rows.jsonl", "format": "messages"},
        "checkpoint": {"steps": 5, "keep": 0},
    }


def toy(
    folder: Path, spec: dict[str, Any], place: Place, server: S3Endpoint, script: dict[str, Any], **run: Any
) -> Pod:
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    env = {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(PODS)]), "FINETUNE_TRAINER_MODULE": "toy_rank",
        "TOY_SCRIPT": json.dumps(script), "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }  # fmt: skip
    return Pod(run_config(spec, StoreTarget.model_validate(target.model_dump()), **run), folder / "pod", env)


def test_a_slow_store_skips_checkpoints_and_never_queues(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    """4 MB a checkpoint, one every 50 ms, at 4 MB/s."""
    proxy.upload_bytes_per_second = 4e6
    most = 0
    with toy(tmp_path, spec, place, s3_server, {"steps": 400, "every": 5, "bytes": 4_000_000}) as pod:
        staged = pod.folder / "work" / "staged"

        def ended() -> bool:
            nonlocal most
            most = max(most, len(list(staged.glob("step-*"))) if staged.exists() else 0)
            return pod.process is not None and pod.process.poll() is not None

        pod.wait_until(ended, 120)
    words = pod.words()
    assert words.exit_code == 0, pod.text[-3000:]
    steps = place.whole(tmp_path / "check")
    assert steps[0] == 400 and len(steps) < 60
    assert most <= 3, "in flight, waiting, and the one being handed over"
    assert words.resolved is not None and any("skipped" in note for note in words.resolved.notes or [])


def test_a_store_that_is_down_for_a_while(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    """Training goes on, the last commit stays, and what comes after is committed."""
    with toy(tmp_path, spec, place, s3_server, {"steps": 1200, "every": 10}) as pod:
        pod.wait_committed(10)
        proxy.down = True
        before = pod.step()
        pod.wait_step(before + 100)
        during = [committed.step or 0 for committed in place.truly.committed()]
        assert max(during) <= before + 10
        proxy.down = False
        assert pod.end() == 0, pod.text[-3000:]
    assert place.whole(tmp_path / "check")[0] == 1200


def test_the_final_model_is_refused(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    """A right that is missing for the model only: 77, the permission by name, and the checkpoints stay."""
    proxy.rules = [
        Rule(Do.REFUSE, lambda method, path: method == "PUT" and "/model/" in path, status=403, code="AccessDenied")
    ]
    with toy(tmp_path, spec, place, s3_server, {}) as pod:
        assert pod.end() == 77, pod.text[-3000:]
    words = pod.words()
    assert (words.code, words.class_, words.committed_step) == ("PermissionDenied", FailureClass.STORAGE, 20)
    assert "s3:PutObject" in (words.message or "")
    assert place.whole(tmp_path / "check")[0] == 20


def test_credentials_that_expire_on_the_way(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    with toy(tmp_path, spec, place, s3_server, {"steps": 600, "every": 5}) as pod:
        pod.wait_committed(5)
        proxy.rules = [Rule(Do.REFUSE, status=400, code="ExpiredToken")]
        assert pod.end() == 77, pod.text[-3000:]
    words = pod.words()
    assert (words.code, words.class_) == ("CredentialsExpired", FailureClass.STORAGE)
    assert words.committed_step is not None and words.committed_step >= 5


@pytest.mark.faults
def test_a_store_that_is_down_for_good(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    with toy(tmp_path, spec, place, s3_server, {"steps": 300, "every": 5}) as pod:
        pod.wait_committed(5)
        proxy.down = True
        assert pod.end(500) == 69, pod.text[-3000:]
    words = pod.words()
    assert words.class_ is FailureClass.STORAGE
    assert place.whole(tmp_path / "check")[0] == words.committed_step


def test_a_kill_while_a_checkpoint_is_uploaded(
    tmp_path: Path, spec: dict[str, Any], place: Place, proxy: FaultProxy, s3_server: S3Endpoint
) -> None:
    """The step never shows, the next attempt sweeps it and resumes from the one before."""
    with toy(
        tmp_path, spec, place, s3_server, {"steps": 100000, "every": 20, "pause": 0.02, "bytes": 2_000_000}
    ) as pod:
        pod.wait_committed(20)
        proxy.upload_bytes_per_second = 100_000
        pod.wait_step((pod.step() // 20 + 2) * 20 + 1)
        pod.kill()
    proxy.upload_bytes_per_second = None
    steps = place.whole(tmp_path / "check")
    last = {"steps": steps[0] + 3, "every": 20}
    from finetune_api.pod import Resume

    again = tmp_path / "again"
    with toy(again, spec, place, s3_server, last, attempt=2, resume=Resume(mode="auto", expect_step=20)) as second:
        assert second.end() == 0, second.text[-3000:]
    assert second.words().resumed_from_step == steps[0]
    folders = {stat.key.split("/")[1] for stat in place.truly.store.list("checkpoints/")}
    assert folders == {f"step-{step:08d}" for step in steps}
