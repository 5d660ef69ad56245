"""Renders the page. The template escapes every text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.report import sections
from finetune_trainer.report.cells import format_time
from finetune_trainer.report.redaction import hide
from finetune_trainer.report.run_report import RunReport

FOLDER = Path(__file__).parent
COPY_NAME = "report.html"
"""Name of the page in the folder of `output.dir`."""


def render(report: RunReport, secrets: Iterable[str] = ()) -> str:
    """Return the page as HTML. `secrets`: texts that must not be in the page."""
    return str(_template(tuple(secrets)).render(
        name=report.run.name, namespace=report.run.namespace, subtitle=sections.subtitle(report), outcome=sections.outcome(report),
        tiles=sections.tiles(report), sections=sections.sections(report), written_at=format_time(report.written_at),
        started_at=format_time(report.started_at) if report.started_at else None, style=(FOLDER / "page.css").read_text("utf-8"),
    ))  # fmt: skip


def _template(secrets: Sequence[str]) -> Any:
    """The template, which hides the secrets in every text before it escapes the text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: hide(value, secrets) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template("page.html")
