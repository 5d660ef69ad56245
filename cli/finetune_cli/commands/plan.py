"""`finetune plan`: plans memory, time and cost of a job, without a cluster and without the model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    GpuMemoryOption,
    GpusPerNodeOption,
    ModelConfigOption,
    complete_words,
    require_format,
    write_data,
)

if TYPE_CHECKING:
    from finetune_api.defaults import ResolvedSpec
    from finetune_api.memory.architecture import ModelShape
    from finetune_api.memory.description import RunFacts
    from finetune_api.pod import GpuPool
    from finetune_api.spec import FineTuneJobSpec
    from finetune_api.status import CostPlan, TimePlan
    from finetune_api.time_plan import DataSize

    from finetune_cli.job_plan import MethodPlan

    TimeAndCostPlans = dict[str, tuple[TimePlan, CostPlan | None]]

COMPARABLE_METHODS = ("lora", "qlora", "dora", "ia3", "promptTuning", "prefixTuning", "full")
TIME_CONTENT_NOTE = "the planned time contains only the optimizer steps, but not start, evaluation, checkpoints and upload"


def plan(
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Manifest of the job.")],
    model_config: ModelConfigOption = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Type of the GPUs, such as h100-80gb.")
    ] = None,
    gpu_memory: GpuMemoryOption = None,
    gpus_per_node: GpusPerNodeOption = None,
    longest_row: Annotated[
        int | None,
        typer.Option(
            "--longest-row", metavar="TOKENS",
            help="Tokens of the longest row, or of the longest prompt with one of its answers. Default: dataset.maxSequenceLength.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", metavar="ROWS", help="Number of training rows, to plan the time. Also needs --mean-row.")
    ] = None,
    mean_row: Annotated[
        int | None,
        typer.Option(
            "--mean-row", metavar="TOKENS",
            help="Mean number of tokens of a training row, or of a prompt with one of its answers, to plan the time. Also needs --rows.",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="PRICE", help="Price of one GPU for one hour, to plan the cost.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="METHOD,METHOD", help="Plan the job with each of these methods, such as lora,qlora,full.",
            autocompletion=complete_words(*COMPARABLE_METHODS)
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Propose the largest micro-batch that fits, or changes that make the job fit.")
    ] = False,
    output_format: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FORMAT", help="json or yaml.", autocompletion=complete_words("json", "yaml"))
    ] = None,
) -> None:
    """Show how much memory a job needs on each rank, how long the job takes and what it costs, without a cluster, a GPU or the model's weights.

    Exit code 0: the job fits, or no GPU is given; 1: the job does not fit or cannot be planned.

    Example: finetune plan -f job.yaml --model-config models/llama --gpu h100-80gb

    Example: finetune plan -f job.yaml --gpu-memory 24Gi --compare lora,qlora,full

    Example: finetune plan -f job.yaml --gpu l4-24gb --fit

    Example: finetune plan -f job.yaml --gpu h100-80gb --rows 12000 --mean-row 310 --price 2.5
    """
    from finetune_api.errors import FineTuneError
    from finetune_api.memory.description import RunFacts

    from finetune_cli.job_plan import read_gpu, read_model

    require_format(output_format, "json", "yaml")
    pool = read_gpu(gpu, gpu_memory, gpus_per_node)
    if fit and pool is None:
        raise output.fail("--fit needs the memory of a GPU: add --gpu NAME or --gpu-memory SIZE")
    _check_numbers({"--longest-row": longest_row, "--rows": rows, "--mean-row": mean_row}, price)
    _check_time_options(gpu, rows, mean_row, price)
    resolved_spec, job_name = _read_spec(file)
    try:
        shape, notes = read_model(resolved_spec.spec, model_config)
        facts, data_size = RunFacts(longest_tokens=longest_row), _to_data_size(resolved_spec.spec, rows, mean_row)
        plans = _plan_methods(resolved_spec, shape, _parse_methods(compare), pool, facts, data_size)
        proposals = _propose_changes(next(iter(plans.values())), shape, pool, facts) if fit and pool is not None else []
        time_plans = _plan_times(shape, plans, pool, data_size, price)
    except FineTuneError as error:
        raise output.fail(f"{error.message}; {error.hint}" if error.hint else error.message) from error
    memory_bytes = pool.memory_bytes if pool is not None else None
    if output_format is not None:
        write_data(_to_dict(job_name, plans, time_plans, memory_bytes, proposals), output_format)
    else:
        summary_lines = _describe_model(job_name, next(iter(plans.values())).spec, shape)
        lines = [*summary_lines, "", *_format_table(plans, time_plans, memory_bytes, gpu), *_format_choice_lines(plans)]
        output.write("\n".join([*lines, *(["", *proposals] if proposals else [])]))
    notes = [*notes, *(note for method_plan in plans.values() for note in method_plan.notes), *_make_time_notes(time_plans)]
    output.print_notes(dict.fromkeys([*notes, *(sentence for method_plan in plans.values() for sentence in method_plan.plan.assumptions)]))
    refusals = [method_plan.refusal for method_plan in plans.values() if method_plan.refusal is not None]
    if refusals and len(refusals) == len(plans):
        raise output.fail(f"{refusals[0].message}; {refusals[0].hint}")
    if memory_bytes is not None and not any(method_plan.plan.fits(memory_bytes) for method_plan in plans.values()):
        raise output.CommandExit(output.ERROR)


def _make_time_notes(time_plans: TimeAndCostPlans) -> list[str]:
    """Return notes about the planned time: what it includes, and whether its bounds are calibrated with measured runs on this type of GPU."""
    run_counts = {time.calibration_runs if time.calibrated else None for time, _ in time_plans.values()}
    bounds_texts = (f"are calibrated with {count} runs on this type of GPU" if count is not None else "are not calibrated for this GPU" for count in run_counts)
    return [f"{TIME_CONTENT_NOTE}; its bounds {text}" for text in bounds_texts]


def _check_numbers(counts: dict[str, int | None], price: float | None) -> None:
    problems = [f"{option} {count}: write a number of at least 1" for option, count in counts.items() if count is not None and count < 1]
    if price is not None and not price >= 0:
        problems.append(f"--price {price:g}: write a number of at least 0")
    if problems:
        raise output.fail(*problems)


def _check_time_options(gpu: str | None, row_count: int | None, mean_row_tokens: int | None, price: float | None) -> None:
    if (row_count is None) != (mean_row_tokens is None):
        raise output.fail("the planned time needs both --rows and --mean-row: write both, or neither")
    if row_count is not None and gpu is None:
        raise output.fail("--rows and --mean-row need the type of the GPUs: add --gpu NAME")
    if price is not None and row_count is None:
        raise output.fail("--price needs the planned time: add --gpu, --rows and --mean-row")


def _to_data_size(spec: FineTuneJobSpec, row_count: int | None, mean_row_tokens: int | None) -> DataSize | None:
    from finetune_api.objectives import OBJECTIVES
    from finetune_api.rules import trainer_type_of
    from finetune_api.time_plan import DataSize

    if row_count is None or mean_row_tokens is None:
        return None
    sequence_count = row_count * OBJECTIVES[trainer_type_of(spec)].sequences_per_row
    return DataSize(row_count, sequence_count * min(mean_row_tokens, spec.dataset.max_sequence_length or mean_row_tokens))


def _plan_methods(
    resolved_spec: ResolvedSpec, shape: ModelShape, methods: list[str], pool: GpuPool | None, facts: RunFacts, data_size: DataSize | None
) -> dict[str, MethodPlan]:
    """Plan the job with each of `methods`, or with its own method if the list is empty. Returns the plans by method."""
    from dataclasses import replace

    from finetune_api.memory.plan import change_spec

    from finetune_cli.job_plan import plan_job

    spec = resolved_spec.spec
    spec_by_method = {method: change_spec(spec, {"method.type": method}) for method in methods} or {str(spec.method.type): spec}
    return {method: plan_job(replace(resolved_spec, spec=method_spec), shape, pool, facts, data_size) for method, method_spec in spec_by_method.items()}


def _plan_times(shape: ModelShape, plans: dict[str, MethodPlan], pool: GpuPool | None, data_size: DataSize | None, price: float | None) -> TimeAndCostPlans:
    """Return the planned time and cost by method. If the GPU type or the data size is unknown, the result is empty."""
    from finetune_api.errors import ConfigError
    from finetune_api.gpus import GPU_TYPES
    from finetune_api.rules import world_size
    from finetune_api.time_plan import plan_cost, plan_time, plan_work

    if pool is None or pool.gpu_type is None or data_size is None:
        return {}
    times_and_costs = {}
    for method, method_plan in plans.items():
        training_work = plan_work(method_plan.spec, shape, data_size, method_plan.plan.recomputed_layer_count / max(method_plan.plan.layer_count, 1))
        if training_work is None:
            raise ConfigError("TimeNotPlanned", "the time of this objective cannot be planned", hint="remove --rows, --mean-row and --price")
        gpu_count = world_size(method_plan.spec)
        time_plan = plan_time(training_work, GPU_TYPES[pool.gpu_type], gpu_count)
        times_and_costs[method] = (time_plan, plan_cost(time_plan, gpu_count, price, "") if price is not None else None)
    return times_and_costs


def _read_spec(file: Path) -> tuple[ResolvedSpec, str]:
    from finetune_api.defaults import resolve_defaults

    from finetune_cli.checks import check_manifest, select_errors
    from finetune_cli.manifests import read_job

    manifest = read_job(file)
    spec, findings = check_manifest(manifest)
    errors = select_errors(findings)
    if errors or spec is None:
        raise output.fail(*(f"{finding.mistake} [{finding.code}]" for finding in errors))
    return resolve_defaults(spec), manifest.name


def _parse_methods(compare: str | None) -> list[str]:
    methods = [] if compare is None else [method.strip() for method in compare.split(",") if method.strip()]
    unknown_methods = [method for method in methods if method not in COMPARABLE_METHODS]
    if unknown_methods or (compare is not None and not methods):
        raise output.fail(f"--compare {compare}: write one or more of {', '.join(COMPARABLE_METHODS)}, separated by commas")
    return methods


def _propose_changes(method_plan: MethodPlan, shape: ModelShape, pool: GpuPool, facts: RunFacts) -> list[str]:
    """Return the largest micro-batch if the job fits, otherwise the changes that make it fit, as lines of text."""
    from finetune_api.memory.changes import NO_CHANGE_HINT, format_change
    from finetune_api.memory.plan import find_largest_micro_batch

    memory_bytes = pool.memory_bytes or 0
    if method_plan.plan.fits(memory_bytes):
        micro_batch_rows = find_largest_micro_batch(method_plan.spec, shape, memory_bytes, facts)
        return [f"largest micro-batch that fits: training.batchSizePerDevice: {micro_batch_rows}"]
    return ["changes that make the job fit:", *(f"  {format_change(change)}" for change in method_plan.changes)] if method_plan.changes else [NO_CHANGE_HINT]


def _format_choice_lines(plans: dict[str, MethodPlan]) -> list[str]:
    """Return one line for each value that the plan chooses, with field path and reason. If several methods are compared, the result is empty."""
    choices = next(iter(plans.values())).choices if len(plans) == 1 else ()
    lines = [f"  {choice.field}: {choice.value}  # {choice.reason}" for choice in choices]
    return ["", "values that the plan chooses:", *lines] if lines else []


def _describe_model(name: str, spec: FineTuneJobSpec, shape: ModelShape) -> list[str]:
    from finetune_api.memory.plan import count_parameters
    from finetune_api.objectives import OBJECTIVES
    from finetune_api.rules import trainer_type_of, world_size

    micro_batch_rows, rank_count = spec.training.batch_size_per_device or 4, world_size(spec)
    sequences_per_row = OBJECTIVES[trainer_type_of(spec)].sequences_per_row
    batch_text = f"{micro_batch_rows}" if sequences_per_row == 1 else f"{micro_batch_rows} pairs ({sequences_per_row * micro_batch_rows} sequences)"
    return [
        f"{name or 'job'}: {shape.model_type} with {count_parameters(shape) / 1e9:.2f} billion parameters, "
        f"{rank_count} {'rank' if rank_count == 1 else 'ranks'}, micro-batches of {batch_text} x {spec.dataset.max_sequence_length or 2048} tokens"
    ]


def _format_table(plans: dict[str, MethodPlan], time_plans: TimeAndCostPlans, memory_bytes: int | None, gpu: str | None) -> list[str]:
    """Return a table with one column for each plan: the memory of each rank (parts, expected peak, upper bound), time and cost."""
    from finetune_api.memory.plan import format_gigabytes

    rows: list[tuple[str, list[str]]] = [("", list(plans))]
    parts = next(iter(plans.values())).plan.memory.parts
    for part_name in type(parts).model_fields:
        sizes_in_bytes = [getattr(method_plan.plan.memory.parts, part_name) for method_plan in plans.values()]
        if any(sizes_in_bytes):
            rows.append((part_name, [format_gigabytes(size_in_bytes) for size_in_bytes in sizes_in_bytes]))
    rows.append(("expected peak", [format_gigabytes(method_plan.plan.memory.expected_bytes) for method_plan in plans.values()]))
    rows.append(("upper bound", [format_gigabytes(method_plan.plan.memory.upper_bytes) for method_plan in plans.values()]))
    if memory_bytes is not None:
        rows.append((f"memory of {gpu or 'the GPU'}", [format_gigabytes(memory_bytes)] * len(plans)))
        rows.append(("fits", ["yes" if method_plan.plan.fits(memory_bytes) else "no" for method_plan in plans.values()]))
    rows.append(("recomputed layers", [f"{method_plan.plan.recomputed_layer_count} of {method_plan.plan.layer_count}" for method_plan in plans.values()]))
    rows += _format_time_rows(time_plans)
    label_width, cell_width = max(len(label) for label, _ in rows), max(len(cell) for _, cells in rows for cell in cells)
    return [f"{label:<{label_width}}  {'  '.join(f'{cell:>{cell_width}}' for cell in cells)}".rstrip() for label, cells in rows]


def _format_time_rows(time_plans: TimeAndCostPlans) -> list[tuple[str, list[str]]]:
    if not time_plans:
        return []
    times, costs = [time for time, _ in time_plans.values()], [cost for _, cost in time_plans.values() if cost is not None]
    rows = [
        ("expected time", [format_hours(time_plan.expected_seconds) for time_plan in times]),
        ("time, bounds", [f"{format_hours(time_plan.lower_seconds)} - {format_hours(time_plan.upper_seconds)}" for time_plan in times]),
    ]
    if costs:
        rows += [("expected cost", [f"{cost_plan.expected:.2f}" for cost_plan in costs]),
            ("cost, bounds", [f"{cost_plan.lower:.2f} - {cost_plan.upper:.2f}" for cost_plan in costs])]
    return rows


def format_hours(seconds: int) -> str:
    """Format a duration as hours and minutes, rounded up to whole minutes."""
    minutes = -(-seconds // 60)
    return f"{minutes // 60}h{minutes % 60:02}m"


def _to_dict(name: str, plans: dict[str, MethodPlan], time_plans: TimeAndCostPlans, memory_bytes: int | None, proposals: list[str]) -> dict[str, Any]:
    plans_object: dict[str, Any] = {"name": name, "plans": []}
    for method, method_plan in plans.items():
        entry: dict[str, Any] = {
            "method": method, "memory": method_plan.plan.memory.to_wire(), "recomputedLayers": method_plan.plan.recomputed_layer_count,
            "assumptions": list(method_plan.plan.assumptions),
        }  # fmt: skip
        if memory_bytes is not None:
            entry |= {"gpuBytes": memory_bytes, "fits": method_plan.plan.fits(memory_bytes), "choices": [choice.to_wire() for choice in method_plan.choices]}
        if method in time_plans:
            time, cost = time_plans[method]
            entry |= {"time": time.to_wire()} | ({"cost": cost.to_wire()} if cost is not None else {})
        plans_object["plans"].append(entry)
    return plans_object | ({"proposals": proposals} if proposals else {})
