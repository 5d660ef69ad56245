"""Create the JSON schema of the chart's values. The schema rejects unknown keys.

The chart's own keys are defined here. The schema of the operator's settings is generated from the models in `finetune_operator.settings`. If
the operator would reject a value, Helm therefore rejects it before it installs anything.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.config_types import ANNOTATIONS_SCHEMA, LABELS_SCHEMA, QUANTITY_SCHEMA
from finetune_operator.settings import OperatorConfig

Schema = dict[str, Any]

FIELDS_SET_BY_CHART = ("namespaces", "trainer", "storage", "resources", "nodePools", "leaderElection", "log", "http")
"""Fields of the operator's configuration that users cannot set below `settings`. The chart sets them from other values or to a constant."""


def closed_object_schema(properties: dict[str, Schema], description: str = "", required: tuple[str, ...] = ()) -> Schema:
    """Schema of an object that allows no keys except `properties`."""
    make_values_schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    keywords_if_set = {"description": description, "required": [*required]}
    return make_values_schema | {key: value for key, value in keywords_if_set.items() if value}


def string_schema(description: str = "", **keywords: Any) -> Schema:
    """Schema of a string with further JSON schema keywords."""
    return {"type": "string", **({"description": description} if description else {}), **keywords}


def array_schema(items: Schema, description: str) -> Schema:
    return {"type": "array", "items": items, "description": description}


def open_object_schema(description: str) -> Schema:
    """Schema of an object with any content. Only the API server validates the content."""
    return {"type": "object", "description": description}


def image_schema(image_user: str) -> Schema:
    """Schema of an image: repository, tag, digest and pull policy."""
    return closed_object_schema(
        {
            "repository": string_schema("Image repository, without a tag.", minLength=1),
            "tag": string_schema("Image tag; ignored if `digest` is set."),
            "digest": string_schema("Image digest, sha256:..., or empty to use the tag.", pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": string_schema("Image pull policy.", enum=["Always", "IfNotPresent", "Never"]),
        },
        f"Image of {image_user}.",
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
    """Schema of `trainer`: the operator's `trainer` section, but the image is split into parts, and `resources` is added."""
    fields = dict(settings.field_schema("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields["image"] = image_schema("the training pods")
    for name in ("serviceAccountName", "priorityClassName"):
        # Also allow the empty string: it is the chart's default and means that the chart does not set the field.
        pattern = "^$|" + fields[name].pop("pattern")
        fields[name] |= {"pattern": pattern}
    fields["resources"] = settings.field_schema("resources")
    return closed_object_schema(fields, "Settings of the training pods.")


def leader_election_schema(settings: SettingsSchema) -> Schema:
    """Schema of `leaderElection`, without the Lease's name and namespace: the chart derives them from the release."""
    fields = settings.field_schema("leaderElection")["properties"]
    user_fields = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return closed_object_schema(user_fields, "Leader election with a Lease: only the leader reconciles.")


def container_resources_schema() -> Schema:
    """Schema of `resources`."""
    quantities_schema = {"type": "object", "additionalProperties": QUANTITY_SCHEMA}
    return closed_object_schema({"requests": quantities_schema, "limits": quantities_schema}, "Container resources of the operator.")


def make_values_schema() -> Schema:
    """Return the content of values.schema.json."""
    settings = SettingsSchema()
    boolean_schema = {"type": "boolean"}
    node_pools = settings.field_schema("nodePools")
    properties = {
        "image": image_schema("the operator"),
        "imagePullSecrets": array_schema(string_schema(), "Names of the Secrets for pulling the operator's image."),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10, "description": "Number of operator pods; only the leader reconciles."},
        "leaderElection": leader_election_schema(settings),
        "watchNamespaces": settings.field_schema("namespaces"),
        "trainer": trainer_schema(settings),
        "storage": settings.field_schema("storage"),
        "nodePools": node_pools,
        "settings": closed_object_schema(settings.schemas_inside_settings(), "Further settings of the operator."),
        "log": settings.field_schema("log"),
        "crds": closed_object_schema(
            {"enabled": boolean_schema, "keep": boolean_schema},
            "`enabled`: whether the chart installs the CustomResourceDefinition. `keep`: whether `helm uninstall` keeps it.",
        ),
        "rbac": closed_object_schema(
            {"create": boolean_schema, "aggregate": boolean_schema},
            "`create`: whether the chart creates the operator's roles and bindings. `aggregate`: whether the roles view, edit and admin include FineTuneJobs.",
        ),
        "serviceAccount": closed_object_schema(
            {"create": boolean_schema, "name": string_schema(), "annotations": ANNOTATIONS_SCHEMA}, "The operator's ServiceAccount."
        ),
        "resources": container_resources_schema(),
        "nodeSelector": LABELS_SCHEMA | {"description": "Labels of the nodes on which the operator may run."},
        "tolerations": array_schema(
            node_pools["items"]["properties"]["tolerations"]["items"], "Tolerations of the operator's pods."
        ),
        "affinity": open_object_schema("Affinity of the operator's pods."),
        "priorityClassName": string_schema("Priority class of the operator's pods."),
        "podLabels": LABELS_SCHEMA | {"description": "Further labels of the operator's pods."},
        "podAnnotations": ANNOTATIONS_SCHEMA | {"description": "Further annotations of the operator's pods."},
        "nameOverride": string_schema("Replaces the chart's name in object names and labels."),
        "fullnameOverride": string_schema("Replaces the release name and the chart's name in object names."),
        "global": open_object_schema("Values that Helm shares with subcharts; this chart does not use them."),
    }
    schema_header = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return schema_header | closed_object_schema(properties)
