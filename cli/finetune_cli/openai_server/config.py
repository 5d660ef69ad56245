"""The configuration of the server: where it stores files, and which models clients may fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from finetune_api.base import WireModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from pydantic import Field, ValidationError, field_validator

from finetune_cli.config_files import list_mistakes, read_mapping
from finetune_cli.field_errors import iterate_field_errors
from finetune_cli.fields import get_value
from finetune_cli.files import display_name
from finetune_cli.mistakes import InvalidInput, Mistake

CONFIG_HINT = "write `storage: {uri: s3://bucket/prefix}` and `models:` with the name, and below it the `spec`, of each model"
SERVER_FIELDS = (
    "dataset.train", "dataset.validation", "dataset.test", "dataset.mixture", "dataset.format", "dataset.fileFormat", "dataset.columns", "trainer.type",
    "storage", "suspend", "cancel",
)  # fmt: skip
"""Fields of a job that the `spec` of a model may not contain, because the server sets them from the client's request or from `storage`."""


UNUSED_STORAGE_FIELDS = {
    "encryption": "remove it, and set the default encryption of the bucket",
    "caBundleRef": "remove it, and write an endpoint whose certificate a public CA has signed",
}
"""Hints by field of `storage`. The configuration may not contain these fields, because the server's own requests to S3 would ignore them.

Each hint says what to do instead.
"""


class ServedModel(WireModel):
    """One model that clients may fine-tune. Each job with this model gets the fields in `spec`."""

    spec: dict[str, Any]


class ServerConfig(WireModel):
    """The content of the server's configuration file."""

    storage: StorageRoot
    """The storage for the clients' files and for the results of the jobs. The pods of the jobs use `credentialsSecretRef`, but the server itself does not."""
    models: dict[str, ServedModel] = Field(min_length=1)
    """The models, by the names that clients write."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 512 << 20
    """Largest size of a file that clients may upload, in bytes."""

    @field_validator("storage")
    @classmethod
    def _require_s3(cls, storage: StorageRoot) -> StorageRoot:
        if storage.uri is None or not storage.uri.startswith("s3://"):
            raise ValueError("storage.uri must be an S3 address: write s3://bucket/prefix")
        return storage


def load_config(path: Path) -> ServerConfig:
    """Read the configuration file. Raise UnreadableFile, or InvalidInput with all mistakes."""
    values, lines = read_mapping(path, "a configuration of this server", CONFIG_HINT)
    file_name = display_name(path)
    try:
        config = ServerConfig.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(list(list_mistakes(error, file_name, lines, f"unknown key; {CONFIG_HINT}"))) from None
    mistakes = [Mistake(f"{file_name}:{lines[key]}" if lines.get(key) else file_name, key, message) for key, message in _find_problems(config)]
    if mistakes:
        raise InvalidInput(mistakes)
    return config


def _find_problems(config: ServerConfig) -> Iterator[tuple[str, str]]:
    """Yield the path of each wrong field of the configuration, with a message."""
    for field, hint in UNUSED_STORAGE_FIELDS.items():
        if field in config.storage.to_wire():
            yield f"storage.{field}", f"the server cannot use this field when it writes the files of clients: {hint}"
    for model_name, served_model in config.models.items():
        for path, message in _find_spec_problems(served_model.spec):
            yield f"models.{model_name}.spec" + (f".{path}" if path else ""), message


def _find_spec_problems(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path of each wrong field of a model's spec, with a message."""
    for path in SERVER_FIELDS:
        if get_value(spec, path) is not None:
            yield path, "the server sets this field of each job itself: remove it"
    if not get_value(spec, "model.source"):
        yield "model.source", "the base model is missing: write its source, for example org/name"
    try:
        FineTuneJobSpec.model_validate(spec)
    except ValidationError as error:
        for field_error in iterate_field_errors(error):
            yield field_error.path, f"{field_error.message}; {field_error.hint}" if field_error.hint else field_error.message


def flatten_fields(values: dict[str, Any], model_class: Any = FineTuneJobSpec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each field of a spec. A map such as a node selector is yielded as one value, because its keys may contain dots."""
    for name, field in model_class.model_fields.items():
        key = field.alias or name
        if key not in values:
            continue
        annotations = (field.annotation, *getattr(field.annotation, "__args__", ()))
        class_of_field = next((annotation for annotation in annotations if hasattr(annotation, "model_fields")), None)
        if class_of_field is not None and isinstance(values[key], dict):
            yield from flatten_fields(values[key], class_of_field, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values[key]
