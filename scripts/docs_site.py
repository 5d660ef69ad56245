"""Build the documentation site with `mkdocs build --strict`, in a separate environment. The first run installs the packages of requirements/docs.lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from localcluster.paths import cache_folder

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "requirements/docs.lock"


def ensure_mkdocs() -> Path:
    """Install the packages of docs.lock unless they are installed. Returns the path of the Python interpreter that can import these packages."""
    digest = hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"docs-{sys.version_info[0]}.{sys.version_info[1]}-{digest}"
    python_program, ready_file = folder / "bin" / "python", folder / ".ready"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "docs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready_file.exists():
            uv_program = next(iter(cache_folder().glob("uv-*/bin/uv")))
            subprocess.run([uv_program, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
            subprocess.run([uv_program, "pip", "install", "-q", "--python", python_program, "--require-hashes", "-r", LOCK_FILE], check=True)
            ready_file.touch()
    return python_program


def build_site(folder: Path) -> subprocess.CompletedProcess[str]:
    """Write the site into a folder. The result's exit code is not 0 if a link is dead or a page is missing in the navigation."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"NO_MKDOCS_2_WARNING": "1"}  # The theme would otherwise print an advertisement for another program.
    # mkdocs must not run with --quiet: it would not count warnings, so --strict would have no effect.
    command: list[str | Path] = [ensure_mkdocs(), "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def main() -> int:
    """Build the site into build/site. Returns mkdocs' exit code."""
    folder = ROOT / "build/site"
    completed_process = build_site(folder)
    if completed_process.returncode:
        sys.stderr.write(completed_process.stdout + completed_process.stderr)
    else:
        print(f"the documentation is in {folder.relative_to(ROOT)}/index.html; `python3 -m http.server -d {folder.relative_to(ROOT)}` serves it")
    return completed_process.returncode


if __name__ == "__main__":
    sys.exit(main())
