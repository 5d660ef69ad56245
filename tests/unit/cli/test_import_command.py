"""Options and output of `finetune import`."""

from __future__ import annotations

from pathlib import Path

from finetune_cli.importers import IMPORTER_NAMES
from finetune_cli.importers.registry import IMPORTERS

from tests.unit.cli.conftest import RunCommand, WriteFile
from tests.unit.cli.import_command import CASES_FOLDER


def test_tool_arguments_after_two_dashes_are_read(run_command: RunCommand) -> None:
    code, out, stderr = run_command(
        "import",
        CASES_FOLDER / "samples" / "env-A.env",
        "--name",
        "x",
        "-n",
        "team",
        "--storage",
        "s3://bucket/out",
        tool_arguments=("--epochs", "9"),
    )
    assert code == 0
    assert out.startswith(
        "apiVersion: finetune-operator.io/v1alpha1\nkind: FineTuneJob\nmetadata:\n  name: x\n  namespace: team\n"
    )
    assert "epochs: 9\n" in out
    assert "uri: s3://bucket/out\n" in out
    assert "warning: env-A.env:4: TRAIN_DATA_PATH:" in stderr


def test_the_option_from_offers_every_importer(run_command: RunCommand) -> None:
    assert [importer.name for importer in IMPORTERS.values()] == list(IMPORTER_NAMES)
    assert "|".join(IMPORTER_NAMES) in "".join(run_command("import", "--help")[1].split())


def test_refused_import_prints_no_manifest(run_command: RunCommand) -> None:
    code, out, stderr = run_command("import", CASES_FOLDER / "samples" / "env-R2.env")
    assert (code, out, len(stderr.splitlines())) == (1, "", 3)


def test_explain_lists_every_option(run_command: RunCommand) -> None:
    lines = run_command("import", CASES_FOLDER / "samples" / "env-A.env", "--explain")[1].splitlines()
    assert lines[0].split() == ["WRITTEN", "AS", "FIELD", "VALUE", "ORIGIN"]
    assert any(line.split() == ["LEARNING_RATE", "training.learningRate", "0.0002", "env-A.env:9"] for line in lines)
    assert any(line.split() == ["-", "training.maxGradNorm", "1", "hard-coded", "in", "the", "tool"] for line in lines)


def test_invalid_options_are_all_reported(run_command: RunCommand) -> None:
    stderr = run_command(
        "import", CASES_FOLDER / "samples" / "env-A.env", "--set", "training.sed=1", "--set", "training.seed", "--prompts", "x"
    )[2]
    assert stderr.splitlines() == [
        "error: --prompts: x: this is not the name and key of a ConfigMap; write NAME/KEY",
        "error: --set: training.sed: unknown field; did you mean training.seed?",
        "error: --set: training.seed: the value is missing; write --set training.seed=VALUE, or training.seed=null to remove the field",
    ]


def test_output_goes_to_a_file(run_command: RunCommand, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    assert run_command("import", CASES_FOLDER / "samples" / "env-A.env", "-o", path)[1] == ""
    assert path.read_text(encoding="utf-8").startswith("apiVersion:")


def test_output_must_not_be_an_input_file(write_file: WriteFile, run_command: RunCommand) -> None:
    text = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/d.jsonl\nDATASET_TYPE=qa\n"
    file = write_file("a.env", text)
    code, out, err = run_command("import", file, "-o", file)
    assert (code, out, file.read_text(encoding="utf-8")) == (1, "", text)
    assert "this file is one of the inputs" in err
