"""scripts/uv.sh installs the version of uv that the lock file names, and does not install it again. In these tests, small programs replace pip and uv."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LOCKED_VERSION = re.search(r"^uv==(\S+)", (ROOT / "requirements/bootstrap.lock").read_text(), re.MULTILINE)
PYTHON = """#!/bin/sh
if [ "$2" != venv ]; then exec {python} "$@"; fi
mkdir -p "$4/bin" && cp {folder}/pip "$4/bin/pip"
"""
PIP = """#!/bin/sh
echo installed >> {folder}/log
cp {folder}/uv "$(dirname "$0")/uv"
"""
UV = "#!/bin/sh\necho 'uv {version} (x86_64)'\n"


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def test_another_version_than_the_locked_one_is_replaced(tmp_path: Path) -> None:
    assert LOCKED_VERSION is not None
    write_program(tmp_path / "python", PYTHON.format(python=sys.executable, folder=tmp_path))
    write_program(tmp_path / "pip", PIP.format(folder=tmp_path))
    write_program(tmp_path / "uv", UV.format(version=LOCKED_VERSION[1]))
    uv = tmp_path / f"finetune-operator/uv-{sys.version_info.major}.{sys.version_info.minor}/bin/uv"
    write_program(uv, UV.format(version="0.0.1"))
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHON": str(tmp_path / "python")}
    for _ in range(2):
        completed_process = subprocess.run([ROOT / "scripts/uv.sh"], env=variables, capture_output=True, text=True, check=True)
        assert completed_process.stdout.strip() == str(uv)
    assert (tmp_path / "log").read_text() == "installed\n"
    assert uv.read_text() == UV.format(version=LOCKED_VERSION[1])
