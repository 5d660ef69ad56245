"""The official `openai` client calls `finetune serve-openai`, which uses a real API server and a real S3 server.

No operator is running, so the tests write the status of the jobs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import urllib3
from aiohttp import web
from finetune_api import names
from finetune_cli.cluster import Cluster, connect
from finetune_cli.openai_server.app import create_app
from finetune_cli.openai_server.config import ServerConfig
from finetune_cli.openai_server.keys import KeyTable
from finetune_cli.openai_server.service import FineTuningService
from ruamel.yaml import YAML

from localcluster import Endpoint, S3Endpoint
from tests.integration.cli.conftest import Result, condition, set_status
from tests.support.kubeapi import KubeApi

ROOT = Path(__file__).parents[3]
GUIDE_FILE = ROOT / "docs" / "guides" / "openai.md"
USER_KEY, READER_KEY = "sk-user-0123456789abcdef", "sk-reader-0123456789abcdef"
OTHER_KEY, FOREIGN_KEY = "sk-other-0123456789abcdef", "sk-foreign-0123456789abcdef"
ACCOUNTS = {
    USER_KEY: ("openai-a", "client"), READER_KEY: ("openai-a", "reader"), OTHER_KEY: ("openai-b", "client"), FOREIGN_KEY: ("openai-b", "boss"),
}  # fmt: skip
ROWS = b'{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}\n' * 3
FILE_PART = b'--a\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\r\n'
PREFERENCE_ROWS = b'{"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}\n'


class RunningServer:
    """A `serve-openai` server that runs in its own thread, with its own event loop."""

    def __init__(self, app: web.Application):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = web.AppRunner(app, access_log=None)
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@dataclass(frozen=True)
class Installation:
    """A running server, its kubeconfig, the file with its clients' API keys, and the namespaces of the clients."""

    server: RunningServer
    kubeconfig: Path
    keys: Path
    namespace: str
    other_namespace: str

    def client(self, key: str = USER_KEY) -> openai.OpenAI:
        """Return the official client, configured only with a base URL and an API key."""
        return openai.OpenAI(base_url=self.server.url, api_key=key)


@pytest.fixture(scope="module")
def installation(
    control_plane: Endpoint, api: KubeApi, s3_server: S3Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Start the server as a ServiceAccount whose only right is to impersonate the clients' two ServiceAccounts in each namespace."""
    folder = tmp_path_factory.mktemp("openai")
    namespaces = ("openai-a", "openai-b")
    for namespace in namespaces:
        api.create("namespaces", None, {"metadata": {"name": namespace}})
        create_role_and_account(api, namespace, "client", read_documented_rules())
        create_role_and_account(api, namespace, "reader", [{"apiGroups": [names.GROUP], "resources": ["finetunejobs"], "verbs": ["get", "list"]}])
        impersonation_rule = {"apiGroups": [""], "resources": ["serviceaccounts"], "resourceNames": ["client", "reader"], "verbs": ["impersonate"]}
        create_role_and_account(api, namespace, "server", [impersonation_rule], account=("openai-a", "server"))
    keys = folder / "keys.yaml"
    write_keys(keys, ACCOUNTS)
    s3_server.client().create_bucket(Bucket="openai")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        service = FineTuningService(build_config(s3_server), connect_as_server(control_plane, api, folder / "kubeconfig"))
        server = RunningServer(create_app(service, KeyTable(keys)))
        yield Installation(server, folder / "kubeconfig", keys, *namespaces)
        server.stop()


def read_documented_rules() -> list[dict[str, Any]]:
    """Return the rules of the role that the guide creates for clients."""
    (text,) = re.findall(r"```yaml\n(apiVersion: v1\nkind: ServiceAccount.*?)```", GUIDE_FILE.read_text(encoding="utf-8"), re.DOTALL)
    return next(list(item["rules"]) for item in YAML(typ="safe").load_all(text) if item["kind"] == "Role")


def create_role_and_account(api: KubeApi, namespace: str, name: str, rules: list[dict[str, Any]], account: tuple[str, str] | None = None) -> None:
    """Create a role and bind it to a ServiceAccount. Create the ServiceAccount too, unless `account` names one in another namespace."""
    account_namespace, account_name = account or (namespace, name)
    if account_namespace == namespace:
        api.create("serviceaccounts", namespace, {"metadata": {"name": account_name}})
    api.create("roles", namespace, {"metadata": {"name": name}, "rules": rules})
    api.create("rolebindings", namespace, {
        "metadata": {"name": name}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": account_name, "namespace": account_namespace}],
    })  # fmt: skip


def write_keys(path: Path, accounts: dict[str, tuple[str, str]]) -> None:
    entries = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "namespace": namespace, "serviceAccount": name} for key, (namespace, name) in accounts.items()
    ]
    path.write_text(json.dumps({"keys": entries}), encoding="utf-8")


def build_config(s3_server: S3Endpoint) -> ServerConfig:
    model = {"model": {"source": "org/small"}, "method": {"type": "lora"}, "resources": {"gpusPerNode": 2, "nodePool": "h100"}}
    tracked_model = {**model, "tracking": {"wandb": {"apiKeySecretRef": {"name": "wandb", "key": "key"}}}}
    return ServerConfig.model_validate({
        "storage": {"uri": "s3://openai/jobs", "endpoint": s3_server.host_url, "credentialsSecretRef": {"name": "s3"}},
        "models": {"gpt-4o-mini": {"spec": model}, "tracked": {"spec": tracked_model}},
        "maxFileBytes": 100_000,
    })  # fmt: skip


def connect_as_server(control_plane: Endpoint, api: KubeApi, kubeconfig: Path) -> Cluster:
    """Write a kubeconfig with a token of the server's own ServiceAccount, and return a connection that uses it."""
    path = "/api/v1/namespaces/openai-a/serviceaccounts/server/token"
    response = api.request("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
    yaml = YAML(typ="safe")
    kubeconfig_content = yaml.load(control_plane.kubeconfig.read_text(encoding="utf-8"))
    for user in kubeconfig_content["users"]:
        user["user"] = {"token": response.body["status"]["token"]}
    with kubeconfig.open("w", encoding="utf-8") as file:
        yaml.dump(kubeconfig_content, file)
    return connect(None, None, kubeconfig)


def upload(client: openai.OpenAI, rows: bytes = ROWS, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, rows), purpose="fine-tune").id


@pytest.fixture
def job_id(installation: Installation) -> str:
    """Create a job, and return its id."""
    client = installation.client()
    return client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=upload(client)).id


# --- all calls of the API -------------------------------------------------------------------------------------------


def test_the_openai_client_works_with_only_another_base_url_and_key(installation: Installation, api: KubeApi) -> None:
    client = installation.client()
    file = client.files.create(file=("täglich 1.jsonl", ROWS), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("täglich 1.jsonl", len(ROWS), "fine-tune", "processed")

    created_job = client.fine_tuning.jobs.create(
        model="gpt-4o-mini", training_file=file.id, validation_file=file.id, suffix="bot", seed=7, metadata={"team": "support"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.5}}},
    )  # fmt: skip
    assert (created_job.status, created_job.object, created_job.fine_tuned_model, created_job.seed) == ("validating_files", "fine_tuning.job", None, 7)
    assert (created_job.organization_id, created_job.model) == ("openai-a", "gpt-4o-mini")
    assert (created_job.training_file, created_job.metadata) == (file.id, {"team": "support"})

    running_job = mark_running(api, installation, created_job.id)
    job = client.fine_tuning.jobs.retrieve(created_job.id)
    assert (job.status, job.trained_tokens, job.estimated_finish) == ("running", None, 1767225660)
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.5}
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1).data] == [created_job.id]
    events = client.fine_tuning.jobs.list_events(created_job.id).data
    assert [(event.level, event.type, event.message) for event in events] == [
        ("warn", "message", "no node is free"), ("info", "message", "Created fine-tuning job"), ("info", "metrics", "Step 20/40: training loss=1.25"),
    ]  # fmt: skip
    checkpoints = client.fine_tuning.jobs.checkpoints.list(created_job.id).data
    assert [(point.step_number, point.fine_tuned_model_checkpoint, point.metrics.full_valid_loss) for point in checkpoints] == [
        (20, "s3://openai/b", 1.5), (10, "s3://openai/a", None),
    ]  # fmt: skip

    client.fine_tuning.jobs.pause(created_job.id)
    set_status(api, "openai-a", created_job.id, {"phase": "Suspended"})
    assert client.fine_tuning.jobs.retrieve(created_job.id).status == "paused"
    client.fine_tuning.jobs.resume(created_job.id)
    assert api.get(names.PLURAL, "openai-a", created_job.id)["spec"]["suspend"] is False
    assert client.fine_tuning.jobs.cancel(created_job.id).status == "cancelled"
    assert api.get(names.PLURAL, "openai-a", created_job.id)["spec"]["cancel"] is True
    assert running_job["metadata"]["labels"] == {"finetune-operator.io/created-by": "openai-server"}


def mark_running(api: KubeApi, installation: Installation, name: str) -> dict[str, Any]:
    """Give a job the status and an event of a running job, and return the job."""
    job = set_status(api, installation.namespace, name, {
        "phase": "Running", "conditions": [condition("Reconciling")],
        "progress": {"step": 20, "totalSteps": 40, "secondsRemaining": 60, "tokensSeen": 900, "updateTime": "2026-01-01T00:00:00Z"},
        "metrics": {"trainLoss": 1.25},
        "resolved": {"effectiveBatch": 16},
        "checkpoints": [{"step": 10, "uri": "s3://openai/a"}, {"step": 20, "uri": "s3://openai/b", "evalLoss": 1.5, "time": "2026-01-01T00:00:00Z"}],
    })  # fmt: skip
    api.create("events", installation.namespace, {
        "metadata": {"name": f"{name}.1"}, "eventTime": "2099-01-01T00:00:00.000000Z", "type": "Warning", "reason": "Unschedulable", "action": "Wait",
        "note": "no node is free", "reportingController": "test", "reportingInstance": "test",
        "regarding": {"kind": names.KIND, "apiVersion": names.API_VERSION, "name": name, "namespace": installation.namespace, "uid": job["metadata"]["uid"]},
    })  # fmt: skip
    return job


# --- the command ----------------------------------------------------------------------------------------------------


def make_command(installation: Installation, folder: Path, s3_server: S3Endpoint, port: int) -> list[str]:
    """Return the command that starts a server on `port`, as a list of words."""
    config_file = folder / "server.yaml"
    config_file.write_text(json.dumps(build_config(s3_server).to_wire()), encoding="utf-8")
    paths = {"--config": config_file, "--keys": installation.keys, "--kubeconfig": installation.kubeconfig}
    return ["serve-openai", "--port", str(port), *(str(word) for pair in paths.items() for word in pair)]


def test_the_command_serves_until_sigterm_and_logs_no_keys(installation: Installation, s3_server: S3Endpoint, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("cli", "crds")), "NO_COLOR": "1"}
    words = make_command(installation, tmp_path, s3_server, port=0)
    process = subprocess.Popen([sys.executable, "-m", "finetune_cli", *words], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        try:
            url = process.stderr.readline().partition("base URL for clients: ")[2].strip()
            client = openai.OpenAI(base_url=url, api_key=USER_KEY)
            assert client.files.retrieve(upload(client)).bytes == len(ROWS)
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=url, api_key="sk-unknown").files.list()
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == 0
    assert [key for key in (USER_KEY, "sk-unknown", s3_server.secret_key) if key in log] == []
    assert re.findall(r"INFO (\S+ \S+ /v1/files \d+)", log) == ["openai-a/client POST /v1/files 200", "- GET /v1/files 401"]


def test_the_command_reports_a_port_that_is_in_use(installation: Installation, s3_server: S3Endpoint, tmp_path: Path, finetune: Callable[..., Result]) -> None:
    port = int(installation.server.url.rpartition(":")[2].partition("/")[0])
    result = finetune(*make_command(installation, tmp_path, s3_server, port), default_namespace=False)
    assert (result.code, result.err) == (1, f"error: --host 127.0.0.1 --port {port}: the server cannot listen there: address already in use\n")


# --- rights ---------------------------------------------------------------------------------------------------------


def test_a_wrong_api_key_is_refused(installation: Installation) -> None:
    with pytest.raises(openai.AuthenticationError) as refusal:
        installation.client("sk-wrong").fine_tuning.jobs.list()
    assert (refusal.value.code, "sk-wrong" in str(refusal.value)) == ("invalid_api_key", False)


def test_a_client_has_the_rights_of_its_service_account(installation: Installation, job_id: str) -> None:
    reader = installation.client(READER_KEY)
    file_id = upload(installation.client())
    assert reader.fine_tuning.jobs.retrieve(job_id).id == job_id
    assert reader.files.content(file_id).read() == ROWS
    denied_calls = [
        lambda: reader.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file_id),
        lambda: reader.fine_tuning.jobs.cancel(job_id),
        lambda: reader.fine_tuning.jobs.list_events(job_id),
        lambda: upload(reader),
        lambda: reader.files.delete(file_id),
    ]
    for call in denied_calls:
        with pytest.raises(openai.PermissionDeniedError) as refusal:
            call()
        assert (refusal.value.code, "system:serviceaccount:openai-a:reader" in str(refusal.value)) == ("forbidden", True)


def test_a_client_sees_no_jobs_and_files_of_another_namespace(installation: Installation, job_id: str) -> None:
    other_client = installation.client(OTHER_KEY)
    file_id = upload(installation.client())
    for call in (lambda: other_client.fine_tuning.jobs.retrieve(job_id), lambda: other_client.fine_tuning.jobs.cancel(job_id),
                 lambda: other_client.files.retrieve(file_id),
                 lambda: other_client.files.delete(file_id), lambda: other_client.fine_tuning.jobs.retrieve("../openai-a/x")):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as not_found_error:
            call()
        assert not_found_error.value.code == "not_found"
    with pytest.raises(openai.BadRequestError) as refusal:
        other_client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file_id)
    assert (refusal.value.param, refusal.value.code) == ("training_file", "file_not_found")
    assert (other_client.fine_tuning.jobs.list().data, other_client.files.list().data) == ([], [])


def test_an_account_that_the_server_may_not_impersonate_causes_a_server_error(installation: Installation) -> None:
    with pytest.raises(openai.InternalServerError) as server_error:
        installation.client(FOREIGN_KEY).with_options(max_retries=0).fine_tuning.jobs.list()
    assert (server_error.value.code, "the verb `impersonate`" in str(server_error.value)) == ("impersonation_forbidden", True)


def test_a_removed_key_is_refused_without_a_restart(installation: Installation) -> None:
    original_keys = installation.keys.read_text(encoding="utf-8")
    client = installation.client(OTHER_KEY).with_options(max_retries=0)
    assert client.files.list().data == []
    try:
        write_keys(installation.keys, {USER_KEY: ("openai-a", "client")})
        with pytest.raises(openai.AuthenticationError):
            client.files.list()
        installation.keys.write_text("keys: []", encoding="utf-8")
        with pytest.raises(openai.InternalServerError) as server_error:
            client.files.list()
        assert server_error.value.code == "keys_unavailable"
    finally:
        installation.keys.write_text(original_keys, encoding="utf-8")


# --- wrong requests -------------------------------------------------------------------------------------------------


def test_a_wrong_request_is_refused_with_the_name_of_the_wrong_parameter(installation: Installation) -> None:
    client = installation.client()
    file_id, preference_file_id = upload(client), upload(client, PREFERENCE_ROWS)
    supervised_method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 99}}}
    wrong_requests: list[tuple[dict[str, Any], str, str]] = [
        ({"model": "gpt-9"}, "model", "write one of gpt-4o-mini, tracked"),
        ({"training_file": "file-none"}, "training_file", "there is no file"),
        ({"training_file": preference_file_id}, "training_file", "train.jsonl:1: messages: the key is missing"),
        ({"method": supervised_method}, "method.supervised.hyperparameters.n_epochs", "an integer from 1 to 50"),
        ({"hyperparameters": {"batch_size": 3}}, "hyperparameters.batch_size", "write 2 or 4"),
        ({"method": {"type": "reinforcement"}}, "method.type", "this server has no graders"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "tracking.wandb.apiKeySecretRef"),
        ({"suffix": "a" * 65}, "suffix", "1 to 64 characters"),
        ({"extra_body": {"n_epochs": 3}}, "n_epochs", "unknown key"),
    ]
    for changed_arguments, param, message in wrong_requests:
        with pytest.raises(openai.BadRequestError) as refusal:
            client.fine_tuning.jobs.create(**{"model": "gpt-4o-mini", "training_file": file_id, **changed_arguments})
        assert (refusal.value.param, message in str(refusal.value)) == (param, True), refusal.value


def test_a_path_that_the_server_does_not_serve_is_not_found(installation: Installation) -> None:
    with pytest.raises(openai.NotFoundError) as not_found_error:
        installation.client().models.list()
    assert (not_found_error.value.code, not_found_error.value.body) == (
        "not_found", {"message": "GET /v1/models: not found", "type": "invalid_request_error", "param": None, "code": "not_found"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "content_type", "body", "answer"),
    [
        ("/fine_tuning/jobs", "application/json", b"{", (400, "invalid_json")),
        ("/fine_tuning/jobs", "application/json", b" " * (1 << 21), (413, "request_entity_too_large")),
        ("/files", "text/plain", b"x", (400, "invalid_upload")),
        ("/files", "multipart/form-data", b"x", (400, "invalid_upload")),
        ("/files", "multipart/form-data; boundary=a", b"nonsense", (400, "invalid_upload")),
        ("/files", "multipart/form-data; boundary=a", b"--a--\r\n", (400, "missing_required_parameter")),
        ("/files", "multipart/form-data; boundary=a", FILE_PART + FILE_PART + b"--a--\r\n", (400, "invalid_value")),
    ],
)
def test_a_damaged_request_body_gets_an_error_object(installation: Installation, path: str, content_type: str, body: bytes, answer: tuple[int, str]) -> None:
    headers = {"Authorization": f"Bearer {USER_KEY}", "Content-Type": content_type}
    response = urllib3.request("POST", installation.server.url + path, body=body, headers=headers, retries=False)
    assert (response.status, response.json()["error"]["code"]) == answer


def test_a_job_that_has_ended_cannot_be_paused(installation: Installation, api: KubeApi, job_id: str) -> None:
    client = installation.client()
    failure = {"class": "Data", "code": "DatasetEmpty", "message": "the data has no rows", "hint": "check the file"}
    set_status(api, "openai-a", job_id, {
        "phase": "Failed", "conditions": [condition("Finished")], "failure": failure, "completionTime": "2026-01-01T00:00:10Z",
    })  # fmt: skip
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.finished_at) == ("failed", 1767225610)
    assert job.error is not None
    assert job.error.to_dict() == {"code": "DatasetEmpty", "message": "the data has no rows; check the file", "param": "training_file"}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.fine_tuning.jobs.pause(job_id)
    assert (refusal.value.code, "its status is failed" in str(refusal.value)) == ("job_has_ended", True)


def test_a_job_that_kubectl_has_created_is_not_listed(installation: Installation, api: KubeApi) -> None:
    name = "ftjob-0123456789abcdef01234567"
    api.create(names.PLURAL, "openai-a", {
        "apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name},
        "spec": {"model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}},
    })  # fmt: skip
    client = installation.client()
    assert name not in [job.id for job in client.fine_tuning.jobs.list()]
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(name)


# --- lists and files ------------------------------------------------------------------------------------------------


def test_a_long_list_is_divided_into_pages(installation: Installation) -> None:
    client = installation.client(OTHER_KEY)
    files = [upload(client, name=f"{number}.jsonl") for number in range(3)]
    jobs = [client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=files[0], metadata={"n": str(n % 2)}).id for n in range(3)]
    first_jobs = client.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in first_jobs.data], first_jobs.has_more) == (jobs[:0:-1], True)
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == jobs[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [jobs[1]]
    assert [file.filename for file in client.files.list(limit=1, order="asc")] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.list(after="file-none").data  # noqa: B018
    assert refusal.value.param == "after"


def test_files_are_checked_stored_and_deleted(installation: Installation, s3_server: S3Endpoint) -> None:
    client = installation.client()
    for content, message in ((b'{"a": 1}\n[]\n', "line 2 is not a JSON object"), (b"{'a': 1}", "line 1 is not valid JSON"), (b"\n", "the file has no rows")):
        with pytest.raises(openai.BadRequestError) as refusal:
            upload(client, content)
        assert (refusal.value.param, message in str(refusal.value)) == ("file", True)
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=("a.jsonl", ROWS), purpose="batch")
    assert refusal.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert refusal.value.param == "expires_after[anchor]"
    with pytest.raises(openai.APIStatusError) as too_large_error:
        upload(client, b" " * 100_001)
    assert (too_large_error.value.status_code, too_large_error.value.param) == (413, "file")
    file_id = upload(client)
    key = f"jobs/openai-a/_files/{file_id}/train.jsonl/rows.jsonl"
    assert s3_server.client().get_object(Bucket="openai", Key=key)["Body"].read() == ROWS
    job = client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file_id)
    with pytest.raises(openai.BadRequestError) as in_use_error:
        client.files.delete(file_id)
    assert (in_use_error.value.code, job.id in str(in_use_error.value)) == ("file_in_use", True)
    other_file = upload(client)
    assert client.files.delete(other_file).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(other_file)


def test_a_succeeded_job_names_its_model_and_its_metrics(installation: Installation, api: KubeApi, job_id: str, s3_server: S3Endpoint) -> None:
    client, store = installation.client(), s3_server.client()
    uid = api.get(names.PLURAL, "openai-a", job_id)["metadata"]["uid"]
    model = f"s3://openai/jobs/openai-a/{job_id}/{uid}/model/a2-1f3c9a2b"
    first_lines = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
    second_lines = '{"step": 2, "loss": 2.0}\n{"step": 2, "eval_loss": 2.25}\n'
    for name, lines in (("a1-11111111", first_lines), ("a2-22222222", second_lines)):
        store.put_object(Bucket="openai", Key=f"jobs/openai-a/{job_id}/{uid}/metrics/{name}.jsonl", Body=lines.encode())
    assert client.fine_tuning.jobs.retrieve(job_id).result_files == []
    set_status(api, "openai-a", job_id, {
        "phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")], "output": {"uri": model}, "progress": {"tokensSeen": 1234},
        "completionTime": "2026-01-01T00:00:10Z",
    })  # fmt: skip
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("succeeded", model, 1234)
    (result_file_id,) = job.result_files
    assert client.files.content(result_file_id).text == "step,train_loss,valid_loss\n1,3.0,\n2,2.0,2.25\n"
    file = client.files.retrieve(result_file_id)
    assert (file.purpose, file.bytes, file.created_at) == ("fine-tune-results", 45, 1767225610)


def test_the_job_reports_to_the_tracker_in_the_request(installation: Installation, api: KubeApi) -> None:
    client = installation.client()
    integration: Any = {"type": "wandb", "wandb": {"project": "support", "name": "run-1"}}
    job = client.fine_tuning.jobs.create(model="tracked", training_file=upload(client), integrations=[integration])
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "support"
    spec = api.get(names.PLURAL, "openai-a", job.id)["spec"]
    assert spec["tracking"] == {"reportTo": ["wandb"], "wandb": {"apiKeySecretRef": {"name": "wandb", "key": "key"}, "project": "support"}}
