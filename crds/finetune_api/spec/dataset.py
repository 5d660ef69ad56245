"""`spec.dataset`: what is learned from, and how rows become tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, option
from finetune_api.spec.common import Column, ConfigMapKeyRef, Line, Source, StorageConnection, Text
from finetune_api.spec.enums import BadRows, DatasetFormat, FileFormat, Overflow

Ratio = Annotated[float, Field(ge=0, le=1)]


class Columns(Group):
    """`dataset.columns`: names of columns where they differ from the format's own."""

    question: Column | None = option(
        "Column with the question, instruction or prompt.", default_text="the format's own", example="prompt"
    )
    answer: Column | None = option(
        "Column with the answer, response or completion.", default_text="the format's own", example="response"
    )
    system: Column | None = option(
        "Column with the system prompt.", default_text="system, if present", example="system"
    )
    input: Column | None = option("Column with additional input (alpaca).", default_text="input", example="context")
    chosen: Column | None = option("Column with the preferred answer.", default_text="chosen", example="chosen")
    rejected: Column | None = option("Column with the other answer.", default_text="rejected", example="rejected")
    label: Column | None = option("Column with the label (unpairedPreference).", default_text="label", example="label")
    text: Column | None = option("Column with the text (plainText).", default_text="text", example="content")
    messages: Column | None = option(
        "Column with the list of messages.", default_text="messages, else conversations", example="messages"
    )


class Split(Group):
    """`dataset.split`: parts cut from the training data; sizes are rounded down, what is left over goes to the test part if there is one."""

    train: Annotated[float, Field(gt=0, le=1)] | None = option(
        "Fraction for training.", default_text="1 - validation - test", example=0.8
    )
    validation: Ratio | None = option("Fraction for validation.", default_text="0", example=0.1)
    test: Ratio | None = option("Fraction for the test set.", default_text="0", example=0.1)
    seed: Annotated[int, Field(ge=0, le=4294967295)] | None = option(
        "Seed of the shuffle before the cut.", default=42, example=42
    )


class ResponseOnly(Group):
    """`dataset.responseOnly`: compute the loss on answers only."""

    enabled: bool | None = option(
        "Loss on answers only.", default_text="true where the format has turns, else false", example=True
    )
    question_marker: Line | None = option(
        "Text that starts a question in the rendered row. Default: the chat template's own turns.", example="<|user|>"
    )
    answer_marker: Line | None = option(
        "Text that starts an answer in the rendered row. Default: the chat template's own turns.",
        example="<|assistant|>",
    )


class Mcq(Group):
    """`dataset.mcq`: multiple choice."""

    include_options: bool | None = option("Write the options into the prompt.", default=True, example=True)


class Checks(Group):
    """`dataset.checks`: looks at the data before training; found things are reported."""

    deduplicate: bool | None = option("Drop rows that are equal to an earlier one.", default=False, example=True)
    validate_json: bool | None = option("Check that answers are valid JSON.", default=False, example=True)
    pii_scan: bool | None = option(
        "Count e-mail addresses, phone numbers and the like; report only.", default=False, example=True
    )
    balance: bool | None = option("Report how often each answer occurs.", default=False, example=True)


class MixtureItem(Group):
    """One source of a mixture."""

    source: Source = Field(
        description="Data of this part, in the notations of dataset.train. Required. Example: `s3://data/a.jsonl`."
    )
    weight: Annotated[float, Field(gt=0, le=1000000)] | None = option(
        "Relative weight of this part.", default=1.0, example=0.5
    )
    format: DatasetFormat | None = option(
        "Format of this part's rows.", default_text="dataset.format", example="messages"
    )
    columns: Columns | None = option(
        "Columns of this part's rows.", default_text="dataset.columns", example={"question": "q"}
    )


class ChatTemplate(Group):
    """`dataset.chatTemplate`: a Jinja template, as text or from a ConfigMap."""

    cel = (
        (
            "has(self.text) != has(self.configMapRef)",
            "a chat template is either `text` or `configMapRef`: write exactly one of the two",
        ),
    )

    text: Text | None = option("The template itself. Default: none.", example="{% for m in messages %}...{% endfor %}")
    config_map_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with the template. Default: none.", example={"name": "templates", "key": "chat.jinja"}
    )


class Dataset(Group):
    """`spec.dataset`."""

    cel = (
        ("!(has(self.train) && has(self.mixture))", "dataset.train and dataset.mixture exclude each other: remove one"),
        (
            "!has(self.maxBadRowRatio) || (has(self.badRows) && self.badRows == 'skip')",
            "dataset.maxBadRowRatio is only read with `badRows: skip`: add it, or remove maxBadRowRatio",
        ),
        (
            "!has(self.template) || (has(self.format) && self.format == 'custom')",
            "dataset.template is only read with `format: custom`: add it, or remove template",
        ),
    )

    train: Source | None = option(
        "Training data: `s3://bucket/key`, `configmap://name/key`, `pvc://claim/path`, `file:///path`, `https://host/path/file.jsonl` (one file), or a hub id. Required, unless mixture is given.",
        default_text="none, required", example="s3://data/train.jsonl",
    )  # fmt: skip
    validation: Source | None = option(
        "Validation data, in the same notations. Default: none, or cut by dataset.split.",
        example="s3://data/validation.jsonl",
    )
    test: Source | None = option(
        "Test data, in the same notations. Default: none, or cut by dataset.split.", example="s3://data/test.jsonl"
    )
    mixture: Annotated[list[MixtureItem], Field(min_length=1, max_length=64)] | None = option(
        "Several weighted sources instead of train. Default: none.",
        example=[{"source": "s3://data/a.jsonl", "weight": 2}],
    )
    storage: StorageConnection | None = option(
        "Connection for `s3://` data; of `https://` data only caBundleRef is used.", default_text="spec.storage", example={"endpoint": "https://s3.example.com"}
    )
    format: DatasetFormat | None = option(
        "Shape of the rows.",
        default_text="recognised from the first rows' columns, shown in status",
        example="messages",
    )
    file_format: FileFormat | None = option("Kind of file.", default="auto", example="jsonl")
    columns: Columns | None = option(
        "Column names where they differ from the format's own. Default: none.", example={"question": "prompt"}
    )
    split: Split | None = option(
        "Cut validation and test sets from the training data. Default: none.", example={"validation": 0.1}
    )
    system_prompt: Text | None = option(
        "System prompt for every row; it beats the column. Default: none.", example="You answer briefly."
    )
    template: Text | None = option(
        "Text with {column} placeholders, for `format: custom`. Default: none.", example="Q: {q}\nA: {a}"
    )
    chat_template: ChatTemplate | None = option(
        "Chat template instead of the tokenizer's. Default: the tokenizer's own.",
        example={"configMapRef": {"name": "t", "key": "chat.jinja"}},
    )
    use_chat_template: bool | None = option(
        "Render turns with the chat template.", default_text="true if the tokenizer has one", example=True
    )
    add_eos_token: bool | None = option(
        "End every row with exactly one end-of-sequence token.", default=True, example=True
    )
    add_bos_token: bool | None = option(
        "Begin every row with exactly one beginning-of-sequence token.",
        default_text="what the tokenizer does",
        example=True,
    )
    response_only: ResponseOnly | None = option(
        "Loss on answers only. Default: on where the format has turns.", example={"enabled": True}
    )
    packing: bool | None = option(
        "Put several rows into one sequence, kept apart in attention.", default=False, example=True
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=16777216)] | None = option(
        "Longest sequence in tokens.", default_text="2048, or the model's own limit if lower", example=2048
    )
    overflow: Overflow | None = option("What happens to longer rows.", default="truncate", example="drop")
    num_proc: Annotated[int, Field(ge=1, le=1024)] | None = option(
        "Processes that tokenise.", default_text="the CPUs of the pod", example=4
    )
    bad_rows: BadRows | None = option(
        "What a row that cannot be used does: end the job with its number, or be skipped and counted.",
        default="fail",
        example="skip",
    )
    max_bad_row_ratio: Ratio | None = option(
        "Largest fraction of skipped rows, with `badRows: skip`.", default=0.05, example=0.01
    )
    mcq: Mcq | None = option("Multiple choice. Default: the values of its fields.", example={"includeOptions": True})
    checks: Checks | None = option("Looks at the data before training. Default: none.", example={"deduplicate": True})
