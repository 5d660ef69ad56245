"""Prometheus metrics of the operator. Labels contain verbs, kinds, reasons and phases, but no job names, so the number of series is bounded."""

from __future__ import annotations

from finetune_api.names import Phase
from finetune_api.status import Goodput, ResolvedConfig
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SHORT_DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_DURATION_BUCKETS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200)
PREFIX = "finetune_operator"


class Metrics:
    """All metrics of one operator process. Each instance has its own registry, so that tests can create several instances."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.api_requests = Counter(
            f"{PREFIX}_api_requests_total",
            "Requests to the API server, including watches. Code 0 means no answer.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.api_seconds = Histogram(
            f"{PREFIX}_api_request_seconds",
            "Duration of requests to the API server.",
            ["verb"],
            buckets=SHORT_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            f"{PREFIX}_reconcile_seconds",
            "Duration of one reconciliation of a job.",
            ["result"],
            buckets=SHORT_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            f"{PREFIX}_queue_wait_seconds",
            "Time that a job waited for a worker.",
            buckets=SHORT_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(f"{PREFIX}_queue_depth", "Jobs that wait for a worker.", registry=self.registry)
        self.jobs = Gauge(f"{PREFIX}_jobs", "FineTuneJobs by phase.", ["phase"], registry=self.registry)
        self.attempts_ended = Counter(
            f"{PREFIX}_attempts_ended_total", "Ended attempts by reason.", ["reason"], registry=self.registry
        )
        self.jobs_finished = Counter(
            f"{PREFIX}_jobs_finished_total",
            "Finished FineTuneJobs by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED):
            # Prometheus' increase() ignores the first value of a series. So each series starts with 0, and the first job of each outcome is counted.
            self.jobs_finished.labels(outcome.value)
        self.time_to_running = Histogram(
            f"{PREFIX}_time_to_running_seconds",
            "Time from the creation of a job to its first step.",
            buckets=LONG_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.quota_wait = Histogram(
            f"{PREFIX}_quota_wait_seconds",
            "Time that an attempt waited for quota in a queue.",
            buckets=LONG_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.steps_done = Counter(
            f"{PREFIX}_steps_total",
            "Optimizer steps of ended attempts, including repeated steps.",
            registry=self.registry,
        )
        self.steps_lost = Counter(
            f"{PREFIX}_steps_lost_total",
            "Optimizer steps that had to be repeated. Goodput is 1 - steps_lost_total / steps_total.",
            registry=self.registry,
        )
        self.attempt_seconds = Counter(
            f"{PREFIX}_attempt_seconds_total",
            "Seconds of ended attempts by part, as in status.goodput. The part steps includes lostSteps, because lost steps are only known later.",
            ["part"],
            registry=self.registry,
        )
        self.model_fetches = Counter(
            f"{PREFIX}_model_fetches_total",
            "Ended attempts with a cache of models, by the source of the base model: cache or download.",
            ["source"],
            registry=self.registry,
        )
        self.model_bytes_saved = Counter(
            f"{PREFIX}_model_bytes_saved_total",
            "Bytes of base models that ended attempts did not download, because the cache had them. Counts the pod of rank 0.",
            registry=self.registry,
        )
        self.loop_lag = Gauge(f"{PREFIX}_event_loop_lag_seconds", "Delay of the event loop.", registry=self.registry)
        self.leader = Gauge(f"{PREFIX}_leader", "1 while this replica is the leader.", registry=self.registry)

    def record_request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """Count one request to the API server."""
        self.api_requests.labels(verb, resource, str(code)).inc()
        self.api_seconds.labels(verb).observe(seconds)

    def record_attempt_time(self, old_goodput: Goodput | None, new_goodput: Goodput | None, ended_attempt_number: int | None) -> None:
        """Count each part of an ended attempt's time. Also count the additional `lostSteps` seconds of earlier attempts."""
        old_attempts = old_goodput.attempts if old_goodput else []
        lost_seconds_by_attempt = {attempt_goodput.number: attempt_goodput.parts.get("lostSteps", 0.0) for attempt_goodput in old_attempts}
        for attempt_goodput in new_goodput.attempts if new_goodput else []:
            if attempt_goodput.number == ended_attempt_number:
                for part, seconds in attempt_goodput.parts.items():
                    self.attempt_seconds.labels(part).inc(seconds)
            elif attempt_goodput.number in lost_seconds_by_attempt:
                additional_seconds = attempt_goodput.parts.get("lostSteps", 0.0) - lost_seconds_by_attempt[attempt_goodput.number]
                self.attempt_seconds.labels("lostSteps").inc(max(0.0, additional_seconds))

    def record_model_fetch(self, resolved_config: ResolvedConfig) -> None:
        """Count whether an ended attempt got its base model from the cache or by a download."""
        if resolved_config.model_source is not None:
            self.model_fetches.labels(resolved_config.model_source.value).inc()
            self.model_bytes_saved.inc(resolved_config.model_bytes_saved or 0)

    def set_phase_counts(self, job_counts: dict[str, int]) -> None:
        """Set the number of jobs in each phase."""
        for phase in Phase:
            self.jobs.labels(phase.value).set(job_counts.get(phase.value, 0))
