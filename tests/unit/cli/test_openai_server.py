"""The OpenAI server without a cluster: how it converts requests to FineTuneJobs and FineTuneJobs to objects of the OpenAI API, and its keys, files and
failures.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import Phase
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_cli.cluster import Cluster, ClusterError
from finetune_cli.job_storage import ConnectionLost, JobStorage, StorageError
from finetune_cli.mistakes import InvalidInput
from finetune_cli.openai_server import ids, job_objects
from finetune_cli.openai_server.config import ServerConfig, load_config
from finetune_cli.openai_server.failures import RequestFailure, convert_cluster_error, convert_storage_error
from finetune_cli.openai_server.files import ClientFile, FileStore, check_jsonl
from finetune_cli.openai_server.job_requests import build_job, check_models
from finetune_cli.openai_server.keys import Account, KeyTable
from finetune_cli.openai_server.pages import build_page, read_page_request
from finetune_cli.openai_server.results import build_metrics_csv
from finetune_cli.openai_server.service import FineTuningService

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import import_files

GUIDE_FILE = Path(__file__).parents[3] / "docs" / "guides" / "openai.md"
FILE = ClientFile("file-0123456789abcdef01234567", "train.jsonl", 10, "team-a/_files/file-0123456789abcdef01234567/train.jsonl/rows.jsonl")
MESSAGES_ROW, PREFERENCE_ROW = '{"messages": []}', '{"input": {}, "preferred_output": [], "non_preferred_output": []}'
REQUEST = {"model": "gpt-4o-mini", "training_file": FILE.id}
SECRET = "hf_" + "aB3" * 12
JOB_ID = "ftjob-0123456789abcdef01234567"


def build_config(**spec: Any) -> ServerConfig:
    """Return a server configuration with one model. `spec` has further fields for the spec of this model."""
    return ServerConfig.model_validate({
        "storage": {"uri": "s3://models/jobs", "endpoint": "http://s3.example.com"},
        "models": {"gpt-4o-mini": {"spec": {"model": {"source": "org/small"}, **spec}}},
    })  # fmt: skip


def build_finetunejob(request: Any, rows: str = MESSAGES_ROW, **spec: Any) -> dict[str, Any]:
    """Return the FineTuneJob that the server creates for a request. `rows` are the first rows of the training file. `spec` has further fields for the spec of
    the configured model.
    """
    return build_job(
        request, build_config(**spec), JOB_ID, find_file=lambda file_id: FILE if file_id == FILE.id else None,
        read_first_lines=lambda file: [rows], make_file_uri=lambda file: f"s3://models/jobs/{file.key}",
    )  # fmt: skip


def find_refusal(request: Any, rows: str = MESSAGES_ROW, **spec: Any) -> RequestFailure:
    """Return the failure with which the server refuses a request."""
    with pytest.raises(RequestFailure) as refused:
        build_finetunejob(request, rows, **spec)
    return refused.value


def build_supervised_request(**hyperparameters: Any) -> dict[str, Any]:
    return {**REQUEST, "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


# --- from requests to jobs ------------------------------------------------------------------------------------------


def test_request_becomes_a_job() -> None:
    request = {**build_supervised_request(n_epochs=2, batch_size=8, learning_rate_multiplier=2), "seed": 7, "suffix": "-bot", "metadata": {"team": "a"}}
    resources = {"nodePool": "h100", "gpusPerNode": 2}
    placement = {"nodeSelector": {"example.com/zone": "b"}}
    job = build_finetunejob(request, resources=resources, placement=placement, dataset={"maxSequenceLength": 1024})
    assert job["metadata"] == {
        "name": JOB_ID, "labels": {"finetune-operator.io/created-by": "openai-server"},
        "annotations": {"finetune-operator.io/openai-request": json.dumps(request, sort_keys=True), "team": "a"},
    }  # fmt: skip
    spec = job["spec"]
    assert spec["model"] == {"source": "org/small"}
    assert (spec["dataset"]["train"], spec["dataset"]["maxSequenceLength"]) == (f"s3://models/jobs/{FILE.key}", 1024)
    assert spec["training"] == {
        "epochs": 2, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 4e-4, "seed": 7,
    }  # fmt: skip
    assert (spec["resources"], spec["placement"], spec["output"]) == (resources, placement, {"runName": {"suffix": "-bot"}})
    assert spec["storage"] == {"uri": "s3://models/jobs", "endpoint": "http://s3.example.com"}
    FineTuneJobSpec.model_validate(spec)


def test_the_message_contains_all_mistakes_of_a_request() -> None:
    refusal = find_refusal(build_supervised_request(n_epochs=99, batch_size=0))
    assert refusal.param == "method.supervised.hyperparameters.n_epochs"
    assert [line.partition(": ")[0].rpartition(".")[2] for line in refusal.message.splitlines()] == ["n_epochs", "batch_size"]


def test_a_request_and_an_imported_file_become_the_same_job(write_file: WriteFile) -> None:
    request = {**build_supervised_request(n_epochs=2, batch_size=6, learning_rate_multiplier=0.5), "seed": 7}
    file = write_file("job.json", json.dumps({**request, "training_file": f"s3://models/jobs/{FILE.key}"}))
    import_outcome = import_files(file, model_map={"gpt-4o-mini": "org/small"})
    spec = build_finetunejob(request)["spec"]
    del spec["storage"]
    assert spec == import_outcome.documents[0]["spec"]


def test_values_of_the_client_replace_those_of_the_server() -> None:
    training = {"epochs": 1, "learningRate": 1e-5}
    assert build_finetunejob({**REQUEST, "seed": 1}, training=training)["spec"]["training"] == {"epochs": 1, "learningRate": 1e-5, "seed": 1}
    merged_training = build_finetunejob({**build_supervised_request(n_epochs=5, learning_rate_multiplier=3), "seed": 1}, training=training)["spec"]["training"]
    assert merged_training == {"epochs": 5, "learningRate": 3e-5, "seed": 1}


def test_an_absent_seed_becomes_a_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda limit: limit - 1)
    assert build_finetunejob(REQUEST)["spec"]["training"]["seed"] == (1 << 31) - 1
    assert build_finetunejob(REQUEST, training={"seed": 5})["spec"]["training"]["seed"] == 5
    assert build_finetunejob({**REQUEST, "seed": None})["spec"]["training"]["seed"] == (1 << 31) - 1


def test_a_dpo_request_becomes_a_dpo_job() -> None:
    request = {**REQUEST, "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}}
    spec = build_finetunejob(request, PREFERENCE_ROW, trainer={"dpo": {"lossTypes": ["ipo"]}})["spec"]
    assert spec["trainer"] == {"type": "dpo", "dpo": {"beta": 0.2, "lossTypes": ["ipo"]}}
    assert (spec["dataset"]["format"], spec["training"]["epochs"]) == ("preference", 3)
    assert "dpo" not in build_finetunejob(REQUEST, trainer={"dpo": {"beta": 0.3}})["spec"]["trainer"]


def test_a_tracker_needs_a_wandb_key_in_the_configuration() -> None:
    request = {**REQUEST, "integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": "e", "name": "run"}}]}
    tracking = {"wandb": {"apiKeySecretRef": {"name": "wandb", "key": "key"}}}
    assert find_refusal(request).param == "integrations"
    spec = build_finetunejob(request, tracking=tracking)["spec"]
    assert spec["tracking"] == {"reportTo": ["wandb"], "wandb": {**tracking["wandb"], "project": "p", "entity": "e"}}
    assert spec["output"]["runName"] == {"name": "run"}
    assert "tracking" not in build_finetunejob(REQUEST, tracking=tracking)["spec"]
    request_with_name = {**REQUEST, "integrations": [{"type": "wandb", "wandb": {"project": "p", "name": SECRET}}]}
    refusal = find_refusal(request_with_name, tracking=tracking)
    assert (refusal.param, SECRET in refusal.message) == ("integrations", False)
    request_with_tags = {**REQUEST, "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}]}
    refusal = find_refusal(request_with_tags, tracking=tracking)
    assert (refusal.param, refusal.message) == (
        "integrations", "integrations: tags of wandb has no effect: a FineTuneJob has no such field: remove it",
    )  # fmt: skip


METHODS: dict[str, dict[str, Any]] = {
    "reinforcement": {"type": "reinforcement", "reinforcement": {"grader": {}}},
    "other method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}},
    "beta": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}},
    "unknown": {"type": "ppo"},
}


@pytest.mark.parametrize(
    ("request_body", "param", "message"),
    [
        ([], None, "the body of the request is not a JSON object"),
        ({"training_file": FILE.id}, "model", "model is missing: write one of gpt-4o-mini"),
        ({**REQUEST, "model": "gpt-9"}, "model", "this server does not fine-tune the model gpt-9: write one of gpt-4o-mini"),
        ({"model": "gpt-4o-mini"}, "training_file", "training_file is missing: upload a file with /v1/files, and write its id"),
        ({**REQUEST, "validation_file": "file-x"}, "validation_file", "there is no file with the id file-x"),
        ({**REQUEST, "method": METHODS["reinforcement"]}, "method.type", "reinforcement fine-tuning is not possible: this server has no graders"),
        ({**REQUEST, "method": METHODS["other method"]}, "method.dpo", "method.dpo has no effect, because method.type is supervised: remove it"),
        ({**REQUEST, "method": METHODS["beta"]}, "method.supervised.hyperparameters.beta", "beta has no effect"),
        ({**REQUEST, "method": METHODS["unknown"]}, "method.type", '"ppo"'),
        ({**REQUEST, "method": "supervised"}, "method", "method is not an object with a type"),
        ({**REQUEST, "method": {"type": ["dpo"]}}, "method.type", "method.type is not a text: write supervised or dpo"),
        ({**REQUEST, "method": {"type": {"dpo": 1}}}, "method.type", "method.type is not a text"),
        ({**REQUEST, "method": {"type": None}}, "method.type", "method.type is not a text"),
        ({**REQUEST, "method": {"type": "dpo"}}, "training_file", "train.jsonl:1: input, preferred_output, non_preferred_output: the key is missing"),
        (build_supervised_request(learning_rate_multiplier=0), "method.supervised.hyperparameters.learning_rate_multiplier", "allowed: "),
        ({**REQUEST, "hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", '"many"'),
        ({**REQUEST, "n_epochs": 3}, "n_epochs", "unknown key"),
        ({**REQUEST, "status": "queued"}, "status", "status has no effect: the API only reports this field: remove it"),
        ({**REQUEST, "seed": -1}, "seed", "allowed: an integer from 0 to 4294967295"),
        ({**REQUEST, "suffix": ""}, "suffix", "1 to 64 characters"),
        ({**REQUEST, "suffix": "a@b"}, "suffix", ""),
        ({**REQUEST, "metadata": {"a": 1}}, "metadata", "an object with texts"),
        ({**REQUEST, "metadata": {str(number): "" for number in range(17)}}, "metadata", "at most 16 pairs"),
        ({**REQUEST, "metadata": {"a": SECRET}}, "metadata", "looks like a token or password"),
        ({**REQUEST, "metadata": {SECRET: "a"}}, "metadata", "looks like a token or password"),
        ({**REQUEST, "suffix": SECRET}, "suffix", "suffix contains a text that looks like a token or password"),
        ({**REQUEST, "suffix": "a\0b"}, "suffix", "suffix contains a control character: remove it"),
        ({**REQUEST, "suffix": "a\nb"}, "suffix", "suffix contains a control character: remove it"),
        ({**REQUEST, "integrations": "wandb"}, "integrations", "no key for Weights & Biases"),
    ],
)
def test_a_wrong_request_is_refused_with_the_name_of_the_parameter(request_body: Any, param: str | None, message: str) -> None:
    refusal = find_refusal(request_body)
    assert (refusal.status, refusal.param, message in refusal.message) == (HTTPStatus.BAD_REQUEST, param, True), refusal.message
    assert "--" not in refusal.message


# --- configuration and keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "this is not a configuration of this server; write `storage: {uri: s3://bucket/prefix}`"),
        ("storage: {uri: 'file:///a'}\nmodels: {m: {spec: {model: {source: o/m}}}}\n", ":1: storage: storage.uri must be an S3 address: write s3://bucket/prefix"),
        ("storage: {uri: s3://abc}\nmodels:\n  m:\n    spec: {model: {}}\n", "models.m.spec.model.source: the base model is missing"),
        ("storage: {uri: s3://abc}\nmodels:\n  m:\n    spec:\n      model: {source: o/m}\n      trainng: {}\n", ":6: models.m.spec.trainng: "),
        ("storage: {uri: s3://abc}\nmodels:\n  m:\n    spec:\n      model: {source: o/m}\n      suspend: true\n", ":6: models.m.spec.suspend: the server"),
        ("storage: {uri: s3://abc}\nmodels:\n  m:\n    spec:\n      model: {source: o/m}\n      storage: {encryption: {type: s3}}\n",
         ":6: models.m.spec.storage: the server sets this field of each job itself: remove it"),
        ("storage:\n  uri: s3://abc\n  encryption: {type: s3}\nmodels: {m: {spec: {model: {source: o/m}}}}\n",
         ":3: storage.encryption: the server cannot use this field when it writes the files of clients: remove it, and set the default encryption"),
        ("storage:\n  uri: s3://abc\n  caBundleRef: {name: ca, key: ca.crt}\nmodels: {m: {spec: {model: {source: o/m}}}}\n",
         ":3: storage.caBundleRef: the server cannot use this field when it writes the files of clients: remove it, and write an endpoint whose certificate"),
        ("storage: {uri: s3://abc}\n", "server.yaml: models: this required field is missing"),
        ("storage: {uri: s3://abc}\nmodles: {}\n", ":2: modles: unknown key; write `storage:"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused_with_its_line(write_file: WriteFile, text: str, message: str) -> None:
    path = write_file("server.yaml", text)
    with pytest.raises(Exception) as refused:  # noqa: B017, PT011 -- one of two classes, both with the mistakes of the file
        load_config(path)
    mistakes = refused.value.mistakes if isinstance(refused.value, InvalidInput) else [refused.value]
    assert any(message in str(mistake) for mistake in mistakes), [str(mistake) for mistake in mistakes]


def test_models_with_which_no_job_is_valid_are_found_at_the_start() -> None:
    assert check_models(build_config()) == []
    (mistake,) = check_models(build_config(trainer={"dpo": {"labelSmoothing": 0.1}}))
    assert "labelSmoothing has no effect on sigmoid" in mistake.message
    (mistake,) = check_models(build_config(training={"warmupSteps": 5, "warmupRatio": 0.1}))
    assert (mistake.key, "training.warmup" in mistake.message) == ("models.gpt-4o-mini", True), mistake


def test_the_table_of_keys_finds_the_account_of_a_key(write_file: WriteFile) -> None:
    digest = hashlib.sha256(b"sk-1").hexdigest()
    path = write_file("keys.yaml", f"keys:\n  - {{sha256: {digest}, namespace: team-a, serviceAccount: alice}}\n")
    table = KeyTable(path)
    assert table.find_account("sk-1") == Account("team-a", "alice")
    assert Account("team-a", "alice").user == "system:serviceaccount:team-a:alice"
    assert [table.find_account(key) for key in ("sk-2", "", digest, "sk-1\udcff")] == [None] * 4
    entry = f"  - {{sha256: {digest}, namespace: team-b, serviceAccount: bob}}\n"
    with pytest.raises(InvalidInput) as refused:
        KeyTable(write_file("twice.yaml", f"keys:\n{entry}{entry}"))
    assert "entry 2 has the same sha256 as an earlier entry" in str(refused.value.mistakes[0])
    path.unlink()
    with pytest.raises(RequestFailure) as missing:
        table.find_account("sk-1")
    assert (missing.value.status, missing.value.code) == (HTTPStatus.SERVICE_UNAVAILABLE, "keys_unavailable")


def test_files_of_the_guide_are_valid(write_file: WriteFile) -> None:
    texts = dict(re.findall(r"```yaml title=\"(.*?)\"\n(.*?)```", GUIDE_FILE.read_text(encoding="utf-8"), re.DOTALL))
    loaded_config = load_config(write_file("server.yaml", texts["server.yaml"]))
    assert (list(loaded_config.models), check_models(loaded_config)) == (["gpt-4o-mini", "small"], [])
    KeyTable(write_file("keys.yaml", texts["keys.yaml"]))


# --- from jobs to the API's objects ---------------------------------------------------------------------------------


def build_cluster_job(phase: str | None = None, spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    metadata = {"name": JOB_ID, "namespace": "team-a", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    metadata["annotations"] = {"finetune-operator.io/openai-request": json.dumps(build_supervised_request(n_epochs="auto"))}  # type: ignore[assignment]
    return {"metadata": metadata, "spec": spec or {}, "status": {**({"phase": phase} if phase else {}), **status}}


STATUS_BY_PHASE = {
    None: "validating_files", "Preparing": "validating_files", "Validating": "validating_files", "Pending": "queued", "Queued": "queued", "Starting": "queued",
    "Running": "running", "Recovering": "running", "Evaluating": "running", "Uploading": "running", "Suspending": "running", "Suspended": "paused",
    "Cancelled": "cancelled", "Succeeded": "succeeded", "Failed": "failed",
}  # fmt: skip


def test_every_phase_has_a_status_of_the_api() -> None:
    assert {*STATUS_BY_PHASE} == {None, *(str(phase) for phase in Phase if phase is not Phase.CANCELLING)}
    assert {phase: job_objects.build_api_job(build_cluster_job(phase), [])["status"] for phase in STATUS_BY_PHASE} == STATUS_BY_PHASE
    phases = ("Running", "Cancelling", "Succeeded", "Failed")
    statuses_after_cancel = {phase: job_objects.build_api_job(build_cluster_job(phase, {"cancel": True}), [])["status"] for phase in phases}
    assert statuses_after_cancel == {"Running": "cancelled", "Cancelling": "cancelled", "Succeeded": "succeeded", "Failed": "failed"}


def test_results_appear_only_after_the_end_of_the_job() -> None:
    status_fields = {"output": {"uri": "s3://m"}, "progress": {"tokensSeen": 5, "secondsRemaining": 10, "updateTime": "2026-01-01T00:00:00Z"},
              "completionTime": "2026-01-01T00:01:00Z"}  # fmt: skip
    fields = ("fine_tuned_model", "trained_tokens", "finished_at", "result_files", "estimated_finish", "error")
    expected = {
        "Running": (None, None, None, [], 1767225610, None),
        "Succeeded": ("s3://m", 5, 1767225660, ["file-r"], None, None),
        "Cancelled": (None, 5, 1767225660, [], None, None),
        "Failed": (None, 5, 1767225660, [], None, {"code": "failed", "message": "the job ended without success", "param": None}),
    }
    bodies_by_phase = {phase: job_objects.build_api_job(build_cluster_job(phase, **status_fields), ["file-r"]) for phase in expected}
    assert {phase: tuple(body[field] for field in fields) for phase, body in bodies_by_phase.items()} == expected


def test_the_hyperparameters_are_those_that_the_job_uses() -> None:
    body = job_objects.build_api_job(build_cluster_job("Running", {"training": {"epochs": 3}}, resolved={"effectiveBatch": 12}), [])
    assert body["hyperparameters"] == {"n_epochs": 3, "batch_size": 12, "learning_rate_multiplier": "auto"}
    assert body["method"] == {"type": "supervised", "supervised": {"hyperparameters": body["hyperparameters"]}}


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"metadata": [1], "hyperparameters": 3, "method": 4}', '{"method": {"supervised": {"hyperparameters": []}}}', '{"method": {"type": {}}}'],
)
def test_changed_annotation_does_not_hide_the_job(text: str) -> None:
    changed_job = build_cluster_job("Running")
    changed_job["metadata"]["annotations"] = {"finetune-operator.io/openai-request": text}
    body = job_objects.build_api_job(changed_job, [])
    assert (body["status"], body["model"], body["metadata"], body["hyperparameters"]["n_epochs"]) == ("running", "", {}, "auto")


@dataclass(frozen=True)
class ClusterWithOneJob(Cluster):
    """A cluster with one job."""

    job: Any = None

    def get_job(self, name: str) -> Any:
        return self.job


@pytest.mark.parametrize(
    ("storage", "namespace", "is_readable"),
    [
        ({"uri": "s3://models/jobs"}, "team-a", True),
        ({"uri": "s3://models/jobs/"}, "team-a", True),
        ({"uri": "s3://models/jobs-of-others"}, "team-a", False),
        ({"uri": "s3://models"}, "team-a", False),
        ({}, "team-a", False),
    ],
)
def test_metrics_are_read_only_from_the_storage_of_the_server(storage: dict[str, str], namespace: str, is_readable: bool) -> None:
    succeeded_job = build_cluster_job("Succeeded", {"storage": storage})
    succeeded_job["metadata"]["labels"] = {"finetune-operator.io/created-by": "openai-server"}
    service = FineTuningService(build_config(), ClusterWithOneJob(None, "default", job=succeeded_job))
    expected = [ids.to_result_file_id(JOB_ID)] if is_readable else []
    assert service.get_job(Account(namespace, "alice"), JOB_ID)["result_files"] == expected
    if not is_readable:
        with pytest.raises(RequestFailure) as missing:
            service.read_file(Account(namespace, "alice"), ids.to_result_file_id(JOB_ID))
        assert missing.value.status == HTTPStatus.NOT_FOUND


def write_metrics(folder: Path, name: str, content: bytes) -> JobStorage:
    """Write a metrics file of the job `team-a/run`, and return the storage that contains it."""
    (folder / "team-a/run/metrics").mkdir(parents=True, exist_ok=True)
    (folder / "team-a/run/metrics" / name).write_bytes(content)
    return JobStorage(f"file://{folder}", StorageRoot())


def test_damaged_lines_of_metrics_are_skipped(tmp_path: Path) -> None:
    damaged_lines = b'{"train_runtime": 3}\n[1]\n\n\xff\n{"step": "2"}\n{"step": null}\n{"step": true}\n{"step": NaN}\n' + b"[" * 100_000 + b'\n{"step": 2, "lo'
    write_metrics(tmp_path, "a1-1.jsonl", b'{"step": 1, "loss": 3.0}\n' + damaged_lines)
    storage = write_metrics(tmp_path, "a2-1.jsonl", b'{"step": 2, "note": "a\xe2\x80\xa8b"}\n')
    assert build_metrics_csv(storage, "team-a/run").decode() == "step,train_loss,valid_loss,note\n1,3.0,,\n2,,,a\u2028b\n"


def test_rows_of_the_test_set_are_not_read_as_metrics(tmp_path: Path) -> None:
    write_metrics(tmp_path, "test_split.jsonl", b'{"step": 0, "text": "private"}\n')
    storage = write_metrics(tmp_path, "a1-1.jsonl", b'{"step": 1, "loss": 3.0}\n')
    assert build_metrics_csv(storage, "team-a/run") == b"step,train_loss,valid_loss\n1,3.0,\n"


def test_too_large_metrics_are_refused(tmp_path: Path) -> None:
    write_metrics(tmp_path, "a1-1.jsonl", b" " * (8 << 20))
    storage = write_metrics(tmp_path, "a2-1.jsonl", b" " * (8 << 20))
    assert build_metrics_csv(storage, "team-a/run") == b"step,train_loss,valid_loss\n"
    write_metrics(tmp_path, "a2-1.jsonl", b" " * (9 << 20))
    with pytest.raises(RequestFailure) as refused:
        build_metrics_csv(storage, "team-a/run")
    assert (refused.value.status, refused.value.code, refused.value.message) == (
        HTTPStatus.BAD_REQUEST, "result_file_too_large",
        f"the metrics of this job have 17.0 MiB, and this server reads at most 16 MiB: read them in file://{tmp_path}/team-a/run/metrics",
    )  # fmt: skip


# --- pages, ids, files, failures ------------------------------------------------------------------------------------


def test_a_page_begins_after_an_id_and_has_at_most_limit_objects() -> None:
    items = [{"id": str(number)} for number in range(5)]
    page = build_page(items, read_page_request({"limit": "2", "after": "1"}, 20))
    assert ([item["id"] for item in page["data"]], page["has_more"], page["first_id"], page["last_id"]) == (["2", "3"], True, "2", "3")
    last_page = build_page(items, read_page_request({"after": "3"}, 20))
    assert ([item["id"] for item in last_page["data"]], last_page["has_more"]) == (["4"], False)
    assert build_page([], read_page_request({}, 20)) == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    for limit in ("0", "-1", "x", "10001", "²"):
        with pytest.raises(RequestFailure) as refused:
            read_page_request({"limit": limit}, 20)
        assert refused.value.param == "limit"


def test_ids_contain_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_767_225_600_123_000_000)
    file_id = ids.new_id("file-")
    assert (file_id[:17], len(file_id), ids.read_creation_time(file_id)) == ("file-019b76daa87b", 29, 1767225600)
    assert (ids.has_prefix(file_id, "file-"), ids.has_prefix(file_id, "ftjob-"), ids.has_prefix(file_id + "\n", "file-")) == (True, False, False)
    assert ids.to_job_id(ids.to_result_file_id(JOB_ID)) == JOB_ID


def test_first_rows_end_only_at_newlines(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "one\u2028two\x85three"}]}, ensure_ascii=False)
    rows_path = tmp_path / "rows"
    rows_path.write_text(f"{row}\n{row}", encoding="utf-8")
    store = FileStore(JobStorage(f"file://{tmp_path}/store", StorageRoot()))
    assert store.read_first_lines(store.add("team-a", "a", rows_path)) == [row, row]


def test_a_row_with_more_than_two_mebibytes_is_refused(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows"
    row = json.dumps({"a": "x" * ((2 << 20) - 10)}).encode() + b"\n"
    rows_path.write_bytes(b"{}\n" + row)
    assert len(row) == 2 << 20
    check_jsonl(rows_path)
    rows_path.write_bytes(b"{}\n" + row[:-1] + b" \n")
    with pytest.raises(RequestFailure) as refused:
        check_jsonl(rows_path)
    assert (refused.value.status, refused.value.param, refused.value.code, refused.value.message) == (
        HTTPStatus.BAD_REQUEST, "file", "invalid_file", "line 2 is longer than 2 MiB: write one JSON object in each line",
    )  # fmt: skip


def test_only_one_file_is_checked_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class RecordingLock:
        def __enter__(self) -> None:
            steps.append("lock")

        def __exit__(self, *error: object) -> None:
            steps.append("unlock")

    def refuse_rows(path: Path) -> None:
        steps.append(path.name)
        raise RequestFailure(HTTPStatus.BAD_REQUEST, "wrong row", code="invalid_file")

    service = FineTuningService(build_config(), Cluster(None, "default"))
    assert isinstance(getattr(service, "_row_check_lock", None), type(threading.Lock()))
    monkeypatch.setattr(service, "_row_check_lock", RecordingLock())
    monkeypatch.setattr("finetune_cli.openai_server.service.check_jsonl", refuse_rows)
    with pytest.raises(RequestFailure):
        service.add_file(Account("team-a", "alice"), "a", tmp_path / "rows")
    assert steps == ["lock", "rows", "unlock"]


@pytest.mark.parametrize("name", ["train.jsonl", "a b/ü=%2F.jsonl", "..", "~x", "upload"])
def test_a_stored_file_keeps_its_name(tmp_path: Path, name: str) -> None:
    rows_path = tmp_path / "rows"
    rows_path.write_text(MESSAGES_ROW)
    store = FileStore(JobStorage(f"file://{tmp_path}/store", StorageRoot()))
    file = store.add("team-a", name, rows_path)
    assert store.list_files("team-a") == [file]
    assert (file.name, file.size, file.key.count("/"), file.key.split("/")[:2]) == (name, len(MESSAGES_ROW), 4, ["team-a", "_files"])
    assert abs(file.created_at - datetime.now(UTC).timestamp()) < 60
    build_finetunejob({**REQUEST, "training_file": FILE.id})
    assert FineTuneJobSpec.model_validate({"model": {"source": "o/m"}, "dataset": {"train": f"s3://abc/{file.key}"}})
    assert (store.find("team-b", file.id), store.find("team-a", f"../team-a/_files/{file.id}")) == (None, None)


@pytest.mark.parametrize(
    ("code", "message", "status", "api_code"),
    [
        (403, 'serviceaccounts "a" is forbidden: User "s" cannot impersonate resource "serviceaccounts"', 500, "impersonation_forbidden"),
        (403, "finetunejobs is forbidden", 403, "forbidden"),
        (401, "log in again", 500, "server_credentials"),
        (409, "exists", 409, "conflict"),
        (422, 'FineTuneJob.finetune-operator.io "x" is invalid: spec: wrong', 400, "invalid_job"),
        (0, "the API server cannot be reached", 503, "cluster_unavailable"),
        (500, "etcd", 503, "cluster_unavailable"),
    ],
)
def test_an_error_of_kubernetes_becomes_a_status_and_a_code(code: int, message: str, status: int, api_code: str) -> None:
    failure = convert_cluster_error(ClusterError(message, code), "system:serviceaccount:a:b")
    assert (failure.status, failure.code, "is invalid: " in failure.message) == (status, api_code, False)


def test_an_error_of_the_storage_becomes_an_error_object_without_secrets() -> None:
    assert convert_storage_error(ConnectionLost("x")).status == HTTPStatus.SERVICE_UNAVAILABLE
    failure = convert_storage_error(StorageError("http://key:secret@s3.example.com: AccessDenied"))
    assert failure.to_body() == {
        "error": {
            "message": "the storage of this server refused the request: http://***@s3.example.com: AccessDenied",
            "type": "server_error", "param": None, "code": "storage_refused",
        }
    }  # fmt: skip
