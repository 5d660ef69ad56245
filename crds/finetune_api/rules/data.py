"""Rules for `spec.dataset`: file types, split ratios, and options that have no effect or contradict each other."""

from __future__ import annotations

import math

from pydantic.alias_generators import to_camel

from finetune_api.objectives import FORMATS_WITHOUT_TURNS
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    is_vision_language,
    value_or_default,
)
from finetune_api.rules.required_fields import IMAGE_ROOT, iterate_source_fields
from finetune_api.sources import is_unreadable_data_file, redact_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    DatasetFormat,
    FileFormat,
)


@rule("DataFileUnreadable")
def check_data_files(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.dataset.file_format not in (None, FileFormat.AUTO):
        return
    for path, source_text in iterate_source_fields(spec):
        if path.startswith("dataset.") and path != IMAGE_ROOT and not source_text.startswith("hf://") and is_unreadable_data_file(source_text):
            extension = redact_source(source_text).rpartition(".")[2].lower()
            yield (
                path,
                f"{redact_source(source_text)!r}: the trainer cannot read .{extension} files",
                "convert the rows to a .jsonl, .json, .csv, .tsv, .txt or .parquet file (.gz is possible, except for .parquet)",
            )


@rule("SplitRatios")
def check_split_ratios(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    split = spec.dataset.split
    if split is None:
        return
    ratio_by_set = {name: getattr(split, name) for name in ("train", "validation", "test") if getattr(split, name) is not None}
    ratio_sum = sum(ratio_by_set.values())
    sum_text = " + ".join(f"{name} {ratio:g}" for name, ratio in ratio_by_set.items())
    if split.train is not None and not math.isclose(ratio_sum, 1.0, abs_tol=1e-6):
        yield (
            "dataset.split",
            f"{sum_text} = {ratio_sum:g}, but the sum of the ratios must be 1",
            "change one of the ratios, or remove dataset.split.train to use all remaining rows for training",
        )
    elif split.train is None and ratio_sum >= 1:
        yield "dataset.split", f"{sum_text} = {ratio_sum:g}, so no rows remain for training", "write smaller ratios"
    for name in ("validation", "test"):
        if ratio_by_set.get(name) and getattr(spec.dataset, name) is not None:
            yield (
                f"dataset.split.{name}",
                f"{ratio_by_set[name]:g}, but dataset.{name} is given as well",
                f"remove dataset.{name} or dataset.split.{name}",
            )


@rule("DataOptionWithoutEffect")
def check_data_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dataset = spec.dataset
    if dataset.max_bad_row_ratio is not None and value_or_default(dataset, "bad_rows") != "skip":
        yield "dataset.maxBadRowRatio", "maxBadRowRatio has no effect without `badRows: skip`", "write `badRows: skip`, or remove maxBadRowRatio"
    if dataset.template is not None and dataset.format is not DatasetFormat.CUSTOM:
        yield "dataset.template", "template has no effect without `format: custom`", "write `format: custom`, or remove template"
    if dataset.format is DatasetFormat.CUSTOM and dataset.template is None:
        yield (
            "dataset.template",
            "format custom needs a template, but dataset.template is missing",
            "write for example `template: 'Q: {q}\\nA: {a}'`",
        )
    if dataset.mcq is not None and dataset.format not in (None, DatasetFormat.MCQ):
        yield "dataset.mcq", f"mcq has no effect, because dataset.format is {dataset.format}", "remove dataset.mcq"
    if dataset.chat_template is not None:
        if (dataset.chat_template.text is None) == (dataset.chat_template.config_map_ref is None):
            yield (
                "dataset.chatTemplate",
                "a chat template needs exactly one source",
                "write exactly one of `text` and `configMapRef`",
            )
        if dataset.use_chat_template is False:
            yield "dataset.chatTemplate", "chatTemplate has no effect with `useChatTemplate: false`", "remove chatTemplate or useChatTemplate"
    for name in dataset.template_variables or {}:
        path = f"dataset.templateVariables.{name}"
        if dataset.use_chat_template is False:
            yield path, f"{path} has no effect with `useChatTemplate: false`", "remove templateVariables or useChatTemplate"
        elif name in ROW_VARIABLES:
            yield path, f"{name!r} has a value in every template, and templateVariables cannot change this value", f"remove {name}, or rename the variable in the template"
        elif not name.isidentifier() or name in JINJA_KEYWORDS:
            yield path, f"{name!r} cannot be the name of a variable in a template", "write a name of letters, digits and underscores that is not a keyword of Jinja"
    response_only = dataset.response_only
    if response_only is not None and (response_only.question_marker or response_only.answer_marker):
        if response_only.enabled is False:
            yield (
                "dataset.responseOnly",
                "questionMarker and answerMarker have no effect with `enabled: false`",
                "remove the markers, or write `enabled: true`",
            )
        if not (response_only.question_marker and response_only.answer_marker):
            yield (
                "dataset.responseOnly",
                "only one of questionMarker and answerMarker is set, but the trainer needs both to find the end of an answer",
                "write both questionMarker and answerMarker, or remove both to use the turns of the chat template",
            )


ROW_VARIABLES = (
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now",
)  # fmt: skip
"""Variables that transformers or Jinja set for each row. A value for one of these names in `dataset.templateVariables` would have no effect."""
JINJA_KEYWORDS = (
    "and", "block", "call", "elif", "else", "endfor", "endif", "extends", "false", "False", "filter", "for", "from", "if", "import", "in", "include", "is",
    "loop", "macro", "none", "None", "not", "or", "recursive", "self", "set", "true", "True", "with",
)  # fmt: skip
"""Keywords of Jinja, and other names that a template variable cannot have."""
TEXT_OPTIONS = ("system_prompt", "chat_template", "template_variables", "use_chat_template", "add_eos_token", "add_bos_token", "response_only", "columns")
"""Fields of `spec.dataset` that have an effect only on rows of text, not on rows of token ids."""
TEXT_CHECKS = ("validate_json", "pii_scan", "balance")
"""Fields of `spec.dataset.checks` that have an effect only on rows of text."""


@rule("OptionOfTextRows")
def check_options_of_text_rows(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dataset, mixture = spec.dataset, spec.dataset.mixture or []
    options_without_effect = [f"dataset.mixture[{i}].columns" for i, item in enumerate(mixture) if item.columns is not None and _is_tokenised(spec, item.format)]
    if _is_tokenised(spec, None) and all(_is_tokenised(spec, item.format) for item in mixture):
        options_without_effect += [f"dataset.{to_camel(name)}" for name in TEXT_OPTIONS if getattr(dataset, name) is not None]
        options_without_effect += [f"dataset.checks.{to_camel(name)}" for name in TEXT_CHECKS if getattr(dataset.checks, name, None)]
    for field in options_without_effect:
        yield field, f"{field} has no effect, because rows of format preTokenized are used unchanged", f"remove {field}, or give the rows as text"


def _is_tokenised(spec: FineTuneJobSpec, item_format: DatasetFormat | None) -> bool:
    return (item_format or spec.dataset.format) is DatasetFormat.PRE_TOKENIZED


@rule("ImagesOfTokenRows")
def check_images_of_token_rows(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    formats = [spec.dataset.format, *(item.format for item in spec.dataset.mixture or [])]
    if is_vision_language(spec) and DatasetFormat.PRE_TOKENIZED in formats:
        yield "dataset.format", "rows of format preTokenized cannot have images", "give the rows as messages, or remove `model.modality: visionLanguage`"


@rule("ResponseOnlyWithoutTurns")
def check_response_only(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    options, dataset_format = spec.dataset.response_only, spec.dataset.format
    has_no_turns = dataset_format in FORMATS_WITHOUT_TURNS and dataset_format is not DatasetFormat.PRE_TOKENIZED
    if options is not None and options.enabled and has_no_turns and not (options.question_marker or options.answer_marker):
        yield (
            "dataset.responseOnly.enabled",
            f"true, but rows of format {dataset_format} have no conversation turns, so the trainer cannot find the answers",
            "write questionMarker and answerMarker, or remove responseOnly.enabled",
        )
