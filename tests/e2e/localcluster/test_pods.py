"""Pods on a real node end with the exit codes, reasons and messages that the operator and the trainer expect."""

from __future__ import annotations

import subprocess

import pytest

from localcluster import build
from tests.e2e.localcluster.pods import NamespaceApi, make_pod, read_phase, read_terminated_state, read_waiting_reason

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("code", "expected_phase"), [(0, "Succeeded"), (64, "Failed"), (137, "Failed")])
def test_the_exit_code_is_in_the_pod_status(api: NamespaceApi, code: int, expected_phase: str) -> None:
    finished_pod = api.run(make_pod("p", "exit", str(code)))
    assert read_terminated_state(finished_pod)["exitCode"] == code
    assert api.wait("pod", "p", lambda p: read_phase(p) == expected_phase)


def test_a_container_that_exceeds_its_memory_limit_is_oom_killed(api: NamespaceApi) -> None:
    limit = {"resources": {"limits": {"memory": "64Mi"}}}
    assert read_terminated_state(api.run(make_pod("p", "allocate", "256", container=limit)))["exitCode"] == 137
    # containerd receives the exit event and the OOM event separately. The reason in the container's state becomes OOMKilled only after containerd has
    # received both events.
    assert api.wait("pod", "p", lambda p: read_terminated_state(p)["reason"] == "OOMKilled")


def test_a_program_can_exit_with_its_own_code_after_sigterm(api: NamespaceApi) -> None:
    api.create({**make_pod("p", "graceful", "75", terminationGracePeriodSeconds=30), **_make_metadata_with_finalizer("p")})
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    api.wait("pod", "p", lambda _: "waiting" in api.kubectl("logs", "p"))
    api.delete("pod", "p")
    assert read_terminated_state(api.wait("pod", "p", read_terminated_state))["exitCode"] == 75
    assert api.kubectl("logs", "p") == "waiting\ngot SIGTERM"
    _remove_finalizer(api, "p")


def test_a_program_that_ignores_sigterm_is_killed_after_the_grace_period(api: NamespaceApi) -> None:
    api.create({**make_pod("p", "sleep", "600", terminationGracePeriodSeconds=1), **_make_metadata_with_finalizer("p")})
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    api.delete("pod", "p")
    assert read_terminated_state(api.wait("pod", "p", read_terminated_state))["exitCode"] == 137
    _remove_finalizer(api, "p")


def _make_metadata_with_finalizer(name: str) -> dict[str, object]:
    """Return metadata with a finalizer, so that the pod can still be read after its deletion."""
    return {"metadata": {"name": name, "finalizers": ["finetune-operator.io/test"]}}


def _remove_finalizer(api: NamespaceApi, name: str) -> None:
    api.kubectl("patch", "pod", name, "--type=json", '-p=[{"op":"remove","path":"/metadata/finalizers"}]')


def test_the_termination_message_comes_from_the_file(api: NamespaceApi) -> None:
    finished_pod = api.run(make_pod("p", "say", "/dev/termination-log", '{"code":65}', "--", "exit", "65"))
    assert read_terminated_state(finished_pod)["message"] == '{"code":65}'


def test_the_termination_message_comes_from_the_log_if_there_is_no_file(api: NamespaceApi) -> None:
    container_fields = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    ended_state = read_terminated_state(api.run(make_pod("p", "print", "2", "0", "--", "exit", "70", container=container_fields)))
    assert (ended_state["exitCode"], ended_state["message"]) == (70, "line 1\nline 2\n")


def test_logs_can_be_followed_until_the_container_ends(api: NamespaceApi) -> None:
    api.create(make_pod("p", "print", "5", "200"))
    api.wait("pod", "p", lambda p: read_phase(p) != "Pending")
    assert api.kubectl("logs", "-f", "p") == "\n".join(f"line {n}" for n in range(1, 6))


def test_exec_and_port_forward_work(api: NamespaceApi) -> None:
    api.create(make_pod("p", "serve", "8000"))
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    assert api.kubectl("exec", "p", "--", "/testbox", "get", "http://127.0.0.1:8000", "10") == "p"
    kubectl = [str(build.ensure_built(build.KUBE_PROGRAM)), "kubectl", "--kubeconfig", str(api.cluster.kubeconfig)]
    command = [*kubectl, "-n", api.namespace, "port-forward", "p", ":8000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        port = forward.stdout.readline().split()[2].rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        completed_process = subprocess.run([build.ensure_built("testbox"), "get", url, "10"], capture_output=True, text=True)
        forward.kill()
    assert completed_process.stdout.strip() == "p"


def test_a_pod_with_a_missing_image_waits_with_this_reason(api: NamespaceApi) -> None:
    api.create(make_pod("p", "exit", "0", container={"image": "localhost/no-such-image:1"}))
    waiting_pod = api.wait("pod", "p", lambda p: read_waiting_reason(p) in ("ErrImagePull", "ImagePullBackOff"))
    assert read_phase(waiting_pod) == "Pending"


def test_pods_under_pod_security_restricted_run(api: NamespaceApi) -> None:
    label = "pod-security.kubernetes.io/enforce=restricted"
    api.kubectl("label", "namespace", api.namespace, label)
    container_fields = {
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108  a path in the container
    }
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}]
    manifest = make_pod("p", "say", "/dev/shm/x", "y", "--", "exit", "0", container=container_fields, volumes=volumes)  # noqa: S108
    assert read_terminated_state(api.run(manifest))["exitCode"] == 0
