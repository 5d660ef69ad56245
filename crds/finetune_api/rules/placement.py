"""Rules for `spec.placement`: environment variables, volumes, duplicate names, and the syntax that Kubernetes requires of pods."""

from __future__ import annotations

import re

from finetune_api.names import Env
from finetune_api.patterns import LABEL_VALUE, MISMATCH_TEXTS
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import gpus_per_node
from finetune_api.spec import FineTuneJobSpec

KEY_PATTERN = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Kubernetes' syntax for the keys of labels, annotations and node labels."""
OPERATORS_WITH_VALUES = ("In", "NotIn")
"""Operators of node affinity that compare a label with a list of values."""
OPERATORS_WITH_NUMBER = ("Gt", "Lt")
"""Operators of node affinity that compare a label with one integer."""


@rule("EnvironmentReserved")
def check_environment(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    reserved_names = {member.value for member in Env}
    for i, variable in enumerate(spec.placement.env or []):
        if variable.name in reserved_names or variable.name.startswith("FINETUNE_"):
            yield (
                f"placement.env[{i}].name",
                f"the operator sets {variable.name}",
                f"remove {variable.name}; write credentials into storage.credentialsSecretRef and model.tokenSecretRef",
            )


@rule("MaxCostWithoutGpus")
def check_max_cost(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.policy.max_cost is not None and gpus_per_node(spec) == 0:
        yield "policy.maxCost", "maxCost has no effect, because only GPU-hours have a price and resources.gpusPerNode is 0", "remove policy.maxCost"


@rule("EnvironmentContradiction")
def check_environment_values(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, variable in enumerate(spec.placement.env or []):
        if variable.value is not None and variable.secret_key_ref is not None:
            yield f"placement.env[{i}]", f"{variable.name} has both `value` and `secretKeyRef`", "remove `value` or `secretKeyRef`"


@rule("VolumeContradiction")
def check_volumes(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, volume in enumerate(spec.placement.volumes or []):
        sources = [source for source in (volume.persistent_volume_claim, volume.config_map, volume.secret) if source is not None]
        if len(sources) != 1:
            yield (
                f"placement.volumes[{i}]",
                f"{volume.name} has {len(sources)} sources",
                "write exactly one of `persistentVolumeClaim`, `configMap` and `secret`",
            )
    volume_names = [volume.name for volume in spec.placement.volumes or []]
    for i, mount in enumerate(spec.placement.volume_mounts or []):
        if mount.name not in volume_names:
            volumes_text = f"placement.volumes contains {', '.join(volume_names)}" if volume_names else "placement.volumes is empty"
            yield (
                f"placement.volumeMounts[{i}].name",
                f"{mount.name} is not the name of a volume: {volumes_text}",
                "add the volume to placement.volumes, or write the name of an existing volume",
            )


@rule("PlacementNameTwice")
def check_unique_names(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    placement = spec.placement
    values_by_path_template = {
        "env[{}].name": [variable.name for variable in placement.env or []],
        "volumes[{}].name": [volume.name for volume in placement.volumes or []],
        "volumeMounts[{}].mountPath": [mount.mount_path for mount in placement.volume_mounts or []],
    }
    for path_template, values in values_by_path_template.items():
        for i, value in enumerate(values):
            if value in values[:i]:
                yield f"placement.{path_template.format(i)}", f"another entry also has {value}", "write each value once"


@rule("LabelSyntax")
def check_label_syntax(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    placement = spec.placement
    for field, value_by_key in (("labels", placement.labels), ("annotations", placement.annotations), ("nodeSelector", placement.node_selector)):
        for key, value in (value_by_key or {}).items():
            path = f"placement.{field}.{key}"
            if not KEY_PATTERN.fullmatch(key):
                yield path, f"{key!r} is not a valid key of a label or an annotation", "write a key such as team or example.com/team"
            if field != "annotations" and not re.match(LABEL_VALUE, value):
                yield path, f"{value!r} {MISMATCH_TEXTS[LABEL_VALUE]}", "write for example team-a"


@rule("SchedulingTermInvalid")
def check_scheduling_terms(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """Check device names, tolerations and node affinity as the API server does for pods. Without this check, the error appears only when the Job is created."""
    gpu_resource = spec.resources.gpu_resource
    if gpu_resource is not None and "/" not in gpu_resource:
        yield "resources.gpuResource", f"{gpu_resource!r} is not the name of a device, because it has no domain", "write for example nvidia.com/gpu or amd.com/gpu"
    for i, toleration in enumerate(spec.placement.tolerations or []):
        path, is_exists_operator = f"placement.tolerations[{i}]", toleration.operator == "Exists"
        if is_exists_operator and toleration.value:
            yield f"{path}.value", f"{toleration.value!r}, but operator Exists ignores the value of a taint", "remove value, or write `operator: Equal`"
        if toleration.key is None and not is_exists_operator:
            yield f"{path}.key", "the key is missing, but operator Equal needs a key", "write the key of the taint, or `operator: Exists` for all taints"
        if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
            yield (
                f"{path}.tolerationSeconds",
                f"{toleration.toleration_seconds}, but only taints with the effect NoExecute evict running pods",
                "write `effect: NoExecute`, or remove tolerationSeconds",
            )
    for i, term in enumerate(spec.placement.node_affinity or []):
        yield from _check_affinity(f"placement.nodeAffinity[{i}].values", term.operator, term.values or [])


def _check_affinity(path: str, operator: str, label_values: list[str]) -> Findings:
    if operator in OPERATORS_WITH_VALUES and not label_values:
        yield path, f"operator {operator} needs at least one value, but the list is empty", "write for example `values: [eu-1a]`"
    elif operator in OPERATORS_WITH_NUMBER and (len(label_values) != 1 or not re.fullmatch(r"-?\d+", label_values[0])):
        yield path, f"{label_values}, but operator {operator} needs exactly one integer", 'write for example `values: ["8"]`'
    elif operator not in OPERATORS_WITH_VALUES + OPERATORS_WITH_NUMBER and label_values:
        yield path, f"{label_values}, but operator {operator} must not have values", f"remove values, or write `operator: {'In' if operator == 'Exists' else 'NotIn'}`"
