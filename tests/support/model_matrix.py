"""Train every family of models with the methods, strategies and packing that users combine, and record which combinations work.

`python -m tests.support.model_matrix` runs the combinations that the record lacks (`--again`: all of them) and writes
`tests/support/model_matrix.json`. Then `make generate` writes docs/reference/models.md from this record. The combinations are run in the
environment of the tests, with the locked versions of the libraries, on CPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from finetune_api.names import ExitCode
from finetune_api.rules import RULES, ExecutionTarget
from finetune_api.spec import FineTuneJobSpec

from tests.support import families, vision
from tests.support.cells import Cell, Result, launch_cells, python_of_tests
from tests.support.learning import merge_mappings
from tests.support.matrix import RANKS_BY_STRATEGY, SPEC_BY_METHOD, WORKS_VERDICT

RECORD = Path(__file__).with_suffix(".json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed")
PACKED_SUFFIX = ", packed"
PACKED = {"dataset": {"packing": True, "maxSequenceLength": 128}}
TRIED: dict[str, tuple[str, ...]] = {
    "one rank": ("full", "lora", "lora, packed", "lora, 8-bit base", "qlora"),
    "ddp": ("lora",),
    "fsdp, fullShard": ("full", "qlora"),
    "deepspeed, ZeRO 3": ("full", "lora"),
}
"""Methods that are tried with each strategy. A method is a name in `matrix.SPEC_BY_METHOD`; `packed` means dataset.packing."""
ONE_RANK = "one rank"
CELLS_PER_LAUNCH = 16
SECONDS_PER_CELL = 60
STUCK_VERDICT = "failed: the run did not end"
Verdicts = dict[str, dict[str, dict[str, str]]]
"""Verdict by strategy, family and method: `yes`; `refused: ` with the message; or `failed: ` with the message."""


def family_names() -> list[str]:
    """All families: text models, then vision-language models."""
    return [*families.FAMILIES, *vision.FAMILIES]


def tried_cells(strategy: str) -> list[tuple[str, str]]:
    """Return the families and methods that are tried with a strategy. Families that only `make test-faults` trains are only tried on one rank."""
    is_slow = {name: family.is_slow for name, family in families.FAMILIES.items()} | dict.fromkeys(vision.SIMILAR_FAMILIES, True)
    names = [name for name in family_names() if strategy == ONE_RANK or not is_slow.get(name, False)]
    return [(name, method) for name in names for method in TRIED[strategy]]


def run_strategy(strategy: str, cells: Sequence[tuple[str, str]], folder: Path) -> dict[tuple[str, str], str]:
    """Run cells (family, method) with a strategy. Returns the verdict of each."""
    verdicts = {cell: refusal for cell in cells if (refusal := refusal_by_rules(strategy, *cell)) is not None}
    waiting = [cell for cell in cells if cell not in verdicts]
    while waiting:
        batch = waiting[:CELLS_PER_LAUNCH]
        results = _launch(strategy, batch, folder / str(len(waiting)))
        found = {cell: read_verdict(results[_name_of(*cell)]) for cell in batch if _name_of(*cell) in results}
        if len(found) < len(batch):
            found[next(cell for cell in batch if cell not in found)] = STUCK_VERDICT
        verdicts |= found
        waiting = [cell for cell in waiting if cell not in verdicts]
    return verdicts


def refusal_by_rules(strategy: str, family: str, method: str) -> str | None:
    """Return the verdict if a rule of the API refuses the combination, so that no pod starts; else None."""
    sources = {"model": {"source": "org/model"}, "dataset": {"train": "s3://data/train.jsonl"}}
    spec = FineTuneJobSpec.model_validate(merge_mappings(sources, _spec_of(strategy, family, method)))
    problems = ((rule.code, *problem) for rule in RULES for problem in rule.find_problems(spec, ExecutionTarget.CLUSTER))
    return next((f"refused: {code}: {path}: {message}; {hint}" for code, path, message, hint in problems), None)


def read_verdict(result: Result) -> str:
    """Return the verdict on a run that has ended."""
    if result.error is None:
        is_complete = len(result.losses) == 2 and any(name.endswith(".safetensors") for name in result.files)
        return WORKS_VERDICT if is_complete else "failed: no artefact"
    is_refused = result.error["exitCode"] == ExitCode.CONFIG_INVALID
    hint = f"; {result.error['hint']}" if is_refused and result.error["hint"] else ""
    return f"{'refused' if is_refused else 'failed'}: {result.error['code']}: {result.error['message']}{hint}"


def _name_of(family: str, method: str) -> str:
    return f"{family} | {method}"


def _launch(strategy: str, cells: Sequence[tuple[str, str]], folder: Path) -> dict[str, Result]:
    """Run cells in one launch. If a cell does not end, return the results before it."""
    try:
        return launch_cells(
            [_make_cell(strategy, family, method, folder) for family, method in cells], folder / "cells", rank_count=RANKS_BY_STRATEGY[strategy][0],
            timeout=SECONDS_PER_CELL * (2 + len(cells)), run_python=_run_python,
        )  # fmt: skip
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"a launch did not end: {error}"[-2000:], flush=True)
        file = folder / "cells" / "results.json"
        return {value["name"]: Result(**value) for value in json.loads(file.read_text())} if file.exists() else {}


def _spec_of(strategy: str, family: str, method: str) -> dict[str, Any]:
    rank_count, distributed = RANKS_BY_STRATEGY[strategy]
    spec = merge_mappings(SPEC_BY_METHOD[method.removesuffix(PACKED_SUFFIX)], {"training": {"maxSteps": 2}, "distributed": distributed})
    spec = merge_mappings(spec, {"resources": {"gpusPerNode": 0, "processesPerNode": rank_count}})
    if method.endswith(PACKED_SUFFIX):
        spec = merge_mappings(spec, PACKED)
    return spec if family in families.FAMILIES else merge_mappings(spec, {"model": {"modality": "visionLanguage"}})


def _make_cell(strategy: str, family: str, method: str, folder: Path) -> Cell:
    is_text, model = family in families.FAMILIES, folder / "models" / family
    if not model.exists():
        (families.make_family if is_text else vision.make_vision_model)(model, family)
    return Cell(_name_of(family, method), str(model), _spec_of(strategy, family, method), families.ROWS if is_text else vision.image_rows())


def _run_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes], timeout: float) -> int:
    """As `cells.run_python_of_tests`. After the timeout, the ranks are killed too: torchrun starts them in sessions of their own."""
    from finetune_trainer.processes import descendants

    process = subprocess.Popen(**python_of_tests(arguments, environment), stdout=output, stderr=subprocess.STDOUT)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(["kill", "-9", *map(str, [*descendants(process.pid), process.pid])], check=False)
        process.wait()
        raise


def read_record() -> Verdicts:
    """Return the recorded verdicts; empty without a record."""
    verdicts: Verdicts = json.loads(RECORD.read_text())["verdicts"] if RECORD.exists() else {}
    return verdicts


def recorded_versions() -> dict[str, str]:
    """Return the versions of the libraries that the recorded runs had."""
    versions: dict[str, str] = json.loads(RECORD.read_text())["versions"]
    return versions


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide which models work."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def write_record(verdicts: Verdicts) -> None:
    """Write the verdicts in the order of `TRIED` and of the families."""
    ordered = {
        strategy: {
            family: {method: verdicts[strategy][family][method] for method in methods if method in verdicts[strategy][family]}
            for family in family_names() if family in verdicts[strategy]
        }
        for strategy, methods in TRIED.items() if strategy in verdicts
    }  # fmt: skip
    RECORD.write_text(json.dumps({"versions": library_versions(), "verdicts": ordered}, indent=1) + "\n")


def main(options: Sequence[str]) -> None:
    """Run the combinations that are missing in the record, or all of them, and write the record after each launch."""
    verdicts: Verdicts = {} if "--again" in options else read_record()
    for strategy in TRIED:
        table = verdicts.setdefault(strategy, {})
        missing = [(family, method) for family, method in tried_cells(strategy) if method not in table.get(family, {})]
        for start in range(0, len(missing), CELLS_PER_LAUNCH):
            with tempfile.TemporaryDirectory() as folder:
                found = run_strategy(strategy, missing[start : start + CELLS_PER_LAUNCH], Path(folder))
            for (family, method), verdict in found.items():
                table.setdefault(family, {})[method] = verdict
                print(f"{strategy} | {family} | {method}: {verdict}", flush=True)
            write_record(verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
