"""Create the JSON schema of the chart's values. The schema rejects unknown keys.

The types of the chart's own keys are defined here; their descriptions are the comments in values.yaml. The schema of the operator's settings is
generated from the models in `finetune_operator.settings`, so that Helm rejects a value that the operator would reject, before it installs anything.
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
"""Fields of the operator's configuration that users cannot set below the chart value `settings`, because the chart itself sets them."""


def make_closed_object_schema(properties: dict[str, Schema], required_names: tuple[str, ...] = ()) -> Schema:
    """Return the schema of an object that allows no keys except `properties`."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": [*required_names]} if required_names else {})


def make_string_schema(**keywords: Any) -> Schema:
    """Return the schema of a string, with `keywords` as further JSON schema keywords."""
    return {"type": "string", **keywords}


def make_array_schema(item_schema: Schema) -> Schema:
    return {"type": "array", "items": item_schema}


OPEN_OBJECT: Schema = {"type": "object"}
"""Schema of an object with any content. Only the API server validates the content."""
BOOLEAN: Schema = {"type": "boolean"}
STRING: Schema = {"type": "string"}
OBJECT_NAME_SCHEMA = make_string_schema(pattern=rf"^({DNS_SUBDOMAIN})?$", maxLength=253)
"""Name of a Kubernetes object, or the empty string."""
DURATION_SCHEMA = make_string_schema(pattern="^([0-9]+(ms|[smhd]))*$")
"""A duration in Prometheus's format, such as 30s, or the empty string."""
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT_OR_PERCENTAGE: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^([0-9]{1,2}%|100%)?$"}]}


def make_image_schema() -> Schema:
    """Return the schema of an image: repository, tag, digest and pull policy."""
    return make_closed_object_schema(
        {
            "repository": make_string_schema(pattern=r"^[a-z0-9]([-a-z0-9._/]|:[0-9]+/)*$"),
            "tag": make_string_schema(pattern=r"^([A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?$"),
            "digest": make_string_schema(pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": make_string_schema(enum=["Always", "IfNotPresent", "Never"]),
        },
        ("repository",),
    )


class SettingsSchema:
    """The JSON schema of each field of the operator's configuration."""

    def __init__(self) -> None:
        config_schema = OperatorConfig.model_json_schema(by_alias=True)
        self._definitions: dict[str, Schema] = config_schema["$defs"]
        self._properties: dict[str, Schema] = config_schema["properties"]

    def resolve_field_schema(self, name: str) -> Schema:
        """Return the schema of one top-level field, with all `$ref` resolved."""
        return self._resolve_references(self._properties[name])

    def list_settings_schemas(self) -> dict[str, Schema]:
        """Return the schemas of the fields that users set below `settings`."""
        return {name: self.resolve_field_schema(name) for name in self._properties if name not in FIELDS_SET_BY_CHART}

    def _resolve_references(self, node: Any) -> Any:
        """Return a schema without references, generated titles and null types. Null is not needed, because a values file can leave out a key."""
        if isinstance(node, list):
            return [self._resolve_references(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = self._definitions[node["$ref"].rsplit("/", 1)[1]] | {key: value for key, value in node.items() if key != "$ref"}
        resolved_schema: Schema = {}
        for key, value in node.items():
            if _is_unneeded_keyword(key, value):
                continue
            resolved_schema[key] = (
                {name: self._resolve_references(property_schema) for name, property_schema in value.items()}
                if key == "properties"
                else self._resolve_references(value)
            )
        return _remove_null_type(resolved_schema)


def _is_unneeded_keyword(key: str, value: Any) -> bool:
    """Whether a keyword is a generated title, a CRD extension (`x-...`), or a default value that is not a scalar."""
    is_title = key == "title" and isinstance(value, str)
    return is_title or key.startswith("x-") or (key == "default" and not isinstance(value, str | int | float))


def _remove_null_type(schema: Schema) -> Schema:
    alternatives = schema.get("anyOf")
    if not isinstance(alternatives, list) or {"type": "null"} not in alternatives:
        return schema
    non_null_alternatives = [option for option in alternatives if option != {"type": "null"}]
    keywords = {key: value for key, value in schema.items() if key != "anyOf"}
    return non_null_alternatives[0] | keywords if len(non_null_alternatives) == 1 else keywords | {"anyOf": non_null_alternatives}


def make_trainer_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of the chart value `trainer`.

    Differences to the section `trainer` of the operator's configuration: `image` is split into several keys, `resources` is added, and `fixedUser` is
    missing.
    """
    fields = dict(settings.resolve_field_schema("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields.pop("fixedUser")
    fields["image"] = make_image_schema()
    for name in ("serviceAccountName", "priorityClassName"):
        # The empty string, which is the chart's default, is also allowed: for an empty string, the chart does not set the field.
        pattern = "^$|" + fields[name].pop("pattern")
        fields[name] |= {"pattern": pattern}
    fields["resources"] = settings.resolve_field_schema("resources")
    return make_closed_object_schema(fields)


def make_model_cache_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of the chart value `modelCache`.

    `default` and `node.path` may be empty: the chart then leaves them out of the operator's configuration.
    """
    schema = settings.resolve_field_schema("modelCache")
    fields = schema["properties"]
    for parent_fields, name in ((fields, "default"), (fields["node"]["properties"], "path")):
        parent_fields[name] = parent_fields[name] | {"pattern": "^$|" + parent_fields[name]["pattern"]}
    return schema


def make_leader_election_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of `leaderElection`, without the Lease's name and namespace: the chart derives them from the release."""
    fields = settings.resolve_field_schema("leaderElection")["properties"]
    user_fields = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return make_closed_object_schema(user_fields)


def make_isolation_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of `isolation`, without the fields that the chart derives from the release."""
    fields = settings.resolve_field_schema("isolation")["properties"]
    return make_closed_object_schema({name: field for name, field in fields.items() if name not in ("keySecretName", "operatorNamespace", "operatorLabels")})


def make_policy_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of the chart value `policy`: the fields of the operator's section `policy`, and the switch `validatingAdmissionPolicy`."""
    schema = settings.resolve_field_schema("policy")
    admission_policy_schema = {"type": "boolean", "description": "Whether the API server also checks the rules, with a ValidatingAdmissionPolicy."}
    return schema | {"properties": {"validatingAdmissionPolicy": admission_policy_schema, **schema["properties"]}}


def make_container_resources_schema() -> Schema:
    """Return the schema of `resources`."""
    quantities_schema = {"type": "object", "additionalProperties": QUANTITY_SCHEMA}
    return make_closed_object_schema({"requests": quantities_schema, "limits": quantities_schema})


def make_env_schema() -> Schema:
    """Return the schema of one entry of a container's `env`."""
    return make_closed_object_schema({"name": make_string_schema(pattern=ENV_NAME_PATTERN), "value": STRING, "valueFrom": OPEN_OBJECT}, ("name",))


def make_named_object_schema(*required_names: str) -> Schema:
    """Return the schema of an object that must contain the string fields `required_names`, and may contain any other fields."""
    return {"type": "object", "properties": {name: make_string_schema(minLength=1) for name in required_names}, "required": [*required_names]}


def make_monitor_schema() -> Schema:
    """Return the schema of `metrics.serviceMonitor` and `metrics.podMonitor`."""
    relabelings_schema = make_array_schema(OPEN_OBJECT)
    return make_closed_object_schema({
        "enabled": BOOLEAN, "namespace": OBJECT_NAME_SCHEMA, "labels": LABELS_SCHEMA, "interval": DURATION_SCHEMA, "scrapeTimeout": DURATION_SCHEMA,
        "relabelings": relabelings_schema, "metricRelabelings": relabelings_schema,
    })  # fmt: skip


def make_metrics_schema() -> Schema:
    """Return the schema of `metrics`."""
    common_fields = {"enabled": BOOLEAN, "namespace": OBJECT_NAME_SCHEMA, "labels": LABELS_SCHEMA}
    service_fields = {"enabled": BOOLEAN, "port": PORT, "labels": LABELS_SCHEMA, "annotations": ANNOTATIONS_SCHEMA}
    rule_fields = {
        "alertLabels": {"type": "object", "additionalProperties": STRING},
        "disabledAlerts": make_array_schema(STRING), "extraRules": make_array_schema(OPEN_OBJECT),
    }  # fmt: skip
    return make_closed_object_schema({
        "service": make_closed_object_schema(service_fields),
        "serviceMonitor": make_monitor_schema(),
        "podMonitor": make_monitor_schema(),
        "prometheusRule": make_closed_object_schema(common_fields | rule_fields),
        "grafanaDashboard": make_closed_object_schema(common_fields | {"annotations": ANNOTATIONS_SCHEMA}),
    })  # fmt: skip


def make_network_policy_schema() -> Schema:
    """Return the schema of `networkPolicy`."""
    rules_schema = make_array_schema(OPEN_OBJECT)
    cidr_schema = make_string_schema(pattern="^[0-9a-fA-F.:]+/[0-9]{1,3}$")
    return make_closed_object_schema({
        "enabled": BOOLEAN, "apiServerPorts": make_array_schema(PORT) | {"minItems": 1}, "apiServerCidrs": make_array_schema(cidr_schema),
        "metricsFrom": rules_schema, "extraIngress": rules_schema, "extraEgress": rules_schema,
    })  # fmt: skip


def make_openai_server_schema(settings: SettingsSchema) -> Schema:
    """Return the schema of `openaiServer`. The server checks the spec of each model when it starts."""
    model_schema = make_closed_object_schema({"spec": OPEN_OBJECT}, ("spec",))
    name_schema = make_string_schema(pattern=rf"^{DNS_SUBDOMAIN}$", maxLength=253)
    account_schema = make_closed_object_schema(
        {"namespace": name_schema, "serviceAccounts": make_array_schema(name_schema) | {"minItems": 1}}, ("namespace", "serviceAccounts")
    )
    return make_closed_object_schema({
        "enabled": BOOLEAN, "image": make_image_schema(), "replicas": {"type": "integer", "minimum": 0, "maximum": 10},
        "models": {"type": "object", "additionalProperties": model_schema}, "storage": settings.resolve_field_schema("storage"),
        "maxFileBytes": {"type": "integer", "minimum": 1}, "keysSecret": OBJECT_NAME_SCHEMA, "credentialsSecret": OBJECT_NAME_SCHEMA,
        "accounts": make_array_schema(account_schema),
        "serviceAccountAnnotations": ANNOTATIONS_SCHEMA, "resources": make_container_resources_schema(),
        "service": make_closed_object_schema({"port": PORT, "labels": LABELS_SCHEMA, "annotations": ANNOTATIONS_SCHEMA}),
        "networkPolicy": make_closed_object_schema({
            "enabled": BOOLEAN, "clients": make_array_schema(OPEN_OBJECT), "storagePorts": make_array_schema(PORT) | {"minItems": 1},
        }),
    })  # fmt: skip


def make_operator_pod_schemas(settings: SettingsSchema) -> dict[str, Schema]:
    """Return the schemas of the values that become fields of the operator's pods."""
    toleration_schema = settings.resolve_field_schema("nodePools")["items"]["properties"]["tolerations"]["items"]
    return {
        "resources": make_container_resources_schema(),
        "podSecurityContext": OPEN_OBJECT,
        "securityContext": OPEN_OBJECT,
        "extraEnv": make_array_schema(make_env_schema()),
        "extraVolumes": make_array_schema(make_named_object_schema("name")),
        "extraVolumeMounts": make_array_schema(make_named_object_schema("name", "mountPath")),
        "nodeSelector": LABELS_SCHEMA,
        "tolerations": make_array_schema(toleration_schema),
        "affinity": OPEN_OBJECT,
        "topologySpreadConstraints": make_array_schema(make_named_object_schema("topologyKey", "whenUnsatisfiable")),
        "priorityClassName": OBJECT_NAME_SCHEMA,
        "runtimeClassName": OBJECT_NAME_SCHEMA,
        "podLabels": LABELS_SCHEMA,
        "podAnnotations": ANNOTATIONS_SCHEMA,
        "podDisruptionBudget": make_closed_object_schema(
            {"enabled": BOOLEAN, "minAvailable": COUNT_OR_PERCENTAGE, "maxUnavailable": COUNT_OR_PERCENTAGE}
        ),
    }


def make_values_schema() -> Schema:
    """Return the content of values.schema.json."""
    settings = SettingsSchema()
    properties = {
        "imageRegistry": make_string_schema(pattern=r"^([a-z0-9]([-a-z0-9._/]|:[0-9]+)*)?$"),
        "image": make_image_schema(),
        "imagePullSecrets": make_array_schema(make_string_schema(pattern=rf"^{DNS_SUBDOMAIN}$")),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10},
        "leaderElection": make_leader_election_schema(settings),
        "isolation": make_isolation_schema(settings),
        "watchNamespaces": settings.resolve_field_schema("namespaces") | {"uniqueItems": True},
        "checkOtherReleases": BOOLEAN,
        "openshift": BOOLEAN,
        "trainer": make_trainer_schema(settings),
        "storage": settings.resolve_field_schema("storage"),
        "prepare": settings.resolve_field_schema("prepare"),
        "modelCache": make_model_cache_schema(settings),
        "nodePools": settings.resolve_field_schema("nodePools"),
        "policy": make_policy_schema(settings),
        "settings": make_closed_object_schema(settings.list_settings_schemas()),
        "log": settings.resolve_field_schema("log"),
        "crds": make_closed_object_schema({"enabled": BOOLEAN, "keep": BOOLEAN}),
        "rbac": make_closed_object_schema({"create": BOOLEAN, "aggregate": BOOLEAN}),
        "serviceAccount": make_closed_object_schema({"create": BOOLEAN, "name": OBJECT_NAME_SCHEMA, "annotations": ANNOTATIONS_SCHEMA}),
        **make_operator_pod_schemas(settings),
        "networkPolicy": make_network_policy_schema(),
        "metrics": make_metrics_schema(),
        "openaiServer": make_openai_server_schema(settings),
        "tests": make_closed_object_schema({"enabled": BOOLEAN}),
        "commonLabels": LABELS_SCHEMA,
        "extraObjects": make_array_schema({"type": ["object", "string"]}),
        "nameOverride": STRING,
        "fullnameOverride": STRING,
        "global": OPEN_OBJECT | {"description": "Values that Helm shares with subcharts; this chart does not use them."},
    }
    schema_header = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return schema_header | add_descriptions(make_closed_object_schema(properties), read_value_comments(VALUES_FILE.read_text("utf-8")))


def read_value_comments(values_text: str) -> dict[tuple[str, ...], str]:
    """Return the text after `# --` in the comment of each key in values.yaml, by the path of the key."""
    comments: dict[tuple[str, ...], str] = {}
    key_path: list[str] = []
    comment_lines: list[str] = []
    for line in values_text.splitlines():
        if line_match := re.match(r"^( *)([A-Za-z]\w*):", line):
            key_path = [*key_path[: len(line_match.group(1)) // 2], line_match.group(2)]
            if comment_lines:
                comments[tuple(key_path)] = " ".join(comment_lines)
            comment_lines = []
        elif line_match := re.match(r"^ *# -- (.*)", line):
            comment_lines = [line_match.group(1)]
        elif comment_lines and (line_match := re.match(r"^ *# ([^@].*)", line)):
            comment_lines.append(line_match.group(1))
    return comments


def add_descriptions(schema: Schema, comments: dict[tuple[str, ...], str], path: tuple[str, ...] = ()) -> Schema:
    """Return the schema with the comments of values.yaml as descriptions."""
    described_schema = dict(schema)
    if path in comments:
        described_schema["description"] = comments[path]
    if any(key[: len(path)] == path and len(key) > len(path) for key in comments):
        properties = schema["properties"].items()
        described_schema["properties"] = {name: add_descriptions(property_schema, comments, (*path, name)) for name, property_schema in properties}
    return described_schema
