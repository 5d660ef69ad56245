"""Runs with real tracker servers: a pod is killed, a server is down for a while, or a server stays down. Each step is stored exactly once."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_trainer.trackers.events import RunEnd
from finetune_trainer.trackers.mongodb import Mongodb
from pod_harness import UID, Pod
from pymongo import MongoClient
from test_tracking import STEPS, make_tracked_pod, read_log_entries

from tests.support.mlflow_runs import MlflowRuns
from tests.support.tiny import make_tiny_model
from tests.support.tracker_servers import TrackerServer, make_mlflow_server, make_mongodb_server
from tests.support.tracking import compute_loss, end_events, log_events, start_events, tracked_run

pytestmark = pytest.mark.faults
PASSWORD = "pa55word"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackerServer]:
    with make_mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(scope="module")
def mongodb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackerServer]:
    with make_mongodb_server(tmp_path_factory.mktemp("mongodb")) as server:
        yield server


def make_tracking_spec(mlflow: TrackerServer, experiment: str, trackers: list[str]) -> dict[str, Any]:
    return {
        "evaluation": {"metrics": ["perplexity"]},
        "tracking": {
            "reportTo": trackers,
            "mlflow": {"trackingUri": f"http://127.0.0.1:{mlflow.port}", "experimentName": experiment},
            **({"mongodb": {"uriSecretRef": {"name": "mongo", "key": "uri"}, "database": experiment}} if "mongodb" in trackers else {}),
        },
    }  # fmt: skip


def find_differences(stored_values: list[tuple[int, float]], expected_values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the values that are missing, wrong or stored too often.

    The tests assert on these few values, because a failed assertion that compares the whole lists would take minutes.
    """
    return sorted((Counter(stored_values) - Counter(expected_values)) + (Counter(expected_values) - Counter(stored_values)))


def count_stored_losses(runs: MlflowRuns) -> int:
    """Return how many loss values the server has stored for the run; 0 before the run exists."""
    return len(runs.history("job_finetuning", "loss")) if "job_finetuning" in runs.names() else 0


def test_the_servers_have_each_step_once_after_a_kill(mlflow: TrackerServer, mongodb: TrackerServer, model: Path, tmp_path: Path) -> None:
    spec = make_tracking_spec(mlflow, "killed", ["mlflow", "mongodb"]) | {"training": {"maxSteps": 4 * STEPS}}
    env = {"MONGODB_URI": f"mongodb://127.0.0.1:{mongodb.port}"}
    runs = MlflowRuns(f"http://127.0.0.1:{mlflow.port}", "killed")
    database = MongoClient("127.0.0.1", mongodb.port)["killed"]
    with make_tracked_pod(tmp_path, model, spec, env=env) as killed_pod:
        killed_pod.wait_committed(10)
        killed_pod.wait_until(lambda: count_stored_losses(runs) > 0 and database.step_metrics.count_documents({}) > 0)
        killed_pod.kill()
    assert runs.run("job").info.status == "RUNNING"
    sent_before = count_stored_losses(runs)
    with make_tracked_pod(tmp_path, model, spec, attempt=2, env=env) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    message = resumed_pod.termination_message()
    logged_lines = [line for line in read_log_entries(tmp_path) if "loss" in line]
    assert len(logged_lines) == 4 * STEPS and sent_before > 0
    # MLflow has one run for the two attempts. Repeated steps have equal values, because CPU runs are deterministic.
    expected_losses = [(line["step"], line["loss"]) for line in logged_lines]
    assert find_differences(runs.history("job_finetuning", "loss"), expected_losses) == []
    assert runs.names() == {"job", "job_finetuning", "job_evaluation"} and {run.info.status for run in runs.all()} == {"FINISHED"}
    perplexity = message.evaluation.metrics["perplexity"].value  # type: ignore[union-attr,index]
    assert runs.run("job").data.metrics["eval_perplexity"] == pytest.approx(perplexity)
    # MongoDB has one document per log line.
    documents = list(database.step_metrics.find({"run_id": UID, "kind": "training"}).sort("step"))
    assert find_differences([(document["step"], document["loss"]) for document in documents], expected_losses) == []
    [run] = database.training_runs.find()
    assert (run["status"], run["attempt"], run["artifacts"]["model"]["uri"]) == ("completed", 2, message.output.uri)  # type: ignore[union-attr]
    assert database.final_metrics.find_one({"phase": "evaluate"})["perplexity"] == pytest.approx(perplexity)  # type: ignore[index]


def read_problem(pod: Pod) -> str | None:
    report = pod.report()
    return report.health.tracker_problem if report is not None else None


def test_a_server_that_is_down_for_a_while_delays_nothing_and_gets_everything(model: Path, tmp_path: Path) -> None:
    server = make_mlflow_server(tmp_path / "mlflow")
    runs = MlflowRuns(f"http://127.0.0.1:{server.port}", "down")
    spec = make_tracking_spec(server, "down", ["mlflow"]) | {"training": {"maxSteps": 5000}}
    with make_tracked_pod(tmp_path, model, spec) as pod:
        pod.wait_until(lambda: read_problem(pod) is not None)
        assert read_problem(pod) == f"TrackerUnavailable: mlflow at http://127.0.0.1:{server.port} could not be reached: the connection was refused"
        step = pod.step()
        pod.wait_step(step + 20)  # training continues
        with server:
            pod.wait_until(lambda: read_problem(pod) is None)
            pod.wait_until(lambda: count_stored_losses(runs) > step)
            pod.terminate()
            assert pod.end() == ExitCode.PREEMPTED_SAVED, pod.text[-6000:]
            history = runs.history("job_finetuning", "loss")
            assert Counter(step for step, _ in history) == Counter(range(1, pod.termination_message().step + 1))  # type: ignore[operator]
            assert {run.info.status for run in runs.all()} == {"SCHEDULED"}


def test_a_server_that_stays_down_is_named_at_the_end_without_its_password(model: Path, tmp_path: Path) -> None:
    spec = {"tracking": {"reportTo": ["mongodb"], "mongodb": {"uriSecretRef": {"name": "mongo", "key": "uri"}}}}
    with make_tracked_pod(tmp_path, model, spec, env={"MONGODB_URI": f"mongodb://user:{PASSWORD}@127.0.0.1:9"}) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    notes = pod.termination_message().resolved.notes or []  # type: ignore[union-attr]
    [note] = [note for note in notes if "mongodb" in note]
    assert note.startswith("mongodb at mongodb://127.0.0.1:9 could not be reached: the connection was refused; values are missing there")
    assert note.endswith(f"/store/team/job/{UID}/metrics/ contains all values")
    written_paths = [pod.folder / "log", pod.folder / "termination-message", *(tmp_path / "store").rglob("*")]
    written_contents = [path.read_bytes() for path in written_paths if path.is_file()]
    assert all(PASSWORD.encode() not in data for data in written_contents)


def test_mongodb_documents_of_repeated_steps_are_replaced(mongodb: TrackerServer) -> None:
    uri = f"mongodb://127.0.0.1:{mongodb.port}"
    first_tracker = Mongodb(tracked_run(), uri, "repeated")
    first_tracker.open()
    first_tracker.send([*start_events(), *log_events(1, 14, evaluated_steps=(10,))])
    first_tracker.send(end_events(14, end=RunEnd.INTERRUPTED))
    database = MongoClient(uri)["repeated"]
    assert database.training_runs.find_one()["status"] == "interrupted"  # type: ignore[index]
    second_tracker = Mongodb(tracked_run(attempt=2, resumed_from_step=10), uri, "repeated")
    second_tracker.open()
    assert database.step_metrics.count_documents({"kind": "training"}) == 10
    second_tracker.open()
    second_tracker.send([*log_events(1, 12, evaluated_steps=(10,)), *end_events(12)])
    documents = list(database.step_metrics.find({"kind": "training"}).sort("step"))
    assert [(document["step"], document["loss"]) for document in documents] == [(step, compute_loss(step)) for step in range(1, 13)]
    assert [document["step"] for document in database.step_metrics.find({"kind": "evaluation"})] == [10]
    [run] = database.training_runs.find()
    assert (run["status"], run["attempt"], run["parameters"]["training_batchSizePerDevice"]) == ("completed", 2, "4")
    assert json.dumps(run["data"][0]) == json.dumps({"context": "training", "source": "s3://bucket/train.jsonl", "digest": "a" * 64})


def test_the_mlflow_server_keeps_one_value_per_step_if_a_response_is_lost(mlflow: TrackerServer) -> None:
    from finetune_trainer.trackers.mlflow import Mlflow

    uri = f"http://127.0.0.1:{mlflow.port}"
    tracker = Mlflow(tracked_run(), uri, "lost")
    tracker.open()
    tracker.send(log_events(1, 700))
    # The response to the first request is lost, so the sender opens the tracker again and repeats the events with a later time.
    tracker.open()
    repeated_events = [event.model_copy(update={"entry": event.entry.model_copy(update={"unix_time": time.time()})}) for event in log_events(1, 700)]  # type: ignore[union-attr]
    tracker.send(repeated_events)
    assert find_differences(MlflowRuns(uri, "lost").history("support-bot_finetuning", "loss"), [(step, compute_loss(step)) for step in range(1, 701)]) == []
