"""Build the cluster's programs from Go modules and cache them by version and source hash.

No binary is downloaded. The sources come from the Go module proxy, and go.sum pins them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.errors import BuildFailed, MissingRequirement
from localcluster.steps import Step, silent_step

GO_SOURCES_FOLDER = Path(__file__).resolve().parent / "go"
MIN_GO_VERSION = (1, 26)
"""Oldest Go version that the go.mod files accept."""


@dataclass(frozen=True)
class Program:
    """One Go program. The program's version is the version of the Go module `version_module`. Before a build, the user sees `first_build_duration`.

    `package` is the Go package to build: either `.`, the package in the program's folder, or a package of another module that go.mod lists as a tool.
    `localcluster build` skips programs with `is_optional`. Tests that need an optional program build it.
    """

    name: str
    version_module: str | None = None
    first_build_duration: str = "seconds"
    package: str = "."
    is_optional: bool = False

    @property
    def folder(self) -> Path:
        return GO_SOURCES_FOLDER / self.name

    @property
    def version(self) -> str:
        if self.version_module is None:
            return "1"
        go_mod_text = (self.folder / "go.mod").read_text()
        version_match = re.search(rf"^\s*(?:require )?{re.escape(self.version_module)} v(\S+)", go_mod_text, re.M)
        if version_match is None:
            raise BuildFailed(f"{self.folder}/go.mod requires no {self.version_module}")
        return version_match.group(1)

    @property
    def binary_path(self) -> Path:
        """Path of the built program. The path contains the version and a hash of the sources and build flags."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.name in ("go.mod", "go.sum") or path.suffix == ".go":
                digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
        digest.update(" ".join(self.build_flags).encode())
        return paths.cache_folder() / f"{self.name}-{self.version}-{digest.hexdigest()[:12]}" / self.name

    @property
    def build_flags(self) -> list[str]:
        """Flags of `go build`. The linker flags set the version that the Kubernetes components report to clients, as in the upstream build."""
        linker_flags = ["-s", "-w"]
        if self.name == KUBE_PROGRAM:
            major, minor, _ = self.version.split(".")
            for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
                linker_flags += [f"-X {package}.gitVersion=v{self.version}"]
                linker_flags += [f"-X {package}.gitMajor={major}", f"-X {package}.gitMinor={minor}"]
        return ["-trimpath", "-ldflags", " ".join(linker_flags)]


KUBE_PROGRAM = "kube"
KUEUE_PROGRAM = "kueue"
PROGRAM_BY_NAME = {
    program.name: program
    for program in (
        Program(KUBE_PROGRAM, "k8s.io/kubernetes", "about 6 minutes"),
        Program("coredns", "github.com/coredns/coredns", "about 2 minutes"),
        Program("pause"),
        Program("testbox"),
        Program("mongodb", "github.com/FerretDB/FerretDB", "about 2 minutes"),
        Program("verdicts", "github.com/fluxcd/cli-utils"),
        Program(KUEUE_PROGRAM, "sigs.k8s.io/kueue", "about 5 minutes", "sigs.k8s.io/kueue/cmd/kueue", is_optional=True),
    )
}


def ensure_built(name: str, step: Step = silent_step) -> Path:
    """Build a program unless it exists. Returns its path.

    Errors: MissingRequirement if Go is missing. BuildFailed if the build fails; its message contains the end of the log.
    """
    program = PROGRAM_BY_NAME[name]
    binary_path = program.binary_path
    if binary_path.exists():
        return binary_path
    check_go()
    binary_path.parent.mkdir(parents=True, exist_ok=True)
    description = f"build {name} {program.version} from Go modules (first time: {program.first_build_duration})"
    with (binary_path.parent / "lock").open("w") as lock, step(description):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary_path.exists():
            _run_go_build(program, binary_path)
    return binary_path


def download_module_sources(name: str) -> Path:
    """Download the Go module in `version_module` of a program. Returns the folder with its sources. Errors: MissingRequirement, BuildFailed."""
    program = PROGRAM_BY_NAME[name]
    assert program.version_module is not None
    check_go()
    command = ["go", "mod", "download", "-json", program.version_module]
    result = subprocess.run(command, cwd=program.folder, env={**os.environ, "GOTOOLCHAIN": "local"}, capture_output=True, text=True)
    folder = json.loads(result.stdout or "{}").get("Dir")
    if result.returncode != 0 or not folder:
        raise BuildFailed(f"downloading the sources of {name} failed ({result.returncode}): {result.stderr[-500:] or result.stdout[-500:]}")
    return Path(folder)


def _run_go_build(program: Program, binary_path: Path) -> None:
    unfinished_binary = binary_path.with_suffix(".unfinished")
    log_file = binary_path.with_suffix(".log")
    command = ["go", "build", "-p", "2", *program.build_flags, "-o", str(unfinished_binary), program.package]
    env = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    with log_file.open("w") as out:
        exit_code = subprocess.run(command, cwd=program.folder, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    if exit_code != 0:
        log_tail = " | ".join(log_file.read_text(errors="replace").splitlines()[-5:])
        raise BuildFailed(f"building {program.name} failed ({exit_code}): {log_tail} (log: {log_file})")
    unfinished_binary.rename(binary_path)


def check_go() -> None:
    """Check that Go is on the PATH, in version `MIN_GO_VERSION` or newer. Errors: MissingRequirement."""
    if shutil.which("go") is None:
        raise MissingRequirement(f"Go {MIN_GO_VERSION[0]}.{MIN_GO_VERSION[1]} or newer is missing (`go` is not on the PATH): install it")
    version_output = subprocess.run(["go", "version"], capture_output=True, text=True).stdout
    version_match = re.search(r"go(\d+)\.(\d+)", version_output)
    if version_match is None or (int(version_match[1]), int(version_match[2])) < MIN_GO_VERSION:
        raise MissingRequirement(
            f"Go {MIN_GO_VERSION[0]}.{MIN_GO_VERSION[1]} or newer is needed, but `go version` reports: {version_output.strip() or 'nothing'}"
        )
