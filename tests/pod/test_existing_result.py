"""A preparation pod adopts the result that a training pod of an earlier job with the same name has stored in S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig, TerminationMessage
from pod_buckets import Bucket
from pod_harness import ROWS, UID, Pod, merge, run_config, write_rows

NEW_UID = "99999999-2222-3333-4444-555555555555"


def copy_with_new_uid(run: RunConfig) -> RunConfig:
    """Return the run configuration of a later job with the same name and another uid."""
    storage = run.storage.model_copy(update={"uri": run.storage.uri.replace(UID, NEW_UID)})
    return run.model_copy(update={"uid": NEW_UID, "storage": storage})


def prepare(run: RunConfig, folder: Path, bucket: Bucket) -> TerminationMessage:
    """Run a preparation pod of a later job with the same name, and return its termination message."""
    with Pod(copy_with_new_uid(run), folder, bucket.env, command="prepare") as pod:
        code = pod.end()
    message = pod.termination_message()
    assert message.exit_code == code, pod.text[-3000:]
    return message


def put(bucket: Bucket, name: str, data: bytes) -> None:
    """Write an object below the test's key prefix."""
    bucket.put(f"{bucket.root}/{name}", data)


def test_a_job_in_a_rebuilt_cluster_adopts_the_result_of_the_same_spec_and_data(bucket: Bucket, tmp_path: Path, model: Path) -> None:
    for file in sorted(model.iterdir()):
        put(bucket, f"base/{file.name}", file.read_bytes())
    put(bucket, "rows.jsonl", write_rows(tmp_path / "rows.jsonl").read_bytes())
    address = f"s3://{bucket.name}/{bucket.root}"
    spec: dict[str, Any] = {
        "model": {"source": f"{address}/base"}, "dataset": {"train": f"{address}/rows.jsonl", "format": "messages"},
        "training": {"maxSteps": 4},
    }  # fmt: skip
    with Pod(run_config(spec, bucket.target()), tmp_path / "trained", bucket.env) as pod:
        assert pod.end() == 0, pod.text[-3000:]
    trained_message = pod.termination_message()
    assert trained_message.output is not None and trained_message.metrics is not None
    record = json.loads(bucket.read("run/result.json"))
    assert record["settings"] == {
        "model.source": f"{address}/base", "dataset.train": f"{address}/rows.jsonl", "dataset.format": "messages",
        "training.maxSteps": 4, "output.verify": False, "resources.nodes": 1, "resources.gpusPerNode": 0, "resources.processesPerNode": 1,
    }  # fmt: skip
    assert set(record["inputs"]) == {"training data", "model.source"}

    spec_with_other_placement = merge(spec, {"placement": {"labels": {"team": "a"}}, "resources": {"memory": "9Gi"}, "tracking": {"loggingSteps": 1}})
    adopted_message = prepare(run_config(spec_with_other_placement, bucket.target()), tmp_path / "adopted", bucket)
    assert adopted_message.output == trained_message.output.model_copy(update={"adopted_uid": UID})
    assert adopted_message.output is not None and adopted_message.output.lineage_uri is not None and adopted_message.output.report_uri is not None
    assert (adopted_message.metrics, adopted_message.step, adopted_message.exit_code) == (trained_message.metrics, 4, 0)
    assert adopted_message.resolved is not None and trained_message.resolved is not None
    assert adopted_message.resolved.dataset_digest == trained_message.resolved.dataset_digest
    assert not [file.name for file in (tmp_path / "adopted").rglob("*.safetensors")], "the preparation pod downloaded weights"
    assert bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=f"{bucket.root}/team/job/{NEW_UID}/")["KeyCount"] == 0

    put(bucket, "rows.jsonl", write_rows(tmp_path / "rows.jsonl", ROWS[:-1]).read_bytes())
    put(bucket, "base/model.safetensors", (model / "model.safetensors").read_bytes()[:-1] + b"x")
    refused_message = prepare(run_config(merge(spec, {"policy": {"onExistingResult": "fail"}}), bucket.target()), tmp_path / "refused", bucket)
    assert (refused_message.code, refused_message.class_) == ("ExistingResultFound", FailureClass.USER)
    assert refused_message.message == (
        f"policy.onExistingResult is fail, and an earlier FineTuneJob team/job (uid {UID}) has stored {trained_message.output.uri}; "
        "it was made with other values: contents of model.source, contents of training data"
    )
