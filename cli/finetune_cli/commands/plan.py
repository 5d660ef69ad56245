"""`finetune plan`: memory, time and cost of a job, without a cluster and without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import check_format, complete_words, write_data

if TYPE_CHECKING:
    from finetune_api.defaults import ResolvedSpec
    from finetune_api.memory.architecture import ModelShape
    from finetune_api.memory.plan import Change, JobPlan
    from finetune_api.spec import FineTuneJobSpec
    from finetune_api.status import CostPlan, TimePlan

    Times = dict[str, tuple[TimePlan, CostPlan | None]]

METHODS = ("lora", "qlora", "dora", "ia3", "promptTuning", "prefixTuning", "full")
STORED_SIZE_TOLERANCE = 0.02
TIME_NOTE = (
    "the time is that of the optimizer steps, without start, evaluation, checkpoints and upload; its bounds are not calibrated for this GPU"
)


def plan(
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Manifest of the job.")],
    model_config: Annotated[
        Path | None,
        typer.Option("--model-config", metavar="FOLDER", help="Folder with the base model's config.json. Default: model.source, if it is a folder."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Type of the GPUs, such as h100-80gb.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Memory of each GPU, such as 80Gi, instead of --gpu.")
    ] = None,
    longest_row: Annotated[
        int | None, typer.Option("--longest-row", metavar="TOKENS", min=1, help="Tokens of the longest row. Default: dataset.maxSequenceLength.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", metavar="ROWS", min=1, help="Number of training rows, to plan the time. Also needs --mean-row.")
    ] = None,
    mean_row: Annotated[
        int | None, typer.Option("--mean-row", metavar="TOKENS", min=1, help="Mean number of tokens of a training row, to plan the time. Also needs --rows.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="PRICE", min=0, help="Price of one GPU for one hour, to plan the cost.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="METHODS", help="Plan the job with each of these methods, such as lora,qlora,full.", autocompletion=complete_words(*METHODS)
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Propose the largest micro-batch that fits, or changes that make the job fit.")
    ] = False,
    output_format: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FORMAT", help="json or yaml.", autocompletion=complete_words("json", "yaml"))
    ] = None,
) -> None:
    """Show the memory that a job needs on each rank, and its time and cost, without a cluster, a GPU or the model's weights.

    Exit code 0: the job fits, or no GPU is given; 1: the job does not fit or cannot be planned.

    Example: finetune plan -f job.yaml --model-config models/llama --gpu h100-80gb

    Example: finetune plan -f job.yaml --gpu-memory 24Gi --compare lora,qlora,full

    Example: finetune plan -f job.yaml --gpu l4-24gb --fit

    Example: finetune plan -f job.yaml --gpu h100-80gb --rows 12000 --mean-row 310 --price 2.5
    """
    from finetune_api.errors import FineTuneError

    check_format(output_format, "json", "yaml")
    memory_bytes = _gpu_bytes(gpu, gpu_memory)
    if fit and memory_bytes is None:
        raise output.fail("--fit needs the memory of a GPU: add --gpu NAME or --gpu-memory SIZE")
    _check_time_options(gpu, rows, mean_row, price)
    resolved, name = _read_spec(file)
    try:
        shape, notes = _read_model(resolved.spec, model_config)
        plans = _plan_methods(resolved, shape, _methods(compare), memory_bytes, longest_row)
        proposals = _propose(resolved, shape, plans, memory_bytes, longest_row) if fit else []
        times = _plan_times(resolved, shape, plans, gpu, (rows, mean_row), price)
    except FineTuneError as error:
        raise output.fail(f"{error.message}; {error.hint}" if error.hint else error.message) from error
    if output_format is not None:
        write_data(_as_data(name, plans, times, memory_bytes, proposals), output_format)
    else:
        output.write("\n".join([*_describe(name, resolved.spec, shape), "", *_table(plans, times, memory_bytes, gpu)]))
        if proposals:
            output.write("\n".join(["", *proposals]))
    if times:
        notes = [*notes, TIME_NOTE]
    output.print_notes(dict.fromkeys([*notes, *(sentence for one in plans.values() for sentence in one.assumptions)]))
    if memory_bytes is not None and not any(one.fits(memory_bytes) for one in plans.values()):
        raise output.CommandExit(output.ERROR)


def _gpu_bytes(gpu: str | None, gpu_memory: str | None) -> int | None:
    from finetune_api.gpus import GPU_TYPES
    from finetune_api.quantities import SIZE_KIND, parse_amount, quantity_problem

    if gpu is not None and gpu_memory is not None:
        raise output.fail("--gpu and --gpu-memory exclude each other: remove one of the two")
    if gpu is not None and gpu.lower() not in GPU_TYPES:
        raise output.fail(f"--gpu {gpu}: this type is not known; write one of {', '.join(GPU_TYPES)}, or --gpu-memory SIZE")
    if gpu is not None:
        return GPU_TYPES[gpu.lower()].memory_bytes
    if gpu_memory is None:
        return None
    problem = quantity_problem(gpu_memory, SIZE_KIND)
    if problem is not None:
        raise output.fail(f"--gpu-memory: {'; '.join(problem)}")
    return int(parse_amount(gpu_memory))


def _check_time_options(gpu: str | None, rows: int | None, mean_row: int | None, price: float | None) -> None:
    if (rows is None) != (mean_row is None):
        raise output.fail("the planned time needs both --rows and --mean-row: write both, or neither")
    if rows is not None and gpu is None:
        raise output.fail("--rows and --mean-row need the type of the GPUs: add --gpu NAME")
    if price is not None and rows is None:
        raise output.fail("--price needs the planned time: add --gpu, --rows and --mean-row")


def _plan_times(
    resolved: ResolvedSpec, shape: ModelShape, plans: dict[str, JobPlan], gpu: str | None, data: tuple[int | None, int | None], price: float | None
) -> Times:
    """Plan the time and the cost with each method. Empty without a GPU type or `data`. `data`: number of rows, and mean tokens of a row."""
    from finetune_api.errors import ConfigError
    from finetune_api.gpus import GPU_TYPES
    from finetune_api.memory.plan import change_spec
    from finetune_api.rules import world_size
    from finetune_api.time_plan import DataSize, plan_cost, plan_time, plan_work

    rows, mean_row = data
    if gpu is None or rows is None or mean_row is None:
        return {}
    times = {}
    for method, one in plans.items():
        spec = change_spec(resolved.spec, {"method.type": method}) if len(plans) > 1 else resolved.spec
        row_tokens = min(mean_row, spec.dataset.max_sequence_length or mean_row)
        work = plan_work(spec, shape, DataSize(rows, rows * row_tokens), one.recomputed_layers / max(one.layers, 1))
        if work is None:
            raise ConfigError("TimeNotPlanned", "the time of this objective cannot be planned", hint="remove --rows, --mean-row and --price")
        gpus = world_size(spec)
        time = plan_time(work, GPU_TYPES[gpu.lower()], gpus)
        times[method] = (time, plan_cost(time, gpus, price, "") if price is not None else None)
    return times


def _read_spec(file: Path) -> tuple[ResolvedSpec, str]:
    from finetune_api.defaults import resolve_defaults

    from finetune_cli.checks import check_manifest, errors_of
    from finetune_cli.manifests import read_job

    manifest = read_job(file)
    spec, findings = check_manifest(manifest)
    errors = errors_of(findings)
    if errors or spec is None:
        raise output.fail(*(f"{finding.mistake} [{finding.code}]" for finding in errors))
    return resolve_defaults(spec), manifest.name


def _read_model(spec: FineTuneJobSpec, folder: Path | None) -> tuple[ModelShape, list[str]]:
    """Read the model's configuration. Returns its sizes, and a note if the index of its weight files contradicts them."""
    from finetune_api.memory.architecture import read_model_shape, stored_bytes
    from finetune_api.memory.plan import count_parameters

    if folder is None:
        source = (spec.model.source or "").removeprefix("file://")
        folder = Path(source)
        if not source or not folder.is_dir():
            raise output.fail(
                f"model.source is {source or 'missing'}, which is no folder on this machine: add --model-config FOLDER with the config.json of this model"
            )
    shape = read_model_shape(folder)
    stored, expected = stored_bytes(folder), count_parameters(shape) * shape.stored_bytes
    if stored is None or abs(stored / expected - 1) <= STORED_SIZE_TOLERANCE:
        return shape, []
    return shape, [
        f"the weight files have {_gigabytes(stored)}, but the plan assumes {_gigabytes(int(expected))}: the plan may be wrong by this difference"
    ]


def _methods(compare: str | None) -> list[str]:
    methods = [] if compare is None else [one.strip() for one in compare.split(",") if one.strip()]
    unknown = [one for one in methods if one not in METHODS]
    if unknown or (compare is not None and not methods):
        raise output.fail(f"--compare {compare}: write one or more of {', '.join(METHODS)}, separated by commas")
    return methods


def _plan_methods(
    resolved: ResolvedSpec, shape: ModelShape, methods: list[str], memory_bytes: int | None, longest_row: int | None
) -> dict[str, JobPlan]:
    """Plan the job, or the job with each of several methods."""
    from dataclasses import replace

    from finetune_api.memory.description import Facts
    from finetune_api.memory.plan import change_spec, plan_for_gpu, plan_memory

    facts = Facts(longest_tokens=longest_row)
    specs = {one: change_spec(resolved.spec, {"method.type": one}) for one in methods} or {str(resolved.spec.method.type): resolved.spec}
    return {
        method: plan_memory(spec, shape, facts) if memory_bytes is None else plan_for_gpu(replace(resolved, spec=spec), shape, memory_bytes, facts)
        for method, spec in specs.items()
    }


def _propose(
    resolved: ResolvedSpec, shape: ModelShape, plans: dict[str, JobPlan], memory_bytes: int | None, longest_row: int | None
) -> list[str]:
    """The largest micro-batch if the job fits, otherwise changes that make it fit."""
    from finetune_api.memory.description import Facts
    from finetune_api.memory.plan import changes_that_fit, largest_batch

    assert memory_bytes is not None
    facts, job = Facts(longest_tokens=longest_row), next(iter(plans.values()))
    if job.fits(memory_bytes):
        rows = largest_batch(resolved.spec, shape, memory_bytes, facts)
        return [f"largest micro-batch that fits: training.batchSizePerDevice: {rows}"]
    changes = changes_that_fit(resolved.spec, shape, memory_bytes, facts)
    if not changes:
        return [
            "no change of method, micro-batch, sequence length or recomputation makes the job fit: use larger GPUs, or more GPUs with "
            "`distributed: {strategy: fsdp}`"
        ]
    return ["changes that make the job fit:", *(f"  {_change_text(one)}" for one in changes)]


def _change_text(change: Change) -> str:
    values = ", ".join(f"{path}: {value}" for path, value in change.values.items())
    return f"{values} ({_gigabytes(change.plan.memory.upper_bytes)} at most)"


def _describe(name: str, spec: FineTuneJobSpec, shape: ModelShape) -> list[str]:
    from finetune_api.memory.plan import count_parameters
    from finetune_api.rules import world_size

    rows, ranks = spec.training.batch_size_per_device, world_size(spec)
    return [
        f"{name or 'job'}: {shape.model_type} with {count_parameters(shape) / 1e9:.2f} billion parameters, {ranks} {'rank' if ranks == 1 else 'ranks'}, "
        f"micro-batches of {rows} x {spec.dataset.max_sequence_length or 2048} tokens"
    ]


def _table(plans: dict[str, JobPlan], times: Times, memory_bytes: int | None, gpu: str | None) -> list[str]:
    """Parts, expected peak and upper bound of each plan, for each rank, and its time and cost."""
    rows: list[tuple[str, list[str]]] = [("", list(plans))]
    parts = next(iter(plans.values())).memory.parts
    for part in type(parts).model_fields:
        values = [getattr(one.memory.parts, part) for one in plans.values()]
        if any(values):
            rows.append((part, [_gigabytes(value) for value in values]))
    rows.append(("expected peak", [_gigabytes(one.memory.expected_bytes) for one in plans.values()]))
    rows.append(("upper bound", [_gigabytes(one.memory.upper_bytes) for one in plans.values()]))
    if memory_bytes is not None:
        rows.append((f"memory of {gpu or 'the GPU'}", [_gigabytes(memory_bytes)] * len(plans)))
        rows.append(("fits", ["yes" if one.fits(memory_bytes) else "no" for one in plans.values()]))
    rows.append(("recomputed layers", [f"{one.recomputed_layers} of {one.layers}" for one in plans.values()]))
    rows += _time_rows(times)
    width, columns = max(len(label) for label, _ in rows), max(len(cell) for _, cells in rows for cell in cells)
    return [f"{label:<{width}}  {'  '.join(f'{cell:>{columns}}' for cell in cells)}".rstrip() for label, cells in rows]


def _time_rows(times: Times) -> list[tuple[str, list[str]]]:
    if not times:
        return []
    durations, costs = [time for time, _ in times.values()], [cost for _, cost in times.values() if cost is not None]
    rows = [
        ("expected time", [format_hours(one.expected_seconds) for one in durations]),
        ("time, bounds", [f"{format_hours(one.lower_seconds)} - {format_hours(one.upper_seconds)}" for one in durations]),
    ]
    if costs:
        rows += [("expected cost", [f"{one.expected:.2f}" for one in costs]), ("cost, bounds", [f"{one.lower:.2f} - {one.upper:.2f}" for one in costs])]
    return rows


def format_hours(seconds: int) -> str:
    minutes = -(-seconds // 60)
    return f"{minutes // 60}h{minutes % 60:02}m"


def _as_data(name: str, plans: dict[str, JobPlan], times: Times, memory_bytes: int | None, proposals: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"name": name, "plans": []}
    for method, one in plans.items():
        entry: dict[str, Any] = {
            "method": method, "memory": one.memory.to_wire(), "recomputedLayers": one.recomputed_layers, "assumptions": list(one.assumptions),
        }  # fmt: skip
        if memory_bytes is not None:
            entry |= {"gpuBytes": memory_bytes, "fits": one.fits(memory_bytes)}
        if method in times:
            time, cost = times[method]
            entry |= {"time": time.to_wire()} | ({"cost": cost.to_wire()} if cost is not None else {})
        data["plans"].append(entry)
    return data | ({"proposals": proposals} if proposals else {})


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 10**10 else f"{count / 1e9:.1f} GB"
