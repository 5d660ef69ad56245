"""A job with (simulated) GPUs is prepared in the real image: without a GPU, without network beyond S3, with a read-only root file system."""

from __future__ import annotations

from finetune_api.names import Condition, Phase

from tests.e2e.jobs.installation import JobNamespace, job


def test_a_gpu_job_is_prepared_and_then_trained(job_namespace: JobNamespace) -> None:
    """The nodes have no real GPU, so the ranks compute on the CPU although the pod asks for a GPU."""
    gpu_job = job("prepared", resources={"gpusPerNode": 1}, training={"maxSteps": 2, "device": "cpu"})
    gpu_job["spec"].pop("prepare", None)  # the chart's default prepares jobs with GPUs
    job_namespace.apply(gpu_job)
    status = job_namespace.wait("prepared", lambda s: s.phase is Phase.PREPARING, "prepared", 60)
    assert (status.attempt, status.attempts) == (None, [])
    status = job_namespace.wait_finished("prepared")
    assert status.preparation is not None and (status.preparation.number, status.preparation.reason) == (1, "Prepared")
    assert status.data is not None and (status.data.truncated, (status.data.rows or {}).get("train")) == (0, 36)
    assert status.is_true(Condition.PREPARED) and status.restarts == 0
    gpus = {pod["metadata"]["labels"]["finetune-operator.io/attempt"]: pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            for pod in job_namespace.pods("prepared")}  # fmt: skip
    assert gpus == {"0": None, "1": "1"}
