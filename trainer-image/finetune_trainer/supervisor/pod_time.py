"""Splits the time of one pod into the parts of `TimeUse`, from the durations of its stages and of the pauses in training."""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.status import TIME_USE_OF_STAGE, TimeUse


def compute_time_use(stage_seconds: Mapping[str, float], pause_seconds_by_part: Mapping[str, float], first_step_seconds: float | None) -> TimeUse:
    """Return the seconds of each part of `TimeUse`. The sum of the parts is the duration of all stages.

    `stage_seconds`: seconds by name of the stage; names that are not stages are ignored. `pause_seconds_by_part`: seconds of the pauses in training, by part.
    `first_step_seconds`: None before the end of the first step; until then, all training time counts as the first step.
    """
    seconds_by_part: dict[str, float] = {}
    for stage, part in TIME_USE_OF_STAGE.items():
        seconds_by_part[part] = seconds_by_part.get(part, 0.0) + stage_seconds.get(stage.value, 0.0)
    training_seconds = seconds_by_part.pop("steps")
    for part, seconds in pause_seconds_by_part.items():
        counted_pause_seconds = min(seconds, training_seconds)
        seconds_by_part[part], training_seconds = seconds_by_part[part] + counted_pause_seconds, training_seconds - counted_pause_seconds
    counted_first_step_seconds = training_seconds if first_step_seconds is None else min(first_step_seconds, training_seconds)
    seconds_by_part |= {"firstStep": counted_first_step_seconds, "steps": training_seconds - counted_first_step_seconds}
    return TimeUse.model_validate({part: round(seconds, 3) for part, seconds in seconds_by_part.items() if round(seconds, 3) > 0})
