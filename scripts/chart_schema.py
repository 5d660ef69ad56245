"""Create the JSON schema of the chart's values. The schema rejects unknown keys.

The types of the chart's own keys are defined here; their descriptions are the comments of values.yaml. The schema of the operator's settings is
generated from the models in `finetune_operator.settings`. If the operator would reject a value, Helm therefore rejects it before it installs
anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from finetune_operator.config_types import (
    ANNOTATIONS_SCHEMA,
    DNS_SUBDOMAIN,
    ENV_NAME_PATTERN,
    LABELS_SCHEMA,
    QUANTITY_SCHEMA,
)
from finetune_operator.settings import OperatorConfig

Schema = dict[str, Any]

VALUES_FILE = Path(__file__).resolve().parent.parent / "helm/finetune-operator/values.yaml"
FIELDS_SET_BY_CHART = (
    "namespaces", "trainer", "storage", "resources", "prepare", "modelCache", "nodePools", "policy", "leaderElection", "isolation", "log", "http",
)  # fmt: skip
"""Fields of the operator's configuration that users cannot set below `settings`. The chart sets them from other values or to a constant."""


def closed_object_schema(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """Schema of an object that allows no keys except `properties`."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": [*required]} if required else {})


def string_schema(**keywords: Any) -> Schema:
    """Schema of a string with further JSON schema keywords."""
    return {"type": "string", **keywords}


def array_schema(items: Schema) -> Schema:
    return {"type": "array", "items": items}


OPEN_OBJECT: Schema = {"type": "object"}
"""Schema of an object with any content. Only the API server validates the content."""
BOOLEAN: Schema = {"type": "boolean"}
STRING: Schema = {"type": "string"}
OBJECT_NAME = string_schema(pattern=rf"^({DNS_SUBDOMAIN})?$", maxLength=253)
"""Name of a Kubernetes object, or the empty string."""
DURATION = string_schema(pattern="^([0-9]+(ms|[smhd]))*$")
"""A duration of Prometheus such as 30s, or the empty string."""
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT_OR_PERCENTAGE: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^([0-9]{1,2}%|100%)?$"}]}


def image_schema() -> Schema:
    """Schema of an image: repository, tag, digest and pull policy."""
    return closed_object_schema(
        {
            "repository": string_schema(pattern=r"^[a-z0-9]([-a-z0-9._/]|:[0-9]+/)*$"),
            "tag": string_schema(pattern=r"^([A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?$"),
            "digest": string_schema(pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": string_schema(enum=["Always", "IfNotPresent", "Never"]),
        },
        ("repository",),
    )


class SettingsSchema:
    """The JSON schema of each field of the operator's configuration."""

    def __init__(self) -> None:
        config_schema = OperatorConfig.model_json_schema(by_alias=True)
        self._definitions: dict[str, Schema] = config_schema["$defs"]
        self._properties: dict[str, Schema] = config_schema["properties"]

    def field_schema(self, name: str) -> Schema:
        """Schema of one top-level field, with all `$ref` resolved."""
        return self._resolve_references(self._properties[name])

    def schemas_inside_settings(self) -> dict[str, Schema]:
        """Schemas of the fields that users set below `settings`."""
        return {name: self.field_schema(name) for name in self._properties if name not in FIELDS_SET_BY_CHART}

    def _resolve_references(self, node: Any) -> Any:
        """Return the schema without references, generated titles and null. Null is not needed, because a values file can leave out a key."""
        if isinstance(node, list):
            return [self._resolve_references(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = self._definitions[node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
        resolved_schema: Schema = {}
        for key, value in node.items():
            if _is_superfluous(key, value):
                continue
            resolved_schema[key] = (
                {name: self._resolve_references(sub) for name, sub in value.items()}
                if key == "properties"
                else self._resolve_references(value)
            )
        return _without_null(resolved_schema)


def _is_superfluous(key: str, value: Any) -> bool:
    """Whether a keyword is a generated title, a CRD extension (`x-...`), or a default value that is not a scalar."""
    is_title = key == "title" and isinstance(value, str)
    return is_title or key.startswith("x-") or (key == "default" and not isinstance(value, str | int | float))


def _without_null(schema: Schema) -> Schema:
    options = schema.get("anyOf")
    if not isinstance(options, list) or {"type": "null"} not in options:
        return schema
    other_options = [option for option in options if option != {"type": "null"}]
    keywords = {key: value for key, value in schema.items() if key != "anyOf"}
    return other_options[0] | keywords if len(other_options) == 1 else keywords | {"anyOf": other_options}


def trainer_schema(settings: SettingsSchema) -> Schema:
    """Schema of `trainer`: the operator's `trainer` section, but the image is split into parts, `resources` is added, and `openshift` sets `fixedUser`."""
    fields = dict(settings.field_schema("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields.pop("fixedUser")
    fields["image"] = image_schema()
    for name in ("serviceAccountName", "priorityClassName"):
        # Also allow the empty string: it is the chart's default and means that the chart does not set the field.
        pattern = "^$|" + fields[name].pop("pattern")
        fields[name] |= {"pattern": pattern}
    fields["resources"] = settings.field_schema("resources")
    return closed_object_schema(fields)


def model_cache_schema(settings: SettingsSchema) -> Schema:
    """Schema of `modelCache`: the operator's section, but empty strings mean that the chart does not set the field."""
    schema = settings.field_schema("modelCache")
    fields = schema["properties"]
    for holder, name in ((fields, "default"), (fields["node"]["properties"], "path")):
        holder[name] = holder[name] | {"pattern": "^$|" + holder[name]["pattern"]}
    return schema


def leader_election_schema(settings: SettingsSchema) -> Schema:
    """Schema of `leaderElection`, without the Lease's name and namespace: the chart derives them from the release."""
    fields = settings.field_schema("leaderElection")["properties"]
    user_fields = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return closed_object_schema(user_fields)


def isolation_schema(settings: SettingsSchema) -> Schema:
    """Schema of `isolation`, without the fields that the chart derives from the release."""
    fields = settings.field_schema("isolation")["properties"]
    return closed_object_schema({name: field for name, field in fields.items() if name not in ("keySecretName", "operatorNamespace", "operatorLabels")})


def policy_schema(settings: SettingsSchema) -> Schema:
    """Schema of `policy`: the operator's `policy` section, and whether the chart creates a ValidatingAdmissionPolicy."""
    schema = settings.field_schema("policy")
    is_checked_at_apply = {"type": "boolean", "description": "Whether the API server also checks the rules, with a ValidatingAdmissionPolicy."}
    return schema | {"properties": {"validatingAdmissionPolicy": is_checked_at_apply, **schema["properties"]}}


def container_resources_schema() -> Schema:
    """Schema of `resources`."""
    quantities_schema = {"type": "object", "additionalProperties": QUANTITY_SCHEMA}
    return closed_object_schema({"requests": quantities_schema, "limits": quantities_schema})


def env_schema() -> Schema:
    """Schema of one entry of a container's `env`."""
    return closed_object_schema({"name": string_schema(pattern=ENV_NAME_PATTERN), "value": STRING, "valueFrom": OPEN_OBJECT}, ("name",))


def named_object_schema(*required: str) -> Schema:
    """Schema of an object with required string fields and any other fields."""
    return {"type": "object", "properties": {name: string_schema(minLength=1) for name in required}, "required": [*required]}


def monitor_schema() -> Schema:
    """Schema of `metrics.serviceMonitor` and `metrics.podMonitor`."""
    relabelings = array_schema(OPEN_OBJECT)
    return closed_object_schema({
        "enabled": BOOLEAN, "namespace": OBJECT_NAME, "labels": LABELS_SCHEMA, "interval": DURATION, "scrapeTimeout": DURATION,
        "relabelings": relabelings, "metricRelabelings": relabelings,
    })  # fmt: skip


def metrics_schema() -> Schema:
    """Schema of `metrics`."""
    place = {"enabled": BOOLEAN, "namespace": OBJECT_NAME, "labels": LABELS_SCHEMA}
    service = {"enabled": BOOLEAN, "port": PORT, "labels": LABELS_SCHEMA, "annotations": ANNOTATIONS_SCHEMA}
    rules = {"alertLabels": {"type": "object", "additionalProperties": STRING}, "disabledAlerts": array_schema(STRING), "extraRules": array_schema(OPEN_OBJECT)}
    return closed_object_schema({
        "service": closed_object_schema(service),
        "serviceMonitor": monitor_schema(),
        "podMonitor": monitor_schema(),
        "prometheusRule": closed_object_schema(place | rules),
        "grafanaDashboard": closed_object_schema(place | {"annotations": ANNOTATIONS_SCHEMA}),
    })  # fmt: skip


def network_policy_schema() -> Schema:
    """Schema of `networkPolicy`."""
    rules = array_schema(OPEN_OBJECT)
    cidr = string_schema(pattern="^[0-9a-fA-F.:]+/[0-9]{1,3}$")
    return closed_object_schema({
        "enabled": BOOLEAN, "apiServerPorts": array_schema(PORT) | {"minItems": 1}, "apiServerCidrs": array_schema(cidr),
        "metricsFrom": rules, "extraIngress": rules, "extraEgress": rules,
    })  # fmt: skip


def openai_server_schema(settings: SettingsSchema) -> Schema:
    """Schema of `openaiServer`. The server checks the spec of each model when it starts."""
    model = closed_object_schema({"spec": OPEN_OBJECT}, ("spec",))
    name = string_schema(pattern=rf"^{DNS_SUBDOMAIN}$", maxLength=253)
    account = closed_object_schema({"namespace": name, "serviceAccounts": array_schema(name) | {"minItems": 1}}, ("namespace", "serviceAccounts"))
    return closed_object_schema({
        "enabled": BOOLEAN, "image": image_schema(), "replicas": {"type": "integer", "minimum": 0, "maximum": 10},
        "models": {"type": "object", "additionalProperties": model}, "storage": settings.field_schema("storage"),
        "maxFileBytes": {"type": "integer", "minimum": 1}, "keysSecret": OBJECT_NAME, "credentialsSecret": OBJECT_NAME, "accounts": array_schema(account),
        "serviceAccountAnnotations": ANNOTATIONS_SCHEMA, "resources": container_resources_schema(),
        "service": closed_object_schema({"port": PORT, "labels": LABELS_SCHEMA, "annotations": ANNOTATIONS_SCHEMA}),
        "networkPolicy": closed_object_schema({
            "enabled": BOOLEAN, "clients": array_schema(OPEN_OBJECT), "storagePorts": array_schema(PORT) | {"minItems": 1},
        }),
    })  # fmt: skip


def operator_pod_schemas(settings: SettingsSchema) -> dict[str, Schema]:
    """Schemas of the values that become fields of the operator's pods."""
    toleration = settings.field_schema("nodePools")["items"]["properties"]["tolerations"]["items"]
    return {
        "resources": container_resources_schema(),
        "podSecurityContext": OPEN_OBJECT,
        "securityContext": OPEN_OBJECT,
        "extraEnv": array_schema(env_schema()),
        "extraVolumes": array_schema(named_object_schema("name")),
        "extraVolumeMounts": array_schema(named_object_schema("name", "mountPath")),
        "nodeSelector": LABELS_SCHEMA,
        "tolerations": array_schema(toleration),
        "affinity": OPEN_OBJECT,
        "topologySpreadConstraints": array_schema(named_object_schema("topologyKey", "whenUnsatisfiable")),
        "priorityClassName": OBJECT_NAME,
        "runtimeClassName": OBJECT_NAME,
        "podLabels": LABELS_SCHEMA,
        "podAnnotations": ANNOTATIONS_SCHEMA,
        "podDisruptionBudget": closed_object_schema(
            {"enabled": BOOLEAN, "minAvailable": COUNT_OR_PERCENTAGE, "maxUnavailable": COUNT_OR_PERCENTAGE}
        ),
    }


def make_values_schema() -> Schema:
    """Return the content of values.schema.json."""
    settings = SettingsSchema()
    properties = {
        "imageRegistry": string_schema(pattern=r"^([a-z0-9]([-a-z0-9._/]|:[0-9]+)*)?$"),
        "image": image_schema(),
        "imagePullSecrets": array_schema(string_schema(pattern=rf"^{DNS_SUBDOMAIN}$")),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10},
        "leaderElection": leader_election_schema(settings),
        "isolation": isolation_schema(settings),
        "watchNamespaces": settings.field_schema("namespaces") | {"uniqueItems": True},
        "checkOtherReleases": BOOLEAN,
        "openshift": BOOLEAN,
        "trainer": trainer_schema(settings),
        "storage": settings.field_schema("storage"),
        "prepare": settings.field_schema("prepare"),
        "modelCache": model_cache_schema(settings),
        "nodePools": settings.field_schema("nodePools"),
        "policy": policy_schema(settings),
        "settings": closed_object_schema(settings.schemas_inside_settings()),
        "log": settings.field_schema("log"),
        "crds": closed_object_schema({"enabled": BOOLEAN, "keep": BOOLEAN}),
        "rbac": closed_object_schema({"create": BOOLEAN, "aggregate": BOOLEAN}),
        "serviceAccount": closed_object_schema({"create": BOOLEAN, "name": OBJECT_NAME, "annotations": ANNOTATIONS_SCHEMA}),
        **operator_pod_schemas(settings),
        "networkPolicy": network_policy_schema(),
        "metrics": metrics_schema(),
        "openaiServer": openai_server_schema(settings),
        "tests": closed_object_schema({"enabled": BOOLEAN}),
        "commonLabels": LABELS_SCHEMA,
        "extraObjects": array_schema({"type": ["object", "string"]}),
        "nameOverride": STRING,
        "fullnameOverride": STRING,
        "global": OPEN_OBJECT | {"description": "Values that Helm shares with subcharts; this chart does not use them."},
    }
    schema_header = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return schema_header | add_descriptions(closed_object_schema(properties), read_value_comments(VALUES_FILE.read_text("utf-8")))


def read_value_comments(text: str) -> dict[tuple[str, ...], str]:
    """Return the text after `# --` in the comment of each key in values.yaml, by the path of the key."""
    comments: dict[tuple[str, ...], str] = {}
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"^( *)([A-Za-z]\w*):", line):
            path = [*path[: len(found.group(1)) // 2], found.group(2)]
            if comment:
                comments[tuple(path)] = " ".join(comment)
            comment = []
        elif found := re.match(r"^ *# -- (.*)", line):
            comment = [found.group(1)]
        elif comment and (found := re.match(r"^ *# ([^@].*)", line)):
            comment.append(found.group(1))
    return comments


def add_descriptions(schema: Schema, comments: dict[tuple[str, ...], str], path: tuple[str, ...] = ()) -> Schema:
    """Return the schema with the comments of values.yaml as descriptions."""
    result = dict(schema)
    if path in comments:
        result["description"] = comments[path]
    if any(key[: len(path)] == path and len(key) > len(path) for key in comments):
        result["properties"] = {name: add_descriptions(sub, comments, (*path, name)) for name, sub in schema["properties"].items()}
    return result
