"""Reads the Python packages of the images and the command line: versions from the lock files, and metadata from the environment of `make setup`.

`make setup` installs the versions of `dev.lock`. A test checks that all other lock files have the same versions. Therefore the packages that are installed
here have the same metadata as the packages in the images.
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
LOCK_LINE_PATTERN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.*?))?(?: \\)?$", re.MULTILINE)
SPDX_BY_LICENCE_TEXT = {
    "apache": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0", "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache software license": "Apache-2.0", "apache software license 2.0": "Apache-2.0",
    "mit license": "MIT", "the mit license (mit)": "MIT", "isc license": "ISC", "isc license (iscl)": "ISC", "bsd license": "BSD",
    "bsd 2-clause license": "BSD-2-Clause", "3-clause bsd license": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause",
    "psfl": "PSF-2.0", "python software foundation license": "PSF-2.0", "dual license": "",
}  # fmt: skip
"""SPDX identifiers by the licence texts in package metadata. The value is empty if the text names no licence, and `BSD` if the text does not say which BSD
licence it means."""
LICENCE_BY_PACKAGE = {
    "cuda-toolkit": "no files: a package that only names the packages of NVIDIA's toolkit",
    "antlr4-python3-runtime": "BSD-3-Clause",
    "nvidia-cusparselt-cu13": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-nccl-cu13": "BSD-3-Clause",
    "nvidia-nvtx": "Apache-2.0 WITH LLVM-exception",
}
"""Licences of packages whose metadata name no licence, or name a licence that differs from the package's licence file. The values are taken from the
licence files."""


@dataclass(frozen=True)
class Package:
    """One package of a lock file."""

    name: str
    version: str
    licence: str
    """The licence: an SPDX expression if one is known, otherwise the text in the metadata."""
    dependencies: tuple[str, ...]
    """Names of the packages that this package requires, if they are in the same lock file."""


class MissingPackage(Exception):
    """A package of a lock file is not installed, or is installed with another version."""


def read_locked_versions(lock_file: Path) -> dict[str, str]:
    """Return the versions of the packages that a lock file installs with this Python version, by package name."""
    locked_packages = LOCK_LINE_PATTERN.findall(lock_file.read_text("utf-8"))
    return {canonicalize_name(name): version for name, version, marker in locked_packages if not marker or Marker(marker).evaluate()}


def read_packages(program: str) -> list[Package]:
    """Return the packages of a program, sorted by name. Errors: MissingPackage."""
    versions = read_locked_versions(ROOT / f"requirements/{program}.lock")
    return [_read_package(name, version, versions) for name, version in sorted(versions.items())]


def _read_package(name: str, version: str, versions: dict[str, str]) -> Package:
    try:
        package_metadata = metadata(name)
    except PackageNotFoundError as error:
        raise MissingPackage(f"{name} {version} is not installed: run make setup") from error
    if package_metadata["Version"] != version:
        raise MissingPackage(f"{name} is installed as {package_metadata['Version']}, but the lock file has {version}: run make setup")
    return Package(name, version, _find_licence(name, package_metadata), tuple(sorted(set(_list_required_names(name)) & versions.keys())))


def _list_required_names(name: str) -> Iterator[str]:
    """Yield the names of all packages that a package requires. Packages for optional features are included, because they are used if they are installed."""
    for requirement_text in requires(name) or []:
        yield canonicalize_name(Requirement(requirement_text).name)


def _find_licence(name: str, package_metadata: PackageMetadata) -> str:
    spdx_expression = package_metadata.get("License-Expression")
    if name in LICENCE_BY_PACKAGE or spdx_expression:
        return LICENCE_BY_PACKAGE.get(name) or str(spdx_expression)
    # Some packages write the whole licence text into the field `License`; the first line of the text is the name of the licence.
    first_line = (package_metadata.get("License") or "").strip().partition("\n")[0].strip()
    licence_from_text = _to_spdx(first_line)
    licences_from_classifiers = [_to_spdx(line.split(" :: ")[-1]) for line in package_metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    is_licence_name = bool(licence_from_text) and len(licence_from_text) <= 20
    return licence_from_text if is_licence_name else " OR ".join(sorted(filter(None, licences_from_classifiers))) or "unknown"


def _to_spdx(licence_text: str) -> str:
    return SPDX_BY_LICENCE_TEXT.get(licence_text.lower(), licence_text)
