"""Commands of `finetune` against a real API server: their effects, output and exit codes."""

from __future__ import annotations

import json
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from ruamel.yaml import YAML

from tests.integration.cli.conftest import Result, condition, set_status
from tests.support.kubeapi import KubeApi
from tests.unit.cli.conftest import JOB as PLAIN

Finetune = Callable[..., Result]
Job = Callable[..., dict[str, Any]]
JOB = PLAIN + "  training: {learningRate: 2e-4}\n"
SECRET = "apiVersion: v1\nkind: Secret\nmetadata: {name: hub}\nstringData: {token: hf_abcdefgh}\n---\n"
FAILED_STATUS = {
    "phase": "Failed",
    "conditions": [condition("Finished"), condition("Succeeded", "False"), condition("Stalled", message="no rows", reason="DataError")],
    "failure": {"class": "Data", "code": "DatasetEmpty", "message": "no rows are left", "hint": "give more rows", "rank": 0, "exitCode": 65},
}  # fmt: skip
SUCCEEDED_STATUS = {"phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")]}
RUNNING_STATUS = {
    "phase": "Running", "conditions": [condition("Reconciling", message="step 120")], "attempt": 2, "restarts": 1,
    "progress": {"step": 120, "totalSteps": 500, "percent": 24, "display": "120/500 (24%)", "eta": "1h12m", "tokensPerSecond": 1000.0},
    "metrics": {"trainLoss": 1.5, "evalLoss": 1.7},
    "attempts": [{"number": 1, "reason": "Preempted", "exitCode": 75, "lastStep": 100, "node": "n1"}, {"number": 2, "resumedFromStep": 100}],
    "checkpoints": [{"step": 100, "uri": "s3://models/x/checkpoints/step-00000100/a1-1", "healthy": True, "bytes": 2048, "evalLoss": 1.75}],
}  # fmt: skip


def write_file(folder: Path, text: str, name: str = "job.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- submit ---------------------------------------------------------------------------------------------------------


def test_submit_creates_the_job_and_its_secret(
    finetune: Finetune, api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    result = finetune("submit", write_file(tmp_path, SECRET + JOB))
    assert (result.code, result.err) == (0, "")
    assert (
        result.out == f"secret hub applied in namespace {namespace}\nfinetunejob bot created in namespace {namespace}\n"
    )
    assert api.get(names.PLURAL, namespace, "bot")["spec"]["training"] == {"learningRate": 0.0002}
    assert api.find("secrets", namespace, "hub") is not None


def test_the_server_and_the_command_line_read_nulls_and_merge_keys_alike(
    finetune: Finetune, api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    text = JOB + "  method: ~\n  checkpoint: {<<: {steps: 30}}\n  evaluation: {steps: ~}\n"
    assert finetune("submit", write_file(tmp_path, text)).code == 0
    spec = api.get(names.PLURAL, namespace, "bot")["spec"]
    assert (spec["checkpoint"], spec["evaluation"], "method" in spec) == ({"steps": 30}, {}, False)


def test_submit_dry_run_stores_nothing(finetune: Finetune, api: KubeApi, namespace: str, tmp_path: Path) -> None:
    assert finetune("submit", write_file(tmp_path, JOB), "--dry-run").code == 0
    assert api.find(names.PLURAL, namespace, "bot") is None


def test_submit_refuses_offline_what_the_server_refuses(
    finetune: Finetune, api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    result = finetune("submit", write_file(tmp_path, JOB.replace("learningRate: 2e-4", "learningRat: 2e-4, epochs: 0")))
    assert result.code == 1
    assert "spec.training.learningRat: unknown field; did you mean spec.training.learningRate?" in result.err
    assert "spec.training.epochs: 0: should be greater than 0" in result.err
    assert api.find(names.PLURAL, namespace, "bot") is None


def test_submit_of_an_existing_name_is_refused(finetune: Finetune, job: Job, tmp_path: Path) -> None:
    job()
    result = finetune("submit", write_file(tmp_path, JOB))
    assert result.code == 1
    assert "already exists; use another name, or create a new job" in result.err


# --- watching --------------------------------------------------------------------------------------------------------


def test_get_shows_the_columns_that_the_server_defines(finetune: Finetune, job: Job) -> None:
    job(status=RUNNING_STATUS)
    header, row = finetune("get").out.splitlines()
    assert header.split() == ["NAME", "STATUS", "PROGRESS", "LOSS", "ETA", "WORKERS", "RESTARTS", "REASON", "AGE"]
    assert row.split()[:3] == ["bot", "Running", "120/500"]
    assert "MODEL" in finetune("get", "-o", "wide").out
    assert finetune("get", "-o", "name").out == "finetunejobs.finetune-operator.io/bot\n"
    assert json.loads(finetune("get", "bot", "-o", "json").out)["spec"]["model"] == {"source": "org/m"}
    assert YAML(typ="safe").load(finetune("get", "-o", "yaml").out)["kind"] == "List"
    assert "bot" in finetune("get", "-A", default_namespace=False).out


def test_get_reports_missing_jobs_and_unknown_formats(finetune: Finetune) -> None:
    assert "there are no FineTuneJobs in namespace" in finetune("get").err
    assert finetune("get", "nobody") == Result(1, "", 'error: finetunejobs.finetune-operator.io "nobody" not found\n')
    assert "-o table: unknown output format; write one of yaml, json, wide, cost, name" in finetune("get", "-o", "table").err


def test_status_shows_progress_attempts_and_checkpoints(finetune: Finetune, job: Job, namespace: str) -> None:
    job(status=RUNNING_STATUS)
    result = finetune("status", "bot")
    assert result.code == 0
    assert f"{namespace}/bot  Running\n  R: step 120\n" in result.out
    assert "progress  ███████░░░░░░░░░░░░░░░░░░░░░░░ 120/500 (24%), 1h12m left" in result.out
    assert "loss      train 1.5, validation 1.7" in result.out
    assert "1        Preempted              75    -          100        -     n1" in result.out
    assert "100       yes      1.75      2.0 KiB     -     s3://models/x/checkpoints/step-00000100/a1-1" in result.out


def test_status_of_a_failed_job_exits_with_2_and_shows_the_hint(finetune: Finetune, job: Job) -> None:
    job(status=FAILED_STATUS)
    result = finetune("status", "bot")
    assert result.code == 2
    assert (
        "failure   Data DatasetEmpty: no rows are left (rank 0, exit code 65)\n          give more rows" in result.out
    )


def test_status_with_watch_exits_when_the_job_ends(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    job(status=RUNNING_STATUS)
    threading.Timer(1.0, lambda: set_status(api, namespace, "bot", SUCCEEDED_STATUS)).start()
    result = finetune("status", "bot", "--watch")
    assert result.code == 0
    assert "bot  Running" in result.out
    assert "bot  Succeeded" in result.out


@pytest.mark.parametrize(("status", "code"), [(SUCCEEDED_STATUS, 0), (FAILED_STATUS, 2)])
def test_wait_exits_when_the_job_ends(finetune: Finetune, job: Job, status: dict[str, Any], code: int) -> None:
    job(status=status)
    assert finetune("wait", "bot").code == code


def test_wait_exits_at_the_condition_or_the_timeout(finetune: Finetune, job: Job) -> None:
    job(status=RUNNING_STATUS)
    assert finetune("wait", "bot", "--for", "running").code == 0
    assert finetune("wait", "bot", "--for", "reconciling").code == 0
    assert "bot is not Finished after 1 s\n" in finetune("wait", "bot", "--timeout", "1").err
    assert (
        "--for nonsense: unknown condition; write one of running, Accepted"
        in finetune("wait", "bot", "--for", "nonsense").err
    )


@pytest.mark.parametrize(
    ("goal", "exit_code", "expected_output"),
    [
        ("condition=Reconciling", 0, "bot: Running\n"), ("condition=reconciling=true", 0, "bot: Running\n"),
        ("jsonpath={.status.phase}=Running", 0, "bot: Running\n"), ("jsonpath='{.status.attempt}'=2", 0, "bot: Running\n"),
        ("jsonpath={.status.progress.step}", 0, "bot: Running\n"), ("create", 0, "bot: created\n"), ("condition=Suspended", 1, ""),
        ("jsonpath={.status.phase}=Failed", 1, ""), ("delete", 1, ""),
    ],
)  # fmt: skip
def test_wait_accepts_the_forms_of_kubectl_wait(finetune: Finetune, job: Job, goal: str, exit_code: int, expected_output: str) -> None:
    job(status=RUNNING_STATUS)
    result = finetune("wait", "bot", f"--for={goal}", "--timeout=0s")
    assert (result.code, result.out) == (exit_code, expected_output)
    assert result.err == ("" if exit_code == 0 else f"error: bot is not {'deleted' if goal == 'delete' else goal.removeprefix('condition=')} after 0s\n")


@pytest.mark.parametrize(
    ("goal", "code"),
    [("condition=Finished", 2), ("condition=Succeeded=False", 0), ("condition=Stalled", 0), ("jsonpath=.status.phase=Failed", 0),
     ("jsonpath=.status.phase=Running", 2), ("running", 2)],
)  # fmt: skip
def test_wait_for_a_failed_job_exits_with_2_unless_it_waits_for_the_failure(finetune: Finetune, job: Job, goal: str, code: int) -> None:
    job(status=FAILED_STATUS)
    result = finetune("wait", "bot", "--for", goal)
    assert (result.code, result.out, result.err) == ((0, "bot: Failed\n", "") if code == 0 else (2, "", "error: bot has ended (Failed)\n"))


def test_wait_for_creation_and_deletion(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    assert finetune("wait", "bot", "--for=delete") == Result(0, "bot: deleted\n", "")
    assert finetune("wait", "bot", "--for=create", "--timeout=1s").err == "error: bot is not created after 1s\n"
    threading.Timer(0.5, job).start()
    assert finetune("wait", "bot", "--for=create").out == "bot: created\n"
    threading.Timer(0.5, lambda: api.delete(names.PLURAL, namespace, "bot")).start()
    assert finetune("wait", "bot", "--for=delete").out == "bot: deleted\n"


def test_events_of_the_job_are_listed(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    created_job = job()
    assert "bot has no events" in finetune("events", "bot").err
    regarding = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": "bot",
        "namespace": namespace,
        "uid": created_job["metadata"]["uid"],
    }
    api.create("events", namespace, {
        "metadata": {"name": "e1"}, "eventTime": "2026-01-01T00:00:00.000000Z", "reportingController": "t", "reportingInstance": "t",
        "action": "a", "reason": "AttemptStarted", "type": "Normal", "note": "attempt 1 was started", "regarding": regarding,
    })  # fmt: skip
    assert "AttemptStarted" in finetune("events", "bot").out
    assert "FineTuneJob/bot" in finetune("events", "bot").out


# --- changing -------------------------------------------------------------------------------------------------------


def test_suspend_resume_and_cancel_change_the_spec(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    job(status=RUNNING_STATUS)
    assert finetune("suspend", "bot").out == "bot: saving a checkpoint, then the GPUs are released\n"
    assert api.get(names.PLURAL, namespace, "bot")["spec"]["suspend"] is True
    assert "nothing to change, suspend is already true" in finetune("suspend", "bot").err
    assert finetune("resume", "bot").code == 0
    assert api.get(names.PLURAL, namespace, "bot")["spec"]["suspend"] is False
    assert "confirm with --yes" in finetune("cancel", "bot").err
    assert finetune("cancel", "bot", "--yes").code == 0
    assert api.get(names.PLURAL, namespace, "bot")["spec"]["cancel"] is True


def test_a_finished_job_is_not_changed(finetune: Finetune, job: Job) -> None:
    job(status=SUCCEEDED_STATUS)
    assert finetune("suspend", "bot").err == "error: bot has already ended: Succeeded\n"


def test_rerun_names_the_old_job_in_annotations(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    old_job = job(status=RUNNING_STATUS, suspend=True)
    result = finetune(
        "rerun", "bot", "--from-checkpoint", "100", "--set", "training.epochs=2", "--set", "method.lora.rank=4"
    )
    assert result.out == f"bot-2 created from bot in namespace {namespace}\n"
    new_object = api.get(names.PLURAL, namespace, "bot-2")
    assert new_object["spec"]["checkpoint"] == {"resume": "s3://models/x/checkpoints/step-00000100/a1-1"}
    assert (new_object["spec"]["training"], new_object["spec"]["method"]) == ({"epochs": 2}, {"lora": {"rank": 4}})
    assert new_object["spec"]["suspend"] is False
    assert new_object["metadata"]["annotations"] == {
        names.Annotation.RERUN_OF: f"bot/{old_job['metadata']['uid']}", names.Annotation.FROM_STEP: "100",
    }  # fmt: skip
    assert finetune("rerun", "bot").out.startswith("bot-3 created")


def test_rerun_of_a_prepared_job_trains_even_if_a_deleted_job_had_the_new_name(finetune: Finetune, job: Job) -> None:
    job(status=RUNNING_STATUS | {"preparation": {"number": 1, "reason": "Prepared"}})
    assert "onExistingResult: train" in finetune("rerun", "bot", "--dry-run").out
    assert "onExistingResult: adopt" in finetune("rerun", "bot", "--set", "policy.onExistingResult=adopt", "--dry-run").out


def test_rerun_of_a_job_with_pickled_checkpoints_trusts_that_jobs_checkpoint(finetune: Finetune, job: Job) -> None:
    job(status=RUNNING_STATUS, distributed={"strategy": "fsdp"}, resources={"gpusPerNode": 2})
    manifest = finetune("rerun", "bot", "--from-checkpoint", "100", "--dry-run").out
    assert "resume: s3://models/x/checkpoints/step-00000100/a1-1" in manifest and "allowPickle: true" in manifest
    assert "allowPickle" not in finetune("rerun", "bot", "--dry-run").out


def test_rerun_refuses_unknown_checkpoints_and_fields(finetune: Finetune, job: Job) -> None:
    job(status=RUNNING_STATUS)
    assert (
        "the status of bot lists no checkpoint of step 7, only: 100"
        in finetune("rerun", "bot", "--from-checkpoint", "7").err
    )
    assert (
        "--set: training.epoch: unknown field; did you mean training.epochs?"
        in finetune("rerun", "bot", "--set", "training.epoch=1").err
    )


def test_diff_lists_the_changed_fields(finetune: Finetune, job: Job) -> None:
    job("a", training={"epochs": 2})
    job("b", training={"epochs": 5})
    assert finetune("diff", "a", "b").out == "training.epochs  2.0  ->  5.0\n"


# --- pods -----------------------------------------------------------------------------------------------------------


def pod(name: str, attempt: int, index: int) -> dict[str, Any]:
    labels = {
        names.Label.JOB_NAME: "bot",
        names.Label.ATTEMPT: str(attempt),
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": names.TRAINER_CONTAINER, "image": "x"}]},
    }


def test_logs_reports_missing_pods_attempts_and_ranks(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    job()
    assert "bot has no pods" in finetune("logs", "bot").err
    api.create("pods", namespace, pod("bot-1-0", 1, 0))
    api.create("pods", namespace, pod("bot-2-0", 2, 0))
    api.create("pods", namespace, pod("bot-2-1", 2, 1))
    assert finetune("logs", "bot") == Result(0, "", "")
    assert "only of 1, 2" in finetune("logs", "bot", "--attempt", "9").err
    assert "no pod with rank 5" in finetune("logs", "bot", "--rank", "5").err


def test_a_support_bundle_contains_everything_except_secrets(
    finetune: Finetune, job: Job, api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    job(
        placement={
            "env": [
                {"name": "MY_TOKEN", "value": "plainsecret"},
                {"name": "X", "value": "hf_abcdefghij"},
                {"name": "Y", "value": "kept"},
            ]
        },
        status=FAILED_STATUS,
    )
    api.create("pods", namespace, pod("bot-1-0", 1, 0))
    archive = tmp_path / "r.tar.gz"
    assert finetune("support-bundle", "bot", "-o", str(archive)).code == 0
    with tarfile.open(archive) as members:
        texts = {
            member.name.partition("/")[2]: members.extractfile(member).read().decode()
            for member in members.getmembers()
        }  # type: ignore[union-attr]  # every member of the archive is a file
    assert set(texts) == {"job.yaml", "status.txt", "pods.yaml", "events.txt", "versions.json", "logs/bot-1-0.txt"}
    all_text = "".join(texts.values())
    assert ("plainsecret" in all_text, "hf_abcdefghij" in all_text, "kept" in all_text) == (False, False, True)
    assert "DatasetEmpty" in texts["job.yaml"]


# --- connections ----------------------------------------------------------------------------------------------------


def test_an_unreachable_server_is_reported(finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    result = finetune("get", "--kubeconfig", write_file(tmp_path, json.dumps(kubeconfig), "k"))
    assert result.code == 1
    assert result.err.startswith("error: the API server at https://127.0.0.1:1 cannot be reached: ")


def test_a_missing_kubeconfig_is_reported(finetune: Finetune, tmp_path: Path) -> None:
    result = finetune("get", "--kubeconfig", str(tmp_path / "none"))
    assert (result.code, result.err.startswith("error: no cluster: ")) == (1, True)


def test_a_job_name_may_follow_the_resource_name(finetune: Finetune, job: Job) -> None:
    job("bot", status={"phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")]})
    printed_name = finetune("get", "-o", "name").out.strip()
    assert finetune("status", printed_name).out == finetune("status", "bot").out
    assert finetune("wait", printed_name, "--timeout", "0").code == 0
    result = finetune("wait", "bot", "--for", "Suspended", "--timeout", "0")
    assert (result.code, result.out) == (1, "")
    assert "has ended (Succeeded) and cannot become Suspended" in result.err
    result = finetune("get", "bot", "-A", default_namespace=False)
    assert (result.code, result.out) == (1, "")


def test_get_with_output_name_prints_nothing_if_there_are_no_jobs(finetune: Finetune) -> None:
    result = finetune("get", "-o", "name")
    assert (result.code, result.out) == (0, "")
