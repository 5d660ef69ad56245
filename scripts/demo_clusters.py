"""Start or connect to the cluster of the demo: a local cluster, a kind cluster, or the cluster of the user's kubeconfig.

The demo does not create or delete the cluster of a kubeconfig, and removes only its own objects from this cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from finetune_api.names import GROUP, PLURAL
from parallel_steps import Commands, Step
from prepare import ROOT, make_local_steps
from smollm2 import cache_folder
from tools import KIND, find_installed_kind

from localcluster import s3_pod
from localcluster.errors import NotRunning
from localcluster.machine import take_lock
from localcluster.node_cluster import NodeCluster
from localcluster.processes import Lifetime
from localcluster.s3 import S3Endpoint, is_ready, make_access_keys
from localcluster.steps import show_step

OPERATOR_IMAGE = "localhost/finetune-operator:dev"
TRAINER_IMAGE = "localhost/finetune-trainer:dev"
KIND_CLUSTER_NAME = "finetune-demo"
NAMESPACE = "finetune-demo"
RELEASE_NAME = "finetune-operator"
CRD_NAME = f"{PLURAL}.{GROUP}"
DEMO_LABEL = f"{GROUP}/demo"
"""Label of the namespaces that the demo has created in a user's cluster."""


class NoCluster(Exception):
    """The demo has no cluster to run on. The one-line message says what is missing."""


class DemoCluster(ABC):
    """A cluster on which the demo runs."""

    name: str
    operator_image = OPERATOR_IMAGE
    trainer_image = TRAINER_IMAGE

    @abstractmethod
    def steps(self) -> list[Step]:
        """Return the slow steps that prepare the cluster. The demo runs them in parallel before it calls `up`."""

    @abstractmethod
    def up(self) -> None:
        """Start the cluster, load the images and start S3."""

    @abstractmethod
    def down(self) -> None:
        """Remove what `up` has created."""

    @property
    @abstractmethod
    def kubeconfig(self) -> Path:
        """A kubeconfig with administrator rights."""

    @property
    @abstractmethod
    def s3(self) -> S3Endpoint:
        """The S3 server for models, data and results."""

    @abstractmethod
    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl. Returns its output. Errors: CalledProcessError."""

    def has_demo_objects(self) -> bool:
        """Whether the demo must uninstall its objects, because `down` does not remove the whole cluster."""
        return False

    def describe_manual_commands(self) -> list[str]:
        """Return commands for the user. The demo prints them if KEEP=1 keeps everything running."""
        return [f"export KUBECONFIG={self.kubeconfig}", "kubectl get finetunejobs -A     # show the jobs", "make down"]


class LocalDemoCluster(DemoCluster):
    """The cluster of `localcluster`, which needs Linux and root. If this cluster is already running, the demo uses the cluster and does not stop it."""

    name = "local"

    def __init__(self, *, keep_running: bool) -> None:
        self._cluster = NodeCluster(lifetime=Lifetime.UNTIL_STOPPED if keep_running else Lifetime.UNTIL_PARENT_ENDS, step=show_step)
        self._was_running = False

    def steps(self) -> list[Step]:
        if not self._is_running():
            take_lock(self._cluster.state_dir).close()  # fails before the slow steps begin if another cluster is running
        return make_local_steps()

    def up(self) -> None:
        self._was_running = self._is_running()
        self._cluster.up()
        for image in (OPERATOR_IMAGE, TRAINER_IMAGE):
            self._cluster.load_image(image)

    def _is_running(self) -> bool:
        try:
            return self._cluster.endpoint.is_ready()
        except NotRunning:
            return False

    def down(self) -> None:
        if not self._was_running:
            self._cluster.down()

    @property
    def kubeconfig(self) -> Path:
        return self._cluster.kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        return self._cluster.s3

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._cluster.kubectl(*arguments, stdin=stdin)

    def describe_manual_commands(self) -> list[str]:
        kubectl_command = f"{sys.executable} -m localcluster kubectl --"
        return [f"export KUBECONFIG={self.kubeconfig}", f"{kubectl_command} get finetunejobs -A", "make down"]


class KubectlCluster(DemoCluster):
    """A cluster that the demo accesses with the kubectl on the PATH."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout


class KindCluster(KubectlCluster):
    """A kind cluster in Docker. Docker builds the images. S3 runs in a pod, and this machine connects to it through a port-forward."""

    name = "kind"

    def __init__(self, *, keep_running: bool) -> None:
        del keep_running  # kind's containers keep running until they are removed
        self._kubeconfig = cache_folder() / f"{KIND_CLUSTER_NAME}.kubeconfig"
        self._kind_program = find_installed_kind() or KIND.path
        self._port_forward: subprocess.Popen[str] | None = None
        self._s3: S3Endpoint | None = None

    def steps(self) -> list[Step]:
        kind_steps = [] if find_installed_kind() else [KIND.make_build_step()]
        build_steps = [
            Step(f"image of the {name}", lambda run_command, file=file, tag=tag: self._build_image(run_command, file, tag))  # type: ignore[misc]  # lambda defaults
            for name, file, tag in (
                ("operator", "operator/Dockerfile", OPERATOR_IMAGE),
                ("trainer", "trainer-image/Dockerfile", TRAINER_IMAGE),
            )
        ]
        create_step = Step("kind cluster", self._create_cluster, required_steps=tuple(step.name for step in kind_steps))
        return [*kind_steps, *build_steps, create_step]

    def _build_image(self, run_command: Commands, dockerfile: str, tag: str) -> None:
        run_command(["docker", "build", "-q", "-f", ROOT / dockerfile, "-t", tag, ROOT])

    def _create_cluster(self, run_command: Commands) -> None:
        cluster_names = subprocess.run([self._kind_program, "get", "clusters"], capture_output=True, text=True).stdout.split()
        if KIND_CLUSTER_NAME in cluster_names:
            run_command([self._kind_program, "export", "kubeconfig", "--name", KIND_CLUSTER_NAME, "--kubeconfig", self._kubeconfig])
        else:
            run_command(
                [self._kind_program, "create", "cluster", "--name", KIND_CLUSTER_NAME, "--kubeconfig", self._kubeconfig, "--wait", "180s"]
            )

    def up(self) -> None:
        for image in (OPERATOR_IMAGE, TRAINER_IMAGE):
            with show_step(f"load {image}"):
                self._run_kind("load", "docker-image", image, "--name", KIND_CLUSTER_NAME)
        with show_step("start S3"), tempfile.TemporaryDirectory() as folder:
            self._run_kind("load", "image-archive", str(_write_s3_archive(Path(folder))), "--name", KIND_CLUSTER_NAME)
            access_key, secret_key = make_access_keys()
            objects = {"apiVersion": "v1", "kind": "List", "items": s3_pod.make_s3_manifests(access_key, secret_key)}
            self.kubectl("apply", "-f", "-", stdin=json.dumps(objects))
            self.kubectl("-n", s3_pod.NAMESPACE, "rollout", "status", f"deployment/{s3_pod.APP_NAME}", "--timeout=120s")
            self._s3 = self._forward_s3_port(access_key, secret_key)

    def _forward_s3_port(self, access_key: str, secret_key: str) -> S3Endpoint:
        command = ["kubectl", "--kubeconfig", str(self._kubeconfig), "-n", s3_pod.NAMESPACE, "port-forward"]
        self._port_forward = subprocess.Popen(
            [*command, f"service/{s3_pod.APP_NAME}", f":{s3_pod.S3_PORT}"], stdout=subprocess.PIPE, text=True
        )
        assert self._port_forward.stdout is not None
        port = self._port_forward.stdout.readline().partition("->")[0].rpartition(":")[2].strip()
        endpoint = S3Endpoint(f"http://127.0.0.1:{port}", s3_pod.CLUSTER_URL, access_key, secret_key)
        if not port or not is_ready(endpoint):
            raise NoCluster("the S3 server in the kind cluster does not respond through `kubectl port-forward`")
        return endpoint

    def _run_kind(self, *arguments: str) -> None:
        subprocess.run([self._kind_program, *arguments], check=True, capture_output=True)

    def down(self) -> None:
        if self._port_forward:
            self._port_forward.terminate()
            self._port_forward.wait()
        subprocess.run([self._kind_program, "delete", "cluster", "--name", KIND_CLUSTER_NAME], capture_output=True, check=False)

    @property
    def kubeconfig(self) -> Path:
        return self._kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        if self._s3 is None:
            raise NoCluster("the kind cluster is not running")
        return self._s3


def _write_s3_archive(folder: Path) -> Path:
    """Write the S3 image as a tar archive. Returns its path. An annotation sets the name under which containerd imports the image."""
    layout_folder = shutil.copytree(s3_pod.write_image_layout(), folder / "layout")
    image_index = json.loads((layout_folder / "index.json").read_text())
    for manifest_entry in image_index["manifests"]:
        manifest_entry["annotations"]["io.containerd.image.name"] = s3_pod.IMAGE_TAG
    (layout_folder / "index.json").write_text(json.dumps(image_index))
    archive_file = folder / "seaweedfs.tar"
    with tarfile.open(archive_file, "w") as tar:
        tar.add(layout_folder, arcname=".")
    return archive_file


class CurrentCluster(KubectlCluster):
    """The cluster of the user's kubeconfig. Its nodes pull the images from a registry, and the demo uses an S3 server that already exists."""

    name = "current"
    required_variables = ("OPERATOR_IMAGE", "TRAINER_IMAGE", "S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

    def __init__(self, *, keep_running: bool) -> None:
        del keep_running
        missing_variables = [name for name in self.required_variables if not os.environ.get(name)]
        if missing_variables:
            raise NoCluster(
                f"CLUSTER=current needs {', '.join(missing_variables)}: build the images and push them to a registry, and start an S3 server "
                "that pods and this machine can reach (set S3_CLUSTER_ENDPOINT if pods use another address)"
            )
        self.operator_image = os.environ["OPERATOR_IMAGE"]
        self.trainer_image = os.environ["TRAINER_IMAGE"]

    def steps(self) -> list[Step]:
        return []

    def up(self) -> None:
        with show_step("connect to the cluster of the kubeconfig"):
            self.kubectl("version", "-o", "json")
        with show_step("connect to S3"):
            if not is_ready(self.s3):
                raise NoCluster(f"S3_ENDPOINT={self.s3.host_url} refuses a write that is signed with the given keys")
        self._create_namespaces()

    def _create_namespaces(self) -> None:
        """Create the demo's two namespaces. Errors: NoCluster if a namespace or the CRD already exists and was not created by an earlier demo."""
        labels_by_namespace = {name: self._read_labels("namespace", name) for name in (RELEASE_NAME, NAMESPACE)}
        foreign_objects = [
            f"namespace {name}"
            for name, object_labels in labels_by_namespace.items()
            if object_labels is not None and DEMO_LABEL not in object_labels
        ]
        if labels_by_namespace[RELEASE_NAME] is None and self._read_labels("crd", CRD_NAME) is not None:
            foreign_objects.append(f"the CustomResourceDefinition {CRD_NAME}")
        if foreign_objects:
            raise NoCluster(
                f"the cluster of {self.kubeconfig} already has {' and '.join(foreign_objects)}. The demo would replace these objects, and remove "
                "them at its end: use a cluster without the operator, or apply examples/quickstart.yaml to this cluster yourself"
            )
        for name, object_labels in labels_by_namespace.items():
            if object_labels is None:
                metadata = {"name": name, "labels": {DEMO_LABEL: "true"}}
                namespace_object = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
                self.kubectl("create", "-f", "-", stdin=json.dumps(namespace_object))

    def _read_labels(self, kind: str, name: str) -> dict[str, str] | None:
        """Return the labels of an object; None if the object does not exist."""
        json_text = self.kubectl("get", kind, name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(json_text)["metadata"].get("labels") or {}) if json_text.strip() else None

    def has_demo_objects(self) -> bool:
        try:
            return DEMO_LABEL in (self._read_labels("namespace", RELEASE_NAME) or {})
        except subprocess.CalledProcessError:
            return False  # the demo cannot reach the cluster, so it has created nothing

    def down(self) -> None:
        """Do nothing: `demo.uninstall_objects` removes the demo's objects."""

    @property
    def kubeconfig(self) -> Path:
        return Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")

    @property
    def s3(self) -> S3Endpoint:
        host_url = os.environ["S3_ENDPOINT"]
        cluster_url = os.environ.get("S3_CLUSTER_ENDPOINT") or host_url
        return S3Endpoint(host_url, cluster_url, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])


CLUSTER_CLASSES: dict[str, Any] = {"kind": KindCluster, "local": LocalDemoCluster, "current": CurrentCluster}


def is_docker_running() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def choose_cluster(requested_name: str, *, keep_running: bool) -> DemoCluster:
    """Return the cluster `requested_name`. If `requested_name` is empty, return the best available cluster. Errors: NoCluster."""
    if requested_name and requested_name not in CLUSTER_CLASSES:
        raise NoCluster(f"CLUSTER={requested_name} is unknown: set CLUSTER to kind, local or current, or do not set it")
    if not requested_name:
        requested_name = choose_available_cluster()
    if requested_name == "kind" and not is_docker_running():
        raise NoCluster(
            "CLUSTER=kind needs Docker, but `docker info` fails: start Docker, or use CLUSTER=local"
        )
    if requested_name == "local":
        check_local_cluster()
    elif shutil.which("kubectl") is None:
        raise NoCluster(f"CLUSTER={requested_name} needs kubectl, but kubectl is not on the PATH: install it")
    cluster: DemoCluster = CLUSTER_CLASSES[requested_name](keep_running=keep_running)
    return cluster


def check_local_cluster() -> None:
    """Check the requirements of the local cluster that the demo cannot install. Errors: NoCluster."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoCluster(
            "CLUSTER=local needs Linux and root: run `sudo make demo`, or start Docker and use CLUSTER=kind"
        )
    if shutil.which("go") is None:
        raise NoCluster(
            "CLUSTER=local needs Go 1.26 or newer to build Kubernetes, but `go` is not on the PATH: install it"
        )


def choose_available_cluster() -> str:
    """Choose a cluster for a user who has not set CLUSTER. Returns its name. Errors: NoCluster."""
    if is_docker_running():
        return "kind"
    if sys.platform == "linux" and os.geteuid() == 0:
        return "local"
    raise NoCluster(
        "no cluster is available: Docker is not running (for kind), and this user is not root on Linux (for the local cluster): "
        "start Docker, use sudo, or choose CLUSTER=current"
    )
