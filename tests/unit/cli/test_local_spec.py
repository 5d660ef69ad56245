"""Adapting a spec to the user's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_cli.local_spec import LocalMachine, LocalRunError, adapt_spec, require_s3_credentials


def adapt(spec: dict[str, Any], tmp_path: Path, gpus: int = 0, **folders: Path) -> tuple[dict[str, Any], list[str]]:
    config_maps = {"data": folders["maps"]} if "maps" in folders else {}
    claims = {"models": folders["claims"]} if "claims" in folders else {}
    notes = adapt_spec(spec, LocalMachine(tmp_path / "out", tmp_path, gpus, config_maps, claims))
    return spec, notes


def test_sources_become_local_files(tmp_path: Path) -> None:
    for name in ("m", "maps", "claims/x"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "maps/t.jsonl").write_text("{}")
    spec = {
        "model": {"source": "file://m", "tokenizer": "pvc://models/x"},
        "dataset": {"train": "configmap://data/t.jsonl", "validation": "org/v"},
    }
    adapted_spec, _ = adapt(spec, tmp_path, maps=tmp_path / "maps", claims=tmp_path / "claims")
    assert adapted_spec["model"] == {"source": f"file://{tmp_path}/m", "tokenizer": f"file://{tmp_path}/claims/x"}
    assert adapted_spec["dataset"] == {"train": f"file://{tmp_path}/maps/t.jsonl", "validation": "org/v"}
    assert adapted_spec["storage"] == {"uri": f"file://{tmp_path}/out"}


def test_folders_of_benchmarks_become_local(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    spec = {"evaluation": {"benchmarks": [{"name": "lm-eval", "folder": "file://tasks"}, {"name": "human-eval"}]}}
    adapted_spec, _ = adapt(spec, tmp_path)
    assert adapted_spec["evaluation"]["benchmarks"] == [{"name": "lm-eval", "folder": f"file://{tmp_path}/tasks"}, {"name": "human-eval"}]
    with pytest.raises(LocalRunError, match=r"spec\.evaluation\.benchmarks\[0\]\.folder: none does not exist"):
        adapt({"evaluation": {"benchmarks": [{"name": "lm-eval", "folder": "file://none"}]}}, tmp_path)


def test_missing_local_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        LocalRunError, match=r"spec\.dataset\.train: x\.jsonl does not exist; relative paths are looked up in"
    ):
        adapt({"dataset": {"train": "file://x.jsonl"}}, tmp_path)
    with pytest.raises(LocalRunError, match="name a folder that replaces it with --config-map cm=FOLDER"):
        adapt({"dataset": {"train": "configmap://cm/k"}}, tmp_path)


@pytest.mark.parametrize(
    ("resources", "gpus", "expected", "note_count"),
    [
        ({}, 0, {"gpusPerNode": 0}, 0),
        ({}, 2, {"gpusPerNode": 1}, 0),
        ({"gpusPerNode": 8, "nodes": 2, "nodePool": "h100"}, 2, {"gpusPerNode": 2, "nodes": 1}, 2),
        ({"gpusPerNode": 0}, 2, {"gpusPerNode": 0}, 0),
    ],
)
def test_resources_are_limited_to_this_machine(
    tmp_path: Path, resources: dict[str, Any], gpus: int, expected: dict[str, Any], note_count: int
) -> None:
    adapted_spec, notes = adapt({"resources": resources}, tmp_path, gpus)
    assert (adapted_spec["resources"], len(notes)) == (expected, note_count)


def test_chat_template_of_a_config_map_is_inlined(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ x }}")
    adapted_spec, _ = adapt(
        {"dataset": {"chatTemplate": {"configMapRef": {"name": "data", "key": "t.jinja"}}}}, tmp_path, maps=tmp_path
    )
    assert adapted_spec["dataset"]["chatTemplate"] == {"text": "{{ x }}"}


def test_prompts_of_a_config_map_must_exist_on_this_machine(tmp_path: Path) -> None:
    spec = {"evaluation": {"comparison": {"promptsRef": {"name": "data", "key": "prompts.txt"}}}}
    with pytest.raises(LocalRunError, match="evaluation.comparison.promptsRef: data is not on this machine; name a folder .* --config-map data=FOLDER"):
        adapt(spec, tmp_path)
    with pytest.raises(LocalRunError, match="prompts.txt does not exist"):
        adapt(spec, tmp_path, maps=tmp_path)
    (tmp_path / "prompts.txt").write_text("Hello")
    assert adapt(spec, tmp_path, maps=tmp_path)[0]["evaluation"] == spec["evaluation"]


def test_s3_source_without_credentials_names_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    spec = {
        "model": {"source": "org/m"},
        "dataset": {"mixture": [{"source": "org/d"}, {"source": "s3://data/t.jsonl"}]},
    }
    with pytest.raises(
        LocalRunError, match=r"mixture\[1\].source: s3://data/t.jsonl needs S3 credentials; export AWS_ACCESS_KEY_ID"
    ):
        require_s3_credentials(spec)
    require_s3_credentials({"model": {"source": "org/m"}})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    require_s3_credentials(spec)


def test_relative_data_file_is_a_local_source(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/chats.jsonl").write_text("{}")
    adapted_spec, _ = adapt({"dataset": {"train": "data/chats.jsonl"}}, tmp_path)
    assert adapted_spec["dataset"]["train"] == f"file://{tmp_path}/data/chats.jsonl"


def test_a_local_run_does_not_adopt_results(tmp_path: Path) -> None:
    adapted_spec, notes = adapt({"policy": {"onExistingResult": "fail", "retries": 1}}, tmp_path)
    assert adapted_spec["policy"] == {"retries": 1}
    assert "policy.onExistingResult fail has no effect in a local run: a local run never adopts the stored result of another job" in notes
