"""`finetune diff`."""

from __future__ import annotations

from tests.unit.cli.conftest import JOB, Call, Write


def test_resolved_configurations_are_compared(call: Call, write: Write) -> None:
    first = write("a.yaml", JOB)
    second = write("b.yaml", JOB + "  training: {epochs: 3}\n")
    third = write("c.yaml", JOB + "  method: {type: full}\n")
    assert call("diff", first, second) == (0, "", "note: both jobs have the same configuration\n")
    rows = [line.split() for line in call("diff", first, third)[1].splitlines()]
    assert ["training.learningRate", "0.0002", "->", "2e-05"] in rows
    assert ["method.lora.rank", "16", "->", "-"] in rows
