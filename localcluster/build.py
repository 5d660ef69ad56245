"""Build the cluster's programs from Go modules and cache them by version and source hash.

No binary is downloaded. The sources come from the Go module proxy, and go.sum pins them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.errors import BuildFailed, MissingRequirement
from localcluster.steps import Step, silent

SOURCES = Path(__file__).resolve().parent / "go"
GO = (1, 26)
"""Oldest Go version that the go.mod files accept."""


@dataclass(frozen=True)
class Program:
    """One Go program. Its version is that of the Go module `versioned_by`. `first_build_duration` is shown to the user before a build."""

    name: str
    versioned_by: str | None = None
    first_build_duration: str = "seconds"

    @property
    def folder(self) -> Path:
        return SOURCES / self.name

    @property
    def version(self) -> str:
        if self.versioned_by is None:
            return "1"
        text = (self.folder / "go.mod").read_text()
        match = re.search(rf"^\s*(?:require )?{re.escape(self.versioned_by)} v(\S+)", text, re.M)
        if match is None:
            raise BuildFailed(f"{self.folder}/go.mod requires no {self.versioned_by}")
        return match.group(1)

    @property
    def binary(self) -> Path:
        """Path of the built program."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.name in ("go.mod", "go.sum") or path.suffix == ".go":
                digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
        digest.update(" ".join(self.flags).encode())
        return paths.cache() / f"{self.name}-{self.version}-{digest.hexdigest()[:12]}" / self.name

    @property
    def flags(self) -> list[str]:
        """Build flags. Linker flags set the version that the Kubernetes components report to clients, as in the upstream build."""
        link = ["-s", "-w"]
        if self.name == KUBE:
            major, minor, _ = self.version.split(".")
            for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
                link += [f"-X {package}.gitVersion=v{self.version}"]
                link += [f"-X {package}.gitMajor={major}", f"-X {package}.gitMinor={minor}"]
        return ["-trimpath", "-ldflags", " ".join(link)]


KUBE = "kube"
PROGRAMS = {
    program.name: program
    for program in (
        Program(KUBE, "k8s.io/kubernetes", "about 6 minutes"),
        Program("coredns", "github.com/coredns/coredns", "about 2 minutes"),
        Program("pause"),
        Program("testbox"),
    )
}


def ensure(name: str, step: Step = silent) -> Path:
    """Build a program unless it exists. Returns its path. Errors: MissingRequirement if Go is missing, BuildFailed with the end of the log."""
    program = PROGRAMS[name]
    binary = program.binary
    if binary.exists():
        return binary
    check_go()
    binary.parent.mkdir(parents=True, exist_ok=True)
    description = f"build {name} {program.version} from Go modules (first time: {program.first_build_duration})"
    with (binary.parent / "lock").open("w") as lock, step(description):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _build(program, binary)
    return binary


def _build(program: Program, binary: Path) -> None:
    unfinished = binary.with_suffix(".unfinished")
    log = binary.with_suffix(".log")
    command = ["go", "build", "-p", "2", *program.flags, "-o", str(unfinished), "."]
    env = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    with log.open("w") as out:
        code = subprocess.run(command, cwd=program.folder, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    if code != 0:
        end = " | ".join(log.read_text(errors="replace").splitlines()[-5:])
        raise BuildFailed(f"building {program.name} failed ({code}): {end} (log: {log})")
    unfinished.rename(binary)


def check_go() -> None:
    """Check that Go is on the PATH, in version `GO` or newer. Errors: MissingRequirement."""
    if shutil.which("go") is None:
        raise MissingRequirement(f"Go {GO[0]}.{GO[1]} or newer is missing (`go` is not on the PATH): install it")
    text = subprocess.run(["go", "version"], capture_output=True, text=True).stdout
    match = re.search(r"go(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < GO:
        raise MissingRequirement(f"Go {GO[0]}.{GO[1]} or newer is needed, but `go version` reports: {text.strip() or 'nothing'}")
