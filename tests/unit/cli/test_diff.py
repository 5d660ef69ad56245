"""`finetune diff`."""

from __future__ import annotations

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile


def test_resolved_configurations_are_compared(run_command: RunCommand, write_file: WriteFile) -> None:
    first_path = write_file("a.yaml", JOB)
    path_with_epochs = write_file("b.yaml", JOB + "  training: {epochs: 3}\n")
    path_with_full_method = write_file("c.yaml", JOB + "  method: {type: full}\n")
    assert run_command("diff", first_path, path_with_epochs) == (0, "", "note: both jobs have the same configuration\n")
    rows = [line.split() for line in run_command("diff", first_path, path_with_full_method)[1].splitlines()]
    assert ["training.learningRate", "0.0002", "->", "2e-05"] in rows
    assert ["method.lora.rank", "16", "->", "-"] in rows
