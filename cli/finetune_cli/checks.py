"""Checks manifests of FineTuneJobs offline, against the schema and every rule of the API server and the operator."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.names import API_VERSION, KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.rules import ExecutionTarget, Problem, check_spec, find_warnings
from finetune_api.sources import is_data_file_name
from finetune_api.spec import FineTuneJobSpec, load_spec
from finetune_api.support import find_unsupported_fields
from pydantic import ValidationError

from finetune_cli.field_errors import FieldError, find_locations_to_remove, is_within, iterate_field_errors
from finetune_cli.fields import get_value
from finetune_cli.manifests import Manifest
from finetune_cli.mistakes import Mistake
from finetune_cli.redaction import contains_secret
from finetune_cli.suggestions import find_closest_name
from finetune_cli.unknown_fields import find_unknown_fields


@dataclass(frozen=True)
class Finding:
    """One problem of a manifest: an error or, if `is_error` is false, a warning. Only `validate --strict` refuses a manifest because of a warning."""

    mistake: Mistake
    code: str
    is_error: bool = True


def select_errors(findings: list[Finding]) -> list[Finding]:
    """Return the findings that are errors."""
    return [finding for finding in findings if finding.is_error]


def select_warnings(findings: list[Finding]) -> list[Mistake]:
    """Return the warnings. A warning is about a value that is valid, but probably not intended."""
    return [finding.mistake for finding in findings if not finding.is_error]


def check_manifest(
    manifest: Manifest, target: ExecutionTarget = ExecutionTarget.CLUSTER
) -> tuple[FineTuneJobSpec | None, list[Finding]]:
    """Return the spec (None if it cannot be read) and every problem of the manifest."""
    findings = list(_check_metadata(manifest))
    raw_spec = manifest.value.get("spec")
    if not isinstance(raw_spec, dict):
        message = "the spec is missing" if raw_spec is None else "the spec is not a mapping"
        mistake = Mistake(manifest.location("spec"), "spec", message, "write `spec:` followed by its fields")
        return None, [*findings, Finding(mistake, "SpecMissing")]
    unknown_fields = list(find_unknown_fields(raw_spec))
    raw_spec = remove_nulls(raw_spec)
    findings += [_make_finding(manifest, field.path, field.message, field.hint, "UnknownField") for field in unknown_fields]
    spec, field_errors = _load_spec(raw_spec)
    findings += [
        _make_finding(manifest, error.path, error.message, error.hint, "ValueInvalid")
        for error in field_errors
        if not error.is_unknown and not any(is_within(error.path, field.path) for field in unknown_fields)
    ]
    if spec is not None:
        # If the user misspelled the name of a field, the error about the unknown name is enough: the field is not reported as missing too.
        misnamed_paths = {field.suggested_path for field in unknown_fields}
        findings += [
            _make_finding(manifest, problem.path, problem.message, problem.hint, problem.code)
            for problem in _find_broken_rules(spec, raw_spec, target)
            if problem.path not in misnamed_paths and not any(_is_caused_by(problem, error) for error in field_errors)
        ]
        findings += [
            _make_finding(manifest, warning.path, warning.message, warning.hint, warning.code, is_error=False)
            for warning in find_warnings(spec)
        ]
    findings += _find_secrets(manifest, raw_spec)
    return spec, findings


def _is_caused_by(problem: Problem, error: FieldError) -> bool:
    """Return whether the rule in `problem` is broken only because the invalid value in `error` was removed from the spec.

    The result is true if the rule is about the invalid field, about a group that contains this field, or about a field inside it. The result is also
    true if the rule reports that the model or the data is missing, and the invalid field is in `model` or `dataset`.
    """
    is_missing_source = problem.code in ("ModelMissing", "DatasetMissing") and is_within(error.path, problem.path.partition(".")[0])
    return is_missing_source or is_within(problem.path, error.path) or is_within(error.path, problem.path)


def _find_broken_rules(spec: FineTuneJobSpec, raw_spec: dict[str, Any], target: ExecutionTarget) -> list[Problem]:
    """Return the rules that a spec breaks, and its fields that this release does not implement.

    In a local run, a source may also be a path on this machine.
    """
    unsupported_problems = find_unsupported_fields(spec)
    problems = [problem for problem in check_spec(spec, target=target) if not _is_about_unsupported_field(problem, unsupported_problems)]
    is_local = target is ExecutionTarget.LOCAL
    return [
        problem for problem in (*problems, *unsupported_problems)
        if not (is_local and problem.code == "SourceInvalid" and _is_local_path(raw_spec, problem.path))
    ]  # fmt: skip


def _make_finding(manifest: Manifest, path: str, message: str, hint: str, code: str, *, is_error: bool = True) -> Finding:
    return Finding(Mistake(manifest.location(f"spec.{path}"), f"spec.{path}", message, hint), code, is_error)


def remove_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the mapping without null values, because the API server removes null values too."""
    return {
        key: remove_nulls(inner) if isinstance(inner, dict) else inner
        for key, inner in mapping.items()
        if inner is not None
    }


def _is_about_unsupported_field(problem: Problem, unsupported_problems: list[Problem]) -> bool:
    """Return whether a problem is about an unsupported field.

    Such a problem is not reported, because its hint would contradict the hint to remove the field.
    """
    unsupported_paths = [field.path for field in unsupported_problems]
    return any(is_within(problem.path, path) for path in unsupported_paths) or (
        "tracking.reportTo" in unsupported_paths and is_within(problem.path, "tracking")
    )


def _is_local_path(raw_spec: dict[str, Any], path: str) -> bool:
    """Return whether a field holds a path on the user's machine. `run --local` accepts such paths."""
    value = get_value(raw_spec, path)
    return isinstance(value, str) and (value.startswith(("file://", ".", "/", "~")) or is_data_file_name(value))


def _find_secrets(manifest: Manifest, raw_spec: dict[str, Any], path: str = "spec") -> Iterator[Finding]:
    """Yield a warning for each string that looks like a secret. Everyone who may read the job can see its spec."""
    for key, inner in raw_spec.items():
        field_path = f"{path}.{key}"
        if isinstance(inner, dict):
            yield from _find_secrets(manifest, inner, field_path)
        elif contains_secret(inner):
            message = "the value looks like a token or password, and everyone who may read the job can see the value"
            hint = "store the value in a Secret and refer to the Secret"
            yield Finding(
                Mistake(manifest.location(field_path), field_path, message, hint), "LooksSecret", is_error=False
            )


# --- metadata -------------------------------------------------------------------------------------------------------

TOP_LEVEL_KEYS = ("apiVersion", "kind", "metadata", "spec", "status")
METADATA_KEYS = (
    "name", "namespace", "labels", "annotations", "generateName", "finalizers", "ownerReferences", "uid", "resourceVersion", "generation",
    "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields", "selfLink",
)  # fmt: skip


def _check_metadata(manifest: Manifest) -> Iterator[Finding]:
    """Yield a finding for each problem in the parts of a manifest other than `spec`."""
    for key, expected_value, code in (("apiVersion", API_VERSION, "ApiVersion"), ("kind", KIND, "Kind")):
        value = manifest.value.get(key)
        if value != expected_value:
            message = "this required field is missing" if value is None else f"{value} is not {expected_value}"
            yield Finding(Mistake(manifest.location(key), key, message, f"write {key}: {expected_value}"), code)
    yield from (_report_unknown_key(manifest, key, TOP_LEVEL_KEYS, "") for key in manifest.value if key not in TOP_LEVEL_KEYS)
    metadata = manifest.value.get("metadata")
    message = find_name_problem(manifest.name)
    if message:
        hint = _make_name_hint(manifest.name, metadata)
        yield Finding(Mistake(manifest.location("metadata.name"), "metadata.name", message, hint), "NameInvalid")
    if isinstance(metadata, dict):
        yield from (
            _report_unknown_key(manifest, key, METADATA_KEYS, "metadata.") for key in metadata if key not in METADATA_KEYS
        )
        yield from _find_unquoted_values(manifest, metadata)


def _make_name_hint(name: str, metadata: Any) -> str:
    """Return a hint for a missing or invalid name: the rule for names, and a corrected name if one can be derived."""
    name_rule = f"write at most {MAX_NAME_LENGTH} characters a-z, 0-9 and -, beginning with a letter"
    if not name and isinstance(metadata, dict) and metadata.get("generateName"):
        return f"only `kubectl create` uses generateName, so {name_rule}"
    corrected_name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    can_suggest_name = bool(corrected_name) and corrected_name != name and not find_name_problem(corrected_name)
    return f"{name_rule}, for example {corrected_name}" if can_suggest_name else name_rule


def find_name_problem(name: str) -> str:
    """Return why a text is not a valid name of a FineTuneJob, or an empty string for a valid name."""
    if not name:
        return "this required field is missing"
    if len(name) > MAX_NAME_LENGTH:
        return f"{name!r} has {len(name)} characters, and the name of a FineTuneJob may have at most {MAX_NAME_LENGTH}"
    return "" if re.match(NAME_PATTERN, name) else f"{name!r} cannot be the name of a FineTuneJob"


def _report_unknown_key(manifest: Manifest, key: str, known_keys: tuple[str, ...], prefix: str) -> Finding:
    closest_key = find_closest_name(key, known_keys)
    hint = (
        f"did you mean {prefix}{closest_key}?" if closest_key else "remove it" if prefix else "remove it, or move it below spec"
    )
    return Finding(Mistake(manifest.location(prefix + key), prefix + key, "unknown field", hint), "UnknownField")


def _find_unquoted_values(manifest: Manifest, metadata: dict[str, Any]) -> Iterator[Finding]:
    """Yield an error for each number or boolean in labels, annotations and namespace. The API server accepts only strings there."""
    keys_and_values: list[tuple[str, Any]] = [("namespace", metadata.get("namespace"))]
    for mapping_name in ("labels", "annotations"):
        mapping = metadata.get(mapping_name)
        keys_and_values += [(f"{mapping_name}.{key}", value) for key, value in mapping.items()] if isinstance(mapping, dict) else []
    for key, value in keys_and_values:
        if isinstance(value, bool | int | float):
            path, text = f"metadata.{key}", str(value).lower() if isinstance(value, bool) else str(value)
            mistake = Mistake(manifest.location(path), path, f"{text} is not a string", f'quote it: "{text}"')
            yield Finding(mistake, "ValueInvalid")


# --- invalid values ------------------------------------------------------------------------------


def _load_spec(raw_spec: dict[str, Any]) -> tuple[FineTuneJobSpec | None, list[FieldError]]:
    """Validate the spec with the pydantic models. Return the spec and an error for each invalid value.

    Invalid values are removed, so that the rules can check all other fields.
    """
    errors: list[FieldError] = []
    remaining_spec = raw_spec
    for _ in range(3):
        try:
            return load_spec(remaining_spec), errors
        except ValidationError as error:
            errors += list(iterate_field_errors(error, errors))
            remaining_spec = _remove_locations(remaining_spec, list(find_locations_to_remove(error)))
    return None, errors


def _remove_locations(raw_spec: dict[str, Any], locations: list[tuple[Any, ...]]) -> dict[str, Any]:
    """Return a copy of the spec without the fields at these locations. A list with an invalid item is removed as a whole."""
    remaining_spec = copy.deepcopy(raw_spec)
    for location in locations:
        parent: Any = remaining_spec
        for depth, key in enumerate(location):
            inner_value = parent.get(key) if isinstance(parent, dict) else None
            if depth == len(location) - 1 or not isinstance(inner_value, dict):
                if isinstance(parent, dict):
                    parent.pop(key, None)
                break
            parent = inner_value
    return remaining_spec
