"""Lists the files of a model at its source, with the hashes that the source reports, and checks that the job may read the model.

The cache compares its files with these hashes, so files that another program has changed are not used. Only models from the hub and from S3 have
such hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.names import Env
from finetune_api.sources import HubSource, S3Source, Source

from finetune_trainer.model_cache.content import SourceFile, parse_etag
from finetune_trainer.model_cache.folder import CacheProblem
from finetune_trainer.storage.s3 import describe_connection
from finetune_trainer.supervisor.fetch import DOWNLOAD_THREADS, MODEL_SOURCE, Fetcher


@dataclass(frozen=True)
class ModelListing:
    """The files of one version of a model."""

    location: str
    """Address of the server, and the repository or folder on the server. The location is part of `key`, so the cache never mixes models of two servers."""
    files: tuple[SourceFile, ...]
    hub_revision: str | None = None
    listing_version: str | None = None
    is_public: bool = False
    """Whether everyone may read the model, without a token."""

    @property
    def key(self) -> str:
        """The name of the model's folder in the cache: a sha256 (hex) over location, version, and names, sizes and hashes of the files."""
        files = [[file.name, file.size, file.digest] for file in self.files]
        return hashlib.sha256(json.dumps([self.location, self.hub_revision, self.listing_version, files]).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class HubDown(Exception):
    """The hub does not answer."""


def list_model(fetcher: Fetcher, source: Source) -> tuple[ModelListing, Callable[[Path], None]]:
    """Return the listing of a model, and a function that downloads its files to a folder.

    Errors: CacheProblem if the source reports no hashes; HubDown; other errors of the source, which also occur in a download without the cache.
    """
    match source:
        case HubSource():
            return _list_hub_model(source)
        case S3Source():
            return _list_s3_model(fetcher, source)
    raise CacheProblem(f"{source} is not a model on the hub or in S3")


def build_hub_location(source: HubSource) -> str:
    """Return the URL of a repository on the hub. The environment variable HF_ENDPOINT can set the address of the hub."""
    return f"{_get_hub_endpoint()}/{source.repo}"


def _get_hub_endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _list_hub_model(source: HubSource) -> tuple[ModelListing, Callable[[Path], None]]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    token = os.environ.get(Env.HF_TOKEN) or False
    try:
        api = huggingface_hub.HfApi(endpoint=_get_hub_endpoint(), token=token)
        repository = api.model_info(source.repo, revision=source.revision)
        if repository.gated or repository.private:
            api.auth_check(source.repo)  # Even if the cache has the files, this job must have access to the repository itself.
        tree_entries = list(api.list_repo_tree(source.repo, revision=repository.sha, recursive=True))
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise
        raise HubDown from error
    except Exception as error:  # the hub's client does not convert the exceptions of its HTTP library
        if isinstance(error, ValueError):
            raise
        raise HubDown from error
    files = _select_needed_files(tree_entries)
    revision = str(repository.sha)

    def download(folder: Path) -> None:
        huggingface_hub.snapshot_download(
            source.repo, revision=revision, local_dir=folder, endpoint=_get_hub_endpoint(), token=token, allow_patterns=list(MODEL_SOURCE.file_patterns),
            max_workers=DOWNLOAD_THREADS,
        )  # fmt: skip
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # The client has written metadata about the download to this folder.

    is_public = not repository.gated and not repository.private
    return ModelListing(build_hub_location(source), _check_and_sort(files), hub_revision=revision, is_public=is_public), download


def _select_needed_files(tree_entries: list[Any]) -> list[SourceFile]:
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    files = [entry for entry in tree_entries if isinstance(entry, RepoFile)]
    needed_entries = filter_repo_objects(files, allow_patterns=list(MODEL_SOURCE.file_patterns), key=lambda entry: entry.path)
    return [SourceFile(entry.path, entry.size, f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-blob:{entry.blob_id}") for entry in needed_entries]


def _list_s3_model(fetcher: Fetcher, source: S3Source) -> tuple[ModelListing, Callable[[Path], None]]:
    listing = fetcher.list_s3(source, MODEL_SOURCE)
    if not listing.needed_objects or listing.is_single_object:
        raise CacheProblem(f"{source} is not a folder that contains objects")
    files = []
    for stat in listing.needed_objects:
        digest = parse_etag(stat.tag)
        if digest is None:
            raise CacheProblem(f"the store reports no MD5 of {stat.key} (ETag {stat.tag})")
        files.append(SourceFile(listing.relative_name(stat), stat.size, digest))
    target = fetcher.run.model_store or fetcher.run.storage
    location = f"{describe_connection(target, source.bucket).endpoint or 's3'}/{source.bucket}/{source.key}"

    def download(folder: Path) -> None:
        fetcher.download_s3(listing, "model.cache", folder, MODEL_SOURCE)

    return ModelListing(location, _check_and_sort(files), listing_version=listing.version), download


def _check_and_sort(files: list[SourceFile]) -> tuple[SourceFile, ...]:
    """Return the files, sorted by name. Errors: CacheProblem if a name leads out of the model's folder, or if two files have the same name."""
    for file in files:
        name_parts = PurePosixPath(file.name).parts
        if not name_parts or file.name.startswith("/") or ".." in name_parts or "\0" in file.name:
            raise CacheProblem(f"the source has a file with the name {file.name!r}")
    if len({file.name for file in files}) < len(files):
        raise CacheProblem("the source has two files with the same name")
    return tuple(sorted(files, key=lambda file: file.name))
