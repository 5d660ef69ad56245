"""The S3 fault proxy: what no fault asks for passes unchanged, and each fault does what its name says."""

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

from localcluster.ports import free_ports
from localcluster.s3 import S3Endpoint, S3Process
from tests.support.s3proxy import (
    Bandwidth,
    Blackhole,
    FlipByte,
    LateAnswer,
    Latency,
    LostResponse,
    Reset,
    S3Proxy,
    Status,
    StatusAfter,
    Truncate,
    all_of,
)

ONCE = {"total_max_attempts": 1}
BUCKET = "proxied"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with S3Process(tmp_path_factory.mktemp("s3")) as endpoint:
        endpoint.client().create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture(scope="module")
def running(server: S3Endpoint) -> Iterator[S3Proxy]:
    with S3Proxy(server.host_url, seed=7) as proxy:
        yield proxy


@pytest.fixture
def proxy(running: S3Proxy) -> S3Proxy:
    running.clear()
    running.forget()
    return running


@pytest.fixture
def client(proxy: S3Proxy, server: S3Endpoint) -> Iterator[Any]:
    """Through the proxy, each request tried once."""
    client = proxy.through(server).client(retries=ONCE, read_timeout=5)
    yield client
    client.close()


@pytest.fixture
def direct(server: S3Endpoint) -> Iterator[Any]:
    client = server.client()
    yield client
    client.close()


def put(client: Any, key: str, body: bytes) -> None:
    client.put_object(Bucket=BUCKET, Key=key, Body=body)


def read(client: Any, key: str) -> bytes:
    return bytes(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def missing(client: Any, key: str) -> bool:
    try:
        client.head_object(Bucket=BUCKET, Key=key)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404
    return False


def test_objects_and_awkward_names_pass_unchanged(proxy: S3Proxy, client: Any, direct: Any) -> None:
    body = os.urandom(300_000)
    key = "a b/ä+%2F=&?/step-00000001/x.bin"
    put(client, key, body)
    assert read(direct, key) == body
    assert read(client, key) == body
    assert client.head_object(Bucket=BUCKET, Key=key)["ContentLength"] == len(body)
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix="a b/")
    assert [(item["Key"], item["Size"]) for item in listed["Contents"]] == [(key, len(body))]
    client.delete_object(Bucket=BUCKET, Key=key)
    assert missing(direct, key)
    seen = [e.operation for e in proxy.exchanges]
    assert seen == ["PutObject", "GetObject", "HeadObject", "ListObjectsV2", "DeleteObject"]
    assert {e.fault for e in proxy.exchanges} == {""}
    assert proxy.exchanges[0].request_bytes == len(body)
    assert proxy.exchanges[1].response_bytes == len(body)


def test_a_wrong_signature_is_still_refused(proxy: S3Proxy, server: S3Endpoint) -> None:
    stranger = S3Endpoint(proxy.url, proxy.url, server.access_key, "wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        put(stranger.client(), "x", b"x")


def test_a_multipart_upload_passes_and_its_parts_are_told_apart(
    proxy: S3Proxy, client: Any, direct: Any, tmp_path: Path
) -> None:
    from boto3.s3.transfer import TransferConfig

    source = tmp_path / "big"
    source.write_bytes(os.urandom(11 << 20))
    size = 5 << 20
    config = TransferConfig(multipart_threshold=size, multipart_chunksize=size, preferred_transfer_client="classic")
    client.upload_file(str(source), BUCKET, "big", Config=config)
    assert hashlib.sha256(read(direct, "big")).digest() == hashlib.sha256(source.read_bytes()).digest()
    names = sorted(e.operation for e in proxy.exchanges)
    assert names == ["CompleteMultipartUpload", "CreateMultipartUpload", "UploadPart", "UploadPart", "UploadPart"]


def test_slow_down_is_what_the_client_sees_and_the_server_is_not_asked(
    proxy: S3Proxy, client: Any, direct: Any
) -> None:
    with (
        proxy.fault(Status(503, "SlowDown"), operation="PutObject", key="refused") as rule,
        pytest.raises(ClientError, match="SlowDown"),
    ):
        put(client, "refused", b"x" * 100_000)
    put(client, "refused-later", b"x")
    assert rule.hits == 1
    assert missing(direct, "refused")
    assert [(e.status, e.applied, e.fault) for e in proxy.exchanges[:2]] == [(503, 0, "Status"), (200, 200, "")]


def test_boto3_gets_over_a_few_faults_by_itself(proxy: S3Proxy, server: S3Endpoint, direct: Any) -> None:
    client = proxy.through(server).client(retries={"total_max_attempts": 4, "mode": "standard"})
    with proxy.fault(Status(500), operation="PutObject", times=2) as rule:
        put(client, "retried", b"value")
    assert rule.hits == 2
    assert read(direct, "retried") == b"value"


def test_probability_strikes_at_the_same_places_for_the_same_seed(server: S3Endpoint) -> None:
    def struck(seed: int) -> list[int]:
        with S3Proxy(server.host_url, seed=seed) as proxy:
            client = proxy.through(server).client(retries=ONCE)
            proxy.fault(Status(404), probability=0.5)
            for _ in range(12):
                missing(client, "nothing")
            return [e.number for e in proxy.exchanges if e.fault]

    first = struck(1)
    assert struck(1) == first
    assert 0 < len(first) < 12
    assert struck(2) != first


def test_skip_and_times_choose_the_request(proxy: S3Proxy, client: Any) -> None:
    put(client, "chosen", b"value")
    with proxy.fault(Status(500), operation="GetObject", skip=1, times=1):
        outcomes = []
        for _ in range(3):
            try:
                outcomes.append(read(client, "chosen"))
            except ClientError:
                outcomes.append(b"500")
    assert outcomes == [b"value", b"500", b"value"]


def test_a_reset_leaves_nothing_and_a_lost_response_leaves_the_object(proxy: S3Proxy, client: Any, direct: Any) -> None:
    with proxy.fault(Reset(), key="reset"), pytest.raises((ConnectionClosedError, HTTPClientError)):
        put(client, "reset", b"x")
    assert missing(direct, "reset")
    with proxy.fault(LostResponse(), key="lost"), pytest.raises((ConnectionClosedError, HTTPClientError)):
        put(client, "lost", b"kept")
    assert read(direct, "lost") == b"kept"
    assert [(e.status, e.applied) for e in proxy.exchanges[:2]] == [(0, 0), (0, 200)]


def test_an_error_after_the_work_was_done(proxy: S3Proxy, client: Any, direct: Any) -> None:
    with proxy.fault(StatusAfter(500), key="done"), pytest.raises(ClientError, match="InternalError"):
        put(client, "done", b"kept")
    assert read(direct, "done") == b"kept"


def test_a_truncated_body_is_shorter_than_its_length_says(proxy: S3Proxy, client: Any) -> None:
    put(client, "cut", b"0123456789" * 1000)
    with proxy.fault(Truncate(100), operation="GetObject"):
        body = client.get_object(Bucket=BUCKET, Key="cut")
        assert body["ContentLength"] == 10_000
        with pytest.raises((IncompleteReadError, HTTPClientError)):
            body["Body"].read()


def test_one_byte_is_another(proxy: S3Proxy, client: Any) -> None:
    value = os.urandom(200_000)
    put(client, "flipped", value)
    with proxy.fault(FlipByte(150_000), operation="GetObject"):
        got = read(client, "flipped")
    assert [i for i in range(len(value)) if value[i] != got[i]] == [150_000]
    assert read(client, "flipped") == value


def test_a_black_hole_holds_until_the_client_gives_up(proxy: S3Proxy, server: S3Endpoint, direct: Any) -> None:
    client = proxy.through(server).client(retries=ONCE, read_timeout=0.2)
    with proxy.fault(Blackhole(), key="hole"), pytest.raises(ReadTimeoutError):
        put(client, "hole", b"x")
    assert proxy.wait_for(lambda e: e.fault == "Blackhole").applied == 0
    assert missing(direct, "hole")


def test_latency_before_and_after_differ_in_what_the_server_did(
    proxy: S3Proxy, server: S3Endpoint, direct: Any
) -> None:
    client = proxy.through(server).client(retries=ONCE, read_timeout=0.3)
    with proxy.fault(Latency(30), key="late-request"), pytest.raises(ReadTimeoutError):
        put(client, "late-request", b"x")
    with proxy.fault(LateAnswer(30), key="late-answer"), pytest.raises(ReadTimeoutError):
        put(client, "late-answer", b"x")
    assert proxy.wait_for(lambda e: e.fault == "LateAnswer").applied == 200
    assert missing(direct, "late-request")
    assert read(direct, "late-answer") == b"x"


def test_a_late_answer_is_the_server_s_own(proxy: S3Proxy, client: Any) -> None:
    put(client, "late", b"value")
    with proxy.fault(LateAnswer(0.01)):
        answer = client.get_object(Bucket=BUCKET, Key="late")
    assert answer["Body"].read() == b"value"
    assert answer["ETag"] == client.head_object(Bucket=BUCKET, Key="late")["ETag"]


def test_a_slow_line_takes_as_long_as_its_rate_says(proxy: S3Proxy, client: Any) -> None:
    put(client, "slow", b"x" * 100_000)
    with proxy.fault(Bandwidth(500_000), operation="GetObject"):
        assert len(read(client, "slow")) == 100_000
    assert proxy.wait_for(lambda e: e.fault == "Bandwidth").seconds >= 0.2


def test_all_of_lifts_every_rule(proxy: S3Proxy, client: Any) -> None:
    with all_of(proxy.fault(Status(500), key="one"), proxy.fault(Status(503), key="two")):
        for key in ("one", "two"):
            with pytest.raises(ClientError):
                put(client, key, b"x")
    put(client, "one", b"x")
    put(client, "two", b"x")


def test_a_server_that_is_away_looks_like_a_broken_connection(server: S3Endpoint) -> None:
    with S3Proxy(f"http://127.0.0.1:{free_ports(1)[0]}") as proxy:
        with pytest.raises((ConnectionClosedError, HTTPClientError)):
            put(proxy.through(server).client(retries=ONCE), "x", b"x")
        assert [(e.operation, e.status, e.applied) for e in proxy.exchanges] == [("PutObject", 0, 0)]


def test_waiting_for_what_never_comes_ends(proxy: S3Proxy) -> None:
    with pytest.raises(TimeoutError, match="no such request"):
        proxy.wait_for(lambda e: False, timeout=0.01)
