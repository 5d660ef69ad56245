"""Ids of jobs and files. An id begins with its creation time, so a list sorted by id is also sorted by time."""

from __future__ import annotations

import re
import secrets
import time

JOB_PREFIX, FILE_PREFIX, RESULT_PREFIX = "ftjob-", "file-", "file-result-"
_TIME_DIGITS, _RANDOM_BYTES = 12, 6
_ID_PATTERN = re.compile(r"(ftjob-|file-|file-result-)[0-9a-f]{24}")


def new_id(prefix: str) -> str:
    """Return a new id: the prefix, the time in milliseconds (12 hexadecimal digits), and 12 random hexadecimal digits."""
    return f"{prefix}{time.time_ns() // 1_000_000:0{_TIME_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"


def has_prefix(value: str, prefix: str) -> bool:
    """Return whether the value is an id with exactly this prefix."""
    match = _ID_PATTERN.fullmatch(value)
    return match is not None and match[1] == prefix


def created_at(value: str) -> int:
    """Return the time in an id, in seconds since 1970."""
    return int(value.rpartition("-")[2][:_TIME_DIGITS], 16) // 1000


def result_file_of(job_id: str) -> str:
    """Return the id of the file with the metrics of a job."""
    return RESULT_PREFIX + job_id.removeprefix(JOB_PREFIX)


def job_of_result_file(file_id: str) -> str:
    """Return the id of the job whose metrics are in a file."""
    return JOB_PREFIX + file_id.removeprefix(RESULT_PREFIX)
