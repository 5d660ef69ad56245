"""Functions that create views, statuses and facts for tests. If a test does not set a field, the functions use a default value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.names import MANAGER_NAME, TRAINER_CONTAINER, Condition, Label
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.facts import Facts, ReceivedReport
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import AcceptedSpec, accept
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.settings import OperatorConfig, parse_config
from finetune_operator.views import FineTuneJobView, JobView, PodView, TerminatedState, read_pod

T0 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
UID = "11111111-1111-4111-8111-111111111111"
SPEC: Object = {
    "model": {"source": "org/tiny"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "resources": {"gpusPerNode": 0},
    "storage": {"uri": "s3://models/test"},
}
CONFIG = parse_config(
    {
        "trainer": {"image": "registry.example.com/trainer:1"},
        "retry": {"baseSeconds": 10, "maxSeconds": 600},
        "nodePools": [
            {"name": "h100", "default": True, "gpusPerNode": 8, "nodeSelector": {"gpu": "h100"}},
            {"name": "mig", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig-1g.10gb", "maxNodes": 2},
        ],
        "policy": {"serviceAccounts": ["default", "trainer"]},
    },
    "test",
)


def at(seconds: float) -> datetime:
    """Return the time `seconds` after T0."""
    return T0 + timedelta(seconds=seconds)


def iso_time(seconds: float) -> str:
    """Return the time `seconds` after T0 as text, in the API server's format."""
    return at(seconds).isoformat().replace("+00:00", "Z")


def condition(kind: Condition, value: str, reason: str, seconds: float) -> dict[str, str]:
    """Return a status condition that last changed `seconds` after T0."""
    return {"type": kind, "status": value, "reason": reason, "message": "", "lastTransitionTime": iso_time(seconds)}


def spec(**groups: Any) -> Object:
    """Return a copy of SPEC. The fields in a keyword argument replace or extend the fields of the spec group of the same name."""
    raw_spec = dict(SPEC)
    for name, group in groups.items():
        raw_spec[name] = {**raw_spec.get(name, {}), **group} if isinstance(group, dict) else group
    return raw_spec


def status(**fields: Any) -> FineTuneJobStatus:
    """Return a status with these fields. The keyword arguments are the JSON names of the fields."""
    return FineTuneJobStatus.model_validate(fields)


def finetunejob(spec: Object | None = None, status: FineTuneJobStatus | None = None, **fields: Any) -> FineTuneJobView:
    """Return a FineTuneJob named `run`."""
    default_fields: dict[str, Any] = {
        "namespace": "team", "name": "run", "uid": UID, "version": 1, "resource_version": "1", "generation": 1,
        "created_at": T0, "is_deleting": False,
    }  # fmt: skip
    return FineTuneJobView(**{**default_fields, **fields}, spec=spec or SPEC, status=status or FineTuneJobStatus())


def job(attempt: int = 1, **fields: Any) -> JobView:
    """Return the Job of an attempt."""
    default_fields: dict[str, Any] = {
        "namespace": "team", "name": f"run-{attempt}", "uid": f"job-{attempt}", "version": 1, "owner_uid": UID,
        "is_owned": True, "finetunejob_name": "run", "attempt": attempt, "created_at": T0, "started_at": T0, "config_sha256": "c" * 64,
    }  # fmt: skip
    return JobView(**{**default_fields, **fields})


def pod(attempt: int = 1, index: int = 0, **fields: Any) -> PodView:
    """Return a pod that runs and is ready."""
    default_fields: dict[str, Any] = {
        "namespace": "team", "name": f"run-{attempt}-{index}-abcde", "uid": f"pod-{attempt}-{index}", "version": 1,
        "job_uid": f"job-{attempt}", "owner_uid": UID, "finetunejob_name": "run", "attempt": attempt, "completion_index": index,
        "created_at": T0, "phase": "Running", "is_ready": True, "ip": "10.0.0.1", "node": "node-1",
    }  # fmt: skip
    return PodView(**{**default_fields, **fields})


def end_pod(running_pod: PodView, code: int, termination_message: TerminationMessage | None = None, *, reason: str = "", message: str = "") -> PodView:
    """Return a copy of the pod in which its container has ended with exit code `code`."""
    message_text = message or (termination_message.to_json() if termination_message else "")
    phase = "Succeeded" if code == 0 else "Failed"
    return replace(running_pod, phase=phase, is_ready=False, terminated=TerminatedState(code, reason, message_text, at(60)))


def accept_spec(spec: Object | None = None, config: OperatorConfig = CONFIG) -> AcceptedSpec:
    """Return the accepted spec with its defaults. A refused spec fails the test."""
    verdict = accept(spec or SPEC, config)
    assert isinstance(verdict, AcceptedSpec), verdict
    return verdict


def facts(
    *, spec: Object | None = None, status: FineTuneJobStatus | None = None, jobs: Sequence[JobView] = (),
    pods: Sequence[PodView] = (), now: datetime = T0, last_report: ProgressReport | None = None, reported_at: datetime | None = None,
    blocking_condition: BlockingCondition | None = None, config: OperatorConfig = CONFIG, **fields: Any,
) -> Facts:  # fmt: skip
    """Return facts about a FineTuneJob named `run`."""
    finetune_job = finetunejob(spec, status, **fields)
    received_report = ReceivedReport(last_report, reported_at or now, "pod-1-0") if last_report else None
    return Facts(finetune_job, accept(finetune_job.spec, config), now, config, tuple(jobs), tuple(pods), received_report, blocking_condition)


def report(**fields: Any) -> ProgressReport:
    """Return a progress report, as the pod of rank 0 sends it. The keyword arguments are the JSON names of the fields."""
    return ProgressReport.model_validate({"uid": UID, "attempt": 1, "stage": "training", **fields})


def parse_pod(phase: str, trainer: dict[str, Any], *, injected: dict[str, Any] | None = None, init: dict[str, Any] | None = None,
         conditions: list[dict[str, Any]] | None = None, gates: list[str] | None = None) -> PodView:  # fmt: skip
    """Return the view of a pod. `trainer` is the state of the trainer container, `injected` that of a sidecar that the pod lists before the trainer, and
    `init` that of an init container.
    """
    labels = {Label.MANAGED_BY: MANAGER_NAME, Label.JOB_NAME: "run", Label.JOB_UID: UID, Label.ATTEMPT: "1"}
    container_statuses = [{"name": "istio-proxy", "imageID": "proxy", "state": injected}] if injected else []
    container_statuses.append({"name": TRAINER_CONTAINER, "imageID": "trainer", "state": trainer})
    body = {
        "metadata": {"name": "run-1-0-x", "namespace": "team", "uid": "pod-1", "labels": labels},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates or []]},
        "status": {
            "phase": phase, "containerStatuses": container_statuses, "conditions": conditions or [],
            "initContainerStatuses": [{"name": "setup", "state": init}] if init else [],
        },
    }  # fmt: skip
    view = read_pod(body)
    assert view is not None
    return view
