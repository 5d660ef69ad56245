"""Take the screenshots of `docs/guides/report.md`: train a tiny model, and show the report of the run in a headless Chromium.

The first attempt of the run is killed, and a second attempt continues, so that the report shows two attempts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES_FOLDER = ROOT / "docs/guides/images"
MAX_BYTES = 150_000
SCREENSHOTS = (("report-desktop.png", 1180, 1560, False), ("report-phone.png", 360, 1500, True))
"""One entry for each screenshot: file, width and height in CSS pixels, and whether the theme is dark."""
INSTALL_HINT = "no browser is installed: install Chromium, on Debian with `apt-get install chromium-headless-shell`"
COLOUR_COUNT = 256
"""Number of colours in a saved picture. More colours make the files larger, but not visibly better."""


def main() -> None:
    """Take the screenshots. Use an existing report if `--report` names one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="use this index.html instead of training a new run")
    parser.add_argument("--install", action="store_true", help="only install the browser")
    options = parser.parse_args()
    sys.path[:0] = [str(path) for path in (ROOT, ROOT / "tests/pod", ROOT / "crds", ROOT / "trainer-image")]
    if options.install:
        print(_find_or_install_browser() or f"{INSTALL_HINT}; the tests that need it are skipped")
        return
    browser_program = _find_or_install_browser()
    if browser_program is None:
        sys.exit(INSTALL_HINT)
    with tempfile.TemporaryDirectory() as folder:
        _take_screenshots(browser_program, options.report or _train_and_report(Path(folder)))


def _find_or_install_browser() -> str | None:
    """Return the path of the browser, or None if there is no browser. If this user is root on Debian, apt-get first installs a missing browser."""
    from localcluster.requirements import install_packages
    from tests.support.browser import PACKAGE, find_browser

    if find_browser() is None and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        install_packages([PACKAGE, "fonts-dejavu-core"])
    return find_browser()


def _train_and_report(folder: Path) -> Path:
    """Run a job in the given folder, whose name can be visible in the pictures. Returns the path of the job's report."""
    from finetune_api.names import REPORT_KEY
    from report_run import run_with_report, stored_run_folder

    from tests.support.tiny import make_tiny_model

    run_with_report(folder, make_tiny_model(folder / "tiny-llama"))
    return stored_run_folder(folder) / REPORT_KEY


def _take_screenshots(browser_program: str, report_file: Path) -> None:
    from PIL import Image

    from tests.support.browser import Browser

    IMAGES_FOLDER.mkdir(exist_ok=True)
    with Browser(browser_program) as browser:
        for name, width, height, is_dark in SCREENSHOTS:
            page_visit = browser.show(report_file.resolve().as_uri(), width=width, dark=is_dark)
            assert not page_visit.requests and not page_visit.errors, page_visit
            browser.screenshot(IMAGES_FOLDER / name, height=height)
            with Image.open(IMAGES_FOLDER / name) as picture:
                picture.convert("RGB").quantize(COLOUR_COUNT, dither=Image.Dither.NONE).save(IMAGES_FOLDER / name, optimize=True)
            size_bytes = (IMAGES_FOLDER / name).stat().st_size
            assert size_bytes <= MAX_BYTES, f"{name} has {size_bytes} bytes"
            print(f"{IMAGES_FOLDER / name}: {size_bytes} bytes")


if __name__ == "__main__":
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"})
    main()
