"""The table of rules: which fields each rule of `policy` checks, and how a field's value becomes the text that the patterns are compared with.

Each comparison exists twice, side by side: `texts` for Python and `cel` for the API server. A test applies both to the same specs.
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

ODD_FOLDERS = r"(?s)://.*(//|/\.\.?(/|$))"
"""An address with an empty folder, `.` or `..`. Some stores resolve such folders, so that the address would point elsewhere."""
ODD_PATH = r"//|/\.\.?(/|$)"


@dataclass(frozen=True)
class Pool:
    """A node pool of the operator's configuration."""

    name: str
    gpu_resource: str
    is_default: bool


@dataclass(frozen=True)
class Platform:
    """The data about a job's namespace and the operator's configuration that the rules need."""

    namespace: str
    storage_uri: str | None = None
    pools: tuple[Pool, ...] = ()

    @property
    def s3_root(self) -> str:
        """The default storage without a slash at the end, or an empty string if it is not an S3 store."""
        uri = without_end_slash(self.storage_uri or "")
        return uri if uri.startswith("s3://") else ""


@dataclass(frozen=True)
class Text:
    """One value of a field. `compared` is compared with the patterns; None: only a rule with exactly `*` allows the value."""

    shown: str
    compared: str | None


Texts = Callable[[Any, Platform], Iterator[Text]]
Cel = Callable[[str, str], str]


@dataclass(frozen=True)
class PatternCheck:
    """One field of one pattern rule. `path` has `[]` after the name of each list."""

    rule: str
    path: str
    texts: Texts
    cel: Cel


def without_end_slash(text: str) -> str:
    """Return the text without one slash at its end."""
    return text.removesuffix("/")


# CEL. `variables.rules` maps each rule to its patterns as regular expressions, the last pattern of the policy first, with `+` or `-` in front.


def cel_allowed(rule: str, text: str) -> str:
    """CEL: whether the last pattern that matches `text` allows it."""
    matching = f"variables.rules.{rule}.filter(p, {text}.matches(p.substring(1).replace('{NAMESPACE_TOKEN}', request.namespace)))"
    return f"({matching} + ['-'])[0].startsWith('+')"


def cel_unrestricted(rule: str) -> str:
    """CEL: whether the rule is exactly `*`."""
    return f"variables.rules.{rule} == ['+(?s)^(.*)$']"


def cel_without_end_slash(value: str) -> str:
    return f"({value}.endsWith('/') ? {value}.substring(0, size({value}) - 1) : {value})"


def _cel_regex(pattern: str) -> str:
    return "r'" + pattern + "'"


def _cel_comparable(rule: str, text: str, is_odd: str) -> str:
    return f"{is_odd} ? {cel_unrestricted(rule)} : {cel_allowed(rule, text)}"


def cel_address(rule: str, address: str) -> str:
    """CEL: whether the rule allows an address that the job writes."""
    return _cel_comparable(rule, address, f"{address}.matches({_cel_regex(ODD_FOLDERS)})")


# How values are compared


def _plain(value: Any, platform: Platform) -> Iterator[Text]:
    yield Text(str(value), str(value))


def _cel_plain(rule: str, value: str) -> str:
    return cel_allowed(rule, value)


def _keys(value: Any, platform: Platform) -> Iterator[Text]:
    for key in value:
        yield Text(key, key)


def _cel_keys(rule: str, value: str) -> str:
    return f"{value}.all(key, {cel_allowed(rule, 'key')})"


def _toleration(value: Any, platform: Platform) -> Iterator[Text]:
    yield Text(value.get("key") or "a toleration of every taint", value.get("key"))


def _cel_toleration(rule: str, value: str) -> str:
    return f"has({value}.key) ? {cel_allowed(rule, f'{value}.key')} : {cel_unrestricted(rule)}"


def _node_affinity(value: Any, platform: Platform) -> Iterator[Text]:
    if value["operator"] not in ("NotIn", "DoesNotExist"):
        yield Text(value["key"], value["key"])


def _cel_node_affinity(rule: str, value: str) -> str:
    return f"{value}.operator in ['NotIn', 'DoesNotExist'] || {cel_allowed(rule, f'{value}.key')}"


def _mount_path(value: Any, platform: Platform) -> Iterator[Text]:
    yield Text(value, None if re.search(ODD_PATH, value) else without_end_slash(value))


def _cel_mount_path(rule: str, value: str) -> str:
    return _cel_comparable(rule, cel_without_end_slash(value), f"{value}.matches({_cel_regex(ODD_PATH)})")


def _endpoint(value: Any, platform: Platform) -> Iterator[Text]:
    yield Text(redact_source(value), without_end_slash(value).lower())


def _cel_endpoint(rule: str, value: str) -> str:
    return cel_allowed(rule, f"{cel_without_end_slash(value)}.lowerAscii()")


def _source(value: Any, platform: Platform) -> Iterator[Text]:
    """An address that the job reads. `org/name` is an address of the hub; the path of a web address is not examined."""
    is_odd = not value.startswith("https://") and re.search(ODD_FOLDERS, value)
    yield Text(redact_source(value), None if is_odd else source_address(value))


def _cel_source(rule: str, value: str) -> str:
    address = f"({value}.contains('://') ? {cel_without_end_slash(value)} : 'hf://' + {value})"
    return _cel_comparable(rule, address, f"!{value}.startsWith('https://') && {value}.matches({_cel_regex(ODD_FOLDERS)})")


def _resume(value: Any, platform: Platform) -> Iterator[Text]:
    if value not in ("auto", "never"):
        yield from _source(value, platform)


def _cel_resume(rule: str, value: str) -> str:
    return f"{value} in ['auto', 'never'] || ({_cel_source(rule, value)})"


def _cache(value: Any, platform: Platform) -> Iterator[Text]:
    if value not in ("node", "none"):
        yield from _source(value, platform)


def _cel_cache(rule: str, value: str) -> str:
    return f"{value} in ['node', 'none'] || ({_cel_source(rule, value)})"


def _written(address: str, shown: str) -> Text:
    return Text(shown, None if re.search(ODD_FOLDERS, address) else address)


def _storage_uri(value: Any, platform: Platform) -> Iterator[Text]:
    """The job writes below `<storage.uri>/<namespace>`."""
    yield _written(f"{without_end_slash(value)}/{platform.namespace}", value)


def _cel_storage_uri(rule: str, value: str) -> str:
    return cel_address(rule, f"({cel_without_end_slash(value)} + '/' + request.namespace)")


def _hub_repository(value: Any, platform: Platform) -> Iterator[Text]:
    yield Text(value, f"hf://{value}")


def _cel_hub_repository(rule: str, value: str) -> str:
    return cel_allowed(rule, f"('hf://' + {value})")


def paths_of_type(model: type[Group], types: tuple[type[Group], ...], prefix: str = "") -> Iterator[str]:
    """Yield the path of each field whose value is, or contains, a group of one of the types."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        for group, is_list in _groups_of(info.annotation):
            path_of_value = f"{path}[]" if is_list else path
            if issubclass(group, types):
                yield path_of_value
            yield from paths_of_type(group, types, f"{path_of_value}.")


def _groups_of(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Group], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Group):
        yield annotation, is_list
    in_list = is_list or getattr(annotation, "__origin__", None) is list
    for argument in getattr(annotation, "__args__", ()):
        yield from _groups_of(argument, in_list)


SECRET_PATHS = (
    *(f"{path}.name" for path in paths_of_type(FineTuneJobSpec, (SecretKeyRef, SecretRef))),
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
    PatternCheck("images", "placement.image", _plain, _cel_plain),
    PatternCheck("images", "trainer.grpo.generation.image", _plain, _cel_plain),
    PatternCheck("serviceAccounts", "placement.serviceAccountName", _plain, _cel_plain),
    *(PatternCheck("secrets", path, _plain, _cel_plain) for path in SECRET_PATHS),
    PatternCheck("priorityClasses", "placement.priorityClassName", _plain, _cel_plain),
    PatternCheck("tolerations", "placement.tolerations[]", _toleration, _cel_toleration),
    PatternCheck("nodeLabels", "placement.nodeSelector", _keys, _cel_keys),
    PatternCheck("nodeLabels", "placement.nodeAffinity[]", _node_affinity, _cel_node_affinity),
    PatternCheck("environment", "placement.env[].name", _plain, _cel_plain),
    PatternCheck("labels", "placement.labels", _keys, _cel_keys),
    PatternCheck("annotations", "placement.annotations", _keys, _cel_keys),
    PatternCheck("mountPaths", "placement.volumeMounts[].mountPath", _mount_path, _cel_mount_path),
    *(PatternCheck("endpoints", path, _endpoint, _cel_endpoint) for path in ENDPOINT_PATHS),
    *(PatternCheck("sources", path, _source, _cel_source) for path in SOURCE_PATHS),
    PatternCheck("sources", "model.cache", _cache, _cel_cache),
    PatternCheck("sources", "checkpoint.resume", _resume, _cel_resume),
    PatternCheck("destinations", "storage.uri", _storage_uri, _cel_storage_uri),
    PatternCheck("destinations", "output.hub.repository", _hub_repository, _cel_hub_repository),
)
"""Every field whose own value a pattern rule checks. `check` and `admission` add the fields that depend on other fields."""
FOLDER_RULES = frozenset({"mountPaths", "sources", "destinations"})
"""Rules whose patterns are compared with folders; see `patterns`."""
FORBIDDEN_IF_PRESENT = (("allowUserCode", "trainer.rewards[].configMapRef"),)
"""Fields that a rule forbids if the rule is false, whatever their value."""
FORBIDDEN_IF_TRUE = (
    ("allowTrustRemoteCode", "model.trustRemoteCode"),
    ("allowUserCode", "evaluation.benchmarks[].allowCodeExecution"),
    ("allowUserCode", "checkpoint.allowPickle"),
)
"""Fields that must not be true if the rule is false."""


def source_address(value: str) -> str:
    """Return the address of a source in the form that is compared with the patterns."""
    return without_end_slash(value) if "://" in value else f"hf://{value}"
