"""Builds the objects of the OpenAI API for a FineTuneJob: the job, its events and its checkpoints. The Kubernetes objects are the only source."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.names import Annotation, FailureClass, Phase
from finetune_api.status import Checkpoint, FineTuneJobStatus

from finetune_cli.cluster import get_event_time
from finetune_cli.fields import get_value
from finetune_cli.status_text import has_finished, has_succeeded, parse_status

API_STATUS_BY_PHASE = {
    None: "validating_files", Phase.PREPARING: "validating_files", Phase.VALIDATING: "validating_files",
    Phase.PENDING: "queued", Phase.QUEUED: "queued", Phase.STARTING: "queued", Phase.SUSPENDED: "paused",
}  # fmt: skip
"""The value of the API's field `status` for each phase in which a job is not running and has not ended."""
LEVEL_BY_EVENT_TYPE = {"Normal": "info", "Warning": "warn"}


def read_request(job: dict[str, Any]) -> dict[str, Any]:
    """Return the client's request from the annotation of a job. Users can change the annotation with kubectl, so invalid values count as absent."""
    text = (job["metadata"].get("annotations") or {}).get(Annotation.OPENAI_REQUEST.value, "")
    try:
        request = _get_mapping_or_empty(json.loads(text))
    except (ValueError, RecursionError):
        return {}
    return request | {
        "metadata": {key: str(value) for key, value in _get_mapping_or_empty(request.get("metadata")).items()},
        "hyperparameters": _get_mapping_or_empty(request.get("hyperparameters")),
        "method": {"type": "supervised"} | {key: value for key, value in _get_mapping_or_empty(request.get("method")).items() if isinstance(value, str | dict)},
    }


def _get_mapping_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def get_api_status(job: dict[str, Any], status: FineTuneJobStatus) -> str:
    """Return the value of the API's field `status`. The status is `cancelled` as soon as a user cancels the job, because a cancellation cannot be undone."""
    if has_succeeded(status):
        return "succeeded"
    if has_finished(status):
        return "cancelled" if status.phase == Phase.CANCELLED else "failed"
    return "cancelled" if (job.get("spec") or {}).get("cancel") else API_STATUS_BY_PHASE.get(status.phase, "running")


def build_api_job(job: dict[str, Any], result_files: list[str]) -> dict[str, Any]:
    """Return the API's object for a job. `result_files`: the ids of the files with the metrics of the job."""
    request, status, metadata = read_request(job), parse_status(job), job["metadata"]
    api_status = get_api_status(job, status)
    has_ended = has_finished(status)
    method = str(get_value(request, "method.type") or "supervised")
    hyperparameters = _find_hyperparameters(job, request, status, method)
    return {
        "id": metadata["name"],
        "object": "fine_tuning.job",
        "created_at": _to_unix_seconds(metadata["creationTimestamp"]),
        "finished_at": _to_unix_seconds(status.completion_time) if has_ended else None,
        "status": api_status,
        "error": _build_error(status) if api_status == "failed" else None,
        "estimated_finish": _estimate_finish(status) if api_status == "running" else None,
        "fine_tuned_model": status.output.uri if api_status == "succeeded" and status.output else None,
        "trained_tokens": status.progress.tokens_seen if has_ended and status.progress else None,
        "model": str(request.get("model", "")),
        "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        "hyperparameters": {key: value for key, value in hyperparameters.items() if key != "beta"},
        "seed": get_value(job.get("spec") or {}, "training.seed") or 0,
        "training_file": str(request.get("training_file", "")),
        "validation_file": request.get("validation_file"),
        "result_files": result_files if api_status == "succeeded" else [],
        "integrations": request.get("integrations") or [],
        "metadata": request.get("metadata", {}),
        "user_provided_suffix": request.get("suffix"),
        "organization_id": metadata["namespace"],
    }


def _find_hyperparameters(job: dict[str, Any], request: dict[str, Any], status: FineTuneJobStatus, method: str) -> dict[str, Any]:
    """Return the hyperparameters that the job uses.

    If the value of a hyperparameter is not known yet, return the value from the request. If the request has no value, return `auto`.
    """
    requested_values = {
        **request.get("hyperparameters", {}),
        **{key: value for key, value in _get_mapping_or_empty(get_value(request, f"method.{method}.hyperparameters")).items() if value not in (None, "auto")},
    }
    spec, resolved = job.get("spec") or {}, status.resolved
    values_in_use = {"n_epochs": get_value(spec, "training.epochs"), "batch_size": resolved.effective_batch if resolved else None}
    if method == "dpo":
        values_in_use["beta"] = get_value(spec, "trainer.dpo.beta")
    hyperparameter_names = ("n_epochs", "batch_size", "learning_rate_multiplier", *(["beta"] if method == "dpo" else []))
    return {name: values_in_use.get(name) or requested_values.get(name) or "auto" for name in hyperparameter_names}


def _build_error(status: FineTuneJobStatus) -> dict[str, Any]:
    failure = status.failure
    if failure is None:
        return {"code": status.reason or "failed", "message": "the job ended without success", "param": None}
    message = f"{failure.message}; {failure.hint}" if failure.hint else failure.message
    return {"code": failure.code or str(failure.class_), "message": message, "param": "training_file" if failure.class_ == FailureClass.DATA else None}


def _estimate_finish(status: FineTuneJobStatus) -> int | None:
    progress = status.progress
    if progress is None or progress.seconds_remaining is None or progress.update_time is None:
        return None
    return _to_unix_seconds(progress.update_time + timedelta(seconds=progress.seconds_remaining))


def build_api_events(job: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the API's events of a job, newest first: its creation, the Kubernetes events, and one event with the latest metrics."""
    api_events = [_to_api_event(event) for event in events]
    metadata = job["metadata"]
    api_events.append(_build_event(f"ftevent-{metadata['uid']}-created", metadata["creationTimestamp"], "info", "Created fine-tuning job", "message"))
    metrics_event = _build_metrics_event(job)
    if metrics_event is not None:
        api_events.append(metrics_event)
    return sorted(api_events, key=lambda event: (event["created_at"], event["id"]), reverse=True)


def _to_api_event(event: dict[str, Any]) -> dict[str, Any]:
    level = "error" if event.get("reason") == "Failed" else LEVEL_BY_EVENT_TYPE.get(str(event.get("type")), "info")
    message = str(event.get("note") or event.get("reason") or "")
    return _build_event(f"ftevent-{event['metadata']['uid']}", get_event_time(event), level, message, "message", {"reason": event.get("reason")})


def _build_event(event_id: str, time: datetime | str, level: str, message: str, event_type: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": event_id, "object": "fine_tuning.job.event", "created_at": _to_unix_seconds(time), "level": level, "message": message,
        "type": event_type, "data": data or {},
    }  # fmt: skip


def _build_metrics_event(job: dict[str, Any]) -> dict[str, Any] | None:
    status = parse_status(job)
    progress, metrics = status.progress, status.metrics
    if progress is None or progress.step is None or metrics is None or metrics.train_loss is None:
        return None
    metric_values = {"step": progress.step, "total_steps": progress.total_steps, "train_loss": metrics.train_loss, "full_valid_loss": metrics.eval_loss}
    message = f"Step {progress.step}/{progress.total_steps}: training loss={metrics.train_loss:g}"
    message += "" if metrics.eval_loss is None else f", validation loss={metrics.eval_loss:g}"
    time = progress.update_time or job["metadata"]["creationTimestamp"]
    known_metrics = {key: value for key, value in metric_values.items() if value is not None}
    return _build_event(f"ftevent-{job['metadata']['uid']}-step-{progress.step}", time, "info", message, "metrics", known_metrics)


def build_api_checkpoints(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the API's objects for the checkpoints of a job, newest first."""
    checkpoints = sorted(parse_status(job).checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)
    return [_to_api_checkpoint(job, checkpoint) for checkpoint in checkpoints]


def _to_api_checkpoint(job: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    metrics = {"step": checkpoint.step, "full_valid_loss": checkpoint.eval_loss}
    return {
        "id": f"ftckpt-{job['metadata']['name'].partition('-')[2]}-{checkpoint.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": _to_unix_seconds(checkpoint.time or job["metadata"]["creationTimestamp"]),
        "fine_tuning_job_id": job["metadata"]["name"],
        "fine_tuned_model_checkpoint": checkpoint.uri,
        "step_number": checkpoint.step,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }


def _to_unix_seconds(time: datetime | str | None) -> int | None:
    """Return a time in whole seconds since 1970, or None for no time. The times of Kubernetes events have fractions of seconds."""
    if time is None or time == "":
        return None
    parsed_time = datetime.fromisoformat(re.sub(r"Z$", "+00:00", time)) if isinstance(time, str) else time
    return int(parsed_time.astimezone(UTC).timestamp())
