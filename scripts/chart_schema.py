"""The chart's closed values schema: the chart's own keys are written here, the operator's settings come from its models.

Each value of the operator's configuration file is defined in one place, `finetune_operator.settings`: Helm refuses what the operator
would refuse, before it installs anything.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.config_types import ANNOTATIONS_SCHEMA, LABELS_SCHEMA, QUANTITY_SCHEMA
from finetune_operator.settings import OperatorConfig

Schema = dict[str, Any]

SETTINGS_BY_CHART = ("namespaces", "trainer", "storage", "resources", "nodePools", "leaderElection", "log", "http")
"""Fields of the configuration file that have values of their own in the chart, or that the chart sets to a constant."""


def closed_object(properties: dict[str, Schema], description: str = "", required: tuple[str, ...] = ()) -> Schema:
    """An object that allows no other keys."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    optional = {"description": description, "required": [*required]}
    return schema | {key: value for key, value in optional.items() if value}


def string(description: str = "", **keywords: Any) -> Schema:
    """A string with further JSON schema keywords."""
    return {"type": "string", **({"description": description} if description else {}), **keywords}


def array(items: Schema, description: str) -> Schema:
    return {"type": "array", "items": items, "description": description}


def open_object(description: str) -> Schema:
    """An object that only the API server checks."""
    return {"type": "object", "description": description}


def image(owner: str) -> Schema:
    """Repository, tag, digest and pull policy of one image."""
    return closed_object(
        {
            "repository": string("Repository without tag.", minLength=1),
            "tag": string("Tag; ignored if digest is set."),
            "digest": string("Digest, sha256:..., or empty.", pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": string("When nodes pull the image.", enum=["Always", "IfNotPresent", "Never"]),
        },
        f"Image of {owner}.",
        ("repository",),
    )


class SettingsSchema:
    """Parts of the JSON schema of the operator's configuration."""

    def __init__(self) -> None:
        whole = OperatorConfig.model_json_schema(by_alias=True)
        self._definitions: dict[str, Schema] = whole["$defs"]
        self._properties: dict[str, Schema] = whole["properties"]

    def field(self, name: str) -> Schema:
        """Schema of one top-level field, without references."""
        return self._resolved(self._properties[name])

    def other_fields(self) -> dict[str, Schema]:
        """Schemas of the fields that have no value of their own in the chart."""
        return {name: self.field(name) for name in self._properties if name not in SETTINGS_BY_CHART}

    def _resolved(self, node: Any) -> Any:
        """The same schema without references, generated titles and null: in a values file, an unset key is absent."""
        if isinstance(node, list):
            return [self._resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = self._definitions[node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
        resolved: Schema = {}
        for key, value in node.items():
            if _is_superfluous(key, value):
                continue
            resolved[key] = (
                {name: self._resolved(sub) for name, sub in value.items()}
                if key == "properties"
                else self._resolved(value)
            )
        return _without_null(resolved)


def _is_superfluous(key: str, value: Any) -> bool:
    """Generated titles, the CRD's extensions, and defaults that are not scalars."""
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
    """`trainer`: the operator's `trainer` section, with the image in parts, and the default resources."""
    fields = dict(settings.field("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields["image"] = image("the training pods")
    for name in ("serviceAccountName", "priorityClassName"):
        # The chart's default is an empty string, which it does not pass on.
        pattern = "^$|" + fields[name].pop("pattern")
        fields[name] |= {"pattern": pattern}
    fields["resources"] = settings.field("resources")
    return closed_object(fields, "The training pods.")


def leader_election(settings: SettingsSchema) -> Schema:
    """`leaderElection` without the Lease's name and namespace, which the chart derives from the release."""
    fields = settings.field("leaderElection")["properties"]
    chosen = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return closed_object(chosen, "One active replica, chosen with a Lease.")


def container_resources() -> Schema:
    """`resources` of the operator's container."""
    quantities = {"type": "object", "additionalProperties": QUANTITY_SCHEMA}
    return closed_object({"requests": quantities, "limits": quantities}, "Container resources of the operator.")


def schema() -> Schema:
    """The whole values.schema.json."""
    settings = SettingsSchema()
    boolean = {"type": "boolean"}
    node_pools = settings.field("nodePools")
    properties = {
        "image": image("the operator"),
        "imagePullSecrets": array(string(), "Names of Secrets for pulling the operator's image."),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10, "description": "Operator pods; one is active."},
        "leaderElection": leader_election(settings),
        "watchNamespaces": settings.field("namespaces"),
        "trainer": trainer(settings),
        "storage": settings.field("storage"),
        "nodePools": node_pools,
        "settings": closed_object(settings.other_fields(), "Further settings of the operator."),
        "log": settings.field("log"),
        "crds": closed_object({"enabled": boolean, "keep": boolean}, "The CustomResourceDefinition."),
        "rbac": closed_object({"create": boolean, "aggregate": boolean}, "Roles and bindings."),
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
        "nameOverride": string("Replaces the chart's name in names and labels."),
        "fullnameOverride": string("Replaces release and chart name in object names."),
        "global": open_object("Set by Helm for subcharts; not used."),
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return head | closed_object(properties)
