"""Parses progress reports and termination messages of pods. All values are limited and cleaned before the operator uses them.

User code may run in the pod, so a report can contain any value. Impossible values, and values that the API server would not store, are
dropped. Otherwise a single bad number would make the API server reject every status write. Without status writes, `spec.suspend`, `spec.cancel`
and the deadline would have no effect.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from finetune_api.defaults import keep_valid_late_defaults
from finetune_api.pod import ProgressReport, TerminationMessage
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from finetune_operator.text import clean

MAX_NUMBER = 2**53 - 1
"""Largest integer that every JSON parser reads exactly. Real counts of steps, bytes and tokens are far smaller."""
MAX_NANOSECONDS = 2**63 - 1
MAX_SECONDS = 1e9
"""Longest accepted duration, about 30 years. With a longer duration, a computed time could be later than the latest date that Python can represent."""
MAX_TEXT_CHARACTERS, MAX_URI_CHARACTERS = 1024, 1024
MAX_CHARACTERS_BY_FIELD = {"code": 64, "detail": 256}
"""Maximum length in characters, for fields that are shown in one line."""
MAX_ITEMS = 100
"""Maximum number of items in a list or object. Of a longer list, only the last items are kept, because the newest checkpoints are last."""
MAX_DEPTH = 6
EARLIEST_TIME, LATEST_TIME = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
MAX_CLOCK_SKEW = timedelta(days=1)
"""A time in a report is accepted if it is at most this much later than the operator's clock, because the node's clock can be ahead."""
TIME_FIELDS = frozenset({"time", "updateTime"})
SIGNED_FIELDS = frozenset({"trainLoss", "evalLoss", "bestEvalLoss", "evaluation"})
"""Fields whose numbers may be negative. In all other fields, negative numbers are dropped."""
OPERATOR_FIELDS = frozenset({"method", "modelName", "image", "imageDigest", "nodePool", "specSha256"})
"""Fields of `resolved` that only the operator fills in."""

Model = TypeVar("Model", bound=BaseModel)


def read_progress_report(raw_report: bytes, now: datetime) -> ProgressReport | None:
    """Parse, limit and clean a pod's progress report. Return None if `raw_report` is not a report."""
    return _parse_model(ProgressReport, raw_report, now + MAX_CLOCK_SKEW)


@lru_cache(maxsize=256)
def read_termination_message(text: str) -> TerminationMessage | None:
    """Parse, limit and clean the trainer's termination message. Return None if `text` has another format. Results are cached."""
    return _parse_model(TerminationMessage, text.encode(errors="replace"), LATEST_TIME)


def _parse_model(model: type[Model], raw_json: bytes, latest_time: datetime) -> Model | None:
    try:
        report_fields = from_json(raw_json)
    except ValueError:
        return None
    if not isinstance(report_fields, dict):
        return None
    bounded_fields = _limit_value(report_fields, latest_time)
    resolved_fields = bounded_fields.get("resolved")
    if isinstance(resolved_fields, dict):
        kept_fields = {name: field_value for name, field_value in resolved_fields.items() if to_camel(name) not in OPERATOR_FIELDS}
        late_defaults = keep_valid_late_defaults(kept_fields.pop("defaults", None))
        bounded_fields["resolved"] = kept_fields | ({"defaults": late_defaults} if late_defaults else {})
    try:
        return model.model_validate(bounded_fields)
    except ValidationError:
        return None


def _limit_value(value: Any, latest_time: datetime, name: str = "", depth: int = 0, may_be_negative: bool = False) -> Any:
    """Return the value without numbers, texts and times that are out of bounds, or None if nothing is left. `name`: field that contains the value."""
    may_be_negative = may_be_negative or name in SIGNED_FIELDS
    if name in TIME_FIELDS:
        return _limit_time(value, latest_time) if isinstance(value, str) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if _is_plausible(value, name, may_be_negative) else None
    if isinstance(value, str):
        return _limit_text(value, name, may_be_negative)
    if depth >= MAX_DEPTH:
        return None
    if isinstance(value, list):
        items = [_limit_value(item, latest_time, name, depth + 1, may_be_negative) for item in value[-MAX_ITEMS:]]
        return [item for item in items if item is not None]
    fields = [(clean(key, 128), field_value) for key, field_value in list(value.items())[:MAX_ITEMS]]
    # The models accept both `updateTime` and `update_time`, so the bounds are chosen by the camelCase name.
    bounded_fields = {key: _limit_value(field_value, latest_time, to_camel(key), depth + 1, may_be_negative) for key, field_value in fields}
    return {key: field_value for key, field_value in bounded_fields.items() if field_value is not None}


def _is_plausible(value: int | float, name: str, may_be_negative: bool) -> bool:
    if name == "timeNs":
        return 0 <= value <= MAX_NANOSECONDS
    is_duration = name.startswith("seconds") or name.endswith("Seconds")
    largest_number = MAX_SECONDS if is_duration else MAX_NUMBER
    return (-largest_number if may_be_negative else 0) <= value <= largest_number  # false for NaN


def _limit_text(value: str, name: str, may_be_negative: bool) -> str | None:
    try:
        # Pydantic converts a text such as "1e400" to a number, so a text that is a number must be within the bounds for numbers.
        if not _is_plausible(float(value), name, may_be_negative):
            return None
    except ValueError:
        pass
    if name.lower().endswith(("uri", "checkpoint")):
        # A URI that `clean` would change is dropped, because the changed URI would name another object.
        return value if value == clean(value, MAX_URI_CHARACTERS) else None
    return clean(value, MAX_CHARACTERS_BY_FIELD.get(name, MAX_TEXT_CHARACTERS))


def _limit_time(value: str, latest_time: datetime) -> str | None:
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return moment.isoformat() if EARLIEST_TIME <= moment <= latest_time else None
