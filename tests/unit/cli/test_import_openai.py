"""The importer `openai`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.cli.conftest import Write
from tests.unit.cli.import_command import Outcome, import_

JOB = {"model": "gpt-4o-mini", "training_file": "file-abc123"}


@pytest.fixture
def api(write: Write) -> Any:
    """Return a function that imports a fine-tuning job in the JSON form of the OpenAI API."""

    def run(job: dict[str, Any], *files: Any, **more: Any) -> Outcome:
        more.setdefault("model_map", {"gpt-4o-mini": "org/small"})
        return import_(write("job.json", json.dumps(job)), *files, **more)

    return run


OPENAI = {"model": "org/m", "training_file": "s3://data/t.jsonl"}


def test_hyperparameters_are_read(api: Any) -> None:
    imported = api(
        JOB
        | {
            "hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5},
            "seed": 7,
            "suffix": "bot",
        }
    )
    assert imported.at("model.source") == "org/small"
    assert imported.at("training") == {
        "epochs": 2, "batchSizePerDevice": 3, "gradientAccumulationSteps": 2, "learningRate": 1e-4, "seed": 7,
    }  # fmt: skip
    assert imported.at("dataset") == {"format": "messages", "fileFormat": "jsonl", "responseOnly": {"enabled": True}}
    assert imported.at("output.runName") == {"suffix": "bot"}
    assert "file-abc123 is a file of the API" in imported.warnings[0]


def test_auto_uses_the_default(api: Any) -> None:
    imported = api(
        JOB | {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}}
    )
    assert imported.at("training") == {"epochs": 3}


def test_dpo_job_is_read(api: Any) -> None:
    imported = api(JOB | {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}})
    assert (imported.at("trainer"), imported.at("training.epochs")) == ({"type": "dpo", "dpo": {"beta": 0.2}}, 1)
    assert imported.at("dataset.columns") == {
        "question": "input",
        "chosen": "preferred_output",
        "rejected": "non_preferred_output",
    }


def test_api_model_needs_a_replacement(api: Any) -> None:
    (mistake,) = api(JOB, model_map={}).mistakes
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
def test_mistakes_are_explained(api: Any, change: dict[str, Any], expected: str) -> None:
    (mistake,) = api(JOB | change).mistakes
    assert expected in mistake


def test_data_rows_are_checked(api: Any, write: Write) -> None:
    good = write("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n')
    assert api(JOB, good).at("dataset.train") == f"file://{good}"
    bad = write("b.jsonl", '{"messages": []}\n{"prompt": "x"}\n')
    (mistake,) = api(JOB, bad).mistakes
    assert mistake == "b.jsonl:2: messages: the key is missing: this row has prompt; rows of sft hold messages"


def test_metadata_becomes_annotations(api: Any) -> None:
    assert api(JOB | {"metadata": {"team a": "x"}}).documents[0]["metadata"]["annotations"] == {"team_a": "x"}


def test_number_overrides_auto_in_either_location(write: Write) -> None:
    inner = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    imported = import_(write("a.json", json.dumps(OPENAI | {"hyperparameters": {"n_epochs": 5}, "method": inner})))
    assert imported.at("training.epochs") == 5
    inner["supervised"] = {"hyperparameters": {"n_epochs": 7}}
    (mistake,) = import_(
        write("a.json", json.dumps(OPENAI | {"hyperparameters": {"n_epochs": 5}, "method": inner}))
    ).mistakes
    assert "5 and 7 are given for the same option" in mistake


def test_batch_size_counts_the_rows_of_all_ranks(write: Write) -> None:
    file = write("a.json", json.dumps(OPENAI | {"hyperparameters": {"batch_size": 16}}))
    imported = import_(file, overrides={"resources.gpusPerNode": 2, "resources.nodes": 2})
    assert (imported.at("training.batchSizePerDevice"), imported.at("training.gradientAccumulationSteps")) == (4, 1)
    assert import_(file, overrides={"resources.gpusPerNode": 3}).mistakes == [
        "a.json:1: hyperparameters.batch_size: 16 rows per step cannot be divided equally among 3 ranks; write 15 or 18, or change --gpus and --nodes"
    ]
