"""The wheel is built from the checkout, and pip installs it into an empty environment with only the packages of requirements/cli.lock."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("crds/finetune_api", "operator/finetune_operator", "trainer-image/finetune_trainer", "cli/finetune_cli", "localcluster")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements")
HEAVY_PACKAGES = ("torch", "transformers", "kopf")


@dataclass(frozen=True)
class InstalledWheel:
    """A Python environment in which the wheel is installed. `folder` is the working folder and the home folder of the programs that run in it."""

    environment: Path
    folder: Path

    def run(self, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the Python environment. Its environment variables are only `variables`, PATH and HOME."""
        env = {"PATH": f"{self.environment / 'bin'}:/usr/bin:/bin", "HOME": str(self.folder), **variables}
        return subprocess.run([self.environment / "bin" / program, *arguments], env=env, cwd=self.folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> InstalledWheel:
    """Build the wheel in a copy of the checkout, and install it with pip into a new environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, home = folder / "source", folder / "home"
    home.mkdir()
    for name in (*PACKAGES, *FILES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    program = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, folder], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True, capture_output=True)
    link_locked_packages(next((folder / "env/lib").glob("python*/site-packages")))
    installed_wheel = InstalledWheel(folder / "env", home)
    completed_process = installed_wheel.run("pip", "install", "--no-index", "--disable-pip-version-check", str(wheel))
    assert completed_process.returncode == 0, completed_process.stdout + completed_process.stderr
    return installed_wheel


def link_locked_packages(site_packages: Path) -> None:
    """Link the packages of requirements/cli.lock from the Python environment of the tests into `site_packages`, so that no network is needed."""
    for name in read_locked_names():
        package = distribution(name)
        top_names = {file.parts[0] for file in package.files or [] if ".." not in file.parts and file.parts[0] != "__pycache__"}
        for top_name in top_names:
            path = Path(str(package.locate_file(top_name)))
            if path.exists() and not (site_packages / top_name).exists():
                (site_packages / top_name).symlink_to(path)


def read_locked_names() -> Iterator[str]:
    text = (ROOT / "requirements/cli.lock").read_text(encoding="utf-8")
    for name, version, marker in re.findall(r"^([\w.-]+)==(\S+)(?: ; (.*?))?(?: \\)?$", text, re.MULTILINE):
        if not marker:
            assert distribution(name).version == version, f"{name} differs from requirements/cli.lock"
            yield name


def test_dependencies_of_the_wheel_are_complete(installed: InstalledWheel) -> None:
    completed_process = installed.run("pip", "check", "--disable-pip-version-check")
    assert (completed_process.returncode, completed_process.stdout) == (0, "No broken requirements found.\n")


def test_programs_of_the_wheel_work(installed: InstalledWheel) -> None:
    assert installed.run("finetune", "--version").stdout == "finetune 0.2.0\n"
    assert installed.run("kubectl-finetune", "--version").stdout == "kubectl finetune 0.2.0\n"
    init_process = installed.run("finetune", "init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", "-o", "job.yaml")
    assert (init_process.returncode, init_process.stdout) == (0, ""), init_process.stderr
    validate_process = installed.run("finetune", "validate", "job.yaml")
    assert validate_process.returncode == 0, validate_process.stderr
    (installed.folder / "t.jsonl").write_text("{}\n")
    upload_process = installed.run("finetune", "upload", "t.jsonl", f"file://{installed.folder}/data/")
    assert (upload_process.returncode, (installed.folder / "data/t.jsonl").read_text()) == (0, "{}\n"), upload_process.stderr
    doctor_process = installed.run("finetune", "doctor", "--kubeconfig", "none")
    assert (doctor_process.returncode, doctor_process.stdout.startswith("✗ cluster   no cluster: --kubeconfig none")) == (2, True), doctor_process.stderr


def test_openai_server_has_all_its_packages(installed: InstalledWheel) -> None:
    """The image of the command line contains the same packages as this environment. The server imports all packages that it needs before it connects to the
    cluster.
    """
    text = (ROOT / "docs/guides/openai.md").read_text("utf-8")
    for name, content in re.findall(r"```yaml title=\"(.*?)\"\n(.*?)```", text, re.DOTALL):
        (installed.folder / name).write_text(content, "utf-8")
    completed_process = installed.run("finetune", "serve-openai", "--config", "server.yaml", "--keys", "keys.yaml", "--kubeconfig", "none")
    assert (completed_process.returncode, completed_process.stderr) == (1, "error: no cluster: --kubeconfig none: there is no such file\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_printed(installed: InstalledWheel, shell: str) -> None:
    completed_process = installed.run("finetune", "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (completed_process.returncode, "_FINETUNE_COMPLETE=complete_" in completed_process.stdout) == (0, True), completed_process.stderr
    completion_process = installed.run("finetune", _FINETUNE_COMPLETE="complete_bash", COMP_WORDS="finetune down", COMP_CWORD="1")
    assert completion_process.stdout.split() == ["download"]


def test_environment_of_the_wheel_lacks_the_heavy_packages(installed: InstalledWheel) -> None:
    completed_process = installed.run("python", "-c", f"import importlib.util as u; print([n for n in {HEAVY_PACKAGES} if u.find_spec(n)])")
    assert completed_process.stdout == "[]\n"
