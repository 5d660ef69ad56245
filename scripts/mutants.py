"""`make mutants`: change a module in many small ways, one at a time, and report the changes that no test notices.

cosmic-ray runs in a separate environment (requirements/mutants.lock), and in copies of the checkout, because it changes source files in place.
The documentation of cosmic-ray explains the mutation operators. MODULES="lease decide" selects modules. A surviving mutant is either equivalent to the
original code, or shows that a test is missing.

Testing all mutants takes hours. With SAMPLE=150, 150 mutants of each module are tested, drawn at random with a fixed seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import queue
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prepare import ROOT
from smollm2 import cache_folder

LOCK_FILE = ROOT / "requirements/mutants.lock"
OPERATOR_FOLDER, TRAINER_FOLDER = "operator/finetune_operator", "trainer-image/finetune_trainer"
OPERATOR_TESTS, TRAINER_TESTS = "tests/unit/operator", "tests/unit/trainer"
PRELOADED_LIBRARIES = ("hypothesis", "aiohttp", "kopf", "kubernetes.aio", "boto3", "torch", "transformers", "ruamel.yaml")
"""Libraries that the test server imports once, so that the tests need not import them again."""
BATCH_SIZE = 20
"""Number of mutants that one worker tests in a row."""
MODULES = {
    "decide": (f"{OPERATOR_FOLDER}/decide.py", OPERATOR_TESTS),
    "act": (f"{OPERATOR_FOLDER}/act.py", OPERATOR_TESTS),
    "policies": (f"{OPERATOR_FOLDER}/policies", OPERATOR_TESTS),
    "lease": (f"{OPERATOR_FOLDER}/lease.py", f"{OPERATOR_TESTS}/test_lease.py"),
    "uploader": (f"{TRAINER_FOLDER}/checkpoint/uploader.py", f"{TRAINER_TESTS}/checkpoint"),
    "supervisor": (f"{TRAINER_FOLDER}/supervisor", f"{TRAINER_TESTS}/supervisor tests/pod/test_supervisor.py"),
    "template": (f"{TRAINER_FOLDER}/data/template.py", "tests/unit/trainer_data"),
    "rules": ("crds/finetune_api/rules", "tests/unit/api"),
}
"""Modules with critical logic, by name. Each entry has the module's path and its tests; for each mutant, at least one of these tests should fail."""
CONFIG_TEMPLATE = """\
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
    """One changed line of a source file, and whether a test noticed the change (`is_killed`)."""

    file: str
    line: int
    operator: str
    changed_line: str
    is_killed: bool


def install_cosmic_ray() -> Path:
    """Install cosmic-ray if necessary. Returns the folder that contains the programs of cosmic-ray."""
    folder = cache_folder() / f"mutants-{hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]}"
    if not (folder / "bin/cosmic-ray").exists():
        uv_program = next(iter(cache_folder().glob("uv-*/bin/uv")))
        subprocess.run([uv_program, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
        install_command = [uv_program, "pip", "install", "-q", "--python", folder / "bin/python", "--require-hashes", "-r", LOCK_FILE]
        subprocess.run(install_command, check=True)
    return folder / "bin"


def copy_checkout(target_folder: Path) -> None:
    """Copy all tracked files, including uncommitted changes."""
    joined_names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, joined_names.split("\0")):
        if (ROOT / name).is_file():
            (target_folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target_folder / name)


class MutationRun:
    """Tests mutants in several copies of the checkout at the same time."""

    def __init__(self, work_folder: Path, worker_count: int, timeout_seconds: float, sample_size: int | None, *, runs_only_own_tests: bool):
        self._programs_folder, self._timeout_seconds = install_cosmic_ray(), timeout_seconds
        self._sample_size, self._worker_count = sample_size, worker_count
        self._socket, self._runs_only_own_tests = work_folder / "tests.sock", runs_only_own_tests
        self._idle_checkouts: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(worker_count):
            checkout = work_folder / str(number)
            copy_checkout(checkout)
            self._idle_checkouts.put(checkout)

    @contextlib.contextmanager
    def run_test_server(self) -> Iterator[None]:
        """Run the server of `mutants_server.py`, which runs tests in forked processes."""
        python_program = ROOT / ".venv/bin/python"
        server_process = subprocess.Popen([python_program, ROOT / "scripts/mutants_server.py", "serve", self._socket, *PRELOADED_LIBRARIES])
        try:
            while not self._socket.exists():
                if server_process.poll() is not None:
                    raise RuntimeError(f"the test server ended with exit code {server_process.returncode} before it was ready")
                time.sleep(0.1)  # The test server is still importing the libraries.
            yield
        finally:
            server_process.kill()
            server_process.wait()

    def test_mutants_of_module(self, name: str) -> list[Mutant]:
        """Test the mutants of one module. Errors: CalledProcessError if the unchanged module fails its tests."""
        module_path, tests = MODULES[name]
        drawn_mutant_ids = self._draw_mutants(module_path, tests)
        batches = [
            (file, set(mutant_ids[start : start + BATCH_SIZE]))
            for file, mutant_ids in sorted(drawn_mutant_ids.items())
            for start in range(0, len(mutant_ids), BATCH_SIZE)
        ]
        with concurrent.futures.ThreadPoolExecutor(self._worker_count) as pool:
            mutants_of_batches = pool.map(lambda batch: self._test_batch(batch[0], batch[1], tests), batches)
            return [mutant for batch_mutants in mutants_of_batches for mutant in batch_mutants]

    def _draw_mutants(self, module: str, tests: str) -> dict[str, list[str]]:
        """Check that the tests pass on the unchanged module. Returns the ids of the mutants to test, by file."""
        with self._open_session(module, tests) as (checkout, session_file):
            self._run_program(checkout, "cosmic-ray", "baseline", "mutants.toml")
            with contextlib.closing(sqlite3.connect(session_file)) as database:
                query = (
                    "select module_path, operator_name, occurrence from mutation_specs"
                    " where job_id not in (select job_id from work_results) order by 1, 2, 3"
                )
                mutants = [(file, f"{operator} {number}") for file, operator, number in database.execute(query)]
        if self._sample_size is not None and self._sample_size < len(mutants):
            mutants = random.Random(0).sample(mutants, self._sample_size)
        return {file: [mutant_id for mutant_file, mutant_id in mutants if mutant_file == file] for file in {file for file, _ in mutants}}

    def _test_batch(self, file: str, mutant_ids: set[str], tests: str) -> list[Mutant]:
        """Test some mutants of one file. Tests named after the file run first, because they notice most changes quickly."""
        own_test_files = sorted(path for folder in tests.split() for path in (ROOT / folder).glob(f"**/test_{Path(file).stem}.py"))
        ordered_tests = [str(path.relative_to(ROOT)) for path in own_test_files]
        ordered_tests += [] if own_test_files and self._runs_only_own_tests else [tests]
        with self._open_session(file, *ordered_tests) as (checkout, session_file):
            with contextlib.closing(sqlite3.connect(session_file)) as database, database:
                rows = database.execute("select job_id, operator_name, occurrence from mutation_specs").fetchall()
                excluded_jobs = [(job,) for job, operator, number in rows if f"{operator} {number}" not in mutant_ids]
                for table in ("work_results", "mutation_specs", "work_items"):
                    database.executemany(f"delete from {table} where job_id = ?", excluded_jobs)
            self._run_program(checkout, "cosmic-ray", "exec", "mutants.toml", session_file.name)
            return list(_parse_results(self._run_program(checkout, "cosmic-ray", "dump", session_file.name)))

    @contextlib.contextmanager
    def _open_session(self, module: str, *tests: str) -> Iterator[tuple[Path, Path]]:
        """Yield a checkout, and the path of a session file of cosmic-ray that lists all mutants of `module`.

        For each mutant, cosmic-ray runs the groups of tests until one group fails.
        """
        client_command = [sys.executable, "-I", "-S", str(ROOT / "scripts/mutants_server.py"), "run", str(self._socket)]
        test_command = shlex.join([*client_command, *tests])
        checkout = self._idle_checkouts.get()
        try:
            (checkout / "mutants.toml").write_text(CONFIG_TEMPLATE.format(module=module, timeout=self._timeout_seconds, command=test_command))
            session_file = checkout / "mutants.sqlite"
            session_file.unlink(missing_ok=True)
            self._run_program(checkout, "cosmic-ray", "init", "mutants.toml", session_file.name)
            self._run_program(checkout, "cr-filter-operators", session_file.name, "mutants.toml")
            yield checkout, session_file
        finally:
            self._idle_checkouts.put(checkout)

    def _run_program(self, checkout: Path, program: str, *arguments: str) -> str:
        completed_process = subprocess.run(
            [self._programs_folder / program, *arguments], cwd=checkout, check=True, stdout=subprocess.PIPE, text=True
        )
        return completed_process.stdout


def _parse_results(session_dump: str) -> Iterator[Mutant]:
    for line in session_dump.splitlines():
        work_item, work_result = json.loads(line)
        if work_result is not None and work_result["worker_outcome"] != "skipped":
            (mutation,) = work_item["mutations"]
            is_killed = work_result["test_outcome"] != "survived"
            added_lines = [line[1:].strip() for line in (work_result["diff"] or "").splitlines() if line.startswith("+") and line[1:2] != "+"]
            operator = mutation["operator_name"].removeprefix("core/")
            yield Mutant(mutation["module_path"], mutation["start_pos"][0], operator, " ".join(added_lines), is_killed)


def print_result(name: str, mutants: list[Mutant]) -> None:
    """Print the share of killed mutants and the changed line of each survivor."""
    survivors = sorted((mutant for mutant in mutants if not mutant.is_killed), key=lambda mutant: (mutant.file, mutant.line))
    killed_count = len(mutants) - len(survivors)
    print(f"{name}: {killed_count} of {len(mutants)} killed ({killed_count / max(1, len(mutants)):.0%})", flush=True)
    for mutant in survivors:
        print(f"  {mutant.file}:{mutant.line}: {mutant.operator}: {mutant.changed_line}", flush=True)


def main() -> int:
    """Test the chosen modules, and print the share of killed mutants and the surviving mutants of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help=f"of {', '.join(MODULES)}; default: all")
    parser.add_argument("--timeout", type=float, default=120, help="maximum seconds for the tests of one mutant")
    parser.add_argument("--sample", type=int, help="test only this many mutants of each module, drawn at random")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="mutants that are tested at the same time")
    parser.add_argument("--own-tests", action="store_true", help="run only the tests named after the changed file, which is faster")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        mutation_run = MutationRun(
            Path(folder), options.workers, options.timeout, options.sample, runs_only_own_tests=options.own_tests
        )
        with mutation_run.run_test_server():
            for name in options.modules or MODULES:
                print_result(name, mutation_run.test_mutants_of_module(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
