"""Parse the sources of models and data.

Notations: `hf://org/name[@revision]` or `org/name[@revision]`, `s3://bucket/key`, `pvc://claim/path`,
`configmap://name/key`, `https://host/path`, `file:///path`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from finetune_api.errors import ConfigError
from finetune_api.source_mistakes import explain_mistake

_REPO_PATTERN = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_REVISION_PATTERN = re.compile(r"^[\w./-]+$")
_BUCKET_PATTERN = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_OBJECT_NAME_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_CONFIG_MAP_KEY_PATTERN = re.compile(r"^[-._a-zA-Z0-9]+$")
_INCARNATION_SUFFIX = r"(/a\d+-[^/]{8})?$"
_CHECKPOINT_PATH_PATTERN = re.compile(r"/checkpoints/step-\d{8,}" + _INCARNATION_SUFFIX)
_MODEL_PATH_PATTERN = re.compile(r"/model" + _INCARNATION_SUFFIX)
_DATA_FILE_PATTERN = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|zip|gz)$", re.IGNORECASE)
_UNREADABLE_FILE_PATTERN = re.compile(r"\.(xlsx?|xlsm|ods|pdf|docx?|pptx?|arrow|feather|avro|orc|pkl|pickle|npy|npz|zip|7z|rar|zst|bz2|xz|tar)$", re.IGNORECASE)
_UID_PATTERN = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
SOURCE_NOTATIONS = "org/name[@revision], hf://org/name, s3://bucket/key, pvc://claim/path, configmap://name/key, https://host/path or file:///path"


@dataclass(frozen=True)
class HubSource:
    """A repository on a model hub."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class S3Source:
    """An object in an S3 bucket, or all objects below a prefix. `key` has no leading slash."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class PvcSource:
    """A path in a PersistentVolumeClaim of the job's namespace. An empty path is the root of the volume."""

    claim: str
    path: str

    def __str__(self) -> str:
        return f"pvc://{self.claim}/{self.path}"


@dataclass(frozen=True)
class ConfigMapSource:
    """A key of a ConfigMap of the job's namespace."""

    name: str
    key: str

    def __str__(self) -> str:
        return f"configmap://{self.name}/{self.key}"


@dataclass(frozen=True)
class HttpsSource:
    """A file on a web server, or a folder with a job's checkpoint or final model on a web server."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def is_job_result(self) -> bool:
        """Whether the URL is the folder of a job's checkpoint or final model.

        On a web server, the trainer can read only folders that contain a job's checkpoint or final model.
        """
        return bool(_CHECKPOINT_PATH_PATTERN.search(self._path) or _MODEL_PATH_PATTERN.search(self._path))

    @property
    def is_checkpoint(self) -> bool:
        """Whether the URL is the folder of a job's checkpoint."""
        return bool(_CHECKPOINT_PATH_PATTERN.search(self._path))

    @property
    def _path(self) -> str:
        return urlsplit(self.url).path.rstrip("/")


@dataclass(frozen=True)
class FileSource:
    """An absolute path in the trainer image or, in local runs, on the user's machine."""

    path: str

    def __str__(self) -> str:
        return f"file://{self.path}"


Source = HubSource | S3Source | PvcSource | ConfigMapSource | HttpsSource | FileSource


def parse_source(text: str, *, spec_path: str = "model.source") -> Source:
    """Return the parsed source. `spec_path`: path of the field in the spec, for error messages.

    Errors: ConfigError `SourceInvalid`.
    """
    if text != text.strip() or not text:
        raise _make_source_error(spec_path, text, "the source is empty, or starts or ends with a space", SOURCE_NOTATIONS)
    mistake = explain_mistake(text, spec_path)
    if mistake is not None:
        raise _make_source_error(spec_path, text, *mistake)
    scheme, separator, address = text.partition("://")
    if not separator:
        return _parse_hub_source(text, spec_path, text)
    match scheme:
        case "hf":
            return _parse_hub_source(address, spec_path, text)
        case "s3":
            return _parse_s3_source(address, spec_path, text)
        case "pvc":
            claim, _, volume_path = address.partition("/")
            _require(
                bool(_OBJECT_NAME_PATTERN.match(claim)),
                spec_path,
                text,
                "the name of the PersistentVolumeClaim is missing or invalid",
                "pvc://claim/path",
            )
            _require(".." not in volume_path.split("/"), spec_path, text, "the path contains `..`", "pvc://claim/path")
            return PvcSource(claim, volume_path.strip("/"))
        case "configmap":
            name, _, key = address.partition("/")
            _require(
                bool(_OBJECT_NAME_PATTERN.match(name)) and bool(_CONFIG_MAP_KEY_PATTERN.match(key)),
                spec_path,
                text,
                "the name or the key of the ConfigMap is missing or invalid",
                "configmap://name/key",
            )
            return ConfigMapSource(name, key)
        case "https" | "http":
            return _parse_web_source(scheme, text, spec_path)
        case "file":
            _require(
                address.startswith("/"), spec_path, text, "the path is not absolute", f"file:///{address.lstrip('/') or 'path'}"
            )
            return FileSource("/" + address.strip("/"))
        case _:
            raise _make_source_error(spec_path, text, f"`{scheme}://` is not a supported notation", SOURCE_NOTATIONS)


def _parse_hub_source(address: str, spec_path: str, text: str) -> HubSource:
    repo, separator, revision = address.partition("@")
    if text.startswith((".", "/", "~")):
        absolute_path = text if text.startswith("/") else "/path/to/" + text.lstrip("./~")
        raise _make_source_error(
            spec_path,
            text,
            "this seems to be a local path, but pods cannot read files on your machine",
            f"file://{absolute_path} for a path in the trainer image, otherwise s3://bucket/key",
        )
    if is_data_file_name(text):
        raise _make_source_error(
            spec_path,
            text,
            "this is a file name, but pods cannot read files on your machine",
            f"s3://bucket/{text}, pvc://claim/{text} or configmap://name/{text.rpartition('/')[2]}; for a file in the image "
            f"file:///path/{text}, for a hub repository hf://{text}; `finetune run --local` reads the relative path",
        )
    _require(
        bool(_REPO_PATTERN.match(repo)) and "--" not in repo and ".." not in repo,
        spec_path,
        text,
        "this is not the name of a hub repository",
        SOURCE_NOTATIONS,
    )
    _require(
        not separator or bool(_REVISION_PATTERN.match(revision)),
        spec_path,
        text,
        "the branch, tag or commit after @ is missing or invalid",
        f"{repo}@main",
    )
    return HubSource(repo, revision or None)


def is_data_file_name(text: str) -> bool:
    """Whether a source has no scheme and the extension of a data file, as in `data/train.jsonl`."""
    return "://" not in text and bool(_DATA_FILE_PATTERN.search(text))


def is_unreadable_data_file(text: str) -> bool:
    """Whether a source of data ends with a file extension that the trainer cannot read, such as `.xlsx`."""
    return bool(_UNREADABLE_FILE_PATTERN.search(redact_source(text)))


def _parse_s3_source(address: str, spec_path: str, text: str) -> S3Source:
    bucket, _, key = address.partition("/")
    _require(
        bool(_BUCKET_PATTERN.match(bucket)),
        spec_path,
        text,
        "the bucket name is missing or invalid (3 to 63 characters of a-z 0-9 . -)",
        "s3://bucket/key",
    )
    _require("?" not in key and "#" not in key, spec_path, text, "the key contains `?` or `#`", "s3://bucket/key")
    return S3Source(bucket, key.strip("/"))


MAX_MODEL_NAME_LENGTH = 24
"""Maximum length of a short model name. With this limit, the lines of `kubectl get -o wide` have fewer than 200 characters."""


def model_name(source: str) -> str:
    """Return a short name of a model source for tables: the last folder of the source, shortened to at most `MAX_MODEL_NAME_LENGTH` characters."""
    folder_name = get_last_folder(source)
    return folder_name if len(folder_name) <= MAX_MODEL_NAME_LENGTH else folder_name[: MAX_MODEL_NAME_LENGTH - 3] + "..."


def get_last_folder(source: str) -> str:
    """Return the last folder of a model source: the hub repository without the owner and revision, or the last folder of a path.

    For a job's result (`.../<job>/<uid>/model` or `.../checkpoints/step-<n>`), the returned name is that of the job.
    """
    source_text = redact_source(source).rstrip("/")
    if "://" not in source_text or source_text.startswith("hf://"):
        source_text = source_text.partition("@")[0] if "@" in source_text else source_text
    job_folder = _MODEL_PATH_PATTERN.sub("", _CHECKPOINT_PATH_PATTERN.sub("", source_text))
    folder_names = [part for part in re.sub(r"^[a-z0-9]+://", "", job_folder).split("/") if part and not _UID_PATTERN.match(part)]
    return folder_names[-1] if folder_names else source_text


def redact_source(text: str) -> str:
    """Return a source in the form in which messages may show it.

    From a web address, these parts are removed: the query, which can contain a signature, the fragment, and the part before @, which can contain a password.
    """
    if not re.match(r"\s*https?://", text, re.IGNORECASE):
        return text
    return re.sub(r"://[^/@]*@", "://", text.partition("?")[0].partition("#")[0])


def _parse_web_source(scheme: str, text: str, spec_path: str) -> HttpsSource:
    _require(scheme == "https", spec_path, text, "plain http does not protect the file against modification", "https" + redact_source(text)[len("http") :])
    try:
        url_parts = urlsplit(text)
        is_complete = bool(url_parts.hostname) and bool(url_parts.path.strip("/")) and url_parts.port != 0
    except ValueError:  # an invalid port or IPv6 address
        is_complete = False
    _require(is_complete, spec_path, text, "the host or the path is missing or invalid", "https://host/path/file.jsonl")
    if url_parts.username or url_parts.password:
        raise ConfigError(
            "SourceInvalid", f"{spec_path}: the URL for {url_parts.hostname} contains a user or password, but everyone who can read the FineTuneJob can read it",
            hint="store the file in S3, or provide a URL without a password",
        )  # fmt: skip
    return HttpsSource(text)


def _require(is_valid: bool, spec_path: str, text: str, problem: str, suggestion: str) -> None:
    if not is_valid:
        raise _make_source_error(spec_path, text, problem, suggestion)


def _make_source_error(spec_path: str, text: str, problem: str, suggestion: str) -> ConfigError:
    return ConfigError("SourceInvalid", f"{spec_path} is {redact_source(text)!r}: {problem}", hint=f"write {suggestion}")
