"""Reads the platform team's rules from the chart's values, for `finetune validate --policy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy import Platform, PlatformPolicy, Pool, check_policy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_cli.checks import Finding
from finetune_cli.files import UnreadableFile, display_name, read_text
from finetune_cli.manifests import Manifest
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.yaml_reader import InvalidYaml, read_trees

CODE = "ForbiddenByPolicy"
CHART_ONLY = "validatingAdmissionPolicy"
"""Key of `policy` that only the chart reads."""


class _Pool(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    gpu_resource: str = Field(default="nvidia.com/gpu", alias="gpuResource")
    default: bool = False


class _Storage(BaseModel):
    model_config = ConfigDict(strict=True)
    uri: str | None = None


class _ChartValues(BaseModel):
    """The values of the chart that the rules need. Other values are ignored."""

    policy: PlatformPolicy = PlatformPolicy()
    storage: _Storage = _Storage()
    node_pools: list[_Pool] = Field(default=[], alias="nodePools")


@dataclass(frozen=True)
class ChartPolicy:
    """The rules, the default storage and the node pools of an installation."""

    policy: PlatformPolicy
    storage_uri: str | None
    pools: tuple[Pool, ...]

    def find_problems(self, manifest: Manifest, spec: FineTuneJobSpec, namespace: str | None) -> Iterator[Finding]:
        """Yield each value of a manifest that the rules refuse. `namespace` applies to manifests without metadata.namespace; default: `default`."""
        metadata = manifest.value.get("metadata")
        own_namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
        used_namespace = str(own_namespace or namespace or "default")
        platform = Platform(used_namespace, self.storage_uri, self.pools)
        for problem in check_policy(spec, self.policy.rules_for(used_namespace), platform):
            path = f"spec.{problem.path}"
            yield Finding(Mistake(manifest.location(path), path, problem.message, problem.hint), CODE)


def read_chart_policy(path: Path) -> ChartPolicy:
    """Read a values file of the chart. Errors: InvalidInput with every wrong key, UnreadableFile."""
    values, lines = _read_mapping(path)
    policy = values.get("policy")
    if isinstance(policy, dict):
        values = {**values, "policy": {key: value for key, value in policy.items() if key != CHART_ONLY}}
    try:
        found = _ChartValues.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise InvalidInput(list(_mistakes(error, display_name(path), lines))) from error
    pools = tuple(Pool(pool.name, pool.gpu_resource, pool.default) for pool in found.node_pools)
    return ChartPolicy(found.policy, found.storage.uri, pools)


def _read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    name = display_name(path)
    try:
        trees = list(read_trees(read_text(path)))
    except InvalidYaml as error:
        raise UnreadableFile(Mistake(f"{name}:{error.line}" if error.line else name, "", f"this is not YAML: {error}")) from error
    if len(trees) > 1 or (trees and not isinstance(trees[0].value, dict | None)):
        raise UnreadableFile(Mistake(name, "", "this is not a values file of the chart", "write `policy:` followed by its rules"))
    if trees and trees[0].problems:
        problem = trees[0].problems[0]
        raise UnreadableFile(Mistake(f"{name}:{problem.line}", problem.path, problem.message, problem.hint))
    return (trees[0].value or {}, trees[0].lines) if trees else ({}, {})


def _mistakes(error: ValidationError, name: str, lines: dict[str, int]) -> Iterator[Mistake]:
    for item in error.errors():
        key = ""
        for part in item["loc"]:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
        line = lines.get(key)
        message = "there is no rule of this name" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        yield Mistake(f"{name}:{line}" if line else name, key, message)
