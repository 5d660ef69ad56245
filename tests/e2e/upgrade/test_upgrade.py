"""An upgrade from release 0.1.0 to this checkout, and the rollback, neither restart a job nor let it fail, whatever phase the job is in.

The chart, the CRD and the images of the old release are built from its commit in the repository's history.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import PLURAL, Label, Phase

from localcluster import images
from localcluster.steps import show_step
from tests.e2e.jobs.installation import ROOT, SMALL_RESOURCES, ChartInputs, Installation, JobNamespace, demo, make_job
from tests.support.kubeapi import Object

# The first test run takes several minutes longer than later runs, because it builds the images of release 0.1.0.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

OLD_COMMIT = "d755abe"
"""Commit of release 0.1.0."""
CHART_PATH = "helm/finetune-operator"
STEPS = 60
CPU_RESOURCES = {"gpusPerNode": 0, "cpu": "100m", "memory": "2Gi"}


@dataclass(frozen=True)
class Release:
    """A release of the operator: its chart, and its images and S3 endpoint for the chart's values."""

    chart: Path
    images: ChartInputs

    def install(self, installation: Installation) -> None:
        """Run `helm upgrade --install`, and wait until the new operator pod is ready."""
        values = demo.make_helm_values(self.images)  # type: ignore[arg-type]  # demo.make_helm_values reads only the fields of ChartInputs
        values["settings"] |= {"retry": {"baseSeconds": 1}}
        values["trainer"] |= {"resources": SMALL_RESOURCES, "env": {"OMP_NUM_THREADS": "1"}}
        installation.helm(
            "upgrade", "--install", demo.RELEASE_NAME, str(self.chart), "--wait", "--timeout", "3m", "-f", "-", values=values
        )
        installation.cluster.kubectl(
            "-n", demo.RELEASE_NAME, "rollout", "status", f"deployment/{demo.RELEASE_NAME}", "--timeout=120s"
        )


@pytest.fixture(scope="module")
def old_release(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Release 0.1.0. The fixture builds the images of this release and loads them into the nodes."""
    source = tmp_path_factory.mktemp("release-0.1.0")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", OLD_COMMIT], capture_output=True)
    if archive.returncode != 0:
        pytest.skip(f"the clone has no commit {OLD_COMMIT}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    tags = {}
    for image_name in (images.ImageName.OPERATOR, images.ImageName.TRAINER):
        recipe = images.RECIPE_BY_IMAGE[image_name]
        old_recipe = images.ImageRecipe(f"{recipe.name}-0.1.0", recipe.dockerfile, recipe.build_arguments, recipe.needed_disk_gb)
        built_image = images.build_recipe(old_recipe, source, show_step)
        tags[image_name] = installation.cluster.load_image(built_image.layout_folder)
    chart_inputs = ChartInputs(installation.cluster.s3, tags[images.ImageName.OPERATOR], tags[images.ImageName.TRAINER])
    return Release(source / CHART_PATH, chart_inputs)


@pytest.fixture
def new_release(installation: Installation) -> Iterator[Release]:
    """The release of this checkout. After the test, this release is installed again, because later tests need it."""
    release = Release(ROOT / CHART_PATH, ChartInputs(installation.cluster.s3))
    yield release
    release.install(installation)


def make_long_job(name: str, resources: dict[str, Any], **spec_groups: Any) -> Object:
    """Return a job with frequent checkpoints that is still training when the operator is upgraded."""
    return make_job(
        name,
        resources=resources,
        training={"maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 4},
        checkpoint={"steps": 5},
        policy={"terminationGracePeriodSeconds": 60},
        **spec_groups,
    )


JOBS = {
    "running": make_long_job("running", CPU_RESOURCES),
    "gang": make_long_job("gang", CPU_RESOURCES | {"nodes": 2}),
    "suspended": make_long_job("suspended", CPU_RESOURCES),
    "done": make_job("done", training={"maxSteps": 2}),
    "failed": make_job("failed", dataset={"train": "s3://datasets/missing.jsonl"}),
    "cancelled": make_job("cancelled", training={"maxSteps": 500}),
    "unschedulable": make_job("unschedulable", resources={"gpusPerNode": 64}),
    "queued": make_job("queued", training={"maxSteps": 2}, placement={"queueName": "nobody-admits"}),
}


def bring_into_every_phase(job_namespace: JobNamespace) -> None:
    """Apply all jobs, and bring each job into the situation that its name describes."""
    job_namespace.apply(JOBS["done"], JOBS["failed"], JOBS["unschedulable"], JOBS["queued"])
    job_namespace.wait_finished("done")
    job_namespace.wait_finished("failed", Phase.FAILED)
    job_namespace.apply(JOBS["cancelled"])
    job_namespace.wait("cancelled", lambda s: s.progress and s.progress.step, "training")
    job_namespace.installation.api.patch(PLURAL, job_namespace.namespace, "cancelled", {"spec": {"cancel": True}})
    job_namespace.wait_finished("cancelled", Phase.CANCELLED)
    job_namespace.apply(JOBS["suspended"])
    job_namespace.wait("suspended", lambda s: s.latest_checkpoint, "past its first checkpoint")
    job_namespace.installation.api.patch(PLURAL, job_namespace.namespace, "suspended", {"spec": {"suspend": True}})
    job_namespace.wait("suspended", lambda s: s.phase is Phase.SUSPENDED, "suspended")
    job_namespace.wait("unschedulable", lambda s: s.phase is Phase.STARTING, "starting")
    job_namespace.wait("queued", lambda s: s.phase is Phase.QUEUED, "queued")
    job_namespace.apply(JOBS["running"], JOBS["gang"])
    for name in ("running", "gang"):
        job_namespace.wait(name, lambda s: s.progress and s.progress.step, "training")


def read_job_states(job_namespace: JobNamespace) -> dict[str, tuple[Any, ...]]:
    """Return what an upgrade must not change in each job: the attempt, the restarts, the number of ended attempts and the uids of the pods."""
    states = {}
    for name in JOBS:
        status = job_namespace.status(name)
        uids = sorted(pod["metadata"]["uid"] for pod in job_namespace.pods(name))
        states[name] = (status.attempt, status.restarts, len(status.attempts), uids)
    return states


def replace_operator_and_finish(job_namespace: JobNamespace, release: Release) -> None:
    """Install a release while the jobs are in different phases, and check that every job ends as it would without this installation."""
    states_before = read_job_states(job_namespace)
    phases = {name: job_namespace.status(name).phase for name in ("suspended", "done", "failed", "cancelled", "queued")}
    release.install(job_namespace.installation)
    # Change each spec. As soon as observedGeneration in the status is the new generation, the new operator has reconciled the job.
    for name in JOBS:
        job_namespace.installation.api.patch(
            PLURAL, job_namespace.namespace, name, {"spec": {"policy": {"ttlSecondsAfterFinished": 86400}}}
        )
        generation = job_namespace.installation.api.get(PLURAL, job_namespace.namespace, name)["metadata"]["generation"]
        job_namespace.wait(
            name,
            lambda s, generation=generation: s.observed_generation == generation,  # type: ignore[misc]
            "reconciled by the other operator",
        )
    assert read_job_states(job_namespace) == states_before
    assert {name: job_namespace.status(name).phase for name in phases} == phases
    gang = job_namespace.status("gang")
    assert gang.workers is not None
    assert gang.workers.total == 2
    job_namespace.installation.api.patch(PLURAL, job_namespace.namespace, "suspended", {"spec": {"suspend": False}})
    for name in ("running", "gang"):
        status = job_namespace.wait_finished(name)
        assert (status.restarts, len(status.attempts)) == (0, 1), f"{name}: {status.attempts}"
    resumed_status = job_namespace.wait_finished("suspended")
    first_attempt, second_attempt = resumed_status.attempts
    assert second_attempt.resumed_from_step == first_attempt.committed_step
    assert second_attempt.resumed_from_step
    failures = {name: job_namespace.status(name).failure for name in JOBS if name != "failed"}
    assert not any(failures.values()), failures


def test_jobs_in_every_phase_survive_the_upgrade_from_0_1_0_and_the_rollback(
    installation: Installation, job_namespace: JobNamespace, old_release: Release, new_release: Release
) -> None:
    old_release.install(installation)
    bring_into_every_phase(job_namespace)
    replace_operator_and_finish(job_namespace, new_release)
    for pod in installation.api.list("pods", demo.RELEASE_NAME):
        assert "0.1.0" not in pod["spec"]["containers"][0]["image"]

    rollback_namespace = installation.create_namespace(f"{job_namespace.namespace}-back")
    bring_into_every_phase(rollback_namespace)
    replace_operator_and_finish(rollback_namespace, old_release)
    assert installation.api.list("pods", rollback_namespace.namespace, labels=f"{Label.JOB_NAME}=running")
    installation.api.delete("namespaces", None, rollback_namespace.namespace)
