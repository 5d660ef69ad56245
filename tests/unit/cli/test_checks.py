"""Checks of a manifest, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import JOB, Call, Write

TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"


def sentences(said: str, folder: Path) -> list[str]:
    """The errors of a command, without the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in said.splitlines()
        if line.startswith("error: ")
    ]


def test_secret_in_a_manifest_is_a_warning_and_an_error_with_strict(call: Call, write: Write) -> None:
    path = write("job.yaml", JOB + f"  placement: {{env: [{{name: X, value: {TOKEN}}}]}}\n")
    code, _, said = call("validate", path)
    assert (code, "warning: " in said, "spec.placement.env: this looks like a token" in said) == (0, True, True)
    assert call("validate", "--strict", path)[0] == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("  method: ~\n  training:\n", []),
        ("  storage: {uri: 's3://models/x', credentialsSecretRef: {name: 3}}\n",
         ["job.yaml:7: spec.storage.credentialsSecretRef.name: 3: should be a valid string [ValueInvalid]"]),
        ("  storage: {uri: 'http://x', credentialsSecretRef: {}}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: this required field is missing; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:7: spec.storage.uri: 'http://x': the value does not have the required form; for example uri: s3://models/finetune [ValueInvalid]",
        ]),
        ("  storage: {credentialsSecretRef: {}}\n  training: {warmupSteps: 1, warmupRatio: 0.1}\n", [
            "job.yaml:7: spec.storage.credentialsSecretRef.name: this required field is missing; for example name: s3-credentials [ValueInvalid]",
            "job.yaml:8: spec.training.warmupRatio: warmupSteps 1 and warmupRatio 0.1 exclude each other; remove one of them [WarmupTwice]",
        ]),
        ("  trainer: {type: grpo, rewards: [3]}\n", ["job.yaml:7: spec.trainer.rewards[0]: 3: should be an object [ValueInvalid]"]),
        ("  training: hello\n", ["job.yaml:7: spec.training: 'hello': should be an object [ValueInvalid]"]),
        ("  training: {epochs: .nan, seed: 99999999999}\n", [
            "job.yaml:7: spec.training.epochs: '.nan': should be a valid number [ValueInvalid]",
            "job.yaml:7: spec.training.seed: 99999999999: should be less than or equal to 4294967295 [ValueInvalid]",
        ]),
        ("  training: &a {x: *a}\n", ["job.yaml:7: spec.training.x: the alias refers to a value that contains it; write the value itself"]),
    ],
)  # fmt: skip
def test_invalid_spec_is_refused_with_line_and_hint(call: Call, write: Write, more: str, expected: list[str]) -> None:
    path = write("job.yaml", JOB + more)
    code, _, said = call("validate", path)
    assert (code, sentences(said, path.parent)) == (1 if expected else 0, expected)


@pytest.mark.parametrize("split", ["{train: 0}", "{train: 0, validation: 0.5, test: 0.5}", "{train: 0, validation: 1}"])
def test_split_without_training_rows_is_refused(call: Call, write: Write, split: str) -> None:
    path = write("job.yaml", JOB.replace('t.jsonl"', f't.jsonl", split: {split}'))
    code, _, said = call("validate", path)
    assert code == 1
    assert sentences(said, path.parent) == [
        "job.yaml:6: spec.dataset.split.train: 0: should be greater than 0 [ValueInvalid]"
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: bot", "name: 3", [
            "job.yaml:3: metadata.name: '3' cannot be the name of a FineTuneJob; "
            "write a-z, 0-9 and -, beginning with a letter, at most 40 characters [NameInvalid]"]),
        ("name: bot", "name: bot, labels: {a: 1, b: true}, anotations: {}", [
            "job.yaml:3: metadata.anotations: unknown field; did you mean metadata.annotations? [UnknownField]",
            'job.yaml:3: metadata.labels.a: 1 is not a string; quote it: "1" [ValueInvalid]',
            'job.yaml:3: metadata.labels.b: true is not a string; quote it: "true" [ValueInvalid]']),
        ("kind: FineTuneJob", "kind: FinetuneJob", ["job.yaml:2: kind: FinetuneJob is not FineTuneJob; write kind: FineTuneJob [Kind]"]),
        ("apiVersion: finetune-operator.io/v1alpha1\n", "",
         ["job.yaml: apiVersion: this required field is missing; write apiVersion: finetune-operator.io/v1alpha1 [ApiVersion]"]),
    ],
)  # fmt: skip
def test_invalid_metadata_is_refused(call: Call, write: Write, old: str, new: str, expected: list[str]) -> None:
    path = write("job.yaml", JOB.replace(old, new))
    code, _, said = call("validate", path)
    assert (code, sentences(said, path.parent)) == (1, expected)
