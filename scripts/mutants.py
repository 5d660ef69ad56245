"""`make mutants`: change a module in many small ways, one at a time, and report the changes that no test notices.

cosmic-ray runs in a separate environment (requirements/mutants.lock). cosmic-ray changes source files in place. Therefore it runs in a copy
of the checkout. Each module is tested with the tests of its package. MODULES="lease decide" selects modules. The documentation of cosmic-ray
explains the mutation operators. A surviving mutant is either equivalent to the original code or shows a missing test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prepare import ROOT
from smollm2 import cache

LOCK = ROOT / "requirements/mutants.lock"
OPERATOR_TESTS = "tests/unit/operator"
TRAINER_TESTS = "tests/unit/trainer"
MODULES = {
    "decide": ("operator/finetune_operator/decide.py", OPERATOR_TESTS),
    "act": ("operator/finetune_operator/act.py", OPERATOR_TESTS),
    "policies": ("operator/finetune_operator/policies", OPERATOR_TESTS),
    "lease": ("operator/finetune_operator/lease.py", f"{OPERATOR_TESTS}/test_lease.py"),
    "uploader": ("trainer-image/finetune_trainer/checkpoint/uploader.py", f"{TRAINER_TESTS}/checkpoint"),
    "supervisor": ("trainer-image/finetune_trainer/supervisor", f"{TRAINER_TESTS}/supervisor"),
    "template": ("trainer-image/finetune_trainer/data/template.py", "tests/unit/trainer_data"),
    "rules": ("crds/finetune_api/rules", "tests/unit/api"),
}
"""Modules with critical logic. Each module is listed with the tests that must fail if the module is changed."""
CONFIG = """\
[cosmic-ray]
module-path = {module!r}
timeout = {timeout}
excluded-modules = []
test-command = {command!r}

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""
"""Configuration of cosmic-ray. `|` is not mutated: annotations like `X | None` are not evaluated, so their mutants would be equivalent."""


@dataclass(frozen=True)
class Mutant:
    """One tested change."""

    line: int
    operator: str
    is_killed: bool


def install_cosmic_ray() -> Path:
    """Install cosmic-ray if it is not installed. Returns the folder of its programs."""
    folder = cache() / f"mutants-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    if not (folder / "bin/cosmic-ray").exists():
        uv = next(iter(cache().glob("uv-*/bin/uv")))
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", folder / "bin/python", "--require-hashes", "-r", LOCK]
        subprocess.run(install, check=True)
    return folder / "bin"


def copy_checkout(target: Path) -> None:
    """Copy all tracked files of the checkout to `target`, including uncommitted changes."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run(name: str, checkout: Path, timeout: float) -> list[Mutant]:
    """Test all mutants of one module. Errors: CalledProcessError if the unchanged module fails its tests."""
    module, tests = MODULES[name]
    command = f"{ROOT}/.venv/bin/python -m pytest -q -x -p no:cacheprovider -p no:xdist {tests}"
    (checkout / "mutants.toml").write_text(CONFIG.format(module=module, timeout=timeout, command=command))
    programs, session = install_cosmic_ray(), "mutants.sqlite"

    def call(program: str, *arguments: str) -> str:
        done = subprocess.run([programs / program, *arguments], cwd=checkout, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    (checkout / session).unlink(missing_ok=True)
    call("cosmic-ray", "baseline", "mutants.toml")
    call("cosmic-ray", "init", "mutants.toml", session)
    call("cr-filter-operators", session, "mutants.toml")
    call("cosmic-ray", "exec", "mutants.toml", session)
    return list(_results(call("cosmic-ray", "dump", session)))


def _results(dump: str) -> Iterator[Mutant]:
    for line in dump.splitlines():
        item, result = json.loads(line)
        if result is not None and result["worker_outcome"] != "skipped":
            (mutation,) = item["mutations"]
            is_killed = result["test_outcome"] != "survived"
            yield Mutant(mutation["start_pos"][0], f"{mutation['module_path']} {mutation['operator_name']}", is_killed)


def main() -> int:
    """Test the chosen modules. Print the share of killed mutants and the surviving mutants."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help=f"of {', '.join(MODULES)}; default: all")
    parser.add_argument("--timeout", type=float, default=120, help="maximum seconds for the tests of one mutant")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_checkout(Path(folder))
        for name in options.modules or MODULES:
            mutants = run(name, Path(folder), options.timeout)
            survivors = [mutant for mutant in mutants if not mutant.is_killed]
            killed = len(mutants) - len(survivors)
            print(f"{name}: {killed} of {len(mutants)} killed ({killed / max(1, len(mutants)):.0%})")
            for mutant in survivors:
                print(f"  line {mutant.line}: {mutant.operator}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
