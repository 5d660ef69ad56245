"""Retry policies, reasons and hints of the trainer's exit codes."""

from __future__ import annotations

from finetune_api.exits import EXIT_POLICIES, RetryPolicy, choose_attempt_reason, list_exit_codes_that_fail_the_job
from finetune_api.names import ExitCode, FailureClass, Reason


def test_the_job_fails_at_once_only_for_exit_codes_that_another_pod_would_repeat() -> None:
    assert list_exit_codes_that_fail_the_job() == [64, 65, 66, 67, 72, 77, 78, 79, 80, 81]


def test_exit_codes_of_a_requested_stop_do_not_fail_the_job() -> None:
    assert not EXIT_POLICIES[ExitCode.PREEMPTED_SAVED].fails_job
    assert not EXIT_POLICIES[ExitCode.PREEMPTED_UNSAVED].fails_job


def test_a_too_old_trainer_is_retried_without_limit_but_a_broken_installation_ends_the_job() -> None:
    assert EXIT_POLICIES[ExitCode.TRAINER_TOO_OLD].retry_policy is RetryPolicy.WAIT
    assert EXIT_POLICIES[ExitCode.INSTALLATION_BROKEN].retry_policy is RetryPolicy.NEVER


def test_the_failure_class_of_the_termination_message_decides_the_reason() -> None:
    policy = EXIT_POLICIES[ExitCode.SOURCE_NOT_FOUND]
    assert choose_attempt_reason(policy, FailureClass.MODEL) is Reason.MODEL_ERROR
    assert choose_attempt_reason(policy, FailureClass.DATA) is Reason.DATA_ERROR


def test_every_exit_policy_has_a_hint_and_a_unique_failure_code() -> None:
    failure_codes = [policy.default_failure_code for policy in EXIT_POLICIES.values()]
    assert len(set(failure_codes)) == len(failure_codes)
    assert all(policy.default_failure_code and policy.default_hint for policy in EXIT_POLICIES.values())
