"""Reads the platform team's rules from the chart's values, for `finetune validate --policy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy import Platform, PlatformPolicy, Pool, check_policy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_cli.checks import Finding
from finetune_cli.config_files import list_mistakes, read_mapping
from finetune_cli.files import display_name
from finetune_cli.manifests import Manifest
from finetune_cli.mistakes import InvalidInput, Mistake

FINDING_CODE = "ForbiddenByPolicy"
CHART_ONLY_KEY = "validatingAdmissionPolicy"
"""Key of `policy` that `validate` ignores, because only the chart uses this key."""


class _Pool(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    gpu_resource: str = Field(default="nvidia.com/gpu", alias="gpuResource")
    default: bool = False


class _Storage(BaseModel):
    model_config = ConfigDict(strict=True)
    uri: str | None = None


class _ChartValues(BaseModel):
    """The chart's values that the check of the rules needs. Other values are ignored."""

    policy: PlatformPolicy = PlatformPolicy()
    storage: _Storage = _Storage()
    node_pools: list[_Pool] = Field(default=[], alias="nodePools")


@dataclass(frozen=True)
class InstallationRules:
    """The rules, the default storage and the node pools of an installation."""

    policy: PlatformPolicy
    storage_uri: str | None
    pools: tuple[Pool, ...]

    def find_problems(self, manifest: Manifest, spec: FineTuneJobSpec, namespace: str | None) -> Iterator[Finding]:
        """Yield a finding for each value that the rules refuse. `namespace`: the namespace of a manifest without metadata.namespace; None means `default`."""
        metadata = manifest.value.get("metadata")
        manifest_namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
        effective_namespace = str(manifest_namespace or namespace or "default")
        platform = Platform(effective_namespace, self.storage_uri, self.pools)
        for problem in check_policy(spec, self.policy.rules_for(effective_namespace), platform):
            path = f"spec.{problem.path}"
            yield Finding(Mistake(manifest.location(path), path, problem.message, problem.hint), FINDING_CODE)


def read_installation_rules(path: Path) -> InstallationRules:
    """Read a values file of the chart. Raises UnreadableFile, or InvalidInput with every wrong key."""
    values, lines = read_mapping(path, "a values file of the chart", "write `policy:` followed by its rules")
    policy = values.get("policy")
    if isinstance(policy, dict):
        values = {**values, "policy": {key: value for key, value in policy.items() if key != CHART_ONLY_KEY}}
    try:
        chart_values = _ChartValues.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise InvalidInput(list(list_mistakes(error, display_name(path), lines, "there is no rule of this name"))) from error
    pools = tuple(Pool(pool.name, pool.gpu_resource, pool.default) for pool in chart_values.node_pools)
    return InstallationRules(chart_values.policy, chart_values.storage.uri, pools)
