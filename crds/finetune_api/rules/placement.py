"""Rules for `spec.placement`: environment variables, volumes and duplicate names."""

from __future__ import annotations

from finetune_api.names import Env
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec


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


@rule("EnvironmentContradiction")
def check_environment_values(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, variable in enumerate(spec.placement.env or []):
        if variable.value is not None and variable.secret_key_ref is not None:
            yield f"placement.env[{i}]", f"{variable.name} has both `value` and `secretKeyRef`", "remove one of the two"


@rule("VolumeContradiction")
def check_volumes(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, volume in enumerate(spec.placement.volumes or []):
        given_sources = [source for source in (volume.persistent_volume_claim, volume.config_map, volume.secret) if source is not None]
        if len(given_sources) != 1:
            yield (
                f"placement.volumes[{i}]",
                f"{volume.name} has {len(given_sources)} sources",
                "write exactly one of `persistentVolumeClaim`, `configMap` and `secret`",
            )
    names = [volume.name for volume in spec.placement.volumes or []]
    for i, mount in enumerate(spec.placement.volume_mounts or []):
        if mount.name not in names:
            known_volumes = f"placement.volumes contains {', '.join(names)}" if names else "placement.volumes is empty"
            yield (
                f"placement.volumeMounts[{i}].name",
                f"{mount.name} is not the name of a volume: {known_volumes}",
                "add the volume to placement.volumes, or write the name of an existing volume",
            )


@rule("PlacementNameTwice")
def check_unique_names(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    placement = spec.placement
    keys = {
        "env[{}].name": [variable.name for variable in placement.env or []],
        "volumes[{}].name": [volume.name for volume in placement.volumes or []],
        "volumeMounts[{}].mountPath": [mount.mount_path for mount in placement.volume_mounts or []],
    }
    for path, values in keys.items():
        for i, value in enumerate(values):
            if value in values[:i]:
                yield f"placement.{path.format(i)}", f"another entry also has {value}", "write a different value"
