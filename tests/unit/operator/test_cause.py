"""The operator finds out why an attempt ended, from the attempt's pods and Job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.exits import FailurePrecedence, RetryPolicy
from finetune_api.names import FailureClass, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Failure, Stage
from finetune_operator.policies.cause import find_cause, find_pod_cause
from finetune_operator.policies.retry import FailureCause
from finetune_operator.views import PodView, TerminatedState

from tests.unit.operator.samples import T0, at, end_pod, job, parse_pod, pod


def build_message(code: str, **fields: Any) -> TerminationMessage:
    return TerminationMessage(code=code, message=f"{code} happened", **fields)


INITIALIZING_STATE = {"waiting": {"reason": "PodInitializing"}}


@pytest.mark.parametrize(
    ("code", "reason", "retry_policy"),
    [
        (64, Reason.USER_ERROR, RetryPolicy.NEVER), (65, Reason.DATA_ERROR, RetryPolicy.NEVER), (66, Reason.MODEL_ERROR, RetryPolicy.NEVER),
        (67, Reason.STORAGE_ERROR, RetryPolicy.NEVER), (69, Reason.STORAGE_ERROR, RetryPolicy.COUNTED),
        (70, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED), (71, Reason.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY),
        (72, Reason.DIVERGED, RetryPolicy.ROLL_BACK), (73, Reason.STORAGE_ERROR, RetryPolicy.COUNTED),
        (74, Reason.PEER_FAILED, RetryPolicy.COUNTED), (75, Reason.PREEMPTED, RetryPolicy.NOT_COUNTED), (76, Reason.PREEMPTED, RetryPolicy.NOT_COUNTED),
        (77, Reason.STORAGE_ERROR, RetryPolicy.NEVER), (78, Reason.INSTALLATION_BROKEN, RetryPolicy.NEVER),
        (79, Reason.TRAINER_TOO_OLD, RetryPolicy.WAIT), (80, Reason.GATE_FAILED, RetryPolicy.NEVER),
        (81, Reason.VERIFICATION_FAILED, RetryPolicy.NEVER), (1, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED),
        (137, Reason.INTERNAL_ERROR, RetryPolicy.COUNTED),
    ],
)  # fmt: skip
def test_exit_code_decides_reason_and_retry_policy(code: int, reason: Reason, retry_policy: RetryPolicy) -> None:
    cause = find_pod_cause(end_pod(pod(), code))
    assert cause is not None
    assert (cause.reason, cause.retry_policy, cause.failure.exit_code) == (reason, retry_policy, code)


@pytest.mark.parametrize(
    ("code", "reason", "retry_policy"),
    [
        (65, Reason.EVALUATION_FAILED, RetryPolicy.NEVER), (69, Reason.EVALUATION_FAILED, RetryPolicy.COUNTED),
        (71, Reason.EVALUATION_FAILED, RetryPolicy.COUNTED), (80, Reason.GATE_FAILED, RetryPolicy.NEVER),
    ],
)  # fmt: skip
def test_failed_stage_after_training_changes_no_value_of_the_training(code: int, reason: Reason, retry_policy: RetryPolicy) -> None:
    cause = find_pod_cause(end_pod(pod(), code, build_message("X", stage=Stage.EVALUATING)))
    assert cause is not None and (cause.reason, cause.retry_policy, cause.failure.exit_code) == (reason, retry_policy, code)


@pytest.mark.parametrize(
    ("termination_message", "known_values", "reason"),
    [
        (build_message("X", stage=Stage.BENCHMARKING), {}, Reason.BENCHMARK_FAILED),
        (build_message("X", stage=Stage.MERGING), {"is_model_committed": True, "stage": Stage.EVALUATING}, Reason.MERGE_FAILED),
        (None, {"is_model_committed": True, "stage": Stage.EVALUATING}, Reason.EVALUATION_FAILED),
        (None, {"is_model_committed": True}, Reason.OUT_OF_MEMORY),
    ],
)
def test_memory_limit_after_training_changes_no_value_of_the_training(
    termination_message: TerminationMessage | None, known_values: dict[str, Any], reason: Reason
) -> None:
    cause = find_cause(None, [end_pod(pod(), 137, termination_message, reason="OOMKilled")], **known_values)
    assert (cause.reason, cause.retry_policy, cause.failure.hint) == (reason, RetryPolicy.COUNTED, "raise resources.memory")


@pytest.mark.parametrize(("code", "reason"), [(69, Reason.COMPARISON_FAILED), (80, Reason.GATE_FAILED)])
def test_failed_comparison_has_its_own_reason(code: int, reason: Reason) -> None:
    cause = find_pod_cause(end_pod(pod(), code, build_message("X", stage=Stage.COMPARING)))
    assert cause is not None and cause.reason is reason


def test_class_in_the_termination_message_takes_precedence_over_the_exit_codes_class() -> None:
    cause = find_pod_cause(end_pod(pod(), 77, build_message("Gated", class_=FailureClass.MODEL, hint="ask for access")))
    assert cause is not None
    assert (cause.reason, cause.failure.class_, cause.failure.hint) == (
        Reason.MODEL_ERROR, FailureClass.MODEL, "ask for access",
    )  # fmt: skip


def test_running_or_succeeded_pod_is_not_a_cause() -> None:
    assert find_pod_cause(pod()) is None
    assert find_pod_cause(end_pod(pod(), 0)) is None


@pytest.mark.parametrize(
    ("disruption_reason", "code", "reason"),
    [
        ("PreemptionByScheduler", 143, Reason.PREEMPTED),
        ("EvictionByEvictionAPI", 75, Reason.PREEMPTED),
        ("DeletionByTaintManager", 137, Reason.NODE_LOST),
        ("DeletionByPodGC", None, Reason.NODE_LOST),
        ("TerminationByKubelet", None, Reason.PREEMPTED),
    ],
)
def test_disruption_does_not_count_as_a_retry(disruption_reason: str, code: int | None, reason: Reason) -> None:
    disrupted_pod = replace(pod(), disruption_reason=disruption_reason, phase="Failed")
    cause = find_pod_cause(end_pod(disrupted_pod, code) if code is not None else disrupted_pod)
    assert cause is not None
    assert (cause.reason, cause.retry_policy) == (reason, RetryPolicy.NOT_COUNTED)


def test_data_error_of_a_disrupted_pod_stays_a_data_error() -> None:
    cause = find_pod_cause(replace(end_pod(pod(), 65), disruption_reason="EvictionByEvictionAPI"))
    assert cause is not None
    assert cause.reason is Reason.DATA_ERROR


def test_pod_rejected_by_its_node_counts_as_a_retry() -> None:
    cause = find_pod_cause(replace(pod(), phase="Failed", reason="OutOfnvidia.com/gpu", message="no"))
    assert cause is not None
    assert (cause.retry_policy, cause.failure.code) == (RetryPolicy.COUNTED, "OutOfnvidia.com/gpu")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([74, 65], 65), ([71, 70], 71), ([75, 74], 74), ([75, 70, 74], 70), ([72, 65], 65), ([69, 72], 69),
    ],
)  # fmt: skip
def test_failure_with_the_lowest_precedence_is_the_cause(codes: list[int], expected: int) -> None:
    pods = [end_pod(pod(index=n), code, build_message("X")) for n, code in enumerate(codes)]
    assert find_cause(None, pods).failure.exit_code == expected


def test_disruption_is_the_cause_of_peer_failures() -> None:
    pods = [end_pod(pod(index=0), 74), replace(end_pod(pod(index=1), 137), disruption_reason="DeletionByTaintManager")]
    assert find_cause(None, pods).reason is Reason.NODE_LOST


def test_last_log_line_replaces_a_missing_termination_message_without_secrets() -> None:
    text = "Traceback\nAWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENG failed\n"
    cause = find_pod_cause(end_pod(pod(), 1, message=text))
    assert cause is not None
    assert cause.failure.message == "AWS_SECRET_ACCESS_KEY=[redacted] failed"


def test_exit_code_of_an_injected_container_is_ignored() -> None:
    failed_pod = parse_pod("Failed", {"terminated": {"exitCode": 65}}, injected={"terminated": {"exitCode": 0}})
    assert failed_pod.image_id == "trainer"
    cause = find_pod_cause(failed_pod)
    assert cause is not None
    assert (cause.failure.exit_code, cause.retry_policy) == (65, RetryPolicy.NEVER)


def test_failure_names_the_failed_init_container() -> None:
    failed_state = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no route to the vault"}}
    cause = find_cause(None, [parse_pod("Failed", INITIALIZING_STATE, init=failed_state)])
    assert (cause.failure.code, cause.retry_policy) == ("InitContainerFailed", RetryPolicy.COUNTED)
    assert cause.failure.message == "init container setup ended with exit code 3: no route to the vault"


@pytest.mark.parametrize("code", [75, 76, 137, 143])
def test_pod_evicted_because_of_its_own_disk_usage_counts_as_a_retry(code: int) -> None:
    kubelet_message = "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi."
    evicted_pod = replace(end_pod(pod(), code), reason="Evicted", message=kubelet_message)
    cause = find_pod_cause(evicted_pod)
    assert cause is not None
    assert (cause.failure.class_, cause.failure.code, cause.failure.message) == (
        FailureClass.INFRASTRUCTURE,
        "Evicted",
        kubelet_message,
    )
    assert cause.retry_policy is RetryPolicy.COUNTED
    assert "resources.ephemeralStorage" in (cause.failure.hint or "")
    cause_with_disruption = find_pod_cause(replace(evicted_pod, disruption_reason="TerminationByKubelet"))
    assert cause_with_disruption is not None
    assert cause_with_disruption.retry_policy is RetryPolicy.NOT_COUNTED


def build_failed_pod(seconds: float | None, index: int = 0, **fields: Any) -> PodView:
    """Return a pod that failed with exit code 70. `fields` are the fields of its termination message; if there are none, the pod has no termination message."""
    message_text = TerminationMessage(code="E", message="m", **fields).to_json() if fields else ""
    finished_at = None if seconds is None else at(seconds)
    return replace(pod(index=index), phase="Failed", terminated=TerminatedState(70, "", message_text, finished_at), node=f"n{index}")


T0_NS = int(T0.timestamp()) * 10**9


@pytest.mark.parametrize(
    "pods",
    [
        [build_failed_pod(1, 1), build_failed_pod(2, 0)],
        [build_failed_pod(1.5, 1), build_failed_pod(1.75, 0)],
        [build_failed_pod(9, 1), build_failed_pod(None, 0)],
        [build_failed_pod(1, 1), build_failed_pod(1, 2)],
        [build_failed_pod(None, 1), build_failed_pod(None, 2)],
        [build_failed_pod(9, 1, time_ns=T0_NS + 1), build_failed_pod(9, 0, time_ns=T0_NS + 2)],
        [build_failed_pod(9, 1, time_ns=T0_NS + 10**9), build_failed_pod(1.5, 0)],
        [build_failed_pod(0.5, 1), build_failed_pod(None, 0, time_ns=T0_NS + 10**9)],
        [build_failed_pod(1, 1, time_ns=0), build_failed_pod(2, 0, time_ns=0)],
        [build_failed_pod(2, 1, origin=True), build_failed_pod(1, 0, origin=False)],
        [build_failed_pod(2, 1, rank=1), build_failed_pod(1, 0, origin=False)],
        [build_failed_pod(1, 1, origin=True), build_failed_pod(2, 0, rank=1)],
    ],
    ids=[
        "earlier end", "earlier by milliseconds", "known end", "lower index", "lower index without a time", "earlier reported time",
        "reported time before the other end", "end before the other reported time", "no reported time", "own failure",
        "failure of unknown origin", "own failure is not preferred to one of unknown origin",
    ],
)  # fmt: skip
def test_earliest_own_failure_is_the_cause_if_precedences_are_equal(pods: list[PodView]) -> None:
    for order in (pods, pods[::-1]):
        assert find_cause(None, order).failure.node == "n1"


EVICTED_POD = replace(pod(), phase="Failed", reason="".join(["Evic", "ted"]))  # a new string object, as if read from a response


@pytest.mark.parametrize(
    ("failed_pod", "reason", "retry_policy", "precedence", "failure"),
    [
        (
            end_pod(pod(), 137, reason="OOMKilled"),
            Reason.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY, FailurePrecedence.NUMERIC_FAILURE,
            (FailureClass.OUT_OF_MEMORY, "OOMKilled", "the kernel killed the trainer: the pod's memory limit was reached",
             "raise resources.memory, or lower training.batchSizePerDevice", 137),
        ),
        (
            EVICTED_POD, Reason.PREEMPTED, RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.INFRASTRUCTURE, "Evicted", "the node evicted the pod",
             "raise resources.ephemeralStorage, or resources.sharedMemory if the message names a volume", None),
        ),
        (
            replace(end_pod(pod(), 70), reason="Evicted"), Reason.PREEMPTED, RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.INFRASTRUCTURE, "Evicted", "the node evicted the pod",
             "raise resources.ephemeralStorage, or resources.sharedMemory if the message names a volume", 70),
        ),
        (
            replace(end_pod(pod(), 71), reason="Evicted"), Reason.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY, FailurePrecedence.NUMERIC_FAILURE,
            (FailureClass.OUT_OF_MEMORY, "GpuOutOfMemory", "exit code 71",
             "lower training.batchSizePerDevice or dataset.maxSequenceLength, or use method qlora", 71),
        ),
        (
            replace(pod(), phase="Failed", disruption_reason="DeletionByPodGC"),
            Reason.NODE_LOST, RetryPolicy.NOT_COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.PREEMPTED, "DeletionByPodGC", "the node is lost", None, None),
        ),
        (
            replace(end_pod(pod(), 74), disruption_reason="PreemptionByScheduler"),
            Reason.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.PREEMPTED, "PreemptionByScheduler", "the cluster removed the pod", None, 74),
        ),
        (
            replace(pod(), phase="Failed", disruption_reason="PreemptionByScheduler", disruption_message="a higher priority"),
            Reason.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.PREEMPTED, "PreemptionByScheduler", "a higher priority", None, None),
        ),
        (
            replace(end_pod(pod(), 70), disruption_reason="PreemptionByScheduler"),
            Reason.INTERNAL_ERROR, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE,
            (FailureClass.INTERNAL, "Unclassified", "exit code 70", "see the log of the pod", 70),
        ),
        (
            replace(end_pod(pod(), 143), deletion_timestamp=T0),
            Reason.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST,
            (FailureClass.PREEMPTED, "PreemptedNotSaved", "the pod was deleted, and the trainer was killed before it had saved a checkpoint",
             None, 143),
        ),
        (
            replace(end_pod(pod(), 139), deletion_timestamp=T0),
            Reason.INTERNAL_ERROR, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE,
            (FailureClass.INTERNAL, "ExitCode139", "the trainer ended with exit code 139", None, 139),
        ),
        (
            end_pod(pod(), 1, build_message("Bad", class_=FailureClass.DATA)),
            Reason.DATA_ERROR, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE, (FailureClass.DATA, "Bad", "Bad happened", None, 1),
        ),
        (
            replace(pod(), phase="Failed"), Reason.PEER_FAILED, RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER,
            (FailureClass.INFRASTRUCTURE, "PodRejected", "the node rejected the pod", None, None),
        ),
        (
            replace(pod(), is_deleted=True), Reason.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST,
            (FailureClass.PREEMPTED, "PodDeleted", "the pod was deleted", None, None),
        ),
    ],
)  # fmt: skip
def test_each_way_in_which_a_pod_ends_has_its_cause(
    failed_pod: PodView, reason: Reason, retry_policy: RetryPolicy, precedence: FailurePrecedence,
    failure: tuple[FailureClass, str, str, str | None, int | None],
) -> None:  # fmt: skip
    failure_class, code, text, hint, exit_code = failure
    expected = Failure(class_=failure_class, code=code, message=text, hint=hint, node="node-1", exit_code=exit_code)
    assert find_pod_cause(failed_pod) == FailureCause(reason, expected, retry_policy, precedence)


def test_deleted_pod_that_succeeded_before_did_not_fail() -> None:
    assert find_pod_cause(replace(pod(), phase="Succeeded", is_deleted=True)) is None
    assert find_pod_cause(replace(end_pod(pod(), 0), phase="Failed", is_deleted=True)) is None


@pytest.mark.parametrize("rank", [0, 3, None])
def test_failure_names_the_reported_rank_and_step(rank: int | None) -> None:
    cause = find_pod_cause(replace(end_pod(pod(), 70, build_message("E", rank=rank, step=7, hint="h")), node=""))
    assert cause is not None
    assert cause.failure == Failure(
        class_=FailureClass.INTERNAL, code="E", message="E happened", hint="h", rank=rank, step=7, exit_code=70
    )


@pytest.mark.parametrize(
    ("log", "last_line"),
    [("a\nb\n \n\n", "b"), ("one line", "one line"), ("", "exit code 70"), (" \n", "exit code 70"), ('{"cut', "exit code 70")],
)
def test_last_nonempty_line_of_the_log_is_shown(log: str, last_line: str) -> None:
    cause = find_pod_cause(end_pod(pod(), 70, message=log))
    assert cause is not None
    assert cause.failure.message == last_line


def test_job_without_a_failed_pod_or_a_reason_lost_its_pods() -> None:
    lost_pods_failure = Failure(
        class_=FailureClass.INFRASTRUCTURE, code="PodsLost", message="the pods were deleted before the operator read their exit codes"
    )
    expected = FailureCause(Reason.PEER_FAILED, lost_pods_failure, RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER)
    assert find_cause(None, [pod(), end_pod(pod(), 0)]) == find_cause(job(failed_at=T0), []) == expected
    failed_job = job(failed_at=T0, failed_reason="DeadlineExceeded", failed_message="too long")
    assert find_cause(failed_job, []).failure == lost_pods_failure.model_copy(update={"code": "DeadlineExceeded", "message": "too long"})
