"""Pods that train a vision-language model on images: exact resume, swapped images, and verification of the stored model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_api.status import VerificationOutcome
from finetune_trainer.inputs import Inputs
from pod_buckets import Bucket
from pod_harness import UID, Pod, merge, run_config, write_rows
from recorded_run import make_traced_pod, read_weight_hashes

from tests.support.vision import COLOURS, make_png, make_vision_model

STEPS, CHECKPOINT_STEPS, KILLED_IN_STEP = 9, 4, 5
"""An epoch has three steps, because a step trains two of the five rows."""


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("models") / "vision", "qwen2_vl")


def write_data(folder: Path, bucket: Bucket) -> Path:
    """Write rows and images. The images are in a local folder and in the bucket.

    Every second row refers to its image by an S3 address. The other rows refer to their images by file name.
    """
    (folder / "images").mkdir()
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        content = make_png(colour, (40 + 8 * number, 32))
        (folder / "images" / f"{name}.png").write_bytes(content)
        bucket.put(f"{bucket.root}/images/{name}.png", content)
        address = f"s3://{bucket.name}/{bucket.root}/images/" if number % 2 else ""
        question = [{"type": "image", "url": f"{address}{name}.png"}, {"type": "text", "text": "question"}]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": name}]})
    return write_rows(folder / "rows.jsonl", rows)


def make_spec(model: Path, rows: Path, bucket: Bucket) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{model}", "modality": "visionLanguage"},
        "method": {"type": "lora", "lora": {"dropout": 0.1}, "vision": {"visionLayers": True}},
        "dataset": {"train": f"file://{rows}", "images": {"root": f"s3://{bucket.name}/{bucket.root}/images"}},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 1, "gradientAccumulationSteps": 2, "learningRate": 1e-2},
        "checkpoint": {"steps": CHECKPOINT_STEPS, "keep": 0}, "tracking": {"loggingSteps": 1},
    }  # fmt: skip


@pytest.mark.faults
def test_a_killed_run_on_images_resumes_exactly(bucket: Bucket, vision_model: Path, tmp_path: Path) -> None:
    from tests.support.learning import train_here

    rows = write_data(tmp_path, bucket)
    spec = make_spec(vision_model, rows, bucket)
    run = run_config(spec, bucket.target())
    with make_traced_pod(run, tmp_path / "one", bucket, hold_point=f"accumulation:{KILLED_IN_STEP}") as first_pod:
        first_pod.wait_until((first_pod.folder / "work" / "held").exists)
        first_pod.wait_committed(CHECKPOINT_STEPS)
        first_pod.kill()
        first_pod.end()
    repeated_run = run_config(spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=CHECKPOINT_STEPS))
    with Pod(repeated_run, tmp_path / "two", bucket.env) as second_pod:
        assert second_pod.end() == ExitCode.OK, second_pod.text[-6000:]
    message = second_pod.termination_message()
    assert (message.resumed_from_step, message.resolved and message.resolved.resume_exact) == (CHECKPOINT_STEPS, True)

    inputs = Inputs(
        model=vision_model, train=[rows], images=tmp_path / "images", model_revision="m", dataset_digest="d", output_dir=tmp_path / "out",
        config_maps=tmp_path / "none",
    )  # fmt: skip
    uninterrupted_result = train_here(run, inputs)
    assert uninterrupted_result.folder is not None
    expected_hash = hashlib.sha256((uninterrupted_result.folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert read_weight_hashes(bucket, message) == {"adapter_model.safetensors": expected_hash}


@pytest.mark.faults
def test_resume_and_lineage_detect_a_swapped_image_of_equal_size(vision_model: Path, tmp_path: Path) -> None:
    """The images are in the folder of the data file, and the spec sets no `dataset.images.root`."""
    rows = []
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(make_png(colour))
        question = [{"type": "image", "url": f"{name}.png"}, {"type": "text", "text": "question"}]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": name}]})
    rows_file = write_rows(tmp_path / "rows.jsonl", rows)
    spec = {
        "model": {"source": f"file://{vision_model}", "modality": "visionLanguage"}, "dataset": {"train": f"file://{rows_file}"},
        "training": {"maxSteps": 4, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1}, "checkpoint": {"steps": 2, "keep": 0},
    }  # fmt: skip
    run_folder = tmp_path / "store" / "team" / "job" / UID
    target = StoreTarget(uri=f"file://{run_folder}")
    with Pod(run_config(spec, target), tmp_path / "one") as first_pod:
        assert first_pod.end() == ExitCode.OK, first_pod.text[-6000:]
    statement = json.loads((run_folder / "lineage" / "statement.json").read_text())
    dependencies = {dependency["name"]: dependency for dependency in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    lines = sorted(f"{name}.png\0{hashlib.sha256(make_png(colour)).hexdigest()}" for name, colour in COLOURS.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert dependencies["training image set"]["annotations"] == {"combinedDigest": digest}
    (run_folder / "model" / "_COMMITTED").unlink()  # simulates a job that stopped before it committed its model

    original_content = (tmp_path / "red.png").read_bytes()
    swapped_content = make_png((20, 20, 222))
    assert len(original_content) == len(swapped_content)
    (tmp_path / "red.png").write_bytes(swapped_content)
    with Pod(run_config(spec, target, attempt=2), tmp_path / "two") as second_pod:
        assert second_pod.end() == ExitCode.CONFIG_INVALID, second_pod.text[-6000:]
    message = second_pod.termination_message()
    assert message.code == "CheckpointIncompatible" and "was made with another training image set" in (message.message or "")
    (tmp_path / "red.png").write_bytes(original_content)
    with Pod(run_config(spec, target, attempt=3), tmp_path / "three") as third_pod:
        assert third_pod.end() == ExitCode.OK, third_pod.text[-6000:]
    message = third_pod.termination_message()
    assert message.resumed_from_step == 4 and message.resolved is not None and message.resolved.resume_exact is True


@pytest.mark.slow
@pytest.mark.faults
def test_adapter_and_merged_model_are_verified_by_a_fresh_process(bucket: Bucket, vision_model: Path, tmp_path: Path) -> None:
    """Two ranks train the vision layers. Some micro-batches have no image, so the vision layers of one rank get no gradient from them."""
    rows = write_data(tmp_path, bucket)
    text_row = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "Paris"}]}
    rows.write_text(rows.read_text() + 4 * (json.dumps(text_row) + "\n"))
    spec = merge(make_spec(vision_model, rows, bucket), {"output": {"verify": True, "mergeAdapter": True}})
    with Pod(run_config(spec, bucket.target(), processes=2), tmp_path / "pod", bucket.env) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    output = pod.termination_message().output
    assert output is not None and output.uri is not None and output.verification is not None
    verified_artefacts = [(artefact.artefact, artefact.result, artefact.reason) for artefact in output.verification.artefacts]
    assert verified_artefacts == [("adapter", VerificationOutcome.VERIFIED, None), ("merged", VerificationOutcome.VERIFIED, None)]
    for uri in (output.uri, output.merged_uri or ""):
        manifest = json.loads(bucket.read(uri.split("/job/", 1)[1].split("/", 1)[1] + "/manifest.json"))
        assert {"preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} <= {item["path"] for item in manifest["files"]}
