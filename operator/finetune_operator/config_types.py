"""Types of configuration values that are copied into pods: quantities, labels, tolerations, environment variables.

Each type checks Kubernetes' rules when the configuration is loaded. Without this check, the API server would reject each Job that contains
a wrong value, and every FineTuneJob would be blocked. Each type also contains the rules as a JSON schema, so that `helm install` rejects
a wrong value.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any

from finetune_api.names import GROUP, Label
from finetune_api.spec.cluster import Toleration
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

Schema = dict[str, Any]

DNS_LABEL_PATTERN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DNS_SUBDOMAIN = rf"{DNS_LABEL_PATTERN}(\.{DNS_LABEL_PATTERN})*"
LABEL_NAME_PATTERN = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_KEY_PATTERN = rf"^({DNS_SUBDOMAIN}/)?{LABEL_NAME_PATTERN}$"
LABEL_VALUE_PATTERN = rf"^({LABEL_NAME_PATTERN})?$"
ENV_NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][-+]?[0-9]+)?$"
RESERVED_KEY_PATTERN = rf"^({GROUP}/|{Label.MANAGED_BY}$|batch\.kubernetes\.io/)".replace("-operator.", r"-operator\.")
"""Matches the keys of labels and annotations that the operator or the Job controller sets. A configured value for such a key would be lost."""
RESERVED_ENV_PATTERN = r"^FINETUNE_"

LABEL_KEY_RULE = "at most 63 letters, digits, '-', '_' and '.'; a DNS name and '/' may precede them"
LABEL_VALUE_RULE = "at most 63 letters, digits, '-', '_' and '.', with a letter or digit first and last"


def _check_quantity(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if is_number or (isinstance(value, str) and re.fullmatch(QUANTITY_PATTERN, value)):
        return value
    raise ValueError(f"{value!r} is not a quantity: write a string like '500m' or '8Gi', or an integer")


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY_PATTERN, key):
            raise ValueError(f"{key!r} is not a label key: write {LABEL_KEY_RULE}")
        if not re.fullmatch(LABEL_VALUE_PATTERN, value):
            raise ValueError(f"{value!r} is not a value for label {key}: write {LABEL_VALUE_RULE}")
    return labels


def _check_annotations(annotations: dict[str, str]) -> dict[str, str]:
    for key in annotations:
        if not re.fullmatch(LABEL_KEY_PATTERN, key):
            raise ValueError(f"{key!r} is not an annotation key: write {LABEL_KEY_RULE}")
    return annotations


def _check_no_reserved_keys(labels_or_annotations: dict[str, str]) -> dict[str, str]:
    for key in labels_or_annotations:
        if re.match(RESERVED_KEY_PATTERN, key):
            raise ValueError(f"{key} is set by the operator or by Kubernetes: remove it")
    return labels_or_annotations


def _check_env_variables(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if not re.fullmatch(ENV_NAME_PATTERN, name):
            raise ValueError(
                f"{name!r} is not a name of an environment variable: write letters, digits and '_', and start with a letter or '_'"
            )
        if re.match(RESERVED_ENV_PATTERN, name):
            raise ValueError(f"{name} is set by the operator: remove it")
    return variables


def _check_toleration(toleration: Toleration) -> Toleration:
    if toleration.operator == "Exists" and toleration.value:
        raise ValueError("operator Exists does not compare values: remove value, or set operator to Equal")
    if not toleration.key and toleration.operator != "Exists":
        raise ValueError("a toleration without key needs operator Exists; it then matches all taints")
    if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
        raise ValueError("tolerationSeconds needs effect NoExecute")
    if toleration.value and not re.fullmatch(LABEL_VALUE_PATTERN, toleration.value):
        raise ValueError(f"{toleration.value!r} is not a taint value: write {LABEL_VALUE_RULE}")
    return toleration


def _check_cidr(cidr: str) -> str:
    try:
        return str(ipaddress.ip_network(cidr))
    except ValueError as error:
        raise ValueError(f"{cidr!r} is not an address range: write for example 10.0.0.0/8 or fd00::/8") from error


def _build_map_schema(key_pattern: str, value_schema: Schema, reserved_key_pattern: str = "") -> Schema:
    # Helm 4.3 reports the errors of `propertyNames` at a wrong location, so the schema uses `patternProperties`.
    allowed_properties: Schema = {key_pattern: {"type": "string"} | value_schema}
    forbidden_properties: Schema = {reserved_key_pattern: False} if reserved_key_pattern else {}
    return {"type": "object", "patternProperties": allowed_properties | forbidden_properties, "additionalProperties": False}


QUANTITY_SCHEMA: Schema = {
    "anyOf": [{"type": "string", "pattern": QUANTITY_PATTERN}, {"type": "integer", "minimum": 0}]
}
LABELS_SCHEMA = _build_map_schema(LABEL_KEY_PATTERN, {"pattern": LABEL_VALUE_PATTERN})
ANNOTATIONS_SCHEMA = _build_map_schema(LABEL_KEY_PATTERN, {})
TOLERATION_RULES: list[Schema] = [
    {
        "if": {"properties": {"operator": {"const": "Exists"}}, "required": ["operator"]},
        "then": {"properties": {"value": {"maxLength": 0}}},
    },
    {"anyOf": [{"required": ["key"]}, {"properties": {"operator": {"const": "Exists"}}, "required": ["operator"]}]},
    {
        "if": {"required": ["tolerationSeconds"]},
        "then": {"properties": {"effect": {"const": "NoExecute"}}, "required": ["effect"]},
    },
    {"properties": {"value": {"pattern": LABEL_VALUE_PATTERN}}},
]

DnsName = Annotated[str, StringConstraints(pattern=rf"^{DNS_SUBDOMAIN}$", max_length=253)]
"""Name of a Kubernetes object, such as a Secret."""
NamespaceName = Annotated[str, StringConstraints(pattern=rf"^{DNS_LABEL_PATTERN}$", max_length=63)]
HostPath = Annotated[str, StringConstraints(pattern=r"^(/([^/\s:.]|\.[^/\s:.])[^/\s:]*){2,}$", max_length=253)]
"""Absolute path of a folder on a node, at least two levels deep. The path contains no `:`, which Kubernetes forbids in the paths of volumes."""
Cidr = Annotated[str, AfterValidator(_check_cidr), WithJsonSchema({"type": "string", "pattern": "^[0-9a-fA-F:.]+/[0-9]{1,3}$"})]
PlatformQuantity = Annotated[str | int, BeforeValidator(_check_quantity), WithJsonSchema(QUANTITY_SCHEMA)]
NodeLabels = Annotated[dict[str, str], AfterValidator(_check_labels), WithJsonSchema(LABELS_SCHEMA)]
PodLabels = Annotated[
    dict[str, str],
    AfterValidator(_check_labels),
    AfterValidator(_check_no_reserved_keys),
    WithJsonSchema(_build_map_schema(LABEL_KEY_PATTERN, {"pattern": LABEL_VALUE_PATTERN}, RESERVED_KEY_PATTERN)),
]
PodAnnotations = Annotated[
    dict[str, str],
    AfterValidator(_check_annotations),
    AfterValidator(_check_no_reserved_keys),
    WithJsonSchema(_build_map_schema(LABEL_KEY_PATTERN, {}, RESERVED_KEY_PATTERN)),
]
EnvVariables = Annotated[
    dict[str, str], AfterValidator(_check_env_variables), WithJsonSchema(_build_map_schema(ENV_NAME_PATTERN, {}, RESERVED_ENV_PATTERN))
]
PlatformToleration = Annotated[
    Toleration, AfterValidator(_check_toleration), Field(json_schema_extra={"allOf": TOLERATION_RULES})
]
