"""The two verdicts on a spec: accepted and refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_api.names import Reason
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.settings import NodePool


@dataclass(frozen=True)
class Accepted:
    """The spec can be run."""

    spec: FineTuneJobSpec
    """The spec with all defaults filled in."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """The defaults that were filled in, by spec path."""
    notes: tuple[str, ...] = ()
    pool: NodePool | None = None
    spec_sha256: str = ""
    """Hash of the parts of the spec that may not change after creation."""


@dataclass(frozen=True)
class Refused:
    """The spec cannot be run, or cannot be run yet."""

    reason: Reason
    message: str
    hint: str = ""
    is_final: bool = True
    """Whether the job fails. If False, the job waits and the operator checks the spec again."""
    spec: FineTuneJobSpec | None = None
    """The readable part of the spec, with defaults. An attempt that already runs continues with it."""
