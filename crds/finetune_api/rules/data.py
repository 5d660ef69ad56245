"""Rules for `spec.dataset`: split sizes, and options that would have no effect."""

from __future__ import annotations

import math

from finetune_api.objectives import FORMATS_WITHOUT_TURNS
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    value_or_default,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    DatasetFormat,
)


@rule("SplitRatios")
def split_ratios(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    split = spec.dataset.split
    if split is None:
        return
    parts = {name: getattr(split, name) for name in ("train", "validation", "test") if getattr(split, name) is not None}
    total = sum(parts.values())
    text = " + ".join(f"{name} {value:g}" for name, value in parts.items())
    if split.train is not None and not math.isclose(total, 1.0, abs_tol=1e-6):
        yield (
            "dataset.split",
            f"{text} = {total:g}, and the parts must sum to 1",
            "change one of them, or remove train: then all remaining rows are for training",
        )
    elif split.train is None and total >= 1:
        yield "dataset.split", f"{text} = {total:g} leaves nothing for training", "write smaller fractions"
    for name in ("validation", "test"):
        if parts.get(name) and getattr(spec.dataset, name) is not None:
            yield (
                f"dataset.split.{name}",
                f"{parts[name]:g}, but dataset.{name} is given as well",
                "remove one of the two",
            )


@rule("DataOptionWithoutEffect")
def data_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    dataset = spec.dataset
    if dataset.max_bad_row_ratio is not None and value_or_default(dataset, "bad_rows") != "skip":
        yield "dataset.maxBadRowRatio", "it is only read with `badRows: skip`", "add that, or remove it"
    if dataset.template is not None and dataset.format is not DatasetFormat.CUSTOM:
        yield "dataset.template", "it is only read with `format: custom`", "add that, or remove it"
    if dataset.format is DatasetFormat.CUSTOM and dataset.template is None:
        yield (
            "dataset.template",
            "format custom renders rows with a template, and none is given",
            "write for example `template: 'Q: {q}\\nA: {a}'`",
        )
    if dataset.mcq is not None and dataset.format not in (None, DatasetFormat.MCQ):
        yield "dataset.mcq", f"it is only read with format mcq, and the format is {dataset.format}", "remove it"
    if dataset.chat_template is not None:
        if (dataset.chat_template.text is None) == (dataset.chat_template.config_map_ref is None):
            yield (
                "dataset.chatTemplate",
                "a chat template is either text or from a ConfigMap",
                "write exactly one of `text` and `configMapRef`",
            )
        if dataset.use_chat_template is False:
            yield "dataset.chatTemplate", "it has no effect with `useChatTemplate: false`", "remove one of the two"
    options = dataset.response_only
    if options is not None and (options.question_marker or options.answer_marker):
        if options.enabled is False:
            yield (
                "dataset.responseOnly",
                "the markers have no effect with `enabled: false`",
                "remove them, or enable it",
            )
        if not (options.question_marker and options.answer_marker):
            yield (
                "dataset.responseOnly",
                "with only one marker the end of an answer cannot be found",
                "write both questionMarker and answerMarker, or neither: without markers the turns of the chat template are used",
            )


@rule("ResponseOnlyWithoutTurns")
def response_only(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    options, form = spec.dataset.response_only, spec.dataset.format
    has_no_turns = form in FORMATS_WITHOUT_TURNS
    if options is not None and options.enabled and has_no_turns and not (options.question_marker or options.answer_marker):
        yield (
            "dataset.responseOnly.enabled",
            f"true, but format {form} has no turns, so answers cannot be found",
            "give questionMarker and answerMarker, or remove it",
        )
