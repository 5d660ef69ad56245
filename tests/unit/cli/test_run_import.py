"""Behaviour that all importers share: how they handle unreadable input, secrets and two spellings of an option, and how the tool is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_cli.importers import IMPORTER_NAMES

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

ENV_CONFIG = "MODEL_NAME=gpt2\nTRAIN_DATA_PATH=s3://data/t.jsonl\nDATASET_TYPE=mcq_jsonl\n"


GUIDE_CONFIG = "model: org/m\nlora_r: 8\n"


ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def list_error_lines(stderr: str, folder: Path) -> list[str]:
    """Return the error lines of a command, without the path of the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in stderr.splitlines()
        if line.startswith("error: ")
    ]


TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"


@pytest.fixture
def import_guide(write_file: WriteFile) -> Any:
    """Return a function that imports a configuration with the importer `guide`."""

    def run(text: str, words: str = "", **request_fields: Any) -> ImportOutcome:
        return import_files(write_file("job.yaml", text), words=words, source="guide", **request_fields)

    return run


API_JOB = {"model": "gpt-4o-mini", "training_file": "file-abc123"}


TOML_CONFIG = '[fine_tuner]\nbase_model_id = "org/m"\ntraining_data_id = "org/d"\nreport_to = "none"\n'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.env", "", ["a.env: the file is empty"]),
        ("a.yaml", " \n\n", ["a.yaml: the file is empty"]),
        ("a.yaml", "# nothing\n", ["a.yaml: the file is empty"]),
        ("a.yaml", "hello\n", ["a.yaml: the file is not a mapping of names to values"]),
        ("a.yaml", "\tmodel: x\n", ["a.yaml:1: invalid YAML: found character '\\t' that cannot start any token, in the line `model: x`; "
                                      "indent with spaces, because YAML allows no tabs there"]),
        ("a.yaml", GUIDE_CONFIG + "lora_r: 16\n", ["a.yaml:3: lora_r: the key occurs twice, in lines 2 and 3; keep one"]),
        ("a.yaml", GUIDE_CONFIG + "---\n" + GUIDE_CONFIG, ["a.yaml:4: a second YAML document begins here; keep one configuration per file"]),
        ("a.yaml", "model: &a [*a]\n", ["a.yaml:1: model[0]: the alias refers to a value that contains it; write the value itself"]),
        ("a.yaml", "? [a, b]\n: c\n" + GUIDE_CONFIG, ["a.yaml:1: a key must be plain text; write key: value"]),
        ("a.yaml", "model: !!python/name:os.system x\nlora_r: 8\n",
         ["a.yaml:1: model: the tag tag:yaml.org,2002:python/name:os.system is not supported; write the value itself"]),
        ("a.yaml", ALIAS_BOMB, ["a.yaml:1: the file holds more than 20000 values after aliases are expanded"]),
        ("a.yaml", "[" * 600, ["a.yaml: the YAML is nested too deeply for a configuration"]),
        ("a.yaml", "model: org/m\nlora_r: 99999999999999999999\nlearning_rate: .nan\nepochs: .inf\n", [
            'a.yaml:3: learning_rate: ".nan" is not a number; allowed: a number greater than 0',
            'a.yaml:4: epochs: ".inf" is not a number; allowed: a number greater than 0',
            "a.yaml:2: lora_r: 99999999999999999999: should be less than or equal to 4096; for example rank: 64 (spec.method.lora.rank)",
        ]),
        ("a.env", ENV_CONFIG + "EPOCHS=1e400\nLEARNING_RATE=nan\nBATCH_SIZE=" + "9" * 5000 + "\n", [
            'a.env:4: EPOCHS: "1e400" is not an integer; allowed: an integer from 1 to 20',
            'a.env:5: LEARNING_RATE: "nan" is not a number; allowed: a number from 1e-05 to 0.0005',
            f'a.env:6: BATCH_SIZE: "{"9" * 77}..." is not an integer; allowed: an integer from 1 to 32',
        ]),
        ("a.toml", '[fine_tuner]\nbase_model_id = "m"\ntraining_data_id = "d"\n[[arr]]\n',
         ["a.toml:4: arr: unknown key; it is not an option of this TOML tool; remove it"]),
        ("a.toml", "[fine_tuner]\nepochs = " + "9" * 5000 + "\n", ["a.toml: the file holds a number that is too long, or is nested too deeply"]),
        ("a.json", "[1, 2]", ["a.json: the file is not a JSON object"]),
        ("a.json", '{"model": "org/m", "training_file": "s3://data/t", "hyperparameters": [1], "method": "dpo", "seed": -1}', [
            "a.json:1: hyperparameters: the key is a group of options, but a single value is given; write its options, for example hyperparameters.n_epochs",
            "a.json:1: method: the key is a group of options, but a single value is given; write its options, for example method.type",
            "a.json:1: seed: -1 is out of range; allowed: an integer from 0 to 4294967295",
        ]),
        ("a.json", '{"model": "org/m", "training_file": ' + "9" * 5000 + "}", ["a.json: the file holds a number that is too long, or is nested too deeply"]),
    ],
)  # fmt: skip
def test_invalid_input_is_refused_with_its_location(
    run_command: RunCommand, write_file: WriteFile, name: str, text: str, expected: list[str]
) -> None:
    path = write_file(name, text)
    code, out, stderr = run_command("import", path)
    assert (code, out) == (1, "")
    assert list_error_lines(stderr, path.parent) == expected


@pytest.mark.parametrize(
    "text", [TOKEN, f"see {TOKEN}", "https://me:pw@host.example/x", "http://host.example/?api_key=abc"]
)
def test_secrets_are_refused_and_never_printed(run_command: RunCommand, write_file: WriteFile, text: str) -> None:
    for line in (f"PAD_TOKEN={text}", f"PROJECT_NAME={text}", f"UNKNOWN_OPTION={text}", text):
        code, out, stderr = run_command("import", write_file("a.env", f"{ENV_CONFIG}{line}\n"))
        assert (code, out) == (1, "")
        assert text not in stderr
        assert "pw" not in stderr
        assert TOKEN not in stderr
    code, out, stderr = run_command("import", write_file("a.env", ENV_CONFIG), "--set", f"model.padToken={text}")
    assert (code, out, text in stderr) == (1, "", False)


def test_a_file_that_two_importers_recognise_is_refused(write_file: WriteFile) -> None:
    text = "model: {base_model: m}\ntraining_config: {model: m}\n"
    assert import_files(write_file("x.yaml", text)).mistakes == [
        "x.yaml: several importers recognise this configuration: yaml, hydra; choose one with --from yaml|hydra"
    ]


def test_unrecognised_file_is_refused(write_file: WriteFile) -> None:
    assert import_files(write_file("x.yaml", "a: 1\n")).mistakes == [
        f"x.yaml: no importer recognises this configuration; choose one with --from: {', '.join(IMPORTER_NAMES)}"
    ]


def test_missing_files_are_all_named(tmp_path: Any) -> None:
    import_outcome = import_files(tmp_path / "a", tmp_path / "b")
    assert [mistake.rpartition("/")[2] for mistake in import_outcome.mistakes] == [
        "a: there is no such file",
        "b: there is no such file",
    ]


def test_invalid_job_name_is_refused(write_file: WriteFile) -> None:
    (mistake,) = import_files(write_file("job.json", json.dumps(API_JOB)), name="Bad_Name").mistakes
    assert mistake.startswith("--name: Bad_Name: this cannot be the name of a FineTuneJob")


def test_two_spellings_of_an_option_with_different_values_are_refused(write_file: WriteFile) -> None:
    import_outcome = import_files(write_file("a.toml", TOML_CONFIG + "device_train_batch_size = 4\ndevice_batch_size = 8\n"))
    assert import_outcome.mistakes == [
        "a.toml:5, a.toml:6: fine_tuner.device_train_batch_size, fine_tuner.device_batch_size: 4 and 8 are given for the same option; keep one of them"
    ]


def test_two_spellings_of_an_option_with_the_same_value_are_accepted(write_file: WriteFile) -> None:
    import_outcome = import_files(write_file("a.toml", TOML_CONFIG + "device_train_batch_size = 4\ndevice_batch_size = 4\n"))
    assert (import_outcome.mistakes, import_outcome.at("training.batchSizePerDevice")) == ([], 4)


def test_finetunejob_is_not_imported(write_file: WriteFile, run_command: RunCommand) -> None:
    code, _, err = run_command("import", write_file("job.yaml", JOB))
    assert (code, "this is already a FineTuneJob" in err) == (1, True)


def test_invalid_yaml_quotes_the_line_unless_it_may_hold_a_secret(write_file: WriteFile) -> None:
    (mistake,) = import_files(write_file("a.yaml", "model: org/m\nlora_r: [8\nepochs: 3\n"), source="guide").mistakes
    assert (mistake.startswith("a.yaml:3: invalid YAML: "), mistake.endswith(", in the line `epochs: 3`")) == (
        True,
        True,
    )
    (mistake,) = import_files(write_file("a.yaml", "model: org/m\nhf_token: 'abc' def\n"), source="guide").mistakes
    assert ("abc" in mistake, mistake.startswith("a.yaml:2: invalid YAML: ")) == (False, True)
