"""The commands `checkpoints`, `report` and `purge` against a real S3 server, with the user's credentials and with the job's Secret."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from localcluster import S3Endpoint
from tests.integration.cli.conftest import Result, condition, set_status
from tests.support.kubeapi import KubeApi

Finetune = Callable[..., Result]
SUCCEEDED_STATUS = {"phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")]}


@pytest.fixture
def bucket(s3_server: S3Endpoint, namespace: str) -> Any:
    """Create a bucket for this test."""
    s3 = boto3.resource(
        "s3", endpoint_url=s3_server.host_url, aws_access_key_id=s3_server.access_key, aws_secret_access_key=s3_server.secret_key,
        region_name="us-east-1", config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )  # fmt: skip
    return s3.create_bucket(Bucket=f"bucket-{namespace}")


@pytest.fixture
def job_prefix(bucket: Any, s3_server: S3Endpoint, job: Callable[..., dict[str, Any]], namespace: str, api: KubeApi) -> str:
    """Create a job with one committed and one uncommitted checkpoint. Return the prefix of the job's keys in the bucket."""
    secret = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    api.create("secrets", namespace, {"metadata": {"name": "s3"}, "stringData": secret})
    storage = {
        "uri": f"s3://{bucket.name}/root",
        "endpoint": s3_server.host_url,
        "credentialsSecretRef": {"name": "s3"},
    }
    created_job = job(storage=storage)
    prefix = f"root/{namespace}/bot/{created_job['metadata']['uid']}"
    data = b"weights" * 1000
    folder = f"{prefix}/checkpoints/step-00000010"
    manifest = json.dumps(
        {"files": [{"path": "w.bin", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}]}
    ).encode()
    marker = {"attempt": 1, "path": "a1-00000000", "manifestSha256": hashlib.sha256(manifest).hexdigest()}
    bucket.put_object(Key=f"{folder}/a1-00000000/w.bin", Body=data)
    bucket.put_object(Key=f"{folder}/a1-00000000/manifest.json", Body=manifest)
    bucket.put_object(Key=f"{folder}/_COMMITTED", Body=json.dumps(marker).encode())
    bucket.put_object(Key=f"{prefix}/checkpoints/step-00000020/a1-00000000/w.bin", Body=b"half")
    bucket.put_object(Key="root/other/file", Body=b"of another job")
    return prefix


@pytest.fixture(autouse=True)
def without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all S3 credentials from the environment of the test."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_checkpoints_are_verified_and_downloaded(finetune: Finetune, job_prefix: str, tmp_path: Path) -> None:
    assert finetune("checkpoints", "bot", "--verify", "--use-secret") == Result(
        0, "checkpoints/step-00000010: ok, 6.8 KiB\n", ""
    )
    assert finetune("checkpoints", "bot", "--download", "10", "--to", str(tmp_path), "--use-secret").code == 0
    assert (tmp_path / "w.bin").read_bytes() == b"weights" * 1000
    result = finetune("checkpoints", "bot", "--download", "20", "--use-secret")
    assert (result.code, "20 is not committed below s3://" in result.err) == (1, True)


def test_the_report_is_downloaded_and_opened(
    finetune: Finetune, job_prefix: str, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "page.html"
    words = ("report", "bot", "--use-secret", "-o", str(target))
    missing_report_result = finetune(*words)
    assert (missing_report_result.code, "bot has no report below s3://" in missing_report_result.err, target.exists()) == (1, True, False)
    bucket.put_object(Key=f"{job_prefix}/report/index.html", Body=b"<!doctype html>page")
    opened_addresses: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: not opened_addresses.append(uri))
    assert finetune(*words) == Result(0, f"{target}\n", "")
    assert (target.read_bytes(), opened_addresses) == (b"<!doctype html>page", [])
    assert finetune(*words, "--open").code == 0
    assert opened_addresses == [target.as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda uri: False)
    no_browser_result = finetune(*words, "--open")
    assert (no_browser_result.code, "no browser could be started" in no_browser_result.err) == (1, True)


def test_a_request_for_a_report_archive_names_the_support_bundle_command(finetune: Finetune) -> None:
    result = finetune("report", "bot", "-o", "old.tar.gz")
    assert (result.code, "write `finetune support-bundle bot -o old.tar.gz`" in result.err) == (1, True)


def test_a_damaged_checkpoint_file_is_detected(finetune: Finetune, job_prefix: str, bucket: Any) -> None:
    bucket.put_object(Key=f"{job_prefix}/checkpoints/step-00000010/a1-00000000/w.bin", Body=b"x" * 7000)
    result = finetune("checkpoints", "bot", "--verify", "--use-secret")
    assert result.code == 1
    assert "w.bin is damaged: the file has 7000 bytes" in result.err


def test_credentials_come_from_the_environment(
    finetune: Finetune, job_prefix: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finetune("checkpoints", "bot", "--verify")
    assert (result.code, "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in result.err) == (1, True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    assert finetune("checkpoints", "bot", "--verify").code == 0


def test_purge_asks_for_confirmation_and_deletes_only_this_job(
    finetune: Finetune, job_prefix: str, bucket: Any, api: KubeApi, namespace: str
) -> None:
    assert "bot has not finished: cancel the job first" in finetune("purge", "bot", "--use-secret").err
    set_status(api, namespace, "bot", SUCCEEDED_STATUS)
    assert "would be deleted permanently: confirm with --yes-purge bot" in finetune("purge", "bot", "--use-secret").err
    assert "this is not the name of the job" in finetune("purge", "bot", "--use-secret", "--yes-purge", "other").err
    result = finetune("purge", "bot", "--use-secret", "--yes-purge", "bot")
    assert (result.code, result.out) == (0, "bot: 4 objects, 7.1 KiB, deleted\n")
    assert [stored_object.key for stored_object in bucket.objects.all()] == ["root/other/file"]
