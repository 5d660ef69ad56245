"""The exit policy table."""

from __future__ import annotations

from finetune_api.exits import EXIT_POLICIES, RetryPolicy, attempt_reason, codes_that_fail_the_job
from finetune_api.names import ExitCode, FailureClass, Reason


def test_the_job_fails_at_once_for_codes_that_no_unchanged_pod_can_survive() -> None:
    assert codes_that_fail_the_job() == [64, 65, 66, 67, 72, 77, 78, 79, 80]


def test_stops_on_request_leave_a_suspended_job_alive() -> None:
    assert not EXIT_POLICIES[ExitCode.PREEMPTED_SAVED].fails_job
    assert not EXIT_POLICIES[ExitCode.PREEMPTED_UNSAVED].fails_job


def test_version_skew_waits_and_a_broken_installation_is_final() -> None:
    assert EXIT_POLICIES[ExitCode.TOO_OLD].retry is RetryPolicy.WAIT
    assert EXIT_POLICIES[ExitCode.INSTALLATION_BROKEN].retry is RetryPolicy.NEVER


def test_a_finer_class_in_the_termination_message_changes_the_reason() -> None:
    policy = EXIT_POLICIES[ExitCode.NOT_FOUND]
    assert attempt_reason(policy, FailureClass.MODEL) is Reason.MODEL_ERROR
    assert attempt_reason(policy, FailureClass.DATA) is Reason.DATA_ERROR


def test_every_row_has_a_word_and_a_hint_and_no_word_twice() -> None:
    words = [policy.word for policy in EXIT_POLICIES.values()]
    assert len(set(words)) == len(words)
    assert all(policy.word and policy.hint for policy in EXIT_POLICIES.values())
