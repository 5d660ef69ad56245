"""`finetune diff`."""

from __future__ import annotations

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile


def test_resolved_configurations_are_compared(run_command: RunCommand, write_file: WriteFile) -> None:
    first = write_file("a.yaml", JOB)
    second = write_file("b.yaml", JOB + "  training: {epochs: 3}\n")
    third = write_file("c.yaml", JOB + "  method: {type: full}\n")
    assert run_command("diff", first, second) == (0, "", "note: both jobs have the same configuration\n")
    rows = [line.split() for line in run_command("diff", first, third)[1].splitlines()]
    assert ["training.learningRate", "0.0002", "->", "2e-05"] in rows
    assert ["method.lora.rank", "16", "->", "-"] in rows
