"""Read the spec of a FineTuneJob and `run.json` even if the next older or next newer release wrote them.

The default of a new field always keeps the behaviour of older releases. An older release may therefore ignore an unknown field that has
its default value, but not an unknown field that the user set. `docs/decisions/0070-contract-across-versions.md` describes these rules.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.base import make_version_sort_key
from finetune_api.errors import ConfigError, TooOldError
from finetune_api.names import OLDEST_TRAINER, RELEASE, Origin
from finetune_api.pod import RunConfig, read_marks
from finetune_api.spec import FineTuneJobSpec

UNKNOWN_FIELD_ERROR = "extra_forbidden"
"""pydantic's error type for a field that the model does not have."""
UNKNOWN_VALUE_ERRORS = ("enum", "literal_error")
"""pydantic's error types for a value that an enumeration does not have."""
Location = tuple[int | str, ...]
"""pydantic's location of a value: the field names and list indices that lead to it."""
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class UnknownItem:
    """A field, or a value of an enumeration, that this release does not know."""

    location: Location
    value: Any
    is_field: bool


def read_spec(raw_spec: Mapping[str, Any]) -> tuple[FineTuneJobSpec, tuple[str, ...]]:
    """Return the spec without unknown fields and unknown enumeration values, and the spec paths of these fields and values.

    Errors: ValidationError for values that no release accepts.
    """
    spec, unknown_items = _read_known_items(FineTuneJobSpec, dict(raw_spec))
    return spec, tuple(_format_dotted_path(item.location) for item in unknown_items)


def read_run_config(run_json: bytes) -> RunConfig:
    """Read the bytes of `run.json`.

    An unknown field inside the spec is ignored only if its value is a default. Unknown fields outside the spec are always ignored: if a
    trainer must know such a field, the operator writes a higher `minTrainerVersion`. Errors: TooOldError `TrainerTooOld` if `run.json`
    contains an unknown field of the spec that is not a default, contains an unknown enumeration value, or requires a newer trainer; ConfigError
    `RunFileInvalid` if `run.json` cannot be read.
    """
    try:
        raw_config = json.loads(run_json)
    except ValueError as error:
        raise ConfigError("RunFileInvalid", f"run.json is not JSON: {error}") from error
    needed_release = str(read_marks(raw_config).get("minTrainerVersion", OLDEST_TRAINER)) if isinstance(raw_config, dict) else OLDEST_TRAINER
    if make_version_sort_key(needed_release) > make_version_sort_key(RELEASE):
        raise _make_too_old_error(f"run.json needs trainer {needed_release} or newer")
    try:
        run_config, unknown_items = _read_known_items(RunConfig, raw_config)
    except ValidationError as error:
        first_error = error.errors()[0]
        raise ConfigError("RunFileInvalid", f"run.json: {_format_dotted_path(first_error['loc'])}: {first_error['msg']}") from error
    refused_paths = [path for item in unknown_items for path in _iterate_paths_to_refuse(run_config, item)]
    if refused_paths:
        raise _make_too_old_error(f"run.json contains {', '.join(refused_paths)}, which this trainer does not know")
    return run_config


def _make_too_old_error(reason: str) -> TooOldError:
    hint = "use a trainer image of the operator's release: update or remove spec.placement.image"
    return TooOldError("TrainerTooOld", f"{reason}; this is trainer {RELEASE}", hint=hint)


def _iterate_paths_to_refuse(run_config: RunConfig, unknown_item: UnknownItem) -> Iterator[str]:
    """Yield the path of the unknown item, unless the trainer can ignore the item.

    For an unknown enumeration value, yield `path: value`. For an unknown group, yield the paths of those values in the group that the trainer cannot ignore.
    """
    location, value = unknown_item.location, unknown_item.value
    if not unknown_item.is_field:
        yield f"{_format_dotted_path(location)}: {value}"
        return
    path = _format_dotted_path(location[1:])
    if location[0] != "spec" or (path in run_config.defaults and run_config.origin(path) is Origin.DEFAULT):
        return
    if isinstance(value, dict):
        for name, nested_value in value.items():
            yield from _iterate_paths_to_refuse(run_config, UnknownItem((*location, name), nested_value, is_field=True))
    else:
        yield f"spec.{path}"


def _read_known_items(model: type[Model], raw_values: Any) -> tuple[Model, list[UnknownItem]]:
    """Return the model with the known fields, and the list of unknown fields and values. Errors: ValidationError for values that no release accepts."""
    raw_values = copy.deepcopy(raw_values)
    unknown_items: list[UnknownItem] = []
    while True:
        try:
            return model.model_validate(raw_values), unknown_items
        except ValidationError as error:
            removed_locations = {item.location for item in unknown_items}
            error_type_by_location = {
                detail["loc"]: detail["type"] for detail in error.errors() if detail["type"] in (UNKNOWN_FIELD_ERROR, *UNKNOWN_VALUE_ERRORS)
            } | {
                location: detail["type"] for detail in error.errors() if (location := _find_incomplete_container(detail, removed_locations))
            }  # fmt: skip
            if not error_type_by_location:
                raise
            # Remove items from the end of a list first, so that the indices of the items before them remain valid.
            for location in sorted(error_type_by_location, key=_make_location_sort_key, reverse=True):
                value = _remove_value_at(raw_values, location)
                unknown_items.append(UnknownItem(location, value, is_field=error_type_by_location[location] == UNKNOWN_FIELD_ERROR))


def _find_incomplete_container(error_details: ErrorDetails, removed_locations: set[Location]) -> Location:
    """Return the location of a group or list that has an error only because an unknown item in it was removed; () if the error has another cause.

    For example, a group cannot be read without its required fields, and the only item of a list cannot be removed if the list must not be empty.
    """
    location = error_details["loc"]
    if error_details["type"] == "missing":
        return location[:-1] if location in removed_locations else ()
    return location if any(len(removed) > len(location) and removed[: len(location)] == location for removed in removed_locations) else ()


def _make_location_sort_key(location: Location) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (0, part) for part in location]


def _remove_value_at(container: Any, location: Location) -> Any:
    """Remove the value at `location` from nested dicts and lists, and return the value."""
    *parent_keys, last_key = location
    for key in parent_keys:
        container = container[key]
    return container.pop(last_key)


def _format_dotted_path(location: Location) -> str:
    """Return a location as a dotted path: `("spec", "trainer", "rewards", 0)` is `spec.trainer.rewards[0]`."""
    dotted_path = ""
    for part in location:
        dotted_path += f"[{part}]" if isinstance(part, int) else f".{part}" if dotted_path else str(part)
    return dotted_path
