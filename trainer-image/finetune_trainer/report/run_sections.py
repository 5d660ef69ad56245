"""Builds the sections about the run: its spec, attempts, data, costs and origin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from finetune_api.lineage import AttemptRecord
from finetune_api.names import ExitCode, Origin
from finetune_api.sources import redact_source
from finetune_api.status import Output

from finetune_trainer.report.attempt_times import (
    find_end_time,
    merge_resolved_configs,
    sum_gpu_seconds,
    sum_pod_seconds,
)
from finetune_trainer.report.blocks import (
    Block,
    Cell,
    Section,
    Sentences,
    Table,
    make_missing_cell,
)
from finetune_trainer.report.cells import (
    format_hours,
    format_seconds,
    format_time,
    make_size_cell,
    shorten_text,
)
from finetune_trainer.report.redaction import flatten_values, redact_text
from finetune_trainer.report.run_report import RunReport, StoredCheckpoint
from finetune_trainer.report.scale import format_number
from finetune_trainer.report.time_use import build_time_table

JOB_SWITCHES = ("suspend", "cancel")
"""Fields of the spec that control a running job. The report leaves them out."""
STAGE_NAMES = (
    "starting", "downloading", "checking", "restoring", "loading", "training", "saving", "evaluating", "comparing", "merging", "verifying",
    "benchmarking", "reporting", "uploading", "stopping",
)  # fmt: skip
"""The stages of a run, in the order in which the report lists them."""
SHORTEST_STAGE_SECONDS = 0.05
"""Stages that took less time than this are not shown."""
KILLED_BEFORE_LOG_LINE = "the pod was killed before it stored a log line"


def build_spec_section(report: RunReport) -> Section:
    """Return the section about the spec: values that the user set, values that the user left out and the platform filled in, and changes by the operator."""
    run = report.run
    paths_and_texts = [(path, text) for path, text in flatten_values(run.spec.to_wire()) if path not in JOB_SWITCHES]
    rows_from_user = [
        (path, text) for path, text in paths_and_texts
        if run.origin(_get_field_path(path)) is Origin.USER and not _is_filled_in(path, run.defaults)
    ]
    rows_from_operator = [(path, text) for path, text in paths_and_texts if (path, text) not in rows_from_user]
    blocks: list[Block] = [Table("Set by the user", ["field", "value"], [[Cell(path, "code"), Cell(shorten_text(text))] for path, text in rows_from_user])]
    if rows_from_operator:
        rows = [[Cell(path, "code"), Cell(shorten_text(text)), Cell(str(run.origin(_get_field_path(path))))] for path, text in rows_from_operator]
        blocks.append(Table("Filled in", ["field", "value", "origin"], rows, is_folded=True))
    if run.before_adaptation:
        rows = [
            [Cell(path, "code"), Cell(redact_text(str(value))), Cell(redact_text(str(run.spec.value(path))))]
            for path, value in run.before_adaptation.items()
        ]
        blocks.append(Table("Changed by the operator after a failure", ["field", "value of the user", "value in use"], rows))
    return Section("request", "Spec", blocks)


def _get_field_path(path: str) -> str:
    return path.partition("[]")[0]


def _is_filled_in(path: str, defaults: Sequence[str]) -> bool:
    """Whether a field is part of an object that was filled in as a whole. `defaults`: paths of the fields that were filled in."""
    return any(path.startswith(f"{default}.") for default in defaults)


def build_attempts_section(report: RunReport) -> Section:
    """Return the section with a table of the attempts: times, first and last step, and how each attempt ended."""
    rows = []
    for attempt, next_attempt in zip_longest(report.attempts, report.attempts[1:]):
        end_time, is_estimate = find_end_time(attempt, report)
        rows.append([
            Cell(f"{attempt.attempt}"), Cell(format_time(attempt.started_at), "number"),
            Cell(f"{format_time(end_time)}{' or later' if is_estimate else ''}", "number") if end_time else make_missing_cell(KILLED_BEFORE_LOG_LINE),
            *_build_step_cells(attempt, report),
            _build_lost_steps_cell(attempt, next_attempt), _build_end_cell(attempt),
        ])  # fmt: skip
    columns = ["attempt", "start (UTC)", "end (UTC)", "from step", "to step", "steps repeated later", "how it ended"]
    return Section("attempts", "Attempts", [Table("Attempts of the run", columns, rows)] if rows else [])


def _build_end_cell(attempt: AttemptRecord) -> Cell:
    if attempt.exit_code is None:
        return Cell("The pod was killed before it could write a reason.", "bad")
    if attempt.exit_code == ExitCode.OK:
        return Cell("completed", "good")
    return Cell(f"exit code {attempt.exit_code}, {attempt.code or 'no code'}: {redact_text(attempt.message or 'no message')}", "bad")


def _build_step_cells(attempt: AttemptRecord, report: RunReport) -> list[Cell]:
    if attempt.start_step is None:
        return [Cell("no training"), Cell("no training")]
    start_cell = Cell(str(attempt.start_step), "number")
    if attempt.last_step is not None:
        return [start_cell, Cell(str(attempt.last_step), "number")]
    last_line = report.last_lines.get(attempt.incarnation)
    return [start_cell, Cell(f"{last_line.step} or later", "number") if last_line else make_missing_cell(KILLED_BEFORE_LOG_LINE)]


def _build_lost_steps_cell(attempt: AttemptRecord, next_attempt: AttemptRecord | None) -> Cell:
    if next_attempt is None or next_attempt.start_step is None or attempt.start_step is None:
        return Cell("–")
    return make_missing_cell("the pod was killed") if attempt.last_step is None else Cell(str(max(0, attempt.last_step - next_attempt.start_step)), "number")


def build_data_section(report: RunReport) -> Section:
    """Return the section about the data: rows, lengths, duplicates and personal data."""
    data_record, token_counts = report.data, report.token_counts
    if data_record is None:
        return Section("data", "Data", [Sentences(["Not measured: no attempt has checked the data."])])
    blocks: list[Block] = []
    splits = [name for name in ("train", "validation", "test") if data_record.rows.get(name)]
    no_counts_reason = "the run has no final model; the counts are stored in the model's manifest"
    if report.output:
        no_counts_reason = "this objective does not record token counts"

    def make_count_cell(split: str, name: str) -> Cell:
        value = token_counts.get(split, {}).get(name)
        return _make_value_cell(value, no_counts_reason, ",")

    rows = [[Cell("rows"), *(Cell(f"{data_record.rows[split]:,}", "number") for split in splits)]]
    label_by_name = {
        "tokens": "tokens", "trained_tokens": "tokens that are trained on", "median": "tokens in a row, median",
        "percentile95": "tokens in a row, 95 % are shorter", "longest": "tokens in the longest row", "truncated": "rows that were cut",
        "dropped": "rows left out because they are too long", "answerless": "rows left out because their answer was cut off",
    }  # fmt: skip
    rows += [[Cell(label), *(make_count_cell(split, name) for split in splits)] for name, label in label_by_name.items()]
    blocks.append(Table("Rows and lengths", ["", *splits], rows, is_narrow=True))
    blocks.append(Table("Checks of the training rows", ["check", "result"], _build_check_rows(report), is_narrow=True))
    return Section("data", "Data", blocks)


def _build_check_rows(report: RunReport) -> list[list[Cell]]:
    data_record = report.data
    assert data_record is not None
    checks = [
        [Cell("format"), Cell(", ".join(data_record.formats) or "–")],
        [Cell("rows that cannot be used"), Cell(f"{data_record.bad_rows:,}", "number")],
        [Cell("duplicates left out"), _make_value_cell(data_record.duplicates, "dataset.checks.deduplicate is not set", ",")],
    ]
    if data_record.personal_data is None:
        checks.append([Cell("rows that may hold personal data"), make_missing_cell("dataset.checks.piiScan is not set")])
    else:
        checks += [[Cell(f"rows that may hold personal data: {kind}"), Cell(f"{count:,}", "number")] for kind, count in data_record.personal_data.items()]
    if data_record.share_of_top_answer is not None:
        checks.append([Cell("share of the most frequent answer"), Cell(f"{data_record.share_of_top_answer:.1%}", "number")])
    return checks


# ---- costs


def build_costs_section(report: RunReport) -> Section:
    """Return the section with GPU hours, throughput, and how the time was used."""
    blocks: list[Block] = [Table("Use of the cluster", ["", "value"], _build_cluster_use_rows(report), is_narrow=True)]
    time_table = build_time_table(report)
    blocks += [time_table] if time_table is not None else []
    stage_rows = _build_stage_rows(report)
    if stage_rows:
        killed_note = " Attempts that were killed are not included." if any(attempt.ended_at is None for attempt in report.attempts) else ""
        note = f"The sum over the attempts.{killed_note}"
        blocks.append(Table("Time by stage", ["stage", "time"], stage_rows, note=note, is_folded=time_table is not None, is_narrow=True))
    return Section("costs", "Time and cost", blocks)


def _build_cluster_use_rows(report: RunReport) -> list[list[Cell]]:
    resolved, world = merge_resolved_configs(report), report.run.world
    pod_seconds, is_estimate = sum_pod_seconds(report)
    lower_bound = "at least " if is_estimate else ""
    training_seconds = max((entry.training_seconds or 0.0 for entry in report.log), default=0.0)
    throughputs = sorted(value for entry in report.log if isinstance(value := getattr(entry, "tokens_per_second", None), int | float))
    training_time = _make_value_cell(format_seconds(training_seconds) if training_seconds else None, "no line of the log contains it")
    has_gpus = any(attempt.gpus for attempt in report.attempts)
    gpu_hours = Cell(f"{lower_bound}{format_hours(sum_gpu_seconds(report)[0])}", "number") if has_gpus else Cell("0: the run used no GPU")
    return [
        [Cell("GPU hours"), gpu_hours],
        [Cell("running time of all attempts"), Cell(f"{lower_bound}{format_seconds(pod_seconds)}", "number")],
        [Cell("training time, with evaluations during training"), training_time],
        [Cell("device"), _make_value_cell(resolved.device, "no attempt has loaded the model")],
        [Cell("ranks"), Cell(f"{world.size} in {world.nodes} pod{'s' * (world.nodes > 1)}")],
        [Cell("tokens per second, median"),
         _make_value_cell(format_number(throughputs[len(throughputs) // 2]) if throughputs else None, "no throughput was logged")],
    ]


def _build_stage_rows(report: RunReport) -> list[list[Cell]]:
    """Return a row with the duration of each stage, without stages that took almost no time."""
    timings = {name: sum(attempt.timings.get(name, 0.0) for attempt in report.attempts) for name in STAGE_NAMES}
    return [[Cell(name), Cell(format_seconds(seconds), "number")] for name, seconds in timings.items() if seconds >= SHORTEST_STAGE_SECONDS]


# ---- lineage


def build_lineage_section(report: RunReport) -> Section:
    """Return the section with the sources and hashes of the base model, the data and the final model."""
    blocks: list[Block] = [Table("Model and inputs", ["", "value"], _build_origin_rows(report))]
    if report.checkpoints:
        columns = ["step", "attempt", "size", "validation loss", "healthy", "sha256 of the manifest"]
        rows = [_build_checkpoint_row(checkpoint) for checkpoint in report.checkpoints]
        blocks.append(Table("Committed checkpoints", columns, rows, note="Older checkpoints are removed according to checkpoint.keep."))
    if report.model_files:
        file_rows = [[Cell(file.path, "code"), make_size_cell(file.size), Cell(file.sha256, "code")] for file in report.model_files]
        blocks.append(Table("Files of the final model", ["file", "size", "sha256"], file_rows, is_folded=True))
    if report.stages:
        stage_rows = [
            [Cell(stage.name), Cell(str(stage.attempt), "number"), Cell(stage.time.partition(".")[0].replace("T", " "), "number")]
            for stage in report.stages
        ]
        blocks.append(Table("Stages after training", ["stage", "attempt", "time (UTC)"], stage_rows))
    if report.versions:
        version_rows = [[Cell(name, "code"), Cell(version, "code")] for name, version in sorted(report.versions.items())]
        blocks.append(Table("Versions of the packages", ["package", "version"], version_rows, is_folded=True))
    return Section("lineage", "Origin", blocks)


def _build_origin_rows(report: RunReport) -> list[list[Cell]]:
    run, resolved, output = report.run, merge_resolved_configs(report), report.output or Output()
    no_model_reason = "the run has no final model"

    def make_code_cell(value: object, reason: str) -> Cell:
        return make_missing_cell(reason, "not recorded") if value in (None, "") else Cell(redact_text(str(value)), "code")

    image = resolved.image or run.spec.placement.image
    rows = [
        [Cell("job"), Cell(f"{run.namespace}/{run.name}, uid {run.uid}", "code")],
        [Cell("base model"), Cell(redact_source(run.spec.model.source or ""), "code")],
        [Cell("revision of the base model"), make_code_cell(resolved.model_revision, "no attempt has downloaded the model")],
        [Cell("sha256 of the training data"), make_code_cell(resolved.dataset_digest, "no attempt has downloaded the data")],
        [Cell("sha256 of the run configuration"), make_code_cell(report.config_sha256, "no attempt has read it")],
        [Cell("image"), make_code_cell(image, "it is the platform's default, which status.resolved.image of the FineTuneJob names")],
        [Cell("digest of the image"), make_code_cell(resolved.image_digest, "a pod does not know it; status.resolved.imageDigest of the FineTuneJob names it")],
        [Cell("seed"), make_code_cell(run.spec.training.seed, "the spec has none")],
        [Cell("final model"), make_code_cell(output.uri, no_model_reason)],
        [Cell("kind"), make_code_cell(output.kind, no_model_reason)],
        [Cell("sha256 of the model's manifest"), make_code_cell(output.sha256, no_model_reason)],
    ]
    promoted_text = None if output.promoted is None else "yes" if output.promoted else "no"
    optional_values = {"merged model": output.merged_uri, "published copy": output.published_uri, "passed all gates": promoted_text}
    return rows + [[Cell(name), Cell(redact_text(value), "code")] for name, value in optional_values.items() if value]


def _build_checkpoint_row(checkpoint: StoredCheckpoint) -> list[Cell]:
    eval_loss_cell = Cell("–") if checkpoint.eval_loss is None else Cell(format_number(checkpoint.eval_loss), "number")
    healthy_cell = Cell("yes" if checkpoint.is_healthy else "not confirmed")
    step_cell, attempt_cell = Cell(str(checkpoint.step), "number"), Cell(str(checkpoint.attempt), "number")
    return [step_cell, attempt_cell, make_size_cell(checkpoint.bytes), eval_loss_cell, healthy_cell, Cell(checkpoint.sha256, "code")]


def build_notes_section(report: RunReport) -> Section:
    """Return the section with the notes of all attempts."""
    notes = dict.fromkeys(redact_text(note) for attempt in report.attempts for note in attempt.notes)
    return Section("notes", "Notes of the trainer", [Sentences(list(notes))] if notes else [])


def _make_value_cell(value: object, reason: str, format_spec: str = "") -> Cell:
    """Return the cell of a value. If the value is None, the cell shows `reason`. `format_spec`: format of the value, as for Python's `format`."""
    return make_missing_cell(reason) if value is None else Cell(format(value, format_spec), "number")
