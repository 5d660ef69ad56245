"""The three places where the demo can run, behind one face: a local cluster, kind, or the cluster of a kubeconfig.

Only `current` touches a cluster that the demo did not make, and it takes away only what it brought.
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
from prepare import ROOT, local_steps
from side_by_side import Commands, Step, StepFailed
from smollm2 import cache
from tools import KIND, kind

from localcluster import s3_pod
from localcluster.errors import NotRunning
from localcluster.machine import take_lock
from localcluster.node_cluster import NodeCluster
from localcluster.processes import Lifetime
from localcluster.s3 import S3Endpoint, is_ready, new_keys
from localcluster.steps import shown

OPERATOR_IMAGE = "localhost/finetune-operator:dev"
TRAINER_IMAGE = "localhost/finetune-trainer:dev"
KIND_NAME = "finetune-demo"
NAMESPACE = "finetune-demo"
RELEASE = "finetune-operator"
CRD = f"{PLURAL}.{GROUP}"
OURS = f"{GROUP}/demo"
"""Label of namespaces that the demo made in a cluster which is not its own."""


class NoCluster(Exception):
    """There is no place to run in; the message is one line that says what is missing."""


class DemoCluster(ABC):
    """A place to run: made, used, taken away."""

    name: str
    operator_image = OPERATOR_IMAGE
    trainer_image = TRAINER_IMAGE
    @abstractmethod
    def steps(self) -> list[Step]:
        """The slow work before `up`, done side by side."""

    @abstractmethod
    def up(self) -> None:
        """Start it, images and S3 included."""

    @abstractmethod
    def down(self) -> None:
        """Take away what `up` made."""

    @property
    @abstractmethod
    def kubeconfig(self) -> Path:
        """A kubeconfig with administrator rights."""

    @property
    @abstractmethod
    def s3(self) -> S3Endpoint:
        """Where models and data are uploaded to, and results lie."""

    @abstractmethod
    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl; its output. CalledProcessError if it fails."""

    def is_guest(self) -> bool:
        """Whether the demo must take away, piece by piece, what it installed; not where the whole cluster goes."""
        return False

    def keep_lines(self) -> list[str]:
        """What to tell the user when everything is left up."""
        return [f"export KUBECONFIG={self.kubeconfig}", "kubectl get finetunejobs -A     # look around", "make down"]


class Local(DemoCluster):
    """The embedded cluster: Linux and root. One that was up before is used, and left up."""

    name = "local"

    def __init__(self, *, keep: bool) -> None:
        self._cluster = NodeCluster(lifetime=Lifetime.DETACHED if keep else Lifetime.PARENT, step=shown)
        self._was_up = False

    def steps(self) -> list[Step]:
        if not self._is_up():
            take_lock(self._cluster.state_dir).close()  # another cluster is better found now than after the slow steps
        return local_steps()

    def up(self) -> None:
        self._was_up = self._is_up()
        self._cluster.up()
        for image in (OPERATOR_IMAGE, TRAINER_IMAGE):
            self._cluster.load_image(image)

    def _is_up(self) -> bool:
        try:
            return self._cluster.endpoint.ready()
        except NotRunning:
            return False

    def down(self) -> None:
        if not self._was_up:
            self._cluster.down()

    @property
    def kubeconfig(self) -> Path:
        return self._cluster.kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        return self._cluster.s3

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._cluster.kubectl(*arguments, stdin=stdin)

    def keep_lines(self) -> list[str]:
        kubectl = f"{sys.executable} -m localcluster kubectl --"
        return [f"export KUBECONFIG={self.kubeconfig}", f"{kubectl} get finetunejobs -A", "make down"]


class WithKubectl(DemoCluster):
    """A cluster that is spoken to with the user's own kubectl."""

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout


class Kind(WithKubectl):
    """kind in Docker: the images built by Docker, S3 as a pod that is reached through a port-forward."""

    name = "kind"

    def __init__(self, *, keep: bool) -> None:
        del keep  # containers live until they are removed
        self._kubeconfig = cache() / f"{KIND_NAME}.kubeconfig"
        self._program = kind() or KIND.path
        self._forward: subprocess.Popen[str] | None = None
        self._s3: S3Endpoint | None = None

    def steps(self) -> list[Step]:
        tool = [] if kind() else [KIND.step()]
        builds = [
            Step(f"image of the {name}", lambda command, file=file, tag=tag: self._build(command, file, tag))  # type: ignore[misc]  # lambda defaults
            for name, file, tag in (
                ("operator", "operator/Dockerfile", OPERATOR_IMAGE),
                ("trainer", "trainer-image/Dockerfile", TRAINER_IMAGE),
            )
        ]
        create = Step("kind cluster", self._create, after=tuple(step.name for step in tool))
        return [*tool, *builds, create]

    def _build(self, command: Commands, file: str, tag: str) -> None:
        uv = shutil.which("uv") or next((str(p) for p in cache().glob("uv-*/bin/uv")), "")
        if not uv:
            raise StepFailed("uv is missing: run `make setup`")
        command(
            ["docker", "build", "-q", "-f", ROOT / file, "--build-context", f"uv={Path(uv).parent}", "-t", tag, ROOT]
        )

    def _create(self, command: Commands) -> None:
        clusters = subprocess.run([self._program, "get", "clusters"], capture_output=True, text=True).stdout.split()
        if KIND_NAME in clusters:
            command([self._program, "export", "kubeconfig", "--name", KIND_NAME, "--kubeconfig", self._kubeconfig])
        else:
            command(
                [
                    self._program,
                    "create",
                    "cluster",
                    "--name",
                    KIND_NAME,
                    "--kubeconfig",
                    self._kubeconfig,
                    "--wait",
                    "180s",
                ]
            )

    def up(self) -> None:
        for image in (OPERATOR_IMAGE, TRAINER_IMAGE):
            with shown(f"load {image}"):
                self._kind("load", "docker-image", image, "--name", KIND_NAME)
        with shown("start S3"), tempfile.TemporaryDirectory() as folder:
            self._kind("load", "image-archive", str(_s3_archive(Path(folder))), "--name", KIND_NAME)
            access_key, secret_key = new_keys()
            objects = {"apiVersion": "v1", "kind": "List", "items": s3_pod.objects(access_key, secret_key)}
            self.kubectl("apply", "-f", "-", stdin=json.dumps(objects))
            self.kubectl("-n", s3_pod.NAMESPACE, "rollout", "status", f"deployment/{s3_pod.NAME}", "--timeout=120s")
            self._s3 = self._reach_s3(access_key, secret_key)

    def _reach_s3(self, access_key: str, secret_key: str) -> S3Endpoint:
        command = ["kubectl", "--kubeconfig", str(self._kubeconfig), "-n", s3_pod.NAMESPACE, "port-forward"]
        self._forward = subprocess.Popen(
            [*command, f"service/{s3_pod.NAME}", f":{s3_pod.PORT}"], stdout=subprocess.PIPE, text=True
        )
        assert self._forward.stdout is not None
        port = self._forward.stdout.readline().partition("->")[0].rpartition(":")[2].strip()
        endpoint = S3Endpoint(f"http://127.0.0.1:{port}", s3_pod.CLUSTER_URL, access_key, secret_key)
        if not port or not is_ready(endpoint):
            raise NoCluster("S3 in the kind cluster does not answer through `kubectl port-forward`")
        return endpoint

    def _kind(self, *arguments: str) -> None:
        subprocess.run([self._program, *arguments], check=True, capture_output=True)

    def down(self) -> None:
        if self._forward:
            self._forward.terminate()
            self._forward.wait()
        subprocess.run([self._program, "delete", "cluster", "--name", KIND_NAME], capture_output=True, check=False)

    @property
    def kubeconfig(self) -> Path:
        return self._kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        if self._s3 is None:
            raise NoCluster("the kind cluster is not up")
        return self._s3


def _s3_archive(folder: Path) -> Path:
    """The S3 image as an archive that containerd imports under its name."""
    layout = shutil.copytree(s3_pod.layout(), folder / "layout")
    index = json.loads((layout / "index.json").read_text())
    for entry in index["manifests"]:
        entry["annotations"]["io.containerd.image.name"] = s3_pod.TAG
    (layout / "index.json").write_text(json.dumps(index))
    archive = folder / "seaweedfs.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, arcname=".")
    return archive


class Current(WithKubectl):
    """The cluster of the user's kubeconfig: images from a registry, S3 from outside; what was brought is taken away."""

    name = "current"
    needs = ("OPERATOR_IMAGE", "TRAINER_IMAGE", "S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

    def __init__(self, *, keep: bool) -> None:
        del keep
        missing = [name for name in self.needs if not os.environ.get(name)]
        if missing:
            raise NoCluster(
                f"CLUSTER=current needs {', '.join(missing)}: images that the cluster can pull (build and push them) "
                "and an S3 store that pods and this machine reach (S3_CLUSTER_ENDPOINT, where pods use another address)"
            )
        self.operator_image = os.environ["OPERATOR_IMAGE"]
        self.trainer_image = os.environ["TRAINER_IMAGE"]

    def steps(self) -> list[Step]:
        return []

    def up(self) -> None:
        with shown("reach the cluster of the kubeconfig"):
            self.kubectl("version", "-o", "json")
        with shown("reach S3"):
            if not is_ready(self.s3):
                raise NoCluster(f"S3_ENDPOINT={self.s3.host_url} does not take a signed write with these keys")
        self._claim()

    def _claim(self) -> None:
        """Make the demo's two namespaces. NoCluster if something of these names is there that the demo did not bring."""
        labels = {name: self._labels("namespace", name) for name in (RELEASE, NAMESPACE)}
        foreign = [f"namespace {name}" for name, found in labels.items() if found is not None and OURS not in found]
        if labels[RELEASE] is None and self._labels("crd", CRD) is not None:
            foreign.append(f"the definition {CRD}")
        if foreign:
            raise NoCluster(
                f"the cluster of {self.kubeconfig} has {' and '.join(foreign)}, which the demo did not bring and would "
                "replace and take away: use a cluster without the operator, or apply examples/quickstart.yaml there"
            )
        for name, found in labels.items():
            if found is None:
                meta = {"name": name, "labels": {OURS: "true"}}
                body = {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}
                self.kubectl("create", "-f", "-", stdin=json.dumps(body))

    def _labels(self, kind: str, name: str) -> dict[str, str] | None:
        """Labels of an object of the cluster; None if there is none."""
        text = self.kubectl("get", kind, name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(text)["metadata"].get("labels") or {}) if text.strip() else None

    def is_guest(self) -> bool:
        try:
            return OURS in (self._labels("namespace", RELEASE) or {})
        except subprocess.CalledProcessError:
            return False  # no such cluster: nothing was brought

    def down(self) -> None:
        """Nothing: what the demo brought is the demo's to remove."""

    @property
    def kubeconfig(self) -> Path:
        return Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")

    @property
    def s3(self) -> S3Endpoint:
        host = os.environ["S3_ENDPOINT"]
        inside = os.environ.get("S3_CLUSTER_ENDPOINT") or host
        return S3Endpoint(host, inside, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])


KINDS: dict[str, Any] = {"kind": Kind, "local": Local, "current": Current}


def docker_answers() -> bool:
    """Whether a Docker daemon can be used."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def choose(wanted: str, *, keep: bool) -> DemoCluster:
    """The cluster to use. NoCluster, in one line, if there is none or a word is not understood."""
    if wanted and wanted not in KINDS:
        raise NoCluster(f"CLUSTER={wanted} is not known: write kind, local or current, or leave it out")
    if not wanted:
        wanted = _best()
    if wanted == "kind" and not docker_answers():
        raise NoCluster(
            "CLUSTER=kind needs Docker, and `docker info` gets no answer: start Docker, or use CLUSTER=local"
        )
    if wanted == "local":
        check_local()
    elif shutil.which("kubectl") is None:
        raise NoCluster(f"CLUSTER={wanted} needs kubectl, which is not on the PATH: install it")
    chosen: DemoCluster = KINDS[wanted](keep=keep)
    return chosen


def check_local() -> None:
    """What no step of ours could mend."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NoCluster(
            "CLUSTER=local needs Linux and root: run `sudo make demo`, or start Docker and use CLUSTER=kind"
        )
    if shutil.which("go") is None:
        raise NoCluster(
            "CLUSTER=local needs Go 1.26 or newer to build Kubernetes, and `go` is not on the PATH: install it"
        )


def _best() -> str:
    if docker_answers():
        return "kind"
    if sys.platform == "linux" and os.geteuid() == 0:
        return "local"
    raise NoCluster(
        "no cluster to run in: Docker does not answer (for kind), and this is not root on Linux (for the local "
        "cluster): start Docker, use sudo, or choose CLUSTER=current"
    )
