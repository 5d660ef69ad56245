"""Compare the locked packages with a folder of vulnerability reports in the OSV format.

    python scripts/scan.py FOLDER

The folder contains one JSON file per report, at any depth, for example the unpacked archive of the ecosystem PyPI of osv.dev. Nothing is downloaded.
The exit code is 1 if a package is affected, and 2 if the folder cannot be used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packages import PROGRAMS, ROOT, read_locked_versions
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ECOSYSTEM = "PyPI"
BEFORE_FIRST_VERSION = "0"
"""Value of `introduced` in an OSV report if the first version of the package already has the vulnerability."""


class UnusableDatabase(Exception):
    """The folder contains no reports, or contains a file that is no report."""


@dataclass(frozen=True)
class Finding:
    """A locked package with a vulnerability that a report describes."""

    package: str
    version: str
    programs: tuple[str, ...]
    report: str
    summary: str
    fixed_in: str
    """The next version without the vulnerability, or an empty text if the report names no such version."""

    def __str__(self) -> str:
        remedy = f"fixed in {self.fixed_in}" if self.fixed_in else "no fixed version is known"
        return f"{self.package} {self.version} ({', '.join(self.programs)}): {self.report}: {self.summary or 'no summary'}; {remedy}"


def scan(folder: Path, versions_by_program: dict[str, dict[str, str]]) -> tuple[list[Finding], int]:
    """Return the findings, sorted by package and report, and the number of reports read. Errors: UnusableDatabase."""
    programs_by_package_version: dict[str, dict[str, list[str]]] = {}
    for program, versions in versions_by_program.items():
        for name, version in versions.items():
            programs_by_package_version.setdefault(name, {}).setdefault(version, []).append(program)
    findings, report_count = [], 0
    for report in read_reports(folder):
        report_count += 1
        for name in {_read_package_name(affected_entry) for affected_entry in report.get("affected", [])} & programs_by_package_version.keys():
            for version, programs in programs_by_package_version[name].items():
                fixed_in = find_fixed_version(report, name, version)
                if fixed_in is not None:
                    findings.append(Finding(name, version, tuple(programs), report["id"], str(report.get("summary", "")), fixed_in))
    return sorted(findings, key=lambda finding: (finding.package, finding.version, finding.report)), report_count


def read_reports(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield all reports except withdrawn ones. Errors: UnusableDatabase."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise UnusableDatabase(f"{folder} contains no *.json file: give a folder with vulnerability reports in the OSV format")
    for file in files:
        try:
            report = json.loads(file.read_text("utf-8"))
            is_report = isinstance(report["id"], str) and isinstance(report.get("affected", []), list)
        except (ValueError, KeyError, TypeError) as error:
            raise UnusableDatabase(f"{file} is not a report in the OSV format: {error}") from error
        if not is_report:
            raise UnusableDatabase(f"{file} is not a report in the OSV format: `id` must be a text and `affected` a list")
        if "withdrawn" not in report:
            yield report


def find_fixed_version(report: dict[str, Any], name: str, version: str) -> str | None:
    """Return the version that fixes the vulnerability, an empty text if no such version is known, or None if this version of the package is not affected."""
    for affected_entry in report.get("affected", []):
        if _read_package_name(affected_entry) != name:
            continue
        ranges = [version_range for version_range in affected_entry.get("ranges", []) if version_range.get("type") in ("ECOSYSTEM", "SEMVER")]
        fixed_versions = [fixed_version for version_range in ranges if (fixed_version := _find_range_end(version_range.get("events", []), version)) is not None]
        if fixed_versions or _is_listed(version, affected_entry.get("versions", [])):
            return next(filter(None, fixed_versions), "")
    return None


def _read_package_name(affected_entry: dict[str, Any]) -> str | None:
    """Return the normalised name of an affected Python package; None for other ecosystems."""
    package = affected_entry.get("package", {})
    return canonicalize_name(str(package.get("name", ""))) if package.get("ecosystem") == ECOSYSTEM else None


def _is_listed(version: str, listed_versions: list[str]) -> bool:
    """Whether a list contains the version. Versions are compared by the rules for Python versions: 1.0 equals 1.0.0."""
    return any(Version(version) == parsed_version for listed_version in listed_versions if (parsed_version := _parse_version(listed_version)) is not None)


def _find_range_end(events: list[dict[str, str]], version: str) -> str | None:
    """Return the version that fixes the vulnerability: the end of the affected range that contains `version`.

    Returns an empty text if this range has no end, and None if no affected range contains `version`.
    """
    scanned_version, is_inside = Version(version), False
    for event in sorted(events, key=_make_event_sort_key):
        event_kind, version_text = next(iter(event.items()))
        event_version = None if version_text == BEFORE_FIRST_VERSION else _parse_version(version_text)
        if event_kind == "introduced":
            is_inside = is_inside or event_version is None or scanned_version >= event_version
        elif event_version is not None and is_inside and event_kind in ("fixed", "last_affected"):
            is_after_range = scanned_version >= event_version if event_kind == "fixed" else scanned_version > event_version
            if not is_after_range:
                return version_text if event_kind == "fixed" else ""
            is_inside = False
    return "" if is_inside else None


def _make_event_sort_key(event: dict[str, str]) -> tuple[Version, bool]:
    """Return a key that sorts events by version; of two events with the same version, the event `introduced` comes first."""
    event_kind, version_text = next(iter(event.items()))
    return _parse_version(version_text) or Version("0.dev0"), event_kind != "introduced"


def _parse_version(version_text: str) -> Version | None:
    try:
        return Version(version_text)
    except InvalidVersion:
        return None


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(f"scan: {' '.join(arguments) or 'no folder'}: give one existing folder with vulnerability reports: make scan DB=folder", file=sys.stderr)
        return 2
    try:
        findings, report_count = scan(Path(arguments[0]), {program: read_locked_versions(ROOT / f"requirements/{program}.lock") for program in PROGRAMS})
    except UnusableDatabase as error:
        print(f"scan: {error}", file=sys.stderr)
        return 2
    print("\n".join([*map(str, findings), f"{len(findings)} findings in {report_count} reports"]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
