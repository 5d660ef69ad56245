"""What cannot work ends before training, within seconds, with the code and class that say whose fault it is."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.names import FailureClass
from finetune_api.pod import Resume, TerminationMessage
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, merged, run_config, write_rows


def failed(
    bucket: Bucket, folder: Path, spec: dict[str, Any], *, env: dict[str, str] | None = None, **target: Any
) -> TerminationMessage:
    """The last words of a pod that must fail before training."""
    run = run_config(spec, bucket.target(**target))
    with Pod(run, folder / "pod", bucket.env | (env or {})) as pod:
        code = pod.end()
    words = pod.words()
    assert code == words.exit_code, pod.text[-3000:]
    assert words.step is None, "it trained"
    assert bucket.endpoint.secret_key not in pod.text + words.to_json()
    assert len(words.to_json().encode()) <= 4096
    return words


@pytest.fixture
def spec(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"},
        "training": {"maxSteps": 4},
    }  # fmt: skip


def says(words: TerminationMessage, code: int, name: str, failure_class: FailureClass, *said: str) -> None:
    assert (words.exit_code, words.code, words.class_) == (code, name, failure_class), words
    for word in said:
        assert word in f"{words.message} {words.hint}"


def test_the_bucket_is_missing(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    words = failed(bucket, tmp_path, spec, uri="s3://no-such-bucket/root/team/job/uid")
    says(words, 67, "BucketNotFound", FailureClass.STORAGE, "no-such-bucket", "storage.uri")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_the_credentials_are_wrong(bucket: Bucket, tmp_path: Path, spec: dict[str, Any], name: str) -> None:
    words = failed(bucket, tmp_path, spec, env={name: "WRONG"})
    says(words, 77, "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef")


def test_the_endpoint_is_not_there(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        words = failed(bucket, tmp_path, spec, endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
    says(words, 69, "EndpointUnreachable", FailureClass.STORAGE, "storage.endpoint")


def test_the_model_is_missing(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    words = failed(bucket, tmp_path, merged(spec, {"model": {"source": f"s3://{bucket.name}/models/none"}}))
    says(words, 66, "ModelNotFound", FailureClass.MODEL, "model.source", "models/none")


def test_the_model_is_no_model(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("nothing")
    words = failed(bucket, tmp_path, merged(spec, {"model": {"source": f"file://{tmp_path}/model"}}))
    says(words, 66, "ModelInvalid", FailureClass.MODEL, "config.json", "notes.txt")


def test_the_hub_is_not_reachable(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    words = failed(bucket, tmp_path, merged(spec, {"model": {"source": "org/no-such-model"}}), env=env)
    says(words, 69, "HubUnreachable", FailureClass.MODEL, "org/no-such-model", "s3://")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://pods/data/none.jsonl", "data/none.jsonl"),
        ("file:///no/such/file.jsonl", "no/such"),
        ("configmap://none/key", "none"),
    ],
)
def test_the_data_set_is_missing(bucket: Bucket, tmp_path: Path, spec: dict[str, Any], source: str, said: str) -> None:
    words = failed(bucket, tmp_path, merged(spec, {"dataset": {"train": source}}))
    says(words, 66, "DatasetNotFound", FailureClass.DATA, "dataset.train", said)


def test_the_data_set_is_empty(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    words = failed(bucket, tmp_path, merged(spec, {"dataset": {"train": f"file://{tmp_path}/empty.jsonl"}}))
    says(words, 65, "DatasetEmpty", FailureClass.DATA, "empty.jsonl")


def test_the_data_set_is_not_utf8(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "caf\xe9"}\n')
    words = failed(bucket, tmp_path, merged(spec, {"dataset": {"train": f"file://{tmp_path}/latin.jsonl"}}))
    says(words, 65, "DatasetNotUtf8", FailureClass.DATA, "latin.jsonl", "17")


def test_row_17_of_200_is_malformed(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    lines = [json.dumps(ROWS[number % len(ROWS)]) for number in range(200)]
    lines[16] = lines[16][:-5]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = failed(bucket, tmp_path, merged(spec, {"dataset": {"train": f"file://{tmp_path}/rows.jsonl"}}))
    says(words, 65, "DatasetRowInvalid", FailureClass.DATA, "rows.jsonl", "row 17")


def test_an_unknown_role(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    rows = [*ROWS[:2], {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = failed(bucket, tmp_path, merged(spec, {"dataset": {"train": f"file://{tmp_path}/rows.jsonl"}}))
    says(words, 65, "UnknownRole", FailureClass.DATA, "wizard", "row 3")


def test_progress_was_made_and_nothing_loads(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    run = run_config(spec, bucket.target(), attempt=2, resume=Resume(mode="auto", expect_step=100))
    with Pod(run, tmp_path / "pod", bucket.env) as pod:
        assert pod.end() == 73
    says(pod.words(), 73, "NoLoadableCheckpoint", FailureClass.STORAGE, "100")


def test_a_run_file_that_was_changed(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    words = failed(bucket, tmp_path, spec, env={"FINETUNE_RUN_SHA256": "0" * 64})
    says(words, 70, "RunFileDamaged", FailureClass.INTERNAL)


def test_every_failure_is_a_named_error() -> None:
    """Whatever is raised on the way to a pod's end has a code of its own."""
    kinds = FineTuneError.__subclasses__()
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
