"""The policies, as tables."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from finetune_api.exits import Precedence, RetryPolicy
from finetune_api.names import FailureClass, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Adaptation, Attempt, Checkpoint, FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.policies import timeouts
from finetune_operator.policies.acceptance import Accepted, FirstAttempt, Refused, accept
from finetune_operator.policies.adaptations import (
    LadderExhausted,
    adapt_to_divergence,
    adapt_to_out_of_memory,
    apply_adaptations,
    max_start_step,
)
from finetune_operator.policies.blocking import (
    BlockingCondition,
    blocking_condition_of_events,
    blocking_condition_of_pods,
)
from finetune_operator.policies.cause import cause_of, pod_cause
from finetune_operator.policies.retry import Cause, GiveUp, Retry, backoff_seconds, retry_or_give_up
from finetune_operator.settings import NodePool, OperatorConfig, RetrySettings, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.operator.samples import CONFIG, T0, accepted, at, ended, facts, job, pod, report, spec, status

# Acceptance


def refused(written: dict[str, Any], config: OperatorConfig = CONFIG) -> Refused:
    found = accept(written, config)
    assert isinstance(found, Refused), found
    return found


def test_defaults_are_filled_in_and_named() -> None:
    found = accepted()
    assert found.spec.training.learning_rate == 2e-4
    assert found.defaults["training.learningRate"] == 2e-4
    assert found.spec.resources.memory == "4Gi"
    assert found.pool is None


def test_all_problems_at_once_the_first_field_first() -> None:
    found = refused(spec(model={"source": "./x"}, dataset={"train": None, "validation": "/tmp/v"}))
    assert found.is_final
    assert found.reason is Reason.REJECTED
    assert found.message.index("spec.") == 0
    assert "spec.model.source" in found.message
    assert "spec.dataset.validation" in found.message


@pytest.mark.parametrize(
    ("written", "reason", "words", "final"),
    [
        (spec(resources={"nodePool": "a100"}), Reason.UNKNOWN_NODE_POOL, "pools are: h100 (8 x nvidia.com/gpu), mig", False),
        (spec(resources={"gpusPerNode": 9}), Reason.POOL_TOO_SMALL, "gpusPerNode is 9, and a node of pool h100 has 8", False),
        (
            spec(resources={"nodePool": "mig", "gpusPerNode": 1, "nodes": 3}),
            Reason.POOL_TOO_SMALL, "nodes is 3, and pool mig has at most 2", False,
        ),
        (spec(storage={"uri": None}), Reason.STORAGE_NOT_CONFIGURED, "spec.storage.uri is absent", False),
        (spec(storage={"uri": "pvc://claim/../x"}), Reason.REJECTED, "spec.storage.uri", True),
    ],
)  # fmt: skip
def test_refusals(written: dict[str, Any], reason: Reason, words: str, final: bool) -> None:
    found = refused(written)
    assert (found.reason, found.is_final) == (reason, final)
    assert words in found.message


def test_a_pool_is_shown_with_what_the_configuration_says_of_it() -> None:
    pool = NodePool(name="h200", gpus_per_node=8, gpu_memory="141Gi", description="for large models")
    found = refused(spec(resources={"nodePool": "none"}), CONFIG.model_copy(update={"node_pools": (pool,)}))
    assert found.message.endswith("pools are: h200 (8 x nvidia.com/gpu of 141Gi: for large models)")


@pytest.mark.parametrize(
    ("resources", "pool"),
    [
        ({"gpusPerNode": 0}, None),
        ({"gpusPerNode": 1}, "h100"),
        ({"gpusPerNode": 1, "nodePool": "mig"}, "mig"),
        ({"gpusPerNode": 1, "gpuResource": "nvidia.com/mig-1g.10gb"}, "mig"),
        ({"gpusPerNode": 1, "gpuResource": "amd.com/gpu"}, None),
    ],
)
def test_pools(resources: dict[str, Any], pool: str | None) -> None:
    found = accepted(spec(resources=resources))
    assert (found.pool.name if found.pool else None) == pool


STORE = {"uri": "s3://one/models", "endpoint": "https://a.example.com", "credentialsSecretRef": {"name": "one"}}
WITHOUT_STORAGE = {name: group for name, group in spec().items() if name != "storage"}


def resolved(written: dict[str, Any], storage: dict[str, Any], kept: dict[str, Any] | None = None) -> Accepted:
    found = accept(written, parse({"storage": storage}, "test"), None if kept is None else FirstAttempt(kept))
    assert isinstance(found, Accepted), found
    return found


@pytest.mark.parametrize("today", [{}, {"uri": "s3://two/models"}, {**STORE, "endpoint": "https://b.example.com"}])
def test_the_store_a_job_began_with_is_kept_with_all_that_leads_to_it(today: dict[str, Any]) -> None:
    began = resolved(WITHOUT_STORAGE, STORE)
    found = resolved(WITHOUT_STORAGE, today, began.defaults)
    assert (found.spec.storage, found.defaults) == (began.spec.storage, began.defaults)


def test_the_way_to_the_same_store_may_change() -> None:
    began = resolved(WITHOUT_STORAGE, STORE)
    today = {**STORE, "credentialsSecretRef": {"name": "two"}, "caBundleRef": {"name": "ca", "key": "ca.crt"}}
    found = resolved(WITHOUT_STORAGE, today, began.defaults)
    assert found.spec.storage == resolved(WITHOUT_STORAGE, today).spec.storage


def test_a_store_that_the_user_named_is_hers_whatever_was_kept() -> None:
    hers = {**WITHOUT_STORAGE, "storage": {"uri": "s3://mine/x", "endpoint": "https://mine.example.com"}}
    began = resolved(hers, STORE)
    assert resolved(hers, {"uri": "s3://two/models"}, began.defaults).spec == began.spec


@pytest.mark.parametrize("kept", [{"storage.uri": "no uri"}, {"training.learningRate": "fast"}, {"gone.option": 1}])
def test_kept_defaults_that_nobody_can_use_are_not_used(kept: dict[str, Any]) -> None:
    assert resolved(WITHOUT_STORAGE, STORE, kept) == resolved(WITHOUT_STORAGE, STORE)


def test_a_pool_that_goes_takes_nothing_from_an_attempt_that_runs() -> None:
    """Memory ran out in it: its ladder stands on the batch it runs with, not on an empty spec."""
    written = spec(resources={"nodePool": "gone", "gpusPerNode": 1}, policy={"onOutOfMemory": "Adapt"})
    begun = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
    rung = {"time": "2026-11-21T12:00:00Z", "reason": "OutOfMemory", "change": "", "set": {"training.batchSizePerDevice": 2}}
    known = status(attempt=1, attempts=[begun], adaptations=[rung])
    plan = decide(facts(written=written, known=known, jobs=[job(failed_at=at(60))], pods=[ended(pod(), 71)], now=at(61)))
    assert plan.attempt_end is not None and plan.attempt_end.adaptation is not None
    assert plan.attempt_end.adaptation.change.startswith("batchSizePerDevice 2 -> 1")


def test_a_spec_too_long_for_an_annotation_is_refused_with_its_size() -> None:
    env = [{"name": f"V{n}", "value": "x" * 4000} for n in range(20)]
    found = refused(spec(placement={"env": env}))
    assert "bytes" in found.message


def test_bytes_are_counted_and_not_characters() -> None:
    """A system prompt in Chinese takes three bytes a character."""
    for letter, fits in (("m", True), ("\u6a21", False)):
        env = [{"name": f"V{n}", "value": letter * 4000} for n in range(6)]
        assert isinstance(accept(spec(placement={"env": env}), CONFIG), Accepted) is fits


# Causes


def words(code: str, **fields: Any) -> TerminationMessage:
    return TerminationMessage(code=code, message=f"{code} happened", **fields)


@pytest.mark.parametrize(
    ("code", "reason", "retry"),
    [
        (64, Reason.USER_ERROR, RetryPolicy.NEVER), (65, Reason.DATA_ERROR, RetryPolicy.NEVER), (66, Reason.MODEL_ERROR, RetryPolicy.NEVER),
        (67, Reason.STORAGE_ERROR, RetryPolicy.NEVER), (69, Reason.STORAGE_ERROR, RetryPolicy.COUNTED),
        (70, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED), (71, Reason.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY),
        (72, Reason.DIVERGED, RetryPolicy.ROLL_BACK), (73, Reason.STORAGE_ERROR, RetryPolicy.COUNTED),
        (74, Reason.PEER_FAILED, RetryPolicy.COUNTED), (75, Reason.PREEMPTED, RetryPolicy.FREE), (76, Reason.PREEMPTED, RetryPolicy.FREE),
        (77, Reason.STORAGE_ERROR, RetryPolicy.NEVER), (78, Reason.INSTALLATION_BROKEN, RetryPolicy.NEVER),
        (79, Reason.TRAINER_TOO_OLD, RetryPolicy.WAIT), (80, Reason.GATE_FAILED, RetryPolicy.NEVER), (1, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED),
        (137, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED),
    ],
)  # fmt: skip
def test_exit_codes(code: int, reason: Reason, retry: RetryPolicy) -> None:
    found = pod_cause(ended(pod(), code))
    assert found is not None
    assert (found.reason, found.retry, found.failure.exit_code) == (reason, retry, code)


def test_the_trainer_s_class_wins_over_the_code_s() -> None:
    found = pod_cause(ended(pod(), 77, words("Gated", class_=FailureClass.MODEL, hint="ask for access")))
    assert found is not None
    assert (found.reason, found.failure.class_, found.failure.hint) == (
        Reason.MODEL_ERROR, FailureClass.MODEL, "ask for access",
    )  # fmt: skip


def test_a_pod_that_runs_or_succeeded_is_no_cause() -> None:
    assert pod_cause(pod()) is None
    assert pod_cause(ended(pod(), 0)) is None


@pytest.mark.parametrize(
    ("disruption", "code", "reason"),
    [
        ("PreemptionByScheduler", 143, Reason.PREEMPTED),
        ("EvictionByEvictionAPI", 75, Reason.PREEMPTED),
        ("DeletionByTaintManager", 137, Reason.NODE_LOST),
        ("DeletionByPodGC", None, Reason.NODE_LOST),
        ("TerminationByKubelet", None, Reason.PREEMPTED),
    ],
)
def test_disruption_is_free(disruption: str, code: int | None, reason: Reason) -> None:
    taken = replace(pod(), disruption=disruption, phase="Failed")
    found = pod_cause(ended(taken, code) if code is not None else taken)
    assert found is not None
    assert (found.reason, found.retry) == (reason, RetryPolicy.FREE)


def test_a_data_error_of_a_disrupted_pod_stays_a_data_error() -> None:
    found = pod_cause(replace(ended(pod(), 65), disruption="EvictionByEvictionAPI"))
    assert found is not None
    assert found.reason is Reason.DATA_ERROR


def test_oom_killed() -> None:
    found = pod_cause(ended(pod(), 137, reason="OOMKilled"))
    assert found is not None
    assert (found.reason, found.retry, found.failure.code) == (Reason.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY, "OOMKilled")


def test_killed_while_being_deleted_is_preemption() -> None:
    found = pod_cause(replace(ended(pod(), 137), deletion_timestamp=T0))
    assert found is not None
    assert (found.reason, found.retry) == (Reason.PREEMPTED, RetryPolicy.FREE)


def test_a_node_that_rejects_the_pod() -> None:
    found = pod_cause(replace(pod(), phase="Failed", reason="OutOfnvidia.com/gpu", message="no"))
    assert found is not None
    assert (found.retry, found.failure.code) == (RetryPolicy.COUNTED, "OutOfnvidia.com/gpu")


@pytest.mark.parametrize(
    ("codes", "counts"),
    [
        ([74, 65], 65), ([71, 70], 71), ([75, 74], 74), ([75, 70, 74], 70), ([72, 65], 65), ([69, 72], 69),
    ],
)  # fmt: skip
def test_which_of_several_causes_counts(codes: list[int], counts: int) -> None:
    pods = [ended(pod(index=n), code, words("X")) for n, code in enumerate(codes)]
    assert cause_of(None, pods).failure.exit_code == counts


def test_the_first_that_failed_by_itself_is_named() -> None:
    pods = [
        ended(pod(index=0), 70, words("Noticed", origin=False, time_ns=1, rank=0)),
        ended(pod(index=1), 70, words("Late", origin=True, time_ns=30, rank=1)),
        ended(pod(index=2), 70, words("Early", origin=True, time_ns=20, rank=2)),
    ]
    assert cause_of(None, pods).failure.code == "Early"


def test_a_disruption_comes_before_peers_that_noticed() -> None:
    pods = [ended(pod(index=0), 74), replace(ended(pod(index=1), 137), disruption="DeletionByTaintManager")]
    assert cause_of(None, pods).reason is Reason.NODE_LOST


def test_without_pods_the_job_is_asked() -> None:
    failed = job(failed_at=at(1), failed_reason="BackoffLimitExceeded", failed_message="Job has reached it")
    found = cause_of(failed, [])
    assert (found.failure.code, found.retry) == ("BackoffLimitExceeded", RetryPolicy.COUNTED)
    assert cause_of(None, []).failure.code == "PodsLost"


def test_raw_logs_are_cut_and_cleaned() -> None:
    text = "Traceback\nAWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENG failed\n"
    found = pod_cause(ended(pod(), 1, message=text))
    assert found is not None
    assert found.failure.message == "AWS_SECRET_ACCESS_KEY=[redacted] failed"


# Ladders


@settings(deadline=None)
@given(batch=st.integers(1, 512), accumulation=st.integers(1, 512))
def test_the_memory_ladder_keeps_the_effective_batch_and_ends(batch: int, accumulation: int) -> None:
    current = accepted(spec(training={"batchSizePerDevice": batch, "gradientAccumulationSteps": accumulation})).spec
    seen = batch
    for _ in range(12):
        rung = adapt_to_out_of_memory(current, T0)
        if isinstance(rung, LadderExhausted):
            break
        current = apply_adaptations(current, [rung])
        now, more = current.training.batch_size_per_device, current.training.gradient_accumulation_steps
        assert now is not None and more is not None
        assert now * more == batch * accumulation
        assert now <= seen / 2 or now == seen
        seen = now
    else:
        raise AssertionError("the ladder has no end")
    assert seen == 1 or accumulation * batch > 65536
    assert current.training.gradient_checkpointing == "enabled"


def test_the_memory_ladder_takes_the_largest_divisor_at_or_below_half() -> None:
    rung = adapt_to_out_of_memory(accepted(spec(training={"batchSizePerDevice": 9, "gradientAccumulationSteps": 2})).spec, T0)
    assert isinstance(rung, Adaptation)
    assert rung.change == "batchSizePerDevice 9 -> 3, gradientAccumulationSteps 2 -> 6"


def test_the_memory_ladder_leaves_kto_two_rows_to_compare() -> None:
    written = spec(trainer={"type": "kto"}, training={"batchSizePerDevice": 4, "gradientCheckpointing": "disabled"})
    first = adapt_to_out_of_memory(accepted(written).spec, T0)
    assert isinstance(first, Adaptation)
    assert first.set == {"training.batchSizePerDevice": 2, "training.gradientAccumulationSteps": 8}
    second = adapt_to_out_of_memory(apply_adaptations(accepted(written).spec, [first]), T0)
    assert isinstance(second, Adaptation)
    assert second.set == {"training.gradientCheckpointing": "enabled"}


def test_fail_means_fail() -> None:
    assert isinstance(adapt_to_out_of_memory(accepted(spec(policy={"onOutOfMemory": "Fail"})).spec, T0), LadderExhausted)
    found = adapt_to_divergence(accepted(spec(policy={"onDivergence": "Fail"})).spec, [], [], T0)
    assert isinstance(found, LadderExhausted)


def test_the_divergence_ladder() -> None:
    base = accepted(spec(training={"learningRate": 0.01})).spec
    marks = [Checkpoint(step=s, uri=f"u{s}", healthy=True) for s in (10, 20, 30)]
    done: list[Adaptation] = []
    for attempt in (1, 2, 3):
        rung = adapt_to_divergence(apply_adaptations(base, done), done, marks, T0, attempt)
        assert isinstance(rung, Adaptation)
        done.append(rung)
    assert [one.set for one in done] == [
        {},
        {"training.learningRate": 0.005, "resume.maxStep": 20, "resume.firstAttempt": 3},
        {"training.learningRate": 0.0025, "resume.maxStep": 10, "resume.firstAttempt": 4},
    ]
    assert isinstance(adapt_to_divergence(apply_adaptations(base, done), done, marks, T0), LadderExhausted)


def test_unproven_checkpoints_are_no_rollback_targets() -> None:
    """The loss after such a checkpoint was not finite: it may hold the weights that led there."""
    base = accepted().spec
    marks = [
        Checkpoint(step=step, uri=f"u{step}", healthy=healthy)
        for step, healthy in ((10, True), (20, False), (30, True), (40, False))
    ]
    replay = adapt_to_divergence(base, [], marks, T0)
    assert isinstance(replay, Adaptation) and "step 30" in replay.change
    rollback = adapt_to_divergence(base, [replay], marks, T0, 2)
    assert isinstance(rollback, Adaptation) and rollback.set is not None
    assert rollback.set["resume.maxStep"] == 10


def test_divergence_without_a_checkpoint_goes_back_to_the_start() -> None:
    base = accepted().spec
    first = adapt_to_divergence(base, [], [], T0)
    assert isinstance(first, Adaptation)
    second = adapt_to_divergence(base, [first], [], T0)
    assert isinstance(second, Adaptation)
    assert second.set is not None
    assert second.set["resume.maxStep"] == 0


ROLLED_BACK = Adaptation(time=T0, reason=Reason.DIVERGED, change="", set={"resume.maxStep": 20, "resume.firstAttempt": 3})


@pytest.mark.parametrize(
    ("made", "start"),
    [
        ([], 20),
        ([(10, 1), (20, 1), (30, 2)], 20),
        ([(10, 1), (20, 1), (30, 2), (25, 3)], 25),
        ([(20, 1), (30, 2), (30, 3)], 30),
        ([(20, 1), (30, 2), (40, 3)], None),
        ([(30, 2), (500, 3), (600, 4)], None),
        ([(30, 0)], 20),
    ],
)
def test_a_rollback_costs_what_it_left_behind_and_nothing_that_came_after(
    made: list[tuple[int, int]], start: int | None
) -> None:
    """`made`: (step, attempt) of every checkpoint; attempt 0: nobody knows."""
    uris = {attempt: f"s3://b/checkpoints/step/a{attempt}-0123abcd" if attempt else "s3://b/step" for _, attempt in made}
    marks = [Checkpoint(step=step, uri=uris[attempt]) for step, attempt in made]
    assert max_start_step([ROLLED_BACK], marks) == start
    assert max_start_step([], marks) is None


# Retry

CAUSE = Cause(Reason.INTERNAL_ERROR, pod_cause(ended(pod(), 70)).failure, RetryPolicy.COUNTED, Precedence.UNKNOWN)  # type: ignore[union-attr] # it fails


@pytest.mark.parametrize(
    ("used", "retries", "progressed", "stops", "counted"),
    [(0, 3, False, False, True), (2, 3, False, False, True), (3, 3, False, True, None), (3, 3, True, False, False), (0, 0, False, True, None)],
)  # fmt: skip
def test_the_budget(used: int, retries: int, progressed: bool, stops: bool, counted: bool | None) -> None:
    found = retry_or_give_up(
        CAUSE, accepted(spec(policy={"retries": retries})).spec, FineTuneJobStatus(retries_used=used),
        progressed=progressed, now=T0,
    )  # fmt: skip
    assert isinstance(found, GiveUp) == stops
    if isinstance(found, Retry):
        assert found.counted == counted
    else:
        assert found.reason is Reason.RETRIES_EXHAUSTED


# Clock


def attempts(*rows: tuple[str, bool, int]) -> list[Attempt]:
    return [
        Attempt(number=n, reason=reason, counted=counted, committed_step=step or None, end_time=T0)
        for n, (reason, counted, step) in enumerate(rows, 1)
    ]


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([], 0.0),
        ([("InternalError", True, 0)], 10.0),
        ([("InternalError", True, 0), ("InternalError", True, 0)], 20.0),
        ([("InternalError", True, 0)] * 9, 600.0),
        ([("Preempted", False, 0)], 0.0),
        ([("Preempted", False, 0), ("Preempted", False, 0)], 10.0),
        ([("InternalError", True, 0), ("Suspended", False, 0)], 0.0),
        ([("InternalError", True, 0), ("OutOfMemory", False, 0)], 0.0),
        ([("InternalError", True, 5)], 0.0),
    ],
)
def test_pauses(rows: list[tuple[str, bool, int]], seconds: float) -> None:
    settings = RetrySettings(base_seconds=10, max_seconds=600)
    assert backoff_seconds(attempts(*rows), settings) == seconds


@pytest.mark.parametrize(
    ("limit", "active", "since", "moment"),
    [
        (100, 0.0, T0, at(100)),
        (100, 60.0, T0, at(40)),
        (100, 200.0, T0, T0),
        (None, 0.0, T0, None),
        (100, 0.0, None, None),
    ],
)
def test_deadline(limit: int | None, active: float, since: datetime | None, moment: datetime | None) -> None:
    assert timeouts.deadline_at(limit, active, since) == moment


@pytest.mark.parametrize(
    ("stage", "since_step", "heard", "ready", "stalls"),
    [
        ("training", 601.0, 0, True, True),
        ("training", 599.0, 0, True, False),
        ("evaluating", 5000.0, 0, True, False),
        ("training", 550.0, 60, True, True),
        ("training", 1.0, 700, True, False),
        ("training", 1.0, 700, False, True),
    ],
)
def test_stall(stage: str, since_step: float, heard: int, ready: bool, stalls: bool) -> None:
    said = report(stage=stage, health={"secondsSinceStep": since_step, "medianStepSeconds": 1.0})
    found = timeouts.stall_message(accepted().spec, said, T0, [replace(pod(), is_ready=ready)], at(heard))
    assert bool(found) == stalls


def test_a_slow_run_has_a_longer_stall_limit() -> None:
    said = report(health={"medianStepSeconds": 120.0})
    assert timeouts.stall_limit_seconds(accepted().spec, said) == 2400.0
    assert timeouts.stall_limit_seconds(accepted(spec(policy={"stallTimeoutSeconds": 5})).spec, said) == 5.0


def test_a_wake_is_never_further_than_an_hour() -> None:
    assert timeouts.next_reconcile_at(T0, at(10), at(20), None) == at(10)
    assert timeouts.next_reconcile_at(T0, at(99999)) == at(3600)
    assert timeouts.next_reconcile_at(T0, None) is None


# Waiting


def test_pods_tell_why_they_wait() -> None:
    pulling = replace(pod(), phase="Pending", waiting_reason="ImagePullBackOff", waiting_message="no such image")
    placed = replace(pod(index=1), phase="Pending", unschedulable="0/1 nodes")
    assert blocking_condition_of_pods([placed, pulling]) == BlockingCondition(Reason.IMAGE_PULL_FAILED, "ImagePullBackOff: no such image")
    assert blocking_condition_of_pods([placed]) == BlockingCondition(Reason.UNSCHEDULABLE, "0/1 nodes")
    assert blocking_condition_of_pods([pod()]) is None


@pytest.mark.parametrize(
    ("reason", "note", "found"),
    [
        ("FailedCreate", 'pods "x" is forbidden: exceeded quota: q', Reason.QUOTA_EXCEEDED),
        ("FailedCreate", "violates PodSecurity", Reason.FORBIDDEN_BY_POLICY),
        ("FailedMount", 'secret "s3" not found', Reason.CONFIG_MISSING),
        ("Pulled", "x", None),
    ],
)
def test_events_tell_why_pods_wait(reason: str, note: str, found: Reason | None) -> None:
    waiting = blocking_condition_of_events([{"reason": reason, "message": note, "lastTimestamp": "2026-11-21T12:00:00Z"}])
    assert (waiting.reason if waiting else None) == found


def test_accepted_is_a_value() -> None:
    assert isinstance(accept(spec(), CONFIG), Accepted)
