"""`finetune replay`: the spec of the repeated run, runs that it refuses to repeat, and the reasons why the weights of the two runs may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.lineage import Statement
from finetune_cli.commands.replay import _print_result
from finetune_cli.replay import (
    ReplayOptions,
    ReplayRefused,
    ReplayResult,
    WeightComparison,
    _prepare_replay,
    find_reasons_to_differ,
    make_replay_spec,
)

from tests.support.lineage import write_finished_run
from tests.unit.cli.conftest import RunCommand


@pytest.fixture(scope="module")
def statement(tmp_path_factory: pytest.TempPathFactory) -> Statement:
    root = write_finished_run(tmp_path_factory.mktemp("run"))
    return Statement.model_validate_json((root / "lineage/statement.json").read_bytes())


def change_statement(statement: Statement, path: str, value: Any) -> Statement:
    """Return a copy of the statement that has `value` at this dotted path of its JSON."""
    wire = statement.to_wire()
    *groups, name = path.split(".")
    parent: Any = wire
    for group in groups:
        parent = parent[int(group)] if isinstance(parent, list) else parent.setdefault(group, {})
    parent[name] = value
    return Statement.model_validate(wire)


PARAMETERS = "predicate.buildDefinition"


def test_a_replay_publishes_and_reports_nothing_and_keeps_defaults(statement: Statement) -> None:
    spec = f"{PARAMETERS}.externalParameters.spec"
    run_statement = change_statement(statement, f"{spec}.output", {"hub": {"push": True}})
    run_statement = change_statement(run_statement, f"{spec}.tracking", {"reportTo": ["wandb"], "loggingSteps": 1})
    run_statement = change_statement(run_statement, f"{spec}.evaluation", {"metrics": ["perplexity"], "steps": 5})
    run_statement = change_statement(run_statement, f"{spec}.training.epochs", 2.0)
    run_statement = change_statement(run_statement, f"{PARAMETERS}.internalParameters.defaults", ["training.epochs", "training.seed"])
    replay_spec, defaults = make_replay_spec(run_statement)
    assert (replay_spec["tracking"], replay_spec["evaluation"]) == ({"loggingSteps": 1}, {"steps": 5})
    assert not {"output", "placement", "phases", "storage", "policy"} & replay_spec.keys()
    assert defaults == {"training.epochs": 2.0, "training.seed": 42}
    assert "epochs" not in replay_spec["training"] and "seed" not in replay_spec["training"]


def test_an_address_that_was_redacted_must_be_given(statement: Statement, tmp_path: Path) -> None:
    with pytest.raises(ReplayRefused, match=r"^SourceRedacted: .* in dataset\.test, .*--set dataset\.test=URI"):
        _prepare_replay(statement, tmp_path, ReplayOptions())


def test_another_number_of_ranks_is_refused(statement: Statement, tmp_path: Path) -> None:
    run_statement = change_statement(statement, "predicate.runDetails.finetune_run.facts.worldSize", 8)
    folder_uri = statement.spec["model"]["source"].removesuffix("/base")
    with pytest.raises(ReplayRefused, match="^WorldSizeDiffers: the run had 8 ranks, but this machine runs 1"):
        _prepare_replay(run_statement, tmp_path, ReplayOptions(set_texts=[f"dataset.test={folder_uri}/test.jsonl"]))


def test_reasons_name_devices_versions_and_changed_values(statement: Statement) -> None:
    assert list(find_reasons_to_differ(statement, statement)) == []
    gpu_statement = change_statement(statement, "predicate.runDetails.finetune_run.attempts.0.resolved.device", "NVIDIA H100")
    assert list(find_reasons_to_differ(gpu_statement, statement)) == ["the run used NVIDIA H100; equal weights are only expected on CPUs"]
    older_statement = change_statement(statement, "predicate.runDetails.builder.version.python", "2.0.0")
    current_version = statement.predicate.run_details.builder.version["python"]
    assert list(find_reasons_to_differ(older_statement, statement)) == [f"library versions differ: python 2.0.0 -> {current_version}"]
    adapted_statement = change_statement(statement, f"{PARAMETERS}.internalParameters.originalValues", {"training.batchSizePerDevice": 8})
    assert [reason.partition(" between")[0] for reason in find_reasons_to_differ(adapted_statement, statement)] == ["the operator changed values of the spec"]


def test_exit_code_is_0_only_for_equal_weights(capsys: pytest.CaptureFixture[str]) -> None:
    equal_weights = WeightComparison(tensors=3, equal=True, different_tensors=0)
    assert (_print_result(ReplayResult(equal_weights, ["a reason"])), capsys.readouterr().out.split(":")[0]) == (0, "equal")
    different_weights = WeightComparison(tensors=3, equal=False, different_tensors=1, largest_difference=0.25, largest_in="w", mismatched=["v"])
    assert _print_result(ReplayResult(different_weights, [])) == 2
    expected = "different: 1 of 3 tensors have other values; the largest difference is 0.25, in w; 1 tensors are missing"
    assert capsys.readouterr().out.startswith(expected)


def test_folder_for_keep_must_be_new(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "file").touch()
    code, _, stderr = run_command("replay", f"file://{tmp_path}", "--keep", tmp_path)
    assert (code, "the folder is not empty" in stderr) == (1, True)
