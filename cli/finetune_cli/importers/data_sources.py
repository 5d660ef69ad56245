"""Turns the training data in other tools' files into `dataset.train` or, for several sources, `dataset.mixture`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_cli.importers.draft import JobDraft

READABLE_FILE_PATTERN = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet)(\.gz)?$", re.IGNORECASE)
PERCENT_SPLIT_PATTERN = re.compile(r"^train\[:(\d+(?:\.\d+)?)%\]$")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
"""Names of the keys of a message that the trainer reads: first the keys with the role of the message, then the keys with its text."""
ROLE_NAMES = {
    "system": ("system", "developer"), "user": ("user", "human", "prompter"), "assistant": ("assistant", "gpt", "bot", "model", "chatgpt"),
    "tool": ("tool", "function", "observation", "ipython"),
}  # fmt: skip
"""For each role in chat templates: all names in the data that the trainer reads as this role."""


@dataclass(frozen=True)
class DataSource:
    """One source of training data.

    `row_count`: the number of rows, or None if it is unknown. `fraction`: the fraction of the rows that the other tool's file selects for training,
    from 0 to 1. `weight`: the weight in a mixture, or None if the file gives no weight.
    """

    source: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    row_count: int | None = None
    fraction: float = 1.0
    weight: float | None = None


def to_hub_file_url(repository: str, file: str, revision: str | None = None) -> str:
    """Return the URL of one file in a data set repository on the hub."""
    return f"https://huggingface.co/datasets/{repository}/resolve/{revision or 'main'}/{file}"


def parse_split_fraction(split: str) -> float | None:
    """Return the fraction of the rows that a split selects: 0.2 for `train[:20%]`, 1 for `train`, and None for a split of any other form."""
    if split.strip() == "train":
        return 1.0
    match = PERCENT_SPLIT_PATTERN.match(split.replace(" ", ""))
    return float(match[1]) / 100 if match and 0 < float(match[1]) <= 100 else None


def assign_data_sources(draft: JobDraft, option_key: str, data_sources: list[DataSource]) -> None:
    """Set the training data. Several sources become a mixture. If no source has a weight, the numbers of rows become the weights."""
    if not data_sources:
        return
    formats = {data_source.format for data_source in data_sources}
    column_mappings = [dict(data_source.columns) for data_source in data_sources]
    if len(formats) == 1 and data_sources[0].format and not draft.has_value("dataset.format"):
        draft.assign("dataset.format", data_sources[0].format, option_key)
    if all(column_mappings[0] == other_mapping for other_mapping in column_mappings):
        for name, column in column_mappings[0].items():
            draft.assign(f"dataset.columns.{name}", column, option_key)
    if "dataset.train" in draft.request.overrides or "dataset.mixture" in draft.request.overrides:
        draft.paths_without_default.add("dataset.train")
    elif len(data_sources) == 1:
        draft.assign("dataset.train", data_sources[0].source, option_key)
    else:
        draft.assign(
            "dataset.mixture",
            _build_mixture(draft, option_key, data_sources, len(formats) == 1, all(column_mappings[0] == other_mapping for other_mapping in column_mappings)),
            option_key,
        )
    _assign_split_fractions(draft, option_key, data_sources)


def _build_mixture(
    draft: JobDraft, option_key: str, data_sources: list[DataSource], has_same_format: bool, has_same_columns: bool
) -> list[dict[str, Any]]:
    weights: list[float | None] = [data_source.weight for data_source in data_sources]
    if all(weight is None for weight in weights):
        weights = [data_source.row_count for data_source in data_sources]
    if any(weight is None for weight in weights):
        weights = [None] * len(data_sources)
        draft.add_warning(
            f"{draft.given_options[option_key].origin.location}: {option_key}: the tool reads the rows of all sources, "
            "but a mixture without weights takes the same number of rows from each source: set dataset.mixture[].weight to the numbers of rows"
        )
    mixture_entries = []
    for data_source, weight in zip(data_sources, weights, strict=True):
        mixture_entry: dict[str, Any] = {"source": data_source.source}
        if weight is not None:
            mixture_entry["weight"] = weight
        if not has_same_format and data_source.format:
            mixture_entry["format"] = data_source.format
        if not has_same_columns and data_source.columns:
            mixture_entry["columns"] = dict(data_source.columns)
        mixture_entries.append(mixture_entry)
    return mixture_entries


def _assign_split_fractions(draft: JobDraft, option_key: str, data_sources: list[DataSource]) -> None:
    """Set `dataset.split` so that the job trains on the same fraction of the rows that the other tool's file selects.

    If the job has validation rows, the rows that are not selected become test rows. Otherwise these rows become validation rows, and evaluation is
    turned off.
    """
    fractions = {data_source.fraction for data_source in data_sources}
    if fractions == {1.0}:
        return
    if len(fractions) > 1:
        draft.refuse_feature(
            option_key, "a different fraction of the rows for each source", "store the rows that you need in separate files"
        )
        return
    fraction = fractions.pop()
    validation_fraction = round(fraction * (draft.value("dataset.split.validation") or 0), 6)
    train_fraction, remaining_fraction = round(fraction - validation_fraction, 6), round(1 - fraction, 6)
    draft.assign("dataset.split.train", train_fraction, option_key)
    location = draft.given_options[option_key].origin.location
    if validation_fraction or draft.has_value("dataset.validation"):
        if validation_fraction:
            draft.values["dataset.split.validation"] = replace(
                draft.values["dataset.split.validation"], value=validation_fraction
            )
        draft.assign("dataset.split.test", round(1 - train_fraction - validation_fraction, 6), option_key)
        draft.add_warning(
            f"{location}: {option_key}: the job trains on {fraction:g} of the rows, drawn at random. The other rows become the test set, and the job measures "
            "the loss on them after training; to avoid this, store the rows that you need in a separate file"
        )
    else:
        draft.assign("dataset.split.validation", remaining_fraction, option_key)
        draft.assign("evaluation.strategy", "no", option_key)
        draft.add_note(
            f"{option_key}: the job trains on {fraction:g} of the rows, drawn at random, and does not use the other rows"
        )


def set_validation_split(draft: JobDraft, size_key: str, data_key: str) -> None:
    """Set the fraction of validation rows from the option `size_key`. Record a mistake if there is also an option `data_key` that names validation data."""
    size = draft.get(size_key)
    if size is None:
        return
    if size == 0:
        draft.add_reason(size_key, "0 means that there is no validation set")
    elif size >= 1:
        draft.refuse_feature(
            size_key, "a number of validation rows", "write a fraction such as 0.05, or give --validation URI"
        )
    elif draft.get(data_key):
        draft.add_mistake((size_key, data_key), "both name the validation data", "remove one of them")
    else:
        draft.assign("dataset.split.validation", size, size_key)
        draft.assign_default("dataset.split.seed", draft.get("seed", 42), "the seed of the file, or the tool's default")
