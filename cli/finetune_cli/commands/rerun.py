"""`finetune rerun`: creates a new job from an existing one."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption, SetOption


def rerun(
    name: NameArgument,
    from_checkpoint: Annotated[
        int | None,
        typer.Option(
            "--from-checkpoint", metavar="STEP", min=0, help="Start from this checkpoint of the existing job."
        ),
    ] = None,
    sets: SetOption = None,
    new_name: Annotated[
        str | None, typer.Option("--name", help="Name of the new job. Default: the existing name with a number.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the new manifest without creating the job.")
    ] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Create a new job from an existing job. The existing job stays unchanged. An annotation of the new job names the existing job.

    Example: finetune rerun support-bot --from-checkpoint 400 --set training.learningRate=1e-4
    """
    from finetune_api.rules.training import PICKLING_STRATEGIES
    from finetune_api.spec.enums import OnExistingResult

    from finetune_cli.checks import check_manifest, select_errors, select_warnings
    from finetune_cli.cluster import connect
    from finetune_cli.manifests import parse_manifests
    from finetune_cli.overrides import attribute_to_option, parse_overrides
    from finetune_cli.status_text import parse_status
    from finetune_cli.yaml_writer import to_yaml

    cluster = connect(namespace, context, kubeconfig)
    old_job = cluster.get_job(name)
    overrides = parse_overrides(sets or ())
    changed_values = {path: assigned.value for path, assigned in overrides.items()}
    if from_checkpoint is not None:
        changed_values = find_chosen_values(old_job, changed_values) | changed_values
        changed_values["checkpoint.resume"] = _find_checkpoint_uri(old_job, from_checkpoint)
        if _find_strategy(old_job, changed_values) in PICKLING_STRATEGIES:
            changed_values.setdefault("checkpoint.allowPickle", True)
    # Without this setting, the preparation of the new job could adopt the result of a deleted job that had the name of the new job.
    if parse_status(old_job).preparation is not None:
        changed_values.setdefault("policy.onExistingResult", OnExistingResult.TRAIN.value)
    taken_names = {job["metadata"]["name"] for job in cluster.list_jobs(all_namespaces=False)}
    new_job = build_rerun(old_job, new_name or find_free_name(name, taken_names), changed_values, from_checkpoint)
    text = to_yaml(new_job)
    _, findings = check_manifest(next(parse_manifests(text, "new job")))
    output.print_warnings(select_warnings(findings))
    if select_errors(findings):
        raise output.fail(*(attribute_to_option(finding.mistake, overrides) for finding in select_errors(findings)))
    if dry_run:
        output.write(text)
        return
    cluster.create_object(new_job)
    output.write(f"{new_job['metadata']['name']} created from {name} in namespace {cluster.namespace}")


def find_chosen_values(job: dict[str, Any], changed_values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that the old job's plan has chosen.

    A new job that resumes from a checkpoint of the old job needs these values, because the operator does not choose values for a resumed job.

    If the user changes the batch size or the number of ranks, the chosen batch size is left out. If the user changes `resources.processesPerNode`,
    the chosen number of GPUs is left out. If the new job has a single rank, the chosen strategy is left out, because the chosen strategy needs several ranks.
    """
    from finetune_api.memory.choices import PROCESSES_PER_NODE_PATH
    from finetune_api.memory.plan import BATCH_PATHS, GPUS_PATH, STRATEGY_PATH

    from finetune_cli.status_text import parse_status

    plan = parse_status(job).plan
    chosen_values = {choice.field: choice.value for choice in (plan.choices if plan is not None else None) or []}
    replaced_paths: set[str] = set()
    if any(path in changed_values for path in (*BATCH_PATHS, GPUS_PATH, "training.effectiveBatchSize", "resources.nodes", PROCESSES_PER_NODE_PATH)):
        replaced_paths |= set(BATCH_PATHS)
    if PROCESSES_PER_NODE_PATH in changed_values:
        replaced_paths.add(GPUS_PATH)
    resources = {f"resources.{name}": value for name, value in ((job.get("spec") or {}).get("resources") or {}).items()}
    values_of_new_job = resources | {path: value for path, value in chosen_values.items() if path not in replaced_paths} | changed_values
    ranks_per_node = values_of_new_job.get(PROCESSES_PER_NODE_PATH) or values_of_new_job.get(GPUS_PATH) or 1
    if (values_of_new_job.get("resources.nodes") or 1) * ranks_per_node == 1:
        replaced_paths.add(STRATEGY_PATH)
    return {path: value for path, value in chosen_values.items() if path not in replaced_paths}


def _find_strategy(job: dict[str, Any], changed_values: dict[str, Any]) -> Any:
    """Return the distributed strategy of the new job, or None if its spec does not set a strategy."""
    distributed_spec = (job.get("spec") or {}).get("distributed") or {}
    return changed_values.get("distributed.strategy", distributed_spec.get("strategy"))


def _find_checkpoint_uri(job: dict[str, Any], step: int) -> str:
    from finetune_cli.cluster import ClusterError
    from finetune_cli.status_text import parse_status

    checkpoints = parse_status(job).checkpoints
    uri = next((checkpoint.uri for checkpoint in checkpoints if checkpoint.step == step), None)
    if uri is None:
        steps_text = (
            ", ".join(
                str(checkpoint.step) for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
            )
            or "none"
        )
        raise ClusterError(
            f"the status of {job['metadata']['name']} lists no checkpoint of step {step}, only: {steps_text}; "
            "name another checkpoint with --set checkpoint.resume=URI"
        )
    return uri


def find_free_name(name: str, taken_names: set[str]) -> str:
    """Return the name with the next number that no job uses: `bot-2` for `bot`, `bot-3` for `bot-2`.

    If the new name would be too long, the part before the number is shortened.
    """
    from finetune_api.names import MAX_NAME_LENGTH

    match = re.match(r"^(.*?)-(\d+)$", name)
    base_name, number = (match.group(1), int(match.group(2)) + 1) if match else (name, 2)
    while f"{base_name[: MAX_NAME_LENGTH - len(str(number)) - 1]}-{number}" in taken_names:
        number += 1
    return f"{base_name[: MAX_NAME_LENGTH - len(str(number)) - 1]}-{number}"


def build_rerun(old_job: dict[str, Any], name: str, changed_values: dict[str, Any], step: int | None) -> dict[str, Any]:
    """Return the manifest of the new job: the old job's spec with the changed values, but without the fields `suspend` and `cancel`.

    An annotation names the old job.
    """
    from finetune_api.names import API_VERSION, KIND, Annotation

    from finetune_cli.fields import with_values

    spec = with_values(old_job.get("spec") or {}, {"suspend": None, "cancel": None, **changed_values})
    old_metadata = old_job["metadata"]
    annotations = {Annotation.RERUN_OF.value: f"{old_metadata['name']}/{old_metadata['uid']}"}
    if step is not None:
        annotations[Annotation.FROM_STEP.value] = str(step)
    new_metadata = {"name": name, "namespace": old_metadata.get("namespace"), "annotations": annotations}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": new_metadata, "spec": spec}
