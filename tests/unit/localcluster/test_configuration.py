"""What the local cluster computes: addresses, command lines, configuration files, small images, and messages about missing requirements."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from localcluster import (
    build,
    components,
    containerd,
    control_plane,
    layout,
    paths,
    ports,
    requirements,
    s3,
    s3_pod,
    store,
)
from localcluster.components import ControlPlaneAddresses, User
from localcluster.errors import BuildFailed, ImageNotFound, MissingRequirement
from localcluster.layout import Plan, find_free_address_block
from localcluster.node_cluster import find_layout
from localcluster.oci import Image, find_index_entry, write_layout


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path, "10.222", 2)


def test_each_node_of_a_plan_has_its_own_addresses(plan: Plan) -> None:
    first_node, second_node = plan.nodes
    assert (first_node.name, first_node.address, first_node.pod_cidr) == ("n1", "10.222.0.1", "10.222.1.0/24")
    assert (second_node.name, second_node.address, second_node.pod_cidr) == ("n2", "10.222.0.2", "10.222.2.0/24")
    assert (plan.api_address, plan.host_address, plan.cluster_cidr) == ("10.222.0.1", "10.222.0.254", "10.222.0.0/16")
    assert second_node.cgroup == "/finetune-localcluster/n2"
    assert Plan.load(plan.dump()) == plan
    assert plan.node("n2") == second_node
    with pytest.raises(KeyError):
        plan.node("n3")


def test_images_of_nodes_are_outside_the_state_folder(plan: Plan) -> None:
    assert [node.image_folder for node in plan.nodes] == [paths.cache_folder() / "nodes" / "n1", paths.cache_folder() / "nodes" / "n2"]


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ([], "10.201"),
        ([{"dst": "default"}, {"dst": "0.0.0.0/1"}], "10.201"),
        ([{"dst": "10.201.3.0/24"}], "10.202"),
        ([{"dst": "10.200.0.0/14"}], "10.204"),
        ([{"dst": "10.0.0.0/8"}], "172.20"),
        ([{"dst": "10.201.0.7"}, {"dst": "10.202.0.0/16"}], "10.203"),
    ],
)
def test_first_free_address_block_is_chosen(monkeypatch: pytest.MonkeyPatch, routes: list[dict[str, str]], expected: str) -> None:
    _set_routes(monkeypatch, routes)
    assert find_free_address_block() == expected


def test_no_free_address_block_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_routes(monkeypatch, [{"dst": "10.0.0.0/8"}, {"dst": "172.16.0.0/12"}, {"dst": "198.18.0.0/15"}])
    with pytest.raises(MissingRequirement, match=r"no free address range: 10\.201, .* all have routes"):
        find_free_address_block()


def _set_routes(monkeypatch: pytest.MonkeyPatch, routes: list[dict[str, str]]) -> None:
    completed_process = subprocess.CompletedProcess([], 0, stdout=json.dumps(routes))
    monkeypatch.setattr(layout.subprocess, "run", lambda *_, **__: completed_process)


def test_api_server_on_the_loopback_has_no_endpoint_reconciler(tmp_path: Path) -> None:
    def find_endpoint_reconciler(address: str) -> str:
        addresses = ControlPlaneAddresses(address, address, 6443, 2379, 2380)
        arguments = components.make_api_server_command(Path("kube"), tmp_path, addresses)
        return arguments[arguments.index("--endpoint-reconciler-type") + 1]

    assert (find_endpoint_reconciler("127.0.0.1"), find_endpoint_reconciler("10.201.0.1")) == ("none", "lease")


def test_the_audit_log_records_created_pods_writes_to_one_group_and_requests_of_service_accounts(tmp_path: Path) -> None:
    policy = json.loads(components.make_audit_policy("example.org"))
    assert [rule["level"] for rule in policy["rules"]] == ["Request", "Metadata", "None", "Metadata", "None"]
    assert policy["rules"][0] == {"level": "Request", "verbs": ["create"], "resources": [{"group": "", "resources": ["pods"]}]}
    assert policy["rules"][3] == {"level": "Metadata", "userGroups": ["system:serviceaccounts"]}
    assert policy["rules"][1]["resources"] == [{"group": "example.org"}] and "patch" in policy["rules"][1]["verbs"]
    addresses = ControlPlaneAddresses("127.0.0.1", "127.0.0.1", 6443, 2379, 2380)
    arguments = components.make_api_server_command(Path("kube"), tmp_path, addresses)
    assert arguments[arguments.index("--audit-log-path") + 1] == str(tmp_path / "logs/audit.log")


def test_kubeconfig_with_certificate_verifies_the_server() -> None:
    unverified_cluster = json.loads(components.make_kubeconfig("https://a:1", "t", None))["clusters"][0]["cluster"]
    assert unverified_cluster == {"server": "https://a:1", "insecure-skip-tls-verify": True}
    verified_cluster = json.loads(components.make_kubeconfig("https://a:1", "t", b"x"))["clusters"][0]["cluster"]
    assert verified_cluster == {"server": "https://a:1", "certificate-authority-data": "eA=="}


def test_user_becomes_a_line_of_the_token_file() -> None:
    assert User("secret", "system:node:n1", "system:nodes").token_file_line == "secret,system:node:n1,system:node:n1,system:nodes\n"


def test_containerd_configuration_uses_a_local_sandbox_image(plan: Plan) -> None:
    node = plan.nodes[1]
    configuration = tomllib.loads(containerd.make_configuration(node, is_cri_enabled=True))
    cri = configuration["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["restrict_oom_score_adj"] is True
    assert cri["sandbox_image"] == "localhost/pause:1"
    assert configuration["root"] == str(node.image_folder)
    assert "io.containerd.grpc.v1.cri" not in configuration["disabled_plugins"]
    assert "io.containerd.grpc.v1.cri" in tomllib.loads(containerd.make_configuration(node, is_cri_enabled=False))["disabled_plugins"]


def test_pods_of_a_node_get_addresses_from_its_range(plan: Plan) -> None:
    bridge = json.loads(containerd.make_cni_configuration(plan.nodes[1]))["plugins"][0]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.222.2.0/24", "rangeStart": "10.222.2.10"}]]


def test_small_images_are_reproducible_layouts(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    image = Image("localhost/x:1", {"/bin/x": program}, ["/bin/x"])
    layout_a, layout_b = write_layout(tmp_path / "a", image), write_layout(tmp_path / "b", image)
    name, entry = find_index_entry(layout_a, "localhost/x:1")
    assert (name, entry) == find_index_entry(layout_b)
    for path in (layout_a / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    manifest = json.loads(store.get_blob_path(layout_a, entry["digest"]).read_text())
    with tarfile.open(store.get_blob_path(layout_a, manifest["layers"][0]["digest"])) as layer:
        assert [(member.name, oct(member.mode)) for member in layer] == [("bin/x", "0o755"), ("tmp", "0o1777")]
    assert json.loads(store.get_blob_path(layout_a, manifest["config"]["digest"]).read_text())["config"]["User"] == "65532:65532"


def test_missing_layout_or_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="is not an OCI image layout"):
        find_index_entry(tmp_path)
    program = tmp_path / "p"
    program.touch()
    existing_layout = write_layout(tmp_path / "l", Image("localhost/x:1", {"/p": program}, ["/p"]))
    with pytest.raises(ImageNotFound, match=r"contains \['localhost/x:1'\], not localhost/y:1"):
        find_index_entry(existing_layout, "localhost/y:1")


def test_built_images_are_found_by_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = tmp_path / "p"
    program.touch()
    folder = tmp_path / "finetune-operator" / "images" / "x"
    folder.parent.mkdir(parents=True)
    write_layout(folder, Image("localhost/x:dev", {"/p": program}, ["/p"]))
    assert find_layout("localhost/x:dev") == folder
    with pytest.raises(ImageNotFound, match="localhost/y:dev is not in the cache of this machine: run `localcluster images build`"):
        find_layout("localhost/y:dev")


def test_images_whose_only_name_is_their_hash_are_found() -> None:
    images = {"localhost/a:dev": "sha256:2", "sha256:x": "sha256:1", "sha256:y": "sha256:2"}
    assert store.find_untagged_names(images) == ["sha256:x"]


def test_path_of_a_program_contains_its_version_and_source_hash() -> None:
    kube = build.PROGRAM_BY_NAME[build.KUBE_PROGRAM]
    assert kube.version.split(".")[0] == "1"
    assert kube.binary_path.parent.name.startswith(f"kube-{kube.version}-")
    assert f"gitVersion=v{kube.version}" in kube.build_flags[-1]
    assert len({program.binary_path for program in build.PROGRAM_BY_NAME.values()}) == len(build.PROGRAM_BY_NAME)


def test_program_whose_module_is_not_in_go_mod_is_an_error() -> None:
    with pytest.raises(BuildFailed, match="requires no example.org/none"):
        assert build.Program("pause", "example.org/none").version


@pytest.mark.parametrize(
    ("output", "is_accepted"),
    [("go version go1.26.8 linux/amd64", True), ("go version go2.0 linux/amd64", True), ("go version go1.25.1 x", False),
     ("", False)],
)
def test_go_must_be_new_enough(monkeypatch: pytest.MonkeyPatch, output: str, is_accepted: bool) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda _: "/go")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=output))
    if is_accepted:
        build.check_go()
    else:
        with pytest.raises(MissingRequirement, match=r"Go 1\.26 or newer is needed, but `go version` reports: "):
            build.check_go()


def test_error_names_missing_go_and_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(MissingRequirement, match="Go 1.26 or newer is missing"):
        build.check_go()
    monkeypatch.setattr(requirements, "find_executable", lambda program: None if program in ("ctr", "containerd") else "/x")
    with pytest.raises(MissingRequirement, match="packages are missing: containerd: run `localcluster packages"):
        requirements.check_packages(requirements.NODE_PACKAGES)


def test_nodes_need_root_and_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.os, "geteuid", lambda: 1000)
    with pytest.raises(MissingRequirement, match="needs root"):
        requirements.check_node()
    monkeypatch.setattr(requirements.sys, "platform", "darwin")
    with pytest.raises(MissingRequirement, match="needs Linux, but this machine runs darwin: use kind"):
        requirements.check_node()


def test_free_ports_are_different_and_free() -> None:
    free_ports = ports.find_free_ports(20)
    assert len(set(free_ports)) == 20
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_ports[0]))


def test_s3_server_has_no_telemetry_and_uses_each_port_once() -> None:
    arguments = s3.make_server_arguments(list(range(8)), data_folder="d", config_file="c", s3_bind_address="127.0.0.1")
    assert "-master.telemetry=false" in arguments
    chosen_ports = [argument.partition("=")[2] for argument in arguments if "port" in argument and not argument.endswith(("iceberg=0", "lance=0"))]
    assert sorted(chosen_ports) == [str(port) for port in range(8)]


def test_s3_pod_runs_only_on_the_given_node() -> None:
    def get_node_selector(node: str | None) -> object:
        return s3_pod.make_s3_manifests("a", "b", node=node)[-1]["spec"]["template"]["spec"]["nodeSelector"]

    assert (get_node_selector("n1"), get_node_selector(None)) == ({"kubernetes.io/hostname": "n1"}, {})
    assert [manifest["kind"] for manifest in s3_pod.make_s3_manifests("a", "b")] == ["Namespace", "Secret", "Service", "Deployment"]


def test_certificate_is_copied_until_the_api_server_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "certs" / "apiserver.crt"
    certificate.parent.mkdir()
    certificate.touch()
    copies: list[bytes] = []

    def copy_and_check(endpoint: control_plane.Endpoint) -> bool:
        copies.append(endpoint.ca.read_bytes())
        certificate.write_bytes(b"whole")
        return copies[-1] == b"whole"

    monkeypatch.setattr(control_plane.Endpoint, "is_ready", copy_and_check)
    addresses = ControlPlaneAddresses("127.0.0.1", "127.0.0.1", 6443, 2379, 2380)
    endpoint = control_plane.wait_for_api(tmp_path, addresses, "token", [])
    assert (copies, endpoint.ca.read_bytes()) == ([b"", b"whole"], b"whole")
