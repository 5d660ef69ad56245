"""`--set`, and the options of `finetune import` that set one field of the spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import RunCommand, WriteFile

ENV_CONFIG = "MODEL_NAME=gpt2\nTRAIN_DATA_PATH=s3://data/t.jsonl\nDATASET_TYPE=mcq_jsonl\n"


def list_error_lines(stderr: str, folder: Path) -> list[str]:
    """Return the error lines of a command, without the path of the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in stderr.splitlines()
        if line.startswith("error: ")
    ]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--set", "training"], "--set: training: the value is missing; write --set training=VALUE, or training=null to remove the field"),
        (["--set", "training=3"], "--set: training: this is a group of fields and takes no value; set its fields, for example --set training.epochs=VALUE, "
                                  "or remove the group with --set training=null"),
        (["--set", "training.epochs="], "--set: training.epochs: the value is missing; write --set training.epochs=VALUE, "
                                    "or training.epochs=null to remove the field"),
        (["--set", "training.epochs=.nan"], "--set: training.epochs: '.nan': should be a valid number, unable to parse string as a number; "
         "for example --set training.epochs=1 (spec.training.epochs)"),
        (["--set", "training.epochs=1e999"], "--set: training.epochs: inf: should be a finite number; "
         "for example --set training.epochs=1 (spec.training.epochs)"),
        (["--set", "trainer.rewards[0].weight=2"], "--set: trainer.rewards[0].weight: unknown field; set the whole list: --set 'trainer.rewards=[...]'"),
        (["--set", "training.schedulerParameters.x=1"], "--set: training.schedulerParameters.x: unknown field; set the whole map: "
                                                        "--set 'training.schedulerParameters={NAME: VALUE}'"),
        (["--set", "=3"], "--set: unknown field; `finetune explain` lists all fields"),
        (["--name", "A"], "--name: A: this cannot be the name of a FineTuneJob; write at most 40 characters a-z, 0-9 and -, beginning with a letter"),
        (["--name", "a" * 41], f"--name: {'a' * 41}: this cannot be the name of a FineTuneJob; "
                               "write at most 40 characters a-z, 0-9 and -, beginning with a letter"),
        (["--namespace", "A B"], "--namespace: A B: this cannot be the name of a namespace; write at most 63 characters a-z, 0-9 and -"),
        (["--storage", "x"], "--storage: 'x' is not s3://bucket/prefix, pvc://claim/path or file:///path; "
         "for example --storage s3://models/finetune (spec.storage.uri)"),
        (["--set", "storage.uri=x"], "--set: storage.uri: 'x' is not s3://bucket/prefix, pvc://claim/path or file:///path; "
                                     "for example --set storage.uri=s3://models/finetune (spec.storage.uri)"),
        (["--data", ""], "--data: the value is empty; for example --data s3://data/train.jsonl (spec.dataset.train)"),
        (["--gpus", "-1"], "--gpus: -1: should be greater than or equal to 0; for example --gpus 8 (spec.resources.gpusPerNode)"),
        (["--prompts", "A_B/k"], "--prompts: A_B/k: this is not the name and key of a ConfigMap; write NAME/KEY"),
        (
            ["--from", "nobody"],
            "--from: nobody: there is no importer with this name; write one of env, toml, yaml, hydra, guide, openai, axolotl, llamafactory, "
            "trl, unsloth, together, torchtune, kubeflow",
        ),
        (["-o", "/proc/nobody/x.yaml"], "/proc/nobody/x.yaml cannot be written: No such file or directory; choose another path with -o"),
    ],
)  # fmt: skip
def test_invalid_option_is_refused(run_command: RunCommand, write_file: WriteFile, option: list[str], expected: str) -> None:
    path = write_file("a.env", ENV_CONFIG)
    code, out, stderr = run_command("import", path, *option)
    assert (code, out, list_error_lines(stderr, path.parent)) == (1, "", [expected])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("storage.uri=x", "--set: storage.uri: 'x' is not s3://bucket/prefix, pvc://claim/path or file:///path; "
         "for example --set storage.uri=s3://models/finetune"),
        ("trainer.rewards=x", "--set: trainer.rewards[0]: 'x': should be an object; for example --set 'trainer.rewards=[{name: format, builtin: regex}]'"),
        ("training.epochs=x", "--set: training.epochs: 'x': should be a valid number; for example --set training.epochs=1"),
    ],
)  # fmt: skip
def test_local_run_names_the_option_with_the_invalid_value(
    run_command: RunCommand, write_file: WriteFile, tmp_path: Path, value: str, expected: str
) -> None:
    manifest = write_file("job.yaml", run_command("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl")[1])
    code, out, stderr = run_command("run", manifest, "--local", "-o", tmp_path / "out", "--set", value)
    assert (code, out, list_error_lines(stderr, tmp_path)) == (1, "", [expected])


def test_set_reads_lists_maps_and_words(run_command: RunCommand, write_file: WriteFile) -> None:
    code, out, _ = run_command(
        "import", write_file("a.env", ENV_CONFIG), "--set", "method.lora.targetModules=q_proj,v_proj", "--set", "training.schedulerParameters={x: 1, z: true}",
        "--set", "dataset.systemPrompt=no",
    )  # fmt: skip
    assert code == 0
    assert "targetModules: [q_proj, v_proj]" in out
    assert '      x: "1"\n      z: "true"\n' in out
    assert 'systemPrompt: "no"' in out
