"""A GPU job with invalid storage, model or data fails in its preparation pod, before any pod requests a GPU. The job's failure has a code, a location and a
hint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from finetune_api.names import TRAINER_CONTAINER, Condition, ExitCode, FailureClass, Phase, Reason
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.installation import MODEL, Installation, JobNamespace, make_job

DATASETS_URI = "s3://datasets"
WRONG_SECRET_KEY = "a-secret-key-that-the-store-does-not-know"
MAX_POD_DURATION = timedelta(seconds=20)
"""A pod with invalid storage, model or data must end within this time after its start."""
S3_STORAGE_FIELDS: dict[str, Any] = {"credentialsSecretRef": {"name": "s3-credentials"}, "addressingStyle": "path"}


def make_messages_row(question: str, answer: str | None = "Yes.", role: str = "assistant") -> bytes:
    """Return one JSONL line with a question and, if given, an answer by `role`."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": role, "content": answer})
    return json.dumps({"messages": turns}).encode() + b"\n"


VALID_ROWS = [make_messages_row(f"Is {number} a number?") for number in range(200)]
DATASET_FILES = {
    "empty.jsonl": b"",
    "latin1.jsonl": b"".join(VALID_ROWS[:3]) + '{"messages": "caf\u00e9"}\n'.encode("latin-1"),
    "row17.jsonl": b"".join([*VALID_ROWS[:16], b'{"messages": [\n', *VALID_ROWS[17:]]),
    "role.jsonl": b"".join([*VALID_ROWS[:4], make_messages_row("Who?", role="robot")]),
    "unanswered.jsonl": b"".join(make_messages_row(f"Question {number}?", answer=None) for number in range(8)),
}


@dataclass(frozen=True)
class InvalidInput:
    """The spec groups of a bad job, and the failure that they must cause. The failure's message or hint contains each string of `expected_text`."""

    spec: dict[str, Any]
    exit_code: ExitCode
    failure_class: FailureClass
    code: str
    expected_text: tuple[str, ...]


def make_dataset_groups(name: str) -> dict[str, Any]:
    """Return the groups of a spec that trains on this file of the bucket `datasets`."""
    return {"dataset": {"train": f"{DATASETS_URI}/{name}", "format": "messages"}}


def make_storage_groups(installation: Installation, **storage_fields: Any) -> dict[str, Any]:
    """Return spec groups with the default storage, in which `storage_fields` replace the fields of the same names."""
    return {"storage": {"uri": "s3://finetune/jobs", "endpoint": installation.cluster.s3.cluster_url, **S3_STORAGE_FIELDS} | storage_fields}


INVALID_INPUTS: dict[str, Callable[[Installation], InvalidInput]] = {
    "dataset-missing": lambda _: InvalidInput(
        make_dataset_groups("nowhere.jsonl"), ExitCode.SOURCE_NOT_FOUND, FailureClass.DATA, "DatasetNotFound", (f"{DATASETS_URI}/nowhere.jsonl",)
    ),
    "dataset-empty": lambda _: InvalidInput(
        make_dataset_groups("empty.jsonl"), ExitCode.DATA_INVALID, FailureClass.DATA, "DatasetEmpty", ("empty.jsonl",)
    ),
    "dataset-not-utf8": lambda _: InvalidInput(
        make_dataset_groups("latin1.jsonl"), ExitCode.DATA_INVALID, FailureClass.DATA, "DatasetNotUtf8",
        ("latin1.jsonl", str(len(b"".join(VALID_ROWS[:3])) + DATASET_FILES["latin1.jsonl"].split(b"\n")[3].index(b"\xe9"))),
    ),
    "row-malformed": lambda _: InvalidInput(
        make_dataset_groups("row17.jsonl"), ExitCode.DATA_INVALID, FailureClass.DATA, "DatasetRowInvalid", ("row17.jsonl", "17")
    ),
    "role-unknown": lambda _: InvalidInput(
        make_dataset_groups("role.jsonl"), ExitCode.DATA_INVALID, FailureClass.DATA, "UnknownRole", ("role.jsonl", "5", "robot", "assistant")
    ),
    "no-answer": lambda _: InvalidInput(
        make_dataset_groups("unanswered.jsonl"), ExitCode.DATA_INVALID, FailureClass.DATA, "NoTrainableToken", ("unanswered.jsonl",)
    ),
    "model-missing": lambda _: InvalidInput(
        {"model": {"source": f"{MODEL}-2"}}, ExitCode.SOURCE_NOT_FOUND, FailureClass.MODEL, "ModelNotFound", (f"{MODEL}-2",)
    ),
    "bucket-missing": lambda installation: InvalidInput(
        make_storage_groups(installation, uri="s3://no-such-bucket/jobs"), ExitCode.STORAGE_SETUP, FailureClass.STORAGE, "BucketNotFound",
        ("no-such-bucket", "storage.uri"),
    ),
    "keys-wrong": lambda installation: InvalidInput(
        make_storage_groups(installation, credentialsSecretRef={"name": "wrong-keys"}), ExitCode.CREDENTIALS_REFUSED, FailureClass.STORAGE,
        "CredentialsRejected", ("storage.credentialsSecretRef",),
    ),
    "endpoint-silent": lambda installation: InvalidInput(
        {**make_storage_groups(installation, endpoint="http://nobody.s3.svc:8333"), "policy": {"retries": 0}}, ExitCode.STORAGE_UNREACHABLE,
        FailureClass.STORAGE, "EndpointUnreachable", ("nobody.s3.svc:8333",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def failing_jobs(installation: Installation, shared_namespace: JobNamespace) -> JobNamespace:
    """A namespace in which the jobs of all cases run at the same time."""
    for key, body in DATASET_FILES.items():
        installation.store.put_object(Bucket="datasets", Key=key, Body=body)
    shared_namespace.create_secret("wrong-keys", {"AWS_ACCESS_KEY_ID": "unknown-key", "AWS_SECRET_ACCESS_KEY": WRONG_SECRET_KEY})
    gpu_groups: dict[str, Any] = {"resources": {"gpusPerNode": 1}, "prepare": {"strategy": "always"}}
    shared_namespace.apply(*(make_job(name, **gpu_groups, **case(installation).spec) for name, case in INVALID_INPUTS.items()))
    return shared_namespace


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_a_bad_job_fails_before_training_with_its_code(failing_jobs: JobNamespace, name: str) -> None:
    case = INVALID_INPUTS[name](failing_jobs.installation)
    status = failing_jobs.wait_finished(name, Phase.FAILED)
    failure = status.failure
    assert failure is not None
    text = f"{failure.message} {failure.hint}"
    assert (failure.class_, failure.code, failure.exit_code) == (case.failure_class, case.code, case.exit_code), text
    assert [part for part in case.expected_text if part not in text] == [], text
    assert "Traceback" not in text
    assert status.progress is None or not status.progress.step
    assert read_condition_status(status, Condition.STALLED) == "True"


@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_a_bad_job_is_not_retried_and_no_pod_requests_a_gpu(failing_jobs: JobNamespace, name: str) -> None:
    status = failing_jobs.wait_finished(name, Phase.FAILED)
    assert (status.attempts, status.attempt, read_condition_status(status, Condition.PREPARED)) == ([], None, "False")
    (pod,) = failing_jobs.pods(name)
    assert pod["metadata"]["name"].startswith(f"{name}-prepare1-")
    assert "nvidia.com/gpu" not in pod["spec"]["containers"][0]["resources"]["limits"]
    (container_status,) = pod["status"]["containerStatuses"]
    assert container_status["state"]["terminated"]["exitCode"] == INVALID_INPUTS[name](failing_jobs.installation).exit_code


@pytest.mark.slow  # the measured duration is only valid if no other test uses the cores
@pytest.mark.parametrize("name", INVALID_INPUTS)
def test_a_pod_with_bad_input_ends_within_the_documented_time(failing_jobs: JobNamespace, name: str) -> None:
    """The duration is computed from the kubelet's timestamps. The duration includes the time in which the pod waits for CPU cores, because the pods of all
    cases share them.
    """
    failing_jobs.wait_finished(name, Phase.FAILED)
    (pod,) = failing_jobs.pods(name)
    (container_status,) = pod["status"]["containerStatuses"]
    terminated_state = container_status["state"]["terminated"]
    started_at, finished_at = (datetime.fromisoformat(terminated_state[key]) for key in ("startedAt", "finishedAt"))
    assert timedelta(0) <= finished_at - started_at <= MAX_POD_DURATION


def test_secrets_appear_in_no_status_or_log(failing_jobs: JobNamespace) -> None:
    for name in ("keys-wrong", "bucket-missing"):
        status = failing_jobs.wait_finished(name, Phase.FAILED)
        (pod,) = failing_jobs.pods(name)
        logs = failing_jobs.installation.cluster.kubectl(
            "-n", failing_jobs.namespace, "logs", pod["metadata"]["name"], "-c", TRAINER_CONTAINER
        )
        for secret in (failing_jobs.installation.cluster.s3.secret_key, WRONG_SECRET_KEY):
            assert secret not in logs and secret not in status.model_dump_json()


@pytest.mark.slow  # `make test` checks in tests/integration/operator for which reason a job without its Secret waits
def test_a_job_waits_for_a_missing_secret(job_namespace: JobNamespace) -> None:
    """A job whose Secret is missing is Pending with a reason, and runs as soon as the Secret exists."""
    job_namespace.apply(
        make_job(
            "waiting",
            **make_storage_groups(job_namespace.installation, credentialsSecretRef={"name": "later"}),
            training={"maxSteps": 2},
        )
    )
    status = job_namespace.wait(
        "waiting", lambda s: read_reconciling_reason(s) == Reason.CONFIG_MISSING, "waiting for its Secret", 60
    )
    assert status.phase in (Phase.PENDING, Phase.STARTING)
    keys = job_namespace.installation.cluster.s3
    job_namespace.create_secret("later", {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key})
    assert job_namespace.wait_finished("waiting").restarts == 0


def test_an_unknown_node_pool_is_reported_without_a_pod(job_namespace: JobNamespace) -> None:
    job_namespace.apply(make_job("no-pool", resources={"gpusPerNode": 1, "nodePool": "h900"}))
    status = job_namespace.wait(
        "no-pool", lambda s: read_reconciling_reason(s) == Reason.UNKNOWN_NODE_POOL, "refused because of the pool", 60
    )
    assert status.phase is Phase.PENDING
    assert job_namespace.pods("no-pool") == []


def read_condition_status(status: FineTuneJobStatus, kind: Condition) -> str:
    """Return the status of a condition, or an empty string if the condition is absent."""
    return next((condition.status for condition in status.conditions if condition.type == kind), "")


def read_reconciling_reason(status: FineTuneJobStatus) -> str:
    """Return the reason of the job's condition `Reconciling`, or an empty string if the job has no such condition."""
    return next((condition.reason for condition in status.conditions if condition.type == Condition.RECONCILING), "")
