"""Every exit code of the trainer has a policy and an error class, and errors can be sent between processes."""

from __future__ import annotations

from finetune_api import names
from finetune_api.errors import ERROR_OF_EXIT_CODE, DataError
from finetune_api.exits import EXIT_POLICIES, REASON_OF_FAILURE_CLASS


def test_every_failure_exit_code_has_a_policy_and_every_failure_class_has_a_reason() -> None:
    without_policy = {names.ExitCode.OK, names.ExitCode.SIGKILL, names.ExitCode.SIGTERM}
    assert set(EXIT_POLICIES) == set(names.ExitCode) - without_policy
    assert set(REASON_OF_FAILURE_CLASS) == set(names.FailureClass)


def test_every_failure_exit_code_has_an_error_class_except_those_of_requested_stops() -> None:
    codes = set(ERROR_OF_EXIT_CODE)
    codes_of_requested_stops = {names.ExitCode.PREEMPTED_SAVED, names.ExitCode.PREEMPTED_UNSAVED}
    assert codes == set(EXIT_POLICIES) - codes_of_requested_stops


def test_errors_can_be_pickled() -> None:
    import pickle

    error = DataError("DatasetEmpty", "no rows", hint="add rows")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.code, copy.hint, copy.failure_class, copy.exit_code) == (
        DataError,
        "DatasetEmpty",
        "add rows",
        "Data",
        65,
    )
