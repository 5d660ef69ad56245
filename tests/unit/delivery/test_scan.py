"""The vulnerability scan compares locked versions with OSV reports correctly. The bills of materials and the documented licences are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import packages  # noqa: E402 -- scripts, importable only now
import sbom  # noqa: E402
import scan  # noqa: E402


def make_report(*events: dict[str, str], name: str = "Pillow", ecosystem: str = "PyPI", **fields: Any) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}] if events else []
    affected = {"package": {"name": name, "ecosystem": ecosystem}, "ranges": ranges, **fields.pop("affected", {})}
    return {"id": "PYSEC-1", "affected": [affected], **fields}


@pytest.mark.parametrize(
    ("version", "osv_report", "expected"),
    [
        ("1.9", make_report({"introduced": "0"}, {"fixed": "2.0"}), "2.0"),
        ("2.0", make_report({"introduced": "0"}, {"fixed": "2.0"}), None),
        ("2.0.0", make_report({"introduced": "0"}, {"fixed": "2"}), None),
        ("2.0rc1", make_report({"introduced": "0"}, {"fixed": "2.0"}), "2.0"),
        ("1.0", make_report({"introduced": "1.1"}, {"fixed": "2.0"}), None),
        ("3.5", make_report({"introduced": "3"}, {"fixed": "4"}, {"introduced": "0"}, {"fixed": "2"}), "4"),
        ("2.5", make_report({"introduced": "3"}, {"fixed": "4"}, {"introduced": "0"}, {"fixed": "2"}), None),
        ("10.0", make_report({"introduced": "9"}), ""),
        ("2.0", make_report({"introduced": "0"}, {"last_affected": "2.0"}), ""),
        ("2.1", make_report({"introduced": "0"}, {"last_affected": "2.0"}), None),
        ("1.2", make_report(affected={"versions": ["1.2.0"]}), ""),
        ("1.3", make_report(affected={"versions": ["1.2.0", "not a version"]}), None),
        ("1.9", make_report({"introduced": "0"}, ecosystem="npm"), None),
        ("1.9", make_report({"introduced": "0"}, name="pillow-simd"), None),
        ("1.9", make_report({"introduced": "0"}, affected={"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}), None),
    ],
)  # fmt: skip
def test_a_version_is_affected_if_a_range_contains_it(version: str, osv_report: dict[str, Any], expected: str | None) -> None:
    assert scan.find_fixed_version(osv_report, "pillow", version) == expected


def write_database(folder: Path, *reports: dict[str, Any]) -> Path:
    for number, osv_report in enumerate(reports):
        (folder / f"{number % 2}").mkdir(exist_ok=True)
        (folder / f"{number % 2}" / f"{number}.json").write_text(json.dumps(osv_report))
    return folder


def test_findings_name_package_programs_and_the_fixed_version(tmp_path: Path) -> None:
    database = write_database(
        tmp_path, make_report({"introduced": "0"}, {"fixed": "9999"}, name="PyYAML", summary="runs code"),
        make_report({"introduced": "0"}, name="kopf", id="PYSEC-2"),
        make_report({"introduced": "0"}, name="torch", withdrawn="2026-01-01T00:00:00Z"), make_report({"introduced": "0"}, name="not-in-an-image"),
    )  # fmt: skip
    completed_process = run_scan(str(database))
    pyyaml_version = packages.read_locked_versions(ROOT / "requirements/operator.lock")["pyyaml"]
    kopf_version = packages.read_locked_versions(ROOT / "requirements/operator.lock")["kopf"]
    assert completed_process.stdout.splitlines() == [
        f"kopf {kopf_version} (operator): PYSEC-2: no summary; no fixed version is known",
        f"pyyaml {pyyaml_version} (operator, trainer, cli): PYSEC-1: runs code; fixed in 9999",
        "2 findings in 3 reports",
    ]
    assert completed_process.returncode == 1


def run_scan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "scripts/scan.py", *arguments], capture_output=True, text=True)


def test_a_scan_without_findings_succeeds(tmp_path: Path) -> None:
    completed_process = run_scan(str(write_database(tmp_path, make_report({"introduced": "0"}, {"fixed": "0.1"}))))
    assert (completed_process.returncode, completed_process.stdout) == (0, "0 findings in 1 reports\n")


def test_a_folder_that_is_no_database_is_refused(tmp_path: Path) -> None:
    process_for_missing_folder, process_for_empty_folder = run_scan(str(tmp_path / "none")), run_scan(str(tmp_path))
    assert (process_for_missing_folder.returncode, process_for_missing_folder.stderr) == (
        2, f"scan: {tmp_path}/none: give one existing folder with vulnerability reports: make scan DB=folder\n",
    )  # fmt: skip
    assert (process_for_empty_folder.returncode, "contains no *.json file" in process_for_empty_folder.stderr) == (2, True)
    (tmp_path / "x.json").write_text("[1]")
    assert (run_scan(str(tmp_path)).returncode, "x.json is not a report in the OSV format" in run_scan(str(tmp_path)).stderr) == (2, True)


# ---- bills of materials and licences ----

FREE_LICENCES = {
    "MIT", "MIT-0", "MIT-CMU", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "ISC", "PSF-2.0", "0BSD", "Zlib", "CC0-1.0", "BSL-1.0", "CNRI-Python",
}  # fmt: skip
OTHER_LICENCES = {
    "certifi": "MPL-2.0", "tqdm": "MPL-2.0 AND MIT", "chardet": "LGPL-2.1-or-later",
    "cuda-toolkit": "no files: a package that only names the packages of NVIDIA's toolkit",
}
"""The licence of each package whose licence is not in FREE_LICENCES. docs/operations/licences.md describes these licences and NVIDIA's terms."""
NVIDIA = "LicenseRef-NVIDIA-Proprietary"


def list_all_packages() -> dict[str, packages.Package]:
    return {package.name: package for program in packages.PROGRAMS for package in packages.read_packages(program)}


def test_other_licences_than_permissive_ones_are_described() -> None:
    other_licences = {}
    for name, package in list_all_packages().items():
        licences = package.licence.replace("(", " ").replace(")", " ").replace(" WITH LLVM-exception", "").replace(" OR ", " AND ").split(" AND ")
        if not set(licences) <= FREE_LICENCES:
            other_licences[name] = package.licence
    assert {name: licence for name, licence in other_licences.items() if licence != NVIDIA} == OTHER_LICENCES
    text = (ROOT / "docs/operations/licences.md").read_text("utf-8")
    assert [name for name in other_licences if f"`{name}`" not in text] == []
    assert {name for name in other_licences if other_licences[name] == NVIDIA} == {name for name in list_all_packages() if name.startswith("nvidia-")} - {
        "nvidia-nccl-cu13", "nvidia-nvtx",
    }  # fmt: skip


def test_the_operator_and_the_command_line_contain_nothing_of_nvidia() -> None:
    for program in ("operator", "cli"):
        assert [package.name for package in packages.read_packages(program) if package.licence == NVIDIA] == []


def test_bills_of_materials_are_complete_and_equal_when_repeated(tmp_path: Path) -> None:
    first_files, second_files = ({path.name: path.read_bytes() for path in sbom.write_files(tmp_path / name)} for name in ("a", "b"))
    assert first_files == second_files
    assert set(first_files) == {"sbom-operator.cdx.json", "sbom-trainer.cdx.json", "sbom-cli.cdx.json", "licences.md"}
    for program in packages.PROGRAMS:
        bill = json.loads(first_files[f"sbom-{program}.cdx.json"])
        component_versions = {component["name"]: component["version"] for component in bill["components"]}
        assert component_versions == packages.read_locked_versions(ROOT / f"requirements/{program}.lock")
        assert (bill["specVersion"], bill["metadata"]["component"]["version"]) == ("1.6", "0.2.0")
        refs = {component["bom-ref"] for component in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
        assert {ref for entry in bill["dependencies"] for ref in (entry["ref"], *entry["dependsOn"])} == refs
    operator_bill = json.loads(first_files["sbom-operator.cdx.json"])
    (kopf_entry,) = [entry for entry in operator_bill["dependencies"] if entry["ref"].startswith("pkg:pypi/kopf@")]
    assert any(ref.startswith("pkg:pypi/aiohttp@") for ref in kopf_entry["dependsOn"])


def test_a_lock_file_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/operator.lock").write_text("kopf==0.0.1 \\\n    --hash=sha256:0\n")
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    with pytest.raises(packages.MissingPackage, match="the lock file has 0.0.1: run make setup"):
        packages.read_packages("operator")
