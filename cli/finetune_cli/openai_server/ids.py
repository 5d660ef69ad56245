"""Ids of jobs and files. After its prefix, an id begins with the creation time, so a list sorted by id is also sorted by time."""

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


def has_prefix(object_id: str, prefix: str) -> bool:
    """Return whether a text is a valid id with exactly this prefix."""
    match = _ID_PATTERN.fullmatch(object_id)
    return match is not None and match[1] == prefix


def read_creation_time(object_id: str) -> int:
    """Return the creation time in an id, in seconds since 1970."""
    return int(object_id.rpartition("-")[2][:_TIME_DIGITS], 16) // 1000


def to_result_file_id(job_id: str) -> str:
    """Return the id of a job's result file, which contains the metrics of the job."""
    return RESULT_PREFIX + job_id.removeprefix(JOB_PREFIX)


def to_job_id(file_id: str) -> str:
    """Return the id of the job to which a result file belongs."""
    return JOB_PREFIX + file_id.removeprefix(RESULT_PREFIX)
