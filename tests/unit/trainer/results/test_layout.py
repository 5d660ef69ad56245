"""The folder and the keys of the additional copy of a run's results follow from `output` and the model."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.spec.results import Output
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.layout import CopyFolder, find_copy_folder, model_folder_name

STARTED_AT = datetime(2025, 10, 9, 17, 21, 56, tzinfo=UTC)


def find_folder(
    output: dict[str, Any], model_source: str = "meta-llama/Llama-2-7b-hf", started_at: datetime = STARTED_AT
) -> CopyFolder:
    folder = find_copy_folder(Output.model_validate(output), namespace="team-a", model_source=model_source, started_at=started_at)
    assert folder is not None
    return folder


@pytest.mark.parametrize(
    ("output", "key"),
    [
        (
            {"dir": "results", "project": "medical_qa"},
            "results/medical_qa/meta-llama_Llama-2-7b-hf/20251009_172156/",
        ),
        ({"dir": "results"}, "results/team-a/meta-llama_Llama-2-7b-hf/20251009_172156/"),
        (
            {"dir": "a/b//c/", "project": "p", "layout": "projectModelTime"},
            "a/b/c/p/meta-llama_Llama-2-7b-hf/20251009_172156/",
        ),
        ({"dir": "adapters", "project": "p", "layout": "flat"}, "adapters/"),
        ({"dir": "./", "layout": "flat"}, None),
        ({"dir": "results/../../other"}, None),
        ({"dir": "results", "project": ".."}, None),
    ],
)
def test_the_folder_depends_on_the_layout(output: dict[str, Any], key: str | None) -> None:
    if key is not None:
        assert find_folder(output).key == key
        return
    with pytest.raises(ConfigError) as caught:
        find_folder(output)
    assert caught.value.code == "OutputPathInvalid"


def test_without_output_dir_there_is_no_copy() -> None:
    assert find_copy_folder(Output(), namespace="team-a", model_source="gpt2", started_at=STARTED_AT) is None


def test_the_model_is_in_its_own_folder_only_with_projects() -> None:
    nested_folder, flat_folder = find_folder({"dir": "r", "project": "p"}, "gpt2"), find_folder({"dir": "r", "layout": "flat"})
    assert nested_folder.key_of_model_file("adapter_model.safetensors") == "r/p/gpt2/20251009_172156/model/adapter_model.safetensors"
    assert nested_folder.key_of_result(ResultFile.STEP_METRICS) == "r/p/gpt2/20251009_172156/step_metrics.json"
    assert flat_folder.key_of_model_file("checkpoint/config.json") == "r/checkpoint/config.json"
    assert flat_folder.key_of_result(ResultFile.PERFORMANCE_SUMMARY) == "r/performance_summary.json"


def test_only_a_flat_copy_is_overwritten_by_a_later_run() -> None:
    later_start = STARTED_AT.replace(minute=22)
    assert find_folder({"dir": "r", "layout": "flat"}) == find_folder({"dir": "r", "layout": "flat"}, started_at=later_start)
    assert find_folder({"dir": "r"}) != find_folder({"dir": "r"}, started_at=later_start)


@pytest.mark.parametrize(
    ("source", "folder_name"),
    [
        ("gpt2", "gpt2"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama_Llama-2-7b-hf"),
        ("hf://org/name@main", "org_name"),
        ("org/name@refs/pr/1", "org_name"),
        ("file:///models/tiny", "tiny"),
        ("file:///models/a model that has a name of many words/", "a_model_that_has_a_name_of_many_words"),
        ("s3://bucket/models/base-7b/", "base-7b"),
        ("s3://bucket", "bucket"),
        ("pvc://claim/models/tiny", "tiny"),
        ("s3://bucket/team-a/bot/0b8a3c1e-0000-4000-8000-000000000000/model", "bot"),
        ("https://host/team-a/bot/0b8a3c1e-0000-4000-8000-000000000000/checkpoints/step-00000010?signature=secret", "bot"),
        ("file:///models/..", "_"),
    ],
)
def test_the_folder_name_of_a_model_follows_from_its_source(source: str, folder_name: str) -> None:
    assert model_folder_name(source) == folder_name
