"""Fields of the API that this release does not implement. The operator refuses a spec that sets an unsupported field, instead of ignoring the field.

To implement a field, remove the field's row from `UNSUPPORTED_FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.base import nested_group
from finetune_api.names import Reason
from finetune_api.rules import Problem
from finetune_api.spec import FineTuneJobSpec


def _is_set(value: Any) -> bool:
    return value not in (None, False, 0, [])


@dataclass(frozen=True)
class UnsupportedField:
    """A field of the spec that this release does not implement. `path` is a dotted path of attribute names."""

    path: str
    is_refused: Callable[[Any], bool] = _is_set
    hint: str = "remove it"
    reason: str = "is part of the API, but this release does not implement it"
    """Why the field or value is refused, after the value."""

    @property
    def refuses_every_value(self) -> bool:
        """Whether every value of the field is refused."""
        return self.is_refused is _is_set


def _any_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _contains(item: object) -> Callable[[Any], bool]:
    return lambda values: item in (values or ())


UNSUPPORTED_FIELDS: tuple[UnsupportedField, ...] = (
    UnsupportedField("method.lora.loftq.bits", _any_of(2, 8), "write 4, because no library can load the base model of LoftQ with 2 or 8 bits"),
    UnsupportedField(
        "method.lora.loftq.iterations",
        lambda value: value not in (None, 1),
        "write 1, because each further iteration changes the quantised base model, but only the adapter is saved",
    ),
    UnsupportedField(
        "output.export", _contains("gguf"),
        "write safetensors and `mergeAdapter: true`, and convert the folder of status.output.mergedUri (method full: status.output.uri) with "
        "convert_hf_to_gguf.py of llama.cpp",
        "contains gguf, but no library converts complete models of the transformers version in this release to GGUF",
    ),
    UnsupportedField(
        "output.export", _contains("onnx"),
        "write safetensors and `mergeAdapter: true`, and convert the folder of status.output.mergedUri (method full: status.output.uri) with "
        "optimum-onnx and the older transformers version that it needs",
        "contains onnx, but no library converts complete models of the transformers version in this release to ONNX",
    ),
)


def unsupported_fields(spec: FineTuneJobSpec) -> list[Problem]:
    """Return one problem for each field that the spec sets but this release does not implement."""
    return [_problem(spec, row) for row in UNSUPPORTED_FIELDS if row.is_refused(_value(spec, row.path))]


def _value(spec: FineTuneJobSpec, path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def wire_path(path: str) -> str:
    """Convert a dotted path of attribute names to camelCase: `output.merge_adapter` to `output.mergeAdapter`."""
    parts: list[str] = []
    model: Any = FineTuneJobSpec
    for name in path.split("."):
        field = model.model_fields[name]
        parts.append(field.alias or name)
        model = nested_group(field.annotation)
    return ".".join(parts)


def _problem(spec: FineTuneJobSpec, row: UnsupportedField) -> Problem:
    value = _value(spec, row.path)
    shown = f"{value!s} " if isinstance(value, str | int | float) else ""
    return Problem(
        wire_path(row.path),
        Reason.NOT_SUPPORTED_YET,
        f"{shown}{row.reason}",
        row.hint,
    )
