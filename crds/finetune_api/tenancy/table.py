"""The table of rules: the fields that each rule of `policy` checks, and the text of each value that is compared with the patterns.

Each comparison is defined twice: by `read_texts` in Python, and by `build_cel` for the API server. A test applies both definitions to the same specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.base import Group
from finetune_api.sources import redact_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import SecretKeyRef, SecretRef
from finetune_api.tenancy.patterns import NAMESPACE_TOKEN

AMBIGUOUS_ADDRESS = r"(?s)://.*(//|/\.\.?(/|$))"
"""Matches an address that contains an empty folder, `.` or `..`. Some stores resolve such folders, so that the address means another folder."""
AMBIGUOUS_PATH = r"//|/\.\.?(/|$)"
"""Matches a path that contains an empty folder, `.` or `..`."""


@dataclass(frozen=True)
class Pool:
    """A node pool in the operator's configuration."""

    name: str
    gpu_resource: str
    is_default: bool


@dataclass(frozen=True)
class Platform:
    """The values of a job's namespace and of the operator's configuration that the rules need."""

    namespace: str
    storage_uri: str | None = None
    pools: tuple[Pool, ...] = ()

    @property
    def s3_root(self) -> str:
        """The address of the default storage without a slash at the end, or an empty string if it is not an S3 store."""
        uri = remove_end_slash(self.storage_uri or "")
        return uri if uri.startswith("s3://") else ""


@dataclass(frozen=True)
class FieldText:
    """The text of one value that a rule checks."""

    shown_text: str
    """The text in messages, without secrets."""
    compared_text: str | None
    """The text that is compared with the patterns. None: the value is ambiguous, and only the list [`*`] allows it."""


TextReader = Callable[[Any, Platform], Iterator[FieldText]]
CelBuilder = Callable[[str, str], str]


@dataclass(frozen=True)
class PatternCheck:
    """One field that is compared with the patterns of one rule."""

    rule: str
    path: str
    """Path of the field below `spec`. The name of a list ends with `[]`."""
    read_texts: TextReader
    """For a value of the field, yields the texts that are compared with the patterns."""
    build_cel: CelBuilder
    """Returns CEL that is true if the rule allows a value of the field. Arguments: name of the rule, CEL of the value."""


def remove_end_slash(text: str) -> str:
    """Return the text without the slash at its end, if it has one."""
    return text.removesuffix("/")


# Functions that return CEL. In CEL, `variables.rules` holds the patterns of each rule as described in `admission`.


def build_cel_allowed(rule: str, text_cel: str) -> str:
    """Return CEL that is true if the rule's patterns allow the text. `text_cel`: CEL of the text."""
    matching_patterns_cel = f"variables.rules.{rule}.filter(p, {text_cel}.matches(p.substring(1).replace('{NAMESPACE_TOKEN}', request.namespace)))"
    return f"({matching_patterns_cel} + ['-'])[0].startsWith('+')"


def build_cel_allows_everything(rule: str) -> str:
    """Return CEL that is true if the rule is the list [`*`]."""
    return f"variables.rules.{rule} == ['+(?s)^(.*)$']"


def build_cel_without_end_slash(value_cel: str) -> str:
    return f"({value_cel}.endsWith('/') ? {value_cel}.substring(0, size({value_cel}) - 1) : {value_cel})"


def _quote_regex_in_cel(pattern: str) -> str:
    return "r'" + pattern + "'"


def _build_cel_unless_ambiguous(rule: str, text_cel: str, is_ambiguous_cel: str) -> str:
    return f"{is_ambiguous_cel} ? {build_cel_allows_everything(rule)} : {build_cel_allowed(rule, text_cel)}"


def build_cel_for_address(rule: str, address_cel: str) -> str:
    """Return CEL that is true if the rule allows an address to which the job writes. `address_cel`: CEL of the address."""
    return _build_cel_unless_ambiguous(rule, address_cel, f"{address_cel}.matches({_quote_regex_in_cel(AMBIGUOUS_ADDRESS)})")


# The two definitions of each comparison


def _read_value(value: Any, platform: Platform) -> Iterator[FieldText]:
    yield FieldText(str(value), str(value))


def _build_cel_for_value(rule: str, value_cel: str) -> str:
    return build_cel_allowed(rule, value_cel)


def _read_keys(value: Any, platform: Platform) -> Iterator[FieldText]:
    for key in value:
        yield FieldText(key, key)


def _build_cel_for_keys(rule: str, value_cel: str) -> str:
    return f"{value_cel}.all(key, {build_cel_allowed(rule, 'key')})"


def _read_toleration(value: Any, platform: Platform) -> Iterator[FieldText]:
    yield FieldText(value.get("key") or "a toleration of every taint", value.get("key"))


def _build_cel_for_toleration(rule: str, value_cel: str) -> str:
    return f"has({value_cel}.key) ? {build_cel_allowed(rule, f'{value_cel}.key')} : {build_cel_allows_everything(rule)}"


def _read_node_affinity(value: Any, platform: Platform) -> Iterator[FieldText]:
    if value["operator"] not in ("NotIn", "DoesNotExist"):
        yield FieldText(value["key"], value["key"])


def _build_cel_for_node_affinity(rule: str, value_cel: str) -> str:
    return f"{value_cel}.operator in ['NotIn', 'DoesNotExist'] || {build_cel_allowed(rule, f'{value_cel}.key')}"


def _read_mount_path(value: Any, platform: Platform) -> Iterator[FieldText]:
    yield FieldText(value, None if re.search(AMBIGUOUS_PATH, value) else remove_end_slash(value))


def _build_cel_for_mount_path(rule: str, value_cel: str) -> str:
    return _build_cel_unless_ambiguous(rule, build_cel_without_end_slash(value_cel), f"{value_cel}.matches({_quote_regex_in_cel(AMBIGUOUS_PATH)})")


def _read_endpoint(value: Any, platform: Platform) -> Iterator[FieldText]:
    yield FieldText(redact_source(value), remove_end_slash(value).lower())


def _build_cel_for_endpoint(rule: str, value_cel: str) -> str:
    return build_cel_allowed(rule, f"{build_cel_without_end_slash(value_cel)}.lowerAscii()")


def _read_source(value: Any, platform: Platform) -> Iterator[FieldText]:
    """Yield the text of an address from which the job reads. A web address may contain an empty folder, `.` or `..`."""
    is_ambiguous = not value.startswith("https://") and re.search(AMBIGUOUS_ADDRESS, value)
    yield FieldText(redact_source(value), None if is_ambiguous else normalize_source_uri(value))


def _build_cel_for_source(rule: str, value_cel: str) -> str:
    address_cel = f"({value_cel}.contains('://') ? {build_cel_without_end_slash(value_cel)} : 'hf://' + {value_cel})"
    is_ambiguous_cel = f"!{value_cel}.startsWith('https://') && {value_cel}.matches({_quote_regex_in_cel(AMBIGUOUS_ADDRESS)})"
    return _build_cel_unless_ambiguous(rule, address_cel, is_ambiguous_cel)


def _read_resume(value: Any, platform: Platform) -> Iterator[FieldText]:
    if value not in ("auto", "never"):
        yield from _read_source(value, platform)


def _build_cel_for_resume(rule: str, value_cel: str) -> str:
    return f"{value_cel} in ['auto', 'never'] || ({_build_cel_for_source(rule, value_cel)})"


def _read_model_cache(value: Any, platform: Platform) -> Iterator[FieldText]:
    if value not in ("node", "none"):
        yield from _read_source(value, platform)


def _build_cel_for_model_cache(rule: str, value_cel: str) -> str:
    return f"{value_cel} in ['node', 'none'] || ({_build_cel_for_source(rule, value_cel)})"


def _make_destination_text(address: str, shown_text: str) -> FieldText:
    return FieldText(shown_text, None if re.search(AMBIGUOUS_ADDRESS, address) else address)


def _read_storage_uri(value: Any, platform: Platform) -> Iterator[FieldText]:
    """Yield the text of the address below which the job writes: `<storage.uri>/<namespace>`."""
    yield _make_destination_text(f"{remove_end_slash(value)}/{platform.namespace}", value)


def _build_cel_for_storage_uri(rule: str, value_cel: str) -> str:
    return build_cel_for_address(rule, f"({build_cel_without_end_slash(value_cel)} + '/' + request.namespace)")


def _read_hub_repository(value: Any, platform: Platform) -> Iterator[FieldText]:
    yield FieldText(value, f"hf://{value}")


def _build_cel_for_hub_repository(rule: str, value_cel: str) -> str:
    return build_cel_allowed(rule, f"('hf://' + {value_cel})")


def find_paths_of_type(model: type[Group], group_types: tuple[type[Group], ...], path_prefix: str = "") -> Iterator[str]:
    """Yield the path of each field of `model`, at any depth, that holds a group of one of the given types or a list of such groups."""
    for name, info in model.model_fields.items():
        path = f"{path_prefix}{info.alias or name}"
        for group, is_list in _find_groups(info.annotation):
            path_of_value = f"{path}[]" if is_list else path
            if issubclass(group, group_types):
                yield path_of_value
            yield from find_paths_of_type(group, group_types, f"{path_of_value}.")


def _find_groups(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Group], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Group):
        yield annotation, is_list
    is_in_list = is_list or getattr(annotation, "__origin__", None) is list
    for argument in getattr(annotation, "__args__", ()):
        yield from _find_groups(argument, is_in_list)


SECRET_PATHS = (
    *(f"{path}.name" for path in find_paths_of_type(FineTuneJobSpec, (SecretKeyRef, SecretRef))),
    "placement.imagePullSecrets[]", "placement.volumes[].secret",
)  # fmt: skip
SOURCE_PATHS = (
    "model.source", "model.tokenizer", "method.adapter.source", "trainer.dpo.referenceModel", "dataset.train", "dataset.validation",
    "dataset.test", "dataset.mixture[].source", "dataset.images.root", "evaluation.metricModels.bertscore", "evaluation.metricModels.semanticSimilarity",
    "evaluation.benchmarks[].folder", "output.combineAdapters[].source", "phases.from",
)  # fmt: skip
ENDPOINT_PATHS = (
    "storage.endpoint", "model.storage.endpoint", "dataset.storage.endpoint", "evaluation.judge.endpoint", "tracking.mlflow.trackingUri",
)  # fmt: skip

PATTERN_CHECKS: tuple[PatternCheck, ...] = (
    PatternCheck("images", "placement.image", _read_value, _build_cel_for_value),
    PatternCheck("images", "trainer.grpo.generation.image", _read_value, _build_cel_for_value),
    PatternCheck("serviceAccounts", "placement.serviceAccountName", _read_value, _build_cel_for_value),
    *(PatternCheck("secrets", path, _read_value, _build_cel_for_value) for path in SECRET_PATHS),
    PatternCheck("priorityClasses", "placement.priorityClassName", _read_value, _build_cel_for_value),
    PatternCheck("tolerations", "placement.tolerations[]", _read_toleration, _build_cel_for_toleration),
    PatternCheck("nodeLabels", "placement.nodeSelector", _read_keys, _build_cel_for_keys),
    PatternCheck("nodeLabels", "placement.nodeAffinity[]", _read_node_affinity, _build_cel_for_node_affinity),
    PatternCheck("environment", "placement.env[].name", _read_value, _build_cel_for_value),
    PatternCheck("labels", "placement.labels", _read_keys, _build_cel_for_keys),
    PatternCheck("annotations", "placement.annotations", _read_keys, _build_cel_for_keys),
    PatternCheck("mountPaths", "placement.volumeMounts[].mountPath", _read_mount_path, _build_cel_for_mount_path),
    *(PatternCheck("endpoints", path, _read_endpoint, _build_cel_for_endpoint) for path in ENDPOINT_PATHS),
    *(PatternCheck("sources", path, _read_source, _build_cel_for_source) for path in SOURCE_PATHS),
    PatternCheck("sources", "model.cache", _read_model_cache, _build_cel_for_model_cache),
    PatternCheck("sources", "checkpoint.resume", _read_resume, _build_cel_for_resume),
    PatternCheck("destinations", "storage.uri", _read_storage_uri, _build_cel_for_storage_uri),
    PatternCheck("destinations", "output.hub.repository", _read_hub_repository, _build_cel_for_hub_repository),
)
"""All fields that are compared with patterns and do not depend on other fields. The modules `check` and `admission` also check the other fields."""
FOLDER_RULES = frozenset({"mountPaths", "sources", "destinations"})
"""Rules that compare paths or addresses. In the patterns of these rules, `X/*` also matches the folder `X`."""
FORBIDDEN_IF_PRESENT = (("allowUserCode", "trainer.rewards[].configMapRef"),)
"""(rule, path of a field). If the rule is false, the field must not be set."""
FORBIDDEN_IF_TRUE = (
    ("allowTrustRemoteCode", "model.trustRemoteCode"),
    ("allowUserCode", "evaluation.benchmarks[].allowCodeExecution"),
    ("allowUserCode", "checkpoint.allowPickle"),
)
"""(rule, path of a field). If the rule is false, the field must not be true."""


def normalize_source_uri(value: str) -> str:
    """Return the address of a source for the comparison with patterns: without a slash at the end, and `hf://org/name` for `org/name`."""
    return remove_end_slash(value) if "://" in value else f"hf://{value}"
