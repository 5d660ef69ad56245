"""The page in a real browser, and the contrast of its colours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from finetune_api.status import Output
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.report import page
from report_samples import make_attempt_record, make_sample_report

from tests.support.browser import PACKAGE, Browser, find_browser

ATTACK = "<script>window.attacked = true</script><img src='https://example.org/x.png' onerror='window.attacked = true'>"
LONG_WORD = "x" * 400
REQUIRED_CONTRAST = 4.5
"""Contrast of text and background, level AA of the Web Content Accessibility Guidelines 2.2, section 1.4.3."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser is installed: `make browser` installs the Debian package {PACKAGE}")
    with Browser(program) as running_browser:
        yield running_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with long texts, and texts that try to inject code."""
    report = make_sample_report(
        attempts=(make_attempt_record(1, exit_code=65, code="X", message=LONG_WORD, hint=ATTACK, notes=[ATTACK, LONG_WORD]),),
        output=Output(uri=f"s3://{LONG_WORD}", sha256="f" * 64), further_results={"benchmarks": {LONG_WORD: LONG_WORD}},
        predictions=(Prediction(None, LONG_WORD, ATTACK, LONG_WORD),), prediction_count=1,
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page.render(report), encoding="utf-8")
    return path.as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_loads_nothing_and_fits_the_window(browser: Browser, address: str, width: int, is_dark: bool) -> None:
    visit = browser.show(address, width=width, dark=is_dark)
    assert (visit.requests, visit.errors) == ([], [])
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("typeof window.attacked") == "undefined"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 21, 27)" if is_dark else "rgb(244, 246, 248)")
    browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_the_browser_reports_requests_and_errors(browser: Browser, tmp_path: Path) -> None:
    """This test shows that the tests of the page can fail: `Browser` reports requests, errors and a page that is too wide."""
    path = tmp_path / "page.html"
    path.write_text("<img src='missing.png'><script>throw Error('broken')</script><div style='width: 999px'>x</div>", encoding="utf-8")
    visit = browser.show(path.as_uri(), width=360)
    assert visit.requests == [(tmp_path / "missing.png").as_uri()] and any("broken" in error for error in visit.errors)
    assert browser.evaluate("document.documentElement.scrollWidth") > 360


def compute_luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`, from 0 to 1. WCAG 2.2, definition of relative luminance."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def compute_contrast(first_colour: str, second_colour: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21."""
    lower_luminance, higher_luminance = sorted((compute_luminance(first_colour), compute_luminance(second_colour)))
    return (higher_luminance + 0.05) / (lower_luminance + 0.05)


@pytest.mark.parametrize("theme_index", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text_colour", "background_colour"),
    [
        ("ink", "paper"), ("ink", "card"), ("soft", "card"), ("soft", "paper"), ("soft", "shade"), ("link", "card"), ("link", "paper"),
        ("band-ink", "band"), ("band-soft", "band"), ("good", "good-back"), ("bad", "bad-back"), ("open", "open-back"), ("attempt", "card"), ("s1", "card"),
    ],
)  # fmt: skip
def test_texts_and_lines_are_readable_in_both_themes(theme_index: int, text_colour: str, background_colour: str) -> None:
    theme_blocks = re.findall(r":root \{(.*?)\}", (page.TEMPLATE_FOLDER / "page.css").read_text("utf-8"), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme_blocks[theme_index]))
    assert compute_contrast(colours[text_colour], colours[background_colour]) >= REQUIRED_CONTRAST
