"""A preparation pod checks storage, model and data without a GPU: the jobs that it accepts, and the bad jobs that it refuses with place and cure.

The pods with GPUs of a refused job are never created: `tests/unit/operator/test_preparation.py` and `tests/e2e/jobs/test_preparation.py`.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finetune_api.memory.changes import NO_CHANGE
from finetune_api.names import FailureClass
from finetune_api.pod import GpuPool, RunConfig, TerminationMessage
from finetune_api.status import DataReport
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, merge, run_config, write_rows

from tests.support.slices import quick_slice

GPUS = 8


def prepare(bucket: Bucket, folder: Path, run: RunConfig, env: dict[str, str] | None = None) -> tuple[TerminationMessage, str]:
    """Run a preparation pod, and return its termination message and its log."""
    with Pod(run, folder / "pod", bucket.env | (env or {}), command="prepare") as pod:
        code = pod.end()
    message = pod.termination_message()
    assert message.exit_code == code, pod.text[-3000:]
    return message, pod.text


def test_a_gpu_job_is_prepared_without_a_gpu_and_without_weights(bucket: Bucket, tmp_path: Path, model: Path) -> None:
    for file in sorted(model.iterdir()):
        bucket.client.upload_file(str(file), bucket.name, f"{bucket.root}/base/{file.name}")
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])
    spec: dict[str, Any] = {
        "model": {"source": f"s3://{bucket.name}/{bucket.root}/base"}, "method": {"type": "qlora"},
        "dataset": {"train": f"file://{rows}", "format": "messages", "checks": {"deduplicate": True}},
        "training": {"maxSteps": 4, "mixedPrecision": "bf16"}, "distributed": {"strategy": "fsdp"},
    }  # fmt: skip
    message, log = prepare(bucket, tmp_path, run_config(spec, bucket.target(), nodes=2, processes=GPUS, gpus=GPUS))
    assert message.exit_code == 0, log[-3000:]
    assert message.data is not None and message.data.digest is not None and message.data.prepared_sha256 is not None
    assert message.data.prepared_uri == f"s3://{bucket.name}/{bucket.root}/team/_prepared/{message.data.digest}"
    assert message.data.model_copy(update={"digest": None, "prepared_uri": None, "prepared_sha256": None}) == DataReport(
        rows={"train": 36, "validation": 0, "test": 0}, bad_rows=0, duplicates=1, tokens=926, trained_tokens=242, median_length=26, longest=27, truncated=0,
        tokenised_rows=36,
    )  # fmt: skip
    assert message.plan is not None and message.plan.memory is not None and message.plan.memory.expected_bytes > 0
    assert message.plan.work is not None and message.plan.work.steps == 4
    assert message.resolved is not None
    assert (message.resolved.trainable_parameters, message.resolved.total_parameters) == (32768, 164160)
    assert (message.resolved.dataset_rows, message.resolved.model_revision) == (36, None)
    downloaded = {file.name for file in (tmp_path / "pod" / "work" / "fetched" / "model").iterdir()}
    assert "config.json" in downloaded and not any(name.endswith(".safetensors") for name in downloaded)


# ---- choices of the plan, on GPUs that do not exist ----


def planned_job(bucket: Bucket, model: Path, rows: Path, *pools: GpuPool, training: dict[str, Any]) -> RunConfig:
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": training}
    return run_config(spec, bucket.target(), gpus=1).model_copy(update={"pools": list(pools)})


def test_a_preparation_chooses_what_the_spec_leaves_out(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    pools = [GpuPool(name="small", memory_bytes=10**8, is_current=True), GpuPool(name="l4", memory_bytes=24 * 2**30, gpu_type="l4-24gb")]
    message, log = prepare(bucket, tmp_path, planned_job(bucket, model, rows, *pools, training={"maxSteps": 4, "effectiveBatchSize": 12}))
    assert message.plan is not None, log[-3000:]
    assert {choice.field: choice.value for choice in message.plan.choices or []} == {
        "resources.nodePool": "l4", "training.batchSizePerDevice": 12, "training.gradientAccumulationSteps": 1, "training.gradientCheckpointing": "disabled",
    }  # fmt: skip
    assert (message.exit_code, message.plan.no_choices, message.plan.work and message.plan.work.steps) == (0, None, 4)


def test_a_job_that_fits_nowhere_is_refused_with_changes(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    pool = GpuPool(name="small", memory_bytes=10**8, is_current=True)
    message, _ = prepare(bucket, tmp_path, planned_job(bucket, model, rows, pool, training={"maxSteps": 4}))
    assert (message.code, message.class_, message.exit_code) == ("DoesNotFit", FailureClass.USER, 64)
    found = re.fullmatch(r"the job is expected to need at least 0\.\d\d GB on each GPU, (.*)", message.message or "")
    assert found is not None and found[1] == "which no pool that it may use has: small (0.10 GB)"
    assert message.hint == NO_CHANGE


def test_a_job_without_a_plan_says_why_nothing_was_chosen(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    message, _ = prepare(bucket, tmp_path, planned_job(bucket, model, rows, training={"maxSteps": 4}))
    assert message.plan is not None and message.plan.memory is not None
    assert (message.plan.choices, message.plan.no_choices) == (None, "the memory of the GPUs is not known")


# ---- bad jobs ----


@dataclass
class Scene:
    """What a bad job is made from. `spec` is a good job."""

    folder: Path
    model: Path
    bucket: Bucket
    spec: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    target: dict[str, str] = field(default_factory=dict)

    def with_spec(self, **change: Any) -> None:
        self.spec = merge(self.spec, change)

    def with_rows(self, rows: list[dict[str, Any]] | str | bytes, name: str = "bad.jsonl", **dataset: Any) -> None:
        file = self.folder / name
        if isinstance(rows, list):
            write_rows(file, rows)
        else:
            file.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        self.with_spec(dataset={"train": f"file://{file}", **dataset})

    def with_model_file(self, name: str, change: Callable[[str], str | None], remove: str | None = None) -> None:
        """Copy the model and change one of its files. The file is removed if the result is None."""
        target = self.folder / "model"
        if not target.exists():
            target.mkdir()
            for file in self.model.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
        text = change((target / name).read_text())
        if text is None:
            (target / name).unlink()
        else:
            (target / name).write_text(text)
        if remove is not None:
            (target / remove).unlink()
        self.with_spec(model={"source": f"file://{target}"})


def chat(user: str = "Hi", answer: str = "Ho", **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **row}


PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}
Change = Callable[[Scene], None]
BAD_JOBS: dict[str, tuple[Change, str, FailureClass, str]] = {
    # storage
    "bucket that does not exist": (
        lambda s: s.target.update(uri="s3://no-such-bucket/root/team/job/uid"), "BucketNotFound", FailureClass.STORAGE, "no-such-bucket",
    ),
    "wrong access key": (lambda s: s.env.update(AWS_ACCESS_KEY_ID="WRONG"), "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef"),
    "wrong secret key": (lambda s: s.env.update(AWS_SECRET_ACCESS_KEY="WRONG"), "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef"),
    "unreachable store": (lambda s: s.target.update(endpoint="http://127.0.0.1:9"), "EndpointUnreachable", FailureClass.STORAGE, "storage.endpoint"),
    "push without a token": (
        lambda s: s.with_spec(output={"hub": {"push": True, "repository": "team/model"}}), "HubTokenMissing", FailureClass.USER, "output.hub",
    ),
    # model
    "model that does not exist": (
        lambda s: s.with_spec(model={"source": f"s3://{s.bucket.name}/models/none"}), "ModelNotFound", FailureClass.MODEL, "models/none",
    ),
    "model that is a file": (lambda s: s.with_spec(model={"source": f"file://{s.model}/config.json"}), "ModelInvalid", FailureClass.MODEL, "config.json"),
    "folder without a model": (lambda s: s.with_spec(model={"source": f"file://{s.folder}"}), "ModelInvalid", FailureClass.MODEL, "config.json"),
    "unreachable hub": (
        lambda s: (s.with_spec(model={"source": "org/no-model"}), s.env.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"))[0],
        "HubUnreachable", FailureClass.MODEL, "org/no-model",
    ),
    "damaged config.json": (lambda s: s.with_model_file("config.json", lambda text: text[:40]), "TokenizerUnreadable", FailureClass.MODEL, "config.json"),
    "unknown architecture": (
        lambda s: s.with_model_file("config.json", lambda text: text.replace('"llama"', '"lama9"')), "ModelUnreadable", FailureClass.MODEL, "lama9"
    ),
    "model without weights": (
        lambda s: s.with_model_file("generation_config.json", lambda _: None, remove="model.safetensors"), "ModelIncomplete", FailureClass.MODEL, "no weights",
    ),
    "model without a tokenizer": (lambda s: s.with_model_file("tokenizer.json", lambda _: None), "TokenizerUnreadable", FailureClass.MODEL, "tokenizer"),
    "damaged tokenizer": (lambda s: s.with_model_file("tokenizer.json", lambda text: text[:99]), "TokenizerUnreadable", FailureClass.MODEL, "tokenizer"),
    "tokenizer that does not exist": (
        lambda s: s.with_spec(model={"tokenizer": f"file://{s.folder}/none"}), "ModelNotFound", FailureClass.MODEL, "model.tokenizer",
    ),
    "pad token that is unknown": (lambda s: s.with_spec(model={"padToken": "<|none|>"}), "PadTokenUnknown", FailureClass.USER, "model.padToken"),
    "new token that is known": (
        lambda s: s.with_spec(model={"newTokens": ["<|im_end|>"]}), "TokenKnown", FailureClass.USER, "<|im_end|>"
    ),
    # data
    "data that do not exist": (
        lambda s: s.with_spec(dataset={"train": f"s3://{s.bucket.name}/none.jsonl"}), "DatasetNotFound", FailureClass.DATA, "none.jsonl",
    ),
    "ConfigMap that does not exist": (lambda s: s.with_spec(dataset={"train": "configmap://none/key"}), "DatasetNotFound", FailureClass.DATA, "none"),
    "validation data that do not exist": (
        lambda s: s.with_spec(dataset={"validation": f"file://{s.folder}/none.jsonl"}), "DatasetNotFound", FailureClass.DATA, "dataset.validation"
    ),
    "empty file": (lambda s: s.with_rows(""), "DatasetEmpty", FailureClass.DATA, "bad.jsonl"),
    "Latin-1": (lambda s: s.with_rows(b'{"messages": "caf\xe9"}\n'), "DatasetNotUtf8", FailureClass.DATA, "bad.jsonl"),
    "line that is not JSON": (lambda s: s.with_rows('{"messages": [\n'), "DatasetRowInvalid", FailureClass.DATA, "row 1"),
    "gzip that ends early": (
        lambda s: s.with_rows(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 9))[:200], "bad.jsonl.gz"),
        "DatasetRowInvalid", FailureClass.DATA, "bad.jsonl.gz",
    ),
    "Parquet that is none": (lambda s: s.with_rows(b"PAR1 no", "bad.parquet"), "DatasetRowInvalid", FailureClass.DATA, "bad.parquet"),
    "unknown file type": (lambda s: s.with_rows(b"x", "bad.docx"), "FileFormatUnknown", FailureClass.DATA, "bad.docx"),
    "unknown columns": (lambda s: s.with_rows([{"a": 1}], format=None), "FormatUnknown", FailureClass.DATA, "dataset.format"),
    "column that is missing": (lambda s: s.with_rows([{"prompt": "a"}], format="promptCompletion"), "ColumnMissing", FailureClass.DATA, "completion"),
    "unknown role": (
        lambda s: s.with_rows([{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}]),
        "UnknownRole", FailureClass.DATA, "wizard",
    ),
    "conversation without an answer": (
        lambda s: s.with_rows([{"messages": [{"role": "user", "content": "x"}]}]), "NoTrainableToken", FailureClass.DATA, "row 1"
    ),
    "empty conversation": (lambda s: s.with_rows([{"messages": []}]), "ConversationEmpty", FailureClass.DATA, "row 1"),
    "too many bad rows": (
        lambda s: s.with_rows([chat(), {"messages": []}, {"messages": []}], badRows="skip", maxBadRowRatio=0.5), "TooManyBadRows", FailureClass.DATA, "2 of 3"
    ),
    "row that is too long": (
        lambda s: s.with_rows([chat("word " * 400)], maxSequenceLength=16, overflow="fail"), "RowTooLong", FailureClass.DATA, "maxSequenceLength"
    ),
    "answers that are cut off": (
        lambda s: s.with_rows([chat("word " * 400)] * 3, maxSequenceLength=16), "NoTrainableToken", FailureClass.DATA, "maxSequenceLength"
    ),
    "split without rows": (
        lambda s: s.with_rows([chat()], split={"validation": 0.1}), "SplitEmpty", FailureClass.DATA, "dataset.split"
    ),
    "preferences for sft": (lambda s: s.with_rows([{"chosen": "a", "rejected": "b"}], format=None), "FormatMismatch", FailureClass.USER, "preference"),
    "conversations for dpo": (lambda s: s.with_spec(trainer={"type": "dpo"}, dataset={"format": None}), "FormatMismatch", FailureClass.USER, "messages"),
    "equal preferences": (
        lambda s: (s.with_rows([PREFERENCE | {"rejected": "b"}], format="preference"), s.with_spec(trainer={"type": "dpo"}))[0],
        "DatasetRowInvalid", FailureClass.DATA, "row 1",
    ),
    "label that is no boolean": (
        lambda s: (s.with_rows([{"prompt": "a", "completion": "b", "label": "good"}], format="unpairedPreference"), s.with_spec(trainer={"type": "kto"}))[0],
        "DatasetRowInvalid", FailureClass.DATA, "label",
    ),
    "answer that is no option": (
        lambda s: s.with_rows([{"question": "q", "choices": ["a", "b"], "answer": "E"}], format="mcq"), "AnswerNotAnOption", FailureClass.DATA, "row 1"
    ),
    "template with a mistake": (
        lambda s: s.with_spec(dataset={"chatTemplate": {"text": "{% for m in messages %}"}}), "TemplateInvalid", FailureClass.USER, "chatTemplate"
    ),
    "prompts that do not exist": (
        lambda s: s.with_spec(evaluation={"comparison": {"promptsRef": {"name": "none", "key": "p.txt"}}}), "ConfigMapMissing", FailureClass.DATA, "promptsRef"
    ),
    # method
    "target modules that the model lacks": (
        lambda s: s.with_spec(method={"lora": {"targetModules": ["no_proj"]}}), "TargetModulesMissing", FailureClass.USER, "no_proj"
    ),
    "experts that the model lacks": (
        lambda s: s.with_spec(method={"lora": {"targetParameters": ["experts.none"]}}), "TargetParametersMissing", FailureClass.USER, "experts.none"
    ),
}  # fmt: skip
IN_MAKE_TEST = ("wrong secret key", "unknown architecture", "unknown role", "target modules that the model lacks")


@pytest.mark.parametrize("name", quick_slice(BAD_JOBS, IN_MAKE_TEST))
def test_a_bad_job_is_refused_with_place_and_cure(bucket: Bucket, tmp_path: Path, model: Path, rows: Path, name: str) -> None:
    change, code, failure_class, place = BAD_JOBS[name]
    good: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": {"maxSteps": 4},
    }  # fmt: skip
    scene = Scene(tmp_path, model, bucket, good)
    change(scene)
    run = run_config(scene.spec, bucket.target(**scene.target), processes=GPUS, gpus=GPUS)
    message, log = prepare(bucket, tmp_path, run, scene.env)
    assert (message.code, message.class_) == (code, failure_class), f"{message.code} {message.class_}: {message.message} | {message.hint}"
    assert message.hint and place in f"{message.message} {message.hint}", f"{message.message} | {message.hint}"
    assert bucket.endpoint.secret_key not in log + message.to_json()


def test_a_stopped_preparation_ends_at_once_and_may_be_repeated(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": {"maxSteps": 4}}
    with Pod(run_config(spec, bucket.target(), processes=GPUS, gpus=GPUS), tmp_path / "pod", bucket.env, command="prepare") as pod:
        pod.wait_until(lambda: bool(pod.pids("check")))
        assert pod.process is not None
        pod.process.terminate()
        assert pod.end() == 75
        assert pod.pids("check") == []
