"""Builds the table of how the run's pods used their time. For the time before a container started, the table refers to
`status.goodput`, because the pod that writes the report cannot know this time."""

from __future__ import annotations

from itertools import zip_longest

from finetune_api.lineage import AttemptRecord

from finetune_trainer.report.attempt_times import find_end_time
from finetune_trainer.report.blocks import Cell, Table, make_missing_cell
from finetune_trainer.report.cells import format_seconds
from finetune_trainer.report.run_report import RunReport

PART_LABELS = {
    "starting": "start of the processes", "download": "download of model and data", "checking": "check of spec, model and rows",
    "loading": "loading the model or a checkpoint", "firstStep": "first step of each pod", "steps": "optimizer steps that count",
    "lostSteps": "optimizer steps that a later attempt repeated", "saving": "training waited for a checkpoint", "evaluation": "evaluation",
    "upload": "upload of the final model", "finishing": "merge, verification and report", "stopping": "from a stop request to the end of the pod",
    "other": "other",
}  # fmt: skip
"""Labels of the parts of `TimeUse` that a pod measures, and of `lostSteps`, which is computed from the steps of the attempts."""
KILLED_LABEL = "attempts that did not record how they used their time"
OPERATOR_PARTS = "backoff, suspension, queue, preparation, scheduling, start of the container"
SHORTEST_PART_SECONDS = 0.05
"""Parts that took less time than this are not shown."""


def build_time_table(report: RunReport) -> Table | None:
    """Return the table, or None if no attempt has recorded how it used its time."""
    if all(attempt.time_use is None for attempt in report.attempts):
        return None
    seconds_by_part: dict[str, float] = {}
    for attempt, next_attempt in zip_longest(report.attempts, report.attempts[1:]):
        for part, part_seconds in _split_time(attempt, next_attempt, report).items():
            seconds_by_part[part] = seconds_by_part.get(part, 0.0) + part_seconds
    total_seconds = sum(seconds_by_part.values())
    rows = [
        [Cell(label), Cell(format_seconds(seconds_by_part[part]), "number"), Cell(f"{seconds_by_part[part] / total_seconds:.1%}", "number")]
        for part, label in {**PART_LABELS, KILLED_LABEL: KILLED_LABEL}.items() if seconds_by_part.get(part, 0.0) >= SHORTEST_PART_SECONDS
    ]  # fmt: skip
    reason = "a pod does not know it; status.goodput of the FineTuneJob shows it"
    rows.append([Cell(OPERATOR_PARTS), make_missing_cell(reason), Cell("–")])
    useful_share = (seconds_by_part.get("firstStep", 0.0) + seconds_by_part.get("steps", 0.0)) / total_seconds if total_seconds else 0.0
    note = f"{useful_share:.1%} of the time of rank 0's containers went into optimizer steps that no later attempt repeated."
    return Table("What the time was used for", ["part", "time", "share"], rows, note=note, is_narrow=True)


def _split_time(attempt: AttemptRecord, next_attempt: AttemptRecord | None, report: RunReport) -> dict[str, float]:
    """Return how many seconds each part of an attempt took. The time of steps that the next attempt repeated is the separate part `lostSteps`."""
    if attempt.time_use is None:
        end_time, _ = find_end_time(attempt, report)
        return {KILLED_LABEL: max(0.0, ((end_time or attempt.started_at) - attempt.started_at).total_seconds())}
    seconds_by_part = attempt.time_use.seconds()
    lost_seconds = seconds_by_part.get("steps", 0.0) * _compute_lost_share(attempt, next_attempt)
    return seconds_by_part | {"steps": seconds_by_part.get("steps", 0.0) - lost_seconds, "lostSteps": lost_seconds}


def _compute_lost_share(attempt: AttemptRecord, next_attempt: AttemptRecord | None) -> float:
    """Return the share of an attempt's steps that the next attempt repeated."""
    if next_attempt is None or next_attempt.start_step is None:
        return 0.0
    if attempt.start_step is None or attempt.last_step is None or attempt.last_step <= attempt.start_step:
        return 0.0
    kept_share = max(0, next_attempt.start_step - attempt.start_step) / (attempt.last_step - attempt.start_step)
    return 1.0 - min(1.0, kept_share)
