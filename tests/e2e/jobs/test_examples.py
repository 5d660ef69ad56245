"""Every example is applied as it is, and ends with a committed artefact of the right kind."""

from __future__ import annotations

import pytest
import yaml
from finetune_api.names import KIND, Label, Phase
from finetune_api.status import FineTuneJobStatus, OutputKind

from tests.e2e.jobs.site import ROOT, Room

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
KINDS = {"full": OutputKind.MODEL}
"""Adapters are what comes out otherwise."""
WORLD = {"full": 2, "two-pods": 2}
WEIGHTS = {OutputKind.MODEL: "model.safetensors", OutputKind.ADAPTER: "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def applied(shared_room: Room) -> Room:
    """All examples at once: they mostly wait for each other's imports."""
    shared_room.apply(*EXAMPLES)
    return shared_room


def steps_of(name: str) -> int:
    """Optimizer steps that an example must take."""
    (body,) = [
        item for item in yaml.safe_load_all((ROOT / f"examples/{name}.yaml").read_text("utf-8")) if item["kind"] == KIND
    ]
    # full: 18 rows, 2 ranks x 2 rows a step, one epoch
    return int(body["spec"]["training"].get("maxSteps", 5))


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_example_succeeds(applied: Room, name: str) -> None:
    status = applied.end(name)
    assert status.progress is not None
    assert (status.progress.step, status.progress.total_steps) == (steps_of(name), steps_of(name))
    assert status.restarts == 0
    check_output(applied, name, status)
    assert status.resolved is not None
    assert status.resolved.world_size == WORLD.get(name, 1)
    if name == "qlora":
        assert status.metrics is not None
        assert status.metrics.eval_loss is not None


def check_output(room: Room, name: str, status: FineTuneJobStatus) -> None:
    """What the status names lies in S3, whole."""
    assert status.output is not None
    assert status.output.uri is not None
    kind = KINDS.get(name, OutputKind.ADAPTER)
    assert status.output.kind is kind
    files = room.site.manifest(status.output.uri)
    assert WEIGHTS[kind] in files
    bucket, _, prefix = status.output.uri.removeprefix("s3://").partition("/")
    for path in files:
        assert room.site.store.head_object(Bucket=bucket, Key=f"{prefix}/{path}")["ContentLength"] > 0


def test_two_pods_run_on_two_nodes(applied: Room) -> None:
    applied.end("two-pods")
    nodes = sorted(pod["spec"]["nodeName"] for pod in applied.pods("two-pods"))
    assert len(nodes) == 2


def test_pods_are_restricted_and_know_no_credentials_of_the_cluster(applied: Room) -> None:
    (pod,) = applied.pods("quickstart")
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["metadata"]["labels"][Label.NAME] == "quickstart"


def test_kubectl_get_says_it_all(applied: Room) -> None:
    for path in EXAMPLES:
        applied.end(path.stem)
    out = applied.site.cluster.kubectl("-n", applied.namespace, "get", "finetunejobs")
    header, *rows = out.splitlines()
    assert header.split() == ["NAME", "STATUS", "PROGRESS", "LOSS", "ETA", "WORKERS", "RESTARTS", "AGE"]
    assert {row.split()[0]: row.split()[1] for row in rows} == {path.stem: Phase.SUCCEEDED.value for path in EXAMPLES}
