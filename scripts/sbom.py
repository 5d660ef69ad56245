"""Write the software bills of materials (CycloneDX 1.6) and the table of licences of the images and of the command line.

    python scripts/sbom.py dist

The files contain no time and no random number, so that equal lock files give equal files. The bills of materials list only Python packages; the base image
has its own bill of materials.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune_api.names import RELEASE
from packages import PROGRAMS, MissingPackage, Package, read_packages
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

APPLICATION_NAMES = {"operator": "finetune-operator", "trainer": "finetune-trainer", "cli": "finetune-cli"}
SERIAL_NUMBER_NAMESPACE = uuid.UUID("6f0f4c5e-6e1b-5b0e-9d0a-2f7f4a5a9c11")
"""UUID namespace for serial numbers. The serial number of a bill of materials is a UUID that is computed from its content."""


def build_sbom(program: str, packages: Iterable[Package]) -> dict[str, Any]:
    """Return the bill of materials of one program."""
    listed_packages = list(packages)
    application_name = APPLICATION_NAMES[program]
    root_component = {
        "type": "application", "bom-ref": application_name, "name": application_name, "version": RELEASE, "licenses": [_make_licence_entry("Apache-2.0")],
    }  # fmt: skip
    ref_by_name = {package.name: f"pkg:pypi/{package.name}@{package.version}" for package in listed_packages}
    required_names = {dependency for package in listed_packages for dependency in package.dependencies}
    bill_of_materials: dict[str, Any] = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": root_component},
        "components": [
            {
                "type": "library", "bom-ref": ref_by_name[package.name], "name": package.name, "version": package.version, "purl": ref_by_name[package.name],
                "licenses": [_make_licence_entry(package.licence)],
            }
            for package in listed_packages
        ],
        "dependencies": [
            {"ref": application_name, "dependsOn": [ref_by_name[package.name] for package in listed_packages if package.name not in required_names]},
            *({"ref": ref_by_name[package.name], "dependsOn": [ref_by_name[name] for name in package.dependencies]} for package in listed_packages),
        ],
    }  # fmt: skip
    serial_number = uuid.uuid5(SERIAL_NUMBER_NAMESPACE, json.dumps(bill_of_materials, sort_keys=True))
    return {**bill_of_materials, "serialNumber": f"urn:uuid:{serial_number}"}


def _make_licence_entry(licence_text: str) -> dict[str, Any]:
    """Return the CycloneDX entry of a licence: an SPDX expression, or a name if the text is no valid expression."""
    try:
        return {"expression": canonicalize_license_expression(licence_text)}
    except InvalidLicenseExpression:
        return {"license": {"name": licence_text}}


def format_licence_table(packages_by_program: dict[str, list[Package]]) -> str:
    """Return a Markdown page with a table of all packages: version, licence, and the programs that contain the package."""
    programs_by_package: dict[Package, list[str]] = {}
    for program, packages in packages_by_program.items():
        for package in packages:
            programs_by_package.setdefault(package, []).append(program)
    programs_by_row: dict[tuple[str, str, str], set[str]] = {}
    for package, programs in programs_by_package.items():
        programs_by_row.setdefault((package.name, package.version, package.licence), set()).update(programs)
    rows = [f"| {name} | {version} | {licence} | {', '.join(sorted(programs))} |" for (name, version, licence), programs in sorted(programs_by_row.items())]
    return "\n".join(["# Licences of the Python packages", "", "| package | version | licence | part of |", "|---|---|---|---|", *rows, ""])


def write_files(folder: Path) -> list[Path]:
    """Write `sbom-<program>.cdx.json` and `licences.md`, and return their paths. Errors: MissingPackage."""
    folder.mkdir(parents=True, exist_ok=True)
    packages_by_program = {program: read_packages(program) for program in PROGRAMS}
    text_by_file_name = {
        f"sbom-{program}.cdx.json": json.dumps(build_sbom(program, packages), indent=1, sort_keys=True) + "\n"
        for program, packages in packages_by_program.items()
    }
    text_by_file_name["licences.md"] = format_licence_table(packages_by_program)
    for name, text in text_by_file_name.items():
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in text_by_file_name]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write bills of materials and licences.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dist"))
    try:
        print("\n".join(map(str, write_files(parser.parse_args().folder))))
    except MissingPackage as problem:
        sys.exit(f"sbom: {problem}")
