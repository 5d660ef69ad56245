"""Trains every model family with common combinations of method, strategy and packing, and records which combinations work.

`python -m tests.support.model_matrix` runs the combinations that are not recorded yet (with `--again` all combinations) and records the verdicts in
`tests/support/model_matrix.json`. After that, `make generate` writes docs/reference/models.md from this JSON file. The runs use only CPUs, and the Python
environment of the tests, which has the locked versions of the libraries.
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
from tests.support.cells import Cell, Result, build_test_python_call, launch_cells
from tests.support.learning import merge_mappings
from tests.support.matrix import RANKS_BY_STRATEGY, SPEC_BY_METHOD, WORKS_VERDICT

RECORD = Path(__file__).with_suffix(".json")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed")
PACKED_SUFFIX = ", packed"
PACKING_SPEC = {"dataset": {"packing": True, "maxSequenceLength": 128}}
METHODS_BY_STRATEGY: dict[str, tuple[str, ...]] = {
    "one rank": ("full", "lora", "lora, packed", "lora, 8-bit base", "qlora"),
    "ddp": ("lora",),
    "fsdp, fullShard": ("full", "qlora"),
    "deepspeed, ZeRO 3": ("full", "lora"),
}
"""For each strategy, the methods that are run with it. A method is a key of `matrix.SPEC_BY_METHOD`; the suffix `, packed` turns dataset.packing on."""
ONE_RANK = "one rank"
CELLS_PER_LAUNCH = 16
SECONDS_PER_CELL = 60
STUCK_VERDICT = "failed: the run did not end"
Verdicts = dict[str, dict[str, dict[str, str]]]
"""Verdict by strategy, family and method: `yes`, `refused: <message>` or `failed: <message>`."""


def list_families() -> list[str]:
    """Return the names of all families: first the text models, then the vision-language models."""
    return [*families.FAMILIES, *vision.FAMILIES]


def list_combinations(strategy: str) -> list[tuple[str, str]]:
    """Return the (family, method) pairs to run with a strategy. Slow families run on one rank only."""
    is_slow_by_family = {name: family.is_slow for name, family in families.FAMILIES.items()} | dict.fromkeys(vision.SIMILAR_FAMILIES, True)
    names = [name for name in list_families() if strategy == ONE_RANK or not is_slow_by_family.get(name, False)]
    return [(name, method) for name in names for method in METHODS_BY_STRATEGY[strategy]]


def run_strategy(strategy: str, cells: Sequence[tuple[str, str]], folder: Path) -> dict[tuple[str, str], str]:
    """Run (family, method) pairs with a strategy. Returns the verdict of each pair."""
    verdicts = {cell: refusal for cell in cells if (refusal := find_rule_refusal(strategy, *cell)) is not None}
    remaining_cells = [cell for cell in cells if cell not in verdicts]
    while remaining_cells:
        batch = remaining_cells[:CELLS_PER_LAUNCH]
        results = _launch(strategy, batch, folder / str(len(remaining_cells)))
        batch_verdicts = {cell: read_verdict(results[_make_cell_name(*cell)]) for cell in batch if _make_cell_name(*cell) in results}
        if len(batch_verdicts) < len(batch):
            batch_verdicts[next(cell for cell in batch if cell not in batch_verdicts)] = STUCK_VERDICT
        verdicts |= batch_verdicts
        remaining_cells = [cell for cell in remaining_cells if cell not in verdicts]
    return verdicts


def find_rule_refusal(strategy: str, family: str, method: str) -> str | None:
    """Return the verdict on a combination that a rule of the API package refuses before a pod starts; None if no rule refuses it."""
    sources = {"model": {"source": "org/model"}, "dataset": {"train": "s3://data/train.jsonl"}}
    spec = FineTuneJobSpec.model_validate(merge_mappings(sources, _make_spec(strategy, family, method)))
    problems = ((rule.code, *problem) for rule in RULES for problem in rule.find_problems(spec, ExecutionTarget.CLUSTER))
    return next((f"refused: {code}: {path}: {message}; {hint}" for code, path, message, hint in problems), None)


def read_verdict(result: Result) -> str:
    """Return the verdict on a finished run."""
    if result.error is None:
        is_complete = len(result.losses) == 2 and any(name.endswith(".safetensors") for name in result.files)
        return WORKS_VERDICT if is_complete else "failed: no artefact"
    is_refused = result.error["exitCode"] == ExitCode.CONFIG_INVALID
    hint = f"; {result.error['hint']}" if is_refused and result.error["hint"] else ""
    return f"{'refused' if is_refused else 'failed'}: {result.error['code']}: {result.error['message']}{hint}"


def _make_cell_name(family: str, method: str) -> str:
    return f"{family} | {method}"


def _launch(strategy: str, cells: Sequence[tuple[str, str]], folder: Path) -> dict[str, Result]:
    """Run cells in one launch. If a cell does not end within the timeout, return the results of the cells that ran before it."""
    try:
        return launch_cells(
            [_make_cell(strategy, family, method, folder) for family, method in cells], folder / "cells", rank_count=RANKS_BY_STRATEGY[strategy][0],
            timeout=SECONDS_PER_CELL * (2 + len(cells)), run_python=_run_python,
        )  # fmt: skip
    except (AssertionError, subprocess.TimeoutExpired) as error:
        print(f"a launch did not end: {error}"[-2000:], flush=True)
        file = folder / "cells" / "results.json"
        return {fields["name"]: Result(**fields) for fields in json.loads(file.read_text())} if file.exists() else {}


def _make_spec(strategy: str, family: str, method: str) -> dict[str, Any]:
    rank_count, distributed = RANKS_BY_STRATEGY[strategy]
    spec = merge_mappings(SPEC_BY_METHOD[method.removesuffix(PACKED_SUFFIX)], {"training": {"maxSteps": 2}, "distributed": distributed})
    spec = merge_mappings(spec, {"resources": {"gpusPerNode": 0, "processesPerNode": rank_count}})
    if method.endswith(PACKED_SUFFIX):
        spec = merge_mappings(spec, PACKING_SPEC)
    return spec if family in families.FAMILIES else merge_mappings(spec, {"model": {"modality": "visionLanguage"}})


def _make_cell(strategy: str, family: str, method: str, folder: Path) -> Cell:
    is_text, model = family in families.FAMILIES, folder / "models" / family
    if not model.exists():
        (families.make_family if is_text else vision.make_vision_model)(model, family)
    return Cell(_make_cell_name(family, method), str(model), _make_spec(strategy, family, method), families.ROWS if is_text else vision.make_image_rows())


def _run_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes], timeout: float) -> int:
    """Run Python like `cells.run_test_python`, but also kill the ranks after the timeout. The ranks must be killed one by one, because torchrun starts each
    rank in a separate session.
    """
    from finetune_trainer.processes import descendants

    process = subprocess.Popen(**build_test_python_call(arguments, environment), stdout=output, stderr=subprocess.STDOUT)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(["kill", "-9", *map(str, [*descendants(process.pid), process.pid])], check=False)
        process.wait()
        raise


def read_record() -> Verdicts:
    """Return the recorded verdicts, or an empty dict if there is no record yet."""
    verdicts: Verdicts = json.loads(RECORD.read_text())["verdicts"] if RECORD.exists() else {}
    return verdicts


def read_recorded_versions() -> dict[str, str]:
    """Return the library versions of the recorded runs."""
    versions: dict[str, str] = json.loads(RECORD.read_text())["versions"]
    return versions


def read_library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries on which the verdicts depend."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def write_record(verdicts: Verdicts) -> None:
    """Write the verdicts, in the order of METHODS_BY_STRATEGY and `list_families`, together with the library versions."""
    ordered_verdicts = {
        strategy: {
            family: {method: verdicts[strategy][family][method] for method in methods if method in verdicts[strategy][family]}
            for family in list_families() if family in verdicts[strategy]
        }
        for strategy, methods in METHODS_BY_STRATEGY.items() if strategy in verdicts
    }  # fmt: skip
    RECORD.write_text(json.dumps({"versions": read_library_versions(), "verdicts": ordered_verdicts}, indent=1) + "\n")


def main(options: Sequence[str]) -> None:
    """Run the combinations that are not recorded yet (with `--again` all), and write the record after each launch."""
    verdicts: Verdicts = {} if "--again" in options else read_record()
    for strategy in METHODS_BY_STRATEGY:
        family_verdicts = verdicts.setdefault(strategy, {})
        missing_combinations = [(family, method) for family, method in list_combinations(strategy) if method not in family_verdicts.get(family, {})]
        for start in range(0, len(missing_combinations), CELLS_PER_LAUNCH):
            with tempfile.TemporaryDirectory() as folder:
                new_verdicts = run_strategy(strategy, missing_combinations[start : start + CELLS_PER_LAUNCH], Path(folder))
            for (family, method), verdict in new_verdicts.items():
                family_verdicts.setdefault(family, {})[method] = verdict
                print(f"{strategy} | {family} | {method}: {verdict}", flush=True)
            write_record(verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
