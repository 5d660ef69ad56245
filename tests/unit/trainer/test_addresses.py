"""Addresses of stores, judges and trackers that lead to the metadata service of a cloud are refused, in every notation and by every name."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.metadata_addresses import is_metadata_address
from finetune_api.pod import StoreTarget
from finetune_trainer.addresses import refuse_metadata_address
from finetune_trainer.evaluation.judge import Judge, JudgeSettings
from finetune_trainer.storage.s3 import S3Store
from finetune_trainer.storage.web import WebStore
from finetune_trainer.trackers.base import TrackedRun, TrackerError
from finetune_trainer.trackers.mlflow import Mlflow

NAMES = {
    "rebound.example.com": ["203.0.113.9", "169.254.169.254"], "v6.example.com": ["fd00:ec2::254"], "good.example.com": ["203.0.113.9", "2001:db8::1"],
}  # fmt: skip
"""The addresses of each host name. The first name has one harmless and one forbidden address."""


@pytest.fixture(autouse=True)
def name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the resolver by one that knows only the names in `NAMES`. Numeric addresses are parsed as usual, so no request leaves the machine."""
    resolve = socket.getaddrinfo

    def look_up(host: str, port: Any, *args: Any, **options: Any) -> list[Any]:
        if host in NAMES:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in NAMES[host]]
        if any(letter.isalpha() for letter in host) and ":" not in host and not host.startswith("0x"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return list(resolve(host, port, *args, **options))

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    ("address", "is_forbidden"),
    [
        ("169.254.169.254", True), ("169.254.0.1", True), ("100.100.100.200", True), ("168.63.129.16", True), ("fd00:ec2::254", True), ("fe80::1%eth0", True),
        ("fd20:ce::254", True), ("::ffff:169.254.169.254", True), ("64:ff9b::a9fe:a9fe", True), ("2002:a9fe:a9fe::1", True),
        ("10.0.0.1", False), ("127.0.0.1", False), ("203.0.113.9", False), ("fd00::1", False), ("::1", False), ("64:ff9b::1.2.3.4", False),
        ("::ffff:10.0.0.1", False), ("100.100.100.201", False),
    ],
)  # fmt: skip
def test_metadata_and_link_local_addresses_are_recognised(address: str, is_forbidden: bool) -> None:
    assert is_metadata_address(address) is is_forbidden


@pytest.mark.parametrize(
    ("url", "expected_text"),
    [
        ("http://169.254.169.254/latest", "169.254.169.254"), ("http://2852039166", "2852039166, which is 169.254.169.254"),
        ("http://0xA9FEA9FE:80/x", "0xa9fea9fe, which is 169.254.169.254"), ("http://0251.0376.0251.0376", "0251.0376.0251.0376, which is 169.254.169.254"),
        ("http://169.254.43518", "169.254.43518, which is 169.254.169.254"),
        ("https://[::ffff:a9fe:a9fe]/", "::ffff:a9fe:a9fe, which is ::ffff:169.254.169.254"),
        ("http://user:word@169.254.169.254", "169.254.169.254"), ("http://rebound.example.com:9000", "rebound.example.com, which is 169.254.169.254"),
        ("http://v6.example.com", "v6.example.com, which is fd00:ec2::254"), ("http://METADATA.google.internal./x", "metadata.google.internal"),
    ],
)  # fmt: skip
def test_the_message_names_field_host_and_address(url: str, expected_text: str) -> None:
    with pytest.raises(ConfigError) as error:
        refuse_metadata_address(url, "storage.endpoint")
    assert error.value.code == "AddressForbidden"
    assert error.value.message == f"storage.endpoint leads to {expected_text}: at such link-local addresses, clouds serve the credentials of the node"
    assert "word" not in error.value.message


@pytest.mark.parametrize(
    "url", ["http://good.example.com:9000", "http://unknown.example.com", "http://127.0.0.1:9000", "no url", "http://[", "http://10.0.0.1", ""]
)
def test_other_addresses_and_unknown_names_are_not_refused(url: str) -> None:
    refuse_metadata_address(url, "storage.endpoint")


@pytest.mark.parametrize("prefix", ["", "MODEL_", "DATASET_"])
def test_an_s3_endpoint_is_checked(prefix: str) -> None:
    field = {"": "storage", "MODEL_": "model.storage", "DATASET_": "dataset.storage"}[prefix]
    with pytest.raises(ConfigError, match=f"^AddressForbidden: {field}.endpoint leads to rebound.example.com"):
        S3Store(StoreTarget(uri="s3://bucket/x", endpoint="http://rebound.example.com", credentials_prefix=prefix))


def test_the_endpoint_of_an_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://2852039166")
    with pytest.raises(ConfigError, match="storage.endpoint leads to 2852039166"):
        S3Store(StoreTarget(uri="s3://bucket/x"))


def test_a_web_source_is_checked() -> None:
    with pytest.raises(ConfigError) as error:
        WebStore(StoreTarget(uri="https://rebound.example.com/model?signature=hidden"))
    assert error.value.code == "AddressForbidden" and "hidden" not in str(error.value)


def test_a_judge_is_checked() -> None:
    with pytest.raises(ConfigError, match="^AddressForbidden: evaluation.judge.endpoint leads to v6.example.com"):
        Judge(JudgeSettings(base_url="http://v6.example.com/v1", model="m", api_key="k"))


def test_an_mlflow_server_is_checked() -> None:
    run = TrackedRun.model_construct(**{"name": "run", "project": "p"})
    with pytest.raises(TrackerError, match="^tracking.mlflow.trackingUri leads to 2852039166"):
        Mlflow(run, "http://2852039166", None).open()
