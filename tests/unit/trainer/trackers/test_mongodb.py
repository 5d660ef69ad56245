"""Errors of MongoDB name their cause. `tests/faults/trackers` tests the documents with a server."""

from __future__ import annotations

import pytest
from finetune_trainer.trackers.mongodb import Mongodb
from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure, ServerSelectionTimeoutError

from tests.support.tracking import tracked_run


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (OperationFailure("k3y", 18), "TrackerCredentialsRejected", "mongodb at mongodb://host:27017 does not accept the credentials"),
        (OperationFailure("k3y", 13), "TrackerCredentialsRejected", "check the user and password in the Secret"),
        (OperationFailure("k3y", 26), "TrackerFailed", "the error code 26"),
        (InvalidURI("k3y"), "TrackerFailed", "does not contain a valid connection URI"),
        (ConfigurationError("k3y"), "TrackerFailed", "does not contain a valid connection URI"),
        (ServerSelectionTimeoutError("k3y: Name or service not known"), "TrackerUnavailable", "its name cannot be resolved"),
    ],
)
def test_errors_name_the_cause_and_no_secret(error: Exception, reason: str, text: str) -> None:
    explanation = Mongodb(tracked_run(), "mongodb://user:k3y@host:27017/?authSource=k3y", None).explain(error)
    assert explanation.reason == reason and text in explanation.message and "k3y" not in explanation.message
