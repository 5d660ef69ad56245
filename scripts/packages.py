"""The Python packages of the images and of the command line: their versions in the lock files, and their metadata in the environment of `make setup`.

All lock files have the versions of `dev.lock`, so the metadata of the installed packages are those of the images. A test compares the versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, requires
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("operator", "trainer", "cli")
"""The programs that users install. Each has a lock file `requirements/<program>.lock`."""
LOCK_LINE = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.*?))?(?: \\)?$", re.MULTILINE)
SPDX_OF_WORDS = {
    "apache": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0", "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache software license": "Apache-2.0", "apache software license 2.0": "Apache-2.0",
    "mit license": "MIT", "the mit license (mit)": "MIT", "isc license": "ISC", "isc license (iscl)": "ISC", "bsd license": "BSD",
    "bsd 2-clause license": "BSD-2-Clause", "3-clause bsd license": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause",
    "psfl": "PSF-2.0", "python software foundation license": "PSF-2.0", "dual license": "",
}  # fmt: skip
"""SPDX identifiers of the words in the metadata of packages. An empty text: the words name no licence. `BSD`: the number of clauses is not named."""
LICENCES_OF_PACKAGES = {
    "cuda-toolkit": "no files: a package that only names the packages of NVIDIA's toolkit",
    "antlr4-python3-runtime": "BSD-3-Clause",
    "nvidia-cusparselt-cu13": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-nccl-cu13": "BSD-3-Clause",
    "nvidia-nvtx": "Apache-2.0 WITH LLVM-exception",
}
"""Licences that the metadata of a package do not name, or name differently from its licence file. Source: the licence files of the packages."""


@dataclass(frozen=True)
class Package:
    """One package of a lock file."""

    name: str
    version: str
    licence: str
    """Licence from the metadata, as an SPDX expression if the package gives one."""
    dependencies: tuple[str, ...]
    """Names of the packages that this package requires in the image."""


class MissingPackage(Exception):
    """A package of a lock file is not installed with this version."""


def locked_versions(lock: Path) -> dict[str, str]:
    """Return the version of each package that the lock file installs with this Python version, by name."""
    found = LOCK_LINE.findall(lock.read_text("utf-8"))
    return {canonicalize_name(name): version for name, version, marker in found if not marker or Marker(marker).evaluate()}


def read_packages(program: str) -> list[Package]:
    """Return the packages of a program, by name. Errors: MissingPackage."""
    versions = locked_versions(ROOT / f"requirements/{program}.lock")
    return [_read_package(name, version, versions) for name, version in sorted(versions.items())]


def _read_package(name: str, version: str, versions: dict[str, str]) -> Package:
    try:
        found = metadata(name)
    except PackageNotFoundError as error:
        raise MissingPackage(f"{name} {version} is not installed: run make setup") from error
    if found["Version"] != version:
        raise MissingPackage(f"{name} is installed as {found['Version']}, but the lock file has {version}: run make setup")
    return Package(name, version, _licence_of(name, found), tuple(sorted(set(_required_names(name)) & versions.keys())))


def _required_names(name: str) -> Iterator[str]:
    """Yield the names of all requirements, also of optional features: an optional package that is in the image is used."""
    for text in requires(name) or []:
        yield canonicalize_name(Requirement(text).name)


def _licence_of(name: str, found: PackageMetadata) -> str:
    expression = found.get("License-Expression")
    if name in LICENCES_OF_PACKAGES or expression:
        return LICENCES_OF_PACKAGES.get(name) or str(expression)
    # Some packages write the whole text of the licence into this field. Its first line is the name.
    first_line = (found.get("License") or "").strip().partition("\n")[0].strip()
    named = _spdx(first_line)
    classifiers = [_spdx(line.split(" :: ")[-1]) for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    is_name = bool(named) and len(named) <= 20
    return named if is_name else " OR ".join(sorted(filter(None, classifiers))) or "unknown"


def _spdx(words: str) -> str:
    return SPDX_OF_WORDS.get(words.lower(), words)
