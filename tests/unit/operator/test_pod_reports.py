"""The operator limits and cleans the values in a pod's report. It drops each impossible value and keeps all other values."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.names import ExitCode, FailureClass
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_operator.pod_reports import MAX_NUMBER, read_progress_report, read_termination_message
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.samples import UID, at, report

NOW = at(0)
GOOD_REPORT: dict[str, Any] = {
    "uid": UID, "attempt": 1, "stage": "training", "detail": "step 3",
    "progress": {"step": 3, "totalSteps": 9, "secondsRemaining": 60, "updateTime": "2026-11-21T12:00:00Z"},
    "metrics": {"trainLoss": -0.5, "gradNorm": 1.5},
    "health": {"secondsSinceStep": 1.0, "medianStepSeconds": 0.5},
    "checkpoints": [{"step": 2, "uri": "s3://b/2", "time": "2026-11-21T11:59:00Z"}], "latestCheckpoint": "s3://b/2",
    "resolved": {"strategy": "ddp"},
}  # fmt: skip


def read_report(value: Any) -> ProgressReport | None:
    return read_progress_report(json.dumps(value).encode(), NOW)


def change_report(path: str, value: Any) -> dict[str, Any]:
    """Return a copy of GOOD_REPORT that has `value` at this dotted path."""
    changed_report = json.loads(json.dumps(GOOD_REPORT))
    *parents, name = [int(part) if part.isdigit() else part for part in path.split(".")]
    parent = changed_report
    for part in parents:
        parent = parent[part]
    parent[name] = value
    return changed_report


def get_value_at_path(parsed_report: ProgressReport, path: str) -> Any:
    value: Any = parsed_report.to_wire()
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value.get(part)
    return value


def test_good_report_is_unchanged() -> None:
    assert read_report(GOOD_REPORT) == ProgressReport.model_validate(GOOD_REPORT)


@pytest.mark.parametrize(
    ("path", "value", "kept_value"),
    [
        ("progress.step", 2**63, None),
        ("progress.step", 10**400, None),
        ("progress.step", 1e300, None),
        ("progress.step", -1, None),
        ("progress.step", "9223372036854775808", None),
        ("progress.step", "seven", None),
        ("metrics.trainLoss", "-Infinity", None),
        ("progress.step", MAX_NUMBER, MAX_NUMBER),
        ("progress.step", MAX_NUMBER + 1, None),
        ("progress.secondsRemaining", 10**12, None),
        ("progress.updateTime", "0001-01-01T00:00:00Z", None),
        ("progress.updateTime", "9999-12-31T23:59:59Z", None),
        ("progress.updateTime", "2026-11-22T11:59:59Z", "2026-11-22T11:59:59Z"),
        ("progress.updateTime", "2026-11-22T12:00:01Z", None),
        ("progress.updateTime", "2026-11-21T14:00:00+02:00", "2026-11-21T12:00:00Z"),
        ("progress.updateTime", "2026-11-21T12:00:00", "2026-11-21T12:00:00Z"),
        ("progress.updateTime", "0001-01-01T00:00:00+14:00", None),
        ("progress.updateTime", 5, None),
        ("progress.updateTime", "soon", None),
        ("metrics.trainLoss", float("nan"), None),
        ("metrics.trainLoss", float("-inf"), None),
        ("metrics.trainLoss", -2.5, -2.5),
        ("metrics.gradNorm", -2.5, None),
        ("health.medianStepSeconds", 1e300, None),
        ("health.secondsSinceStep", -5.0, None),
        ("detail", "a\x1b[31mred\x00\u202eb", "a [31mred  b"),
        ("detail", "x" * 5000, "x" * 252 + " ..."),
        ("detail", 7, None),
        ("latestCheckpoint", "s3://b/\x1b]0;x", None),
        ("latestCheckpoint", "s3://b/" + "x" * 2000, None),
        ("checkpoints.0.time", "0001-01-01T00:00:00Z", None),
        ("resolved.defaults", {"training.learningRate": 9}, None),
        ("resolved.defaults", {"dataset.maxSequenceLength": 512, "dataset.useChatTemplate": False, "dataset.numProc": -1, "storage.uri": "s3://x"},
         {"dataset.maxSequenceLength": 512, "dataset.useChatTemplate": False}),
        ("resolved.defaults", {"dataset.maxSequenceLength": "512", "dataset.numProc": True}, None),
        ("resolved.defaults", [1], None),
        ("resolved.strategy", "d\x07dp", "d dp"),
        ("resolved.notes", ["a"] * 5000, ["a"] * 100),
        ("resolved.storage", {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, {"a": {"b": {"c": {}}}}),
        ("resolved.storage", {"rate": float("inf"), "ok": True}, {"ok": True}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_value_out_of_bounds_is_dropped_or_cleaned(path: str, value: Any, kept_value: Any) -> None:
    parsed_report = read_report(change_report(path, value))
    assert parsed_report is not None
    assert get_value_at_path(parsed_report, path) == kept_value
    assert parsed_report.attempt == 1 and parsed_report.uid == UID
    missing_paths = [other_path for other_path in ("progress.totalSteps", "health.healthy") if get_value_at_path(parsed_report, other_path) is None]
    assert missing_paths == []


@pytest.mark.parametrize("key", ["\x00updateTime", "updateTime ", "update_time", "\u202eupdate_time"], ids=ascii)
def test_time_is_bounded_in_camel_case_and_snake_case_fields(key: str) -> None:
    """The API server would reject a status with a time in the year 1, so the operator drops such times."""
    parsed_report = read_report(GOOD_REPORT | {"progress": {"step": 3, key: "0001-01-01T00:00:00Z"}})
    assert parsed_report is not None
    assert (parsed_report.progress.step, parsed_report.progress.update_time) == (3, None)


@pytest.mark.parametrize("key", ["specSha256", "\x00specSha256", "spec_sha256", "spec_sha256\x1b"], ids=ascii)
@pytest.mark.parametrize("group", ["resolved", "\x07resolved"], ids=ascii)
def test_fields_of_the_operator_are_dropped_in_camel_case_and_snake_case(group: str, key: str) -> None:
    """A wrong hash of the spec in the status would block the next attempt forever with reason SpecChanged."""
    report_without_resolved = {name: value for name, value in GOOD_REPORT.items() if name != "resolved"}
    parsed_report = read_report(report_without_resolved | {group: {"strategy": "ddp", key: "0" * 64}})
    assert parsed_report is not None
    assert (parsed_report.resolved.strategy, parsed_report.resolved.spec_sha256) == ("ddp", None)


@pytest.mark.parametrize(
    "checkpoint",
    [{"step": 2**63, "uri": "s3://b/x"}, {"step": -1, "uri": "s3://b/x"}, {"step": 4, "uri": "s3://b/\x1b"}, {"uri": "s3://b/x"}, "x"],
    ids=["step too large", "negative step", "control character", "no step", "no object"],
)
def test_checkpoint_without_a_usable_step_and_uri_is_dropped(checkpoint: Any) -> None:
    parsed_report = read_report(GOOD_REPORT | {"checkpoints": [checkpoint, *GOOD_REPORT["checkpoints"], checkpoint]})
    assert parsed_report is not None
    assert [(checkpoint.step, checkpoint.uri) for checkpoint in parsed_report.checkpoints] == [(2, "s3://b/2")]


def test_only_the_newest_of_many_checkpoints_are_kept() -> None:
    parsed_report = read_report(GOOD_REPORT | {"checkpoints": [{"step": step, "uri": f"s3://b/{step}"} for step in range(500)]})
    assert parsed_report is not None
    assert [checkpoint.step for checkpoint in parsed_report.checkpoints] == list(range(400, 500))


def test_unknown_stage_does_not_discard_the_report() -> None:
    parsed_report = read_report(change_report("stage", "distilling"))
    assert parsed_report is not None
    assert (parsed_report.stage, parsed_report.progress.step) == ("starting", 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"7", b"[" * 60_000, b'{"a":' * 10_000, b'{"uid": "\xff"}', json.dumps({"uid": UID}).encode()],
    ids=["empty", "list", "cut", "number", "deep list", "deep object", "not UTF-8", "without attempt"],
)
def test_bytes_that_are_not_a_report_are_ignored(data: bytes) -> None:
    assert read_progress_report(data, NOW) is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "uri", "time", "x"]), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*GOOD_REPORT, "timings", "resumedFromStep"]), JSON_VALUES))
def test_any_json_is_read_without_an_error(changes: dict[str, Any]) -> None:
    parsed_report = read_report({**GOOD_REPORT, **changes, "uid": UID, "attempt": 1})
    assert parsed_report is not None
    assert json.dumps(parsed_report.to_wire(), allow_nan=False)


# Termination messages


def test_termination_message_is_read_with_its_nanoseconds() -> None:
    message = TerminationMessage(
        class_=FailureClass.DATA, code="RowMalformed", message="row 17", exit_code=int(ExitCode.DATA_INVALID), time_ns=1_763_726_400_000_000_001
    )
    assert read_termination_message(message.to_json()) == message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"step": 2**63, "message": "m"}, TerminationMessage(message="m")),
        ({"class": "Cosmic", "code": "X"}, TerminationMessage(code="X")),
        ({"message": "\x1b[2Jgone", "hint": "token=hf_abcdefghijklmnopqrst"}, TerminationMessage(message="[2Jgone", hint="token=[redacted]")),
        ({"code": "c" * 100}, TerminationMessage(code="c" * 60 + " ...")),
        ({"timeNs": 2**64, "rank": -1}, TerminationMessage()),
        ({"output": {"uri": "s3://b/m", "kind": "sculpture", "evaluation": {"testReward": -1.5, "x": float("nan")}}},
         TerminationMessage.model_validate({"output": {"uri": "s3://b/m", "evaluation": {"testReward": -1.5}}})),
    ],
    ids=["step", "unknown class", "escape sequence and secret", "long code", "nanoseconds and rank", "output"],
)  # fmt: skip
def test_termination_message_is_bounded_and_cleaned(value: dict[str, Any], expected: TerminationMessage) -> None:
    assert read_termination_message(json.dumps(value)) == expected


@pytest.mark.parametrize("text", ["", "Killed", "[1]", "[" * 4096, "{" * 4096])
def test_text_in_another_format_is_not_a_termination_message(text: str) -> None:
    assert read_termination_message(text) is None


def test_times_of_a_report_are_converted_to_utc() -> None:
    assert report(progress={"updateTime": "2026-11-21T12:00:00Z"}).progress.update_time == datetime(2026, 11, 21, 12, tzinfo=UTC)
