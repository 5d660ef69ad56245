"""The settings in `policy` of the chart's values and of the operator's configuration: what FineTuneJobs of each namespace may use."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, StringConstraints
from pydantic.alias_generators import to_snake

from finetune_api.base import WireModel
from finetune_api.tenancy.patterns import AddressPattern, Pattern

Patterns = tuple[Pattern, ...]
AddressPatterns = tuple[AddressPattern, ...]
NamespacePattern = Annotated[str, StringConstraints(pattern=r"^[-a-z0-9*]+$", max_length=63)]


class NamespacePolicy(WireModel):
    """The rules that the platform team can set. A rule that is None is not set."""

    node_pools: Patterns | None = Field(
        default=None, description="Node pools of jobs. Only `*` allows a job without a pool, because its pods can run on every node without taints."
    )
    images: Patterns | None = Field(default=None, description="Trainer images in placement.image.")
    service_accounts: Patterns | None = Field(default=None, description="ServiceAccounts in placement.serviceAccountName.")
    secrets: Patterns | None = Field(default=None, description="Names of the Secrets that the job uses, in the job's namespace.")
    priority_classes: Patterns | None = Field(default=None, description="Priority classes in placement.priorityClassName.")
    tolerations: Patterns | None = Field(
        default=None, description="Keys of the taints in placement.tolerations. Only the list [`*`] allows tolerations without key, which tolerate all taints."
    )
    node_labels: Patterns | None = Field(
        default=None, description="Keys of node labels in placement.nodeSelector and placement.nodeAffinity. NotIn and DoesNotExist are always allowed."
    )
    environment: Patterns | None = Field(default=None, description="Names of the variables in placement.env.")
    labels: Patterns | None = Field(default=None, description="Keys in placement.labels.")
    annotations: Patterns | None = Field(default=None, description="Keys in placement.annotations.")
    mount_paths: Patterns | None = Field(default=None, description="Paths in placement.volumeMounts.")
    endpoints: Patterns | None = Field(
        default=None, description="URLs of S3 stores, judges and MLflow servers. The URLs are compared in lower case and without a slash at the end."
    )
    sources: AddressPatterns | None = Field(
        default=None, description="Addresses from which a job reads models, data, benchmarks, and checkpoints of other jobs. org/name is compared as hf://org/name."
    )
    destinations: AddressPatterns | None = Field(
        default=None,
        description="Addresses below which a job writes: <storage.uri>/<namespace>, <storage.uri>/<output.dir>, and hf://<output.hub.repository>.",
    )
    allow_trust_remote_code: bool | None = Field(default=None, description="Whether jobs may set model.trustRemoteCode.")
    allow_user_code: bool | None = Field(
        default=None, description="Whether jobs may run reward functions from ConfigMaps or benchmarks with allowCodeExecution, or set checkpoint.allowPickle."
    )
    max_nodes: int | None = Field(default=None, ge=1, description="Maximum number of nodes of a job; default: no limit.")
    max_gpus: int | None = Field(
        default=None, ge=0, description="Maximum number of GPUs of a job: nodes x gpusPerNode, plus the GPUs of a vLLM server; default: no limit."
    )
    max_duration_seconds: int | None = Field(
        default=None,
        ge=1,
        description="Maximum of policy.activeDeadlineSeconds in seconds. The limit also applies to jobs that do not set this field; default: no limit.",
    )


class NamespaceEntry(NamespacePolicy):
    """One entry of `policy.namespaces`: rules that apply only to the namespaces in `names`."""

    names: Annotated[tuple[NamespacePattern, ...], Field(min_length=1)] = Field(description="Names of namespaces; `*` matches any text.")


class PolicyRules(WireModel):
    """All rules of one namespace. The default lists refuse only access to things outside of the namespace, such as files of other namespaces."""

    node_pools: Patterns = ("*",)
    images: Patterns = ("*",)
    service_accounts: Patterns = ("default",)
    secrets: Patterns = ("*",)
    priority_classes: Patterns = ("*", "!system-*")
    tolerations: Patterns = ("*", "!node-role.kubernetes.io/*", "!node.cloudprovider.kubernetes.io/*", "!CriticalAddonsOnly")
    node_labels: Patterns = ("*", "!node-role.kubernetes.io/*")
    environment: Patterns = (
        "*", "!LD_*", "!PATH", "!PYTHONPATH", "!PYTHONHOME", "!PYTHONSTARTUP", "!PYTHONUSERBASE", "!BASH_ENV", "!CC", "!CXX", "!GCONV_PATH", "!NCCL_*PLUGIN*",
        "!OPENSSL_*",
    )  # fmt: skip
    labels: Patterns = ("*",)
    annotations: Patterns = ("*", "!k8s.v1.cni.cncf.io/*", "!container.apparmor.security.beta.kubernetes.io/*")
    mount_paths: Patterns = (
        "*", "!/app/*", "!/opt/venv/*", "!/bin/*", "!/sbin/*", "!/lib/*", "!/lib64/*", "!/usr/*", "!/etc/*", "!/dev/*", "!/proc/*", "!/sys/*",
        "!/run/*", "!/var/run/*",
    )  # fmt: skip
    endpoints: Patterns = (
        "*", "!*://169.254.*", "!*://[fe80:*", "!*://[fd00:ec2::254]*", "!*://100.100.100.200*", "!*://metadata.google.internal*", "!*://127.*",
        "!*://localhost", "!*://localhost:*", "!*://localhost/*", "!*://[::1]*", "!*://0.0.0.0*",
    )  # fmt: skip
    sources: AddressPatterns = ("*", "!{storage}/*", "{storage}/{namespace}/*")
    destinations: AddressPatterns = ("*", "!{storage}/*", "{storage}/{namespace}/*")
    allow_trust_remote_code: bool = True
    allow_user_code: bool = True
    max_nodes: int | None = None
    max_gpus: int | None = None
    max_duration_seconds: int | None = None

    def get_rule(self, name: str) -> Any:
        """Return the value of a rule. `name`: the name of the rule in camelCase."""
        return getattr(self, to_snake(name))


class PlatformPolicy(NamespacePolicy):
    """The whole `policy`: rules for all namespaces, and entries that replace some of these rules in some namespaces."""

    namespaces: tuple[NamespaceEntry, ...] = Field(
        default=(), description="Rules that replace those of `policy` in some namespaces. The first entry with a matching name applies."
    )

    def rules_for(self, namespace: str) -> PolicyRules:
        """Return the rules of a namespace. A rule comes from the first entry that matches the namespace, else from `policy`, else from the defaults."""
        matching_entry = next((entry for entry in self.namespaces if any(_matches_name(name, namespace) for name in entry.names)), None)
        rules_by_name = self.model_dump(exclude_none=True, exclude={"namespaces"})
        if matching_entry is not None:
            rules_by_name |= matching_entry.model_dump(exclude_none=True, exclude={"names"})
        return PolicyRules(**rules_by_name)


@lru_cache(maxsize=1024)
def _compile_name_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace("*", ".*"))


def _matches_name(pattern: str, namespace: str) -> bool:
    return _compile_name_pattern(pattern).fullmatch(namespace) is not None
