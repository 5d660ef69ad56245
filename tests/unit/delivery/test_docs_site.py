"""The documentation site builds without a warning, and its pages load nothing from another server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LOADED_ADDRESS = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
CSS_URL = re.compile(r"url\([\"']?((?:https?:)?//[^)\"']+)")


@pytest.mark.slow  # The first run of this test installs the packages that build the site.
@pytest.mark.timeout(300)
def test_site_has_no_dead_links_and_loads_nothing_from_other_servers(tmp_path: Path) -> None:
    import docs_site

    completed_process = docs_site.build_site(tmp_path / "site")
    assert completed_process.returncode == 0, completed_process.stdout + completed_process.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    loaded_addresses = {address for page in pages for address in LOADED_ADDRESS.findall(page.read_text("utf-8"))}
    loaded_addresses |= {address for style_sheet in (tmp_path / "site").rglob("*.css") for address in CSS_URL.findall(style_sheet.read_text("utf-8"))}
    assert loaded_addresses == set()


def test_lock_of_the_site_has_no_addresses(root: Path) -> None:
    text = (root / "requirements/docs.lock").read_text("utf-8")
    assert re.findall(r"https?://|--index-url|--extra-index-url|--find-links", text) == []
    assert text.count("--hash=sha256:") >= text.count("==") > 20
