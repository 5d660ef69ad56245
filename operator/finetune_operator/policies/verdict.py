"""Data types for the result of checking a spec: accepted or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.names import Reason
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.settings import NodePool


@dataclass(frozen=True)
class AcceptedSpec:
    """A spec that the operator can run, with its defaults."""

    spec: FineTuneJobSpec
    """The spec with all defaults filled in."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """The values that were filled in, by spec path: defaults, and the values that the plan chose."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """The values that the plan chose, by spec path."""
    notes: tuple[str, ...] = ()
    pool: NodePool | None = None
    spec_sha256: str = ""
    """Hash of the spec's immutable fields."""
    max_duration_seconds: int | None = None
    """The platform's limit on the running time of a new job in seconds. None: there is no limit, or the job is not new."""


@dataclass(frozen=True)
class RefusedSpec:
    """Why the operator cannot run a spec now or ever."""

    reason: Reason
    message: str
    hint: str = ""
    is_final: bool = True
    """Whether the job fails. Otherwise it waits, and the operator checks the spec again."""
    spec: FineTuneJobSpec | None = None
    """The fields of the spec that the operator could read, with defaults. A running attempt continues with these fields."""
