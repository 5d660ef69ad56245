"""The client of the API server: kubeconfigs, job names, failed responses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from finetune_cli import cluster
from finetune_cli.cluster import ClusterError, parse_job_name

from tests.unit.cli.conftest import RunCommand, WriteFile

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
users: [{name: u, user: {token: secret-of-mine}}]
current-context: x
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (KUBECONFIG, "the API server at http://127.0.0.1:9 cannot be reached: "),
        ("", "no cluster: "),
        ("a: [secret-of-mine", "config is not a valid kubeconfig (ParserError)"),
        ("[1, 2]", "config is not a valid kubeconfig (TypeError)"),
        (KUBECONFIG.replace("context: x", "context: y"), "no cluster: "),
        (KUBECONFIG.replace("token: secret-of-mine", "exec: {apiVersion: client.authentication.k8s.io/v1, command: /nobody, interactiveMode: Never}"),
         "the kubeconfig gave no credentials: "),
    ],
)  # fmt: skip
def test_unusable_kubeconfig_is_reported_without_secrets(run_command: RunCommand, write_file: WriteFile, text: str, expected: str) -> None:
    path = write_file("config", text)
    code, out, stderr = run_command("get", "--kubeconfig", path)
    assert (code, out) == (1, "")
    assert expected in stderr
    assert len(stderr.splitlines()) == 1
    assert "secret-of-mine" not in stderr


def test_names_are_quoted_in_paths() -> None:
    client = cluster.Cluster(None, "team/../x")
    assert client._make_namespaced_path("pods", "../secrets/a?b") == "namespaces/team%2F..%2Fx/pods/..%2Fsecrets%2Fa%3Fb"


@pytest.mark.parametrize("name", ["bot", "finetunejobs.finetune-operator.io/bot", "ftj/bot", "FineTuneJob/bot"])
def test_job_name_with_kind_is_accepted(name: str) -> None:
    assert parse_job_name(name) == "bot"


@pytest.mark.parametrize("name", ["", "pod/bot", "ftj/"])
def test_name_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="is not the name of a FineTuneJob"):
        parse_job_name(name)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            404,
            b"404 page not found\n",
            "has no CRD for FineTuneJob finetune-operator.io/v1alpha1: install the operator's chart",
        ),
        (200, b"<html>please log in</html>", "does not respond like a Kubernetes API server"),
        (302, b"", "does not respond like a Kubernetes API server"),
        (401, b'{"message": "Unauthorized"}', "does not accept the credentials of the kubeconfig: log in again"),
        (502, b"<html>\n<body>\nBad Gateway</body></html>", "responded with HTTP 502: <html> <body> Bad Gateway"),
    ],
)
def test_failed_response_is_reported_in_one_line(
    run_command: RunCommand, kubeconfig_of_server: Callable[[int, bytes], str], status: int, body: bytes, expected: str
) -> None:
    code, out, err = run_command("get", "--kubeconfig", kubeconfig_of_server(status, body))
    assert (code, out, err.count("\n"), err.startswith("error: ")) == (1, "", 1, True)
    assert expected in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--kubeconfig", "/no/such/file"), "--kubeconfig /no/such/file: there is no such file"),
        (("-n", "a/b"), "--namespace a/b: this cannot be the name of a namespace"),
    ],
)
def test_invalid_kubeconfig_path_and_namespace_are_named(run_command: RunCommand, words: tuple[str, ...], expected: str) -> None:
    code, _, err = run_command("get", *words)
    assert (code, expected in err) == (1, True)


COSTED_JOB = {
    "metadata": {"name": "bot", "namespace": "team"},
    "spec": {"policy": {"maxCost": 50}},
    "status": {
        "phase": "Running",
        "cost": {"gpuHours": 4.2, "amount": 12.6, "currency": "EUR"},
        "plan": {"cost": {"gpuHours": 6, "expected": 18, "lower": 9, "upper": 30, "currency": "EUR"}},
    },
}
COST_TABLE = """\
NAMESPACE   NAME   STATUS    GPU-HOURS   EXPECTED GPU-HOURS   COST    EXPECTED COST   MAX COST   CURRENCY
team        bot    Running   4.20        6.00                 12.60   18.00           50.00      EUR
team        new    -         -           -                    -       -               -          -
"""


def test_costs_are_listed_with_the_planned_costs_and_the_limit(
    run_command: RunCommand, kubeconfig_of_server: Callable[[int, bytes], str]
) -> None:
    job_objects = [COSTED_JOB, {"metadata": {"name": "new", "namespace": "team"}, "spec": {}}]
    kubeconfig = kubeconfig_of_server(200, json.dumps({"kind": "FineTuneJobList", "items": job_objects}).encode())
    code, out, err = run_command("get", "-A", "-o", "cost", "--kubeconfig", kubeconfig)
    assert (code, out) == (0, COST_TABLE)
    assert "has no pricePerGpuHour" in err
