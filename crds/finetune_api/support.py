"""Fields and values of the API that this release does not implement. The operator refuses a spec that contains such a field or value.

To implement a field, remove its entry from `UNSUPPORTED_FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.base import find_nested_group
from finetune_api.names import Reason
from finetune_api.rules import Problem
from finetune_api.spec import FineTuneJobSpec


def _is_set(value: Any) -> bool:
    return value not in (None, False, 0, [])


@dataclass(frozen=True)
class UnsupportedField:
    """A field of the spec of which this release implements no values, or only some values."""

    path: str
    """Dotted path of attribute names, such as `method.lora.loftq.bits`."""
    is_refused: Callable[[Any], bool] = _is_set
    """A function that returns whether a value of the field is refused."""
    hint: str = "remove it"
    reason: str = "is part of the API, but this release does not implement it"
    """Why the field or value is refused. In the message, this text comes after the value."""

    @property
    def refuses_every_value(self) -> bool:
        """Whether every value of the field is refused."""
        return self.is_refused is _is_set


def _make_check_for_values(*refused_values: object) -> Callable[[Any], bool]:
    return lambda value: value in refused_values


def _make_check_for_list_item(refused_item: object) -> Callable[[Any], bool]:
    return lambda items: refused_item in (items or ())


UNSUPPORTED_FIELDS: tuple[UnsupportedField, ...] = (
    UnsupportedField("method.lora.loftq.bits", _make_check_for_values(2, 8), "write 4, because no library can load LoftQ's base model with 2 or 8 bits"),
    UnsupportedField(
        "method.lora.loftq.iterations",
        lambda value: value not in (None, 1),
        "write 1, because each further iteration changes the quantised base model, but only the adapter is saved",
    ),
    UnsupportedField(
        "output.export", _make_check_for_list_item("gguf"),
        "write safetensors and `mergeAdapter: true`, and convert the folder of status.output.mergedUri (method full: status.output.uri) with "
        "convert_hf_to_gguf.py of llama.cpp",
        "contains gguf, but no library can convert a complete model to GGUF with the transformers version of this release",
    ),
    UnsupportedField(
        "output.export", _make_check_for_list_item("onnx"),
        "write safetensors and `mergeAdapter: true`, and convert the folder of status.output.mergedUri (method full: status.output.uri) with "
        "optimum-onnx and the older transformers version that it needs",
        "contains onnx, but no library can convert a complete model to ONNX with the transformers version of this release",
    ),
)


def find_unsupported_fields(spec: FineTuneJobSpec) -> list[Problem]:
    """Return one problem for each field of the spec whose value this release does not implement."""
    return [_make_problem(spec, field) for field in UNSUPPORTED_FIELDS if field.is_refused(_read_attribute(spec, field.path))]


def _read_attribute(spec: FineTuneJobSpec, path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def to_wire_path(path: str) -> str:
    """Return a dotted path of attribute names as a spec path: `output.mergeAdapter` for `output.merge_adapter`."""
    wire_names: list[str] = []
    model: Any = FineTuneJobSpec
    for name in path.split("."):
        field = model.model_fields[name]
        wire_names.append(field.alias or name)
        model = find_nested_group(field.annotation)
    return ".".join(wire_names)


def _make_problem(spec: FineTuneJobSpec, field: UnsupportedField) -> Problem:
    value = _read_attribute(spec, field.path)
    value_text = f"{value!s} " if isinstance(value, str | int | float) else ""
    return Problem(
        to_wire_path(field.path),
        Reason.NOT_SUPPORTED_YET,
        f"{value_text}{field.reason}",
        field.hint,
    )
