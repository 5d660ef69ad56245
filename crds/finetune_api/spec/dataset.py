"""`spec.dataset`: the training data and its conversion to tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.spec.common import ColumnName, ConfigMapKeyRef, Line, Source, StorageConnection, StringMap, Text
from finetune_api.spec.enums import BadRows, DatasetFormat, FileFormat, OverflowPolicy

Ratio = Annotated[float, Field(ge=0, le=1)]


class Columns(Group):
    """`dataset.columns`: names of columns that differ from the default names of the data format."""

    question: ColumnName | None = spec_field(
        "Column with the question, instruction or prompt.", default_text="the column name of the format", example="prompt"
    )
    answer: ColumnName | None = spec_field(
        "Column with the answer, response or completion.", default_text="the column name of the format", example="response"
    )
    system: ColumnName | None = spec_field(
        "Column with the system prompt.", default_text="the column `system` if it exists", example="instructions"
    )
    input: ColumnName | None = spec_field("Column with additional input (alpaca).", default_text="input", example="context")
    chosen: ColumnName | None = spec_field("Column with the preferred answer.", default_text="chosen", example="better")
    rejected: ColumnName | None = spec_field("Column with the rejected answer.", default_text="rejected", example="worse")
    label: ColumnName | None = spec_field("Column with the label (unpairedPreference).", default_text="label", example="liked")
    text: ColumnName | None = spec_field("Column with the text (plainText).", default_text="text", example="content")
    messages: ColumnName | None = spec_field(
        "Column with the list of messages.", default_text="messages or conversations", example="dialogue"
    )
    images: ColumnName | None = spec_field(
        "Column with the images of a row. Allowed only with `model.modality: visionLanguage`.", default_text="images or image", example="pictures", since="0.2.0"
    )


class Split(Group):
    """`dataset.split`: fractions of the training data for training, validation and test.

    Each number of rows is rounded down. The remaining rows go to training or, if `train` is set, to the last part that is not empty.
    """

    train: Annotated[float, Field(gt=0, le=1)] | None = spec_field(
        "Fraction of the rows for training.", default_text="1 - validation - test", example=0.8
    )
    validation: Ratio | None = spec_field("Fraction of the rows for validation.", default_text="0", example=0.1)
    test: Ratio | None = spec_field("Fraction of the rows for the test set.", default_text="0", example=0.1)
    seed: Annotated[int, Field(ge=0, le=4294967295)] | None = spec_field(
        "Seed of the shuffle before the split.", default=42, example=7
    )


class ResponseOnly(Group):
    """`dataset.responseOnly`: compute the loss only on answers."""

    enabled: bool | None = spec_field(
        "Compute the loss only on answers.", default_text="true for formats with turns, otherwise false", example=False
    )
    question_marker: Line | None = spec_field(
        "Text that starts a question in the rendered row.",
        default_text="the turns of the chat template",
        example="<|user|>",
    )
    answer_marker: Line | None = spec_field(
        "Text that starts an answer in the rendered row.",
        default_text="the turns of the chat template",
        example="<|assistant|>",
    )


class Mcq(Group):
    """`dataset.mcq`: options of the multiple-choice format."""

    include_options: bool | None = spec_field("Write the options into the prompt.", default=True, example=False)


class Checks(Group):
    """`dataset.checks`: checks of the data before training. status.resolved.notes contains the results."""

    deduplicate: bool | None = spec_field("Skip rows that are equal to an earlier row.", default=False, example=True)
    validate_json: bool | None = spec_field(
        "Treat a row whose answer is not valid JSON as a bad row (see badRows).", default=False, example=True
    )
    pii_scan: bool | None = spec_field(
        "Count rows that contain e-mail addresses, or phone, card or account numbers. The rows are not changed.",
        default=False,
        example=True,
    )
    balance: bool | None = spec_field("Report the most frequent answers.", default=False, example=True)


class Images(Group):
    """`dataset.images`: location and limits of the images. Allowed only with `model.modality: visionLanguage`."""

    root: Source | None = spec_field(
        "Folder with the images. Paths in the rows are relative to this folder, and addresses in the rows must begin with the address of this folder. Accepts the same forms as `model.source`, except addresses of web servers.",
        default_text="the folder of the row's data file",
        example="s3://data/images",
        since="0.2.0",
    )
    max_bytes: Annotated[int, Field(ge=1, le=1073741824)] | None = spec_field(
        "Maximum size of an image file in bytes. A row with a larger image is a bad row.", default=20971520, example=5242880, since="0.2.0"
    )
    max_pixels: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Maximum number of pixels of an image: width times height. A row with a larger image is a bad row.",
        default=50000000,
        example=4000000,
        since="0.2.0",
    )
    max_per_row: Annotated[int, Field(ge=1, le=1024)] | None = spec_field(
        "Maximum number of images in a row. A row with more images is a bad row.", default=16, example=4, since="0.2.0"
    )


class MixtureItem(Group):
    """One source of a mixture."""

    source: Source = Field(
        description="Location of the data. Accepts the same forms as `dataset.train`. Required. Example: `s3://data/a.jsonl`."
    )
    weight: Annotated[float, Field(gt=0, le=1000000)] | None = spec_field(
        "Share of this source in the mixture, relative to the weights of the other sources.", default=1.0, example=0.5
    )
    format: DatasetFormat | None = spec_field(
        "Format of this source's rows.", default_text="dataset.format", example="messages"
    )
    columns: Columns | None = spec_field(
        "Column names of this source's rows.", default_text="dataset.columns", example={"question": "q"}
    )


class ChatTemplate(Group):
    """`dataset.chatTemplate`: a Jinja template, either as text or in a ConfigMap."""

    cel = (
        CelRule(
            "has(self.text) != has(self.configMapRef)",
            "a chat template needs exactly one of `text` and `configMapRef`",
            "DataOptionWithoutEffect",
        ),
    )

    text: Text | None = spec_field(
        "Text of the template.", default_text="none", example="{% for m in messages %}...{% endfor %}"
    )
    config_map_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains the template.", default_text="none", example={"name": "templates", "key": "chat.jinja"}
    )


class Dataset(Group):
    """`spec.dataset`: the training data and its conversion to tokens."""

    cel = (
        CelRule(
            "!(has(self.train) && has(self.mixture))",
            "dataset.train and dataset.mixture exclude each other: remove one of the two",
            "DatasetMissing",
        ),
        CelRule(
            "!has(self.maxBadRowRatio) || (has(self.badRows) && self.badRows == 'skip')",
            "dataset.maxBadRowRatio requires `badRows: skip`: write `badRows: skip`, or remove maxBadRowRatio",
            "DataOptionWithoutEffect",
        ),
        CelRule(
            "!has(self.template) || (has(self.format) && self.format == 'custom')",
            "dataset.template requires `format: custom`: write `format: custom`, or remove template",
            "DataOptionWithoutEffect",
        ),
    )

    train: Source | None = spec_field(
        "Training data: `s3://bucket/key`, `configmap://name/key`, `pvc://claim/path`, `file:///path`, "
        "`https://host/path/file.jsonl` (one file), or a hub repository. Required if mixture is absent.",
        default_text="none",
        example="s3://data/train.jsonl",
    )
    validation: Source | None = spec_field(
        "Validation data. Accepts the same forms as `dataset.train`.",
        default_text="if dataset.split is set, the rows that it takes from the training data",
        example="s3://data/validation.jsonl",
    )
    test: Source | None = spec_field(
        "Test data. Accepts the same forms as `dataset.train`.",
        default_text="if dataset.split is set, the rows that it takes from the training data",
        example="s3://data/test.jsonl",
    )
    mixture: Annotated[list[MixtureItem], Field(min_length=1, max_length=64)] | None = spec_field(
        "Several sources of training data with weights, instead of train.",
        default_text="none",
        example=[{"source": "s3://data/a.jsonl", "weight": 2}],
    )
    storage: StorageConnection | None = spec_field(
        "Connection to the store of `s3://` data. For `https://` data, only caBundleRef is used.",
        default_text="spec.storage",
        example={"endpoint": "https://s3.example.com"},
    )
    format: DatasetFormat | None = spec_field(
        "Data format of the rows. status.resolved.datasetFormat shows the detected format.",
        default_text="detected from the columns of the first rows",
        example="messages",
    )
    file_format: FileFormat | None = spec_field("File type.", default="auto", example="jsonl")
    columns: Columns | None = spec_field(
        "Column names, if they differ from the default names of the data format.", default_text="none", example={"question": "prompt"}
    )
    split: Split | None = spec_field(
        "Sizes of a validation set and a test set that are taken from the training data.", default_text="none", example={"validation": 0.1}
    )
    system_prompt: Text | None = spec_field(
        "System prompt of all rows. This prompt replaces the system prompts in the data.",
        default_text="none",
        example="You answer briefly.",
    )
    template: Text | None = spec_field(
        "Template of a row, with {column} placeholders. Allowed only with `format: custom`.", default_text="none", example="Q: {q}\nA: {a}"
    )
    chat_template: ChatTemplate | None = spec_field(
        "Chat template that replaces the chat template of the tokenizer.",
        default_text="the chat template of the tokenizer",
        example={"configMapRef": {"name": "templates", "key": "chat.jinja"}},
    )
    template_variables: StringMap | None = spec_field(
        "Variables for the chat template, such as `enable_thinking`. A value that is valid JSON (`true`, `3`, `\"3\"`) is passed as its JSON value, any other value as text. "
        "The chat template that is stored with the model has these values as defaults.",
        default_text="none",
        example={"enable_thinking": "false"},
        since="0.2.0",
    )
    use_chat_template: bool | None = spec_field(
        "Render turns with the chat template.", default_text="true if the tokenizer has a chat template", example=False
    )
    add_eos_token: bool | None = spec_field(
        "End every row with exactly one end-of-sequence token.", default=True, example=False
    )
    add_bos_token: bool | None = spec_field(
        "Start every row with exactly one beginning-of-sequence token.",
        default_text="the behaviour of the tokenizer",
        example=True,
    )
    response_only: ResponseOnly | None = spec_field(
        "Compute the loss only on answers.",
        default_text="enabled for formats with turns",
        example={"enabled": False},
    )
    packing: bool | None = spec_field(
        "Put several rows into one sequence. A token never attends to tokens of another row.",
        default=False,
        example=True,
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=16777216)] | None = spec_field(
        "Maximum length of a sequence in tokens.",
        default_text="2048, or the model's limit if this limit is lower",
        example=4096,
    )
    overflow: OverflowPolicy | None = spec_field(
        "What happens with rows that are longer than maxSequenceLength.", default="truncate", example="drop"
    )
    num_proc: Annotated[int, Field(ge=1, le=1024)] | None = spec_field(
        "Number of processes that tokenise the data.", default_text="number of CPUs of the pod", example=4
    )
    bad_rows: BadRows | None = spec_field("What happens with rows that cannot be used for training.", default="fail", example="skip")
    max_bad_row_ratio: Ratio | None = spec_field(
        "Maximum fraction of skipped rows. If more rows are bad, the job fails. Allowed only with `badRows: skip`.", default=0.05, example=0.01
    )
    mcq: Mcq | None = spec_field(
        "Options of the multiple-choice format.",
        default_text="the defaults of the fields",
        example={"includeOptions": False},
    )
    images: Images | None = spec_field(
        "Location and limits of the images. Allowed only with `model.modality: visionLanguage`.",
        default_text="the defaults of the fields",
        example={"root": "s3://data/images"},
        since="0.2.0",
    )
    checks: Checks | None = spec_field(
        "Checks of the data before training.", default_text="none", example={"deduplicate": True}
    )
