"""Reads what pods report: progress over HTTP, and termination messages. Everything is bounded and cleaned before it is used.

A user's own code may run in the pod, so a report can contain anything. A value that cannot be true, or that the API server would not
store, is dropped; the rest of the report stays. Otherwise one odd number would make the server refuse every status write, and
`spec.suspend`, `spec.cancel` and the deadline, which rest on the status, would have no effect.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar

from finetune_api.pod import ProgressReport, TerminationMessage
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from finetune_operator.text import clean

MAX_NUMBER = 2**53 - 1
"""Largest integer that every JSON reader keeps exact; steps, bytes and tokens are far below."""
MAX_NANOSECONDS = 2**63 - 1
MAX_SECONDS = 1e9
"""Longest duration, about 30 years: times computed from it must not overflow."""
MAX_TEXT, MAX_URI = 1024, 1024
TEXT_LIMITS = {"code": 64, "detail": 256}
"""Characters kept of texts that are shown in one line."""
MAX_ITEMS = 100
"""Entries kept of a list or an object; of a list the last ones, which are the newest checkpoints."""
MAX_DEPTH = 6
FIRST_TIME, LAST_TIME = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
CLOCK_SKEW = timedelta(days=1)
"""How far the clock of a pod's node may be ahead."""
TIMES = frozenset({"time", "updateTime"})
SIGNED = frozenset({"trainLoss", "evalLoss", "bestEvalLoss", "evaluation"})
"""Numbers that may be negative; nothing else that a pod reports can be."""
OPERATOR_FIELDS = frozenset({"method", "modelName", "image", "imageDigest", "nodePool", "defaults", "specSha256"})
"""Fields of `resolved` that only the operator fills in."""

Model = TypeVar("Model", bound=BaseModel)


def read_progress_report(data: bytes, now: datetime) -> ProgressReport | None:
    """A pod's progress report, bounded and cleaned; None if it is none."""
    return _read(ProgressReport, data, now + CLOCK_SKEW)


@lru_cache(maxsize=256)
def read_termination_message(text: str) -> TerminationMessage | None:
    """The trainer's termination message, bounded and cleaned; None if it is anything else. Cached, since it is read several times."""
    return _read(TerminationMessage, text.encode(errors="replace"), LAST_TIME)


def _read(model: type[Model], data: bytes, last_time: datetime) -> Model | None:
    try:
        value = from_json(data)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    bounded = _bounded(value, last_time)
    resolved = bounded.get("resolved")
    if isinstance(resolved, dict):
        bounded["resolved"] = {name: one for name, one in resolved.items() if to_camel(name) not in OPERATOR_FIELDS}
    try:
        return model.model_validate(bounded)
    except ValidationError:
        return None


def _bounded(value: Any, last_time: datetime, name: str = "", depth: int = 0, signed: bool = False) -> Any:
    """The value without what is out of bounds, or None if nothing is left. `name` is the nearest field's."""
    signed = signed or name in SIGNED
    if name in TIMES:
        return _time(value, last_time) if isinstance(value, str) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if _is_plausible(value, name, signed) else None
    if isinstance(value, str):
        return _text(value, name, signed)
    if depth >= MAX_DEPTH:
        return None
    if isinstance(value, list):
        items = [_bounded(one, last_time, name, depth + 1, signed) for one in value[-MAX_ITEMS:]]
        return [one for one in items if one is not None]
    entries = [(clean(key, 128), one) for key, one in list(value.items())[:MAX_ITEMS]]
    # The models also read `update_time`, so the bounds are chosen by the wire name of the cleaned key.
    found = {key: _bounded(one, last_time, to_camel(key), depth + 1, signed) for key, one in entries}
    return {key: one for key, one in found.items() if one is not None}


def _is_plausible(value: int | float, name: str, signed: bool) -> bool:
    if name == "timeNs":
        return 0 <= value <= MAX_NANOSECONDS
    is_duration = name.startswith("seconds") or name.endswith("Seconds")
    largest = MAX_SECONDS if is_duration else MAX_NUMBER
    return (-largest if signed else 0) <= value <= largest  # false for NaN


def _text(value: str, name: str, signed: bool) -> str | None:
    try:
        # pydantic accepts a number as text.
        if not _is_plausible(float(value), name, signed):
            return None
    except ValueError:
        pass
    if name.lower().endswith(("uri", "checkpoint")):
        # A shortened or masked URI would name another object.
        return value if value == clean(value, MAX_URI) else None
    return clean(value, TEXT_LIMITS.get(name, MAX_TEXT))


def _time(value: str, last_time: datetime) -> str | None:
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return moment.isoformat() if FIRST_TIME <= moment <= last_time else None
