"""Pods that merge their adapter into the base model, and pods that push their model to a local stub of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.oci import CONFIG_KEY, MANIFEST_KEY
from finetune_api.pod import StoreTarget
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import Stage, VerificationOutcome
from finetune_cli.job_storage import JobStorage
from finetune_cli.oci_layout import LayoutForm, write_layout
from pod_harness import UID, Pod, merge, run_config, write_rows

from tests.support.hub import TOKEN, Hub, serve_hub
from tests.support.tiny import make_tiny_model

HUB_OUTPUT = {"push": True, "repository": "org/bot", "tokenSecretRef": {"name": "hub", "key": "token"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as server:
        yield server


def make_pod(folder: Path, model: Path, output: dict[str, Any], *, hub: Hub | None = None, attempt: int = 1, **env: str) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 2}, "tracking": {"loggingSteps": 1}, "output": output,
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{UID}")
    run = run_config(merge({}, spec), target, attempt=attempt)
    if "dir" in output:
        run = run.model_copy(update={"publish": f"file://{folder}/store/{output['dir']}"})
    variables = {"HF_ENDPOINT": hub.url, "FINETUNE_HUB_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"} if hub is not None else {}
    return Pod(run, folder / f"pod-{attempt}", env={**variables, **env})


@pytest.fixture(scope="module")
def style_adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, so that its merge changes the base model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapters") / "style"
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def stored_path(folder: Path, key: str = "") -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / UID / key


def test_a_pod_merges_its_adapter_with_another_and_pushes_the_merged_model(model: Path, style_adapter: Path, hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other_adapters = [{"source": f"file://{style_adapter}", "weight": 0.5}]
    settings = {
        "verify": True, "mergeAdapter": True, "combineAdapters": other_adapters, "export": ["oci"], "hub": HUB_OUTPUT, "dir": "results",
        "layout": "flat",
    }  # fmt: skip
    with make_pod(tmp_path, model, settings, hub=hub) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
    output = message.output
    assert output is not None and output.uri is not None and output.merged_uri is not None
    incarnation = output.uri.rpartition("/")[2]
    merged_folder = stored_path(tmp_path, f"merged/{incarnation}")
    assert output.merged_uri == f"file://{merged_folder}"
    assert json.loads(stored_path(tmp_path, "merged/_COMMITTED").read_text())["path"] == incarnation
    manifest = json.loads((merged_folder / "manifest.json").read_text())
    assert manifest["kind"] == "model" and manifest["extra"] == {"adapter": output.uri, "adapterSha256": output.sha256}
    assert AutoModelForCausalLM.from_pretrained(merged_folder).num_parameters() == AutoModelForCausalLM.from_pretrained(model).num_parameters()
    files = {entry["path"] for entry in manifest["files"]}
    repository = hub.repositories["org/bot"]
    assert repository.is_private and repository.files.keys() == files >= {"model.safetensors", "README.md", "generation_config.json"}
    assert repository.files["model.safetensors"] == (merged_folder / "model.safetensors").read_bytes()
    assert repository.commits[0].summary == "FineTuneJob team/job" and repository.commits[0].description == f"uid {UID}"
    assert output.hub_uri == f"{hub.url}/org/bot/tree/{repository.commits[0].oid}"
    copy_folder = tmp_path / "store" / "results"
    assert (copy_folder / "merged" / "model.safetensors").exists() and (copy_folder / "adapter_model.safetensors").exists()
    assert output.verification is not None and output.verification.artefacts is not None
    adapter_check, merged_check = output.verification.artefacts
    assert (adapter_check.result, merged_check.result) == (VerificationOutcome.VERIFIED, VerificationOutcome.VERIFIED)
    assert adapter_check.change_from_base != merged_check.change_from_base, "the merged model contains only one of the two adapters"
    root = stored_path(tmp_path)
    statement = json.loads((root / "lineage/statement.json").read_text())
    sources = {entry.get("name"): entry.get("uri") for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert sources["output.combineAdapters[0].source"] == f"file://{style_adapter}"
    oci = write_layout(JobStorage(f"file://{root}", StorageRoot()), tmp_path / "layout", LayoutForm.MODELPACK, "latest", lambda path, size: None)
    assert output.oci_digest == oci.digest == f"sha256:{hashlib.sha256((root / MANIFEST_KEY).read_bytes()).hexdigest()}"
    config_digest = json.loads((root / MANIFEST_KEY).read_text())["config"]["digest"]
    assert config_digest == f"sha256:{hashlib.sha256((root / CONFIG_KEY).read_bytes()).hexdigest()}"
    file_contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in data for data in file_contents)


@pytest.mark.slow  # test_evaluation.py has a similar test, which stops a pod during its evaluation
@pytest.mark.faults
def test_the_next_attempt_merges_after_a_pod_was_stopped_while_merging(model: Path, tmp_path: Path) -> None:
    with make_pod(tmp_path, model, {"mergeAdapter": True}) as stopped_pod:
        stopped_pod.wait_until(lambda: (report := stopped_pod.report()) is not None and report.output is not None and report.stage is Stage.MERGING)
        stopped_pod.terminate()
        assert stopped_pod.end() == ExitCode.PREEMPTED_SAVED, stopped_pod.text[-6000:]
    output = stopped_pod.termination_message().output
    assert output is not None and output.merged_uri is None
    with make_pod(tmp_path, model, {"mergeAdapter": True}, attempt=2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    resumed_output = resumed_pod.termination_message().output
    assert resumed_output is not None and resumed_output.sha256 == output.sha256 and "step 1/4" not in resumed_pod.text
    assert [path.name for path in stored_path(tmp_path, "merged").iterdir() if path.is_dir()] == [str(resumed_output.merged_uri).rpartition("/")[2]]


@pytest.mark.faults
def test_a_refused_push_is_reported_as_refused_credentials_and_keeps_the_model(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.failures = {"/commit/main": [(403, "forbidden")]}
    with make_pod(tmp_path, model, {"hub": HUB_OUTPUT}, hub=hub) as refused_pod:
        assert refused_pod.end() == ExitCode.CREDENTIALS_REFUSED, refused_pod.text[-6000:]
    message = refused_pod.termination_message()
    assert (message.code, message.stage) == ("HubAccessDenied", Stage.UPLOADING)
    assert message.output is not None and message.output.uri is not None and message.output.hub_uri is None
    with make_pod(tmp_path, model, {"hub": HUB_OUTPUT}, hub=hub, attempt=2) as repeated_pod:
        assert repeated_pod.end() == ExitCode.OK, repeated_pod.text[-6000:]
    assert hub.repositories["org/bot"].files.keys() >= {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "README.md"}
    assert len(hub.repositories["org/bot"].commits) == 1 and "step 1/4" not in repeated_pod.text


def test_a_pod_without_a_hub_token_ends_before_training(model: Path, hub: Hub, tmp_path: Path) -> None:
    with make_pod(tmp_path, model, {"hub": HUB_OUTPUT}, hub=hub, FINETUNE_HUB_TOKEN="") as pod:  # noqa: S106  an empty value, not a password
        assert pod.end() == ExitCode.CREDENTIALS_REFUSED, pod.text[-6000:]
    message = pod.termination_message()
    assert (message.code, message.output, hub.requests) == ("HubTokenMissing", None, []) and "step 1/4" not in pod.text
