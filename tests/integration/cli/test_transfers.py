"""The commands `upload` and `download` against a real S3 server: interrupted transfers, damaged files, incomplete checkpoints, and copies of
checkpoints in another bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from finetune_cli import downloads, uploads
from finetune_cli.job_storage import ConnectionLost, JobStorage
from finetune_cli.transfers import PART_BYTES

from localcluster import S3Endpoint
from tests.integration.cli.conftest import Result
from tests.support.kubeapi import KubeApi
from tests.support.store_features import IGNORED, MD5, UNKNOWN_KEY, read_result_of_chosen_store

Finetune = Callable[..., Result]
BYTES = 2 * PART_BYTES + 1000
DATA = bytes(range(251)) * (BYTES // 251 + 1)
DATA = DATA[:BYTES]


@pytest.fixture
def bucket(s3_server: S3Endpoint, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Create a bucket for this test. The commands read the bucket's server and access keys from the AWS_* environment variables."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    client = s3_server.client()
    client.create_bucket(Bucket=f"transfer-{namespace}")
    return Bucket(client, f"transfer-{namespace}")


class Bucket:
    """A bucket whose objects a test can read, write and list."""

    def __init__(self, client: Any, name: str):
        self.client, self.name = client, name
        self.uri = f"s3://{name}"

    def list_keys(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents") or []]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def list_unfinished_uploads(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads") or []]


def run_json(finetune: Finetune, *words: str) -> dict[str, Any]:
    """Run a command with `-o json`, and return the JSON object that it prints."""
    result = finetune(*words, "-o", "json")
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


def write_commit(bucket: Bucket, folder: str, data: bytes, **fields: Any) -> None:
    """Write a committed folder with the file `w.bin`, as the trainer would."""
    entry = {"path": "w.bin", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = json.dumps({"files": [entry], "incarnation": "a2-1f3c9a2b", "attempt": 2, **fields}).encode()
    marker = {"attempt": 2, "path": "a2-1f3c9a2b", "manifestSha256": hashlib.sha256(manifest).hexdigest()}
    bucket.write(f"{folder}/a2-1f3c9a2b/w.bin", data)
    bucket.write(f"{folder}/a2-1f3c9a2b/manifest.json", manifest)
    bucket.write(f"{folder}/_COMMITTED", json.dumps(marker).encode())


# --- upload ---------------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_are_uploaded(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    data_file = tmp_path / "train.jsonl"
    data_file.write_bytes(DATA)
    result = finetune("upload", str(data_file), f"{bucket.uri}/team/")
    assert (result.code, result.out) == (0, f"{bucket.uri}/team/train.jsonl: 1 file, 16.0 MiB\n")
    assert f"write `dataset.train: {bucket.uri}/team/train.jsonl`" in result.err
    assert bucket.read("team/train.jsonl") == DATA
    second_result = finetune("upload", str(data_file), f"{bucket.uri}/team/train.jsonl")
    assert second_result.out == f"{bucket.uri}/team/train.jsonl: 1 file, 16.0 MiB (1 unchanged)\n"
    model_folder = tmp_path / "model"
    (model_folder / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub/tokenizer.json", "half.bin.part"):
        (model_folder / name).write_text(name)
    assert [Path(file["path"]).name for file in run_json(finetune, "upload", str(model_folder), f"{bucket.uri}/m")["files"]] == [
        "model.safetensors", "tokenizer.json", "config.json",
    ]  # fmt: skip
    assert bucket.list_keys() == ["m/config.json", "m/model.safetensors", "m/sub/tokenizer.json", "team/train.jsonl"]


def test_an_interrupted_upload_continues_and_no_incomplete_object_is_visible(
    finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(DATA)
    words = ("upload", str(path), f"{bucket.uri}/t.jsonl")
    sent_part_numbers: list[int] = []
    with monkeypatch.context() as patch:
        break_uploads(patch, sent_part_numbers, allowed_parts=2)
        result = finetune(*words)
    assert result.code == 1
    assert "run the same command again to continue it" in result.err
    assert (bucket.list_keys(), bucket.list_unfinished_uploads()) == ([], ["t.jsonl"])
    with monkeypatch.context() as patch:
        sent_part_numbers.clear()
        break_uploads(patch, sent_part_numbers, allowed_parts=99)
        (file,) = run_json(finetune, *words)["files"]
    assert (sent_part_numbers, file["state"], file["sha256"]) == ([3], "resumed", hashlib.sha256(DATA).hexdigest())
    assert (bucket.read("t.jsonl") == DATA, bucket.list_unfinished_uploads()) == (True, [])


def break_uploads(patch: pytest.MonkeyPatch, sent_part_numbers: list[int], *, allowed_parts: int) -> None:
    """Record the numbers of the uploaded parts in `sent_part_numbers`. After `allowed_parts` parts, the connection is lost at every further part."""
    patch.setattr(uploads, "PARALLEL_TRANSFERS", 1)
    original_init = uploads.MultipartUpload.__init__

    def init_and_record_parts(self: uploads.MultipartUpload, storage: JobStorage, *rest: Any) -> None:
        original_init(self, storage, *rest)
        upload_part = storage.client.upload_part

        def upload_and_record_part(**options: Any) -> Any:
            if len(sent_part_numbers) >= allowed_parts:
                raise ConnectionLost("the connection is lost")
            sent_part_numbers.append(options["PartNumber"])
            return upload_part(**options)

        storage.client.upload_part = upload_and_record_part

    patch.setattr(uploads.MultipartUpload, "__init__", init_and_record_parts)


def test_the_upload_of_a_changed_file_starts_again(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(DATA)
    words = ("upload", str(path), f"{bucket.uri}/t.jsonl")
    with monkeypatch.context() as patch:
        break_uploads(patch, [], allowed_parts=1)
        assert finetune(*words).code == 1
    path.write_bytes(b"x" + DATA[1:])
    (file,) = run_json(finetune, *words)["files"]
    assert file["state"] == "transferred"
    assert bucket.read("t.jsonl") == b"x" + DATA[1:]


@pytest.mark.skipif(read_result_of_chosen_store(MD5) == IGNORED, reason="this store does not compare digests")
def test_file_that_changes_during_the_upload_is_refused(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"first")
    digest_file = uploads.digest_file

    def digest_and_change(path: Path) -> Any:
        result = digest_file(path)
        path.write_bytes(b"other")
        return result

    monkeypatch.setattr(uploads, "digest_file", digest_and_change)
    result = finetune("upload", str(path), f"{bucket.uri}/t.jsonl")
    assert (result.code, "Digest" in result.err, bucket.list_keys()) == (1, True, [])


def test_the_access_keys_can_come_from_a_secret(
    finetune: Finetune, bucket: Bucket, s3_server: S3Endpoint, api: KubeApi, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.create("secrets", namespace, {
        "metadata": {"name": "s3"},
        "stringData": {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key},
    })  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes(b"{}")
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    words = ("upload", str(tmp_path / "t.jsonl"), f"{bucket.uri}/t.jsonl", "--endpoint", s3_server.host_url)
    result_without_keys = finetune(*words)
    assert (result_without_keys.code, "there are no S3 credentials" in result_without_keys.err) == (1, True)
    result = finetune(*words, "--secret", "s3")
    assert (result.code, s3_server.secret_key in result.out + result.err) == (0, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none", "s3://b/x"), "none: there is no such file or folder"),
        ((".", "b/x"), "b/x: write s3://bucket/folder, or file:///folder for a local folder"),
        ((".", "s3://"), "s3://: write s3://bucket/folder"),
        ((".", "s3://b/x", "--endpoint", "host:9000"), "--endpoint host:9000: write scheme and host"),
    ],
)
def test_wrong_arguments_of_upload_are_explained(finetune: Finetune, words: tuple[str, ...], message: str) -> None:
    result = finetune("upload", *words)
    assert (result.code, message in result.err) == (1, True), result


# --- download -------------------------------------------------------------------------------------------------------


def test_the_model_of_a_job_is_downloaded_and_verified(
    finetune: Finetune, bucket: Bucket, job: Callable[..., dict[str, Any]], namespace: str, tmp_path: Path, s3_server: S3Endpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    storage = {"uri": f"{bucket.uri}/root", "endpoint": s3_server.host_url}
    created_job = job(storage=storage, status={"latestCheckpointStep": 20})
    prefix = f"root/{namespace}/bot/{created_job['metadata']['uid']}"
    write_commit(bucket, f"{prefix}/model", b"weights", step=30, kind="adapter")
    write_commit(bucket, f"{prefix}/checkpoints/step-00000020", b"state", step=20)
    bucket.write(f"{prefix}/metrics/a.jsonl", b"{}")
    monkeypatch.chdir(tmp_path)
    result = finetune("download", "bot")
    assert (result.code, result.out) == (0, "bot-model: 1 file, 7 B, checked: sha256 of the manifest\n")
    assert (tmp_path / "bot-model/w.bin").read_bytes() == b"weights"
    assert json.loads((tmp_path / "bot-model/manifest.json").read_text())["step"] == 30
    assert finetune("download", "bot").out == "bot-model: 1 file, 7 B (1 unchanged), checked: sha256 of the manifest\n"
    assert finetune("download", "bot", "latest").out.startswith("bot-step-00000020: 1 file, 5 B")
    assert finetune("download", "bot", "metrics").out == "bot-metrics: 1 file, 2 B, checked: MD5 of the store\n"
    missing_checkpoint_result = finetune("download", "bot", "40")
    assert "checkpoints/step-00000040 is not committed below s3://" in missing_checkpoint_result.err
    assert "available: checkpoints/step-00000020, model" in missing_checkpoint_result.err
    assert "nonsense: unknown part of a job; write the step of a checkpoint, or one of model, latest," in finetune("download", "bot", "nonsense").err


def test_a_file_with_other_content_is_replaced_only_on_request(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    write_commit(bucket, "x/model", b"weights", step=1, kind="adapter")
    (tmp_path / "w.bin").write_bytes(b"my file")
    words = ("download", f"{bucket.uri}/x/model", "--to", str(tmp_path))
    refused_result = finetune(*words)
    assert (refused_result.code, "w.bin exists already with other content" in refused_result.err) == (1, True)
    assert (tmp_path / "w.bin").read_bytes() == b"my file"
    assert finetune(*words, "--overwrite").code == 0
    assert (tmp_path / "w.bin").read_bytes() == b"weights"


def test_a_damaged_download_is_not_stored_under_its_final_name(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    write_commit(bucket, "x/model", b"weights", step=1, kind="adapter")
    bucket.write("x/model/a2-1f3c9a2b/w.bin", b"WEIGHTS")
    result = finetune("download", f"{bucket.uri}/x/model/a2-1f3c9a2b", "--to", str(tmp_path / "out"))
    assert (result.code, "w.bin is damaged: the file has 7 bytes" in result.err) == (1, True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def lost_connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Break the connection of each download request after one chunk. Return a list to which each request adds the position of the first byte that it reads."""
    starts: list[int] = []
    read_chunks = JobStorage.read_chunks

    def read_one_chunk(self: JobStorage, key: str, start: int = 0, etag: str = "") -> Iterator[bytes]:
        starts.append(start)
        for chunk in read_chunks(self, key, start, etag):
            yield chunk
            raise ConnectionLost("the connection is lost")

    monkeypatch.setattr(JobStorage, "read_chunks", read_one_chunk)
    yield starts


def test_a_download_survives_lost_connections(finetune: Finetune, bucket: Bucket, tmp_path: Path, lost_connections: list[int]) -> None:
    bucket.write("d/t.bin", DATA[: 3 << 20])
    (file,) = run_json(finetune, "download", f"{bucket.uri}/d/t.bin", "--to", str(tmp_path))["files"]
    assert (lost_connections, file["check"]) == ([0, 1 << 20, 2 << 20], "etag")
    assert (tmp_path / "t.bin").read_bytes() == DATA[: 3 << 20]


@contextmanager
def lost_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every download fail, because its connection is lost."""
    read_chunks = JobStorage.read_chunks

    def lose(self: JobStorage, *arguments: Any) -> Iterator[bytes]:
        yield next(iter(read_chunks(self, *arguments)))
        raise ConnectionLost("the connection is lost")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "MAX_LOST_CONNECTIONS", 0)
        patch.setattr(JobStorage, "read_chunks", lose)
        yield


def test_an_interrupted_download_continues(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.bin"
    path.write_bytes(DATA)
    finetune("upload", str(path), f"{bucket.uri}/d/t.bin")
    words = ("download", f"{bucket.uri}/d/t.bin", "--to", str(tmp_path))
    start_positions: list[int] = []
    with lost_connection(monkeypatch):
        assert "run the same command again to continue it" in finetune(*words).err
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("t.bin")] == []
    read_chunks = JobStorage.read_chunks

    def read_and_record_start(self: JobStorage, key: str, start: int = 0, etag: str = "") -> Iterator[bytes]:
        start_positions.append(start)
        return read_chunks(self, key, start, etag)

    monkeypatch.setattr(JobStorage, "read_chunks", read_and_record_start)
    (file,) = run_json(finetune, *words)["files"]
    assert (start_positions, file["state"], file["check"]) == ([1 << 20], "resumed", "etag")
    assert (tmp_path / "t.bin").read_bytes() == DATA
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.bin", "t.bin"]


def test_a_partial_file_of_a_replaced_object_is_not_continued(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.write("d/t.bin", b"first " * 400_000)
    words = ("download", f"{bucket.uri}/d/t.bin", "--to", str(tmp_path))
    with lost_connection(monkeypatch):
        assert finetune(*words).code == 1
    bucket.write("d/t.bin", b"other " * 400_000)
    assert finetune(*words).code == 0
    assert (tmp_path / "t.bin").read_bytes() == b"other " * 400_000


def test_a_checkpoint_can_be_copied_to_another_bucket(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    write_commit(bucket, "x/checkpoints/step-00000400", b"state", step=400)
    assert finetune("download", f"{bucket.uri}/x/checkpoints/step-00000400", "--to", str(tmp_path / "c")).code == 0
    result = finetune("upload", str(tmp_path / "c"), f"{bucket.uri}/y")
    assert result.out == f"{bucket.uri}/y/checkpoints/step-00000400: 1 file, 5 B\n"
    assert f"write `checkpoint.resume: {bucket.uri}/y/checkpoints/step-00000400`" in result.err
    copied_keys = [key for key in bucket.list_keys() if key.startswith("y/")]
    assert copied_keys == [key.replace("x/", "y/", 1) for key in bucket.list_keys() if key.startswith("x/")]
    assert all(bucket.read(key) == bucket.read(key.replace("y/", "x/", 1)) for key in copied_keys if not key.endswith("_COMMITTED"))
    assert json.loads(bucket.read("y/checkpoints/step-00000400/_COMMITTED")) == json.loads(bucket.read("x/checkpoints/step-00000400/_COMMITTED"))
    (tmp_path / "c/w.bin").write_bytes(b"STATE")
    damaged_result = finetune("upload", str(tmp_path / "c"), f"{bucket.uri}/z")
    assert (damaged_result.code, "w.bin is damaged: its sha256 is" in damaged_result.err) == (1, True)
    assert [key for key in bucket.list_keys() if key.startswith("z/")] == []
    (tmp_path / "c/w.bin").unlink()
    assert "w.bin is missing, but" in finetune("upload", str(tmp_path / "c"), f"{bucket.uri}/z").err


def test_an_incomplete_checkpoint_gets_no_commit_marker(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    entries = []
    for name, data in (("a.bin", b"one"), ("b.bin", b"two")):
        (tmp_path / name).write_bytes(data)
        entries.append({"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = {"files": entries, "incarnation": "a1-00000000", "attempt": 1, "step": 5}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "b.bin").write_bytes(b"TWO")
    assert finetune("upload", str(tmp_path), f"{bucket.uri}/y").code == 1
    assert bucket.list_keys() == ["y/checkpoints/step-00000005/a1-00000000/a.bin"]
    (tmp_path / "b.bin").write_bytes(b"two")
    assert [file["state"] for file in run_json(finetune, "upload", str(tmp_path), f"{bucket.uri}/y")["files"]] == ["unchanged", "transferred"]
    assert "y/checkpoints/step-00000005/_COMMITTED" in bucket.list_keys()
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "attempt": 2}))
    other_checkpoint_result = finetune("upload", str(tmp_path), f"{bucket.uri}/y")
    assert (other_checkpoint_result.code, "already contains another checkpoint or model; choose another target" in other_checkpoint_result.err) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"incarnation": ".."}, "incarnation is '..'"), ({"step": "x"}, "step is 'x', which is not a number"),
        ({"files": {}}, "the manifest is damaged"), ({"files": [{"path": "a.bin", "size": 3}]}, "the manifest is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_not_uploaded(finetune: Finetune, bucket: Bucket, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    entry = {"path": "a.bin", "size": 3, "sha256": hashlib.sha256(b"one").hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": [entry], "incarnation": "a1-00000000", "attempt": 1, "step": 5} | change))
    result = finetune("upload", str(tmp_path), f"{bucket.uri}/w")
    assert (result.code, message in result.err) == (1, True), result.err
    assert [key for key in bucket.list_keys() if key.startswith("w/")] == []


def test_a_partial_file_that_is_too_long_starts_again(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.write("d/t.bin", DATA)
    words = ("download", f"{bucket.uri}/d/t.bin", "--to", str(tmp_path))
    with lost_connection(monkeypatch):
        assert finetune(*words).code == 1
    (partial_file,) = (path for path in tmp_path.iterdir() if path.is_file())
    partial_file.write_bytes(DATA + b"more")
    assert finetune(*words).code == 0
    assert (tmp_path / "t.bin").read_bytes() == DATA


def test_a_missing_object_is_reported(finetune: Finetune, bucket: Bucket, tmp_path: Path) -> None:
    result = finetune("download", f"{bucket.uri}/none", "--to", str(tmp_path))
    assert (result.code, f"{bucket.uri}/none: there is no object at this URI or below it" in result.err) == (1, True)
    assert "with a URI, remove the part of the job" in finetune("download", f"{bucket.uri}/x", "model").err
    assert "--secret is for a URI" in finetune("download", "bot", "--secret", "x").err


def test_an_unreachable_store_is_reported_with_the_hint_to_try_again(finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"{}")
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    result = finetune("upload", str(tmp_path / "t.jsonl"), "s3://data/t.jsonl", "--endpoint", "http://127.0.0.1:1")
    assert (result.code, "Could not connect" in result.err, "run the same command again to continue it" in result.err) == (1, True, True)


def test_local_folders_can_be_storage(finetune: Finetune, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"{}")
    uri = f"file://{tmp_path}/store"
    assert finetune("upload", str(tmp_path / "t.jsonl"), f"{uri}/a/").out == f"{uri}/a/t.jsonl: 1 file, 2 B\n"
    assert sorted(path.name for path in (tmp_path / "store").rglob("*")) == ["a", "t.jsonl"]
    target = tmp_path / "back"
    assert finetune("download", f"{uri}/a", "--to", str(target)).out == f"{target}: 1 file, 2 B, checked: MD5 of the store\n"
    assert finetune("download", f"{uri}/a", "--to", str(target)).out.startswith(f"{target}: 1 file, 2 B (1 unchanged)")


@pytest.mark.skipif(read_result_of_chosen_store(UNKNOWN_KEY) == IGNORED, reason="this store accepts every key")
def test_a_wrong_access_key_is_no_missing_permission(finetune: Finetune, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.write("t.jsonl", b"{}")
    (tmp_path / "t.jsonl").write_bytes(b"{}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    error_code = read_result_of_chosen_store(UNKNOWN_KEY).rstrip(")").split()[-1]
    for words in (("download", f"{bucket.uri}/t.jsonl"), ("upload", str(tmp_path / "t.jsonl"), f"{bucket.uri}/x.jsonl")):
        result = finetune(*words)
        assert (result.code, error_code in result.err) == (1, True), result
