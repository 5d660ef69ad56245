"""Every strategy writes reference values on two ranks, and the stored artefact computes the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.enums import OutputKind
from finetune_api.status import VerificationOutcome
from finetune_trainer.channel import Channel
from finetune_trainer.stages.verify import Artefact, Verifier
from finetune_trainer.verification.reference import FILE_NAME, ReferenceValues

from tests.support.cells import Cell, Result, launch_cells
from tests.support.learning import TEN_ROWS, make_run, merge_mappings

pytestmark = [pytest.mark.pod, pytest.mark.slow, pytest.mark.timeout(400)]
LORA_SPEC: dict[str, Any] = {"method": {"lora": {"dropout": 0}}}
FULL_SPEC: dict[str, Any] = {"method": {"type": "full", "lora": None}}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp lora": (LORA_SPEC, {"strategy": "ddp"}),
    "fsdp lora": (LORA_SPEC, {"strategy": "fsdp"}),
    "fsdp full": (FULL_SPEC, {"strategy": "fsdp"}),
    "zero 2 full": (FULL_SPEC, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}),
    "zero 3 lora": (LORA_SPEC, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}),
    "zero 3 full": (FULL_SPEC, {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}),
}


def make_spec(name: str) -> dict[str, Any]:
    method, strategy = RUNS[name]
    return merge_mappings(method, {"distributed": strategy, "output": {"verify": True}, "training": {"learningRate": 1e-2}})


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    cells = [Cell(name, str(model), make_spec(name), TEN_ROWS, keep=True) for name in RUNS]
    return launch_cells(cells, tmp_path_factory.mktemp("cells"), rank_count=2)


@pytest.mark.parametrize("name", RUNS)
def test_the_stored_artefact_of_every_strategy_computes_what_was_trained(name: str, results: dict[str, Result], model: Path, tmp_path: Path) -> None:
    result = results[name]
    assert result.error is None, result.error
    folder, kind = Path(result.folder), OutputKind(str(result.kind))
    reference = ReferenceValues.model_validate_json((folder / FILE_NAME).read_text())
    assert reference.reason is None and len(reference.rows) == 8
    run, inputs = make_run(tmp_path, model, make_spec(name))
    (verification,) = Verifier(run, Channel.create_recording(tmp_path / "work"), inputs, reference).verify([Artefact(kind.value, folder / "final", kind)])
    assert verification.result is VerificationOutcome.VERIFIED and (verification.change_from_base or 0) > 1e-3, verification
