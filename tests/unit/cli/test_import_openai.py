"""The importer `openai`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.cli.conftest import WriteFile
from tests.unit.cli.import_command import ImportOutcome, import_files

API_JOB = {"model": "gpt-4o-mini", "training_file": "file-abc123"}


@pytest.fixture
def import_job(write_file: WriteFile) -> Any:
    """Return a function that imports a fine-tuning job in the JSON form of the OpenAI API."""

    def run(job: dict[str, Any], *files: Any, **request_fields: Any) -> ImportOutcome:
        request_fields.setdefault("model_map", {"gpt-4o-mini": "org/small"})
        return import_files(write_file("job.json", json.dumps(job)), *files, **request_fields)

    return run


LOCAL_JOB = {"model": "org/m", "training_file": "s3://data/t.jsonl"}


def test_hyperparameters_are_read(import_job: Any) -> None:
    import_outcome = import_job(
        API_JOB
        | {
            "hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5},
            "seed": 7,
            "suffix": "bot",
        }
    )
    assert import_outcome.at("model.source") == "org/small"
    assert import_outcome.at("training") == {
        "epochs": 2, "batchSizePerDevice": 3, "gradientAccumulationSteps": 2, "learningRate": 1e-4, "seed": 7,
    }  # fmt: skip
    assert import_outcome.at("dataset") == {"format": "messages", "fileFormat": "jsonl", "responseOnly": {"enabled": True}}
    assert import_outcome.at("output.runName") == {"suffix": "bot"}
    assert "file-abc123 is a file of the API" in import_outcome.warnings[0]


def test_the_value_auto_becomes_the_default(import_job: Any) -> None:
    import_outcome = import_job(
        API_JOB | {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}}
    )
    assert import_outcome.at("training") == {"epochs": 3}


def test_dpo_job_is_read(import_job: Any) -> None:
    import_outcome = import_job(API_JOB | {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}})
    assert (import_outcome.at("trainer"), import_outcome.at("training.epochs")) == ({"type": "dpo", "dpo": {"beta": 0.2}}, 1)
    assert import_outcome.at("dataset.columns") == {
        "question": "input",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
    }


def test_a_model_of_the_api_needs_an_open_model_as_replacement(import_job: Any) -> None:
    (mistake,) = import_job(API_JOB, model_map={}).mistakes
    assert mistake.endswith("give an open model that replaces it: --model-map gpt-4o-mini=org/name")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": {"type": "reinforcement"}}, "one of supervised, dpo"),
        ({"hyperparameters": {"n_epochs": 0}}, '"auto" or an integer from 1 to 50'),
        ({"hyperparameter": {"n_epochs": 1}}, "unknown key"),
        ({"integrations": [{"type": "other"}]}, "only wandb is supported"),
    ],
)
def test_a_wrong_job_is_refused_with_an_explanation(import_job: Any, change: dict[str, Any], expected: str) -> None:
    (mistake,) = import_job(API_JOB | change).mistakes
    assert expected in mistake


def test_data_rows_are_checked(import_job: Any, write_file: WriteFile) -> None:
    good_path = write_file("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n')
    assert import_job(API_JOB, good_path).at("dataset.train") == f"file://{good_path}"
    bad_path = write_file("b.jsonl", '{"messages": []}\n{"prompt": "x"}\n')
    (mistake,) = import_job(API_JOB, bad_path).mistakes
    assert mistake == "b.jsonl:2: messages: the key is missing: this row has prompt; rows of sft hold messages"


def test_metadata_becomes_annotations(import_job: Any) -> None:
    assert import_job(API_JOB | {"metadata": {"team a": "x"}}).documents[0]["metadata"]["annotations"] == {"team_a": "x"}


def test_a_number_takes_precedence_over_auto_for_the_same_hyperparameter(write_file: WriteFile) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    import_outcome = import_files(write_file("a.json", json.dumps(LOCAL_JOB | {"hyperparameters": {"n_epochs": 5}, "method": method})))
    assert import_outcome.at("training.epochs") == 5
    method["supervised"] = {"hyperparameters": {"n_epochs": 7}}
    (mistake,) = import_files(
        write_file("a.json", json.dumps(LOCAL_JOB | {"hyperparameters": {"n_epochs": 5}, "method": method}))
    ).mistakes
    assert "5 and 7 are given for the same option" in mistake


def test_batch_size_counts_the_rows_of_all_ranks(write_file: WriteFile) -> None:
    file = write_file("a.json", json.dumps(LOCAL_JOB | {"hyperparameters": {"batch_size": 16}}))
    import_outcome = import_files(file, overrides={"resources.gpusPerNode": 2, "resources.nodes": 2})
    assert (import_outcome.at("training.batchSizePerDevice"), import_outcome.at("training.gradientAccumulationSteps")) == (4, 1)
    assert import_files(file, overrides={"resources.gpusPerNode": 3}).mistakes == [
        "a.json:1: hyperparameters.batch_size: 16 rows per step cannot be divided equally among 3 ranks; write 15 or 18, or change --gpus and --nodes"
    ]
