"""A simulated cluster of plain values: a Job controller, a garbage collector, a kubelet, a queue, nodes and a trainer.

Each simulated component changes the objects that the operator observes in the same way as the real component. The simulation also
records facts that the operator cannot observe: the running time of the job (`running_seconds`), the checkpoints in storage, and the
attempts that may count against the retries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from finetune_api.exits import EXIT_POLICIES, RetryPolicy, codes_that_fail_the_job
from finetune_api.names import ExitCode, attempt_job_name
from finetune_api.pod import TerminationMessage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Checkpoint, FineTuneJobStatus, Progress, Stage
from finetune_operator.facts import Facts, ReceivedReport
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import accept
from finetune_operator.views import JobView, PodView, as_deleted

from tests.unit.operator.samples import CONFIG, T0, end_pod, finetunejob, report, spec
from tests.unit.operator.samples import job as make_job
from tests.unit.operator.samples import pod as make_pod

FOREIGN_JOB = make_job(1, name="run-1", uid="foreign", owner_uid="somebody", is_owned=False)
GRACE_PERIOD = timedelta(seconds=300)
EVICTION_DELAY = timedelta(seconds=340)
"""Time from the last heartbeat of a node to the eviction of its pods: 40 s until it is not ready, 300 s of toleration."""
CHECKPOINT_EVERY = 10
"""Steps between two checkpoints."""


@dataclass
class SimulatedCluster:
    """The state of a cluster with one FineTuneJob."""

    nodes: int = 1
    queue: str | None = None
    deadline_seconds: int | None = None
    ttl_seconds: int | None = None
    kept_checkpoints: int = 3
    suspend: bool = False
    cancel: bool = False
    now: datetime = T0
    status: FineTuneJobStatus = field(default_factory=FineTuneJobStatus)
    generation: int = 1
    jobs: dict[str, JobView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    last_report: ReceivedReport | None = None
    last_serial_number: int = 0
    created_attempts: list[int] = field(default_factory=list)
    lost_since: dict[str, datetime] = field(default_factory=dict)
    """Time of the loss of the node, by the uid of the pod on this node."""
    ended_by_suspension: set[str] = field(default_factory=set)
    """uids of pods that ended because their Job was suspended. The Job controller does not count such pods as failed."""
    attempt_of_step: dict[int, int] = field(default_factory=dict)
    """The attempt that committed the checkpoint, by step."""
    start_limits: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Newest step from which an attempt may start, and the first attempt to whose checkpoints this limit does not apply, by the uid of its Job."""
    start_steps: dict[str, int] = field(default_factory=dict)
    """Step from which each pod started, by uid."""
    steps: dict[str, int] = field(default_factory=dict)
    """Step that each pod has reached, by uid."""
    reported_checkpoints: set[tuple[int, int]] = field(default_factory=set)
    """(step, attempt) of each checkpoint that was reported to the operator."""
    running_seconds: float = 0.0
    """Seconds during which an attempt was admitted and had not ended."""
    may_count: set[int] = field(default_factory=set)
    """Attempts that may count against the retries."""

    def user_spec(self) -> Object:
        """Return the spec as the user wrote it."""
        policy = {"retries": 2, "activeDeadlineSeconds": self.deadline_seconds, "ttlSecondsAfterFinished": self.ttl_seconds}
        groups: Object = {"policy": {name: value for name, value in policy.items() if value is not None}}
        if self.queue is not None:
            groups["placement"] = {"queueName": self.queue}
        groups["resources"] = {"nodes": self.nodes, "gpusPerNode": 0}
        return spec(**groups, suspend=self.suspend, cancel=self.cancel)

    def facts(self) -> Facts:
        """Return the facts that the operator observes."""
        written = self.user_spec()
        finetune_job = finetunejob(written, self.status, generation=self.generation)
        observed = Facts(
            finetune_job, accept(written, CONFIG), self.now, CONFIG, tuple(self.jobs.values()), tuple(self.pods.values())
        )
        same = self.last_report is not None and self.last_report.report.attempt == observed.attempt
        return replace(observed, last_report=self.last_report) if same else observed

    def owned_jobs(self) -> list[JobView]:
        """Jobs that the FineTuneJob owns."""
        return [job for job in self.jobs.values() if job.is_owned]

    def pods_of(self, job: JobView) -> list[PodView]:
        """Pods of a Job whose objects exist."""
        return [p for p in self.pods.values() if p.job_uid == job.uid and not p.is_deleted]

    def create_job(self, attempt: int, max_step: int | None, rolled_back_attempt: int | None) -> JobView | None:
        """Create the Job as the API server does, and return it. If an object of another owner has the name, return None."""
        name = attempt_job_name("run", attempt)
        existing = next((job for job in self.jobs.values() if job.name == name), None)
        if existing is not None:
            return existing if existing.is_owned else None
        self.last_serial_number += 1
        start_fields = {"is_suspended": True, "queue": self.queue, "started_at": None} if self.queue else {"started_at": self.now}
        created_job = make_job(attempt, uid=f"job-{attempt}-{self.last_serial_number}", created_at=self.now, **start_fields)
        self.jobs[created_job.uid] = created_job
        self.start_limits[created_job.uid] = (max_step, rolled_back_attempt)
        self.created_attempts.append(attempt)
        return created_job

    # Job controller, garbage collector, kubelet

    def run_controllers(self) -> None:
        """Let the Job controller and the garbage collector run once over all Jobs."""
        for job in list(self.jobs.values()):
            pods = self.pods_of(job)
            if job.is_deleting:
                self.delete_pods(pods)
                if not pods:
                    del self.jobs[job.uid]
            elif job.is_owned and not job.is_finished:
                self._run_job(job, pods)

    def _run_job(self, job: JobView, pods: list[PodView]) -> None:
        if job.is_suspended:
            self._hold_job(job, pods)
        job_pods = [p for p in self.pods.values() if p.job_uid == job.uid and p.uid not in self.ended_by_suspension]
        if any(p.is_finished and p.phase != "Succeeded" for p in job_pods):
            self.delete_pods([p for p in pods if not p.is_finished])
            if all(p.is_finished for p in pods):
                self.jobs[job.uid] = replace(job, failed_at=self.now, failed_reason="BackoffLimitExceeded")
        elif job.is_suspended:
            return
        elif missing := set(range(self.nodes)) - {p.completion_index for p in job_pods} - {p.completion_index for p in pods if not p.is_finished}:
            for index in missing:
                self._make_pod(job, index)
        elif all(p.phase == "Succeeded" for p in job_pods):
            self.jobs[job.uid] = replace(job, completed_at=self.now)

    def _hold_job(self, job: JobView, pods: list[PodView]) -> None:
        """Delete the pods of a suspended Job. The Job fails only if its podFailurePolicy contains the exit code of such a pod."""
        self.delete_pods([p for p in pods if not p.is_finished])
        for p in self.pods.values():
            final = p.terminated is not None and p.terminated.exit_code in codes_that_fail_the_job()
            if p.job_uid == job.uid and p.phase != "Succeeded" and not final:
                self.ended_by_suspension.add(p.uid)

    def _make_pod(self, job: JobView, index: int) -> None:
        self.last_serial_number += 1
        uid = f"pod-{self.last_serial_number}"
        self.pods[uid] = make_pod(
            job.attempt, index, uid=uid, job_uid=job.uid, created_at=self.now, phase="Pending", is_ready=False
        )

    def delete_pods(self, pods: list[PodView]) -> None:
        """Delete pods with their grace period."""
        for p in pods:
            if p.deletion_timestamp is None and not p.is_deleted:
                self.pods[p.uid] = replace(p, deletion_timestamp=self.now + GRACE_PERIOD)

    def run_kubelet(self) -> None:
        """End and remove the pods that are being deleted, except those on lost nodes."""
        for p in list(self.pods.values()):
            if p.deletion_timestamp is not None and not p.is_deleted and p.uid not in self.lost_since:
                self.end_container(p, ExitCode.PREEMPTED_SAVED)
                self.pods[p.uid] = as_deleted(self.pods[p.uid])

    def start_pods(self) -> None:
        """Start all pending pods; they become ready."""
        for p in list(self.pods.values()):
            if p.phase == "Pending" and not p.is_deleted and p.deletion_timestamp is None:
                self.pods[p.uid] = replace(p, phase="Running", is_ready=True, scheduled_at=self.now, running_since=self.now)

    def running_pods(self) -> list[PodView]:
        """Running pods on nodes that are not lost."""
        running = [p for p in self.pods.values() if p.phase == "Running" and not p.is_deleted]
        return [p for p in running if p.uid not in self.lost_since]

    def end_container(self, p: PodView, code: int) -> None:
        """End the container. A container that is not killed writes its termination message."""
        if p.is_finished:
            return
        message = self._termination_message(p) if code not in (ExitCode.SIGKILL, ExitCode.SIGTERM) and p.phase == "Running" else None
        if message is not None and p.completion_index == 0:
            self.reported_checkpoints |= {(checkpoint.step, self.attempt_of(checkpoint)) for checkpoint in message.checkpoints}
        ended_pod = end_pod(p, code, message)
        assert ended_pod.terminated is not None
        self.pods[p.uid] = replace(ended_pod, terminated=replace(ended_pod.terminated, started_at=p.running_since, finished_at=self.now))
        if code not in EXIT_POLICIES or EXIT_POLICIES[code].retry_policy is RetryPolicy.COUNTED:
            self.may_count.add(p.attempt)

    # Nodes

    def lose_node(self, p: PodView) -> None:
        """Lose the pod's node. The operator scrapes every few seconds, so it still reads the pod's last report."""
        self.report_progress()
        self.lost_since[p.uid] = self.now
        self.pods[p.uid] = replace(p, is_ready=False)

    def evict_pods(self) -> None:
        """Disrupt and delete pods whose nodes have been lost for long, as the taint manager does."""
        for uid, since in self.lost_since.items():
            p = self.pods.get(uid)
            if p is not None and not p.is_finished and not p.disruption_reason and self.now >= since + EVICTION_DELAY:
                deleting = p.deletion_timestamp or since + EVICTION_DELAY + GRACE_PERIOD
                self.pods[uid] = replace(p, disruption_reason="DeletionByTaintManager", deletion_timestamp=deleting)

    def node_comes_back(self) -> None:
        """Reconnect the lost nodes, so that the kubelets end the pods that were deleted."""
        for uid in list(self.lost_since):
            p = self.pods.get(uid)
            if p is not None and not p.is_finished and p.deletion_timestamp is None:
                self.pods[uid] = replace(p, is_ready=True)
        self.lost_since.clear()

    # The queue

    def admit_jobs(self) -> None:
        """Admit all Jobs that wait for quota."""
        for job in self.owned_jobs():
            if job.is_suspended and not job.is_finished and not job.is_deleting and not [p for p in self.pods_of(job) if not p.is_finished]:
                self.jobs[job.uid] = replace(job, is_suspended=False, suspended_since=None, started_at=self.now)

    def preempt_jobs(self) -> None:
        """Suspend the Job and clear its start time, as Kueue does when it gives the quota to another workload."""
        for job in self.owned_jobs():
            if job.queue and not job.is_suspended and not job.is_finished and not job.is_deleting:
                self.jobs[job.uid] = replace(job, is_suspended=True, suspended_since=self.now, started_at=None)

    # The trainer

    def train_gangs(self, steps: int) -> None:
        """Advance each complete gang by `steps`, and commit its checkpoints."""
        for job in self.owned_jobs():
            gang = [p for p in self.running_pods() if p.job_uid == job.uid and p.deletion_timestamp is None]
            if job.is_finished or job.is_suspended or len({p.completion_index for p in gang}) < self.nodes:
                continue
            leader = next(p for p in gang if p.completion_index == 0)
            before = self.steps.setdefault(leader.uid, self._start(leader))
            self.steps[leader.uid] = before + steps
            for step in range(before + 1, before + steps + 1):
                if step % CHECKPOINT_EVERY == 0:
                    self._commit(step, job.attempt)

    def _commit(self, step: int, attempt: int) -> None:
        """Commit a checkpoint, and apply the retention to checkpoints up to this step. A rollback may have skipped newer checkpoints."""
        self.attempt_of_step[step] = attempt
        for old in sorted(other for other in self.attempt_of_step if other <= step)[: -self.kept_checkpoints]:
            del self.attempt_of_step[old]

    def _start(self, leader: PodView) -> int:
        """Return the start step of a rank 0 pod: the newest committed step that its run configuration allows."""
        self.start_steps[leader.uid] = self.allowed_start_step(*self.start_limits[leader.job_uid])
        return self.start_steps[leader.uid]

    def allowed_start_step(self, limit: int | None, rolled_back_attempt: int | None) -> int:
        """Return the newest committed step that a run configuration with these limits allows."""
        exempt = rolled_back_attempt if limit is not None else None
        steps = [step for step, attempt in self.attempt_of_step.items() if limit is None or step <= limit or (exempt and attempt >= exempt)]
        return max(steps, default=0)

    def report_progress(self) -> None:
        """Let the operator scrape rank 0."""
        for p in self.running_pods():
            if p.completion_index == 0 and p.uid in self.steps and p.job_uid in self.jobs:
                step, start, known = self.steps[p.uid], self.start_steps[p.uid], self._checkpoints()
                seconds = (self.now - (p.running_since or self.now)).total_seconds()
                received = report(attempt=p.attempt, stage=Stage.TRAINING, resumedFromStep=start, health={}, timeUse={"steps": seconds})
                received = received.model_copy(
                    update={"progress": Progress(step=step, update_time=self.now), "checkpoints": known}
                )
                self.last_report = ReceivedReport(received, self.now, p.uid)
                self.reported_checkpoints |= {(checkpoint.step, self.attempt_of(checkpoint)) for checkpoint in known}

    def _termination_message(self, p: PodView) -> TerminationMessage:
        if p.uid not in self.steps:
            return TerminationMessage(code="Code", message="message")
        message = TerminationMessage(code="Code", message="message", step=self.steps[p.uid], resumed_from_step=self.start_steps[p.uid])
        return message.model_copy(update={"checkpoints": self._checkpoints()})

    def _checkpoints(self) -> list[Checkpoint]:
        uri = "s3://models/test/checkpoints/step-{step:08d}/a{attempt}-00000000"
        return [
            Checkpoint(step=s, uri=uri.format(step=s, attempt=self.attempt_of_step[s]), healthy=True) for s in sorted(self.attempt_of_step)
        ]

    @staticmethod
    def attempt_of(checkpoint: Checkpoint) -> int:
        """Return the attempt that committed a checkpoint."""
        return int(checkpoint.uri.rpartition("/a")[2].partition("-")[0])

    # Time

    def pass_time(self, seconds: int) -> None:
        """Advance the time. The time also counts as running time while an attempt is admitted or has pods."""
        admitted = [job for job in self.owned_jobs() if not job.is_suspended and not job.is_finished]
        if admitted or not all(p.is_finished for p in self.pods.values()):
            self.running_seconds += seconds
        self.now += timedelta(seconds=seconds)
        self.evict_pods()


def effective_batch(spec: FineTuneJobSpec) -> int:
    """Rows per optimizer step and rank."""
    training = spec.training
    return (training.batch_size_per_device or 1) * (training.gradient_accumulation_steps or 1)
