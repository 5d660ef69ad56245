"""Pods with a cache of base models: all pods of a node share one download, and a run equals a run without the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import RunConfig, TerminationMessage
from finetune_trainer.model_cache.record import CacheRecord
from pod_buckets import Bucket, new_bucket
from pod_harness import Pod, merge, run_config
from recorded_run import make_spec, make_traced_pod, record_run

from localcluster.s3 import S3Endpoint
from tests.support.hub import Hub, serve_hub
from tests.support.s3proxy import Latency, S3Proxy

MODEL_FILES = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
NODE_CACHE_OPTIONS = ("--tenant", "team", "--size-limit", str(10**9))
CLAIM_CACHE_OPTIONS = ("--tenant", "models", "--copy")


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with serve_hub() as server:
        server.serve_model("org/tiny", model)
        yield server


def make_hub_environment(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}


def make_cache_pod(run: RunConfig, folder: Path, cache: Path, arguments: tuple[str, ...], env: dict[str, str]) -> Pod:
    """Create the init container that fills the cache. The init container shares `folder` with the trainer container of the pod."""
    return Pod(run, folder, env, command="fill-cache", arguments=("--folder", str(cache), *arguments))


def read_record(pod: Pod) -> CacheRecord:
    """Read which models the init container has provided."""
    record = CacheRecord.read(pod.folder / "work")
    assert record is not None, pod.text[-4000:]
    return record


def compute_model_bytes(model: Path) -> int:
    return sum((model / name).stat().st_size for name in MODEL_FILES)


def read_model_values(message: TerminationMessage) -> tuple[Any, ...]:
    """Return the reported source of the model, the number of saved bytes and the notes about the cache."""
    resolved = message.resolved
    assert resolved is not None
    return resolved.model_source, resolved.model_bytes_saved, [note for note in resolved.notes or [] if "cache" in note]


def train(run: RunConfig, folder: Path, bucket: Bucket, hub: Hub) -> tuple[Pod, TerminationMessage]:
    """Run the trainer container, which records the rows of each step."""
    pod = make_traced_pod(run, folder, bucket)
    pod.env |= make_hub_environment(hub)
    with pod:
        assert pod.end() == 0, pod.text[-4000:]
    return pod, pod.termination_message()


@pytest.mark.slow  # `make test` starts pods with a model cache only one after another, in test_a_model_in_s3_is_downloaded_once
def test_eight_pods_of_a_node_download_the_model_once(s3_server: S3Endpoint, hub: Hub, model: Path, rows: Path, tmp_path: Path) -> None:
    """One pod trains with the model in the node's cache, another with a copy from a claim. Both runs equal a run without a cache, bit for bit."""
    spec = merge(make_spec(model, rows, "full"), {"model": {"source": "org/tiny"}})
    buckets = [new_bucket(s3_server) for _ in range(3)]
    run, variables, cache = run_config(spec, buckets[0].target()), make_hub_environment(hub), tmp_path / "node"
    pods = [make_cache_pod(run, tmp_path / f"pod-{number}", cache, NODE_CACHE_OPTIONS, variables).start() for number in range(8)]
    assert [pod.end() for pod in pods] == [0] * 8
    assert hub.list_downloads("org/tiny") == MODEL_FILES
    cached_models = [read_record(pod).models["model.source"] for pod in pods]
    assert sorted(model.from_cache for model in cached_models) == [False] + [True] * 7
    assert len({model.path for model in cached_models}) == 1

    chosen_pod = next(pod for pod, model in zip(pods, cached_models, strict=True) if model.from_cache)
    pod_with_cache, message = train(run, chosen_pod.folder, buckets[0], hub)
    assert read_model_values(message) == ("cache", compute_model_bytes(model), [])
    assert hub.list_downloads("org/tiny") == MODEL_FILES and not (chosen_pod.folder / "work/fetched/model").exists()

    copy_run = run_config(spec, buckets[1].target())
    with make_cache_pod(copy_run, tmp_path / "claim-pod", tmp_path / "claim", CLAIM_CACHE_OPTIONS, variables) as pod:
        assert pod.end() == 0
    pod_with_copy, copy_message = train(copy_run, tmp_path / "claim-pod", buckets[1], hub)
    assert read_model_values(copy_message) == ("download", 0, [])
    assert hub.list_downloads("org/tiny") == sorted(MODEL_FILES * 2)

    pod_without_cache, plain_message = train(run_config(spec, buckets[2].target()), tmp_path / "plain", buckets[2], hub)
    assert read_model_values(plain_message) == (None, None, [])
    expected_run = record_run(buckets[2], [pod_without_cache], plain_message)
    assert record_run(buckets[0], [pod_with_cache], message) == expected_run
    assert record_run(buckets[1], [pod_with_copy], copy_message) == expected_run
    for other_message in (message, copy_message):
        assert other_message.resolved and plain_message.resolved and other_message.resolved.model_revision == plain_message.resolved.model_revision


def test_a_preparation_fills_the_cache_in_a_claim(s3_server: S3Endpoint, hub: Hub, model: Path, rows: Path, tmp_path: Path) -> None:
    """If the cache in the claim is filled, the training pod downloads nothing. A preparation that cannot write to the claim succeeds nevertheless."""
    bucket = new_bucket(s3_server)
    run = run_config(merge(make_spec(model, rows, "lora"), {"model": {"source": "org/tiny"}, "training": {"maxSteps": 2}}), bucket.target())
    variables = make_hub_environment(hub)
    (tmp_path / "file").write_text("not a folder")
    downloads = []
    for name in ("file", "claim"):
        with Pod(run, tmp_path / f"prepare-{name}", bucket.env | variables | {"FINETUNE_CLAIM_CACHE": str(tmp_path / name)}, command="prepare") as pod:
            assert pod.end() == 0, pod.text[-4000:]
        downloads.append(sorted(set(hub.list_downloads("org/tiny"))))
        message = pod.termination_message()
        assert message.plan is not None and message.resolved is not None and not (pod.folder / "work/from-cache").exists()
        notes = [note.rpartition(": ")[0] for note in message.resolved.notes or [] if "cache" in note]
        assert notes == (["in the preparation, model.source is downloaded without model.cache: Not a directory"] if name == "file" else [])
    assert downloads == [sorted(set(MODEL_FILES) - {"model.safetensors"}), MODEL_FILES]
    download_count = len(hub.list_downloads("org/tiny"))
    with make_cache_pod(run, tmp_path / "pod", tmp_path / "claim", CLAIM_CACHE_OPTIONS, variables) as pod:
        assert pod.end() == 0
    assert read_record(pod).models["model.source"].from_cache and len(hub.list_downloads("org/tiny")) == download_count
    _, message = train(run, tmp_path / "pod", bucket, hub)
    assert read_model_values(message) == ("cache", compute_model_bytes(model), []) and len(hub.list_downloads("org/tiny")) == download_count


def test_a_pod_whose_cache_fails_trains_and_adds_a_note(s3_server: S3Endpoint, hub: Hub, model: Path, rows: Path, tmp_path: Path) -> None:
    bucket = new_bucket(s3_server)
    run = run_config(merge(make_spec(model, rows, "lora"), {"model": {"source": "org/tiny"}, "training": {"maxSteps": 2}}), bucket.target())
    (tmp_path / "node").write_text("not a folder")
    with make_cache_pod(run, tmp_path / "pod", tmp_path / "node", NODE_CACHE_OPTIONS, make_hub_environment(hub)) as pod:
        assert pod.end() == 0
    _, message = train(run, tmp_path / "pod", bucket, hub)
    source, saved_bytes, notes = read_model_values(message)
    assert (source, saved_bytes) == ("download", 0) and hub.list_downloads("org/tiny") == MODEL_FILES
    assert [note.partition(": ")[0] for note in notes] == ["model.source is downloaded without model.cache"]


def test_a_model_in_s3_is_downloaded_once(s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    """One object of the model was uploaded in parts. A file that was changed in the claim is detected by the hash that the store keeps of the object."""
    for name in MODEL_FILES:
        bucket.put(f"{bucket.root}/base/{name}", (model / name).read_bytes())
    blob = os.urandom(17 * 1024 * 1024)
    (tmp_path / "extra.bin").write_bytes(blob)
    bucket.client.upload_file(str(tmp_path / "extra.bin"), bucket.name, f"{bucket.root}/base/extra.bin")
    with S3Proxy(s3_server.host_url) as proxy:
        read_fault = proxy.fault(Latency(0), operation="GetObject", key="/base/extra.bin")
        target = bucket.target(endpoint=proxy.url)
        run = run_config(merge(make_spec(model, rows, "lora"), {"model": {"source": f"s3://{bucket.name}/{bucket.root}/base"}}), target)

        def fill_cache(name: str) -> CacheRecord:
            with make_cache_pod(run, tmp_path / name, tmp_path / "claim", CLAIM_CACHE_OPTIONS, bucket.env) as pod:
                assert pod.end() == 0
            return read_record(pod)

        first_record, second_record = fill_cache("first"), fill_cache("second")
        download_count = read_fault.hits
        (cached_file,) = (tmp_path / "claim").glob("models/*/files/extra.bin")
        cached_file.write_bytes(b"\0" + blob[1:])
        third_record = fill_cache("third")
    records = (first_record, second_record, third_record)
    assert [record.models["model.source"].from_cache for record in records] == [False, True, False], (first_record.notes, second_record.notes)
    assert read_fault.hits == 2 * download_count
    assert (first_record.notes, second_record.notes) == ([], [])
    assert third_record.notes[0].endswith("which was removed: extra.bin has another hash than at the source")
    for record in (first_record, second_record, third_record):
        assert (record.models["model.source"].path / "extra.bin").read_bytes() == blob
    assert first_record.models["model.source"].listing_version == third_record.models["model.source"].listing_version is not None
