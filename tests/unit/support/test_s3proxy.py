"""Without a fault, the S3 fault proxy forwards requests unchanged. Each fault has its documented effect."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
)

from localcluster.ports import find_free_ports
from localcluster.s3 import S3Endpoint, S3Process
from tests.support.s3proxy import (
    Bandwidth,
    Blackhole,
    DelayResponse,
    FlipByte,
    Latency,
    LostResponse,
    Reset,
    S3Proxy,
    Status,
    StatusAfterApply,
    Truncate,
    active_rules,
)

NO_RETRIES = {"total_max_attempts": 1}
BUCKET_NAME = "proxied"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with S3Process(tmp_path_factory.mktemp("s3")) as endpoint:
        endpoint.client().create_bucket(Bucket=BUCKET_NAME)
        yield endpoint


@pytest.fixture(scope="module")
def running_proxy(server: S3Endpoint) -> Iterator[S3Proxy]:
    with S3Proxy(server.host_url, seed=7) as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy: S3Proxy) -> S3Proxy:
    running_proxy.clear_rules()
    running_proxy.clear_exchanges()
    return running_proxy


@pytest.fixture
def client(proxy: S3Proxy, server: S3Endpoint) -> Iterator[Any]:
    """An S3 client that connects through the proxy and does not retry failed requests."""
    client = proxy.endpoint_through(server).client(retries=NO_RETRIES, read_timeout=5)
    yield client
    client.close()


@pytest.fixture
def direct_client(server: S3Endpoint) -> Iterator[Any]:
    client = server.client()
    yield client
    client.close()


def put_object(client: Any, key: str, body: bytes) -> None:
    client.put_object(Bucket=BUCKET_NAME, Key=key, Body=body)


def read_object(client: Any, key: str) -> bytes:
    return bytes(client.get_object(Bucket=BUCKET_NAME, Key=key)["Body"].read())


def is_missing(client: Any, key: str) -> bool:
    try:
        client.head_object(Bucket=BUCKET_NAME, Key=key)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404
    return False


def test_objects_and_keys_with_special_characters_pass_unchanged(proxy: S3Proxy, client: Any, direct_client: Any) -> None:
    body = os.urandom(300_000)
    key = "a b/ä+%2F=&?/step-00000001/x.bin"
    put_object(client, key, body)
    assert read_object(direct_client, key) == body
    assert read_object(client, key) == body
    assert client.head_object(Bucket=BUCKET_NAME, Key=key)["ContentLength"] == len(body)
    listed = client.list_objects_v2(Bucket=BUCKET_NAME, Prefix="a b/")
    assert [(item["Key"], item["Size"]) for item in listed["Contents"]] == [(key, len(body))]
    client.delete_object(Bucket=BUCKET_NAME, Key=key)
    assert is_missing(direct_client, key)
    operations = [e.operation for e in proxy.exchanges]
    assert operations == ["PutObject", "GetObject", "HeadObject", "ListObjectsV2", "DeleteObject"]
    assert {e.fault_name for e in proxy.exchanges} == {""}
    assert proxy.exchanges[0].request_bytes == len(body)
    assert proxy.exchanges[1].response_bytes == len(body)


def test_wrong_signature_is_rejected_by_the_server(proxy: S3Proxy, server: S3Endpoint) -> None:
    unauthorized = S3Endpoint(proxy.url, proxy.url, server.access_key, "wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        put_object(unauthorized.client(), "x", b"x")


def test_each_request_of_a_multipart_upload_has_its_operation_name(
    proxy: S3Proxy, client: Any, direct_client: Any, tmp_path: Path
) -> None:
    from boto3.s3.transfer import TransferConfig

    source = tmp_path / "big"
    source.write_bytes(os.urandom(11 << 20))
    size = 5 << 20
    config = TransferConfig(multipart_threshold=size, multipart_chunksize=size, preferred_transfer_client="classic")
    client.upload_file(str(source), BUCKET_NAME, "big", Config=config)
    assert hashlib.sha256(read_object(direct_client, "big")).digest() == hashlib.sha256(source.read_bytes()).digest()
    names = sorted(e.operation for e in proxy.exchanges)
    assert names == ["CompleteMultipartUpload", "CreateMultipartUpload", "UploadPart", "UploadPart", "UploadPart"]


def test_client_receives_the_injected_error_and_the_server_receives_nothing(
    proxy: S3Proxy, client: Any, direct_client: Any
) -> None:
    with (
        proxy.fault(Status(503, "SlowDown"), operation="PutObject", key="refused") as rule,
        pytest.raises(ClientError, match="SlowDown"),
    ):
        put_object(client, "refused", b"x" * 100_000)
    put_object(client, "refused-later", b"x")
    assert rule.hits == 1
    assert is_missing(direct_client, "refused")
    assert [(e.client_status, e.server_status, e.fault_name) for e in proxy.exchanges[:2]] == [(503, 0, "Status"), (200, 200, "")]


def test_boto3_retries_two_injected_errors(proxy: S3Proxy, server: S3Endpoint, direct_client: Any) -> None:
    client = proxy.endpoint_through(server).client(retries={"total_max_attempts": 4, "mode": "standard"})
    with proxy.fault(Status(500), operation="PutObject", max_hits=2) as rule:
        put_object(client, "retried", b"value")
    assert rule.hits == 2
    assert read_object(direct_client, "retried") == b"value"


def test_same_seed_applies_the_fault_to_the_same_requests(server: S3Endpoint) -> None:
    def find_faulty_requests(seed: int) -> list[int]:
        with S3Proxy(server.host_url, seed=seed) as proxy:
            client = proxy.endpoint_through(server).client(retries=NO_RETRIES)
            proxy.fault(Status(404), probability=0.5)
            for _ in range(12):
                is_missing(client, "nothing")
            return [e.number for e in proxy.exchanges if e.fault_name]

    first = find_faulty_requests(1)
    assert find_faulty_requests(1) == first
    assert 0 < len(first) < 12
    assert find_faulty_requests(2) != first


def test_skipped_matches_and_max_hits_select_the_requests(proxy: S3Proxy, client: Any) -> None:
    put_object(client, "chosen", b"value")
    with proxy.fault(Status(500), operation="GetObject", skipped_matches=1, max_hits=1):
        outcomes = []
        for _ in range(3):
            try:
                outcomes.append(read_object(client, "chosen"))
            except ClientError:
                outcomes.append(b"500")
    assert outcomes == [b"value", b"500", b"value"]


def test_reset_prevents_the_upload_and_lost_response_does_not(proxy: S3Proxy, client: Any, direct_client: Any) -> None:
    with proxy.fault(Reset(), key="reset"), pytest.raises((ConnectionClosedError, HTTPClientError)):
        put_object(client, "reset", b"x")
    assert is_missing(direct_client, "reset")
    with proxy.fault(LostResponse(), key="lost"), pytest.raises((ConnectionClosedError, HTTPClientError)):
        put_object(client, "lost", b"kept")
    assert read_object(direct_client, "lost") == b"kept"
    assert [(e.client_status, e.server_status) for e in proxy.exchanges[:2]] == [(0, 0), (0, 200)]


def test_status_after_apply_executes_the_request(proxy: S3Proxy, client: Any, direct_client: Any) -> None:
    with proxy.fault(StatusAfterApply(500), key="done"), pytest.raises(ClientError, match="InternalError"):
        put_object(client, "done", b"kept")
    assert read_object(direct_client, "done") == b"kept"


def test_truncated_body_is_shorter_than_its_content_length(proxy: S3Proxy, client: Any) -> None:
    put_object(client, "cut", b"0123456789" * 1000)
    with proxy.fault(Truncate(100), operation="GetObject"):
        body = client.get_object(Bucket=BUCKET_NAME, Key="cut")
        assert body["ContentLength"] == 10_000
        with pytest.raises((IncompleteReadError, HTTPClientError)):
            body["Body"].read()


def test_flip_byte_changes_one_byte(proxy: S3Proxy, client: Any) -> None:
    value = os.urandom(200_000)
    put_object(client, "flipped", value)
    with proxy.fault(FlipByte(150_000), operation="GetObject"):
        got = read_object(client, "flipped")
    assert [i for i in range(len(value)) if value[i] != got[i]] == [150_000]
    assert read_object(client, "flipped") == value


def test_blackhole_lasts_until_the_client_times_out(proxy: S3Proxy, server: S3Endpoint, direct_client: Any) -> None:
    client = proxy.endpoint_through(server).client(retries=NO_RETRIES, read_timeout=0.2)
    with proxy.fault(Blackhole(), key="hole"), pytest.raises(ReadTimeoutError):
        put_object(client, "hole", b"x")
    assert proxy.wait_for(lambda e: e.fault_name == "Blackhole").server_status == 0
    assert is_missing(direct_client, "hole")


def test_server_executes_a_request_with_delayed_response_but_not_a_delayed_request(
    proxy: S3Proxy, server: S3Endpoint, direct_client: Any
) -> None:
    client = proxy.endpoint_through(server).client(retries=NO_RETRIES, read_timeout=0.3)
    with proxy.fault(Latency(30), key="late-request"), pytest.raises(ReadTimeoutError):
        put_object(client, "late-request", b"x")
    with proxy.fault(DelayResponse(30), key="late-response"), pytest.raises(ReadTimeoutError):
        put_object(client, "late-response", b"x")
    assert proxy.wait_for(lambda e: e.fault_name == "DelayResponse").server_status == 200
    assert is_missing(direct_client, "late-request")
    assert read_object(direct_client, "late-response") == b"x"


def test_delayed_response_is_that_of_the_server(proxy: S3Proxy, client: Any) -> None:
    put_object(client, "late", b"value")
    with proxy.fault(DelayResponse(0.01)):
        answer = client.get_object(Bucket=BUCKET_NAME, Key="late")
    assert answer["Body"].read() == b"value"
    assert answer["ETag"] == client.head_object(Bucket=BUCKET_NAME, Key="late")["ETag"]


def test_bandwidth_limit_determines_the_duration(proxy: S3Proxy, client: Any) -> None:
    put_object(client, "slow", b"x" * 100_000)
    with proxy.fault(Bandwidth(500_000), operation="GetObject"):
        assert len(read_object(client, "slow")) == 100_000
    assert proxy.wait_for(lambda e: e.fault_name == "Bandwidth").seconds >= 0.2


def test_active_rules_removes_all_rules_at_the_end(proxy: S3Proxy, client: Any) -> None:
    with active_rules(proxy.fault(Status(500), key="one"), proxy.fault(Status(503), key="two")):
        for key in ("one", "two"):
            with pytest.raises(ClientError):
                put_object(client, key, b"x")
    put_object(client, "one", b"x")
    put_object(client, "two", b"x")


def test_unreachable_server_resets_the_connection(server: S3Endpoint) -> None:
    with S3Proxy(f"http://127.0.0.1:{find_free_ports(1)[0]}") as proxy:
        with pytest.raises((ConnectionClosedError, HTTPClientError)):
            put_object(proxy.endpoint_through(server).client(retries=NO_RETRIES), "x", b"x")
        assert [(e.operation, e.client_status, e.server_status) for e in proxy.exchanges] == [("PutObject", 0, 0)]


def test_wait_for_times_out_without_a_matching_request(proxy: S3Proxy) -> None:
    with pytest.raises(TimeoutError, match="no matching request"):
        proxy.wait_for(lambda e: False, timeout_seconds=0.01)
