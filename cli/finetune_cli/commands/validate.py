"""`finetune validate`: checks manifests without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import GpuMemoryOption, GpusPerNodeOption, ModelConfigOption

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJobSpec

    from finetune_cli.checks import Finding
    from finetune_cli.manifests import Manifest

    SpecCheck = Callable[[Manifest, FineTuneJobSpec], Iterable[Finding]]


def validate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Manifests. A file may contain several manifests.")
    ],
    strict: Annotated[
        bool, typer.Option("--strict", help="Also refuse manifests with warnings, and objects that are no FineTuneJob, Secret or ConfigMap.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Apply the rules of `finetune run --local` instead of those of a cluster.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="Also apply the rules of `policy` in this values file of the chart."),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", "-n", help="With --policy: namespace of manifests without metadata.namespace. Default: default."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Also refuse jobs that do not fit on GPUs of this type, such as h100-80gb.")
    ] = None,
    gpu_memory: GpuMemoryOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    model_config: ModelConfigOption = None,
) -> None:
    """Check manifests without a cluster, against the schema and every rule of the operator. Reports all errors at once.

    Exit code 0: the manifests can be submitted; 1: a manifest has errors.

    Example: finetune validate job.yaml

    Example: finetune validate --strict jobs/*.yaml

    Example: finetune validate --policy values.yaml -n team-a job.yaml

    Example: finetune validate --gpu l4-24gb --model-config models/llama job.yaml
    """
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.files import display_name
    from finetune_cli.job_plan import find_memory_findings, read_gpu
    from finetune_cli.manifests import read_all_manifests

    if namespace is not None and policy is None:
        raise output.fail("--namespace has no effect without --policy: add --policy FILE, or remove --namespace")
    if policy is not None and local:
        raise output.fail("--policy and --local exclude each other, because the rules apply to a cluster: remove one of the two")
    pool = read_gpu(gpu, gpu_memory, gpus_per_node)
    if model_config is not None and pool is None:
        raise output.fail("--model-config has no effect without the memory of a GPU: add --gpu NAME or --gpu-memory SIZE")
    extra_checks = [] if policy is None else [_make_policy_check(policy, namespace)]
    if pool is not None:
        extra_checks.append(partial(find_memory_findings, pool=pool, folder=model_config))
    manifests, read_mistakes = read_all_manifests(files)
    errors = list(map(str, read_mistakes))
    for manifest in manifests:
        errors += _find_errors(manifest, ExecutionTarget.LOCAL if local else ExecutionTarget.CLUSTER, strict, extra_checks)
    jobs = [manifest for manifest in manifests if manifest.is_job]
    if not jobs and not errors:
        errors.append(f"{', '.join(map(display_name, files))}: there is no FineTuneJob in the input")
    errors += _find_duplicate_names(jobs)
    if errors:
        raise output.fail(*dict.fromkeys(errors))
    output.write("\n".join(f"{job.file}: {job.name}: ok" for job in jobs))


def _make_policy_check(file: Path, namespace: str | None) -> SpecCheck:
    """Return a function that yields a finding for each value that the policy rules in the values file refuse."""
    from finetune_cli.mistakes import InvalidInput
    from finetune_cli.platform_policy import read_installation_rules

    try:
        installation_rules = read_installation_rules(file)
    except InvalidInput as error:
        raise output.fail(*error.mistakes) from error
    return lambda manifest, spec: installation_rules.find_problems(manifest, spec, namespace)


def _find_errors(manifest: Manifest, execution_target: object, strict: bool, extra_checks: list[SpecCheck]) -> list[str]:
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.checks import check_manifest, select_errors, select_warnings

    if not manifest.is_job:
        kind = manifest.value.get("kind")
        if strict and kind not in ("Secret", "ConfigMap"):
            return [f"{manifest.location('kind')}: kind: {kind or 'missing'} is not a FineTuneJob"]
        if kind is None:
            return [f"{manifest.file}: kind: this required field is missing; write kind: FineTuneJob"]
        return []
    spec, findings = check_manifest(manifest, ExecutionTarget(str(execution_target)))
    for find_more_problems in extra_checks if spec is not None else ():
        findings += find_more_problems(manifest, spec)
    if not strict:
        output.print_warnings(select_warnings(findings))
        findings = select_errors(findings)
    return [f"{finding.mistake} [{finding.code}]" for finding in findings]


def _find_duplicate_names(jobs: list[Manifest]) -> list[str]:
    first_job_by_name: dict[tuple[str, str], Manifest] = {}
    errors = []
    for job in jobs:
        metadata = job.value.get("metadata")
        namespace_and_name = (str(metadata.get("namespace", "")) if isinstance(metadata, dict) else "", job.name)
        if job.name and namespace_and_name in first_job_by_name:
            errors.append(
                f"{job.location('metadata.name')}: metadata.name: {job.name} is used twice, "
                f"first in {first_job_by_name[namespace_and_name].location('metadata.name')}"
            )
        first_job_by_name.setdefault(namespace_and_name, job)
    return errors
