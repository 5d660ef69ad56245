"""`make release` builds usable archives, whose bytes are equal if the commit is equal, and refuses wrong options. The CI workflow calls only make targets."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
URL = "https://downloads.example.com/v0.2.0"
IMAGE = f"registry.example.com/finetune-operator@sha256:{'ab' * 32}"
WHEEL = "finetune_operator-0.2.0-py3-none-any.whl"


def run_release(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, umask = [sys.executable, ROOT / "scripts/release.py", *arguments], int(variables.get("UMASK", "22"), 8)
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, umask=umask)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a clone of the repository")
    folder = tmp_path_factory.mktemp("release") / "first"
    completed_process = run_release(str(folder), "--url", URL, "--image", IMAGE, SOURCE_DATE_EPOCH="1800000000")
    assert completed_process.returncode == 0, completed_process.stderr
    return folder


def test_two_builds_have_equal_digests(release: Path, tmp_path: Path) -> None:
    completed_process = run_release(str(tmp_path / "second"), "--url", URL, "--image", IMAGE, SOURCE_DATE_EPOCH="1800000000", UMASK="77", TZ="Asia/Tokyo")
    assert completed_process.returncode == 0, completed_process.stderr
    first_sums, second_sums = ((folder / "SHA256SUMS").read_text() for folder in (release, tmp_path / "second"))
    assert first_sums == second_sums
    digests = dict(reversed(line.split("  ")) for line in first_sums.splitlines())
    assert set(digests) == {
        WHEEL, "finetune-operator-0.2.0.tgz", "kubectl-finetune-0.2.0.tar.gz", "finetunejobs.yaml", "finetune.yaml", "images.txt", "licences.md",
        "sbom-operator.cdx.json", "sbom-trainer.cdx.json", "sbom-cli.cdx.json",
    }  # fmt: skip
    assert {name: hashlib.sha256((release / name).read_bytes()).hexdigest() for name in digests} == digests


def test_the_archives_have_the_time_of_the_release_and_fixed_owners(release: Path) -> None:
    for name in ("finetune-operator-0.2.0.tgz", "kubectl-finetune-0.2.0.tar.gz"):
        with tarfile.open(release / name) as archive:
            members = archive.getmembers()
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(1800000000, 0, 0, "")}
        assert [member.name for member in members if member.mode != 0o644] == (["kubectl-finetune"] if name.startswith("kubectl") else [])
    with zipfile.ZipFile(release / WHEEL) as wheel:
        assert {member.date_time for member in wheel.infolist()} == {(2027, 1, 15, 8, 0, 0)}
        assert {member.external_attr >> 16 for member in wheel.infolist()} == {0o100644}
        assert "finetune_cli/main.py" in wheel.namelist()


def test_helm_reads_the_chart(release: Path, helm: Path) -> None:
    command = [helm, "template", "rel", release / "finetune-operator-0.2.0.tgz", "--set", "imageRegistry=r.example.com"]
    completed_process = subprocess.run(command, capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
    assert "kind: CustomResourceDefinition" in completed_process.stdout
    with tarfile.open(release / "finetune-operator-0.2.0.tgz") as archive:
        names = archive.getnames()
    assert names[0] == "finetune-operator/Chart.yaml" and not [name for name in names if name.endswith((".gotmpl", ".helmignore"))]


def test_the_krew_manifest_names_the_plugin_with_its_digest(release: Path) -> None:
    manifest = yaml.safe_load((release / "finetune.yaml").read_text())
    (platform,) = manifest["spec"]["platforms"]
    assert (manifest["metadata"]["name"], manifest["spec"]["version"]) == ("finetune", "v0.2.0")
    assert platform["uri"] == f"{URL}/kubectl-finetune-0.2.0.tar.gz"
    assert platform["sha256"] == hashlib.sha256((release / "kubectl-finetune-0.2.0.tar.gz").read_bytes()).hexdigest()
    assert (release / "images.txt").read_text() == f"{IMAGE}\n"


FAKE_PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
[ "$2" = venv ] || exit 0
mkdir -p "$4/bin"
printf '#!/bin/sh\necho "pip $*" >> "$LOG"\n' > "$4/bin/pip"
printf '#!/bin/sh\necho "finetune $*"\nexit 7\n' > "$4/bin/kubectl-finetune"
chmod +x "$4/bin/pip" "$4/bin/kubectl-finetune"
"""


def test_the_plugin_installs_its_packages_once(release: Path, tmp_path: Path) -> None:
    """The test unpacks the archive and links the program as krew does. Fake programs replace Python and pip, so that the test needs no package index."""
    with tarfile.open(release / "kubectl-finetune-0.2.0.tar.gz") as archive:
        archive.extractall(tmp_path / "store", filter="data")
    (tmp_path / "python3").write_text(FAKE_PYTHON)
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "kubectl-finetune").symlink_to(tmp_path / "store/kubectl-finetune")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "LOG": str(tmp_path / "log")}

    def run_plugin() -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "kubectl-finetune", "status", "bot"], env=env, capture_output=True, text=True)

    first_process, second_process = run_plugin(), run_plugin()
    assert (first_process.returncode, first_process.stdout) == (7, "finetune status bot\n")
    assert (second_process.returncode, second_process.stdout, second_process.stderr) == (7, "finetune status bot\n", "")
    log_lines = (tmp_path / "log").read_text().splitlines()
    environment = tmp_path / ".cache/finetune-operator" / WHEEL.removesuffix(".whl")
    assert [line for line in log_lines if " -c " not in line] == [
        f"python -m venv --clear {environment}",
        f"pip install -q --disable-pip-version-check --require-hashes -r {tmp_path}/store/requirements.lock",
        f"pip install -q --disable-pip-version-check --no-deps {tmp_path}/store/{WHEEL}",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://x"], "release: --url http://x: write the https:// address of the folder from which users download the files"),
        (["--image", "x:1"], "release: --image x:1: write name@sha256:digest, with the digest that the registry printed"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    completed_process = run_release(str(tmp_path / "out"), *arguments)
    assert (completed_process.returncode, completed_process.stderr) == (2, f"{message}\n")


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    completed_process = run_release(str(tmp_path))
    assert (completed_process.returncode, completed_process.stderr) == (2, f"release: {tmp_path} is not empty and contains no release: give a new folder\n")
    assert (tmp_path / "thesis.txt").exists()


def test_the_workflow_calls_only_make_targets(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github/workflows/checks.yml").read_text("utf-8"))
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (root / "Makefile").read_text("utf-8"), re.M))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert workflow["jobs"]["python"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert [step["run"] for step in steps if "run" in step and step["run"].removeprefix("make ").partition(" ")[0] not in targets] == []
    assert [step["uses"] for step in steps if "uses" in step and not re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])] == []
    assert workflow["permissions"] == {"contents": "read"}
    assert (root / workflow["jobs"]["test"]["steps"][2]["with"]["go-version-file"]).is_file()
