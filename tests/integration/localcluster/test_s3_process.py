"""The local cluster's S3 server process: authentication, conditional writes, restart and cleanup."""

from __future__ import annotations

import dataclasses
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from localcluster import S3Endpoint, S3Process, processes
from localcluster.errors import StartFailed

pytestmark = pytest.mark.integration


def _read_error_code(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


@pytest.fixture(scope="module")
def bucket(s3_server: S3Endpoint) -> str:
    s3_server.client().create_bucket(Bucket="process")
    return "process"


def test_wrong_keys_and_anonymous_requests_are_refused(s3_server: S3Endpoint, bucket: str) -> None:
    with pytest.raises(ClientError) as refusal:
        dataclasses.replace(s3_server, secret_key="wrong").client().list_objects_v2(Bucket=bucket)
    assert _read_error_code(refusal) == "SignatureDoesNotMatch"
    with pytest.raises(ClientError) as refusal:
        dataclasses.replace(s3_server, access_key="AKNOBODY").client().list_objects_v2(Bucket=bucket)
    assert _read_error_code(refusal) == "InvalidAccessKeyId"
    s3_server.client().put_object(Bucket=bucket, Key="k", Body=b"x")
    with pytest.raises(urllib.error.HTTPError) as anonymous_error:
        urllib.request.urlopen(f"{s3_server.host_url}/{bucket}/k")
    assert anonymous_error.value.code == 403


def test_write_to_a_missing_bucket_is_refused(s3_server: S3Endpoint) -> None:
    with pytest.raises(ClientError) as refusal:
        s3_server.client().put_object(Bucket="never-created", Key="k", Body=b"")
    assert _read_error_code(refusal) == "NoSuchBucket"


def test_second_write_with_if_none_match_is_refused(s3_server: S3Endpoint, bucket: str) -> None:
    client = s3_server.client()
    client.put_object(Bucket=bucket, Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError) as refusal:
        client.put_object(Bucket=bucket, Key="once", Body=b"2", IfNoneMatch="*")
    assert _read_error_code(refusal) == "PreconditionFailed"
    assert client.get_object(Bucket=bucket, Key="once")["Body"].read() == b"1"


def test_a_restart_keeps_data_and_address(tmp_path: Path) -> None:
    existing_sockets = set(Path("/tmp").glob("seaweedfs-*.sock"))  # sockets that killed servers of earlier test runs left behind
    server = S3Process(tmp_path)
    endpoint = server.start()
    endpoint.client().create_bucket(Bucket="kept")
    endpoint.client().put_object(Bucket="kept", Key="k", Body=b"v" * 100_000)
    server.stop()
    assert processes.list_owned_pids(tmp_path) == []
    assert [p for port in server.ports for p in Path("/tmp").glob(f"seaweedfs-*-{port}.sock") if p not in existing_sockets] == []
    assert server.start() == endpoint
    assert endpoint.client().get_object(Bucket="kept", Key="k")["Body"].read() == b"v" * 100_000
    server.stop()


def test_reading_the_endpoint_before_the_first_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="was not started"):
        assert S3Process(tmp_path).endpoint
