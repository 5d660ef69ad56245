"""Downloads models and data to the local disk, from every kind of source that a spec supports. Local sources are used in place.

Each failure names the spec field and the source. Exit codes: 66 for a missing source (class Model or Data), 77 or 67 for a store
that refuses access, 69 for a store that cannot be reached.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from finetune_api.errors import ConfigError, CredentialsError, FineTuneError, NotFoundError, StorageError
from finetune_api.names import CONFIGMAP_MOUNT, PVC_MOUNT, Env, FailureClass
from finetune_api.pod import RunConfig, StoreTarget
from finetune_api.sources import (
    ConfigMapSource,
    FileSource,
    HttpsSource,
    HubSource,
    PvcSource,
    S3Source,
    parse_source,
    redact_source,
)

from finetune_trainer.checkpoint.address import download_committed, parse_address
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.disk import free_bytes
from finetune_trainer.model_cache.record import CachedModel
from finetune_trainer.storage.base import ByteCounter, ObjectStat
from finetune_trainer.storage.preflight import PREFLIGHT_OPTIONS
from finetune_trainer.storage.s3 import S3Store
from finetune_trainer.storage.web import WebStore
from finetune_trainer.supervisor.file_digests import FileDigests

DOWNLOAD_THREADS = 4
MODEL_FILE_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.bin", "*.tiktoken", "README.md")
DATA_FILE_PATTERNS = ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.parquet", "*.jsonl.gz")
SMALL_FILE_BYTES = 8 * 1024 * 1024
FINGERPRINT_EDGE_BYTES = 1024 * 1024
"""Number of bytes at the beginning and at the end of a large file that the fingerprint covers."""
RESERVE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class SourceKind:
    """The properties of one type of source, such as models: error codes, failure class, file names, type of hub repository."""

    noun: str
    error_code_prefix: str
    """The beginning of the error codes, such as `Model` in `ModelNotFound`."""
    failure_class: FailureClass
    file_patterns: tuple[str, ...]
    """Name patterns of the files that are downloaded from the hub."""
    repo_type: str
    skipped_endings: tuple[str, ...] = ()
    """Files whose names have one of these endings are not downloaded."""

    @property
    def is_model(self) -> bool:
        """Whether the source is a model, with or without its weights."""
        return self.repo_type == "model"

    def skips_file(self, name: str) -> bool:
        """Whether the file with this name or key is left out of the download."""
        return name.lower().endswith(self.skipped_endings) if self.skipped_endings else False


WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
LOADABLE_WEIGHT_ENDINGS = (".safetensors", ".bin")
SINGLE_WEIGHT_FILE = "model.safetensors"
WEIGHT_INDEX_FILE = "model.safetensors.index.json"
MODEL_SOURCE = SourceKind("model", "Model", FailureClass.MODEL, MODEL_FILE_PATTERNS, "model")
DATA_SOURCE = SourceKind("data set", "Dataset", FailureClass.DATA, DATA_FILE_PATTERNS, "dataset")
MODEL_WITHOUT_WEIGHTS = replace(MODEL_SOURCE, skipped_endings=WEIGHT_ENDINGS)
"""The type of a model source of which only the configuration and the tokenizer are needed."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File extensions of images. A folder with data files may also contain images."""
IMAGE_FILE_PATTERNS = tuple(f"*{suffix}" for lower_suffix in IMAGE_SUFFIXES for suffix in (lower_suffix, lower_suffix.upper()))
IMAGE_SOURCE = SourceKind("image folder", "Images", FailureClass.DATA, IMAGE_FILE_PATTERNS, "dataset")
BENCHMARK_SOURCE = SourceKind("benchmark", "Benchmark", FailureClass.DATA, (*DATA_FILE_PATTERNS, "*.yaml", "*_yaml", "*.md", "*.py", "*.arrow"), "dataset")


@dataclass(frozen=True)
class FetchedSource:
    """A source on the local disk: a folder, or files in the order of their names."""

    path: Path
    files: list[Path]
    hub_revision: str | None = None
    """Commit of a hub repository; None for other sources."""
    skipped_names: frozenset[str] = frozenset()
    """Files of the source that were not downloaded, relative to `path`."""
    listing_version: str | None = None
    """Digest over the names, sizes and version tags of all files of the source, including files that were not downloaded. None for local sources and
    the hub."""

    @property
    def source_version(self) -> str:
        """The version of the source. The version of a model does not depend on whether its weights were downloaded."""
        return self.hub_revision or self.listing_version or compute_fingerprint(self.path)


@dataclass(frozen=True)
class S3Listing:
    """The objects of an S3 source: one object, or all objects below a prefix."""

    source: S3Source
    objects: list[ObjectStat]
    needed_objects: list[ObjectStat]
    """The objects that are downloaded."""

    @property
    def is_single_object(self) -> bool:
        """Whether the source is one object and not a prefix."""
        return [stat.key for stat in self.needed_objects] == [self.source.key]

    def relative_name(self, stat: ObjectStat) -> str:
        """Return the path of the file to which an object is downloaded, relative to the folder of the source."""
        return _compute_relative_path(stat.key, self.source.key.rpartition("/")[0] if self.is_single_object else self.source.key)

    @property
    def version(self) -> str:
        """The version of the source, which covers all its objects."""
        return _compute_listing_version((self.relative_name(stat), stat.size, stat.tag) for stat in self.objects)


class Fetcher:
    """Fetches the sources of one run. `byte_counter` is called with the number of bytes of each downloaded chunk."""

    def __init__(
        self, run: RunConfig, work_folder: Path, *, byte_counter: ByteCounter | None = None, digests: FileDigests | None = None,
        model_kind: SourceKind = MODEL_SOURCE, cached_models: Mapping[str, CachedModel] | None = None,
    ) -> None:  # fmt: skip
        """`digests` receives the sha256 of each file that is downloaded from a store. Files from the hub are not included, because the hub's client
        does not compute a sha256.

        `cached_models`: the models that the pod's init container provides, by the path of their spec field.

        `model_kind`: MODEL_SOURCE, or MODEL_WITHOUT_WEIGHTS if the weights of models are not needed.
        """
        self.run, self.work_folder, self.byte_counter, self._model_kind = run, work_folder, byte_counter, model_kind
        self._cached_models = cached_models or {}
        self.digests = FileDigests() if digests is None else digests
        self.models_from_cache: dict[str, CachedModel] = {}
        """The models that were not downloaded because the init container provides them, by the path of their spec field."""
        self.source_versions: dict[str, str] = {}
        """Versions of the fetched models and benchmark folders, by the path of their spec field. Tokenizers and adapters are not included."""

    def fetch_model(self, source_text: str, spec_path: str, folder_name: str) -> FetchedSource:
        """Fetch a folder with a model. `spec_path` is the path of the spec field, `folder_name` the folder to download into.

        Errors: NotFoundError (66) ModelNotFound, ModelGated, ModelInvalid, or ModelIncomplete if the source lacks weights; storage errors.
        """
        fetched_source = self._fetch_model_folder(source_text, spec_path, folder_name, self._model_kind)
        if self._model_kind.skipped_endings:
            _require_weights(fetched_source, spec_path, redact_source(source_text))
        self.source_versions[spec_path] = fetched_source.source_version
        return fetched_source

    def fetch_tokenizer(self, source_text: str, spec_path: str, folder_name: str) -> FetchedSource:
        """Fetch a folder with a tokenizer, without the weights of its model. Arguments and errors are those of `fetch_model`."""
        return self._fetch_model_folder(source_text, spec_path, folder_name, MODEL_WITHOUT_WEIGHTS)

    def fetch_adapter(self, source_text: str, spec_path: str, folder_name: str) -> FetchedSource:
        """Fetch a folder with an adapter and its weights. Arguments and errors are those of `fetch_model`."""
        return self._fetch_model_folder(source_text, spec_path, folder_name, MODEL_SOURCE)

    def _fetch_model_folder(self, source_text: str, spec_path: str, folder_name: str, kind: SourceKind) -> FetchedSource:
        cached_source = self._hold_cached_model(source_text, spec_path) if kind is MODEL_SOURCE else None
        fetched_source = cached_source or self._fetch(source_text, spec_path, self.work_folder / "fetched" / folder_name, kind)
        if not fetched_source.path.is_dir():
            raise NotFoundError(
                "ModelInvalid", f"{spec_path} is {redact_source(source_text)}, which is a file: a folder with config.json and weights is needed",
                hint=f"set {spec_path} to the folder that holds the file", failure_class=MODEL_SOURCE.failure_class,
            )  # fmt: skip
        if not any((fetched_source.path / file).exists() for file in _MODEL_FOLDER_FILES):
            names = ", ".join(sorted(file.name for file in fetched_source.path.iterdir())[:5]) or "no files"
            raise NotFoundError(
                "ModelInvalid", f"{spec_path} is {redact_source(source_text)}, a folder without config.json (it holds {names})",
                hint=f"set {spec_path} to the folder that holds config.json and the weights", failure_class=MODEL_SOURCE.failure_class,
            )  # fmt: skip
        return fetched_source

    def _hold_cached_model(self, source_text: str, spec_path: str) -> FetchedSource | None:
        """Return the model that the init container provides, and keep it in the cache until this process ends. Return None if the model must be downloaded."""
        cached_model = self._cached_models.get(spec_path)
        if cached_model is None or cached_model.source != source_text or not cached_model.hold():
            return None
        self.models_from_cache[spec_path] = cached_model
        for name, sha256 in cached_model.sha256.items():
            self.digests.add_download(cached_model.path / name, sha256)
        return FetchedSource(cached_model.path, _list_data_files(cached_model.path),
            hub_revision=cached_model.hub_revision, listing_version=cached_model.listing_version)

    def fetch_data_files(self, source_text: str, spec_path: str, folder_name: str) -> list[Path]:
        """Fetch the data files of a source, in the order of their names. Errors: NotFoundError DatasetNotFound (66); storage errors."""
        fetched_source = self._fetch(source_text, spec_path, self.work_folder / "fetched" / folder_name, DATA_SOURCE)
        files = [file for file in fetched_source.files if file.suffix.lower() not in IMAGE_SUFFIXES or file == fetched_source.path]
        if not files:
            raise self._build_missing_error(DATA_SOURCE, spec_path, source_text, "holds no data file")
        return files

    def fetch_folder(self, source_text: str, spec_path: str, folder_name: str) -> Path:
        """Fetch a folder with all files below it. Errors: NotFoundError BenchmarkNotFound (66); storage errors."""
        return self._fetch_whole_folder(source_text, spec_path, folder_name, BENCHMARK_SOURCE)

    def fetch_image_folder(self, source_text: str, spec_path: str, folder_name: str) -> Path:
        """Fetch the folder with the images that the rows of the data name. Errors: NotFoundError ImagesNotFound (66); storage errors."""
        return self._fetch_whole_folder(source_text, spec_path, folder_name, IMAGE_SOURCE)

    def _fetch_whole_folder(self, source_text: str, spec_path: str, folder_name: str, kind: SourceKind) -> Path:
        fetched_source = self._fetch(source_text, spec_path, self.work_folder / "fetched" / folder_name, kind)
        if not fetched_source.path.is_dir():
            raise NotFoundError(
                f"{kind.error_code_prefix}NotFound", f"{spec_path} is {redact_source(source_text)}, which is a file, but a folder is needed",
                hint=f"set {spec_path} to the folder that holds the file", failure_class=FailureClass.DATA,
            )  # fmt: skip
        if kind is BENCHMARK_SOURCE:  # An image folder needs no version, because the contents of the images are compared.
            self.source_versions[spec_path] = fetched_source.source_version
        return fetched_source.path

    def _fetch(self, source_text: str, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        source = parse_source(source_text, spec_path=spec_path)
        match source:
            case FileSource(path=local_path):
                return self._fetch_local(Path(local_path), spec_path, source_text, kind)
            case PvcSource(claim=claim, path=path_in_claim):
                return self._fetch_local(Path(PVC_MOUNT, claim, path_in_claim), spec_path, source_text, kind)
            case ConfigMapSource(name=name, key=key):
                return self._fetch_local(Path(CONFIGMAP_MOUNT, name, key), spec_path, source_text, kind)
            case S3Source():
                return self._fetch_s3(source, spec_path, target, kind)
            case HttpsSource():
                return self._fetch_web(source, spec_path, target, kind)
            case HubSource():
                return self._fetch_hub(source, spec_path, target, kind)

    def _fetch_local(self, local_path: Path, spec_path: str, source_text: str, kind: SourceKind) -> FetchedSource:
        try:
            if local_path.is_file():
                return FetchedSource(local_path, [local_path])
            if local_path.is_dir():
                return FetchedSource(local_path, _list_data_files(local_path))
        except PermissionError as error:
            raise CredentialsError(
                "PermissionDenied", f"{spec_path} is {source_text}, which user {os.getuid()} may not read",
                hint="make the files readable for this user", failure_class=kind.failure_class,
            ) from error  # fmt: skip
        raise self._build_missing_error(kind, spec_path, source_text, "does not exist")

    # ---- S3 ----

    def _open_store(self, bucket: str, kind: SourceKind, **options: float) -> S3Store:
        source_target = self.run.model_store if kind.is_model else self.run.dataset_store
        base_target = source_target or (self.run.storage if self.run.storage.uri.startswith("s3://") else StoreTarget(uri=""))
        return S3Store(base_target.model_copy(update={"uri": f"s3://{bucket}"}), **options)  # type: ignore[arg-type] # mixed numbers

    def _fetch_s3(self, source: S3Source, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        try:
            listing = self.list_s3(source, kind)
            if not listing.needed_objects:
                raise self._build_missing_error(
                    kind, spec_path, str(source), "does not exist: there is no object at this key or below it"
                )
            self.require_space(sum(stat.size for stat in listing.needed_objects), spec_path)
            files = self.download_s3(listing, spec_path, target, kind)
        except FineTuneError as error:
            if error.failure_class is FailureClass.STORAGE and isinstance(error, CredentialsError):
                error.failure_class = kind.failure_class
            raise
        skipped_names = frozenset(listing.relative_name(stat) for stat in listing.objects if kind.skips_file(stat.key))
        return FetchedSource(files[0] if listing.is_single_object else target, files, skipped_names=skipped_names, listing_version=listing.version)

    def list_s3(self, source: S3Source, kind: SourceKind) -> S3Listing:
        """List the objects of a source. Errors: storage errors."""
        objects = self._list_with_short_timeouts(source, kind)
        return S3Listing(source, objects, [stat for stat in objects if not kind.skips_file(stat.key)])

    def download_s3(self, listing: S3Listing, spec_path: str, target: Path, kind: SourceKind) -> list[Path]:
        """Download the needed objects of a listing to a folder, and record their digests. Errors: NotFoundError; storage errors."""
        store = self._open_store(listing.source.bucket, kind)
        files = [target / listing.relative_name(stat) for stat in listing.needed_objects]
        try:
            with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
                digests = list(pool.map(lambda stat, file: store.download(stat.key, file, byte_counter=self.byte_counter), listing.needed_objects, files))
        finally:
            store.close()
        for stat, file, digest in zip(listing.needed_objects, files, digests, strict=True):
            if digest is None:
                raise self._build_missing_error(kind, spec_path, f"s3://{listing.source.bucket}/{stat.key}", "was removed during its download")
            self.digests.add_download(file, digest)
        return files

    def _list_with_short_timeouts(self, source: S3Source, kind: SourceKind) -> list[ObjectStat]:
        """List the source with short timeouts, so that wrong settings are reported within seconds. Downloads have longer timeouts."""
        store = self._open_store(source.bucket, kind, **PREFLIGHT_OPTIONS)
        try:
            return self._list_objects(store, source.key)
        finally:
            store.close()

    def _list_objects(self, store: S3Store, key: str) -> list[ObjectStat]:
        """Return the object with this key, or all objects below it."""
        if key and (stat := store.stat(key)) is not None:
            return [stat]
        objects_below = store.list(f"{key}/" if key else "")
        return [stat for stat in objects_below if stat.size > 0 or not stat.key.endswith("/")]

    # ---- the web and the hub ----

    def _fetch_web(self, source: HttpsSource, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        try:
            return (
                self._fetch_committed_model(source, spec_path, target, kind)
                if kind.is_model
                else self._fetch_web_file(source, spec_path, target, kind)
            )
        except FineTuneError as error:
            if not error.message.startswith(spec_path):
                error.message = f"{spec_path}: {error.message}"
            if isinstance(error, CredentialsError):
                error.failure_class = kind.failure_class
            raise

    def _fetch_web_file(self, source: HttpsSource, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        """Download one file of a web server and keep the file's name."""
        file = target / (PurePosixPath(unquote(urlsplit(source.url).path)).name or "data")
        store = self._open_web_store(source.url, kind)
        try:
            digest = store.download(
                "", file, byte_counter=self.byte_counter, check_space=lambda size: self.require_space(size, spec_path)
            )
        except NotFoundError as error:
            raise self._build_missing_error(kind, spec_path, store.uri, f"answers {error.message.rpartition(' ')[2]}") from error
        finally:
            store.close()
        if digest is None:
            raise self._build_missing_error(kind, spec_path, store.uri, "answers 404")
        self.digests.add_download(file, digest)
        return FetchedSource(file, [file])

    def _fetch_committed_model(self, source: HttpsSource, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        """Download a model or checkpoint that a job committed. The file names come from its manifest, because a web server cannot list files."""
        if not source.is_job_result:
            raise NotFoundError(
                "ModelInvalid", f"{spec_path} is {redact_source(source.url)}: a web server has no listing, so only models and checkpoints of a job can be read",
                hint="write https://host/jobs/model or https://host/jobs/checkpoints/step-00000100, a hub repository as org/name, or s3://bucket/prefix",
                failure_class=MODEL_SOURCE.failure_class,
            )  # fmt: skip
        address = parse_address(source.url)
        store = self._open_web_store(address.job_uri, MODEL_SOURCE)
        try:
            tree = CheckpointTree(store)
            committed_checkpoint = tree.get_committed(address.step)
            problem = "holds no _COMMITTED object"
            if committed_checkpoint is not None:
                problem = download_committed(
                    tree, committed_checkpoint, target, byte_counter=self.byte_counter, check_space=lambda size: self.require_space(size, spec_path),
                    is_needed=lambda name: not kind.skips_file(name),
                )  # fmt: skip
                manifest = tree.read_manifest(committed_checkpoint) if problem is None else None
                for entry in manifest.files if manifest is not None else ():
                    if not kind.skips_file(entry.path):
                        self.digests.add_download(target / entry.path, entry.sha256)  # `download_committed` has verified this hash.
        finally:
            store.close()
        if committed_checkpoint is None:
            raise self._build_missing_error(MODEL_SOURCE, spec_path, redact_source(source.url), problem)
        if problem is not None:
            raise NotFoundError(
                "ModelInvalid", f"{spec_path} is {redact_source(source.url)}, which is damaged: {problem}",
                hint="upload the model again", failure_class=MODEL_SOURCE.failure_class,
            )  # fmt: skip
        skipped_names = frozenset(entry.path for entry in manifest.files if kind.skips_file(entry.path)) if manifest is not None else frozenset()
        version = _compute_listing_version((entry.path, entry.size, entry.sha256) for entry in manifest.files) if manifest is not None else None
        return FetchedSource(target, _list_data_files(target), skipped_names=skipped_names, listing_version=version)

    def _open_web_store(self, uri: str, kind: SourceKind) -> WebStore:
        """Open a web server as a store, with the CA bundle that the spec configures for this type of source."""
        store = (self.run.model_store if kind.is_model else self.run.dataset_store) or self.run.storage
        return WebStore(StoreTarget(uri=uri, ca_bundle=store.ca_bundle))

    def _fetch_hub(self, source: HubSource, spec_path: str, target: Path, kind: SourceKind) -> FetchedSource:
        import huggingface_hub
        from huggingface_hub import errors as hub_errors

        repository_and_revision = f"{source.repo}" + (f"@{source.revision}" if source.revision else "")
        try:
            folder = huggingface_hub.snapshot_download(
                source.repo, repo_type=kind.repo_type, revision=source.revision, cache_dir=self.work_folder / "hub",
                token=os.environ.get(Env.HF_TOKEN) or False, allow_patterns=list(kind.file_patterns),
                ignore_patterns=[f"*{ending}" for ending in kind.skipped_endings] or None, max_workers=DOWNLOAD_THREADS,
            )  # fmt: skip
            skipped_names = self._list_skipped_hub_names(source, kind, Path(folder).name)
        except hub_errors.GatedRepoError as error:
            raise NotFoundError(
                f"{kind.error_code_prefix}Gated", f"{spec_path} is {repository_and_revision}, which is gated: its owner must grant access first",
                hint="accept the terms of the repository on the hub and name a token in model.tokenSecretRef", failure_class=kind.failure_class,
            ) from error  # fmt: skip
        except hub_errors.RevisionNotFoundError as error:
            raise self._build_missing_error(kind, spec_path, repository_and_revision, "has no such revision") from error
        except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
            raise self._build_missing_error(kind, spec_path, repository_and_revision, "is not on the hub, or is private and no token was given") from error
        except Exception as error:  # The hub's client does not convert the exceptions of its HTTP library.
            raise _build_hub_unreachable_error(kind, spec_path, repository_and_revision, error) from error
        local_folder = Path(folder)
        return FetchedSource(local_folder, _list_data_files(local_folder), hub_revision=local_folder.name, skipped_names=skipped_names)

    def _list_skipped_hub_names(self, source: HubSource, kind: SourceKind, revision: str) -> frozenset[str]:
        if not kind.skipped_endings:
            return frozenset()
        import huggingface_hub

        token = os.environ.get(Env.HF_TOKEN) or False
        listed_names = huggingface_hub.list_repo_files(source.repo, revision=revision, repo_type=kind.repo_type, token=token)
        return frozenset(name for name in listed_names if kind.skips_file(name))

    # ---- shared ----

    def _build_missing_error(self, kind: SourceKind, spec_path: str, source_text: str, problem: str) -> NotFoundError:
        return NotFoundError(
            f"{kind.error_code_prefix}NotFound",
            f"{spec_path} is {source_text}, which {problem}",
            hint=f"correct {spec_path}",
            failure_class=kind.failure_class,
        )

    def require_space(self, size_bytes: int, spec_path: str) -> None:
        """Check that the pod's disk has space for `size_bytes` bytes of a source. Errors: ConfigError `LocalDiskTooSmall`."""
        available_bytes = free_bytes(self.work_folder)
        if size_bytes + RESERVE_BYTES > available_bytes:
            raise ConfigError(
                "LocalDiskTooSmall", f"{spec_path} needs {size_bytes / 1e9:.2f} GB, but the pod's disk has only {available_bytes / 1e9:.2f} GB left",
                hint="raise resources.ephemeralStorage",
            )  # fmt: skip


_MODEL_FOLDER_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
"""A folder with at least one of these files is a model, an adapter or a tokenizer."""


def _build_hub_unreachable_error(kind: SourceKind, spec_path: str, repository: str, error: Exception) -> StorageError:
    return StorageError(
        "HubUnreachable", f"{spec_path} is {repository}, but the model hub could not be reached ({type(error).__name__})",
        hint="check the pod's access to the internet, or copy the repository to S3 and write s3://bucket/prefix",
        failure_class=kind.failure_class,
    )  # fmt: skip


def _compute_relative_path(key: str, root_key: str) -> str:
    relative_path = key[len(root_key) :].lstrip("/")
    return "/".join(part for part in relative_path.split("/") if part not in ("", ".", ".."))


def _require_weights(fetched_source: FetchedSource, spec_path: str, shown_source: str) -> None:
    """Check from the file names that no weights of a model are missing. Errors: NotFoundError ModelIncomplete."""
    fetched_names = {file.relative_to(fetched_source.path).as_posix() for file in fetched_source.path.rglob("*") if file.is_file()}
    present_names = fetched_source.skipped_names | fetched_names
    if SINGLE_WEIGHT_FILE in present_names:  # If a single weight file exists, transformers ignores the index.
        return
    index_file = fetched_source.path / WEIGHT_INDEX_FILE
    try:
        needed_names = set(json.loads(index_file.read_text())["weight_map"].values()) if index_file.exists() else set()
    except (ValueError, KeyError, AttributeError):
        needed_names = set()  # The process `check` or the training pod will report the damaged index.
    missing_names = sorted(needed_names - present_names)
    if not missing_names and any(name.endswith(LOADABLE_WEIGHT_ENDINGS) for name in present_names):
        return
    problem = f"lacks {missing_names[0]}, which {WEIGHT_INDEX_FILE} lists" if missing_names else "holds no weights (*.safetensors or *.bin)"
    raise NotFoundError(
        "ModelIncomplete", f"{spec_path} is {shown_source}, which {problem}", hint="upload all files of the model again",
        failure_class=MODEL_SOURCE.failure_class,
    )


def _list_data_files(folder: Path) -> list[Path]:
    matching_paths = {path for pattern in DATA_FILE_PATTERNS for path in folder.glob(pattern)}
    return sorted(path for path in matching_paths if path.is_file())


def _compute_listing_version(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a sha256 over the name, size and version tag of each file."""
    return "sha256:" + hashlib.sha256("".join(f"{name}\0{size}\0{tag}\0" for name, size, tag in sorted(files)).encode()).hexdigest()


def compute_fingerprint(model_folder: Path) -> str:
    """Return a sha256 that identifies a model. The hash covers the whole content of small files, and the size, beginning and end of large files."""
    digest = hashlib.sha256()
    for path in sorted(file for file in model_folder.rglob("*") if file.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model_folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as stream:
            if size <= SMALL_FILE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(FINGERPRINT_EDGE_BYTES))
                stream.seek(size - FINGERPRINT_EDGE_BYTES)
                digest.update(stream.read())
    return "sha256:" + digest.hexdigest()


def compute_combined_digest(files: list[Path], hash_file: Callable[[Path], str]) -> str:
    """Return one sha256 over the sha256 of each file, in the given order."""
    return hashlib.sha256("\n".join(hash_file(file) for file in files).encode()).hexdigest()
