"""The official `openai` client uses `finetune serve-openai` in a pod of the chart. Only the base URL and the API key differ from the hosted API."""

from __future__ import annotations

import hashlib
import re
import secrets
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from finetune_api.names import Phase
from openai import AuthenticationError, OpenAI

from localcluster import build, images
from localcluster.steps import show_step
from tests.e2e.jobs.installation import MODEL, ROOT, Installation, JobNamespace, demo

CLI_IMAGE = "localhost/finetune-cli"
SERVICE_ACCOUNT = "openai-client"
API_KEY = f"sk-{secrets.token_hex(32)}"


def read_guide_objects() -> list[dict[str, Any]]:
    """Read the manifests of the client's ServiceAccount, role and binding from the guide."""
    text = (ROOT / "docs/guides/openai.md").read_text("utf-8")
    block = re.search(r"```yaml\n(apiVersion: v1\nkind: ServiceAccount.*?)```", text, re.DOTALL)
    assert block is not None
    return list(yaml.safe_load_all(block[1]))


@pytest.fixture
def base_url(installation: Installation, job_namespace: JobNamespace) -> Iterator[str]:
    """The base URL of the server, which the chart installs for this test only."""
    namespace, cluster = job_namespace.namespace, installation.cluster
    images.build_images([images.ImageName.CLI], show_step)
    cluster.load_image(f"{CLI_IMAGE}:dev")
    for item in read_guide_objects():
        if item["kind"] == "RoleBinding":
            item["subjects"][0]["namespace"] = namespace
        job_namespace.apply(item)
    key_table = {"keys": [{"sha256": hashlib.sha256(API_KEY.encode()).hexdigest(), "namespace": namespace, "serviceAccount": SERVICE_ACCOUNT}]}
    operator_namespace = JobNamespace(installation, demo.RELEASE_NAME)
    operator_namespace.create_secret("openai-keys", {"keys.yaml": yaml.safe_dump(key_table)})
    operator_namespace.create_secret("openai-s3", {"AWS_ACCESS_KEY_ID": cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key})
    spec = {"model": {"source": MODEL}, "resources": {"gpusPerNode": 0, "cpu": "100m", "memory": "2Gi"}, "checkpoint": {"steps": 2}}
    installation.install(openaiServer={
        "enabled": True, "image": {"repository": CLI_IMAGE, "tag": "dev"}, "models": {"gpt-4o-mini": {"spec": spec}}, "keysSecret": "openai-keys",
        "credentialsSecret": "openai-s3", "accounts": [{"namespace": namespace, "serviceAccounts": [SERVICE_ACCOUNT]}],
    })  # fmt: skip
    command = [str(build.ensure_built(build.KUBE_PROGRAM)), "kubectl", "--kubeconfig", str(cluster.kubeconfig), "-n", demo.RELEASE_NAME]
    (service,) = [
        service["metadata"]["name"] for service in installation.api.list("services", demo.RELEASE_NAME) if "openai" in service["metadata"]["name"]
    ]
    with subprocess.Popen([*command, "port-forward", f"service/{service}", ":80"], stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        port = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert port is not None
        yield f"http://127.0.0.1:{port[1]}/v1"
        forward.kill()
    installation.install()
    for name in ("openai-keys", "openai-s3"):
        installation.api.delete("secrets", demo.RELEASE_NAME, name)


@pytest.mark.slow
def test_the_official_client_trains_a_model(base_url: str, job_namespace: JobNamespace) -> None:
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=base_url, api_key="sk-unknown", max_retries=0).files.list()
    client = OpenAI(base_url=base_url, api_key=API_KEY, max_retries=0)
    rows = (ROOT / "examples/data/captain.jsonl").read_bytes()
    file = client.files.create(file=("captain.jsonl", rows), purpose="fine-tune")
    assert client.files.content(file.id).read() == rows

    job = client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert job.status in ("validating_files", "queued") and job.id in {listed_job.id for listed_job in client.fine_tuning.jobs.list()}
    job_namespace.wait_finished(job.id)
    done_job = client.fine_tuning.jobs.retrieve(job.id)
    assert (done_job.status, done_job.error) == ("succeeded", None)
    assert done_job.fine_tuned_model == job_namespace.status(job.id).output.uri  # type: ignore[union-attr]
    assert (done_job.trained_tokens or 0) > 0
    assert done_job.finished_at is not None and list(client.fine_tuning.jobs.list_events(job.id))
    assert [checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id)]
    (result_file,) = done_job.result_files
    assert client.files.content(result_file).text.startswith("step,")

    other_job = client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id, hyperparameters={"n_epochs": 50})
    client.fine_tuning.jobs.pause(other_job.id)
    job_namespace.wait(other_job.id, lambda s: s.phase is Phase.SUSPENDED, "suspended")
    assert client.fine_tuning.jobs.retrieve(other_job.id).status == "paused"
    client.fine_tuning.jobs.resume(other_job.id)
    job_namespace.wait(other_job.id, lambda s: s.phase is not Phase.SUSPENDED, "resumed")
    assert client.fine_tuning.jobs.cancel(other_job.id).status == "cancelled"
    job_namespace.wait_finished(other_job.id, Phase.CANCELLED)
