"""Plans a job's memory offline for `finetune plan` and `finetune validate`, and chooses values for fields that the spec leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_cli import output

if TYPE_CHECKING:
    from finetune_api.defaults import ResolvedSpec
    from finetune_api.errors import ConfigError
    from finetune_api.memory.architecture import ModelShape
    from finetune_api.memory.changes import Change
    from finetune_api.memory.description import RunFacts
    from finetune_api.memory.plan import JobPlan
    from finetune_api.pod import GpuPool
    from finetune_api.spec import FineTuneJobSpec
    from finetune_api.status import Choice
    from finetune_api.time_plan import DataSize

    from finetune_cli.checks import Finding
    from finetune_cli.manifests import Manifest

STORED_SIZE_TOLERANCE = 0.02
"""If the size of the weight files differs from the planned size by more than this fraction of the planned size, a note says so."""


@dataclass(frozen=True)
class MethodPlan:
    """The plan of a job with one method."""

    spec: FineTuneJobSpec
    """The spec of the job, with the values that the plan has chosen for missing fields."""
    plan: JobPlan
    choices: tuple[Choice, ...] = ()
    changes: tuple[Change, ...] = ()
    refusal: ConfigError | None = None
    notes: tuple[str, ...] = ()


def read_gpu(gpu: str | None, gpu_memory: str | None, gpus_per_node: int | None = None) -> GpuPool | None:
    """Return a pool with the GPUs that `--gpu` or `--gpu-memory` describes, or None if neither option is given."""
    from finetune_api.gpus import GPU_TYPES
    from finetune_api.pod import GpuPool
    from finetune_api.quantities import SIZE_KIND, find_quantity_problem, parse_amount

    if gpu is not None and gpu_memory is not None:
        raise output.fail("--gpu and --gpu-memory exclude each other: remove one of the two")
    if gpu is not None and gpu.lower() not in GPU_TYPES:
        raise output.fail(f"--gpu {gpu}: this type is not known; write one of {', '.join(GPU_TYPES)}, or --gpu-memory SIZE")
    if gpus_per_node is not None and gpus_per_node < 1:
        raise output.fail(f"--gpus-per-node {gpus_per_node}: write a number of at least 1")
    if gpus_per_node is not None and gpu is None and gpu_memory is None:
        raise output.fail("--gpus-per-node needs the memory of a GPU: add --gpu NAME or --gpu-memory SIZE")
    gpu_count = gpus_per_node or 1
    if gpu is not None:
        memory_bytes = GPU_TYPES[gpu.lower()].memory_bytes
        return GpuPool(name=gpu.lower(), memory_bytes=memory_bytes, gpu_type=gpu.lower(), gpus_per_node=gpu_count, is_current=True)
    if gpu_memory is None:
        return None
    message_and_hint = find_quantity_problem(gpu_memory, SIZE_KIND)
    if message_and_hint is not None:
        raise output.fail(f"--gpu-memory: {'; '.join(message_and_hint)}")
    given_memory_bytes = int(parse_amount(gpu_memory))
    if given_memory_bytes < 1:
        raise output.fail(f"--gpu-memory {gpu_memory}: the size must be above 0; write for example 80Gi")
    return GpuPool(name="the GPU", memory_bytes=given_memory_bytes, gpus_per_node=gpu_count, is_current=True)


def plan_job(resolved_spec: ResolvedSpec, shape: ModelShape, pool: GpuPool | None, facts: RunFacts, data_size: DataSize | None = None) -> MethodPlan:
    """Plan a job.

    If `pool` is given, fields that the spec leaves out get the values that the job's preparation in the cluster would choose for this pool. The plan
    does not choose a node pool, because this program does not know all node pools of the operator. Raises the errors of `describe_step`.
    """
    from finetune_api.errors import ConfigError
    from finetune_api.memory.choices import choose_values
    from finetune_api.memory.plan import GPUS_PATH, POOL_PATH, plan_memory

    if pool is None:
        return MethodPlan(resolved_spec.spec, plan_memory(resolved_spec.spec, shape, facts))
    try:
        decision = choose_values(resolved_spec, shape, [pool], facts, data_size)
    except ConfigError as error:
        if error.code != "ChoicesNotPlanned":
            raise
        return MethodPlan(resolved_spec.spec, plan_memory(resolved_spec.spec, shape, facts), notes=(f"the plan chooses no values: {error.message}",))
    hidden_fields = {POOL_PATH, *([GPUS_PATH] if pool.gpus_per_node == 1 else [])}
    choices = tuple(choice for choice in decision.choices if choice.field not in hidden_fields)
    return MethodPlan(decision.resolved.spec, decision.plan, choices, decision.changes, decision.refusal)


def find_model_folder(spec: FineTuneJobSpec, folder: Path | None) -> Path | None:
    """Return the folder with the model's configuration: `folder`, or `model.source` if it is a folder. Return None if neither is a folder."""
    source = (spec.model.source or "").removeprefix("file://")
    return folder or (Path(source) if source and Path(source).is_dir() else None)


def read_model(spec: FineTuneJobSpec, folder: Path | None) -> tuple[ModelShape, list[str]]:
    """Read the model's configuration. Returns the sizes of the model, and a note if the index of the weight files contradicts these sizes."""
    from finetune_api.memory.architecture import read_model_shape, read_stored_bytes
    from finetune_api.memory.plan import count_parameters, format_gigabytes

    model_folder = find_model_folder(spec, folder)
    if model_folder is None:
        source = (spec.model.source or "").removeprefix("file://")
        raise output.fail(
            f"model.source is {source or 'missing'}, which is no folder on this machine: add --model-config FOLDER with the config.json of this model"
        )
    shape = read_model_shape(model_folder)
    stored_bytes, expected_bytes = read_stored_bytes(model_folder), count_parameters(shape) * shape.stored_value_bytes
    if stored_bytes is None or abs(stored_bytes / expected_bytes - 1) <= STORED_SIZE_TOLERANCE:
        return shape, []
    return shape, [
        f"the weight files have {format_gigabytes(stored_bytes)}, but the plan assumes {format_gigabytes(int(expected_bytes))}: "
        f"the plan may be wrong by this difference"
    ]


def find_memory_findings(manifest: Manifest, spec: FineTuneJobSpec, *, pool: GpuPool, folder: Path | None) -> Iterator[Finding]:
    """Yield an error if the job does not fit on the GPUs of `pool`. Yield a warning if the job possibly does not fit, or if its memory cannot be planned."""
    from finetune_api.defaults import resolve_defaults
    from finetune_api.errors import FineTuneError
    from finetune_api.memory.architecture import read_model_shape
    from finetune_api.memory.changes import format_changes_hint
    from finetune_api.memory.description import RunFacts
    from finetune_api.memory.plan import format_gigabytes
    from finetune_api.rules import check_spec, gpus_per_node

    from finetune_cli.checks import Finding
    from finetune_cli.mistakes import Mistake

    if gpus_per_node(spec) == 0 or check_spec(spec):
        return
    model_folder = find_model_folder(spec, folder)
    path, location = "spec", manifest.location("spec")
    if model_folder is None:
        message = f"the memory of the job is not planned, because model.source {spec.model.source} is no folder on this machine"
        yield Finding(Mistake(location, path, message, "add --model-config FOLDER with the config.json of this model"), "NotPlanned", is_error=False)
        return
    try:
        method_plan = plan_job(resolve_defaults(spec), read_model_shape(model_folder), pool, RunFacts())
    except FineTuneError as error:
        yield Finding(Mistake(location, path, f"the memory of the job is not planned: {error.message}", error.hint or ""), "NotPlanned", is_error=False)
        return
    memory = method_plan.plan.memory
    if method_plan.refusal is not None:
        yield Finding(Mistake(location, path, method_plan.refusal.message, method_plan.refusal.hint or ""), "DoesNotFit")
    elif memory.upper_bytes > (pool.memory_bytes or 0):
        message = (
            f"the job may not fit: {format_gigabytes(memory.expected_bytes)} are expected on each GPU and "
            f"at most {format_gigabytes(memory.upper_bytes)} are possible, but {pool.name} has {format_gigabytes(pool.memory_bytes or 0)}"
        )
        yield Finding(Mistake(location, path, message, format_changes_hint(method_plan.changes)), "DoesNotFit", is_error=False)
