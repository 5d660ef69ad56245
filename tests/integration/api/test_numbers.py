"""The API server and the Pydantic models accept and refuse the same values of every numeric field of the spec: default, bounds and spellings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import pytest
from finetune_api.base import DEFAULT_KEY
from finetune_api.schema import iterate_constraints
from finetune_api.spec import FineTuneJobSpec, load_spec
from pydantic import BaseModel, ValidationError

from localcluster.api import Endpoint
from tests.integration.api.conftest import JOBS_PATH, Response, call, manifest

pytestmark = pytest.mark.integration
MINIMAL_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}
REQUIRED_SIBLINGS: dict[str, dict[str, Any]] = {
    "dataset.maxBadRowRatio": {"dataset": {"train": "s3://bucket/train.jsonl", "badRows": "skip"}},
    "evaluation.gates[].value": {"evaluation": {"metrics": ["bleu"], "gates": [{"metric": "bleu", "op": "ge"}]}},
    "evaluation.gates[].notWorseThanBase.margin": {"evaluation": {"metrics": ["bleu"]}},
    "evaluation.gates[].notWorseThanBase.confidence": {"evaluation": {"metrics": ["bleu"]}},
}
REQUIRED_IN_ITEM: dict[str, dict[str, Any]] = {
    "trainer.rewards": {"builtin": "thinkFormat"}, "dataset.mixture": {"source": "s3://bucket/a"},
    "evaluation.gates": {"metric": "bleu"}, "evaluation.benchmarks": {"name": "lm-eval", "folder": "s3://bucket/tasks"},
    "output.combineAdapters": {"source": "s3://bucket/a"}, "placement.tolerations": {"key": "spot", "effect": "NoExecute"},
}  # fmt: skip
"""For each list in the spec, the required fields of one item, by the dotted path of the list."""


@dataclass(frozen=True)
class NumberField:
    """A numeric field of the spec. `path` is dotted, with `[]` after the name of a list."""

    path: str
    is_integer: bool
    bounds: dict[str, Any]
    default: Any

    def accepted_spellings(self) -> list[str]:
        """Return all spellings of the default, of the smallest and the largest value, and of each value of an enumeration."""
        values = [*self.bounds.get("enum", []), *([] if self.default is None else [self.default])]
        values += [self.bounds[name] for name in ("ge", "le") if name in self.bounds]
        step = 1 if self.is_integer else 1e-9
        values += [self.bounds["gt"] + step] if "gt" in self.bounds else []
        values += [self.bounds["lt"] - step] if "lt" in self.bounds else []
        return [text for value in values for text in list_spellings(value)]

    def refused_spellings(self) -> list[str]:
        """Return all spellings of values outside the bounds."""
        values = [self.bounds[name] for name in ("gt", "lt") if name in self.bounds]
        values += [self.bounds[name] - 1 for name in ("ge", "gt") if name in self.bounds]
        values += [self.bounds[name] + 1 for name in ("le", "lt") if name in self.bounds]
        values += [max(self.bounds["enum"]) + 1] if "enum" in self.bounds else []
        return [text for value in values for text in list_spellings(value)] + (["1.5"] if self.is_integer else [])


def list_spellings(value: float) -> list[str]:
    """Return the decimal and exponent spellings of a number and, for a whole number, the integer spelling."""
    texts = [repr(value), f"{value:.17e}"]
    if value == int(value):
        texts += [str(int(value)), f"{int(value)}.0", f"{int(value)}e0"]
    return list(dict.fromkeys(texts))


def find_number_fields(model: type[BaseModel], prefix: str = "") -> Iterator[NumberField]:
    for name, info in model.model_fields.items():
        schema_extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        yield from _find_fields_of_type(info.annotation, list(info.metadata), f"{prefix}{info.alias or name}", schema_extra.get(DEFAULT_KEY))


def _find_fields_of_type(annotation: Any, metadata: list[Any], path: str, default: Any) -> Iterator[NumberField]:
    if get_origin(annotation) is Annotated:
        inner_type, *more_metadata = get_args(annotation)
        yield from _find_fields_of_type(inner_type, [*metadata, *more_metadata], path, default)
    elif get_origin(annotation) is list:
        yield from _find_fields_of_type(get_args(annotation)[0], [], f"{path}[]", None)
    elif get_args(annotation):
        member_types = [argument for argument in get_args(annotation) if argument is not type(None)]
        if len(member_types) == 1:
            yield from _find_fields_of_type(member_types[0], metadata, path, default)
    elif issubclass(annotation, BaseModel):
        yield from find_number_fields(annotation, f"{path}.")
    elif issubclass(annotation, int | float) and not issubclass(annotation, bool):
        yield NumberField(path, issubclass(annotation, int), dict(iterate_constraints(metadata)), default)


NUMBER_FIELDS = tuple(find_number_fields(FineTuneJobSpec))


def write_spec(spelling_by_path: dict[str, str]) -> str:
    """Return a spec as JSON text. `spelling_by_path` is the spelling of each number, by dotted path."""
    spec = json.loads(json.dumps(MINIMAL_SPEC))
    for path, text in spelling_by_path.items():
        for group, required_fields in REQUIRED_SIBLINGS.get(path, {}).items():
            spec[group] = spec.get(group, {}) | required_fields
        if path.startswith("dataset.mixture"):
            spec["dataset"].pop("train", None)
        *groups, name = path.split(".")
        target, list_path = spec, []
        for group in groups:
            list_path.append(group.removesuffix("[]"))
            if group.endswith("[]"):
                target = target.setdefault(list_path[-1], [dict(REQUIRED_IN_ITEM.get(".".join(list_path), {}))])[0]
            else:
                target = target.setdefault(group, {})
        if name.endswith("[]"):
            target[name.removesuffix("[]")] = [f"@{text}@"]
        else:
            target[name] = f"@{text}@"
    return re.sub(r'"@([^@"]+)@"', r"\1", json.dumps(spec))


def dry_run(api: Endpoint, spec_text: str) -> Response:
    body = json.dumps(manifest("numbers", {})).replace('"spec": {}', f'"spec": {spec_text}')
    return call(api, "POST", JOBS_PATH, body, dryRun="All", fieldValidation="Strict")


def combine_spellings(spellings_by_path: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield dicts with one spelling per field, until every spelling was used once. If all spellings of a field were used, the later dicts omit the field."""
    for i in range(max(map(len, spellings_by_path.values()))):
        yield {path: spellings[i] for path, spellings in spellings_by_path.items() if i < len(spellings)}


def split_exclusive_fields(spellings_by_path: dict[str, list[str]]) -> list[dict[str, list[str]]]:
    """Split the fields into two sets, because a rule of the spec forbids each field of the second set if a certain field of the first set is present."""
    exclusive_paths = {"training.warmupSteps", "dataset.mixture[].weight", "evaluation.gates[].value"}
    return [
        {path: texts for path, texts in spellings_by_path.items() if path not in exclusive_paths},
        {path: texts for path, texts in spellings_by_path.items() if path in exclusive_paths},
    ]


def test_numeric_fields_are_found_in_groups_lists_and_list_items() -> None:
    paths = {number.path for number in NUMBER_FIELDS}
    assert {"training.learningRate", "trainer.dpo.labelSmoothing", "trainer.rewards[].weight", "checkpoint.pinned[]"} <= paths
    assert len(paths) > 50
    assert all(number.bounds for number in NUMBER_FIELDS)


@pytest.mark.parametrize("group", [0, 1], ids=["combinable", "exclusive"])
def test_default_and_bounds_are_accepted_in_every_spelling(api: Endpoint, group: int) -> None:
    spellings_by_path = split_exclusive_fields({number.path: number.accepted_spellings() for number in NUMBER_FIELDS})[group]
    for spelling_by_path in combine_spellings(spellings_by_path):
        spec_text = write_spec(spelling_by_path)
        response = dry_run(api, spec_text)
        assert response.status == 201, response.message
        FineTuneJobSpec.model_validate_json(spec_text)
        load_spec(json.loads(spec_text))


def test_values_outside_the_bounds_are_refused_in_every_spelling(api: Endpoint) -> None:
    refused_by_schema, refused_by_rule = {}, {}
    for number in NUMBER_FIELDS:
        has_fractional_bound = any(isinstance(bound, float) and not bound.is_integer() for bound in number.bounds.values() if not isinstance(bound, list))
        (refused_by_rule if has_fractional_bound else refused_by_schema)[number.path] = number.refused_spellings()
    for spellings_by_path in (refused_by_schema, refused_by_rule):
        for spelling_by_path in combine_spellings(spellings_by_path):
            spec_text = write_spec(spelling_by_path)
            response = dry_run(api, spec_text)
            assert response.status == 422, (spelling_by_path, response.body)
            refused_paths = {cause["field"].removeprefix("spec.").replace("[0]", "[]") for cause in response.body["details"]["causes"]}
            assert refused_paths >= set(spelling_by_path), sorted(set(spelling_by_path) - refused_paths)
            with pytest.raises(ValidationError) as error:
                FineTuneJobSpec.model_validate_json(spec_text)
            offline_refused_paths = {_to_dotted_path(item["loc"]) for item in error.value.errors()}
            assert offline_refused_paths >= set(spelling_by_path), sorted(set(spelling_by_path) - offline_refused_paths)


def _to_dotted_path(location: tuple[int | str, ...]) -> str:
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
