"""A finished job that is deleted and applied again adopts its stored result, so no pod trains a second time."""

from __future__ import annotations

import pytest
from finetune_api.names import PLURAL, Condition, Reason

from tests.e2e.jobs.installation import JobNamespace, make_job


@pytest.mark.slow
def test_a_job_that_is_applied_again_adopts_its_result(job_namespace: JobNamespace) -> None:
    api, body = job_namespace.installation.api, make_job("again", training={"maxSteps": 2}, policy={"onExistingResult": "adopt"})
    job_namespace.apply(body)
    trained_status = job_namespace.wait_finished("again")
    assert trained_status.attempt == 1 and trained_status.output is not None and trained_status.output.uri is not None
    uid = api.get(PLURAL, job_namespace.namespace, "again")["metadata"]["uid"]
    files = job_namespace.installation.read_file_hashes(trained_status.output.uri)
    job_namespace.installation.cluster.kubectl("-n", job_namespace.namespace, "delete", "finetunejob", "again", "--wait", "--timeout=60s")
    api.wait_list("pods", job_namespace.namespace, lambda pods: not pods, timeout=60)

    job_namespace.apply(body)
    adopted_status = job_namespace.wait_finished("again")
    assert adopted_status.output == trained_status.output.model_copy(update={"adopted_uid": uid})
    assert (adopted_status.attempt, adopted_status.attempts, adopted_status.reason) == (None, [], Reason.EXISTING_RESULT_ADOPTED)
    assert adopted_status.is_true(Condition.SUCCEEDED)
    assert {pod["metadata"]["name"].rsplit("-", 2)[0] for pod in job_namespace.pods("again")} == {"again-prepare1"}
    assert job_namespace.installation.read_file_hashes(trained_status.output.uri) == files
