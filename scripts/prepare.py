"""Run the slow steps that the demo and the end-to-end tests need, in parallel: build Kubernetes, Helm and the images, and create the model.

The steps store their results in the cache. If the cache contains all results, this program takes one or two seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from parallel_steps import Step, StepFailed, run_all
from rich.console import Console
from smollm2 import cache_folder
from tools import HELM, HELM_DOCS

ROOT = Path(__file__).resolve().parent.parent


def make_python_command(*arguments: str) -> list[str]:
    """Return a command line that runs Python in this environment."""
    return [sys.executable, *arguments]


def make_model_step() -> Step:
    """Return the step that creates the demo's model."""
    return Step("SmolLM2-135M as safetensors", lambda run_command: run_command(make_python_command(str(ROOT / "scripts/smollm2.py"))))


def make_local_steps() -> list[Step]:
    """Return the steps that prepare the local cluster: Debian packages, programs and images."""
    packages_step_name = "Debian packages of the local cluster"
    return [
        Step(packages_step_name, lambda run_command: run_command(make_python_command("-m", "localcluster", "packages", "--install"))),
        Step("Kubernetes, from its Go modules", lambda run_command: run_command(make_python_command("-m", "localcluster", "build"))),
        Step(
            "images of operator, trainer and S3",
            lambda run_command: run_command(make_python_command("-m", "localcluster", "images", "build", "all")),
            required_steps=(packages_step_name,),
        ),
    ]


def main() -> int:
    """Run all steps. Returns the exit code: 0 after success, 1 if a step failed, 130 after Ctrl-C."""
    console = Console(stderr=True)
    try:
        run_all([*make_local_steps(), HELM.make_build_step(), HELM_DOCS.make_build_step(), make_model_step()], cache_folder() / "logs", console)
    except StepFailed as error:
        console.print(f"[red]prepare:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
