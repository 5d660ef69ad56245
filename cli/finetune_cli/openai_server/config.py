"""The configuration of the server: where files are stored, and which models clients may fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from finetune_api.base import WireModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from pydantic import Field, ValidationError, field_validator

from finetune_cli.config_files import mistakes_of, read_mapping
from finetune_cli.field_errors import field_errors
from finetune_cli.fields import get_value
from finetune_cli.files import display_name
from finetune_cli.mistakes import InvalidInput, Mistake

HINT = "write `storage: {uri: s3://bucket/prefix}` and `models:` with the name, and below it the `spec`, of each model"
FIELDS_OF_THE_SERVER = (
    "dataset.train", "dataset.validation", "dataset.test", "dataset.mixture", "dataset.format", "dataset.fileFormat", "dataset.columns", "trainer.type",
    "storage", "suspend", "cancel",
)  # fmt: skip
"""Fields of a job that the server sets itself, from the client's request or from `storage`."""


UNUSED_STORAGE_FIELDS = {
    "encryption": "remove it, and set the default encryption of the bucket",
    "caBundleRef": "remove it, and write an endpoint whose certificate a public CA has signed",
}
"""Fields of `storage` that the server's own requests to S3 would ignore, with what to write instead."""


class ServedModel(WireModel):
    """One model that clients may fine-tune: the fields of FineTuneJob.spec that every job with this model gets."""

    spec: dict[str, Any]


class ServerConfig(WireModel):
    """The configuration of the server."""

    storage: StorageRoot
    """Where the server keeps the clients' files, and where every job stores its results. `credentialsSecretRef` is for the pods of the jobs."""
    models: dict[str, ServedModel] = Field(min_length=1)
    """The models by the name that clients write."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    """Largest file that clients may upload."""

    @field_validator("storage")
    @classmethod
    def _require_s3(cls, storage: StorageRoot) -> StorageRoot:
        if storage.uri is None or not storage.uri.startswith("s3://"):
            raise ValueError("storage.uri must be an S3 address: write s3://bucket/prefix")
        return storage


def load_config(path: Path) -> ServerConfig:
    """Read the configuration. Errors: UnreadableFile, InvalidInput with every mistake."""
    values, lines = read_mapping(path, "a configuration of this server", HINT)
    name = display_name(path)
    try:
        config = ServerConfig.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(list(mistakes_of(error, name, lines, f"unknown key; {HINT}"))) from None
    mistakes = [Mistake(f"{name}:{lines[key]}" if lines.get(key) else name, key, message) for key, message in _problems_of(config)]
    if mistakes:
        raise InvalidInput(mistakes)
    return config


def _problems_of(config: ServerConfig) -> Iterator[tuple[str, str]]:
    """Yield (path, message) of each wrong field of the configuration."""
    for field, instead in UNUSED_STORAGE_FIELDS.items():
        if field in config.storage.to_wire():
            yield f"storage.{field}", f"the server cannot use this field when it writes the files of clients: {instead}"
    for model, served in config.models.items():
        for path, message in _problems_of_spec(served.spec):
            yield f"models.{model}.spec" + (f".{path}" if path else ""), message


def _problems_of_spec(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, message) of each wrong field of a model's spec."""
    for path in FIELDS_OF_THE_SERVER:
        if get_value(spec, path) is not None:
            yield path, "the server sets this field of each job itself: remove it"
    if not get_value(spec, "model.source"):
        yield "model.source", "the base model is missing: write its source, for example org/name"
    try:
        FineTuneJobSpec.model_validate(spec)
    except ValidationError as error:
        for field_error in field_errors(error):
            yield field_error.path, f"{field_error.message}; {field_error.hint}" if field_error.hint else field_error.message


def flatten_fields(values: dict[str, Any], model: Any = FineTuneJobSpec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every field of a spec. A map, such as a node selector, is one value: its keys may contain dots."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        if key not in values:
            continue
        annotations = (field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = next((annotation for annotation in annotations if hasattr(annotation, "model_fields")), None)
        if inner is not None and isinstance(values[key], dict):
            yield from flatten_fields(values[key], inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values[key]
