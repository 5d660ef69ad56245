"""Jobs with one mistake each. For each job, this module lists the failure code and class that the preparation must report, and a text that the failure's
message must contain.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.names import FailureClass

from tests.support.merge import merge


@dataclass
class BadJob:
    """A valid job that one change makes invalid. `spec` is the job's spec, before or after the change. The change writes the files that it needs into
    `folder`.
    """

    folder: Path
    model: Path
    bucket_name: str
    spec: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    storage: dict[str, str] = field(default_factory=dict)
    """The fields of the job's storage target that the change replaces."""

    def change_spec(self, **change: Any) -> None:
        self.spec = merge(self.spec, change)

    def set_rows(self, rows: list[dict[str, Any]] | str | bytes, name: str = "bad.jsonl", **dataset: Any) -> None:
        """Train on a new file with these rows. `dataset` holds further changed fields of `spec.dataset`."""
        file = self.folder / name
        if isinstance(rows, list):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        self.change_spec(dataset={"train": f"file://{file}", **dataset})

    def change_model_file(self, name: str, change: Callable[[str], str | None], remove: str | None = None) -> None:
        """Train on a copy of the model with one changed file. If `change` returns None, the file is removed instead. `remove` is the name of another file
        that is removed too.
        """
        model_folder = self.folder / "model"
        if not model_folder.exists():
            model_folder.mkdir()
            for file in self.model.iterdir():
                (model_folder / file.name).write_bytes(file.read_bytes())
        text = change((model_folder / name).read_text())
        if text is None:
            (model_folder / name).unlink()
        else:
            (model_folder / name).write_text(text)
        if remove is not None:
            (model_folder / remove).unlink()
        self.change_spec(model={"source": f"file://{model_folder}"})


def make_chat_row(user: str = "Hi", answer: str = "Ho", **row: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}], **row}


PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}
JobChange = Callable[[BadJob], None]
BAD_JOBS: dict[str, tuple[JobChange, str, FailureClass, str]] = {
    # storage
    "bucket that does not exist": (
        lambda job: job.storage.update(uri="s3://no-such-bucket/prefix/team/job/uid"), "BucketNotFound", FailureClass.STORAGE, "no-such-bucket",
    ),
    "wrong access key": (lambda job: job.env.update(AWS_ACCESS_KEY_ID="WRONG"), "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef"),
    "wrong secret key": (lambda job: job.env.update(AWS_SECRET_ACCESS_KEY="WRONG"), "CredentialsRejected", FailureClass.STORAGE, "credentialsSecretRef"),
    "unreachable store": (lambda job: job.storage.update(endpoint="http://127.0.0.1:9"), "EndpointUnreachable", FailureClass.STORAGE, "storage.endpoint"),
    "push without a token": (
        lambda job: job.change_spec(output={"hub": {"push": True, "repository": "team/model"}}), "HubTokenMissing", FailureClass.USER, "output.hub",
    ),
    # model
    "model that does not exist": (
        lambda job: job.change_spec(model={"source": f"s3://{job.bucket_name}/models/none"}), "ModelNotFound", FailureClass.MODEL, "models/none",
    ),
    "model that is a file": (
        lambda job: job.change_spec(model={"source": f"file://{job.model}/config.json"}), "ModelInvalid", FailureClass.MODEL, "config.json"
    ),
    "folder without a model": (lambda job: job.change_spec(model={"source": f"file://{job.folder}"}), "ModelInvalid", FailureClass.MODEL, "config.json"),
    "unreachable hub": (
        lambda job: (job.change_spec(model={"source": "org/no-model"}), job.env.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"))[0],
        "HubUnreachable", FailureClass.MODEL, "org/no-model",
    ),
    "damaged config.json": (lambda job: job.change_model_file("config.json", lambda text: text[:40]), "TokenizerUnreadable", FailureClass.MODEL, "config.json"),
    "unknown architecture": (
        lambda job: job.change_model_file("config.json", lambda text: text.replace('"llama"', '"lama9"')), "ModelUnreadable", FailureClass.MODEL, "lama9"
    ),
    "model without weights": (
        lambda job: job.change_model_file("generation_config.json", lambda _: None, remove="model.safetensors"),
        "ModelIncomplete", FailureClass.MODEL, "no weights",
    ),
    "model without a tokenizer": (lambda job: job.change_model_file("tokenizer.json", lambda _: None), "TokenizerUnreadable", FailureClass.MODEL, "tokenizer"),
    "damaged tokenizer": (lambda job: job.change_model_file("tokenizer.json", lambda text: text[:99]), "TokenizerUnreadable", FailureClass.MODEL, "tokenizer"),
    "tokenizer that does not exist": (
        lambda job: job.change_spec(model={"tokenizer": f"file://{job.folder}/none"}), "ModelNotFound", FailureClass.MODEL, "model.tokenizer",
    ),
    "unknown pad token": (lambda job: job.change_spec(model={"padToken": "<|none|>"}), "PadTokenUnknown", FailureClass.USER, "model.padToken"),
    "new token that the tokenizer already has": (
        lambda job: job.change_spec(model={"newTokens": ["<|im_end|>"]}), "TokenKnown", FailureClass.USER, "<|im_end|>"
    ),
    # data
    "dataset that does not exist": (
        lambda job: job.change_spec(dataset={"train": f"s3://{job.bucket_name}/none.jsonl"}), "DatasetNotFound", FailureClass.DATA, "none.jsonl",
    ),
    "ConfigMap that does not exist": (lambda job: job.change_spec(dataset={"train": "configmap://none/key"}), "DatasetNotFound", FailureClass.DATA, "none"),
    "validation data that do not exist": (
        lambda job: job.change_spec(dataset={"validation": f"file://{job.folder}/none.jsonl"}), "DatasetNotFound", FailureClass.DATA, "dataset.validation"
    ),
    "empty file": (lambda job: job.set_rows(""), "DatasetEmpty", FailureClass.DATA, "bad.jsonl"),
    "Latin-1 file": (lambda job: job.set_rows(b'{"messages": "caf\xe9"}\n'), "DatasetNotUtf8", FailureClass.DATA, "bad.jsonl"),
    "line that is not JSON": (lambda job: job.set_rows('{"messages": [\n'), "DatasetRowInvalid", FailureClass.DATA, "row 1"),
    "gzip that ends early": (
        lambda job: job.set_rows(
            gzip.compress(b"".join(json.dumps(make_chat_row(f"Question {number}?")).encode() + b"\n" for number in range(300)))[:200], "bad.jsonl.gz"
        ),
        "DatasetRowInvalid", FailureClass.DATA, "bad.jsonl.gz",
    ),
    "damaged Parquet file": (lambda job: job.set_rows(b"PAR1 no", "bad.parquet"), "DatasetRowInvalid", FailureClass.DATA, "bad.parquet"),
    "unknown file type": (lambda job: job.set_rows(b"x", "bad.docx"), "FileFormatUnknown", FailureClass.DATA, "bad.docx"),
    "columns of no known format": (lambda job: job.set_rows([{"a": 1}], format=None), "FormatUnknown", FailureClass.DATA, "dataset.format"),
    "column that is missing": (lambda job: job.set_rows([{"prompt": "a"}], format="promptCompletion"), "ColumnMissing", FailureClass.DATA, "completion"),
    "unknown role": (
        lambda job: job.set_rows([{"messages": [{"role": "wizard", "content": "x"}, {"role": "assistant", "content": "y"}]}]),
        "UnknownRole", FailureClass.DATA, "wizard",
    ),
    "conversation without an answer": (
        lambda job: job.set_rows([{"messages": [{"role": "user", "content": "x"}]}]), "NoTrainableToken", FailureClass.DATA, "row 1"
    ),
    "empty conversation": (lambda job: job.set_rows([{"messages": []}]), "ConversationEmpty", FailureClass.DATA, "row 1"),
    "too many bad rows": (
        lambda job: job.set_rows([make_chat_row(), {"messages": []}, {"messages": []}], badRows="skip", maxBadRowRatio=0.5),
        "TooManyBadRows", FailureClass.DATA, "2 of 3",
    ),
    "row that is too long": (
        lambda job: job.set_rows([make_chat_row("word " * 400)], maxSequenceLength=16, overflow="fail"), "RowTooLong", FailureClass.DATA, "maxSequenceLength"
    ),
    "rows whose answers are cut off": (
        lambda job: job.set_rows([make_chat_row("word " * 400)] * 3, maxSequenceLength=16), "NoTrainableToken", FailureClass.DATA, "maxSequenceLength"
    ),
    "split that leaves no rows": (
        lambda job: job.set_rows([make_chat_row()], split={"validation": 0.1}), "SplitEmpty", FailureClass.DATA, "dataset.split"
    ),
    "preference rows for sft": (lambda job: job.set_rows([{"chosen": "a", "rejected": "b"}], format=None), "FormatMismatch", FailureClass.USER, "preference"),
    "conversation rows for dpo": (
        lambda job: job.change_spec(trainer={"type": "dpo"}, dataset={"format": None}), "FormatMismatch", FailureClass.USER, "messages"
    ),
    "preference row with equal answers": (
        lambda job: (job.set_rows([PREFERENCE | {"rejected": "b"}], format="preference"), job.change_spec(trainer={"type": "dpo"}))[0],
        "DatasetRowInvalid", FailureClass.DATA, "row 1",
    ),
    "label that is no boolean": (
        lambda job: (
            job.set_rows([{"prompt": "a", "completion": "b", "label": "good"}], format="unpairedPreference"), job.change_spec(trainer={"type": "kto"}),
        )[0],
        "DatasetRowInvalid", FailureClass.DATA, "label",
    ),
    "answer that is no option": (
        lambda job: job.set_rows([{"question": "q", "choices": ["a", "b"], "answer": "E"}], format="mcq"), "AnswerNotAnOption", FailureClass.DATA, "row 1"
    ),
    "template with a mistake": (
        lambda job: job.change_spec(dataset={"chatTemplate": {"text": "{% for m in messages %}"}}), "TemplateInvalid", FailureClass.USER, "chatTemplate"
    ),
    "prompts that do not exist": (
        lambda job: job.change_spec(evaluation={"comparison": {"promptsRef": {"name": "none", "key": "p.txt"}}}),
        "ConfigMapMissing", FailureClass.DATA, "promptsRef",
    ),
    # method
    "target modules that the model lacks": (
        lambda job: job.change_spec(method={"lora": {"targetModules": ["no_proj"]}}), "TargetModulesMissing", FailureClass.USER, "no_proj"
    ),
    "experts that the model lacks": (
        lambda job: job.change_spec(method={"lora": {"targetParameters": ["experts.none"]}}), "TargetParametersMissing", FailureClass.USER, "experts.none"
    ),
}  # fmt: skip
