"""A fetch downloads all files of a source or only named ones, every failure has a code, and no message contains the signature of a URL.

The tests download web sources from a real server.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import CredentialsError, FineTuneError, StorageError
from finetune_api.names import FailureClass
from finetune_api.pod import StoreTarget
from finetune_api.sources import S3Source
from finetune_trainer.checkpoint.manifest import Manifest, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.model_cache.record import CachedModel
from finetune_trainer.storage.base import ObjectStat
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import MAX_TRIES
from finetune_trainer.supervisor.fetch import (
    DATA_SOURCE,
    MODEL_WITHOUT_WEIGHTS,
    FetchedSource,
    Fetcher,
    S3Listing,
    compute_fingerprint,
)
from web_server import Fault, WebServer

SECRET_QUERY = "?X-Amz-Signature=hidden-word"


@pytest.fixture
def fetcher(tmp_path: Path, server: WebServer) -> Fetcher:
    storage = StoreTarget(uri="s3://bucket/root", ca_bundle=server.ca)
    (server.folder / "sets").mkdir()
    (server.folder / "sets/rows.jsonl").write_bytes(b"0123456789")
    run: Any = SimpleNamespace(model_store=None, dataset_store=None, storage=storage)
    return Fetcher(run, tmp_path / "work")


def catch_fetch_error(fetcher: Fetcher, url: str) -> FineTuneError:
    with pytest.raises(FineTuneError) as caught:
        fetcher.fetch_data_files(url + SECRET_QUERY, "dataset.train", "train")
    assert "hidden-word" not in str(caught.value) and "dataset.train" in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("faults", "exit_code", "code", "text"),
    [
        ([Fault(404)], 66, "DatasetNotFound", "answers 404"),
        ([Fault(410)], 66, "DatasetNotFound", "answers 410"),
        ([Fault(403)], 77, "PermissionDenied", "answers 403"),
        ([Fault(503)] * MAX_TRIES, 69, "DownloadFailed", "answers 503"),
        ([Fault(headers={"Content-Length": "20"}, cut_bytes=10)] * MAX_TRIES, 69, "DownloadBroken", "10 of 20 bytes"),
    ],
)
def test_an_error_response_is_converted_to_an_error_with_a_code(
    fetcher: Fetcher, server: WebServer, faults: list[Fault], exit_code: int, code: str, text: str
) -> None:
    server.serves_ranges, server.faults = False, faults
    error = catch_fetch_error(fetcher, f"{server.url}/sets/rows.jsonl")
    failure_class = FailureClass.STORAGE if exit_code == 69 else FailureClass.DATA
    assert (error.exit_code, error.code, error.failure_class) == (exit_code, code, failure_class) and text in error.message


@pytest.mark.parametrize(
    ("interruption", "code", "text"),
    [
        (http.client.IncompleteRead(b""), "DownloadBroken", "IncompleteRead"),
        (ssl.SSLEOFError("cut"), "EndpointUnreachable", "SSLEOFError"),
        (TimeoutError(), "EndpointUnreachable", "TimeoutError"),
        (ConnectionResetError(), "EndpointUnreachable", "ConnectionResetError"),
        (OSError(errno.ENOSPC, "No space left on device"), "LocalDiskFull", "local disk"),
    ],
)
def test_an_interrupted_download_is_an_error_with_a_code(
    fetcher: Fetcher, server: WebServer, monkeypatch: pytest.MonkeyPatch, interruption: Exception, code: str, text: str
) -> None:
    from urllib3 import HTTPResponse
    from urllib3.exceptions import ProtocolError, ReadTimeoutError, SSLError

    def stream(*_: object, **__: object) -> Iterator[bytes]:
        yield b"01234"
        if isinstance(interruption, ssl.SSLError):
            raise SSLError(interruption) from interruption
        if isinstance(interruption, TimeoutError):
            raise ReadTimeoutError(None, None, "Read timed out.") from interruption  # type: ignore[arg-type] # urllib3 accepts None here
        if isinstance(interruption, http.client.HTTPException | ConnectionError):
            raise ProtocolError("Connection broken", interruption) from interruption
        raise interruption

    monkeypatch.setattr(HTTPResponse, "stream", stream)
    server.serves_ranges, server.faults = False, [Fault(headers={"Content-Length": "0"})] * MAX_TRIES
    error = catch_fetch_error(fetcher, f"{server.url}/sets/rows.jsonl")
    assert (error.exit_code, error.code) == (69, code) and text in error.message


def test_an_untrusted_certificate_is_reported(fetcher: Fetcher, server: WebServer) -> None:
    fetcher.run.storage = StoreTarget(uri="s3://bucket/root")  # type: ignore[misc] # this fake run is not frozen
    error = catch_fetch_error(fetcher, f"{server.url}/sets/rows.jsonl")
    assert (error.exit_code, error.code) == (69, "EndpointUnreachable") and "SSLCertVerificationError" in error.message


@pytest.mark.parametrize(
    "url", ["https://host:port/rows.jsonl", "https://host:99999/x", "https://[half/x", "https://bad..host/x"]
)
def test_an_invalid_url_is_refused(fetcher: Fetcher, url: str) -> None:
    error = catch_fetch_error(fetcher, url)
    assert (error.exit_code, error.code) == (64, "SourceInvalid") and "host" in str(error)


def test_a_web_file_keeps_its_name(fetcher: Fetcher, server: WebServer, tmp_path: Path) -> None:
    chunk_sizes: list[int] = []
    fetcher.byte_counter = chunk_sizes.append
    server.faults = [Fault(503)]
    (file,) = fetcher.fetch_data_files(f"{server.url}/sets/rows.jsonl{SECRET_QUERY}", "dataset.train", "train")
    assert (file.name, file.read_bytes(), sum(chunk_sizes)) == ("rows.jsonl", b"0123456789", 10)
    assert server.requests == [f"GET /sets/rows.jsonl{SECRET_QUERY}"] * 2
    assert fetcher.digests.get_known_sha256(file) == hashlib.sha256(b"0123456789").hexdigest()


def test_a_file_larger_than_the_disk_is_not_downloaded(
    fetcher: Fetcher, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.supervisor.fetch.free_bytes", lambda path: 0)
    error = catch_fetch_error(fetcher, f"{server.url}/sets/rows.jsonl")
    assert (error.exit_code, error.code) == (64, "LocalDiskTooSmall")


@pytest.fixture
def storage_url(fetcher: Fetcher, server: WebServer, tmp_path: Path) -> str:
    """Return the URL of a job's folder that contains a committed checkpoint and a committed model."""
    tree = CheckpointTree(open_store(StoreTarget(uri=f"file://{server.folder}/root")))
    for step in (100, None):
        staged_folder = tmp_path / f"staged-{step}"
        (staged_folder / "sub").mkdir(parents=True)
        (staged_folder / "config.json").write_text("{}")
        (staged_folder / "sub/weights").write_text(f"weights of {step}")
        files = tree.upload(checkpoint_folder_key(step), "a1-00000000", staged_folder)
        tree.commit(checkpoint_folder_key(step), Manifest(step=step or 100, incarnation="a1-00000000", files=files))
    return f"{server.url}/root"


@pytest.mark.parametrize(
    ("path", "expected_step"),
    [("model", "None"), ("model/a1-00000000", "None"), ("checkpoints/step-00000100", "100")],
)
def test_a_committed_model_is_read_by_its_manifest(fetcher: Fetcher, storage_url: str, path: str, expected_step: str) -> None:
    model = fetcher.fetch_model(f"{storage_url}/{path}{SECRET_QUERY}", "model.source", "model")
    assert (model.path / "sub/weights").read_text() == f"weights of {expected_step}"
    assert all(fetcher.digests.get_known_sha256(model.path / name) == sha256_file(model.path / name) for name in ("config.json", "sub/weights"))


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("model", "ModelInvalid", "a1-00000000/sub/weights is damaged"),
        ("checkpoints/step-00000200", "ModelNotFound", "no _COMMITTED"),
        ("weights.gguf", "ModelInvalid", "a web server has no listing"),
    ],
)
def test_the_error_message_for_a_model_does_not_show_the_signature(
    fetcher: Fetcher, storage_url: str, server: WebServer, path: str, code: str, message: str
) -> None:
    (server.folder / "root/model/a1-00000000/sub/weights").write_text("weights of Nome")
    with pytest.raises(FineTuneError) as caught:
        fetcher.fetch_model(f"{storage_url}/{path}{SECRET_QUERY}", "model.source", "model")
    error = caught.value
    assert (error.exit_code, error.code, error.failure_class) == (66, code, FailureClass.MODEL)
    assert message in error.message and "model.source" in error.message and "hidden-word" not in str(error)


class ObjectStore(FolderStore):
    """A folder store in which, as in S3, a folder is not an object."""

    def stat(self, key: str) -> ObjectStat | None:
        return super().stat(key) if (self.root / key).is_file() else None


@pytest.fixture
def local_fetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetcher:
    """A fetcher whose buckets are folders."""
    run: Any = SimpleNamespace(model_store=None, dataset_store=None, storage=StoreTarget(uri="pvc://c/x"))
    fetcher = Fetcher(run, tmp_path / "work")
    monkeypatch.setattr(fetcher, "_open_store", lambda bucket, kind, **_: ObjectStore(tmp_path / bucket, f"s3://{bucket}"))
    return fetcher


def write_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("s3://bucket/data/a.jsonl", ["a.jsonl"]),
        ("s3://bucket/data", ["a.jsonl", "inner/b.csv"]),
        ("s3://bucket", ["data/a.jsonl", "data/inner/b.csv", "database/c.jsonl"]),
    ],
)
def test_an_s3_source_is_one_object_or_all_objects_below_a_key(local_fetcher: Fetcher, tmp_path: Path, source: str, files: list[str]) -> None:
    write_files(tmp_path / "bucket", "data/a.jsonl", "data/inner/b.csv", "database/c.jsonl")
    data_files = local_fetcher.fetch_data_files(source, "dataset.train", "train")
    assert [file.relative_to(tmp_path / "work/fetched/train").as_posix() for file in data_files] == files
    assert [file.read_text().rpartition("/")[2] for file in data_files] == [name.rpartition("/")[2] for name in files]
    assert [local_fetcher.digests.get_known_sha256(file) for file in data_files] == [sha256_file(file) for file in data_files]


@pytest.mark.parametrize("source", ["s3://bucket/missing", "file:///missing", "s3://bucket/dat"])
def test_a_missing_source_is_an_error_that_names_its_field(local_fetcher: Fetcher, tmp_path: Path, source: str) -> None:
    write_files(tmp_path / "bucket", "data/a.jsonl")
    with pytest.raises(FineTuneError, match="does not exist") as caught:
        local_fetcher.fetch_data_files(source, "dataset.train", "train")
    assert (caught.value.code, caught.value.exit_code, caught.value.hint) == ("DatasetNotFound", 66, "correct dataset.train")


@pytest.mark.parametrize(("free_bytes", "is_refused"), [(64 * 1024**2 + 16, True), (64 * 1024**2 + 17, False)])
def test_a_reserve_of_64_mebibytes_stays_free(
    local_fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, is_refused: bool
) -> None:
    write_files(tmp_path / "bucket", "one.jsonl")
    monkeypatch.setattr("finetune_trainer.supervisor.fetch.free_bytes", lambda path: free_bytes)
    if not is_refused:
        assert len(local_fetcher.fetch_data_files("s3://bucket/one.jsonl", "dataset.train", "train")) == 1
        return
    with pytest.raises(FineTuneError, match=r"needs 0.00 GB, but the pod's disk has only 0.07 GB left"):
        local_fetcher.fetch_data_files("s3://bucket/one.jsonl", "dataset.train", "train")


def test_a_model_is_a_folder_with_a_configuration(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "bucket", "m/config.json", "m/w.safetensors", "weights/c", "weights/b", "weights/a", "weights/d", "weights/e", "weights/f")
    model = local_fetcher.fetch_model("s3://bucket/m", "model.source", "model")
    assert (model.path, model.hub_revision) == (tmp_path / "work/fetched/model", None)
    for source, text in (("s3://bucket/m/config.json", "which is a file"), (f"file://{tmp_path}/bucket/weights", r"\(it holds a, b, c, d, e\)")):
        with pytest.raises(FineTuneError, match=text) as caught:
            local_fetcher.fetch_model(source, "model.source", "other")
        assert (caught.value.code, caught.value.failure_class) == ("ModelInvalid", FailureClass.MODEL)


def test_images_next_to_the_data_files_are_not_data_files(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "bucket", "d/rows.jsonl", "d/pictures/a.png", "d/b.JPG")
    assert [file.name for file in local_fetcher.fetch_data_files("s3://bucket/d", "dataset.train", "train")] == ["rows.jsonl"]
    assert (tmp_path / "work/fetched/train/pictures/a.png").exists() and (tmp_path / "work/fetched/train/b.JPG").exists()


def test_the_source_of_the_images_must_be_a_folder(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "bucket", "i/a.png", "i/deep/b.png")
    folder = local_fetcher.fetch_image_folder("s3://bucket/i", "dataset.images.root", "images")
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png")) == ["a.png", "deep/b.png"]
    with pytest.raises(FineTuneError, match="which is a file, but a folder is needed") as caught:
        local_fetcher.fetch_image_folder("s3://bucket/i/a.png", "dataset.images.root", "other")
    assert (caught.value.code, caught.value.failure_class) == ("ImagesNotFound", FailureClass.DATA)


def test_mounted_sources_are_used_in_place(local_fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.supervisor.fetch.PVC_MOUNT", str(tmp_path / "pvc"))
    monkeypatch.setattr("finetune_trainer.supervisor.fetch.CONFIGMAP_MOUNT", str(tmp_path / "maps"))
    write_files(tmp_path, "pvc/claim/d/b.csv", "pvc/claim/d/a.jsonl", "pvc/claim/d/ignored.bin", "maps/m/rows.jsonl")
    assert [file.name for file in local_fetcher.fetch_data_files("pvc://claim/d", "dataset.train", "train")] == ["a.jsonl", "b.csv"]
    assert local_fetcher.fetch_data_files("configmap://m/rows.jsonl", "dataset.train", "train") == [tmp_path / "maps/m/rows.jsonl"]
    assert local_fetcher.digests.get_known_sha256(tmp_path / "maps/m/rows.jsonl") is None
    (tmp_path / "pvc/claim/empty").mkdir()
    with pytest.raises(FineTuneError, match="holds no data file"):
        local_fetcher.fetch_data_files("pvc://claim/empty", "dataset.train", "train")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ("GatedRepoError", "DatasetGated", "a/b@v1, which is gated"),
        ("RevisionNotFoundError", "DatasetNotFound", "a/b@v1, which has no such revision"),
        ("RepositoryNotFoundError", "DatasetNotFound", "a/b@v1, which is not on the hub"),
        ("HFValidationError", "DatasetNotFound", "a/b@v1, which is not on the hub"),
        ("LocalEntryNotFoundError", "HubUnreachable", "a/b@v1, but the model hub could not be reached (LocalEntryNotFoundError)"),
    ],
)
def test_a_failure_of_the_hub_is_an_error_with_a_code(local_fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, error: str, code: str, text: str) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        error_type = getattr(huggingface_hub.errors, error)
        raise error_type.__new__(error_type, "no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FineTuneError) as caught:
        local_fetcher.fetch_data_files("hf://a/b@v1", "dataset.train", "train")
    assert caught.value.code == code and text in caught.value.message


def test_a_hub_model_has_the_revision_of_its_snapshot(local_fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    call_options: dict[str, Any] = {}

    def download(repository: str, **download_options: Any) -> str:
        call_options.update(download_options, repository=repository)
        write_files(tmp_path / "0123abc", "config.json")
        return str(tmp_path / "0123abc")

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_fetcher.fetch_model("a/b", "model.source", "model").hub_revision == "0123abc"
    assert (call_options["repository"], call_options["revision"], call_options["repo_type"], call_options["token"]) == ("a/b", None, "model", False)
    assert call_options["cache_dir"] == tmp_path / "work/hub"


MEBIBYTE = 1024**2


@pytest.mark.parametrize(
    ("size", "changed_byte", "is_noticed"),
    [
        (8 * MEBIBYTE, 4 * MEBIBYTE, True), (8 * MEBIBYTE + 1, 4 * MEBIBYTE, False), (9 * MEBIBYTE, MEBIBYTE - 1, True),
        (9 * MEBIBYTE, MEBIBYTE, False), (9 * MEBIBYTE, 8 * MEBIBYTE - 1, False), (9 * MEBIBYTE, 8 * MEBIBYTE, True), (9 * MEBIBYTE, 9 * MEBIBYTE, True),
    ],
)  # fmt: skip
def test_a_fingerprint_covers_small_files_and_the_ends_of_large_files(tmp_path: Path, size: int, changed_byte: int, is_noticed: bool) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(size)
    fingerprint_before = compute_fingerprint(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(changed_byte)
        stream.write(b"x")
    assert fingerprint_before.startswith("sha256:") and len(fingerprint_before) == len("sha256:") + 64
    assert (compute_fingerprint(tmp_path) != fingerprint_before) is is_noticed


# ---- models that the init container provides ----


def make_cached_model(folder: Path, **fields: Any) -> CachedModel:
    defaults: dict[str, Any] = {"source": "a/b", "path": folder, "from_cache": True, "size": 3, "hub_revision": "abc", "sha256": {"config.json": "0" * 64}}
    return CachedModel(**(defaults | fields))


def fetch_with_cached_model(local_fetcher: Fetcher, cached_model: CachedModel, source: str = "a/b") -> tuple[FetchedSource, Fetcher]:
    fetcher = Fetcher(local_fetcher.run, local_fetcher.work_folder, cached_models={"model.source": cached_model})
    return fetcher.fetch_model(source, "model.source", "model"), fetcher


@pytest.mark.usefixtures("refuse_downloads")
def test_a_cached_model_is_not_downloaded(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "cached", "config.json", "model.safetensors")
    fetched_model, fetcher = fetch_with_cached_model(local_fetcher, make_cached_model(tmp_path / "cached"))
    assert (fetched_model.path, fetched_model.hub_revision, fetched_model.source_version) == (tmp_path / "cached", "abc", "abc")
    assert fetcher.source_versions == {"model.source": "abc"} and list(fetcher.models_from_cache) == ["model.source"]
    assert fetcher.digests.get_known_sha256(tmp_path / "cached/config.json") == "0" * 64


@pytest.fixture
def refuse_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("a download")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("refuse_downloads")
@pytest.mark.parametrize("change", [{"source": "a/c"}, {"path": Path("/nonexistent")}, {"in_use_file": Path("/nonexistent")}])
def test_a_model_is_downloaded_if_the_cached_one_is_gone_or_has_another_source(local_fetcher: Fetcher, tmp_path: Path, change: dict[str, Any]) -> None:
    write_files(tmp_path / "cached", "config.json")
    with pytest.raises(FineTuneError, match="HubUnreachable"):
        fetch_with_cached_model(local_fetcher, make_cached_model(tmp_path / "cached", **change))


@pytest.mark.usefixtures("refuse_downloads")
def test_a_preparation_without_weights_does_not_use_cached_models(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "cached", "config.json")
    cached_models = {"model.source": make_cached_model(tmp_path / "cached")}
    fetcher = Fetcher(local_fetcher.run, local_fetcher.work_folder, cached_models=cached_models, model_kind=MODEL_WITHOUT_WEIGHTS)
    with pytest.raises(FineTuneError, match="HubUnreachable"):
        fetcher.fetch_model("a/b", "model.source", "model")


# ---- preparations without weights ----


@pytest.fixture
def fetcher_without_weights(local_fetcher: Fetcher) -> Fetcher:
    """A fetcher of a preparation, which needs no weights."""
    fetcher = Fetcher(local_fetcher.run, local_fetcher.work_folder, model_kind=MODEL_WITHOUT_WEIGHTS)
    fetcher._open_store = local_fetcher._open_store  # type: ignore[method-assign]
    return fetcher


def write_index(folder: Path, *names: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"layer{number}": name for number, name in enumerate(names)}}))


def test_only_the_weights_are_left_out(fetcher_without_weights: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "bucket", "m/config.json", "m/W.SAFETENSORS", "m/w-2.safetensors", "m/tokenizer.json")
    fetched_model = fetcher_without_weights.fetch_model("s3://bucket/m", "model.source", "model")
    assert sorted(path.name for path in fetched_model.path.iterdir()) == ["config.json", "tokenizer.json"]
    assert fetched_model.skipped_names == {"W.SAFETENSORS", "w-2.safetensors"}
    assert fetched_model.source_version == fetched_model.listing_version != compute_fingerprint(fetched_model.path)
    local_model = fetcher_without_weights.fetch_model(f"file://{tmp_path}/bucket/m", "model.source", "model")
    assert (local_model.skipped_names, local_model.source_version) == (frozenset(), compute_fingerprint(local_model.path))


@pytest.mark.parametrize(
    ("file_names", "listed_names", "problem"),
    [
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], None),
        (["a.safetensors"], ["b.safetensors", "a.safetensors"], "lacks b.safetensors, which model.safetensors.index.json lists"),
        (["model.safetensors"], ["b.safetensors"], None),
        (["w.bin"], [], None),
        (["w.pt"], [], r"holds no weights (*.safetensors or *.bin)"),
    ],
    ids=["complete", "a listed file is missing", "a single file makes the index unused", "without an index", "no file that can be loaded"],
)
def test_a_model_without_all_its_weights_is_refused_although_they_are_not_downloaded(
    fetcher_without_weights: Fetcher, tmp_path: Path, file_names: list[str], listed_names: list[str], problem: str | None
) -> None:
    write_files(tmp_path / "bucket", "m/config.json", *(f"m/{name}" for name in file_names))
    if listed_names:
        write_index(tmp_path / "bucket/m", *listed_names)
    if problem is None:
        assert fetcher_without_weights.fetch_model("s3://bucket/m", "model.source", "model").skipped_names == set(file_names)
        return
    with pytest.raises(FineTuneError) as caught:
        fetcher_without_weights.fetch_model("s3://bucket/m", "model.source", "model")
    assert (caught.value.code, caught.value.failure_class) == ("ModelIncomplete", FailureClass.MODEL)
    assert caught.value.message == f"model.source is s3://bucket/m, which {problem}"


# ---- S3: folder markers, credentials and stores ----


def test_empty_files_are_data_but_folder_markers_are_not(local_fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = [ObjectStat(key, size, "") for key, size in (("d/", 0), ("d/empty.jsonl", 0), ("d/full/", 3), ("d/rows.jsonl", 2))]
    store: Any = SimpleNamespace(stat=lambda key: None, list=lambda prefix: stats if prefix == "d/" else [], close=lambda: None)
    monkeypatch.setattr(local_fetcher, "_open_store", lambda bucket, kind, **_: store)
    listing = local_fetcher.list_s3(S3Source(bucket="bucket", key="d"), DATA_SOURCE)
    assert [stat.key for stat in listing.needed_objects] == ["d/empty.jsonl", "d/full/", "d/rows.jsonl"]
    assert listing.is_single_object is False
    assert S3Listing(listing.source, stats[:1], stats[:1]).is_single_object is False


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (CredentialsError("PermissionDenied", "no", failure_class=FailureClass.STORAGE), FailureClass.DATA),
        (CredentialsError("PermissionDenied", "no", failure_class=FailureClass.USER), FailureClass.USER),
        (StorageError("EndpointUnreachable", "no"), FailureClass.STORAGE),
    ],
    ids=["credentials of the source", "credentials of another class", "storage that does not answer"],
)
def test_refused_credentials_count_as_a_problem_of_the_source(
    local_fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, error: FineTuneError, failure_class: FailureClass
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(local_fetcher, "list_s3", refuse)
    with pytest.raises(FineTuneError) as caught:
        local_fetcher.fetch_data_files("s3://bucket/d", "dataset.train", "train")
    assert caught.value.failure_class is failure_class


@pytest.mark.parametrize(
    ("own_store", "storage_uri", "endpoint"),
    [
        (StoreTarget(uri="s3://x", endpoint="https://own"), "s3://bucket/root", "https://own"),
        (None, "s3://bucket/root", "https://storage"),
        (None, "pvc://claim/root", None),
    ],
    ids=["connection of the data set", "connection of the storage", "storage is no S3"],
)
def test_a_bucket_is_read_with_the_connection_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_store: StoreTarget | None, storage_uri: str, endpoint: str | None
) -> None:
    opened_targets: list[StoreTarget] = []
    monkeypatch.setattr("finetune_trainer.supervisor.fetch.S3Store", lambda target, **_: opened_targets.append(target))
    run: Any = SimpleNamespace(model_store=None, dataset_store=own_store, storage=StoreTarget(uri=storage_uri, endpoint="https://storage"))
    Fetcher(run, tmp_path)._open_store("data", DATA_SOURCE)
    assert [(target.uri, target.endpoint) for target in opened_targets] == [("s3://data", endpoint)]


def test_only_benchmarks_have_the_version_of_their_folder(local_fetcher: Fetcher, tmp_path: Path) -> None:
    write_files(tmp_path / "bucket", "i/a.png", "b/tasks.yaml")
    local_fetcher.fetch_image_folder("s3://bucket/i", "dataset.images.root", "images")
    local_fetcher.fetch_folder("s3://bucket/b", "evaluation.benchmarks[0].folder", "benchmark")
    assert list(local_fetcher.source_versions) == ["evaluation.benchmarks[0].folder"]
