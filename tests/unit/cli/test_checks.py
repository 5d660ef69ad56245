"""Offline checks of a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile

TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"


def list_error_lines(stderr: str, folder: Path) -> list[str]:
    """Return the error lines of a command, without the path of the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in stderr.splitlines()
        if line.startswith("error: ")
    ]


def test_secret_in_a_manifest_is_a_warning_and_an_error_with_strict(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB + f"  placement: {{env: [{{name: X, value: {TOKEN}}}]}}\n")
    code, _, stderr = run_command("validate", path)
    assert (code, "warning: " in stderr, "spec.placement.env: the value looks like a token" in stderr) == (
        0,
        True,
        True,
    )
    assert run_command("validate", "--strict", path)[0] == 1


@pytest.mark.parametrize(
    ("more_lines", "expected"),
    [
        ("  method: ~\n  training:\n", []),
        ("  storage: {uri: 's3://models/x', credentialsSecretRef: {name: 3}}\n",
         ["job.yaml:7: spec.storage.credentialsSecretRef.name: 3: should be a valid string; quote it: \"3\" [ValueInvalid]"]),
        ("  storage: {uri: 'http://x', credentialsSecretRef: {}}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: this required field is missing; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:7: spec.storage.uri: 'http://x' is not s3://bucket/prefix, pvc://claim/path or file:///path; "
            "for example uri: s3://models/finetune [ValueInvalid]",
        ]),
        ("  storage: {credentialsSecretRef: {}}\n  training: {warmupSteps: 1, warmupRatio: 0.1}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: this required field is missing; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:8: spec.training.warmupRatio: warmupSteps 1 and warmupRatio 0.1 exclude each other; remove warmupSteps or warmupRatio [WarmupTwice]",
        ]),
        ("  trainer: {type: grpo, rewards: [3]}\n", [
            "job.yaml:7: spec.trainer.rewards[0]: 3: should be an object; "
            "write for example {name: format, builtin: regex} [ValueInvalid]"]),
        ("  training: hello\n", ["job.yaml:7: spec.training: 'hello': should be an object; write for example training: {epochs: 1} [ValueInvalid]"]),
        ("  training: {epochs: .nan, seed: 99999999999}\n", [
            "job.yaml:7: spec.training.epochs: '.nan': should be a valid number; for example epochs: 1 [ValueInvalid]",
            "job.yaml:7: spec.training.seed: 99999999999: should be less than or equal to 4294967295; for example seed: 7 [ValueInvalid]",
        ]),
        ("  training: &a {x: *a}\n", ["job.yaml:7: spec.training.x: the alias refers to a value that contains it; write the value itself"]),
    ],
)  # fmt: skip
def test_invalid_spec_is_refused_with_line_and_hint(run_command: RunCommand, write_file: WriteFile, more_lines: str, expected: list[str]) -> None:
    path = write_file("job.yaml", JOB + more_lines)
    code, _, stderr = run_command("validate", path)
    assert (code, list_error_lines(stderr, path.parent)) == (1 if expected else 0, expected)


@pytest.mark.parametrize("split", ["{train: 0}", "{train: 0, validation: 0.5, test: 0.5}", "{train: 0, validation: 1}"])
def test_split_without_training_rows_is_refused(run_command: RunCommand, write_file: WriteFile, split: str) -> None:
    path = write_file("job.yaml", JOB.replace('t.jsonl"', f't.jsonl", split: {split}'))
    code, _, stderr = run_command("validate", path)
    assert code == 1
    assert list_error_lines(stderr, path.parent) == [
        "job.yaml:6: spec.dataset.split.train: 0: should be greater than 0; for example train: 0.8 [ValueInvalid]"
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: bot", "name: 3", [
            "job.yaml:3: metadata.name: '3' cannot be the name of a FineTuneJob; "
            "write at most 40 characters a-z, 0-9 and -, beginning with a letter [NameInvalid]"]),
        ("name: bot", "name: bot, labels: {a: 1, b: true}, anotations: {}", [
            "job.yaml:3: metadata.anotations: unknown field; did you mean metadata.annotations? [UnknownField]",
            'job.yaml:3: metadata.labels.a: 1 is not a string; quote it: "1" [ValueInvalid]',
            'job.yaml:3: metadata.labels.b: true is not a string; quote it: "true" [ValueInvalid]']),
        ("kind: FineTuneJob", "kind: FinetuneJob", ["job.yaml:2: kind: FinetuneJob is not FineTuneJob; write kind: FineTuneJob [Kind]"]),
        ("apiVersion: finetune-operator.io/v1alpha1\n", "",
         ["job.yaml: apiVersion: this required field is missing; write apiVersion: finetune-operator.io/v1alpha1 [ApiVersion]"]),
    ],
)  # fmt: skip
def test_invalid_metadata_is_refused(run_command: RunCommand, write_file: WriteFile, old: str, new: str, expected: list[str]) -> None:
    path = write_file("job.yaml", JOB.replace(old, new))
    code, _, stderr = run_command("validate", path)
    assert (code, list_error_lines(stderr, path.parent)) == (1, expected)


@pytest.mark.parametrize(
    ("more_lines", "error"),
    [
        ("  training.learningRate: 0.5\n",
         "spec.training.learningRate: a key with dots does not select a nested field; write training: {learningRate: 0.5}"),
        ("  method: {lora.rank: 8}\n", "spec.method.lora.rank: a key with dots does not select a nested field; write lora: {rank: 8}"),
        ("  resources: {gpus: 1}\n", "spec.resources.gpus: unknown field; did you mean spec.resources.gpusPerNode?"),
        ("  training: {num_gpus: 1}\n", "spec.training.num_gpus: unknown field; did you mean spec.resources.gpusPerNode?"),
        ("  training: {lr: 1.0e-4}\n", "spec.training.lr: unknown field; did you mean spec.training.learningRate?"),
        ("  method: {lora: {r: 8}}\n", "spec.method.lora.r: unknown field; did you mean spec.method.lora.rank?"),
        ("  method: {lora_alpha: 8}\n", "spec.method.lora_alpha: unknown field; did you mean spec.method.lora.alpha?"),
        ("  training: {batch_size: 8}\n", "spec.training.batch_size: unknown field; did you mean spec.training.batchSizePerDevice?"),
        ("  evaluation: {batch_size: 8}\n", "spec.evaluation.batch_size: unknown field; did you mean spec.evaluation.batchSizePerDevice?"),
        ("  training: {learning_rate: 8}\n", "spec.training.learning_rate: unknown field; did you mean spec.training.learningRate?"),
        ("  trainer: {token: x}\n", "spec.trainer.token: unknown field; did you mean spec.model.tokenSecretRef? "
                                    "For example tokenSecretRef: {name: hub-token, key: token}"),
        ("  training: {optimizer: adamw}\n", "spec.training.optimizer: 'adamw' is not a supported optimizer; write adamw_torch_fused"),
        ("  training: {optimizer: adamw_8bitt}\n", "spec.training.optimizer: 'adamw_8bitt' is not a supported optimizer; did you mean adamw_8bit?"),
        ("  policy: {activeDeadlineSeconds: 1h}\n", "spec.policy.activeDeadlineSeconds: '1h': should be a valid integer; write 3600"),
        ("  policy: {activeDeadlineSeconds: 1h30m}\n", "spec.policy.activeDeadlineSeconds: '1h30m': should be a valid integer; write 5400"),
        ("  checkpoint: hello\n", "spec.checkpoint: 'hello': should be an object; write for example checkpoint: {strategy: epoch}"),
        ("  resources: {memory: 32GB}\n", "spec.resources.memory: '32GB' is not an amount of memory or disk; write 32Gi"),
    ],
)  # fmt: skip
def test_hint_says_what_to_write(run_command: RunCommand, write_file: WriteFile, more_lines: str, error: str) -> None:
    path = write_file("job.yaml", JOB + more_lines)
    code, _, stderr = run_command("validate", path)
    assert (code, [line.partition(": ")[2].rpartition(" [")[0] for line in list_error_lines(stderr, path.parent)]) == (
        1,
        [error],
    )


@pytest.mark.parametrize("words", [("validate",), ("run", "--local"), ("diff",)])
def test_dotted_key_is_refused_by_every_command(run_command: RunCommand, write_file: WriteFile, words: tuple[str, ...]) -> None:
    path = write_file("job.yaml", JOB.replace("s3://data/t.jsonl", "org/d") + "  training.learningRate: 0.5\n")
    code, _, stderr = run_command(words[0], path, *words[1:], *([path] if words[0] == "diff" else []))
    assert (code, "write training: {learningRate: 0.5}" in stderr) == (1, True)


@pytest.mark.parametrize("name", ["data/chats.jsonl", "chats.jsonl", "train.csv"])
def test_data_file_is_refused_for_a_cluster_and_accepted_for_a_local_run(run_command: RunCommand, write_file: WriteFile, name: str) -> None:
    path = write_file("job.yaml", JOB.replace("s3://data/t.jsonl", name))
    code, _, stderr = run_command("validate", path)
    assert (code, f"write s3://bucket/{name}, pvc://claim/{name}" in stderr) == (1, True)
    assert run_command("validate", "--local", path)[0] == 0


def test_tracker_without_credentials_gives_one_error(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB + "  tracking: {reportTo: [wandb]}\n")
    code, _, stderr = run_command("validate", path)
    assert (code, [line.rpartition("[")[2] for line in list_error_lines(stderr, path.parent)]) == (1, ["TrackerAndOptions]"])


def test_warnings_are_printed_and_refused_only_with_strict(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB + "  training: {learningRate: 5, epochs: 2, maxSteps: 40}\n")
    code, _, stderr = run_command("validate", path)
    warnings = [
        line.partition(": spec.")[2].partition(",")[0] for line in stderr.splitlines() if line.startswith("warning: ")
    ]
    assert (code, warnings) == (0, [
        "training.learningRate: 5 is unusually large for trainer sft with method lora", "training.epochs: 2 has no effect",
    ])  # fmt: skip
    assert run_command("validate", "--strict", path)[0] == 1


def test_too_long_name_says_its_length_and_the_limit(run_command: RunCommand, write_file: WriteFile) -> None:
    stderr = run_command("validate", write_file("job.yaml", JOB.replace("name: bot", f"name: {'a' * 41}")))[2]
    assert "has 41 characters, and the name of a FineTuneJob may have at most 40" in stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (JOB.replace("  model:", "\tmodel:"),
         "job.yaml:5: invalid YAML: found character '\\t' that cannot start any token, in the line `model: {source: org/m}`; "
         "indent with spaces, because YAML allows no tabs there"),
        (JOB.replace("org/m", "{{ .Values.model }}"),
         "job.yaml:5: spec.model.source: a key must be plain text; a template must be rendered first, for example with `helm template`"),
        (JOB.replace("name: bot", "generateName: bot-"),
         "job.yaml:3: metadata.name: this required field is missing; only `kubectl create` uses generateName, so write at most 40 characters a-z, 0-9 "
         "and -, beginning with a letter [NameInvalid]"),
        (JOB.replace("name: bot", "name: My Bot"),
         "job.yaml:3: metadata.name: 'My Bot' cannot be the name of a FineTuneJob; write at most 40 characters a-z, 0-9 and -, beginning with a letter, "
         "for example my-bot [NameInvalid]"),
        (JOB.replace("source: org/m", "source:org/m"),
         "job.yaml:5: spec.model.source:org/m: unknown field; write a space after the colon: source: org/m [UnknownField]"),
    ],
)  # fmt: skip
def test_mistake_outside_the_spec_gets_one_message(run_command: RunCommand, write_file: WriteFile, text: str, message: str) -> None:
    path = write_file("job.yaml", text)
    code, _, stderr = run_command("validate", path)
    assert (code, list_error_lines(stderr, path.parent)) == (1, [message])
