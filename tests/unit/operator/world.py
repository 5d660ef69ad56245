"""A cluster that is simulated in memory: a Job controller, a garbage collector, a kubelet, a queue, nodes and a trainer.

The operator observes objects in this cluster. Each simulated component changes these objects as the real component would. The simulation also
records facts that the operator cannot observe: the running time of the job (`running_seconds`), the checkpoints in storage, and the
attempts that may count against the retries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from finetune_api.exits import EXIT_POLICIES, RetryPolicy, list_exit_codes_that_fail_the_job
from finetune_api.names import ExitCode, attempt_job_name
from finetune_api.pod import TerminationMessage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Checkpoint, FineTuneJobStatus, Progress, Stage
from finetune_operator.facts import Facts, ReceivedReport
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import accept
from finetune_operator.views import JobView, PodView, mark_deleted

from tests.unit.operator.samples import CONFIG, T0, end_pod, finetunejob, report, spec
from tests.unit.operator.samples import job as make_job
from tests.unit.operator.samples import pod as make_pod

FOREIGN_JOB = make_job(1, name="run-1", uid="foreign", owner_uid="somebody", is_owned=False)
GRACE_PERIOD = timedelta(seconds=300)
EVICTION_DELAY = timedelta(seconds=340)
"""Time from the last heartbeat of a node to the eviction of its pods: after 40 s, the node becomes not ready, and its pods tolerate this state for 300 s."""
CHECKPOINT_EVERY_STEPS = 10
"""Steps between two checkpoints."""


@dataclass
class SimulatedCluster:
    """The state of a cluster with one FineTuneJob."""

    nodes: int = 1
    queue: str | None = None
    deadline_seconds: int | None = None
    ttl_seconds: int | None = None
    kept_checkpoint_count: int = 3
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
    lost_since_by_pod: dict[str, datetime] = field(default_factory=dict)
    """For each pod on a lost node, by the pod's uid: the time at which the node was lost."""
    uids_ended_by_suspension: set[str] = field(default_factory=set)
    """uids of pods that ended because their Job was suspended. The Job controller does not count these pods as failed."""
    attempt_of_step: dict[int, int] = field(default_factory=dict)
    """For the step of each checkpoint: the attempt that committed this checkpoint."""
    start_limits: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """For the uid of each Job: the newest step from which its attempt may start, and the number of an attempt. Checkpoints of this or a later attempt are
    allowed at any step.
    """
    start_steps_by_pod: dict[str, int] = field(default_factory=dict)
    """The step from which each pod started, by the pod's uid."""
    steps_by_pod: dict[str, int] = field(default_factory=dict)
    """The step that each pod has reached, by the pod's uid."""
    reported_checkpoints: set[tuple[int, int]] = field(default_factory=set)
    """(step, attempt) of each checkpoint that was reported to the operator."""
    running_seconds: float = 0.0
    """Number of seconds in which an attempt was admitted and had not ended."""
    attempts_that_may_count: set[int] = field(default_factory=set)
    """Attempts that may count against the retries."""

    def build_user_spec(self) -> Object:
        """Return the spec as the user wrote it."""
        policy = {"retries": 2, "activeDeadlineSeconds": self.deadline_seconds, "ttlSecondsAfterFinished": self.ttl_seconds}
        groups: Object = {"policy": {name: value for name, value in policy.items() if value is not None}}
        if self.queue is not None:
            groups["placement"] = {"queueName": self.queue}
        groups["resources"] = {"nodes": self.nodes, "gpusPerNode": 0}
        return spec(**groups, suspend=self.suspend, cancel=self.cancel)

    def facts(self) -> Facts:
        """Return the facts that the operator observes."""
        raw_spec = self.build_user_spec()
        finetune_job = finetunejob(raw_spec, self.status, generation=self.generation)
        job_facts = Facts(
            finetune_job, accept(raw_spec, CONFIG), self.now, CONFIG, tuple(self.jobs.values()), tuple(self.pods.values())
        )
        is_current = self.last_report is not None and self.last_report.report.attempt == job_facts.attempt
        return replace(job_facts, last_report=self.last_report) if is_current else job_facts

    def list_owned_jobs(self) -> list[JobView]:
        """Return the Jobs that the FineTuneJob owns."""
        return [job for job in self.jobs.values() if job.is_owned]

    def list_pods_of(self, job: JobView) -> list[PodView]:
        """Return the pods of a Job that are not deleted."""
        return [pod_view for pod_view in self.pods.values() if pod_view.job_uid == job.uid and not pod_view.is_deleted]

    def create_job(self, attempt: int, max_step: int | None, rolled_back_attempt: int | None) -> JobView | None:
        """Create the Job of an attempt and return it, as the API server does. If a Job of another owner already has this name, return None."""
        name = attempt_job_name("run", attempt)
        existing_job = next((job for job in self.jobs.values() if job.name == name), None)
        if existing_job is not None:
            return existing_job if existing_job.is_owned else None
        self.last_serial_number += 1
        start_fields = {"is_suspended": True, "queue": self.queue, "started_at": None} if self.queue else {"started_at": self.now}
        created_job = make_job(attempt, uid=f"job-{attempt}-{self.last_serial_number}", created_at=self.now, **start_fields)
        self.jobs[created_job.uid] = created_job
        self.start_limits[created_job.uid] = (max_step, rolled_back_attempt)
        self.created_attempts.append(attempt)
        return created_job

    # Job controller, garbage collector, kubelet

    def run_controllers(self) -> None:
        """Simulate one pass of the Job controller and of the garbage collector over all Jobs."""
        for job in list(self.jobs.values()):
            pods = self.list_pods_of(job)
            if job.is_deleting:
                self.delete_pods(pods)
                if not pods:
                    del self.jobs[job.uid]
            elif job.is_owned and not job.is_finished:
                self._run_job(job, pods)

    def _run_job(self, job: JobView, pods: list[PodView]) -> None:
        if job.is_suspended:
            self._hold_job(job, pods)
        job_pods = [pod_view for pod_view in self.pods.values() if pod_view.job_uid == job.uid and pod_view.uid not in self.uids_ended_by_suspension]
        if any(pod_view.is_finished and pod_view.phase != "Succeeded" for pod_view in job_pods):
            self.delete_pods([pod_view for pod_view in pods if not pod_view.is_finished])
            if all(pod_view.is_finished for pod_view in pods):
                self.jobs[job.uid] = replace(job, failed_at=self.now, failed_reason="BackoffLimitExceeded")
        elif job.is_suspended:
            return
        elif missing_indexes := set(range(self.nodes)) - {
            pod_view.completion_index for pod_view in (*job_pods, *(pod_view for pod_view in pods if not pod_view.is_finished))
        }:
            for index in missing_indexes:
                self._create_pod(job, index)
        elif all(pod_view.phase == "Succeeded" for pod_view in job_pods):
            self.jobs[job.uid] = replace(job, completed_at=self.now)

    def _hold_job(self, job: JobView, pods: list[PodView]) -> None:
        """Delete the pods of a suspended Job. The Job fails only if the podFailurePolicy lists the exit code of one of these pods."""
        self.delete_pods([pod_view for pod_view in pods if not pod_view.is_finished])
        for pod_view in self.pods.values():
            is_final = pod_view.terminated is not None and pod_view.terminated.exit_code in list_exit_codes_that_fail_the_job()
            if pod_view.job_uid == job.uid and pod_view.phase != "Succeeded" and not is_final:
                self.uids_ended_by_suspension.add(pod_view.uid)

    def _create_pod(self, job: JobView, index: int) -> None:
        self.last_serial_number += 1
        uid = f"pod-{self.last_serial_number}"
        self.pods[uid] = make_pod(
            job.attempt, index, uid=uid, job_uid=job.uid, created_at=self.now, phase="Pending", is_ready=False
        )

    def delete_pods(self, pods: list[PodView]) -> None:
        """Delete pods with their grace period."""
        for pod_view in pods:
            if pod_view.deletion_timestamp is None and not pod_view.is_deleted:
                self.pods[pod_view.uid] = replace(pod_view, deletion_timestamp=self.now + GRACE_PERIOD)

    def run_kubelet(self) -> None:
        """End and remove the pods that are being deleted, except those on lost nodes."""
        for pod_view in list(self.pods.values()):
            if pod_view.deletion_timestamp is not None and not pod_view.is_deleted and pod_view.uid not in self.lost_since_by_pod:
                self.end_container(pod_view, ExitCode.PREEMPTED_SAVED)
                self.pods[pod_view.uid] = mark_deleted(self.pods[pod_view.uid])

    def start_pods(self) -> None:
        """Start all pending pods; they become ready."""
        for pod_view in list(self.pods.values()):
            if pod_view.phase == "Pending" and not pod_view.is_deleted and pod_view.deletion_timestamp is None:
                self.pods[pod_view.uid] = replace(pod_view, phase="Running", is_ready=True, scheduled_at=self.now, running_since=self.now)

    def list_running_pods(self) -> list[PodView]:
        """Return the running pods on nodes that are not lost."""
        running_pods = [pod_view for pod_view in self.pods.values() if pod_view.phase == "Running" and not pod_view.is_deleted]
        return [pod_view for pod_view in running_pods if pod_view.uid not in self.lost_since_by_pod]

    def end_container(self, pod_view: PodView, code: int) -> None:
        """End the container. A container that is not killed writes its termination message."""
        if pod_view.is_finished:
            return
        message = self._build_termination_message(pod_view) if code not in (ExitCode.SIGKILL, ExitCode.SIGTERM) and pod_view.phase == "Running" else None
        if message is not None and pod_view.completion_index == 0:
            self.reported_checkpoints |= {(checkpoint.step, self.find_attempt_of(checkpoint)) for checkpoint in message.checkpoints}
        ended_pod = end_pod(pod_view, code, message)
        assert ended_pod.terminated is not None
        self.pods[pod_view.uid] = replace(ended_pod, terminated=replace(ended_pod.terminated, started_at=pod_view.running_since, finished_at=self.now))
        if code not in EXIT_POLICIES or EXIT_POLICIES[code].retry_policy is RetryPolicy.COUNTED:
            self.attempts_that_may_count.add(pod_view.attempt)

    # Nodes

    def lose_node(self, pod_view: PodView) -> None:
        """Simulate that the pod's node is lost. The operator reads the pod's last report before the loss, because it reads reports every few seconds."""
        self.report_progress()
        self.lost_since_by_pod[pod_view.uid] = self.now
        self.pods[pod_view.uid] = replace(pod_view, is_ready=False)

    def evict_pods(self) -> None:
        """If a node has been lost for EVICTION_DELAY, mark its pods as disrupted and delete them, as the taint manager does."""
        for uid, lost_since in self.lost_since_by_pod.items():
            pod_view = self.pods.get(uid)
            if pod_view is not None and not pod_view.is_finished and not pod_view.disruption_reason and self.now >= lost_since + EVICTION_DELAY:
                deletion_timestamp = pod_view.deletion_timestamp or lost_since + EVICTION_DELAY + GRACE_PERIOD
                self.pods[uid] = replace(pod_view, disruption_reason="DeletionByTaintManager", deletion_timestamp=deletion_timestamp)

    def reconnect_nodes(self) -> None:
        """Reconnect the lost nodes, so that their kubelets end the deleted pods."""
        for uid in list(self.lost_since_by_pod):
            pod_view = self.pods.get(uid)
            if pod_view is not None and not pod_view.is_finished and pod_view.deletion_timestamp is None:
                self.pods[uid] = replace(pod_view, is_ready=True)
        self.lost_since_by_pod.clear()

    # The queue

    def admit_jobs(self) -> None:
        """Admit all Jobs that wait for quota."""
        for job in self.list_owned_jobs():
            has_running_pods = any(not pod_view.is_finished for pod_view in self.list_pods_of(job))
            if job.is_suspended and not job.is_finished and not job.is_deleting and not has_running_pods:
                self.jobs[job.uid] = replace(job, is_suspended=False, suspended_since=None, started_at=self.now)

    def preempt_jobs(self) -> None:
        """Suspend the Job and clear its start time, as Kueue does when it gives the quota to another workload."""
        for job in self.list_owned_jobs():
            if job.queue and not job.is_suspended and not job.is_finished and not job.is_deleting:
                self.jobs[job.uid] = replace(job, is_suspended=True, suspended_since=self.now, started_at=None)

    # The trainer

    def train_gangs(self, steps: int) -> None:
        """Let each gang whose pods all run train `steps` more steps, and commit its checkpoints."""
        for job in self.list_owned_jobs():
            gang_pods = [pod_view for pod_view in self.list_running_pods() if pod_view.job_uid == job.uid and pod_view.deletion_timestamp is None]
            if job.is_finished or job.is_suspended or len({pod_view.completion_index for pod_view in gang_pods}) < self.nodes:
                continue
            leader = next(pod_view for pod_view in gang_pods if pod_view.completion_index == 0)
            step_before = self.steps_by_pod.setdefault(leader.uid, self._record_start_step(leader))
            self.steps_by_pod[leader.uid] = step_before + steps
            for step in range(step_before + 1, step_before + steps + 1):
                if step % CHECKPOINT_EVERY_STEPS == 0:
                    self._commit(step, job.attempt)

    def _commit(self, step: int, attempt: int) -> None:
        """Commit a checkpoint, and apply the retention policy to checkpoints up to this step. Newer checkpoints, which a rollback has skipped, are kept."""
        self.attempt_of_step[step] = attempt
        for removed_step in sorted(committed_step for committed_step in self.attempt_of_step if committed_step <= step)[: -self.kept_checkpoint_count]:
            del self.attempt_of_step[removed_step]

    def _record_start_step(self, leader: PodView) -> int:
        """Record and return the step from which the pod of rank 0 starts: the newest committed step that its run configuration allows."""
        self.start_steps_by_pod[leader.uid] = self.find_allowed_start_step(*self.start_limits[leader.job_uid])
        return self.start_steps_by_pod[leader.uid]

    def find_allowed_start_step(self, max_step: int | None, rolled_back_attempt: int | None) -> int:
        """Return the newest committed step that a run configuration with these limits allows."""
        exempt = rolled_back_attempt if max_step is not None else None
        steps = [step for step, attempt in self.attempt_of_step.items() if max_step is None or step <= max_step or (exempt and attempt >= exempt)]
        return max(steps, default=0)

    def report_progress(self) -> None:
        """Let the operator read the progress report of rank 0."""
        for pod_view in self.list_running_pods():
            if pod_view.completion_index == 0 and pod_view.uid in self.steps_by_pod and pod_view.job_uid in self.jobs:
                step, start_step, checkpoints = self.steps_by_pod[pod_view.uid], self.start_steps_by_pod[pod_view.uid], self._list_checkpoints()
                seconds = (self.now - (pod_view.running_since or self.now)).total_seconds()
                received_report = report(attempt=pod_view.attempt, stage=Stage.TRAINING, resumedFromStep=start_step, health={}, timeUse={"steps": seconds})
                received_report = received_report.model_copy(
                    update={"progress": Progress(step=step, update_time=self.now), "checkpoints": checkpoints}
                )
                self.last_report = ReceivedReport(received_report, self.now, pod_view.uid)
                self.reported_checkpoints |= {(checkpoint.step, self.find_attempt_of(checkpoint)) for checkpoint in checkpoints}

    def _build_termination_message(self, pod_view: PodView) -> TerminationMessage:
        if pod_view.uid not in self.steps_by_pod:
            return TerminationMessage(code="Code", message="message")
        step, start_step = self.steps_by_pod[pod_view.uid], self.start_steps_by_pod[pod_view.uid]
        message = TerminationMessage(code="Code", message="message", step=step, resumed_from_step=start_step)
        return message.model_copy(update={"checkpoints": self._list_checkpoints()})

    def _list_checkpoints(self) -> list[Checkpoint]:
        uri = "s3://models/test/checkpoints/step-{step:08d}/a{attempt}-00000000"
        return [
            Checkpoint(step=step, uri=uri.format(step=step, attempt=self.attempt_of_step[step]), healthy=True) for step in sorted(self.attempt_of_step)
        ]

    @staticmethod
    def find_attempt_of(checkpoint: Checkpoint) -> int:
        """Return the attempt that committed a checkpoint."""
        return int(checkpoint.uri.rpartition("/a")[2].partition("-")[0])

    # Time

    def pass_time(self, seconds: int) -> None:
        """Advance the clock. The passed time counts as running time of the job if an attempt is admitted or still has running pods."""
        admitted_jobs = [job for job in self.list_owned_jobs() if not job.is_suspended and not job.is_finished]
        if admitted_jobs or not all(pod_view.is_finished for pod_view in self.pods.values()):
            self.running_seconds += seconds
        self.now += timedelta(seconds=seconds)
        self.evict_pods()


def compute_effective_batch(spec: FineTuneJobSpec) -> int:
    """Return the number of rows per optimizer step and rank."""
    training = spec.training
    return (training.batch_size_per_device or 1) * (training.gradient_accumulation_steps or 1)
