"""The reference page about types of models shows recorded runs. New runs must have the recorded results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import model_matrix
from tests.support.cells import CHECKOUT_FOLDER, Result
from tests.support.matrix import WORKS_VERDICT

pytestmark = pytest.mark.pod


def make_error(exit_code: int, hint: str | None = "write y") -> dict[str, Any]:
    return {"code": "SomeCode", "message": "x is wrong", "hint": hint, "exitCode": exit_code}


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (Result("x", losses=[2.0, 1.0], files=["model.safetensors"]), WORKS_VERDICT),
        (Result("x", losses=[2.0], files=["model.safetensors"]), "failed: no artefact"),
        (Result("x", losses=[2.0, 1.0], files=["config.json"]), "failed: no artefact"),
        (Result("x", error=make_error(64)), "refused: SomeCode: x is wrong; write y"),
        (Result("x", error=make_error(64, None)), "refused: SomeCode: x is wrong"),
        (Result("x", error=make_error(70)), "failed: SomeCode: x is wrong"),
    ],
    ids=["trained", "too few steps", "no weights", "refused", "refused without a hint", "failed"],
)
def test_a_run_counts_as_working_only_with_all_steps_and_weights(result: Result, verdict: str) -> None:
    assert model_matrix.read_verdict(result) == verdict


def test_the_record_has_the_known_families_and_methods() -> None:
    """After a change of the families or methods, run `python -m tests.support.model_matrix` to record their runs."""
    record = model_matrix.read_record()
    assert list(record) == list(model_matrix.METHODS_BY_STRATEGY)
    for strategy, table in record.items():
        assert [(family, method) for family, verdicts in table.items() for method in verdicts] == model_matrix.list_combinations(strategy)


def test_the_record_was_made_with_the_locked_versions() -> None:
    """After an upgrade of a library, run `python -m tests.support.model_matrix --again` to record all runs again."""
    locked_versions = dict(re.findall(r"^([a-z0-9-]+)==([^ +]+)", (CHECKOUT_FOLDER / "requirements/trainer.lock").read_text(), re.MULTILINE))
    recorded_versions = model_matrix.read_recorded_versions()
    assert recorded_versions == {name: locked_versions[name] for name in model_matrix.LIBRARIES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", model_matrix.METHODS_BY_STRATEGY)
def test_new_runs_have_the_recorded_verdicts(strategy: str, tmp_path: Path) -> None:
    recorded_verdicts = {
        (family, method): verdict for family, verdicts in model_matrix.read_record()[strategy].items() for method, verdict in verdicts.items()
    }
    assert model_matrix.run_strategy(strategy, list(recorded_verdicts), tmp_path) == recorded_verdicts
