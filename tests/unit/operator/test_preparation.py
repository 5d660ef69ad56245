"""The preparation of a job: when its Job is created, when it is repeated or skipped, and when it ends the FineTuneJob."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Condition, ExitCode, FailureClass, Phase, Reason
from finetune_api.pod import ProgressReport, RunConfig, TerminationMessage
from finetune_api.spec.enums import OnExistingResult
from finetune_api.status import (
    DataReport,
    EvaluationResult,
    FineTuneJobStatus,
    Metrics,
    Output,
    Preparation,
    Progress,
    ResolvedConfig,
    RunPlan,
    Workers,
    select_immediate_fields,
)
from finetune_operator.blocking_conditions import find_event_subject
from finetune_operator.builders.job import build_preparation_job
from finetune_operator.builders.run_config import build_run_config, convert_to_preparation_run
from finetune_operator.decide import decide
from finetune_operator.events import draft_events
from finetune_operator.facts import Facts, ReceivedReport
from finetune_operator.objects import FINETUNEJOB, JOB
from finetune_operator.plan import ActionResult, JobEnd, Outcome, Plan, Situation
from finetune_operator.policies.acceptance import RefusedSpec
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import compute_status, reduce_status
from finetune_operator.settings import OperatorConfig, parse_config
from finetune_operator.views import JobView, PodView, mark_deleted, read_job
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator import samples
from tests.unit.operator.fake_cluster import OperatorProcess, new_server
from tests.unit.operator.samples import CONFIG, accept_spec, at, end_pod, finetunejob, iso_time, pod, spec, status

CONFIG_WITH_PREPARATION = CONFIG.model_copy(update={"prepare": CONFIG.prepare.model_copy(update={"strategy": "auto", "node_selector": {"cpu": "yes"}})})
PREPARATION_RECORD = {"number": 1, "startTime": iso_time(0)}
USER_MISTAKE = TerminationMessage(class_=FailureClass.DATA, code="DatasetEmpty", message="no rows", hint="add rows", exit_code=65)
LOST_STORE = TerminationMessage(class_=FailureClass.STORAGE, code="EndpointUnreachable", message="no answer", exit_code=69)


WITHOUT_TRAINING = {
    "phases": {"train": False, "from": "s3://models/x/model"}, "evaluation": {"metrics": ["perplexity"]}, "dataset": {"test": "s3://data/t"},
}  # fmt: skip


def make_gpu_spec(strategy: str = "auto", **groups: Any) -> dict[str, Any]:
    return spec(**{"resources": {"gpusPerNode": 8, "nodes": 2}, "prepare": {"strategy": strategy}, **groups})


def make_preparation_job(number: int = 1, **fields: Any) -> JobView:
    return samples.job(0, **{"name": f"run-prepare{number}", "uid": f"prepare-{number}", **fields})


def make_preparation_pod(number: int = 1, **fields: Any) -> PodView:
    return pod(0, **{"name": f"run-prepare{number}-0-x", "uid": f"pod-prepare-{number}", "job_uid": f"prepare-{number}", **fields})


def make_facts(
    record: dict[str, Any] | None = None, job: JobView | None = None, pods: tuple[PodView, ...] = (), *, now: datetime | None = None,
    strategy: str = "auto", status_fields: dict[str, Any] | None = None, **groups: Any,
) -> Facts:  # fmt: skip
    fields = ({"preparation": record} if record else {}) | (status_fields or {})
    jobs = [job] if job is not None else []
    return samples.facts(spec=make_gpu_spec(strategy, **groups), status=status(**fields), jobs=jobs, pods=pods, now=now or at(60))


def make_failed_preparation(report: TerminationMessage | None, code: int, **fields: Any) -> tuple[JobView, tuple[PodView, ...]]:
    ended_pod = end_pod(make_preparation_pod(), code, report, **fields)
    return make_preparation_job(failed_at=at(50), failed_reason="BackoffLimitExceeded"), (ended_pod,)


def compute_status_of(job_facts: Facts, plan: Plan, result: ActionResult | None = None) -> FineTuneJobStatus:
    return compute_status(job_facts, plan, result or ActionResult())


# ---- which jobs are prepared ----


@pytest.mark.parametrize(
    ("groups", "needs_preparation"),
    [
        ({}, True),
        ({"prepare": {"strategy": "always"}, "resources": {"gpusPerNode": 0}}, True),
        ({"resources": {"gpusPerNode": 0}}, False),
        ({"prepare": {"strategy": "never"}}, False),
        (WITHOUT_TRAINING, False),
        ({"suspend": True}, False),
    ],
)  # fmt: skip
def test_strategy_and_spec_decide_whether_a_job_is_prepared(groups: dict[str, Any], needs_preparation: bool) -> None:
    job_facts = make_facts(**groups)
    assert not isinstance(job_facts.acceptance, RefusedSpec), job_facts.acceptance
    plan = decide(job_facts)
    assert (plan.situation is Situation.PREPARING, plan.preparation_to_create) == (needs_preparation, 1 if needs_preparation else None)
    assert plan.attempt_to_create == (None if needs_preparation or groups.get("suspend") else 1)


def test_the_operators_configuration_chooses_the_strategy_of_jobs_that_leave_it_out() -> None:
    raw_spec = spec(resources={"gpusPerNode": 1})
    assert accept_spec(raw_spec).spec.prepare.strategy == "never"
    acceptance = accept_spec(raw_spec, CONFIG_WITH_PREPARATION)
    assert acceptance.spec.prepare.strategy == "auto"
    assert acceptance.defaults["prepare.resources.memory"] == "4Gi"


def test_a_job_with_an_attempt_is_never_prepared() -> None:
    ended_attempt = {"number": 1, "startTime": iso_time(0), "endTime": iso_time(10), "reason": "Preempted"}
    assert decide(make_facts(status_fields={"attempt": 2, "attempts": [ended_attempt]})).attempt_to_create == 2
    running_facts = samples.facts(spec=make_gpu_spec(), status=status(), jobs=[samples.job(1)], pods=[pod(1)])
    assert decide(running_facts).situation is Situation.ACTIVE


# ---- the Job ----


def test_the_job_of_a_preparation_has_no_gpu_and_no_placement_of_the_training_pods() -> None:
    raw_spec = make_gpu_spec(
        resources={"gpusPerNode": 8, "nodes": 2}, prepare={"strategy": "auto", "resources": {"cpu": "6", "memory": "12Gi"}},
        placement={"nodeSelector": {"zone": "a"}, "queueName": "team-a", "env": [{"name": "A", "value": "b"}], "labels": {"cost": "x"}},
    )  # fmt: skip
    acceptance = accept_spec(raw_spec, CONFIG_WITH_PREPARATION)
    job = finetunejob(raw_spec)
    run = build_run_config(job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    body = build_preparation_job(job, run, 2, acceptance.spec.prepare.resources, acceptance.pool, CONFIG_WITH_PREPARATION)
    pod_spec = body["spec"]["template"]["spec"]
    container = pod_spec["containers"][0]
    assert (body["metadata"]["name"], body["spec"]["completions"], container["args"]) == ("run-prepare2", 1, ["prepare"])
    assert container["resources"] == {
        "requests": {"cpu": "6", "memory": "12Gi", "ephemeral-storage": "20Gi"}, "limits": {"cpu": "6", "memory": "12Gi", "ephemeral-storage": "20Gi"},
    }  # fmt: skip
    assert pod_spec["nodeSelector"] == {"cpu": "yes"}
    assert "tolerations" not in pod_spec and "subdomain" not in pod_spec and "suspend" not in body["spec"]
    assert body["metadata"]["labels"]["cost"] == "x" and "kueue.x-k8s.io/queue-name" not in body["metadata"]["labels"]
    assert {"name": "A", "value": "b"} in container["env"]
    assert run.world.nodes == 2 and "prepare" not in run.to_wire()["spec"], "run.json is written as for the first attempt, so every trainer release can read it"
    view = read_job(body | {"metadata": body["metadata"] | {"uid": "u", "creationTimestamp": iso_time(0)}})
    assert view is not None and view.attempt == 0


def test_a_preparation_with_a_claim_runs_where_the_training_pods_run() -> None:
    """The first pod that mounts a new claim decides in which zone or on which node the volume is created."""
    raw_spec = make_gpu_spec(dataset={"train": "pvc://data/train.jsonl"}, placement={"nodeSelector": {"zone": "a"}})
    acceptance = accept_spec(raw_spec, CONFIG_WITH_PREPARATION)
    run = build_run_config(finetunejob(raw_spec), acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    body = build_preparation_job(finetunejob(raw_spec), run, 1, acceptance.spec.prepare.resources, acceptance.pool, CONFIG_WITH_PREPARATION)
    pod_spec = body["spec"]["template"]["spec"]
    assert pod_spec["nodeSelector"] == {"gpu": "h100", "zone": "a"}
    assert "nvidia.com/gpu" not in pod_spec["containers"][0]["resources"]["limits"]


def test_a_preparation_job_that_lost_its_labels_is_found_by_its_owner() -> None:
    owner = {"apiVersion": "v1", "kind": "FineTuneJob", "name": "run", "uid": samples.UID, "controller": True}
    meta = {"name": "run-prepare3", "namespace": "team", "uid": "u", "creationTimestamp": iso_time(0), "ownerReferences": [owner]}
    view = read_job({"metadata": meta, "spec": {}})
    assert view is not None and (view.finetunejob_name, view.attempt) == ("run", 0)


@given(name=st.from_regex(names.NAME_PATTERN, fullmatch=True), suffix=st.sampled_from(["", "-prepare", "-1", "-prepare1"]), number=st.integers(1, 99))
def test_no_preparation_has_the_name_of_an_attempt_or_of_another_preparation(name: str, suffix: str, number: int) -> None:
    job_name = names.make_preparation_job_name(name, number)
    assert re.fullmatch(r".*-\d+", job_name) is None, "only the Jobs of attempts have names that end with a hyphen and a number"
    assert names.parse_preparation_number(job_name, name) == number
    assert (names.parse_preparation_number(job_name, name + suffix) is None) is bool(suffix)
    assert names.parse_preparation_number(names.attempt_job_name(name + suffix, number), name) is None


# ---- prepared rows ----

STORED_ROWS = {"digest": "a" * 64, "preparedUri": "s3://b/team/_prepared/" + "a" * 64, "preparedSha256": "b" * 64}


@pytest.mark.parametrize(
    ("prepare", "status_fields", "marks"),
    [
        ({"strategy": "auto"}, {"data": STORED_ROWS}, ["#preparedRows " + "a" * 64 + " " + "b" * 64, "#preparedTtlDays 30"]),
        ({"strategy": "always", "ttlDays": 7}, {}, ["#preparedTtlDays 7"]),
        ({"strategy": "auto"}, {"data": {**STORED_ROWS, "preparedSha256": None}}, ["#preparedTtlDays 30"]),
        ({"strategy": "auto"}, {"data": {**STORED_ROWS, "digest": "../../other"}}, ["#preparedTtlDays 30"]),
        ({"strategy": "never"}, {"data": STORED_ROWS}, []),
    ],
    ids=["prepared", "preparation", "not stored", "no digest", "never"],
)
@pytest.mark.parametrize("attempt", [1, 2])
def test_every_attempt_gets_the_prepared_rows_of_the_status(prepare: dict[str, Any], status_fields: dict[str, Any], marks: list[str], attempt: int) -> None:
    acceptance = accept_spec(make_gpu_spec(prepare=prepare), CONFIG_WITH_PREPARATION)
    job = finetunejob(make_gpu_spec(prepare=prepare), status=status(**status_fields))
    run = build_run_config(job, acceptance.spec, attempt, defaults=acceptance.defaults, committed_step=0, max_step=None)
    wire = run.to_wire()
    assert [mark for mark in wire["defaults"] if mark.startswith("#prepared")] == marks
    assert "prepared" not in wire and "prepare" not in wire["spec"], "trainer 0.1.0 refuses unknown fields, but ignores marks"
    assert RunConfig.model_validate_json(run.to_bytes()) == run


def make_running_report(stage: str, tokenised_rows: int, pod_uid: str = "pod-prepare-1") -> ReceivedReport:
    report_fields = {"attempt": 0, "uid": samples.UID, "stage": stage, "data": {"tokenisedRows": tokenised_rows}}
    return ReceivedReport(ProgressReport.model_validate(report_fields), at(60), pod_uid)


def test_progress_of_a_preparation_is_shown_without_an_urgent_status_write() -> None:
    config = CONFIG.model_copy(update={"isolation": CONFIG.isolation.model_copy(update={"secret": True})})
    job_facts = replace(make_facts(PREPARATION_RECORD, make_preparation_job(), (make_preparation_pod(),)), config=config)
    plan = decide(job_facts)
    assert plan.pod_to_scrape is not None and plan.pod_to_scrape.uid == "pod-prepare-1"
    assert decide(replace(job_facts, config=CONFIG)).pod_to_scrape is None, "without a secret, the pod refuses every request"
    first_status, second_status = (
        compute_status_of(seen := replace(job_facts, preparation_report=make_running_report("checking", rows)), decide(seen)) for rows in (1000, 2000)
    )
    assert first_status.preparation is not None and (first_status.preparation.stage, first_status.preparation.tokenised_rows) == ("checking", 1000)
    assert second_status.preparation is not None and second_status.preparation.tokenised_rows == 2000
    assert select_immediate_fields(first_status.to_wire()) == select_immediate_fields(second_status.to_wire())
    facts_of_other_pod = replace(job_facts, preparation_report=make_running_report("checking", 1000, "pod-prepare-0"))
    assert compute_status_of(facts_of_other_pod, decide(facts_of_other_pod)).preparation == Preparation.model_validate(PREPARATION_RECORD)
    message = TerminationMessage(exit_code=0, data=DataReport.model_validate({**STORED_ROWS, "tokenisedRows": 2500}))
    ended_facts = samples.facts(
        spec=make_gpu_spec(), status=second_status, jobs=[make_preparation_job(completed_at=at(50))],
        pods=(end_pod(make_preparation_pod(), 0, message),), now=at(70),
    )
    last_status = compute_status_of(replace(ended_facts, preparation_report=make_running_report("uploading", 2500)), decide(ended_facts))
    assert last_status.preparation is not None and (last_status.preparation.stage, last_status.preparation.tokenised_rows) == (None, 2500)
    assert last_status.data is not None and (last_status.data.digest, last_status.data.prepared_sha256) == ("a" * 64, "b" * 64)


# ---- success ----


def test_a_prepared_job_starts_its_first_attempt() -> None:
    plan_of_run = RunPlan.model_validate({"memory": {"expectedBytes": 5, "upperBytes": 6, "parts": {"weights": 5}}})
    message = TerminationMessage(exit_code=0, data=DataReport(tokens=12), resolved=ResolvedConfig(dataset_rows=3), plan=plan_of_run)
    ended_pod = end_pod(make_preparation_pod(), 0, message)
    job_facts = make_facts(PREPARATION_RECORD, make_preparation_job(completed_at=at(50)), (ended_pod,))
    plan = decide(job_facts)
    new_status = compute_status_of(job_facts, plan)
    assert plan.writes_decision and plan.attempt_to_create is None
    assert new_status.preparation is not None and new_status.preparation.reason == Reason.PREPARED
    assert (new_status.data, new_status.resolved and new_status.resolved.dataset_rows) == (DataReport(tokens=12), 3)
    assert new_status.plan == plan_of_run.model_copy(update={"no_choices": "the preparation reported no usable choices"})
    prepared_condition = new_status.condition(Condition.PREPARED)
    assert prepared_condition is not None and (prepared_condition.status, prepared_condition.reason) == ("True", "Prepared")
    assert [draft.reason for draft in draft_events(job_facts.job.status, new_status)] == [Reason.ACCEPTED, Reason.PREPARED]
    next_facts = samples.facts(spec=make_gpu_spec(), status=new_status, jobs=job_facts.jobs, pods=job_facts.pods, now=at(61))
    assert decide(next_facts).attempt_to_create == 1


def test_reduced_status_keeps_the_record_of_the_preparation() -> None:
    prepared_status = status(preparation=PREPARATION_RECORD | {"reason": "Prepared"})
    assert reduce_status(prepared_status, status()).preparation == prepared_status.preparation


# ---- failures ----


def test_a_mistake_of_the_user_ends_the_job_before_any_attempt() -> None:
    job_facts = make_facts(PREPARATION_RECORD, *make_failed_preparation(USER_MISTAKE, 65))
    plan = decide(job_facts)
    assert plan.job_end is not None and plan.job_end.outcome is Outcome.FAILED
    new_status = compute_status_of(job_facts, plan)
    assert (new_status.phase, new_status.reason, new_status.attempts, new_status.attempt) == (Phase.FAILED, "DatasetEmpty", [], None)
    assert new_status.failure is not None and (new_status.failure.code, new_status.failure.hint) == ("DatasetEmpty", "add rows")
    condition = new_status.condition(Condition.PREPARED)
    assert condition is not None and (condition.status, condition.reason, condition.message) == ("False", "DataError", "no rows")
    finished_facts = samples.facts(spec=make_gpu_spec(), status=new_status, jobs=job_facts.jobs, pods=job_facts.pods, now=at(70))
    assert decide(finished_facts).situation is Situation.FINISHED


@pytest.mark.parametrize(
    ("message", "code", "fields", "failure_count"),
    [
        (LOST_STORE, 69, {}, 1),
        (None, ExitCode.SIGTERM, {}, 1),
        (TerminationMessage(class_=FailureClass.PREEMPTED, code="StoppedSaved", exit_code=75), 75, {}, 0),
    ],
    ids=["store unreachable", "killed without a message", "stopped"],
)  # fmt: skip
def test_preparation_is_repeated_after_a_temporary_failure(message: TerminationMessage | None, code: int, fields: Any, failure_count: int) -> None:
    job_facts = make_facts(PREPARATION_RECORD, *make_failed_preparation(message, code, **fields), now=at(50))
    new_status = compute_status_of(job_facts, decide(job_facts))
    record = new_status.preparation
    assert record is not None
    assert (record.number, record.failures, record.reason, record.end_time) == (2, failure_count, None, at(50))
    next_facts = samples.facts(spec=make_gpu_spec(), status=new_status, jobs=job_facts.jobs, pods=job_facts.pods, now=at(59))
    assert decide(next_facts).preparation_to_create is None
    later_facts = replace(next_facts, now=at(60))
    assert decide(later_facts).preparation_to_create == 2
    assert [draft.reason for draft in draft_events(job_facts.job.status, new_status)] == [Reason.ACCEPTED, Reason.RETRYING]


@pytest.mark.parametrize(
    ("message", "code", "fields", "cause"),
    [
        (LOST_STORE, 69, {"record": {"failures": 3}}, "no answer"),
        (None, 64, {"text": "finetune-trainer: unknown command 'prepare'"}, "unknown command 'prepare'"),
        (None, 137, {"reason": "OOMKilled"}, "memory limit"),
        (None, 137, {"deadline": True}, "longer than six hours"),
        (TerminationMessage(step=0), 0, {"deadline": True, "keepsPod": True}, "longer than six hours"),
        (TerminationMessage(class_=FailureClass.STORAGE, code="LocalDiskTooSmall", message="60 GB", exit_code=64), 64, {"always": True}, "60 GB"),
    ],
    ids=["retries used up", "old image", "memory", "hung", "slow but complete", "small disk"],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["auto", "always"])
def test_other_failures_skip_an_automatic_preparation_and_end_a_required_one(
    message: TerminationMessage | None, code: int, fields: dict[str, Any], cause: str, strategy: str
) -> None:
    job, pods = make_failed_preparation(message, code, reason=fields.get("reason", ""), message=fields.get("text", ""))
    if fields.get("deadline"):
        job = replace(job, failed_reason="DeadlineExceeded", failed_message="DeadlineExceeded: the Job was active too long")
        pods = pods if fields.get("keepsPod") else ()
    job_facts = make_facts(PREPARATION_RECORD | fields.get("record", {}), job, pods, strategy=strategy)
    plan = decide(job_facts)
    new_status = compute_status_of(job_facts, plan)
    assert new_status.preparation is not None
    if strategy == "auto":
        assert (plan.job_end, new_status.preparation.reason) == (None, Reason.PREPARATION_SKIPPED)
        assert cause in (new_status.preparation.message or "")
        next_facts = samples.facts(spec=make_gpu_spec(), status=new_status, jobs=job_facts.jobs, pods=job_facts.pods, now=at(61))
        assert decide(next_facts).attempt_to_create == 1
        assert draft_events(job_facts.job.status, new_status)[-1].reason is Reason.PREPARATION_SKIPPED
    else:
        assert plan.job_end is not None and plan.job_end.failure is not None and new_status.phase is Phase.FAILED
        assert cause in plan.job_end.failure.message
        assert code != 137 or fields.get("deadline") or plan.job_end.failure.hint == "raise prepare.resources.memory"
        assert plan.job_end.failure.code != "LocalDiskTooSmall" or plan.job_end.failure.hint == "raise prepare.resources.ephemeralStorage"


CREDENTIALS = {"storage": {"credentialsSecretRef": {"name": "keys"}}}


@pytest.mark.parametrize(
    ("code", "exit_code", "groups", "is_final"),
    [
        ("CredentialsRejected", 77, {}, False),
        ("CredentialsRejected", 77, CREDENTIALS, True),
        ("CredentialsMissing", 77, CREDENTIALS, False),
        ("RewardFileInvalid", 64, CREDENTIALS, False),
        ("TargetModulesMissing", 64, {}, True),
    ],
)
def test_only_a_failure_that_training_pods_would_share_ends_the_job(code: str, exit_code: int, groups: dict[str, Any], is_final: bool) -> None:
    """Failures for other reasons do not end the job: training pods may have another node's role, more disk, or a GPU for the user's reward code."""
    reported_message = TerminationMessage(class_=FailureClass.USER, code=code, message="no", exit_code=exit_code)
    plan = decide(make_facts(PREPARATION_RECORD, *make_failed_preparation(reported_message, exit_code), **groups))
    assert (plan.job_end is not None) is is_final
    assert plan.preparation is not None and (plan.preparation.reason == Reason.PREPARATION_SKIPPED) is not is_final


def test_required_preparation_is_repeated_if_its_image_is_too_old() -> None:
    too_old_message = TerminationMessage(class_=FailureClass.INFRASTRUCTURE, code="TrainerTooOld", message="too old", exit_code=79)
    plan = decide(make_facts(PREPARATION_RECORD | {"failures": 3}, *make_failed_preparation(too_old_message, 79), strategy="always"))
    assert plan.job_end is None and plan.preparation is not None and (plan.preparation.number, plan.preparation.failures) == (2, 3)


def test_an_automatic_preparation_is_not_repeated_without_end() -> None:
    stopped_message = TerminationMessage(class_=FailureClass.PREEMPTED, code="StoppedSaved", exit_code=75)
    job, pods = make_failed_preparation(stopped_message, 75)
    sixth_job = replace(job, name="run-prepare6")
    plan = decide(make_facts(PREPARATION_RECORD | {"number": 6}, sixth_job, pods))
    assert plan.preparation is not None and plan.preparation.reason == Reason.PREPARATION_SKIPPED
    plan = decide(make_facts(PREPARATION_RECORD | {"number": 6}, sixth_job, pods, strategy="always"))
    assert plan.preparation is not None and plan.preparation.number == 7


def test_only_the_newest_ended_preparation_is_kept() -> None:
    ended_jobs = [make_preparation_job(number, failed_at=at(number)) for number in (1, 2)]
    old_status = status(preparation=PREPARATION_RECORD | {"number": 3, "endTime": iso_time(2)})
    job_facts = samples.facts(spec=make_gpu_spec(), status=old_status, jobs=ended_jobs, now=at(60))
    plan = decide(job_facts)
    assert (plan.preparation_to_create, [job.name for job in plan.jobs_to_delete]) == (3, ["run-prepare1"])


def test_a_job_is_not_prepared_if_the_crd_does_not_keep_the_record() -> None:
    assert decide(replace(make_facts(), crd_has_preparation_field=False)).attempt_to_create == 1


# ---- waiting ----


def test_an_automatic_preparation_without_a_node_is_skipped_after_five_minutes() -> None:
    pending_pod = make_preparation_pod(phase="Pending", is_ready=False, node="", unschedulable_message="0/3 nodes are available")
    job_facts = make_facts(PREPARATION_RECORD, make_preparation_job(), (pending_pod,), now=at(299))
    plan = decide(job_facts)
    new_status = compute_status_of(job_facts, plan)
    assert (new_status.phase, new_status.reason, plan.reconcile_at) == (Phase.PREPARING, "Unschedulable", at(300))
    reconciling = new_status.condition(Condition.RECONCILING)
    assert reconciling is not None and "0/3 nodes" in reconciling.message
    skipping_plan = decide(replace(job_facts, now=at(300)))
    assert skipping_plan.preparation is not None and skipping_plan.preparation.reason == Reason.PREPARATION_SKIPPED
    next_facts = samples.facts(spec=make_gpu_spec(), status=compute_status_of(job_facts, skipping_plan), jobs=job_facts.jobs, pods=job_facts.pods, now=at(301))
    next_plan = decide(next_facts)
    assert (next_plan.situation, [job.name for job in next_plan.jobs_to_delete]) == (Situation.BLOCKED, ["run-prepare1"])
    required_plan = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (pending_pod,), now=at(9999), strategy="always"))
    assert required_plan.situation is Situation.PREPARING and required_plan.preparation is None


def test_a_volume_that_cannot_be_mounted_is_shown_and_skips_an_automatic_preparation() -> None:
    stuck_pod = make_preparation_pod(phase="Pending", is_ready=False, scheduled_at=at(0))
    blocking_condition = BlockingCondition(Reason.CONFIG_MISSING, "no ConfigMap")
    job_facts = replace(make_facts(PREPARATION_RECORD, make_preparation_job(), (stuck_pod,), now=at(60)), blocking_condition=blocking_condition)
    event_subject = find_event_subject(job_facts)
    assert event_subject is not None and event_subject.uid == stuck_pod.uid
    plan = decide(job_facts)
    assert (compute_status_of(job_facts, plan).reason, plan.preparation) == ("ConfigMissing", None)
    skipping_plan = decide(replace(job_facts, now=at(300)))
    assert skipping_plan.preparation is not None and "no ConfigMap" in (skipping_plan.preparation.message or "")
    subject_without_pod = find_event_subject(make_facts(PREPARATION_RECORD, make_preparation_job()))
    assert subject_without_pod is not None and subject_without_pod.uid == "prepare-1"


def test_preparation_that_runs_on_a_node_is_waited_for() -> None:
    plan = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (make_preparation_pod(),), now=at(9999)))
    assert (plan.situation, plan.preparation, plan.jobs_to_delete) == (Situation.PREPARING, None, ())


def test_an_automatic_preparation_whose_job_cannot_be_created_is_skipped_after_five_minutes() -> None:
    assert decide(make_facts(PREPARATION_RECORD, now=at(299))).preparation_to_create == 1
    plan = decide(make_facts(PREPARATION_RECORD, now=at(300)))
    assert plan.preparation_to_create is None and plan.preparation is not None and plan.preparation.reason == Reason.PREPARATION_SKIPPED
    resumed_conditions = [{"type": "Suspended", "status": "False", "reason": "Resumed", "lastTransitionTime": iso_time(5000)}]
    resumed_facts = make_facts(PREPARATION_RECORD, now=at(5010), status_fields={"conditions": resumed_conditions})
    assert decide(resumed_facts).preparation_to_create == 1, "suspended time does not count"


def test_a_preparation_on_a_lost_node_is_deleted_and_starts_again() -> None:
    lost_pod = make_preparation_pod(deletion_timestamp=at(0))
    plan = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (lost_pod,), now=at(61)))
    assert [job.name for job in plan.jobs_to_delete] == ["run-prepare1"]
    assert plan.preparation is not None and (plan.preparation.number, plan.preparation.end_time) == (2, at(61))
    plan_while_deleting = decide(make_facts(PREPARATION_RECORD, make_preparation_job(is_deleting=True), (lost_pod,), now=at(62)))
    assert plan_while_deleting.pods_to_force_delete == (lost_pod,) and plan_while_deleting.preparation_to_create is None
    plan_without_job = decide(make_facts(PREPARATION_RECORD, None, (mark_deleted(lost_pod),), now=at(63)))
    assert plan_without_job.preparation_to_create == 1


@pytest.mark.parametrize(("change", "situation"), [({"suspend": True}, Situation.BLOCKED), ({"cancel": True}, Situation.FINISHED)])
def test_suspend_and_cancel_end_a_running_preparation(change: dict[str, Any], situation: Situation) -> None:
    plan = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (make_preparation_pod(),), **change))
    assert plan.situation is situation and plan.preparation is None
    if situation is Situation.BLOCKED:
        assert [job.name for job in plan.jobs_to_delete] == ["run-prepare1"]
    else:
        assert plan.job_end is not None and plan.job_end.outcome is Outcome.CANCELLED


def test_number_of_a_preparation_comes_from_job_names_if_the_status_is_lost() -> None:
    plan = decide(make_facts(None, make_preparation_job(3), (make_preparation_pod(3),)))
    assert (plan.situation, plan.preparation_to_create) == (Situation.PREPARING, None)


# ---- complete reconciles ----


@pytest.mark.parametrize(
    ("pools", "resources", "fills_cache"),
    [(("a",), {"gpusPerNode": 8}, True), (("a", "b"), {"gpusPerNode": 8}, False), (("a", "b"), {"gpusPerNode": 8, "nodePool": "b"}, True)],
)
async def test_a_preparation_fills_the_cache_in_a_claim_if_the_plan_cannot_choose_another_pool(
    pools: tuple[str, ...], resources: dict[str, Any], fills_cache: bool
) -> None:
    """The first pod that mounts the claim may bind it to a zone in which another pool has no nodes."""
    node_pools = [{"name": name, "default": name == "a", "gpusPerNode": 8, "gpuType": "h100-80gb"} for name in pools]
    config = parse_config({"trainer": {"image": "r.example.com/t:1"}, "nodePools": node_pools, "prepare": {"strategy": "always"}}, "test")
    server = new_server()
    body = server.finetunejob
    server.put(FINETUNEJOB, body | {"spec": spec(resources=resources, model={"cache": "pvc://models"})})
    process = OperatorProcess(server, config)
    process.refresh()
    await process.reconcile()
    pod_spec = server.objects[JOB.plural, "run-prepare1"]["spec"]["template"]["spec"]
    assert ("model-cache" in [volume["name"] for volume in pod_spec["volumes"]]) is fills_cache


async def test_a_reconcile_creates_the_job_once_and_then_the_first_attempt() -> None:
    config = parse_config({"trainer": {"image": "r.example.com/t:1"}, "prepare": {"strategy": "always"}}, "test")
    server = new_server()
    process = OperatorProcess(server, config)
    await process.reconcile()
    assert [name for plural, name in server.objects if plural == JOB.plural] == ["run-prepare1"]
    assert server.event_counts() == {Reason.PREPARING: 1}
    await OperatorProcess(server, config).reconcile()  # a restarted operator, in whose cache the Job is missing
    assert [name for plural, name in server.objects if plural == JOB.plural] == ["run-prepare1"]
    body = server.objects[JOB.plural, "run-prepare1"]
    complete_condition = {"type": "Complete", "status": "True", "lastTransitionTime": iso_time(50)}
    server.put(JOB, body | {"status": {"conditions": [complete_condition], "completionTime": iso_time(50)}})
    process = OperatorProcess(server, config)
    completed_job = read_job(server.objects[JOB.plural, "run-prepare1"])
    assert completed_job is not None
    process.cache.put_job(completed_job)
    await process.reconcile()
    assert server.condition("Prepared")["status"] == "True"
    process.refresh()
    await process.reconcile()
    assert (JOB.plural, "run-1") in server.objects
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["preparation"]["reason"] == "Prepared"


# ---- results of earlier jobs ----

ADOPTED_URI = "s3://models/test/team/run/old/model/a1-12345678"
ADOPTION_MESSAGE = TerminationMessage(
    exit_code=0, step=40, output=Output(uri=ADOPTED_URI, sha256="ab" * 32, kind="adapter", lineage_uri="s3://l", adopted_uid="old"),
    evaluation=EvaluationResult(rows=7), metrics=Metrics(train_loss=0.5), progress=Progress(step=40, total_steps=40), data=DataReport(rows={"train": 3}),
    resolved=ResolvedConfig(dataset_digest="d", device="NVIDIA H100"),
)  # fmt: skip


def make_adopting_facts(message: TerminationMessage = ADOPTION_MESSAGE, **fields: Any) -> Facts:
    pods = (end_pod(make_preparation_pod(), 0, message),)
    return make_facts(PREPARATION_RECORD, make_preparation_job(completed_at=at(50)), pods, **fields)


def test_a_job_with_an_earlier_result_succeeds_without_an_attempt() -> None:
    job_facts = make_adopting_facts()
    plan = decide(job_facts)
    assert (plan.attempt_to_create, plan.job_end) == (None, JobEnd(Outcome.SUCCEEDED, Reason.EXISTING_RESULT_ADOPTED))
    computed_status = compute_status_of(job_facts, plan)
    assert (computed_status.phase, computed_status.reason) == (Phase.SUCCEEDED, "ExistingResultAdopted")
    assert (computed_status.attempt, computed_status.attempts, computed_status.restarts) == (None, [], 0)
    assert (computed_status.output, computed_status.metrics, computed_status.data) == (ADOPTION_MESSAGE.output, ADOPTION_MESSAGE.metrics, ADOPTION_MESSAGE.data)
    assert computed_status.progress is not None and computed_status.progress.display == "40/40 (100%)"
    assert computed_status.evaluation is not None and (computed_status.evaluation.rows, computed_status.evaluation.headline) == (7, "training loss 0.5")
    assert computed_status.resolved is not None and computed_status.resolved.device == "NVIDIA H100"
    assert (computed_status.failure, computed_status.duration, computed_status.workers) == (None, "-", Workers(ready=0, total=2, display="0/2"))
    reasons = {condition.type: (condition.status, condition.reason) for condition in computed_status.conditions}
    assert reasons[Condition.SUCCEEDED] == reasons[Condition.PREPARED] == ("True", "ExistingResultAdopted")
    assert reasons[Condition.FINISHED] == ("True", "Succeeded")
    assert not {Condition.RECONCILING, Condition.STALLED} & set(reasons)
    message = f"nothing was trained: the FineTuneJob of the same name with uid old had the same spec and inputs, and its result is {ADOPTED_URI}"
    assert [(draft.reason, draft.note) for draft in draft_events(job_facts.job.status, computed_status)][1:] == [(Reason.EXISTING_RESULT_ADOPTED, message)]
    finished_facts = samples.facts(spec=make_gpu_spec(), status=computed_status, jobs=job_facts.jobs, pods=job_facts.pods, now=at(61))
    assert (decide(finished_facts).situation, decide(finished_facts).attempt_to_create) == (Situation.FINISHED, None)


def test_a_result_is_adopted_only_if_the_spec_permits_it() -> None:
    job_facts = make_adopting_facts(policy={"onExistingResult": "train"})
    assert (decide(job_facts).job_end, compute_status_of(job_facts, decide(job_facts)).phase) == (None, Phase.PREPARING)
    plan_without_result = decide(make_adopting_facts(ADOPTION_MESSAGE.model_copy(update={"output": None})))
    assert plan_without_result.job_end is None and plan_without_result.preparation is not None and plan_without_result.preparation.reason == Reason.PREPARED


def test_job_with_attempts_never_adopts_a_result() -> None:
    attempt = {"number": 1, "startTime": iso_time(0), "endTime": iso_time(10), "reason": "Preempted"}
    plan = decide(make_adopting_facts(status_fields={"attempt": 2, "attempts": [attempt]}))
    assert (plan.attempt_to_create, plan.job_end) == (2, None)


def test_existing_result_fails_a_job_with_on_existing_result_fail() -> None:
    found_message = TerminationMessage(class_=FailureClass.USER, code="ExistingResultFound", message="stored", hint="choose another name", exit_code=64)
    job_facts = make_facts(PREPARATION_RECORD, *make_failed_preparation(found_message, 64), policy={"onExistingResult": "fail"})
    new_status = compute_status_of(job_facts, decide(job_facts))
    assert (new_status.phase, new_status.reason) == (Phase.FAILED, "ExistingResultFound")
    assert new_status.failure is not None and (new_status.failure.code, new_status.failure.hint) == ("ExistingResultFound", "choose another name")


@pytest.mark.parametrize(
    ("groups", "config", "default"),
    [
        ({}, CONFIG_WITH_PREPARATION, "adopt"),
        ({"prepare": {"strategy": "always"}, "resources": {"gpusPerNode": 0}}, CONFIG, "adopt"),
        ({"resources": {"gpusPerNode": 0}}, CONFIG_WITH_PREPARATION, "train"),
        ({"prepare": {"strategy": "never"}}, CONFIG_WITH_PREPARATION, "train"),
        ({}, CONFIG, "train"),
        (WITHOUT_TRAINING, CONFIG_WITH_PREPARATION, "train"),
    ],
)  # fmt: skip
def test_results_are_adopted_by_default_only_in_prepared_jobs(groups: dict[str, Any], config: OperatorConfig, default: str) -> None:
    acceptance = accept_spec(spec(**{"resources": {"gpusPerNode": 8}, **groups}), config)
    assert (acceptance.spec.policy.on_existing_result, acceptance.defaults["policy.onExistingResult"]) == (default, default)
    run = build_run_config(finetunejob(spec()), acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    assert "onExistingResult" not in run.to_wire()["spec"].get("policy", {}), "trainer 0.1.0 does not know the field"


def test_run_json_omits_fields_that_attempts_do_not_read() -> None:
    acceptance = accept_spec(spec(resources={"gpusPerNode": 8}, policy={"onExistingResult": "train", "retries": 1}), CONFIG_WITH_PREPARATION)
    spec_with_max_cost = acceptance.spec.model_copy(update={"policy": acceptance.spec.policy.model_copy(update={"max_cost": 5.0})})
    run = build_run_config(finetunejob(spec()), spec_with_max_cost, 2, defaults=acceptance.defaults, committed_step=0, max_step=None)
    assert run.to_wire()["spec"]["policy"] == run.to_wire()["spec"]["policy"] | {"retries": 1}
    assert not {"maxCost", "onExistingResult"} & run.to_wire()["spec"]["policy"].keys()
    assert "#minTrainerVersion 0.1.0" in run.to_wire()["defaults"]
    assert convert_to_preparation_run(run, OnExistingResult.FAIL, []).to_wire()["spec"]["policy"]["onExistingResult"] == "fail"


def test_reduced_status_keeps_the_uid_of_an_adopted_result() -> None:
    adopted_status = status(output={"uri": "s3://b/old/model", "adoptedUid": "old"})
    reduced_output = reduce_status(adopted_status, status()).output
    assert reduced_output is not None and reduced_output.to_wire() == {"uri": "s3://b/old/model", "adoptedUid": "old"}


@pytest.mark.parametrize("mode", ["adopt", "fail"])
def test_preparation_is_required_if_the_user_wrote_on_existing_result(mode: str) -> None:
    facts_without_gpus = make_facts(resources={"gpusPerNode": 0}, policy={"onExistingResult": mode})
    assert decide(facts_without_gpus).preparation_to_create == 1
    pending_pod = make_preparation_pod(phase="Pending", is_ready=False, node="", unschedulable_message="0/3 nodes are available")
    plan_by_default = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (pending_pod,), now=at(9999)))
    assert plan_by_default.preparation is not None and plan_by_default.preparation.reason == Reason.PREPARATION_SKIPPED
    plan_with_mode = decide(make_facts(PREPARATION_RECORD, make_preparation_job(), (pending_pod,), now=at(9999), policy={"onExistingResult": mode}))
    assert (plan_with_mode.situation, plan_with_mode.preparation) == (Situation.PREPARING, None)
