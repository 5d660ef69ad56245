"""Renders the HTML page of the report. The template escapes every text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.report import sections
from finetune_trainer.report.cells import format_time
from finetune_trainer.report.redaction import hide_secrets
from finetune_trainer.report.run_report import RunReport

TEMPLATE_FOLDER = Path(__file__).parent
COPY_NAME = "report.html"
"""File name of the page's copy in the folder of `output.dir`."""


def render(report: RunReport, secrets: Iterable[str] = ()) -> str:
    """Return the page as HTML. `secrets`: texts that must not be in the page."""
    return str(_load_template(tuple(secrets)).render(
        name=report.run.name, namespace=report.run.namespace, subtitle=sections.build_subtitle(report), outcome=sections.describe_outcome(report),
        tiles=sections.build_tiles(report), sections=sections.build_sections(report), written_at=format_time(report.written_at),
        started_at=format_time(report.started_at) if report.started_at else None, style=(TEMPLATE_FOLDER / "page.css").read_text("utf-8"),
    ))  # fmt: skip


def _load_template(secrets: Sequence[str]) -> Any:
    """Return the template, which hides the secrets in every text before it escapes the text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: hide_secrets(value, secrets) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template("page.html")
