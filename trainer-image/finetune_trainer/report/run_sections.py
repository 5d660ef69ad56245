"""The sections about the run: its spec, attempts, data, costs and origin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from finetune_api.lineage import AttemptRecord
from finetune_api.names import ExitCode, Origin
from finetune_api.sources import redact_source
from finetune_api.status import Output

from finetune_trainer.report.attempt_times import end_of, gpu_seconds, pod_seconds, resolved_config
from finetune_trainer.report.blocks import (
    Block,
    Cell,
    Section,
    Sentences,
    Table,
    missing,
)
from finetune_trainer.report.cells import (
    cut,
    format_hours,
    format_seconds,
    format_time,
    size_cell,
)
from finetune_trainer.report.redaction import flatten, redact_text
from finetune_trainer.report.run_report import RunReport, StoredCheckpoint
from finetune_trainer.report.scale import format_number
from finetune_trainer.report.time_use import time_table

SWITCHES = ("suspend", "cancel")
"""Fields of the spec that control a running job."""
STAGE_NAMES = (
    "starting", "downloading", "checking", "restoring", "loading", "training", "saving", "evaluating", "comparing", "merging", "verifying",
    "benchmarking", "reporting", "uploading", "stopping",
)  # fmt: skip
"""Stages in the order of a run."""
SHORTEST_STAGE_SECONDS = 0.05
"""Shorter stages are not shown."""


def request(report: RunReport) -> Section:
    """Return the section with the values of the spec: values of the user, defaults, and changes by the operator."""
    run = report.run
    values = [(path, text) for path, text in flatten(run.spec.to_wire()) if path not in SWITCHES]
    given = [(path, text) for path, text in values if run.origin(_field_path(path)) is Origin.USER and not _is_filled_in(path, run.defaults)]
    filled = [(path, text) for path, text in values if (path, text) not in given]
    blocks: list[Block] = [Table("Set by the user", ["field", "value"], [[Cell(path, "code"), Cell(cut(text))] for path, text in given])]
    if filled:
        rows = [[Cell(path, "code"), Cell(cut(text)), Cell(str(run.origin(_field_path(path))))] for path, text in filled]
        blocks.append(Table("Filled in", ["field", "value", "origin"], rows, is_folded=True))
    if run.before_adaptation:
        rows = [
            [Cell(path, "code"), Cell(redact_text(str(value))), Cell(redact_text(str(run.spec.value(path))))]
            for path, value in run.before_adaptation.items()
        ]
        blocks.append(Table("Changed by the operator after a failure", ["field", "value of the user", "value in use"], rows))
    return Section("request", "Spec", blocks)


def _field_path(path: str) -> str:
    return path.partition("[]")[0]


def _is_filled_in(path: str, defaults: Sequence[str]) -> bool:
    """Whether a value belongs to a group of fields for which the defaults filled in the whole group."""
    return any(path.startswith(f"{default}.") for default in defaults)


def attempts(report: RunReport) -> Section:
    """Return the table of attempts: times, first and last step, and how each attempt ended."""
    rows = []
    for one, following in zip_longest(report.attempts, report.attempts[1:]):
        end, is_estimate = end_of(one, report)
        rows.append([
            Cell(f"{one.attempt}"), Cell(format_time(one.started_at), "number"),
            Cell(f"{format_time(end)}{' or later' if is_estimate else ''}", "number") if end else missing("the pod was killed before it stored a log line"),
            *_trained_steps(one, report),
            _lost_steps(one, following), _end_text(one),
        ])  # fmt: skip
    columns = ["attempt", "start (UTC)", "end (UTC)", "from step", "to step", "steps repeated later", "how it ended"]
    return Section("attempts", "Attempts", [Table("Attempts of the run", columns, rows)] if rows else [])


def _end_text(one: AttemptRecord) -> Cell:
    if one.exit_code is None:
        return Cell("The pod was killed, and wrote no reason.", "bad")
    if one.exit_code == ExitCode.OK:
        return Cell("completed", "good")
    return Cell(f"exit code {one.exit_code}, {one.code or 'no code'}: {redact_text(one.message or 'no message')}", "bad")


def _trained_steps(one: AttemptRecord, report: RunReport) -> list[Cell]:
    if one.start_step is None:
        return [Cell("no training"), Cell("no training")]
    start = Cell(str(one.start_step), "number")
    if one.last_step is not None:
        return [start, Cell(str(one.last_step), "number")]
    last_line = report.last_lines.get(one.incarnation)
    return [start, Cell(f"{last_line.step} or later", "number") if last_line else missing("the pod was killed before it stored a log line")]


def _lost_steps(one: AttemptRecord, following: AttemptRecord | None) -> Cell:
    if following is None or following.start_step is None or one.start_step is None:
        return Cell("–")
    return missing("the pod was killed") if one.last_step is None else Cell(str(max(0, one.last_step - following.start_step)), "number")


def data(report: RunReport) -> Section:
    """Return the section about the data: rows, lengths, duplicates and personal data."""
    record, tokens = report.data, report.token_counts
    if record is None:
        return Section("data", "Data", [Sentences(["Not measured: no attempt has checked the data."])])
    blocks: list[Block] = []
    splits = [name for name in ("train", "validation", "test") if record.rows.get(name)]
    no_counts = "this objective does not record token counts" if report.output else "the run has no final model; the counts are stored in the model's manifest"

    def counted(split: str, name: str) -> Cell:
        value = tokens.get(split, {}).get(name)
        return _value(value, no_counts, ",")

    rows = [[Cell("rows"), *(Cell(f"{record.rows[split]:,}", "number") for split in splits)]]
    names = {
        "tokens": "tokens", "trained_tokens": "tokens that are trained on", "median": "tokens in a row, median",
        "percentile95": "tokens in a row, 95 % are shorter", "longest": "tokens in the longest row", "truncated": "rows that were cut",
        "dropped": "rows left out because they are too long", "answerless": "rows left out because their answer was cut off",
    }  # fmt: skip
    rows += [[Cell(label), *(counted(split, name) for split in splits)] for name, label in names.items()]
    blocks.append(Table("Rows and lengths", ["", *splits], rows, is_narrow=True))
    blocks.append(Table("Checks of the training rows", ["check", "result"], _check_rows(report), is_narrow=True))
    return Section("data", "Data", blocks)


def _check_rows(report: RunReport) -> list[list[Cell]]:
    record = report.data
    assert record is not None
    checks = [
        [Cell("format"), Cell(", ".join(record.formats) or "–")],
        [Cell("rows that cannot be used"), Cell(f"{record.bad_rows:,}", "number")],
        [Cell("duplicates left out"), _value(record.duplicates, "dataset.checks.deduplicate is not set", ",")],
    ]
    if record.personal_data is None:
        checks.append([Cell("rows that may hold personal data"), missing("dataset.checks.piiScan is not set")])
    else:
        checks += [[Cell(f"rows that may hold personal data: {kind}"), Cell(f"{count:,}", "number")] for kind, count in record.personal_data.items()]
    if record.share_of_top_answer is not None:
        checks.append([Cell("share of the most frequent answer"), Cell(f"{record.share_of_top_answer:.1%}", "number")])
    return checks


# ---- costs


def costs(report: RunReport) -> Section:
    """Return the section with hours, throughput, and what the time was used for."""
    blocks: list[Block] = [Table("Use of the cluster", ["", "value"], _use_rows(report), is_narrow=True)]
    used = time_table(report)
    blocks += [used] if used is not None else []
    stage_rows = _stage_rows(report)
    if stage_rows:
        without = " Attempts that were killed are not included." if any(one.ended_at is None for one in report.attempts) else ""
        note = f"The sum over the attempts.{without}"
        blocks.append(Table("Time by stage", ["stage", "time"], stage_rows, note=note, is_folded=used is not None, is_narrow=True))
    return Section("costs", "Time and cost", blocks)


def _use_rows(report: RunReport) -> list[list[Cell]]:
    resolved, world = resolved_config(report), report.run.world
    seconds, is_estimate = pod_seconds(report)
    lower_bound = "at least " if is_estimate else ""
    training_seconds = max((entry.training_seconds or 0.0 for entry in report.log), default=0.0)
    throughput = sorted(value for entry in report.log if isinstance(value := getattr(entry, "tokens_per_second", None), int | float))
    training_time = _value(format_seconds(training_seconds) if training_seconds else None, "no line of the log contains it")
    has_gpus = any(one.gpus for one in report.attempts)
    gpu_hours = Cell(f"{lower_bound}{format_hours(gpu_seconds(report)[0])}", "number") if has_gpus else Cell("0: the run used no GPU")
    return [
        [Cell("GPU hours"), gpu_hours],
        [Cell("running time of all attempts"), Cell(f"{lower_bound}{format_seconds(seconds)}", "number")],
        [Cell("training time, with evaluations during training"), training_time],
        [Cell("device"), _value(resolved.device, "no attempt has loaded the model")],
        [Cell("ranks"), Cell(f"{world.size} in {world.nodes} pod{'s' * (world.nodes > 1)}")],
        [Cell("tokens per second, median"), _value(format_number(throughput[len(throughput) // 2]) if throughput else None, "no throughput was logged")],
    ]


def _stage_rows(report: RunReport) -> list[list[Cell]]:
    """Seconds of each stage, without stages that took no time."""
    timings = {name: sum(one.timings.get(name, 0.0) for one in report.attempts) for name in STAGE_NAMES}
    return [[Cell(name), Cell(format_seconds(seconds), "number")] for name, seconds in timings.items() if seconds >= SHORTEST_STAGE_SECONDS]


# ---- lineage


def lineage(report: RunReport) -> Section:
    """Return the section with the sources and hashes of the base model, the data and the final model."""
    blocks: list[Block] = [Table("Model and inputs", ["", "value"], _origin_rows(report))]
    if report.checkpoints:
        columns = ["step", "attempt", "size", "validation loss", "healthy", "sha256 of the manifest"]
        rows = [_checkpoint_row(one) for one in report.checkpoints]
        blocks.append(Table("Committed checkpoints", columns, rows, note="Older checkpoints are removed according to checkpoint.keep."))
    if report.model_files:
        files = [[Cell(one.path, "code"), size_cell(one.size), Cell(one.sha256, "code")] for one in report.model_files]
        blocks.append(Table("Files of the final model", ["file", "size", "sha256"], files, is_folded=True))
    if report.stages:
        stages = [[Cell(one.name), Cell(str(one.attempt), "number"), Cell(one.time.partition(".")[0].replace("T", " "), "number")] for one in report.stages]
        blocks.append(Table("Stages after training", ["stage", "attempt", "time (UTC)"], stages))
    if report.versions:
        versions = [[Cell(name, "code"), Cell(version, "code")] for name, version in sorted(report.versions.items())]
        blocks.append(Table("Versions of the packages", ["package", "version"], versions, is_folded=True))
    return Section("lineage", "Origin", blocks)


def _origin_rows(report: RunReport) -> list[list[Cell]]:
    run, resolved, output = report.run, resolved_config(report), report.output or Output()
    no_model = "the run has no final model"

    def code(value: object, reason: str) -> Cell:
        return missing(reason, "not recorded") if value in (None, "") else Cell(redact_text(str(value)), "code")

    image, place = resolved.image or run.spec.placement.image, "of the FineTuneJob names it"
    rows = [
        [Cell("job"), Cell(f"{run.namespace}/{run.name}, uid {run.uid}", "code")],
        [Cell("base model"), Cell(redact_source(run.spec.model.source or ""), "code")],
        [Cell("revision of the base model"), code(resolved.model_revision, "no attempt has downloaded the model")],
        [Cell("sha256 of the training data"), code(resolved.dataset_digest, "no attempt has downloaded the data")],
        [Cell("sha256 of the run configuration"), code(report.config_sha256, "no attempt has read it")],
        [Cell("image"), code(image, f"it is the platform's default; status.resolved.image {place}")],
        [Cell("digest of the image"), code(resolved.image_digest, f"a pod does not know it; status.resolved.imageDigest {place}")],
        [Cell("seed"), code(run.spec.training.seed, "the spec has none")],
        [Cell("final model"), code(output.uri, no_model)],
        [Cell("kind"), code(output.kind, no_model)],
        [Cell("sha256 of the model's manifest"), code(output.sha256, no_model)],
    ]
    promoted = None if output.promoted is None else "yes" if output.promoted else "no"
    optional = {"merged model": output.merged_uri, "published copy": output.published_uri, "passed all gates": promoted}
    return rows + [[Cell(name), Cell(redact_text(value), "code")] for name, value in optional.items() if value]


def _checkpoint_row(one: StoredCheckpoint) -> list[Cell]:
    eval_loss = Cell("–") if one.eval_loss is None else Cell(format_number(one.eval_loss), "number")
    healthy = Cell("yes" if one.healthy else "not confirmed")
    return [Cell(str(one.step), "number"), Cell(str(one.attempt), "number"), size_cell(one.bytes), eval_loss, healthy, Cell(one.sha256, "code")]


def notes(report: RunReport) -> Section:
    """Return the section with the notes of all attempts."""
    texts = dict.fromkeys(redact_text(note) for one in report.attempts for note in one.notes)
    return Section("notes", "Notes of the trainer", [Sentences(list(texts))] if texts else [])


def _value(value: object, reason: str, spec: str = "") -> Cell:
    """Return a value as a cell, or the reason why it is None. `spec`: format of the value."""
    return missing(reason) if value is None else Cell(format(value, spec), "number")
