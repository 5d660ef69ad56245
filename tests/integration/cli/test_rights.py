"""The roles and the table of rights in docs/guides/cli.md grant exactly the rights that the commands need."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_cli.cluster import Cluster
from ruamel.yaml import YAML

from localcluster import Endpoint
from tests.integration.cli.conftest import Result, condition, set_status
from tests.support.kubeapi import ApiError, KubeApi

GUIDE_FILE = Path(__file__).parents[3] / "docs" / "guides" / "cli.md"
RUNNING_STATUS = {"phase": "Running", "conditions": [condition("Reconciling")]}


def create_token_with_documented_role(api: KubeApi, namespace: str, name: str) -> str:
    """Create a ServiceAccount that has only the guide's role `name`. Return its token."""
    texts = re.findall(r"```yaml\n(apiVersion: rbac.*?)```", GUIDE_FILE.read_text(encoding="utf-8"), re.DOTALL)
    (role,) = (role for role in map(YAML(typ="safe").load, texts) if role["metadata"]["name"] == name)
    api.create("roles", namespace, role)
    api.create("serviceaccounts", namespace, {"metadata": {"name": name}})
    api.create("rolebindings", namespace, {
        "metadata": {"name": name}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    })  # fmt: skip
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
    response = api.request("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
    return str(response.body["status"]["token"])


def make_runner_with_token(
    control_plane: Endpoint, token: str, folder: Path, finetune: Callable[..., Result]
) -> Callable[..., Result]:
    """Return a function that runs `finetune` commands with `token`. A kubeconfig with this token is written into `folder`."""
    kubeconfig = folder / "kubeconfig"
    yaml = YAML(typ="safe")
    kubeconfig_content = yaml.load(control_plane.kubeconfig.read_text(encoding="utf-8"))
    for user in kubeconfig_content["users"]:
        user["user"] = {"token": token}
    with kubeconfig.open("w", encoding="utf-8") as file:
        yaml.dump(kubeconfig_content, file)
    return lambda *words: finetune(*words, "--kubeconfig", str(kubeconfig))


@pytest.fixture
def token(api: KubeApi, namespace: str) -> str:
    """Return the token of a ServiceAccount that has only the guide's role for users who run jobs."""
    return create_token_with_documented_role(api, namespace, "finetune-user")


@pytest.fixture
def as_user(
    control_plane: Endpoint, token: str, tmp_path: Path, finetune: Callable[..., Result]
) -> Callable[..., Result]:
    """Return a function that runs `finetune` commands with the rights of the fixture `token`."""
    return make_runner_with_token(control_plane, token, tmp_path, finetune)


@pytest.mark.slow  # `make test` runs the other tests of this file, which check the rights of each command
def test_the_documented_role_is_sufficient(
    as_user: Callable[..., Result], job: Callable[..., object], api: KubeApi, namespace: str, tmp_path: Path
) -> None:
    job(status=RUNNING_STATUS)
    labels = {names.Label.JOB_NAME: "bot", names.Label.ATTEMPT: "1"}
    api.create(
        "pods",
        namespace,
        {
            "metadata": {"name": "bot-1-0", "labels": labels},
            "spec": {"containers": [{"name": names.TRAINER_CONTAINER, "image": "x"}]},
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
        ("support-bundle", "bot", "-o", str(tmp_path / "r.tar.gz")), ("cancel", "bot", "--yes"), ("top",), ("delete", "new", "--yes"),
    ):  # fmt: skip
        result = as_user(*words)
        assert (result.code, "forbidden" in result.err) == (0, False), (words, result)


def test_the_documented_role_for_pools_is_sufficient(
    api: KubeApi, control_plane: Endpoint, namespace: str, tmp_path: Path, finetune: Callable[..., Result]
) -> None:
    config = json.dumps(
        {"trainer": {"image": "registry.example.com/trainer"}, "nodePools": [{"name": "small", "gpusPerNode": 2}]}
    )
    api.create(
        "configmaps",
        namespace,
        {"metadata": {"name": "operator", "labels": CHART_LABELS}, "data": {"config.yaml": config}},
    )
    as_user = make_runner_with_token(
        control_plane, create_token_with_documented_role(api, namespace, "finetune-pools"), tmp_path, finetune
    )

    result = as_user("pools", "--operator-namespace", namespace)

    assert (result.code, result.out.splitlines()[1].split()[:3]) == (0, ["small", "-", "2"]), result
    assert "nodes and free GPUs are unknown" in result.err


def test_the_documented_role_has_no_rights_on_secrets(
    api: KubeApi, control_plane: Endpoint, token: str, namespace: str
) -> None:
    with pytest.raises(ApiError) as refusal:
        KubeApi(control_plane, token=token).list("secrets", namespace)
    assert refusal.value.code == 403


# --- the guide's table ----------------------------------------------------------------------------------------------

JOBS = f"{names.PLURAL}.{names.GROUP}"
SUCCEEDED_STATUS = {"phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")]}
MANIFEST = f"""\
apiVersion: v1
kind: Secret
metadata: {{name: hub}}
stringData: {{token: x}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: rows}}
data: {{a: b}}
---
apiVersion: {names.API_VERSION}
kind: {names.KIND}
metadata: {{name: new}}
spec: {{model: {{source: org/m}}, dataset: {{train: org/d}}}}
"""
CHART_LABELS = {"app.kubernetes.io/part-of": "finetune-operator", "app.kubernetes.io/version": "0.2.0"}
OFFLINE_COMMANDS = "`init`, `validate`, `explain`, `import`, `run --local`, `ratings`, `diff` of files"
COMMANDS_BY_ROW: dict[str, tuple[tuple[str, ...], ...]] = {
    "`get`, `diff` of jobs": (("get",), ("get", "bot"), ("get", "bot", "-o", "yaml"), ("diff", "bot", "bot")),
    "`status`, `wait`": (("status", "bot"), ("wait", "bot", "--for", "Suspended", "--timeout", "1")),
    "`events`": (("events", "bot"),),
    "`logs`": (("logs", "bot"),),
    "`submit`": (("submit", "MANIFEST", "--wait"),),
    "`suspend`, `resume`, `cancel`": (("suspend", "bot"), ("resume", "bot"), ("cancel", "bot", "--yes")),
    "`rerun`": (("rerun", "bot"),),
    "`delete`": (("delete", "done"),),
    "`top`": (("top",), ("top", "bot")),
    "`pools`": (("pools",),),
    "`doctor`": (("doctor", "--timeout", "2s"),),
    "`upload`, `download` with a URI": (("upload", "MANIFEST", "s3://a/b", "--secret", "s3", "--endpoint", "http://127.0.0.1:1"),),
    "`checkpoints`, `download` with a name": (
        ("checkpoints", "bot"), ("checkpoints", "done", "--verify", "--use-secret"), ("download", "done", "--use-secret"),
    ),
    "`verify`, `sign`, `replay` with a name": (("verify", "done", "--use-secret"), ("replay", "done", "--use-secret")),
    "`purge`": (("purge", "done", "--use-secret", "--yes-purge", "done"),),
    "`report`": (("report", "done", "--use-secret", "-o", "PAGE"),),
    "`support-bundle`": (("support-bundle", "bot", "-o", "ARCHIVE"),),
}  # fmt: skip
"""For each row of the guide's table, by its first cell: commands that together need every right that the row lists."""


def read_documented_rights() -> dict[str, set[str]]:
    """Return the rights that each row of the guide's table lists, as `resource:verb`, by the first cell of the row."""
    text = GUIDE_FILE.read_text(encoding="utf-8")
    rights_by_commands = {}
    for commands, job_verbs, other_rights in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?)\|$", text, re.MULTILINE):
        needed_rights = {f"{JOBS}:{verb}" for verb in find_verbs(re.sub("`[^`]*`", "", job_verbs))}
        for resources, words in re.findall(r"((?:`[^`]+`(?:, )?)+): ([a-z, ]+)", other_rights):
            needed_rights |= {
                f"{resource}:{verb}" for resource in re.findall("`([^`]+)`", resources) for verb in find_verbs(words)
            }
        rights_by_commands[commands] = needed_rights
    return rights_by_commands


def find_verbs(text: str) -> set[str]:
    """Return the API verbs that a text names."""
    return set(re.findall(r"\b(get|list|watch|create|patch|delete)\b", text))


def test_the_documented_table_covers_all_commands() -> None:
    assert set(read_documented_rights()) == {*COMMANDS_BY_ROW, OFFLINE_COMMANDS}
    assert read_documented_rights()[OFFLINE_COMMANDS] == set()


@pytest.mark.parametrize("row", COMMANDS_BY_ROW)
def test_the_commands_of_a_row_use_exactly_its_documented_rights(
    row: str, finetune: Callable[..., Result], job: Callable[..., dict[str, Any]], api: KubeApi, namespace: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    create_jobs_and_secret(job, api, namespace)
    (tmp_path / "job.yaml").write_text(MANIFEST, encoding="utf-8")
    paths = {"MANIFEST": str(tmp_path / "job.yaml"), "ARCHIVE": str(tmp_path / "r.tar.gz")}
    used_rights: set[str] = set()
    send = Cluster._send

    def send_and_record(self: Cluster, method: str, path: str, query: dict[str, str], *rest: Any) -> Any:
        used_rights.update(find_needed_rights(method, path, query))
        response = send(self, method, path, query, *rest)
        if method == "POST" and rest[0].get("metadata", {}).get("name") == "new":
            threading.Timer(0.5, lambda: set_status(api, namespace, "new", SUCCEEDED_STATUS)).start()
        return response

    monkeypatch.setattr(Cluster, "_send", send_and_record)
    for words in COMMANDS_BY_ROW[row]:
        assert finetune(*(paths.get(word, word) for word in words)).code in (
            0,
            1,
            2,
        )  # `verify` exits with 2, because it finds no model in the empty storage
    assert used_rights == read_documented_rights()[row]


def create_jobs_and_secret(job: Callable[..., dict[str, Any]], api: KubeApi, namespace: str) -> None:
    """Create a running job with a pod, a finished job with an empty storage folder and a Secret for it, and an operator's ConfigMap."""
    running_job = job(status=RUNNING_STATUS)
    config = json.dumps({"trainer": {"image": "registry.example.com/trainer"}, "namespaces": [namespace]})
    api.create(
        "configmaps",
        namespace,
        {"metadata": {"name": "operator", "labels": CHART_LABELS}, "data": {"config.yaml": config}},
    )
    storage = {"uri": "file:///empty/storage", "credentialsSecretRef": {"name": "s3"}}
    job("done", status=SUCCEEDED_STATUS, storage=storage)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    api.create("secrets", namespace, {"metadata": {"name": "s3"}, "stringData": keys})
    labels = {
        names.Label.MANAGED_BY: names.MANAGER_NAME, names.Label.JOB_NAME: "bot", names.Label.JOB_UID: running_job["metadata"]["uid"], names.Label.ATTEMPT: "1",
    }  # fmt: skip
    container = {"name": names.TRAINER_CONTAINER, "image": "x"}
    api.create(
        "pods", namespace, {"metadata": {"name": "bot-1-0", "labels": labels}, "spec": {"containers": [container]}}
    )
    api.patch(
        "pods/status",
        namespace,
        "bot-1-0",
        {"status": {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}},
    )


def find_needed_rights(method: str, path: str, query: dict[str, str]) -> set[str]:
    """Return the rights that a request needs, as `resource:verb`. Server-side apply needs `create` in addition to `patch`."""
    match = re.match(
        r"^/(?:api/v1|apis/([^/]+)/[^/]+)(?:/namespaces/[^/]+)?/([a-z]+)(?:/([^/]+))?(?:/([a-z]+)(?:/usage)?)?$", path
    )
    if match is None:
        return set()
    group, resource, name, subresource = match.groups()
    resource = f"{resource}/{subresource}" if subresource else f"{resource}.{group}" if group else resource
    if method == "GET":
        return {f"{resource}:{'watch' if query.get('watch') else 'get' if name else 'list'}"}
    is_server_side_apply = method == "PATCH" and query.get("force") == "true"
    return {
        f"{resource}:{verb}"
        for verb in (
            {"patch", "create"} if is_server_side_apply else {"PATCH": ["patch"], "POST": ["create"], "DELETE": ["delete"]}[method]
        )
    }
