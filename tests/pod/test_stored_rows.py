"""Prepared rows in a real S3 server: preparations share them, and training pods use them only after their signature and hashes are verified.

A run with stored rows must have the same rows per step, log and weights as a run that tokenises the data itself.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import PREPARATION_ATTEMPT
from finetune_api.pod import PreparedRows, ResumeConfig, RunConfig, TerminationMessage
from finetune_api.status import DataReport
from pod_buckets import Bucket
from pod_harness import ROWS, UID, Pod, merge, run_config, write_rows
from recorded_run import make_spec, make_traced_pod, read_weight_hashes, record_run, run_uninterrupted

from localcluster.s3 import S3Endpoint

OTHER_UID = "99999999-2222-3333-4444-555555555555"


def prepare(bucket: Bucket, folder: Path, spec: dict[str, Any], uid: str = UID, processes: int = 1, ttl_days: int = 30) -> TerminationMessage:
    """Run a preparation pod of a job with this uid, and return its termination message."""
    target = bucket.target(uri=f"s3://{bucket.name}/{bucket.root}/team/job/{uid}")
    run = run_config(spec, target, processes=processes).model_copy(update={"prepared": PreparedRows(ttl_days=ttl_days)})
    with Pod(run, folder, bucket.env, command="prepare") as pod:
        assert pod.end() == 0, pod.text[-4000:]
    return pod.termination_message()


def make_run_with_rows(spec: dict[str, Any], bucket: Bucket, data: DataReport, **options: Any) -> RunConfig:
    """Return the run configuration that the operator writes after a preparation with this data report."""
    rows = PreparedRows(digest=data.digest, manifest_sha256=data.prepared_sha256)
    return run_config(spec, bucket.target(), **options).model_copy(update={"prepared": rows})


def list_stored_keys(bucket: Bucket) -> list[str]:
    """List the keys of the namespace's prepared rows, relative to their folder."""
    prefix = f"{bucket.root}/team/_prepared/"
    answer = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=prefix)
    return [item["Key"].removeprefix(prefix) for item in answer.get("Contents", [])]


def full_key(bucket: Bucket, key: str) -> str:
    return f"{bucket.root}/team/_prepared/{key}"


def read_object(bucket: Bucket, key: str) -> bytes:
    return bytes(bucket.client.get_object(Bucket=bucket.name, Key=full_key(bucket, key))["Body"].read())


def list_prepared_rows_notes(message: TerminationMessage) -> list[str]:
    """Return the notes of a training pod about its prepared rows."""
    assert message.resolved is not None
    return [note for note in message.resolved.notes or [] if "rows of the preparation" in note or "prepared rows" in note]


def require_data_report(message: TerminationMessage) -> DataReport:
    assert message.data is not None
    return message.data


USED_NOTE = "the rows of the preparation are used: 36 rows"


def test_a_second_job_tokenises_nothing_and_a_run_with_stored_rows_is_equal(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = make_spec(model, rows, "full")
    first_data_report = require_data_report(prepare(bucket, tmp_path / "first", spec))
    second_data_report = require_data_report(prepare(bucket, tmp_path / "second", spec, OTHER_UID))
    assert (first_data_report.tokenised_rows, second_data_report.tokenised_rows) == (36, 0)
    assert second_data_report.model_copy(update={"tokenised_rows": 36}) == first_data_report
    assert first_data_report.prepared_uri == f"s3://{bucket.name}/{bucket.root}/team/_prepared/{first_data_report.digest}"
    names = sorted(key.split("/", 1)[1] for key in list_stored_keys(bucket))
    assert [name for name in names if "/" not in name] == ["_COMMITTED", "_USED"]
    assert sorted({name.split("/", 1)[1] for name in names if "/" in name}) == ["manifest.hmac", "manifest.json", "prepared.json", "train/00000.arrow"]

    with make_traced_pod(make_run_with_rows(spec, bucket, first_data_report), tmp_path / "train", bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    message = pod.termination_message()
    assert list_prepared_rows_notes(message) == [USED_NOTE]
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "full", 1)
    assert record_run(bucket, [pod], message) == expected_run


# ---- rows that cannot be used ----


def flip_byte(bucket: Bucket, data: DataReport) -> None:
    key = next(key for key in list_stored_keys(bucket) if key.endswith("00000.arrow"))
    content = bytearray(read_object(bucket, key))
    content[-40] ^= 1
    bucket.put(full_key(bucket, key), bytes(content))


def delete_marker(bucket: Bucket, data: DataReport) -> None:
    bucket.client.delete_object(Bucket=bucket.name, Key=full_key(bucket, f"{data.digest}/_COMMITTED"))


def delete_shard(bucket: Bucket, data: DataReport) -> None:
    key = next(key for key in list_stored_keys(bucket) if key.endswith("00000.arrow"))
    bucket.client.delete_object(Bucket=bucket.name, Key=full_key(bucket, key))


def replace_commit(bucket: Bucket, data: DataReport) -> None:
    """Commit other rows, as an attacker with write access to the bucket could do: files, manifest and marker agree with each other."""
    import hashlib

    marker = json.loads(read_object(bucket, f"{data.digest}/_COMMITTED"))
    folder = f"{data.digest}/{marker['path']}"
    manifest = json.loads(read_object(bucket, f"{folder}/manifest.json"))
    content = bytearray(read_object(bucket, f"{folder}/train/00000.arrow"))
    content[-40] ^= 1
    entry = next(file for file in manifest["files"] if file["path"].endswith(".arrow"))
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(manifest).encode()
    bucket.put(full_key(bucket, f"{folder}/train/00000.arrow"), bytes(content))
    bucket.put(full_key(bucket, f"{folder}/manifest.json"), text)
    bucket.put(full_key(bucket, f"{data.digest}/_COMMITTED"), json.dumps(marker | {"manifestSha256": hashlib.sha256(text).hexdigest()}).encode())


def write_other_layout(bucket: Bucket, data: DataReport) -> None:
    """Store a manifest without the summary of the rows, as another version could write it.

    Sets `data.prepared_sha256` to the hash of this manifest.
    """
    import hashlib

    marker = json.loads(read_object(bucket, f"{data.digest}/_COMMITTED"))
    key = f"{data.digest}/{marker['path']}/manifest.json"
    text = json.dumps(json.loads(read_object(bucket, key)) | {"extra": {}}).encode()
    bucket.put(full_key(bucket, key), text)
    data.__dict__["prepared_sha256"] = hashlib.sha256(text).hexdigest()
    bucket.put(full_key(bucket, f"{data.digest}/_COMMITTED"), json.dumps(marker | {"manifestSha256": data.prepared_sha256}).encode())


DAMAGES: dict[str, tuple[Callable[[Bucket, DataReport], None], str]] = {
    "flipped byte": (flip_byte, "is damaged: its sha256 differs from the manifest"),
    "deleted marker": (delete_marker, "nothing is committed at"),
    "deleted shard": (delete_shard, "is missing"),
    "replaced commit": (replace_commit, "was replaced after the preparation"),
    "another version": (write_other_layout, "were prepared by another version"),
}


@pytest.mark.slow  # `make test` checks damaged rows in tests/unit/trainer/supervisor/test_stored_rows.py
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_training_pod_notes_damaged_rows_and_tokenises_the_data_itself(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, damage: str
) -> None:
    change, problem = DAMAGES[damage]
    spec = make_spec(model, rows, "full")
    data = require_data_report(prepare(bucket, tmp_path / "prepare", spec))
    change(bucket, data)
    with make_traced_pod(make_run_with_rows(spec, bucket, data), tmp_path / "train", bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    message = pod.termination_message()
    (note,) = list_prepared_rows_notes(message)
    assert note.startswith("the prepared rows are not used: ") and note.endswith("; this pod reads and tokenises the data"), note
    assert problem in note
    assert record_run(bucket, [pod], message) == run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "full", 1)


@pytest.mark.slow
def test_data_that_have_changed_are_prepared_again(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    """A data file changes after the first preparation.

    A second preparation stores rows with another digest, and a training pod does not use the rows of the old file.
    """
    rows = write_rows(tmp_path / "rows.jsonl")
    spec = merge(make_spec(model, rows, "full"), {"training": {"maxSteps": 2}})
    old_data_report = require_data_report(prepare(bucket, tmp_path / "old", spec))
    changed_rows = [*ROWS[:-1], {"messages": [*ROWS[-1]["messages"][:1], {"role": "assistant", "content": "It is many."}]}]
    write_rows(rows, changed_rows)
    new_data_report = require_data_report(prepare(bucket, tmp_path / "new", spec, OTHER_UID))
    assert old_data_report.digest != new_data_report.digest and new_data_report.tokenised_rows == 36
    assert len({key.split("/")[0] for key in list_stored_keys(bucket)}) == 2
    with Pod(make_run_with_rows(spec, bucket, old_data_report), tmp_path / "train", bucket.env) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    assert list_prepared_rows_notes(pod.termination_message()) == [
        "the prepared rows are not used: the data have changed since the preparation; this pod reads and tokenises the data"
    ]


@pytest.mark.slow
def test_rows_of_another_chat_template_are_not_trained_on(bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    """Only the rank, not the supervisor, can see that the chat template differs. The rank then tokenises the data again."""
    spec = merge(make_spec(model, rows, "full"), {"training": {"maxSteps": 2}})
    data = require_data_report(prepare(bucket, tmp_path / "prepare", spec))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    changed_spec = merge(spec, {"dataset": {"chatTemplate": {"text": template}}})
    with Pod(make_run_with_rows(changed_spec, bucket, data), tmp_path / "train", bucket.env) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    assert list_prepared_rows_notes(pod.termination_message()) == [
        USED_NOTE,
        "the prepared rows come from another tokenizer, other options or another version, so this pod tokenised the data again",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "processes", "variant"), [("lora", 2, "windows"), ("lora", 1, "packing"), ("lora", 1, "best")])
def test_a_resumed_attempt_with_stored_rows_is_equal(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    method: str, processes: int, variant: str,
) -> None:  # fmt: skip
    spec = make_spec(model, rows, method, variant)
    data = require_data_report(prepare(bucket, tmp_path / "prepare", spec, processes=processes))
    with make_traced_pod(make_run_with_rows(spec, bucket, data, processes=processes), tmp_path / "one", bucket, hold_point="accumulation:19") as first_pod:
        first_pod.wait_until((first_pod.folder / "work" / "held").exists)
        first_pod.wait_committed(16)
        first_pod.kill()
    repeated_run = make_run_with_rows(spec, bucket, data, processes=processes, attempt=2, resume=ResumeConfig(mode="auto", expect_step=16))
    with make_traced_pod(repeated_run, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    message = second_pod.termination_message()
    assert (message.resumed_from_step, any("rows of the preparation are used" in note for note in list_prepared_rows_notes(message))) == (16, True)
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, variant)
    assert record_run(bucket, [first_pod, second_pod], message) == expected_run


# ---- rows that several preparations share, and rows that are removed ----


def read_tokenised_rows(pod: Pod) -> int | None:
    """Read the number of rows that a preparation pod has tokenised so far. None if the pod has not reported it."""
    report = pod.report()
    assert report is None or report.attempt == PREPARATION_ATTEMPT
    return report.data.tokenised_rows if report is not None and report.data is not None else None


@pytest.mark.slow
def test_two_simultaneous_preparations_report_the_rows_of_the_first_commit(bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    """Both preparations tokenise the data, because neither finds stored rows: the first one is paused until the second one has committed."""
    spec = make_spec(model, rows, "full")
    pods = []
    for number, uid in enumerate((UID, OTHER_UID)):
        target = bucket.target(uri=f"s3://{bucket.name}/{bucket.root}/team/job/{uid}")
        pods.append(Pod(run_config(spec, target), tmp_path / str(number), bucket.env, command="prepare"))
    first_pod, second_pod = pods
    with first_pod, second_pod:
        first_pod.wait_until(lambda: bool(list((first_pod.folder / "work").glob("stored-rows-*"))))
        assert first_pod.process is not None
        first_pod.process.send_signal(signal.SIGSTOP)
        second_pod.wait_until(lambda: read_tokenised_rows(second_pod) == 36)
        assert second_pod.end() == 0, second_pod.text[-4000:]
        first_pod.process.send_signal(signal.SIGCONT)
        assert first_pod.end() == 0, first_pod.text[-4000:]
    reports = [require_data_report(pod.termination_message()) for pod in pods]
    assert reports[0] == reports[1] and reports[0].tokenised_rows == 36
    incarnations = {key.split("/")[1] for key in list_stored_keys(bucket) if key.count("/") > 1}
    assert len(incarnations) == 1, "the preparation that commits last leaves its own files in the bucket"


@pytest.mark.slow
@pytest.mark.parametrize("damage_rows", [flip_byte, replace_commit], ids=["damaged", "without the signature of a preparation"])
def test_a_preparation_replaces_rows_that_are_damaged_or_not_signed(
    bucket: Bucket, model: Path, rows: Path, tmp_path: Path, damage_rows: Callable[[Bucket, DataReport], object]
) -> None:
    """An attacker with write access to the bucket can commit rows before a job's preparation, but cannot sign them."""
    spec = make_spec(model, rows, "full")
    damage_rows(bucket, require_data_report(prepare(bucket, tmp_path / "one", spec)))
    second_data_report = require_data_report(prepare(bucket, tmp_path / "two", spec, OTHER_UID))
    third_data_report = require_data_report(prepare(bucket, tmp_path / "three", spec))
    assert (second_data_report.tokenised_rows, third_data_report.tokenised_rows) == (36, 0)
    assert third_data_report.prepared_sha256 == second_data_report.prepared_sha256


@pytest.mark.slow
def test_a_preparation_removes_rows_that_are_unused_for_too_long(bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    spec = make_spec(model, rows, "full")
    old_data_report = require_data_report(prepare(bucket, tmp_path / "old", spec))
    assert datetime.fromisoformat(json.loads(read_object(bucket, f"{old_data_report.digest}/_USED"))["until"]) > datetime.now(UTC) + timedelta(days=29)
    bucket.put(full_key(bucket, f"{old_data_report.digest}/_USED"), json.dumps({"until": "2026-01-01T00:00:00Z"}).encode())
    new_data_report = require_data_report(prepare(bucket, tmp_path / "new", merge(spec, {"dataset": {"maxSequenceLength": 64}}), OTHER_UID, ttl_days=7))
    assert {key.split("/")[0] for key in list_stored_keys(bucket)} == {new_data_report.digest}
    assert datetime.fromisoformat(json.loads(read_object(bucket, f"{new_data_report.digest}/_USED"))["until"]) < datetime.now(UTC) + timedelta(days=8)


PREFERENCE_PAIRS = [{"prompt": f"{a} + 1?", "chosen": f"It is {a + 1}.", "rejected": f"It is {a}."} for a in range(12)]
LABELLED_ANSWERS = [{"prompt": f"{a} + 1?", "completion": f"It is {a + a % 2}.", "label": a % 2 == 1} for a in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "data_format", "data"), [("dpo", "preference", PREFERENCE_PAIRS), ("kto", "unpairedPreference", LABELLED_ANSWERS)], ids=["dpo", "kto"]
)
def test_preference_rows_are_also_shared_by_preparations(
    bucket: Bucket, model: Path, tmp_path: Path, trainer: str, data_format: str, data: list[dict[str, Any]]
) -> None:
    """A run with stored rows ends with the weights of a run without stored rows."""
    rows = write_rows(tmp_path / "rows.jsonl", data)
    spec = {
        "model": {"source": f"file://{model}"}, "trainer": {"type": trainer}, "dataset": {"train": f"file://{rows}", "format": data_format},
        "training": {"maxSteps": 3, "batchSizePerDevice": 2},
    }  # fmt: skip
    first_data_report = require_data_report(prepare(bucket, tmp_path / "first", spec))
    assert (first_data_report.tokenised_rows, require_data_report(prepare(bucket, tmp_path / "second", spec, OTHER_UID)).tokenised_rows) == (12, 0)
    weights = []
    for name, run in (("with", make_run_with_rows(spec, bucket, first_data_report)), ("without", run_config(spec, bucket.target(), attempt=2))):
        with Pod(run, tmp_path / name, bucket.env) as pod:
            assert pod.end() == 0, pod.text[-4000:]
        message = pod.termination_message()
        assert list_prepared_rows_notes(message) == (["the rows of the preparation are used: 12 rows"] if name == "with" else [])
        weights.append(read_weight_hashes(bucket, message))
        for key in bucket.keys(""):
            bucket.client.delete_object(Bucket=bucket.name, Key=f"{bucket.root}/team/job/{UID}/{key}")
    assert weights[0] == weights[1] != {}
