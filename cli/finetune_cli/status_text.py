"""The text of `finetune status`: phase, stages, progress, losses, attempts, checkpoints, and the failure with its hint."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_api.names import FINAL_PHASES, Phase
from finetune_api.names import Condition as ConditionType
from finetune_api.status import EvaluationResult, FineTuneJobStatus, MetricResult

from finetune_cli.cluster import get_event_time

BAR_WIDTH = 30
SPARK_BLOCKS = "▁▂▃▄▅▆▇█"
SMALLEST_TIME_SHARE = 0.01
"""Smallest share of the job's time that is shown. A stage with a smaller share of the whole time is left out."""
STAGE_PHASES = (
    (Phase.PENDING, Phase.PREPARING, Phase.VALIDATING, Phase.QUEUED), (Phase.STARTING,), (Phase.RUNNING, Phase.RECOVERING), (Phase.EVALUATING,),
    (Phase.UPLOADING,), (Phase.SUCCEEDED,),
)  # fmt: skip
STAGE_NAMES = ("accepted", "started", "trained", "evaluated", "uploaded", "done")


def parse_status(job: dict[str, Any]) -> FineTuneJobStatus:
    """Return the status of a job. Fields of newer operator versions are ignored."""
    return FineTuneJobStatus.model_validate(job.get("status") or {})


def get_condition_status(status: FineTuneJobStatus, condition_type: ConditionType) -> bool | None:
    """Whether a condition is true, or None if the condition is absent or Unknown."""
    condition = status.condition(condition_type)
    return None if condition is None or condition.status == "Unknown" else condition.status == "True"


def has_finished(status: FineTuneJobStatus) -> bool:
    """Whether the job has ended, so that no further attempt follows."""
    return bool(get_condition_status(status, ConditionType.FINISHED)) or status.phase in FINAL_PHASES


def has_succeeded(status: FineTuneJobStatus) -> bool:
    """Whether the final model is committed in storage."""
    return bool(get_condition_status(status, ConditionType.SUCCEEDED)) or status.phase == Phase.SUCCEEDED


def draw_progress_bar(percent: int | None) -> str:
    """Draw a progress bar of fixed width."""
    filled_cell_count = 0 if percent is None else max(0, min(BAR_WIDTH, round(BAR_WIDTH * percent / 100)))
    return "█" * filled_cell_count + "░" * (BAR_WIDTH - filled_cell_count)


def draw_sparkline(values: list[float]) -> str:
    """Draw values as one line of block characters of different heights."""
    if not values:
        return ""
    low, high = min(values), max(values)
    value_range = (high - low) or 1.0
    return "".join(
        SPARK_BLOCKS[min(len(SPARK_BLOCKS) - 1, int((value - low) / value_range * len(SPARK_BLOCKS)))] for value in values
    )


def format_stage_line(phase: Phase | None) -> str:
    """List the stages of a job, each with a mark: done, active or not started."""
    current_index = next((i for i, phases in enumerate(STAGE_PHASES) if phase in phases), None)
    if current_index is None:
        return ""
    last_index = len(STAGE_NAMES) - 1
    stage_marks = [
        "●" if i < current_index or (i == last_index and current_index == last_index) else "◐" if i == current_index else "○"
        for i in range(len(STAGE_NAMES))
    ]
    return "  ".join(f"{mark} {name}" for mark, name in zip(stage_marks, STAGE_NAMES, strict=True))


def format_age(time: datetime | None, now: datetime | None = None) -> str:
    """Format the time since `time` as kubectl does."""
    if time is None:
        return "-"
    seconds = int(((now or datetime.now(UTC)) - time.astimezone(UTC)).total_seconds())
    if seconds < 120:
        return f"{max(0, seconds)}s"
    if seconds < 7200:
        return f"{seconds // 60}m"
    return f"{seconds // 3600}h" if seconds < 172800 else f"{seconds // 86400}d"


def format_bytes(byte_count: int | None) -> str:
    """Format a number of bytes with a binary unit."""
    if byte_count is None:
        return "-"
    value = float(byte_count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def describe_job(job: dict[str, Any], losses: list[float] | None = None, now: datetime | None = None) -> str:
    """Describe a job and its progress as text."""
    status = parse_status(job)
    spec = job.get("spec") or {}
    metadata = job["metadata"]
    phase = f"{status.phase or Phase.PENDING}" + (f" ({status.reason})" if status.reason else "")
    lines = [f"{metadata.get('namespace', '')}/{metadata['name']}  {phase}"]
    lines += [f"  {line}" for line in (_find_reason(status), format_stage_line(status.phase)) if line]
    lines += [
        "",
        *_format_model_lines(spec, status),
        *_format_progress_lines(status, losses or [], now),
        *_format_time_lines(status),
        *_format_failure_lines(status),
        *_format_attempt_lines(status),
        *_format_checkpoint_lines(status, now),
    ]
    lines += _format_output_lines(status)
    return "\n".join(lines)


def _find_reason(status: FineTuneJobStatus) -> str:
    """Return the reason why the job waits or has ended, or an empty string if the status has no reason."""
    for condition_type in (ConditionType.STALLED, ConditionType.RECONCILING, ConditionType.ACCEPTED, ConditionType.FINISHED):
        condition = status.condition(condition_type)
        expected_status = "False" if condition_type == ConditionType.ACCEPTED else "True"
        if condition is not None and condition.status == expected_status and condition.message:
            return f"{condition.reason}: {condition.message}"
    return ""


def _format_model(spec: dict[str, Any], status: FineTuneJobStatus) -> str:
    """Return the model's source. If the source is a URI and the model's name is known, the name comes first."""
    source = str((spec.get("model") or {}).get("source", "-"))
    name = status.resolved.model_name if status.resolved else None
    return f"{name} ({source})" if name and "://" in source else source


def _format_model_lines(spec: dict[str, Any], status: FineTuneJobStatus) -> list[str]:
    resolved_config = status.resolved
    method = (resolved_config and resolved_config.method) or (spec.get("method") or {}).get("type") or "lora"
    lines = [f"model     {_format_model(spec, status)}", f"method    {method}"]
    if resolved_config is not None and resolved_config.world_size:
        strategy = resolved_config.strategy or "-"
        lines.append(
            f"ranks     {resolved_config.world_size} ({strategy}), effective batch {resolved_config.effective_batch or '-'}, on {resolved_config.device or '-'}"
        )
    if resolved_config is not None and resolved_config.trainable_parameters:
        lines.append(f"trainable {resolved_config.trainable_parameters:,} of {resolved_config.total_parameters or 0:,} parameters")
    choices = (status.plan.choices if status.plan is not None else None) or []
    if choices:
        choice_texts = [f"{choice.field.rpartition('.')[2]} {choice.value}" for choice in choices]
        lines.append(f"by plan   {', '.join(choice_texts)}")
    return lines


def _format_progress_lines(status: FineTuneJobStatus, losses: list[float], now: datetime | None) -> list[str]:
    progress, metrics = status.progress, status.metrics
    lines = []
    if progress is not None and progress.step is not None:
        eta_text = f", {progress.eta} left" if progress.eta else ""
        lines.append(f"progress  {draw_progress_bar(progress.percent)} {progress.display or progress.step}{eta_text}")
        if progress.tokens_per_second:
            speed_text = f"{progress.tokens_per_second:,.0f} tokens/s, {progress.tokens_seen or 0:,} tokens in total"
            lines.append(f"speed     {speed_text}, reported {format_age(progress.update_time, now)} ago")
    if status.latest_checkpoint_step is not None:
        lines.append(f"saved     step {status.latest_checkpoint_step}")
    if metrics is not None:
        loss_texts = [
            f"{name} {value:.4g}"
            for name, value in (
                ("train", metrics.train_loss),
                ("validation", metrics.eval_loss),
                ("best", metrics.best_eval_loss),
            )
            if value is not None
        ]
        if loss_texts:
            sparkline = draw_sparkline(losses) if len(losses) > 1 else ""
            lines.append(f"loss      {', '.join(loss_texts)}" + (f"  {sparkline}" if sparkline else ""))
    if status.workers is not None and status.workers.total:
        lines.append(f"workers   {status.workers.display} ready")
    return lines


def _format_time_lines(status: FineTuneJobStatus) -> list[str]:
    """Return the lines for the cost of the job and for the largest shares of its time, in percent."""
    goodput = status.goodput
    if goodput is None or goodput.wall_seconds <= 0:
        return []
    sorted_parts = sorted(goodput.parts.seconds().items(), key=lambda item: -item[1])
    share_texts = [f"{part} {seconds / goodput.wall_seconds:.0%}" for part, seconds in sorted_parts if seconds >= SMALLEST_TIME_SHARE * goodput.wall_seconds]
    lines = [f"cost      {status.cost.display} for {status.cost.gpu_hours:g} GPU-hours"] if status.cost is not None else []
    return [*lines, f"time      {goodput.wall_seconds:,.0f} s: {', '.join(share_texts)}"]


def _format_failure_lines(status: FineTuneJobStatus) -> list[str]:
    failure = status.failure
    if failure is None:
        return []
    location_text = ", ".join(
        f"{name} {value}"
        for name, value in (
            ("rank", failure.rank),
            ("node", failure.node),
            ("step", failure.step),
            ("exit code", failure.exit_code),
        )
        if value is not None
    )
    lines = [
        "",
        f"failure   {failure.class_} {failure.code}: {failure.message}" + (f" ({location_text})" if location_text else ""),
    ]
    return [*lines, f"          {failure.hint}"] if failure.hint else lines


def _format_attempt_lines(status: FineTuneJobStatus) -> list[str]:
    if not status.attempts:
        return []
    lines = ["", "ATTEMPT  REASON                 EXIT  FROM STEP  LAST STEP  LOST  NODE"]
    for attempt in status.attempts:
        reason = attempt.reason or ("running" if attempt.end_time is None else "-")
        cells = (attempt.exit_code, attempt.resumed_from_step, attempt.last_step, attempt.steps_lost)
        exit_code_text, start_step_text, last_step_text, lost_steps_text = ("-" if value is None else str(value) for value in cells)
        lines.append(
            f"{attempt.number:<8} {reason:<22} {exit_code_text:<5} {start_step_text:<10} {last_step_text:<10} "
            f"{lost_steps_text:<5} {attempt.node or '-'}"
        )
    return lines


def _format_checkpoint_lines(status: FineTuneJobStatus, now: datetime | None) -> list[str]:
    return ["", *format_checkpoint_table(status, now)] if status.checkpoints else []


def format_checkpoint_table(status: FineTuneJobStatus, now: datetime | None = None) -> list[str]:
    """Return a table with one line per checkpoint."""
    lines = ["STEP      HEALTHY  LOSS      SIZE        AGE   URI"]
    for checkpoint in sorted(status.checkpoints, key=lambda checkpoint: checkpoint.step):
        healthy_text = {True: "yes", False: "no", None: "-"}[checkpoint.healthy]
        loss_text = "-" if checkpoint.eval_loss is None else f"{checkpoint.eval_loss:.4g}"
        lines.append(
            f"{checkpoint.step:<9} {healthy_text:<8} {loss_text:<9} {format_bytes(checkpoint.bytes):<11} {format_age(checkpoint.time, now):<5} {checkpoint.uri}"
        )
    return lines


def _format_output_lines(status: FineTuneJobStatus) -> list[str]:
    lines = []
    if status.output is not None and status.output.uri:
        lines += ["", f"output    {status.output.uri} ({status.output.kind or '-'})"]
        output = status.output
        further_uris = {
            "merged": output.merged_uri, "copy": output.published_uri, "hub": output.hub_uri, "OCI": output.oci_digest,
            "report": output.report_uri, "lineage": output.lineage_uri,
            "adopted": f"from the earlier job with uid {output.adopted_uid}, without training" if output.adopted_uid else None,
        }  # fmt: skip
        lines += [f"{name:<9} {uri}" for name, uri in further_uris.items() if uri]
    lines += _format_evaluation_lines(status)
    if status.adaptations:
        lines.append("")
        for adaptation in status.adaptations:
            lines.append(f"adapted   {adaptation.change} ({adaptation.reason})")
            lines += [f"          {adaptation.explanation}"] if adaptation.explanation else []
    if status.resolved is not None and status.resolved.notes:
        lines += ["", *(f"note      {note}" for note in status.resolved.notes)]
    return lines


def _format_evaluation_lines(status: FineTuneJobStatus) -> list[str]:
    """Return the results of the evaluation: one line for each metric, each benchmark and each gate."""
    evaluation = status.evaluation
    return [] if evaluation is None else [*_format_metric_lines(evaluation), *_format_benchmark_lines(evaluation), *_format_gate_lines(evaluation)]


def _format_benchmark_lines(evaluation: EvaluationResult) -> list[str]:
    """Return one line for each metric of the benchmarks, with the value of the base model if it was measured."""
    if not evaluation.benchmarks:
        return []
    lines = ["", "benchmarks"]
    for benchmark in evaluation.benchmarks:
        text = f"{benchmark.value:.4g}" if benchmark.value is not None else f"- ({benchmark.reason or 'not measured'})"
        text += f" ± {benchmark.stderr:.2g}" if benchmark.stderr is not None else ""
        text += f"  (base model {benchmark.base:.4g})" if benchmark.base is not None else ""
        lines.append(f"  {f'{benchmark.task} {benchmark.metric}':<30} {text}")
    return lines


def _format_gate_lines(evaluation: EvaluationResult) -> list[str]:
    lines = [f"gate      {'passed' if gate.passed else 'FAILED'}: {gate.text or gate.metric}" for gate in evaluation.gates or []]
    return ["", *lines] if lines else []


def _format_metric_lines(evaluation: EvaluationResult) -> list[str]:
    """Return one line for each metric, with its value or the reason why it has no value."""
    if not evaluation.metrics:
        return []
    rows_text = f" on {evaluation.rows} rows" if evaluation.rows is not None else ""
    return ["", f"evaluation{rows_text}", *(f"  {name:<22} {_format_metric(metric)}" for name, metric in evaluation.metrics.items())]


def _format_metric(metric: MetricResult) -> str:
    """Return the value of a metric, or the reason why it has no value, and the comparison with the base model."""
    if metric.value is None:
        return f"- ({metric.reason or 'not measured'})"
    text = f"{metric.value:.4g}"
    if metric.base is not None and metric.difference is not None:
        text += f"  base {metric.base:.4g}, difference {metric.difference:+.4g}"
        text += f" ({metric.low:+.4g} to {metric.high:+.4g})" if metric.low is not None and metric.high is not None else ""
    return text


def format_event_line(event: dict[str, Any]) -> str:
    """Format a Kubernetes event as one line."""
    regarding = event.get("regarding") or {}
    object_name = f"{regarding.get('kind', '')}/{regarding.get('name', '')}"
    return f"{get_event_time(event)[:19]:<20} {event.get('type', ''):<8} {event.get('reason', ''):<26} {object_name:<40} {event.get('note', '')}"
