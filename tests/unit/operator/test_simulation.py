"""Random lives of a job: whatever the user, the pods, the cluster and a dying operator do, in whatever order.

A world of plain values stands for the cluster: a Job controller, a kubelet and a garbage collector of a few lines each. The
operator's pure half (`decide`, `report`) runs on it. What must hold at every moment is checked after every step; in the end the
cluster is left in peace, and the job must come to rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from finetune_api.names import Condition, ExitCode, Phase, attempt_job_name
from finetune_api.pod import LastWords
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import Acted, Plan, Situation
from finetune_operator.policies.acceptance import accept
from finetune_operator.report import report
from finetune_operator.views import JobView, PodView, buried, read_status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.operator.samples import CONFIG, T0, UID, finetunejob, spec
from tests.unit.operator.samples import ended as end_pod
from tests.unit.operator.samples import job as make_job
from tests.unit.operator.samples import pod as make_pod

CODES = st.sampled_from([0, 1, 64, 65, 69, 70, 71, 72, 73, 74, 75, 76, 77, 137, 143])
FOREIGN = make_job(1, name="run-1", uid="foreign", owner_uid="somebody", owned=False)


@dataclass
class World:
    """The cluster."""

    nodes: int = 1
    suspend: bool = False
    cancel: bool = False
    now: datetime = T0
    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    generation: int = 1
    jobs: dict[str, JobView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    serial: int = 0
    created: list[int] = field(default_factory=list)
    foreign: bool = False

    def facts(self) -> Facts:
        wish = {"suspend": self.suspend, "cancel": self.cancel}
        written = spec(resources={"nodes": self.nodes, "gpusPerNode": 0}, policy={"retries": 2}, **wish)
        mine = finetunejob(written, self.status, generation=self.generation)
        return Facts(
            mine, accept(written, CONFIG), self.now, CONFIG, tuple(self.jobs.values()), tuple(self.pods.values())
        )

    def create(self, attempt: int) -> JobView | None:
        name = attempt_job_name("run", attempt)
        found = next((one for one in self.jobs.values() if one.name == name), None)
        if found is not None:
            return found if found.owned else None
        self.serial += 1
        made = make_job(attempt, uid=f"job-{attempt}-{self.serial}", created=self.now, started=self.now)
        self.jobs[made.uid] = made
        self.created.append(attempt)
        return made

    def controllers(self) -> None:
        """The Job controller and the garbage collector, until nothing changes."""
        for one in list(self.jobs.values()):
            pods = [p for p in self.pods.values() if p.job_uid == one.uid and not p.gone]
            if one.deleting:
                for p in pods:
                    if p.deleting is None:
                        self.pods[p.uid] = replace(p, deleting=self.now + timedelta(seconds=300))
                if not pods:
                    del self.jobs[one.uid]
            elif one.owned and not one.finished and not one.suspended:
                self._run_job(one, pods)

    def _run_job(self, one: JobView, pods: list[PodView]) -> None:
        known = {p.index for p in self.pods.values() if p.job_uid == one.uid}
        failed = [p for p in pods if p.phase == "Failed"] + [
            p for p in self.pods.values() if p.job_uid == one.uid and p.gone and p.phase != "Succeeded"
        ]
        if failed:
            for p in pods:
                if p.deleting is None and not p.over:
                    self.pods[p.uid] = replace(p, deleting=self.now + timedelta(seconds=300))
            if all(p.over for p in pods):
                self.jobs[one.uid] = replace(one, failed=self.now, failed_reason="BackoffLimitExceeded")
            return
        if len(known) < self.nodes:
            for index in set(range(self.nodes)) - known:
                self.serial += 1
                uid = f"pod-{self.serial}"
                self.pods[uid] = make_pod(
                    one.attempt, index, uid=uid, job_uid=one.uid, created=self.now, phase="Pending", ready=False
                )
        elif len(pods) == self.nodes and all(p.phase == "Succeeded" for p in pods):
            self.jobs[one.uid] = replace(one, complete=self.now)

    def kubelet(self) -> None:
        """Pods that are being deleted end and go."""
        for p in list(self.pods.values()):
            if p.deleting is not None and not p.gone:
                over = p if p.over else end_pod(p, ExitCode.PREEMPTED_SAVED)
                self.pods[p.uid] = buried(over)


class Lives(RuleBasedStateMachine):
    """One job, and everything that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.final: str | None = None
        self.highest = 0

    # What the operator does

    @rule(crash=st.sampled_from(["no", "no", "no", "before act", "between deletes and creates", "before write"]))
    def look(self, crash: str) -> None:
        self._look(crash)

    def _look(self, crash: str = "no") -> Plan:
        world = self.world
        facts = world.facts()
        plan = decide(facts)
        assert decide(facts) == plan
        self._never_touch_what_is_not_ours(plan)
        if crash == "before act":
            return plan
        acted = Acted()
        if plan.condemn is None:
            for one in plan.delete:
                if one.uid in world.jobs:
                    world.jobs[one.uid] = replace(world.jobs[one.uid], deleting=True)
            for p in (*plan.delete_pods, *plan.force):
                gone = p in plan.force
                world.pods[p.uid] = buried(p) if gone else replace(p, deleting=world.now + timedelta(seconds=300))
            if crash == "between deletes and creates":
                return plan
            if plan.create is not None:
                acted = Acted(created=world.create(plan.create))
        if crash == "before write":
            return plan
        new = report(facts, plan, acted)
        written = read_status(new.wire())
        assert written.wire() == new.wire()
        world.status = written
        return plan

    def _never_touch_what_is_not_ours(self, plan: Plan) -> None:
        assert all(one.owned and one.owner_uid == UID for one in plan.delete)
        assert all(p.owner_uid == UID for p in (*plan.delete_pods, *plan.force))

    # What the user does

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.world.suspend = value
        self.world.generation += 1

    @rule()
    def cancel(self) -> None:
        self.world.cancel = True
        self.world.generation += 1

    # What the cluster does

    @rule()
    def controllers(self) -> None:
        self.world.controllers()

    @rule()
    def kubelet(self) -> None:
        self.world.kubelet()

    @rule()
    def pods_run(self) -> None:
        for p in list(self.world.pods.values()):
            if p.phase == "Pending" and not p.gone and p.deleting is None:
                self.world.pods[p.uid] = replace(p, phase="Running", ready=True)

    @rule(code=CODES, step=st.integers(0, 50), which=st.integers(0, 3))
    def pod_ends(self, code: int, step: int, which: int) -> None:
        running = [p for p in self.world.pods.values() if p.phase == "Running" and not p.gone]
        if running:
            p = running[which % len(running)]
            words = LastWords(code="Code", message="words", step=step, committed_step=step or None)
            self.world.pods[p.uid] = end_pod(p, code, words if code not in (137, 143) else None)

    @rule(which=st.integers(0, 3))
    def pod_is_deleted(self, which: int) -> None:
        there = [p for p in self.world.pods.values() if not p.gone and p.deleting is None]
        if there:
            p = there[which % len(there)]
            self.world.pods[p.uid] = replace(p, deleting=self.world.now + timedelta(seconds=300))

    @rule()
    def job_is_deleted_by_somebody(self) -> None:
        for one in list(self.world.jobs.values())[-1:]:
            self.world.jobs[one.uid] = replace(one, deleting=True)

    @rule()
    def job_is_orphaned(self) -> None:
        for one in list(self.world.jobs.values())[-1:]:
            if one.owned:
                del self.world.jobs[one.uid]

    @rule()
    def memories_are_lost(self) -> None:
        """The operator was away: it never saw how pods that are gone ended."""
        self.world.pods = {uid: p for uid, p in self.world.pods.items() if not p.gone}

    @rule()
    def a_foreign_job_takes_the_name(self) -> None:
        if not any(one.name == FOREIGN.name for one in self.world.jobs.values()):
            self.world.jobs[FOREIGN.uid] = FOREIGN

    @rule(seconds=st.sampled_from([1, 30, 700, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += timedelta(seconds=seconds)

    # What must hold

    @invariant()
    def at_most_one_active_job(self) -> None:
        active = [one for one in self.world.jobs.values() if one.owned and not one.finished]
        assert len(active) <= 1, active

    @invariant()
    def the_end_is_never_taken_back(self) -> None:
        status = self.world.status
        over = any(c.type is Condition.FINISHED and c.status == "True" for c in status.conditions)
        if self.final is not None:
            assert over
            assert status.phase == self.final
        elif over:
            assert status.phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)
            self.final = status.phase

    @invariant()
    def attempts_only_grow(self) -> None:
        assert (self.world.status.attempt or 0) >= self.highest
        self.highest = self.world.status.attempt or 0

    def teardown(self) -> None:
        """Left in peace, the wish is fulfilled; then the job comes to rest, and a further look changes nothing."""
        world = self.world
        world.jobs.pop(FOREIGN.uid, None)
        if world.suspend or world.cancel:
            self._until(Situation.SUSPENDED, Situation.FINISHED, pods_end=False)
            assert not [one for one in world.jobs.values() if not one.finished]
            assert not [p for p in world.pods.values() if not p.over]
        world.suspend = False
        self._until(Situation.FINISHED, pods_end=True)
        before = world.status.wire()
        self._look()
        assert world.status.wire() == before

    def _until(self, *rest: Situation, pods_end: bool) -> None:
        world = self.world
        for _ in range(60):
            world.controllers()
            world.kubelet()
            for p in list(world.pods.values()):
                if p.phase == "Pending" and not p.gone:
                    world.pods[p.uid] = replace(p, phase="Running", ready=True)
                elif pods_end and p.phase == "Running" and not p.gone:
                    world.pods[p.uid] = end_pod(p, 0)
            world.now += timedelta(seconds=700)
            plan = self._look()
            if plan.situation in rest and plan.finish is None and (plan.cleaned or plan.situation is not rest[-1]):
                return
        raise AssertionError(f"no rest: {plan}\n{world.status.wire()}")


class WideLives(Lives):
    """The same with three pods."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(nodes=3)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWideLives = WideLives.TestCase
TestWideLives.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
