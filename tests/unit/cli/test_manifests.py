"""Reading manifests."""

from __future__ import annotations

import pytest

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile


def test_anchors_and_merge_keys_are_read_as_in_kubectl(run_command: RunCommand, write_file: WriteFile) -> None:
    text = "model: {base_model: org/m}\nfine_tuning:\n  method: lora\n  lora:\n    <<: [{r: 8, alpha: 4}, {r: 3, dropout: 0.2}]\n    alpha: 6\n"
    code, out, _ = run_command("import", write_file("a.yaml", text))
    assert code == 0
    assert "      rank: 8\n      alpha: 6\n      dropout: 0.2\n" in out
    job = JOB + "  training: &t {epochs: 2}\n  checkpoint: {<<: {steps: 30}}\n"
    assert run_command("validate", write_file("job.yaml", job))[0] == 0
    stderr = run_command("validate", write_file("job.yaml", JOB + "  checkpoint: {<<: {stps: 30}}\n"))[2]
    assert "spec.checkpoint.stps: unknown field; did you mean spec.checkpoint.steps?" in stderr


def test_items_of_a_list_are_read(write_file: WriteFile, run_command: RunCommand) -> None:
    items = "\n".join(f"    {line}" for line in JOB.splitlines()).replace("    apiVersion", "  - apiVersion", 1)
    file = write_file("list.yaml", f"apiVersion: v1\nkind: List\nitems:\n{items}\n")
    assert run_command("validate", file) == (0, f"{file}: bot: ok\n", "")
    file = write_file("list.yaml", file.read_text(encoding="utf-8").replace("source:", "sorce:"))
    code, _, err = run_command("validate", file)
    assert code == 1
    assert f"{file}:8: spec.model.sorce: unknown field" in err


@pytest.mark.parametrize(
    "spec", ["[a]", "{model: {source: org/m}, resources: {nodes: two}}", "{model: {source: ~nobody-here/m}}"]
)
@pytest.mark.parametrize("words", [("run", "--local"), ("diff",)])
def test_invalid_spec_is_not_reported_as_a_bug(write_file: WriteFile, run_command: RunCommand, spec: str, words: tuple[str, ...]) -> None:
    file = write_file("job.yaml", JOB[: JOB.index("spec:")] + f"spec: {spec}\n")
    code, _, err = run_command(words[0], file, *words[1:], *([file] if words[0] == "diff" else []))
    assert "this is a bug" not in err
    assert code == 1 or "~nobody" in spec
