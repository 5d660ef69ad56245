"""The chart's closed values schema: the chart's own keys written here, the operator's settings taken from models.

What ends up in the operator's configuration file has one source, `finetune_operator.settings`; a value that the
operator would refuse is refused by Helm, before anything is installed.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.settings import OperatorConfig

Schema = dict[str, Any]

SETTINGS_BY_CHART = ("namespaces", "trainer", "storage", "resources", "nodePools", "leaderElection", "log", "http")
"""Fields of the configuration file that the chart fills from values of its own, or keeps fixed."""


def closed(properties: dict[str, Schema], description: str = "", required: tuple[str, ...] = ()) -> Schema:
    """An object without further keys."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    optional = {"description": description, "required": [*required]}
    return schema | {key: value for key, value in optional.items() if value}


def text(description: str = "", **more: Any) -> Schema:
    """A string."""
    return {"type": "string", **({"description": description} if description else {}), **more}


def listed(items: Schema, description: str) -> Schema:
    """A list."""
    return {"type": "array", "items": items, "description": description}


def mapped(description: str) -> Schema:
    """A map of strings."""
    return {"type": "object", "additionalProperties": {"type": "string"}, "description": description}


def anything(description: str) -> Schema:
    """An object that Kubernetes itself checks."""
    return {"type": "object", "description": description}


def image(what: str) -> Schema:
    """Repository, tag, digest, pull policy."""
    return closed(
        {
            "repository": text("Repository without tag.", minLength=1),
            "tag": text("Tag; a digest wins over it."),
            "digest": text("sha256:..., or empty.", pattern="^(sha256:[0-9a-f]{64})?$"),
            "pullPolicy": text("When nodes pull it.", enum=["Always", "IfNotPresent", "Never"]),
        },
        f"Image of {what}.",
        ("repository",),
    )


class Settings:
    """The JSON schema of the operator's configuration, in pieces."""

    def __init__(self) -> None:
        whole = OperatorConfig.model_json_schema(by_alias=True)
        self._definitions: dict[str, Schema] = whole["$defs"]
        self._properties: dict[str, Schema] = whole["properties"]

    def field(self, name: str) -> Schema:
        """One field of the file, references resolved."""
        return self._plain(self._properties[name])

    def rest(self) -> dict[str, Schema]:
        """The fields that have no value of their own in the chart."""
        return {name: self.field(name) for name in self._properties if name not in SETTINGS_BY_CHART}

    def _plain(self, node: Any) -> Any:
        """Without references, titles and null branches: in values, a key that is absent is absent."""
        if isinstance(node, list):
            return [self._plain(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = self._definitions[node["$ref"].rsplit("/", 1)[1]] | {k: v for k, v in node.items() if k != "$ref"}
        plain: Schema = {}
        for key, value in node.items():
            if _says_nothing(key, value):
                continue
            plain[key] = (
                {name: self._plain(sub) for name, sub in value.items()} if key == "properties" else self._plain(value)
            )
        return _without_null(plain)


def _says_nothing(key: str, value: Any) -> bool:
    """Generated titles, marks for the CRD, and defaults that are not plain values."""
    made_title = key == "title" and isinstance(value, str)
    return made_title or key.startswith("x-") or (key == "default" and not isinstance(value, str | int | float))


def _without_null(schema: Schema) -> Schema:
    options = schema.get("anyOf")
    if not isinstance(options, list) or {"type": "null"} not in options:
        return schema
    rest = [option for option in options if option != {"type": "null"}]
    others = {key: value for key, value in schema.items() if key != "anyOf"}
    return rest[0] | others if len(rest) == 1 else others | {"anyOf": rest}


def trainer(settings: Settings) -> Schema:
    """`trainer`: the program's section, with the image in parts and the default resources beside it."""
    fields = dict(settings.field("trainer")["properties"])
    fields.pop("imagePullPolicy")
    fields["image"] = image("the pods that train")
    for name in ("serviceAccountName", "priorityClassName"):
        fields[name] = text(fields[name].get("description", "") + " Empty: absent.")
    fields["resources"] = settings.field("resources")
    return closed(fields, "The pods that train.")


def leader_election(settings: Settings) -> Schema:
    """`leaderElection`: without the Lease's name and namespace, which follow from the release."""
    fields = settings.field("leaderElection")["properties"]
    times = {name: field for name, field in fields.items() if name not in ("leaseName", "leaseNamespace")}
    return closed(times, "One active replica, by a Lease.")


def schema() -> Schema:
    """The whole values.schema.json."""
    settings = Settings()
    switch = {"type": "boolean"}
    properties = {
        "image": image("the operator"),
        "imagePullSecrets": listed(text(), "Secrets for pulling the operator's image, by name."),
        "replicas": {"type": "integer", "minimum": 0, "maximum": 10, "description": "Operator pods; one is active."},
        "leaderElection": leader_election(settings),
        "watchNamespaces": settings.field("namespaces"),
        "trainer": trainer(settings),
        "storage": settings.field("storage"),
        "nodePools": settings.field("nodePools"),
        "settings": closed(settings.rest(), "Further settings of the operator."),
        "log": settings.field("log"),
        "crds": closed({"enabled": switch, "keep": switch}, "The CustomResourceDefinition."),
        "rbac": closed({"create": switch, "aggregate": switch}, "Roles and bindings."),
        "serviceAccount": closed(
            {"create": switch, "name": text(), "annotations": mapped("Annotations.")}, "The operator's ServiceAccount."
        ),
        "resources": anything("Container resources of the operator."),
        "nodeSelector": mapped("Node labels for the operator."),
        "tolerations": listed(anything("A toleration."), "Tolerations of the operator."),
        "affinity": anything("Affinity of the operator."),
        "priorityClassName": text("Priority class of the operator."),
        "podLabels": mapped("Labels of the operator's pods."),
        "podAnnotations": mapped("Annotations of the operator's pods."),
        "nameOverride": text("In place of the chart's name."),
        "fullnameOverride": text("In place of release and chart name."),
        "global": anything("Helm's own; unused."),
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of finetune-operator"}
    return head | closed(properties)
