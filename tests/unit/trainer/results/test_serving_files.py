"""The manifests for servers load the final model as an adapter or as a complete model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.results.serving_files import ServedModel, build_serving_files

URI = "s3://models/ft/team-a/support-bot/UID/model/a1-1f3c9a2b"
ADAPTER = ServedModel("support-bot", "team-a", "hf://org/base@abc", URI, 24)
COMPLETE_MODEL = ServedModel("support-bot", "team-a", "hf://org/base", URI, None)


def build_manifests(model: ServedModel, server: str) -> list[dict[str, Any]]:
    spec = FineTuneJobSpec.model_validate({"model": {"source": "org/base"}, "dataset": {"train": "org/d"}, "output": {"serving": [server]}})
    files = build_serving_files(spec, model)
    assert list(files) == [f"{server}.yaml"]
    return list(yaml.safe_load_all(files[f"{server}.yaml"]))


def test_no_server_means_no_manifest() -> None:
    assert build_serving_files(FineTuneJobSpec.model_validate({"model": {"source": "org/base"}, "dataset": {"train": "org/d"}}), COMPLETE_MODEL) == {}


def test_kserve_mounts_the_adapter_and_gets_the_base_model_from_the_hub() -> None:
    account, service = build_manifests(ADAPTER, "kserve")
    predictor = service["spec"]["predictor"]
    assert (service["kind"], service["metadata"]) == ("InferenceService", {"name": "support-bot", "namespace": "team-a"})
    assert account["metadata"]["name"] == predictor["serviceAccountName"]
    assert predictor["model"]["storageUri"] == URI
    assert predictor["model"]["args"] == [
        "--model_name=support-bot", "--model_id=org/base", "--model_revision=abc", "--enable-lora", "--max-lora-rank=32",
        "--lora-modules=support-bot-adapter=/mnt/models",
    ]  # fmt: skip


def test_kserve_serves_a_complete_model_from_storage() -> None:
    _, service = build_manifests(COMPLETE_MODEL, "kserve")
    assert service["spec"]["predictor"]["model"]["args"] == ["--model_name=support-bot"]


def test_vllm_downloads_the_adapter_and_names_it_as_a_model() -> None:
    deployment, service = build_manifests(ADAPTER, "vllm")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["args"] == [URI, "/mnt/adapter"]
    assert pod["containers"][0]["args"] == [
        "--model=org/base", "--revision=abc", "--served-model-name=support-bot-base", "--enable-lora", "--max-lora-rank=32",
        "--lora-modules=support-bot=/mnt/adapter",
    ]  # fmt: skip
    assert [volume["name"] for volume in pod["volumes"]] == ["adapter"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_vllm_downloads_a_base_model_that_is_not_on_a_hub() -> None:
    deployment, _ = build_manifests(ServedModel("bot", "team-a", "s3://models/base", URI, 8), "vllm")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["args"] == [URI, "/mnt/adapter", "s3://models/base", "/mnt/models"]
    assert pod["containers"][0]["args"][0] == "--model=/mnt/models"
    assert {volume["name"] for volume in pod["volumes"]} == {"model", "adapter"}


def test_vllm_serves_a_complete_model_from_storage() -> None:
    deployment, _ = build_manifests(COMPLETE_MODEL, "vllm")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["args"] == [URI, "/mnt/models"]
    assert pod["containers"][0]["args"] == ["--model=/mnt/models", "--served-model-name=support-bot"]


@pytest.mark.parametrize(("adapter_config", "expected_rank"), [({"r": 8}, 8), ({"r": 8, "rank_pattern": {"q_proj": 64}}, 64)])
def test_the_highest_rank_of_the_stored_adapter_is_used(adapter_config: dict[str, Any], expected_rank: int, tmp_path: Path) -> None:
    from finetune_api.spec.enums import OutputKind

    from tests.support.learning import make_run

    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config))
    run, _ = make_run(tmp_path / "run", tmp_path / "model")
    assert ServedModel.of(run, URI, OutputKind.ADAPTER, tmp_path, None).lora_rank == expected_rank
    merged_model = ServedModel.of(run, URI, OutputKind.ADAPTER, tmp_path, "s3://merged")
    assert (merged_model.lora_rank, merged_model.uri) == (None, "s3://merged")
