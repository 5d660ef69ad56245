"""The supervisor imports neither torch nor another heavy package, even when it fetches and checks inputs."""

from __future__ import annotations

import subprocess
import sys

HEAVY_MODULES = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pandas")
PROGRAM = """
import sys
import finetune_trainer.supervisor.supervise, finetune_trainer.data, finetune_trainer.storage.__main__
print(",".join(name for name in {heavy!r} if name in sys.modules))
"""


def test_the_supervisor_imports_no_heavy_package() -> None:
    program = PROGRAM.format(heavy=HEAVY_MODULES)
    finished_process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished_process.stdout.strip() == ""
