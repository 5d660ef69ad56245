"""The slow one-time work before a demo or the end-to-end tests, side by side: Kubernetes, Helm, images, the model.

All of it is kept in the cache, so that the second time costs a second or two.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from side_by_side import Step, StepFailed, run_all
from smollm2 import cache
from tools import HELM

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> list[str]:
    """A command of this environment's Python."""
    return [sys.executable, *arguments]


def model_step() -> Step:
    """The demo's model."""
    return Step("SmolLM2-135M as safetensors", lambda command: command(python(str(ROOT / "scripts/smollm2.py"))))


def local_steps() -> list[Step]:
    """What the local cluster needs: Debian packages first, then programs and images."""
    packages = "Debian packages of the local cluster"
    return [
        Step(packages, lambda command: command(python("-m", "localcluster", "packages", "--install"))),
        Step("Kubernetes, from its Go modules", lambda command: command(python("-m", "localcluster", "build"))),
        Step(
            "images of operator, trainer and S3",
            lambda command: command(python("-m", "localcluster", "images", "build", "all")),
            after=(packages,),
        ),
    ]


def main() -> int:
    """0, or 1 with one line that says what could not be done."""
    console = Console(stderr=True)
    try:
        run_all([*local_steps(), HELM.step(), model_step()], cache() / "logs", console)
    except StepFailed as error:
        console.print(f"[red]prepare:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
