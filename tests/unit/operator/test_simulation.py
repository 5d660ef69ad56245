"""Random sequences of events for one job. Events are caused by the user, the pods, the cluster, a queue, and crashes of the operator.

The pure functions `decide` and `compute_status` run on a simulated cluster (`world.py`). The invariants are checked after every event. After the
last event, the job must reach a stable state.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.adaptations import FIRST_ATTEMPT_KEY, LEARNING_RATE_FIELD, MAX_ROLLBACKS, MAX_STEP_KEY
from finetune_operator.policies.timeouts import seconds_between as between
from finetune_operator.report import compute_status
from finetune_operator.views import mark_deleted, read_status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.operator.samples import CONFIG, T0, UID, accept_spec
from tests.unit.operator.world import FOREIGN_JOB, SimulatedCluster, compute_effective_batch

EXIT_CODES = st.sampled_from([0, 1, 64, 65, 69, 70, 71, 71, 72, 72, 73, 74, 75, 76, 77, 137, 143])
PAUSE_SECONDS = st.sampled_from([0, 30, 650])
DEADLINE_SECONDS, TTL_SECONDS = 3000, 600
ROUNDING_SECONDS = 1.0
"""Tolerance in seconds when running times of an attempt are compared, because the times in the status are rounded to whole seconds."""


class JobEvents(RuleBasedStateMachine):
    """One job with one pod, and all events that may happen to this job."""

    pod_count = 1

    def __init__(self) -> None:
        super().__init__()
        self.world = SimulatedCluster(nodes=self.pod_count)
        self.final_phase: str | None = None
        self.highest_attempt = 0
        self.attempt_count = 0

    @initialize(
        queue=st.sampled_from([None, "team-a"]), deadline=st.sampled_from([None, DEADLINE_SECONDS]),
        ttl=st.sampled_from([None, TTL_SECONDS]), kept_checkpoint_count=st.sampled_from([3, 8]),
    )  # fmt: skip
    def choose_spec(self, queue: str | None, deadline: int | None, ttl: int | None, kept_checkpoint_count: int) -> None:
        world = self.world
        world.queue, world.deadline_seconds, world.ttl_seconds, world.kept_checkpoint_count = queue, deadline, ttl, kept_checkpoint_count

    # Operator

    @rule(crash=st.sampled_from(["no", "no", "no", "before act", "between deletes and creates", "before write"]))
    def reconcile(self, crash: str) -> None:
        self._reconcile(crash)

    def _reconcile(self, crash: str = "no") -> Plan:
        world = self.world
        facts = world.facts()
        plan = decide(facts)
        assert decide(facts) == plan
        self._check_that_only_owned_objects_are_deleted(facts, plan)
        self._check_deadline(facts, plan)
        if crash == "before act":
            return plan
        result = ActionResult()
        if plan.termination is None:
            for job in plan.jobs_to_delete:
                if job.uid in world.jobs:
                    world.jobs[job.uid] = replace(world.jobs[job.uid], is_deleting=True)
            world.delete_pods(list(plan.pods_to_delete))
            for pod in plan.pods_to_force_delete:
                world.pods[pod.uid] = mark_deleted(pod)
            if crash == "between deletes and creates":
                return plan
            if plan.attempt_to_create is not None:
                self._check_new_attempt(facts)
                result = ActionResult(created_job=world.create_job(plan.attempt_to_create, facts.max_start_step, facts.rolled_back_attempt))
        if crash == "before write":
            return plan
        new_status = compute_status(facts, plan, result)
        stored_status = read_status(new_status.to_wire())
        assert stored_status.to_wire() == new_status.to_wire()
        world.status = stored_status
        return plan

    def _check_that_only_owned_objects_are_deleted(self, facts: Facts, plan: Plan) -> None:
        assert all(job.is_owned and job.owner_uid == UID for job in plan.jobs_to_delete)
        assert all(pod.owner_uid == UID for pod in (*plan.pods_to_delete, *plan.pods_to_force_delete))
        assert all(
            pod.deletion_timestamp and between(pod.deletion_timestamp, facts.now) > CONFIG.lost_node_seconds for pod in plan.pods_to_force_delete
        ), plan.pods_to_force_delete

    def _check_deadline(self, facts: Facts, plan: Plan) -> None:
        world, job = self.world, facts.current_job
        if plan.job_end is not None and plan.job_end.reason is Reason.DEADLINE_EXCEEDED:
            assert world.running_seconds >= DEADLINE_SECONDS - ROUNDING_SECONDS * len(world.status.attempts), world.running_seconds
        if world.deadline_seconds is None or job is None or plan.situation is not Situation.ACTIVE or job.started_at is None:
            return
        assert plan.termination is not None or between(job.started_at, facts.now) < DEADLINE_SECONDS

    def _check_new_attempt(self, facts: Facts) -> None:
        """Check that a new attempt has the same effective batch as the first one and continues from the checkpoints that the operator knows."""
        assert not facts.is_finished
        first_spec: FineTuneJobSpec = accept_spec(self.world.build_user_spec()).spec
        assert compute_effective_batch(facts.spec) == compute_effective_batch(first_spec)
        rollbacks = [adaptation.set for adaptation in facts.job.status.adaptations if adaptation.set and MAX_STEP_KEY in adaptation.set]
        assert facts.spec.training.learning_rate == (first_spec.training.learning_rate or 0) * 0.5 ** len(rollbacks)
        if not rollbacks:
            assert facts.max_start_step is None
            return
        steps_since_rollback = [step for step, attempt in self.world.reported_checkpoints if attempt >= rollbacks[-1][FIRST_ATTEMPT_KEY]]
        assert facts.max_start_step is None or facts.max_start_step >= rollbacks[-1][MAX_STEP_KEY]
        start_step = self.world.find_allowed_start_step(facts.max_start_step, facts.rolled_back_attempt)
        assert start_step >= max(steps_since_rollback, default=0), (start_step, steps_since_rollback)
        if facts.attempt == rollbacks[-1][FIRST_ATTEMPT_KEY]:
            assert facts.max_start_step == rollbacks[-1][MAX_STEP_KEY]

    # User

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.world.suspend = value
        self.world.generation += 1

    @rule(is_cancelled=st.sampled_from([False, False, False, True]))
    def cancel(self, is_cancelled: bool) -> None:
        """Cancel the job in few of the sequences, because a cancellation ends the sequence of events early."""
        self.world.cancel = self.world.cancel or is_cancelled
        self.world.generation += 1

    @rule(value=st.sampled_from([None, 0, TTL_SECONDS]))
    def change_ttl(self, value: int | None) -> None:
        self.world.ttl_seconds = value
        self.world.generation += 1

    # Cluster

    @rule()
    def run_controllers(self) -> None:
        self.world.run_controllers()

    @rule()
    def run_kubelet(self) -> None:
        self.world.run_kubelet()

    @rule()
    def pods_start(self) -> None:
        self.world.start_pods()

    @rule(code=EXIT_CODES, pod_index=st.integers(0, 3))
    def pod_ends(self, code: int, pod_index: int) -> None:
        if running_pods := self.world.list_running_pods():
            self.world.end_container(running_pods[pod_index % len(running_pods)], code)

    @rule(pod_index=st.integers(0, 3))
    def pod_is_deleted(self, pod_index: int) -> None:
        existing_pods = [pod for pod in self.world.pods.values() if not pod.is_deleted and pod.deletion_timestamp is None]
        if existing_pods:
            self.world.delete_pods([existing_pods[pod_index % len(existing_pods)]])

    @rule(steps=st.integers(1, 30))
    def gang_trains(self, steps: int) -> None:
        self.world.train_gangs(steps)

    @rule()
    def operator_scrapes(self) -> None:
        self.world.report_progress()

    @rule(steps=st.integers(1, 30), code=st.sampled_from([None, None, None, 71, 72]))
    def job_trains(self, steps: int, code: int | None) -> None:
        """Start the job and train some steps. Without this event, random sequences would rarely get as far as training."""
        self.world.jobs.pop(FOREIGN_JOB.uid, None)
        self.suspend(False)
        for _ in range(4):
            self.world.run_controllers()
            self.world.run_kubelet()
            self.world.admit_jobs()
            self.world.pass_time(30)
            self._reconcile()
        self.world.start_pods()
        self.world.train_gangs(steps)
        self.world.report_progress()
        if code is not None:
            self.pod_ends(code, 0)

    @rule(pod_index=st.integers(0, 3), seconds=PAUSE_SECONDS)
    def node_is_lost(self, pod_index: int, seconds: int) -> None:
        if running_pods := self.world.list_running_pods():
            self.world.lose_node(running_pods[pod_index % len(running_pods)])
            self.world.pass_time(seconds)

    @precondition(lambda self: self.world.lost_since_by_pod)
    @rule()
    def node_comes_back(self) -> None:
        self.world.reconnect_nodes()

    @precondition(lambda self: self.world.queue)
    @rule()
    def queue_admits(self) -> None:
        self.world.admit_jobs()

    @precondition(lambda self: self.world.queue)
    @rule(seconds=PAUSE_SECONDS)
    def queue_preempts(self, seconds: int) -> None:
        self.world.preempt_jobs()
        self.world.run_controllers()
        self.world.run_kubelet()
        self.world.pass_time(seconds)

    @rule()
    def another_client_deletes_the_job(self) -> None:
        for job in list(self.world.jobs.values())[-1:]:
            self.world.jobs[job.uid] = replace(job, is_deleting=True)
            self.world.attempts_that_may_count.add(job.attempt)

    @rule()
    def job_is_orphaned(self) -> None:
        for job in list(self.world.jobs.values())[-1:]:
            if job.is_owned:
                del self.world.jobs[job.uid]
                self.world.attempts_that_may_count.add(job.attempt)

    @rule()
    def operator_restarts(self) -> None:
        """Restart the operator. The new process does not know pods that were deleted before its start."""
        self.world.attempts_that_may_count |= {pod.attempt for pod in self.world.pods.values() if pod.is_deleted}
        self.world.pods = {uid: pod for uid, pod in self.world.pods.items() if not pod.is_deleted}
        self.world.last_report = None

    @rule()
    def foreign_job_takes_the_name(self) -> None:
        if not any(job.name == FOREIGN_JOB.name for job in self.world.jobs.values()):
            self.world.jobs[FOREIGN_JOB.uid] = FOREIGN_JOB

    @rule(seconds=st.sampled_from([1, 30, 700, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    # Invariants

    @invariant()
    def at_most_one_active_job(self) -> None:
        active_jobs = [job for job in self.world.jobs.values() if job.is_owned and not job.is_finished]
        assert len(active_jobs) <= 1, active_jobs

    @invariant()
    def finished_job_stays_finished(self) -> None:
        status = self.world.status
        is_finished = any(condition.type is Condition.FINISHED and condition.status == "True" for condition in status.conditions)
        if self.final_phase is not None:
            assert is_finished
            assert status.phase == self.final_phase
        elif is_finished:
            assert status.phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)
            self.final_phase = status.phase

    @invariant()
    def attempts_only_grow(self) -> None:
        assert (self.world.status.attempt or 0) >= self.highest_attempt
        self.highest_attempt = self.world.status.attempt or 0

    @invariant()
    def finished_job_starts_no_attempt(self) -> None:
        """After a job has finished, no event makes the operator start another attempt."""
        if self.final_phase is None:
            self.attempt_count = len(self.world.created_attempts)
        assert len(self.world.created_attempts) == self.attempt_count

    @invariant()
    def preemption_does_not_count(self) -> None:
        counted_attempts = {attempt.number for attempt in self.world.status.attempts if attempt.counted}
        assert counted_attempts <= self.world.attempts_that_may_count, self.world.status.to_wire()

    @invariant()
    def no_attempt_stalls(self) -> None:
        """No attempt stalls, because simulated pods always respond, and pods on lost nodes are evicted before the stall timeout."""
        assert Reason.STALLED not in {attempt.reason for attempt in self.world.status.attempts}, self.world.status.to_wire()

    @invariant()
    def only_running_time_counts(self) -> None:
        status = self.world.status
        assert (status.active_seconds or 0) <= self.world.running_seconds + ROUNDING_SECONDS * (len(status.attempts) + 1), status.to_wire()

    @invariant()
    def parts_of_the_time_sum_to_the_time(self) -> None:
        goodput = self.world.status.goodput
        if goodput is None:
            return
        parts = goodput.parts.seconds()
        assert min(parts.values(), default=0.0) >= 0
        assert sum(parts.values()) == pytest.approx(goodput.wall_seconds, abs=0.01)
        assert sum(goodput.earlier.values() if goodput.earlier else []) + sum(attempt_time.wall_seconds for attempt_time in goodput.attempts) == pytest.approx(
            goodput.wall_seconds, abs=0.01
        )
        last_attempt = self.world.status.attempts[-1] if self.world.status.attempts else None
        if last_attempt is not None and last_attempt.end_time is not None and goodput.attempts[-1].number == last_attempt.number:
            assert goodput.wall_seconds == pytest.approx(max(0.0, between(T0, last_attempt.end_time)), abs=1.0)
        assert goodput.wall_seconds <= between(T0, self.world.now) + 1.0

    @invariant()
    def adaptations_have_an_end(self) -> None:
        changes = [adaptation.set or {} for adaptation in self.world.status.adaptations]
        assert len([change for change in changes if LEARNING_RATE_FIELD in change]) <= MAX_ROLLBACKS
        divergence_adaptations = [adaptation for adaptation in self.world.status.adaptations if adaptation.reason == Reason.DIVERGED]
        assert len(divergence_adaptations) <= MAX_ROLLBACKS + 1

    def teardown(self) -> None:
        """Reconcile until the job has finished or, if the user has suspended it, is suspended. Check that another reconcile changes nothing."""
        world = self.world
        world.jobs.pop(FOREIGN_JOB.uid, None)
        if world.suspend or world.cancel:
            self._reconcile_until(Situation.SUSPENDED, Situation.FINISHED, pods_end=False)
            assert not [job for job in world.jobs.values() if not job.is_finished]
            assert not [pod for pod in world.pods.values() if not pod.is_finished]
        world.suspend = False
        self._reconcile_until(Situation.FINISHED, pods_end=True)
        status_before = world.status.to_wire()
        self._reconcile()
        assert world.status.to_wire() == status_before
        self._check_cleanup()
        assert world.status.to_wire() == status_before

    def _check_cleanup(self) -> None:
        """Check that all Jobs and pods are deleted after the TTL, and that the operator creates no new Jobs."""
        world = self.world
        world.ttl_seconds = TTL_SECONDS
        world.pass_time(TTL_SECONDS)
        for _ in range(4):
            self._reconcile()
            world.run_controllers()
            world.run_kubelet()
        assert not world.list_owned_jobs()
        assert not [pod for pod in world.pods.values() if not pod.is_deleted], world.pods
        self.finished_job_starts_no_attempt()

    def _reconcile_until(self, *situations: Situation, pods_end: bool) -> None:
        world = self.world
        for _ in range(60):
            world.run_controllers()
            world.run_kubelet()
            world.admit_jobs()
            world.start_pods()
            for pod in world.list_running_pods() if pods_end else []:
                world.end_container(pod, 0)
            world.pass_time(700)
            plan = self._reconcile()
            if plan.situation in situations and plan.job_end is None and (plan.is_cleaned_up or plan.situation is not situations[-1]):
                return
        raise AssertionError(f"the job reaches no stable state: {plan}\n{world.status.to_wire()}")


class GangEvents(JobEvents):
    """One job with a gang of three pods, and all events that may happen to this job."""

    pod_count = 3


TestJobEvents = JobEvents.TestCase
TestJobEvents.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestGangEvents = GangEvents.TestCase
TestGangEvents.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
