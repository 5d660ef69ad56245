"""Build Helm, helm-docs, kind and programs that tests use, from their Go modules into the cache."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from parallel_steps import Commands, Step
from smollm2 import cache_folder

SCRIPTS_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class GoTool:
    """A Go program. The environment variable `override_variable` can name another binary to use instead."""

    name: str
    package: str
    version: str
    override_variable: str
    linker_flags: str = ""

    @property
    def path(self) -> Path:
        """Path of the program: the value of the variable `override_variable` if it is set, else the path in the cache."""
        override_path = os.environ.get(self.override_variable)
        return Path(override_path) if override_path else cache_folder() / "tools" / f"{self.name}-{self.version}" / self.name

    def make_build_step(self) -> Step:
        """Return a step that builds the program unless it exists."""

        def run(run_command: Commands) -> None:
            if not self.path.exists():
                run_command([SCRIPTS_FOLDER / "build-tool.sh", self.package, self.version, self.path, self.linker_flags])

        return Step(f"{self.name} {self.version}", run)


HELM_VERSION = "v4.3.1"
HELM = GoTool(
    "helm",
    "helm.sh/helm/v4/cmd/helm",
    HELM_VERSION,
    "HELM",
    f"-X helm.sh/helm/v4/internal/version.version={HELM_VERSION}",
)
HELM_3_VERSION = "v3.22.0"
HELM_3 = GoTool(
    "helm",
    "helm.sh/helm/v3/cmd/helm",
    HELM_3_VERSION,
    "HELM_3",
    f"-X helm.sh/helm/v3/internal/version.version={HELM_3_VERSION} "
    # Without the following linker flags, `helm template` and `helm lint` assume Kubernetes 1.20.
    + " ".join(
        f"-X helm.sh/helm/v3/pkg/{package}.k8sVersion{version_part}"
        for package in ("chartutil", "lint/rules") for version_part in ("Major=1", "Minor=34")
    ),
)  # fmt: skip
"""Helm 3, which only the chart's tests in `make test-faults` use."""
HELM_DOCS = GoTool("helm-docs", "github.com/norwoodj/helm-docs/cmd/helm-docs", "v1.14.2", "HELM_DOCS")
VERSITY_GATEWAY = GoTool("versitygw", "github.com/versity/versitygw/cmd/versitygw", "v1.8.0", "VERSITYGW")
MINIO = GoTool("minio", "github.com/minio/minio", "v0.0.0-20260212201848-7aac2a2c5b7c", "MINIO")
"""VersityGW and MinIO are S3 servers for `make test-stores`. MinIO has the AGPL licence: only tests run it, and no image or package contains it."""
KIND = GoTool("kind", "sigs.k8s.io/kind", "v0.33.0", "KIND")


def build_go_tools(*tools: GoTool) -> None:
    """Build the programs that do not exist in the cache. Errors: StepFailed."""
    from parallel_steps import run_all
    from rich.console import Console

    if missing_tools := [tool for tool in tools if not tool.path.exists()]:
        run_all([tool.make_build_step() for tool in missing_tools], cache_folder() / "logs", Console(stderr=True))


def find_installed_kind() -> Path | None:
    """Return the path of the program `kind` if it is on the PATH, else None."""
    path = shutil.which("kind")
    return Path(path) if path else None


if __name__ == "__main__":
    from parallel_steps import StepFailed

    try:
        build_go_tools(HELM, HELM_DOCS)
    except StepFailed as error:
        sys.exit(f"tools: {error}")
    print(HELM.path)
