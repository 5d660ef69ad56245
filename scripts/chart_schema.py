"""Create the JSON schema of the chart's values. The schema rejects unknown keys.

The chart's own keys are defined here. The schema of the operator's settings is generated from the models in `finetune_operator.settings`. If
the operator would reject a value, Helm therefore rejects it before it installs anything.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.config_types import ANNOTATIONS_SCHEMA, LABELS_SCHEMA, QUANTITY_SCHEMA
from finetune_operator.settings import OperatorConfig

Schema = dict[str, Any]

SETTINGS_BY_CHART = ("namespaces", "trainer", "storage", "resources", "nodePools", "leaderElection", "log", "http")
"""Fields of the operator's configuration that users cannot set below `settings`. The chart sets them from other values or to a constant."""


def closed_object(properties: dict[str, Schema], description: str = "", required: tuple[str, ...] = ()) -> Schema:
    """Schema of an object that allows no keys except `properties`."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    keywords_if_set = {"description": description, "required": [*required]}
    return schema | {key: value for key, value in keywords_if_set.items() if value}


def string(description: str = "", **keywords: Any) -> Schema:
    """Schema of a string with further JSON schema keywords."""
    return {"type": "string", **({"description": description} if description else {}), **keywords}


def array(items: Schema, description: str) -> Schema:
    return {"type": "array", "items": items, "description": description}


def open_object(description: str) -> Schema:
    """Schema of an object with any content. Only the API server validates the content."""
    return {"type": "object", "description": description}


def image(owner: str) -> Schema:
    """Schema of an image: repository, tag, digest and pull policy."""
    return closed_object(
        {
            "repository": string("Image repository, without a tag.", minLength=1),
            "tag": string("Image tag; ignored if `digest` is set."),
            "digest": string("Image digest, sha256:..., or empty to use the tag.", pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": string("Image pull policy.", enum=["Always", "IfNotPresent", "Never"]),
        },
        f"Image of {owner}.",
        ("repository",),
    )


class SettingsSchema:
    """The JSON schema of each field of the operator's configuration."""

    def __init__(self) -> None:
        whole = OperatorConfig.model_json_schema(by_alias=True)
        self._definitions: dict[str, Schema] = whole["$defs"]
        self._properties: dict[str, Schema] = whole["properties"]

    def field(self, name: str) -> Schema:
        """Schema of one top-level field, with all `$ref` resolved."""
        return self._resolve_references(self._properties[name])

    def other_fields(self) -> dict[str, Schema]:
        """Schemas of the fields that users set below `settings`."""
        return {name: self.field(name) for name in self._properties if name not in SETTINGS_BY_CHART}

    def _resolve_references(self, node: Any) -> Any:
        """Return the schema without references, generated titles and null. Null is not needed, because a values file can leave out a key."""
        if isinstance(node, list):
            return [self._resolve_references(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = self._definitions[node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
        resolved: Schema = {}
        for key, value in node.items():
            if _is_superfluous(key, value):
                continue
            resolved[key] = (
                {name: self._resolve_references(sub) for name, sub in value.items()}
                if key == "properties"
                else self._resolve_references(value)
            )
        return _without_null(resolved)


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


def trainer(settings: SettingsSchema) -> Schema:
    """Schema of `trainer`: the operator's `trainer` section, but the image is split into parts, and `resources` is added."""
    fields = dict(settings.field("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields["image"] = image("the training pods")
    for name in ("serviceAccountName", "priorityClassName"):
        # Also allow the empty string: it is the chart's default and means that the chart does not set the field.
        pattern = "^$|" + fields[name].pop("pattern")
        fields[name] |= {"pattern": pattern}
    fields["resources"] = settings.field("resources")
    return closed_object(fields, "Settings of the training pods.")


def leader_election(settings: SettingsSchema) -> Schema:
    """Schema of `leaderElection`, without the Lease's name and namespace: the chart derives them from the release."""
    fields = settings.field("leaderElection")["properties"]
    chosen = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return closed_object(chosen, "Leader election with a Lease: only the leader reconciles.")


def container_resources() -> Schema:
    """Schema of `resources`."""
    quantities = {"type": "object", "additionalProperties": QUANTITY_SCHEMA}
    return closed_object({"requests": quantities, "limits": quantities}, "Container resources of the operator.")


def schema() -> Schema:
    """Return the content of values.schema.json."""
    settings = SettingsSchema()
    boolean = {"type": "boolean"}
    node_pools = settings.field("nodePools")
    properties = {
        "image": image("the operator"),
        "imagePullSecrets": array(string(), "Names of the Secrets for pulling the operator's image."),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10, "description": "Number of operator pods; only the leader reconciles."},
        "leaderElection": leader_election(settings),
        "watchNamespaces": settings.field("namespaces"),
        "trainer": trainer(settings),
        "storage": settings.field("storage"),
        "nodePools": node_pools,
        "settings": closed_object(settings.other_fields(), "Further settings of the operator."),
        "log": settings.field("log"),
        "crds": closed_object(
            {"enabled": boolean, "keep": boolean},
            "`enabled`: whether the chart installs the CustomResourceDefinition. `keep`: whether `helm uninstall` keeps it.",
        ),
        "rbac": closed_object(
            {"create": boolean, "aggregate": boolean},
            "`create`: whether the chart creates the operator's roles and bindings. `aggregate`: whether the roles view, edit and admin include FineTuneJobs.",
        ),
        "serviceAccount": closed_object(
            {"create": boolean, "name": string(), "annotations": ANNOTATIONS_SCHEMA}, "The operator's ServiceAccount."
        ),
        "resources": container_resources(),
        "nodeSelector": LABELS_SCHEMA | {"description": "Labels of the nodes on which the operator may run."},
        "tolerations": array(
            node_pools["items"]["properties"]["tolerations"]["items"], "Tolerations of the operator's pods."
        ),
        "affinity": open_object("Affinity of the operator's pods."),
        "priorityClassName": string("Priority class of the operator's pods."),
        "podLabels": LABELS_SCHEMA | {"description": "Further labels of the operator's pods."},
        "podAnnotations": ANNOTATIONS_SCHEMA | {"description": "Further annotations of the operator's pods."},
        "nameOverride": string("Replaces the chart's name in object names and labels."),
        "fullnameOverride": string("Replaces the release name and the chart's name in object names."),
        "global": open_object("Values that Helm shares with subcharts; this chart does not use them."),
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return head | closed_object(properties)
