"""Computes the name of a run in trackers, and names of files and folders from the name and the start time of a run."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from datetime import UTC, datetime

from finetune_api.spec.results import RunName

MAX_SLUG_LENGTH = 63
"""Maximum length of a Kubernetes label value and of a DNS label."""


def build_run_name(option: RunName | None, *, job_name: str, started_at: datetime) -> str:
    """Return the name of a run: prefix, base and suffix of `output.runName`, joined without separators.

    The base is `output.runName.name`. If this field is not set, the base is the start of the run as YYYYMMDD-HHMMSS (UTC). If `output.runName` is not set,
    the run has the FineTuneJob's name.
    """
    if option is None:
        return job_name
    base_name = option.name or _to_utc(started_at).strftime("%Y%m%d-%H%M%S")
    return f"{option.prefix or ''}{base_name}{option.suffix or ''}"


def make_slug(name: str) -> str:
    """Convert a run's name to a text that is valid as a Kubernetes object name, as a label value and as the name of a file or folder.

    The slug has at most 63 lower-case letters, digits, dots and dashes, and begins and ends with a letter or digit. Different names can have the same
    slug. A name without any usable character becomes `run-` and eight digits of its sha256.
    """
    normalized_name = unicodedata.normalize("NFKD", name).lower()
    normalized_name = "".join(character for character in normalized_name if not unicodedata.combining(character))
    name_with_dashes = re.sub(r"[^a-z0-9.]+", "-", normalized_name)
    name_with_dashes = re.sub(r"-*\.[.-]*", ".", name_with_dashes)  # each part between two dots must begin and end with a letter or digit
    slug = name_with_dashes.strip(".-")[:MAX_SLUG_LENGTH].rstrip(".-")
    return slug or f"run-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def time_folder_name(started_at: datetime) -> str:
    """Return the start of a run as the name of a folder: YYYYMMDD_HHMMSS (UTC)."""
    return _to_utc(started_at).strftime("%Y%m%d_%H%M%S")


def _to_utc(time: datetime) -> datetime:
    """Convert a time to UTC. Errors: ValueError if the time has no time zone, because its meaning would depend on the machine."""
    if time.tzinfo is None:
        raise ValueError(f"{time} has no time zone")
    return time.astimezone(UTC)
