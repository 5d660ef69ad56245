"""A job is prepared in the real image: it can reach only S3, and it runs as user 10001 with a read-only root file system.

`test_bad_input.py` tests that GPU jobs with bad input are refused. The job of this file requests no GPU, because the nodes have no real GPU to train on.
"""

from __future__ import annotations

from finetune_api.names import Condition, Phase

from tests.e2e.jobs.installation import JobNamespace, make_job


def test_a_job_is_prepared_and_then_trained(job_namespace: JobNamespace) -> None:
    job_namespace.apply(make_job("prepared", prepare={"strategy": "always"}, training={"maxSteps": 2}))
    status = job_namespace.wait("prepared", lambda s: s.phase is Phase.PREPARING, "prepared", 60)
    assert (status.attempt, status.attempts) == (None, [])
    status = job_namespace.wait_finished("prepared")
    assert status.preparation is not None and (status.preparation.number, status.preparation.reason) == (1, "Prepared")
    assert status.data is not None and (status.data.truncated, (status.data.rows or {}).get("train")) == (0, 36)
    assert status.data.tokenised_rows == 36 and (status.data.prepared_uri or "").endswith(f"/_prepared/{status.data.digest}")
    assert status.resolved is not None and "the rows of the preparation are used: 36 rows" in (status.resolved.notes or [])
    assert status.plan is not None and status.plan.memory is not None
    assert status.is_true(Condition.PREPARED) and status.restarts == 0
    assert {pod["metadata"]["name"].rsplit("-", 2)[0] for pod in job_namespace.pods("prepared")} == {"prepared-prepare1", "prepared-1"}
