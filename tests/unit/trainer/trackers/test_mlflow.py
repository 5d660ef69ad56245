"""Later attempts continue the parent and child runs in MLflow. These tests use MLflow's file store; `tests/faults/trackers` uses a server."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from finetune_trainer.trackers.events import RunEnd, append_events
from finetune_trainer.trackers.mlflow import Mlflow
from finetune_trainer.trackers.sender import Sender
from mlflow.exceptions import MlflowException, RestException

from tests.support.mlflow_runs import MlflowRuns
from tests.support.tracking import START, compute_loss, end_events, log_events, start_events, tracked_run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


def test_a_killed_attempt_is_continued_in_the_same_runs_and_repeated_steps_are_sent_once(store: str) -> None:
    first_tracker = Mlflow(tracked_run(), store, None)
    first_tracker.open()
    first_tracker.send([*start_events(), *log_events(1, 14, evaluated_steps=(10,))])
    # The pod is killed. The next attempt resumes from step 10, with a smaller batch.
    changed_parameters = {"method.type": "lora", "training.batchSizePerDevice": "2", "training.learningRate": "0.0002"}
    second_tracker = Mlflow(tracked_run(attempt=2, resumed_from_step=10, parameters=changed_parameters), store, None)
    second_tracker.open()
    second_tracker.send([*log_events(1, 10, evaluated_steps=(10,)), *start_events()])
    second_tracker.send([*log_events(11, 20, evaluated_steps=(20,)), *end_events(20)])
    runs = MlflowRuns(store, "support")
    assert runs.names() == {"support-bot", "support-bot_finetuning", "support-bot_evaluation"}
    assert runs.history("support-bot_finetuning", "loss") == [(step, compute_loss(step)) for step in range(1, 21)]
    assert runs.history("support-bot_finetuning", "eval_loss") == [(10, compute_loss(10) + 0.5), (20, compute_loss(20) + 0.5)]
    assert runs.history("support-bot_evaluation", "eval_perplexity") == [(20, 5.25)]
    parent = runs.run("support-bot")
    assert {run.info.status for run in runs.all()} == {"FINISHED"}
    assert {name: value for name, value in parent.data.metrics.items() if name != "epoch"} == {
        "final_training_loss": 1.5, "total_training_steps": 20.0, "total_epochs": 2.0, "eval_perplexity": 5.25,
        "finetuning_duration_seconds": 60.0, "pipeline_total_duration_seconds": 100.0,
    }  # fmt: skip
    assert parent.data.params["training.batchSizePerDevice"] == "4"
    assert parent.data.tags["attempt-2.training.batchSizePerDevice"] == "2"
    assert parent.data.tags["artifact.model"] == "s3://bucket/team/job/model/a1-1"
    assert parent.data.tags["finetune.attempt"] == "2" and parent.info.start_time == int(START * 1000)
    child = runs.run("support-bot_finetuning")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert sorted((dataset_input.dataset.name, dataset_input.tags[0].value) for dataset_input in child.inputs.dataset_inputs) == [
        ("s3://bucket/train.jsonl", "training"), ("s3://bucket/validation.jsonl", "validation"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "status"), [(RunEnd.INTERRUPTED, "SCHEDULED"), (RunEnd.FAILED, "FAILED"), (RunEnd.KILLED, "KILLED")]
)
def test_a_run_has_the_status_of_its_last_attempt_until_the_next_attempt_starts(store: str, end: RunEnd, status: str) -> None:
    first_tracker = Mlflow(tracked_run(), store, "experiment")
    first_tracker.open()
    first_tracker.send([*start_events(), *log_events(1, 3), *end_events(3, end=end, reason="DatasetEmpty" if end is RunEnd.FAILED else None)])
    runs = MlflowRuns(store, "experiment")
    assert {run.info.run_name: run.info.status for run in runs.all()} == {"support-bot": status, "support-bot_finetuning": status}
    assert runs.run("support-bot").data.tags.get("finetune.failure") == ("DatasetEmpty" if end is RunEnd.FAILED else None)
    second_tracker = Mlflow(tracked_run(attempt=2), store, "experiment")
    second_tracker.open()
    second_tracker.send(start_events())
    assert {run.info.status for run in runs.all()} == {"RUNNING"} and len(runs.all()) == 2


def test_errors_name_the_cause_and_no_secret() -> None:
    tracker = Mlflow(tracked_run(), "http://user:secret@mlflow:5000/path", None)
    rejected_error = RestException({"error_code": "UNAUTHENTICATED", "message": "secret"})
    assert (tracker.explain(rejected_error).reason, "secret" in tracker.explain(rejected_error).message) == ("TrackerCredentialsRejected", False)
    refused_error = MlflowException("API request to http://user:secret@mlflow:5000 failed: Connection refused")
    explanation = tracker.explain(refused_error)
    assert (explanation.reason, explanation.message) == (
        "TrackerUnavailable", "mlflow at http://mlflow:5000 could not be reached: the connection was refused",
    )  # fmt: skip
    invalid_error = RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "secret"})
    assert tracker.explain(invalid_error).message == "mlflow refused a request with the error INVALID_PARAMETER_VALUE"


class RejectingServer(BaseHTTPRequestHandler):
    """Answers each request with status 401 and a text that repeats the password."""

    def do_GET(self) -> None:  # noqa: N802
        body = b"user k3y is unknown"
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output free of requests."""


def test_rejected_credentials_are_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "k3y")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), RejectingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        events = tmp_path / "events.jsonl"
        append_events(events, log_events(1, 2))
        sender = Sender(Mlflow(tracked_run(), f"http://127.0.0.1:{server.server_port}", None), [events])
        sender.send_waiting_events()
        server.shutdown()
    assert sender.problem is not None and sender.problem.reason == "TrackerCredentialsRejected"
    assert sender.problem.message.startswith(f"mlflow at http://127.0.0.1:{server.server_port} does not accept the credentials; check the variables")
    assert "k3y" not in sender.problem.message and sender.sent == 0
