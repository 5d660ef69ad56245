"""What an objective is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.prepare import Prepared
from finetune_trainer.distributed import Plan
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs


@dataclass
class Setting:
    """Everything that is settled before the model is loaded."""

    run: RunConfig
    inputs: Inputs
    hardware: Hardware
    plan: Plan
    tokenizer: Any
    cache: Path
    """Folder for token files."""
    limit: int | None
    """Positions the model has."""
    callbacks: Sequence[Any] = ()
    unquantized: tuple[str, ...] = ()
    """Modules that stay whole where the base is quantised: those that spectrum trains."""


@dataclass
class Facts:
    """What the data turned out to be."""

    rows: int
    format: DatasetFormat
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def facts_of(prepared: Prepared) -> Facts:
    """Facts of tokenised data."""
    reports = {name: vars(report) for name, report in prepared.reports.items()}
    return Facts(prepared.rows["train"], prepared.format, prepared.notes, {"tokens": reports, "rows": prepared.rows})
