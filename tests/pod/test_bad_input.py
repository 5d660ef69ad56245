"""A pod with an invalid model, invalid data or invalid storage ends before training.

The exit code and the failure class show whether the user, the storage administrator or the cluster administrator must act.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import ResumeConfig, TerminationMessage
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, merge, run_config, write_rows


def run_failing_pod(
    bucket: Bucket, folder: Path, spec: dict[str, Any], *, env: dict[str, str] | None = None, **target: Any
) -> TerminationMessage:
    """Run a pod that must fail before training, and return its termination message."""
    run = run_config(spec, bucket.target(**target))
    with Pod(run, folder / "pod", bucket.env | (env or {})) as pod:
        code = pod.end()
    termination = pod.termination_message()
    assert code == termination.exit_code, pod.text[-3000:]
    assert termination.step is None, "the pod began to train"
    assert "Found credentials" not in pod.text, "botocore logs the origin of the credentials for every connection"
    assert bucket.endpoint.secret_key not in pod.text + termination.to_json()
    assert len(termination.to_json().encode()) <= 4096
    return termination


@pytest.fixture
def spec(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"},
        "training": {"maxSteps": 4},
    }  # fmt: skip


def check_failure(termination: TerminationMessage, exit_code: int, code: str, failure_class: FailureClass, *expected_texts: str) -> None:
    """Check the failure of a pod. The failure's message or hint must contain each of `expected_texts`."""
    assert (termination.exit_code, termination.code, termination.class_) == (exit_code, code, failure_class), termination
    for expected_text in expected_texts:
        assert expected_text in f"{termination.message} {termination.hint}"


def test_a_missing_bucket_is_a_storage_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    termination = run_failing_pod(bucket, tmp_path, spec, uri="s3://no-such-bucket/root/team/job/uid")
    check_failure(termination, 67, "BucketNotFound", FailureClass.STORAGE, "no-such-bucket", "storage.uri")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_a_storage_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any], name: str) -> None:
    termination = run_failing_pod(bucket, tmp_path, spec, env={name: "WRONG"})
    check_failure(termination, 77, "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef")


def test_an_unreachable_endpoint_is_a_storage_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        termination = run_failing_pod(bucket, tmp_path, spec, endpoint=f"http://127.0.0.1:{bound_socket.getsockname()[1]}")
    check_failure(termination, 69, "EndpointUnreachable", FailureClass.STORAGE, "storage.endpoint")


def test_a_missing_model_is_a_model_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"model": {"source": f"s3://{bucket.name}/models/none"}}))
    check_failure(termination, 66, "ModelNotFound", FailureClass.MODEL, "model.source", "models/none")


def test_a_folder_without_a_model_is_a_model_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("nothing")
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"model": {"source": f"file://{tmp_path}/model"}}))
    check_failure(termination, 66, "ModelInvalid", FailureClass.MODEL, "config.json", "notes.txt")


def test_an_unreachable_hub_is_a_model_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"model": {"source": "org/no-such-model"}}), env=env)
    check_failure(termination, 69, "HubUnreachable", FailureClass.MODEL, "org/no-such-model", "s3://")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://pods/data/none.jsonl", "data/none.jsonl"),
        ("file:///no/such/file.jsonl", "no/such"),
        ("configmap://none/key", "none"),
    ],
)
def test_a_missing_data_set_is_a_data_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any], source: str, message: str) -> None:
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"dataset": {"train": source}}))
    check_failure(termination, 66, "DatasetNotFound", FailureClass.DATA, "dataset.train", message)


def test_an_empty_data_set_is_a_data_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"dataset": {"train": f"file://{tmp_path}/empty.jsonl"}}))
    check_failure(termination, 65, "DatasetEmpty", FailureClass.DATA, "empty.jsonl")


def test_a_data_set_that_is_not_utf8_is_a_data_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "caf\xe9"}\n')
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"dataset": {"train": f"file://{tmp_path}/latin.jsonl"}}))
    check_failure(termination, 65, "DatasetNotUtf8", FailureClass.DATA, "latin.jsonl", "17")


def test_a_malformed_row_is_reported_with_its_number(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    lines = [json.dumps(ROWS[number % len(ROWS)]) for number in range(200)]
    lines[16] = lines[16][:-5]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"dataset": {"train": f"file://{tmp_path}/rows.jsonl"}}))
    check_failure(termination, 65, "DatasetRowInvalid", FailureClass.DATA, "rows.jsonl", "row 17")


def test_an_unknown_role_is_reported_with_the_number_of_its_row(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    rows = [*ROWS[:2], {"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    termination = run_failing_pod(bucket, tmp_path, merge(spec, {"dataset": {"train": f"file://{tmp_path}/rows.jsonl"}}))
    check_failure(termination, 65, "UnknownRole", FailureClass.DATA, "wizard", "row 3")


def test_an_attempt_that_finds_no_checkpoint_to_resume_has_a_storage_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    run = run_config(spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=100))
    with Pod(run, tmp_path / "pod", bucket.env) as pod:
        assert pod.end() == 73
    check_failure(pod.termination_message(), 73, "NoLoadableCheckpoint", FailureClass.STORAGE, "100")


def test_a_run_file_with_another_checksum_is_an_internal_failure(bucket: Bucket, tmp_path: Path, spec: dict[str, Any]) -> None:
    termination = run_failing_pod(bucket, tmp_path, spec, env={"FINETUNE_RUN_SHA256": "0" * 64})
    check_failure(termination, 70, "RunFileDamaged", FailureClass.INTERNAL)
