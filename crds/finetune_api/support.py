"""What the API can say and this version cannot do yet: refused by name, never accepted and ignored.

Whoever builds a behaviour removes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.base import nested_group
from finetune_api.names import Reason
from finetune_api.rules import Problem
from finetune_api.spec import FineTuneJobSpec


@dataclass(frozen=True)
class UnsupportedField:
    """A spec path (attribute names, dotted) and for which values it is refused."""

    path: str
    when: Callable[[Any], bool] = lambda value: value not in (None, False, 0, [])
    instead: str = "remove it"


def _is(*words: object) -> Callable[[Any], bool]:
    return lambda value: value in words


UNSUPPORTED_FIELDS: tuple[UnsupportedField, ...] = (
    UnsupportedField("model.modality", _is("visionLanguage"), "train a text model"),
    UnsupportedField("model.cache"),
    UnsupportedField("method.vision"),
    UnsupportedField("method.lora.loftq.bits", _is(2, 8), "write 4: no library loads the other bases that LoftQ makes"),
    UnsupportedField(
        "method.lora.loftq.iterations",
        lambda value: value not in (None, 1),
        "write 1: each further iteration quantises another base, which nobody has who loads the adapter",
    ),
    UnsupportedField("output.dir"),
    UnsupportedField("output.hub"),
    UnsupportedField("output.merge_adapter"),
    UnsupportedField("output.export"),
    UnsupportedField("output.run_name"),
    UnsupportedField("output.project"),
    UnsupportedField("evaluation.metrics"),
    UnsupportedField("evaluation.benchmarks"),
    UnsupportedField("evaluation.judge"),
    UnsupportedField("evaluation.comparison"),
    UnsupportedField("tracking.report_to"),
    UnsupportedField("tracking.system_metrics"),
    UnsupportedField("phases.train", _is(False), "leave it out"),
    UnsupportedField("phases.infer"),
    UnsupportedField("phases.evaluate"),
)


def unsupported_fields(spec: FineTuneJobSpec) -> list[Problem]:
    """Every field of the spec whose behaviour is not there yet."""
    return [_problem(spec, row) for row in UNSUPPORTED_FIELDS if row.when(_value(spec, row.path))]


def _value(spec: FineTuneJobSpec, path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def wire_path(path: str) -> str:
    """Spec path as users write it, from attribute names."""
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
        f"{shown}is part of the API, and this version cannot do it yet",
        row.instead,
    )
