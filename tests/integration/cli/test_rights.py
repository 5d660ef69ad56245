"""The role in the guide is enough for every command it is meant for, and gives no right beyond."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_api import names
from ruamel.yaml import YAML

from localcluster import Endpoint
from tests.integration.cli.conftest import Result, condition
from tests.support.kubeapi import KubeApi, Refused

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "cli.md"
RUNNING = {"phase": "Running", "conditions": [condition("Reconciling")]}


@pytest.fixture
def token(api: KubeApi, namespace: str) -> str:
    """A token of an account that has the guide's role and nothing else."""
    (text,) = re.findall(r"```yaml\n(apiVersion: rbac.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    role = YAML(typ="safe").load(text)
    api.create("roles", namespace, role)
    api.create("serviceaccounts", namespace, {"metadata": {"name": "user"}})
    api.create("rolebindings", namespace, {
        "metadata": {"name": "user"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]},
        "subjects": [{"kind": "ServiceAccount", "name": "user", "namespace": namespace}],
    })  # fmt: skip
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/user/token"
    answer = api.request("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
    return str(answer.body["status"]["token"])


@pytest.fixture
def as_user(
    control_plane: Endpoint, token: str, tmp_path: Path, finetune: Callable[..., Result]
) -> Callable[..., Result]:
    """Commands with that account's rights."""
    config = tmp_path / "kubeconfig"
    yaml = YAML(typ="safe")
    value = yaml.load(control_plane.kubeconfig.read_text(encoding="utf-8"))
    for user in value["users"]:
        user["user"] = {"token": token}
    with config.open("w", encoding="utf-8") as file:
        yaml.dump(value, file)
    return lambda *words: finetune(*words, "--kubeconfig", str(config))


def test_the_role_is_enough(
    as_user: Callable[..., Result], job: Callable[..., object], api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    job(status=RUNNING)
    labels = {names.Label.NAME: "bot", names.Label.ATTEMPT: "1"}
    api.create(
        "pods",
        namespace,
        {
            "metadata": {"name": "bot-1-0", "labels": labels},
            "spec": {"containers": [{"name": names.CONTAINER, "image": "x"}]},
        },
    )
    manifest = tmp_path / "job.yaml"
    manifest.write_text(
        f"apiVersion: {names.API_VERSION}\nkind: {names.KIND}\nmetadata: {{name: new}}\nspec:\n"
        "  model: {source: org/m}\n  dataset: {train: 's3://data/t.jsonl'}\n",
        encoding="utf-8",
    )
    for words in (
        ("get",), ("get", "bot", "-o", "yaml"), ("status", "bot"), ("wait", "bot", "--for", "running"), ("events", "bot"), ("logs", "bot"),
        ("submit", str(manifest)), ("suspend", "bot"), ("resume", "bot"), ("rerun", "bot"), ("diff", "bot", "new"), ("checkpoints", "bot"),
        ("report", "bot", "-o", str(tmp_path / "r.tar.gz")), ("cancel", "bot", "--yes"),
    ):  # fmt: skip
        result = as_user(*words)
        assert (result.code, "forbidden" in result.err) == (0, False), (words, result)


def test_the_role_reads_no_secrets(api: KubeApi, control_plane: Endpoint, token: str, namespace: str) -> None:
    with pytest.raises(Refused) as refused:
        KubeApi(control_plane, token=token).list("secrets", namespace)
    assert refused.value.code == 403
