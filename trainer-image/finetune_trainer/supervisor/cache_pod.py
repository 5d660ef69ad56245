"""`finetune-trainer fill-cache`: the init container that provides the models of a pod from the cache.

This program downloads a model into the cache once for all pods that share the volume, and verifies it with the hashes of its source. If the cache is a folder
of the node, the trainer container reads the model there, through a mount that it cannot write to. If the cache is in a PersistentVolumeClaim, this program
copies the model to the pod's disk and verifies the copy, because every pod of the namespace can mount the claim and change its files at any time.

The program always exits with code 0. If the program's record is missing or does not contain a model, the trainer container downloads the model itself.

A preparation uses the same code to put the models into the cache of a PersistentVolumeClaim before any pod holds GPUs (`fill_claim`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from finetune_api.base import LenientModel
from finetune_api.errors import FineTuneError
from finetune_api.names import CLAIM_CACHE_TENANT
from finetune_api.pod import RunConfig
from finetune_api.sources import HubSource, S3Source, parse_source
from pydantic import ValidationError

from finetune_trainer.model_cache.content import SourceFile, check_files
from finetune_trainer.model_cache.folder import CacheEntry, CacheFolder, CacheLimits, CacheProblem, DamagedModel
from finetune_trainer.model_cache.record import CachedModel, CacheRecord
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.supervisor.fetch import Fetcher
from finetune_trainer.supervisor.model_listing import HubDown, ModelListing, build_hub_location, list_model

log = logging.getLogger(__name__)

MODEL_COPIES_FOLDER = "from-cache"
SOURCE_RECORDS_FOLDER = ".sources"
MAX_TRIES = 2
"""Number of tries to provide a model from the cache. If the first try finds a damaged model, the model is removed and downloaded again."""


class ModelUse(Enum):
    """Where the pod reads a model that the cache provides."""

    IN_PLACE = "in place"
    """The pod reads the model in the cache, which is on the disk of the node."""
    COPY = "copy"
    """The model is copied to the pod's disk and read there, because the cache is in a PersistentVolumeClaim."""
    NONE = "none"
    """The pod does not read the model: a preparation only fills the cache in a PersistentVolumeClaim."""


@dataclass(frozen=True)
class CacheOptions:
    """The arguments of `fill-cache`."""

    cache_folder: Path
    tenant: str
    use: ModelUse
    limits: CacheLimits

    @property
    def is_on_node(self) -> bool:
        """Whether the cache is on the disk of the node, where only this program writes."""
        return self.use is ModelUse.IN_PLACE


class SourceRecord(LenientModel):
    """The newest known revision of a public hub repository, and its files. This record is used while the hub does not answer."""

    revision: str
    files: list[tuple[str, int, str]]


class PodModelProvider:
    """Provides the models of one pod from the cache. `run()` returns the exit code."""

    def __init__(self, settings: Settings, options: CacheOptions) -> None:
        self._settings, self._options = settings, options
        self._cache = CacheFolder(options.cache_folder, options.tenant, options.limits)
        self._notes: list[str] = []

    def run(self) -> int:
        """Provide all models and write the record for the trainer container. Never raises an error."""
        try:
            self._settings.work_folder.mkdir(parents=True, exist_ok=True)
            self._create_folder_of_namespace()
            run, _ = load_run(self._settings)
            self.provide_models(run).write(self._settings.work_folder)
        except Exception as error:
            log.warning("the trainer container downloads the model, because the cache failed", exc_info=error)
        return 0

    def provide_models(self, run: RunConfig) -> CacheRecord:
        """Provide all models of a run from the cache. The record's notes name the models that the cache cannot provide, and why."""
        fetcher = Fetcher(run, self._settings.work_folder)
        models = {path: model for path, source in list_cacheable_sources(run) if (model := self._provide_or_note(fetcher, path, source)) is not None}
        return CacheRecord(models=models, notes=self._notes)

    def _create_folder_of_namespace(self) -> None:
        """Create the namespace's folder in a cache on the node. If the folder is missing, the kubelet creates it for root, and no later pod can write to it."""
        if self._options.is_on_node:
            with suppress(OSError):  # The first write to the cache reports this error.
                (self._options.cache_folder / self._options.tenant).mkdir(parents=True, exist_ok=True)

    def _provide_or_note(self, fetcher: Fetcher, spec_path: str, source: str) -> CachedModel | None:
        try:
            return self._provide(fetcher, source)
        except Exception as error:
            is_expected = isinstance(error, CacheProblem | FineTuneError | OSError)  # the hub's errors are OSErrors
            log.warning("%s is downloaded without the cache: %s", spec_path, _describe_error(error), exc_info=None if is_expected else error)
            self._notes.append(f"{spec_path} is downloaded without model.cache: {_describe_error(error)}")
            return None

    def _provide(self, fetcher: Fetcher, source: str) -> CachedModel:
        """Take the model from the cache, or download it into the cache. Errors: CacheProblem, OSError, FineTuneError, errors of the hub's client."""
        try:
            listing, download = list_model(fetcher, parse_source(source))
        except HubDown as error:
            return self._provide_offline(fetcher, source, error)
        with suppress(OSError):
            self._record_source(source, listing)
        for try_number in range(1, MAX_TRIES + 1):
            try:
                entry, is_from_cache = self._cache.provide(
                    listing.key, source, listing.files, download, log_progress=lambda done_bytes: _log_progress(done_bytes, listing)
                )
                return self._make_available(entry, listing, source, is_from_cache, fetcher)
            except DamagedModel as damage:
                if try_number == MAX_TRIES:
                    raise
                self._notes.append(f"model.cache had a damaged copy of {source}, which was removed: {damage}")
        raise AssertionError

    def _make_available(self, entry: CacheEntry, listing: ModelListing, source: str, is_from_cache: bool, fetcher: Fetcher) -> CachedModel:
        """Return the model that the trainer container reads: the model in the cache, or a verified copy of it. Errors: DamagedModel, FineTuneError."""
        model = CachedModel(
            source=source, path=entry.files, from_cache=is_from_cache, size=listing.total_bytes, hub_revision=listing.hub_revision,
            listing_version=listing.listing_version, sha256={name: file.sha256 for name, file in entry.record.files.items()}, in_use_file=entry.in_use_file,
        )  # fmt: skip
        if self._options.use is not ModelUse.COPY:
            return model
        copy_folder = self._settings.work_folder / MODEL_COPIES_FOLDER / listing.key
        shutil.rmtree(copy_folder, ignore_errors=True)
        fetcher.require_space(listing.total_bytes, "model.source")
        try:
            checked_files = check_files(entry.files, listing.files, copy_to=copy_folder)
            problem = next((file.problem for file in checked_files if file.problem), "")
            if problem:
                self._cache.remove(entry)
                raise DamagedModel(problem)
        except BaseException:
            shutil.rmtree(copy_folder, ignore_errors=True)
            raise
        return model.model_copy(update={"path": copy_folder, "sha256": {file.name: file.sha256 for file in checked_files}, "in_use_file": None})

    # ---- without the hub ----

    def _record_source(self, source: str, listing: ModelListing) -> None:
        """Record the newest revision of a public repository, or remove the record of a repository that is no longer public. Errors: OSError."""
        hub_source = parse_source(source)
        if not isinstance(hub_source, HubSource) or not self._options.is_on_node:
            return
        record_file = self._get_source_record_file(hub_source)
        if not listing.is_public:
            record_file.unlink(missing_ok=True)
            return
        record_file.parent.mkdir(parents=True, exist_ok=True)
        record = SourceRecord(revision=listing.hub_revision or "", files=[(entry.name, entry.size, entry.digest) for entry in listing.files])
        partial_file = record_file.with_name(f".{record_file.name}.{self._settings.pod_uid}")
        partial_file.write_text(record.model_dump_json())
        partial_file.rename(record_file)

    def _provide_offline(self, fetcher: Fetcher, source: str, error: HubDown) -> CachedModel:
        """Provide the newest known revision of a public model while the hub does not answer. Errors: CacheProblem.

        The cache must be on the node, where no other program writes. In a claim, another pod could have changed the recorded hashes. The model must be
        public, because only the hub can check whether this job may read a model that is not public.
        """
        hub_source = parse_source(source)
        assert isinstance(hub_source, HubSource)
        if not self._options.is_on_node:
            raise CacheProblem("the model hub does not answer, and without it the files in a claim cannot be verified") from error
        try:
            record = SourceRecord.model_validate_json(self._get_source_record_file(hub_source).read_bytes())
        except (OSError, ValidationError) as read_error:
            raise CacheProblem("the model hub does not answer, and the cache has no public model of this name") from read_error
        files = tuple(SourceFile(*file) for file in record.files)
        listing = ModelListing(build_hub_location(hub_source), files, hub_revision=record.revision, is_public=True)
        entry = self._cache.find(listing.key, files)
        if entry is None:
            raise CacheProblem("the model hub does not answer, and the cache no longer has this model") from error
        self._notes.append(f"the model hub does not answer: revision {record.revision} of {source} from model.cache is used")
        return self._make_available(entry, listing, source, True, fetcher)

    def _get_source_record_file(self, source: HubSource) -> Path:
        identity_text = json.dumps([build_hub_location(source), source.revision])
        return self._options.cache_folder / self._options.tenant / SOURCE_RECORDS_FOLDER / f"{hashlib.sha256(identity_text.encode()).hexdigest()}.json"


def list_cacheable_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the spec path and the source of each model that the cache can provide: base model and reference model, from the hub or from S3."""
    dpo = run.spec.trainer.dpo
    for path, source in (("model.source", run.spec.model.source), ("trainer.dpo.referenceModel", dpo.reference_model if dpo else None)):
        if source and isinstance(parse_source(source, spec_path=path), HubSource | S3Source):
            yield path, source


def fill_claim(settings: Settings, run: RunConfig, cache_folder: Path) -> list[str]:
    """Put all models of a run into a cache in a PersistentVolumeClaim. Returns notes on the models that were not stored."""
    return PodModelProvider(settings, CacheOptions(cache_folder, CLAIM_CACHE_TENANT, ModelUse.NONE, CacheLimits())).provide_models(run).notes


def _log_progress(done_bytes: int, listing: ModelListing) -> None:
    log.info("another pod downloads the model into the cache: %.2f of %.2f GB", done_bytes / 1e9, listing.total_bytes / 1e9)


def _describe_error(error: Exception) -> str:
    if isinstance(error, FineTuneError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) if isinstance(error, CacheProblem) else type(error).__name__


def main(arguments: list[str]) -> int:
    """Entry point of `fill-cache`; always returns 0."""
    parser = argparse.ArgumentParser(prog="finetune-trainer fill-cache", description="Provide the models of a pod from the cache.")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--tenant", required=True, help="folder below the cache for the models of this namespace")
    parser.add_argument("--copy", action="store_true", help="copy the models to the work folder, and verify the copies")
    parser.add_argument("--size-limit", type=int, help="maximum bytes of all models in the cache (default: the size of the volume)")
    parser.add_argument("--free-share", type=float, default=0.0, help="share of the volume that stays free")
    options = parser.parse_args(arguments)
    limits = CacheLimits(size_bytes=options.size_limit, free_share=options.free_share)
    model_use = ModelUse.COPY if options.copy else ModelUse.IN_PLACE
    return PodModelProvider(Settings.from_env(), CacheOptions(options.folder, options.tenant, model_use, limits)).run()
