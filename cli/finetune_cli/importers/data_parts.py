"""Training data in other tools' files: one or several sources with a format, which become `dataset.train` or `dataset.mixture`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_cli.importers.draft import JobDraft

READABLE_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet)(\.gz)?$", re.IGNORECASE)
PERCENT_OF_SPLIT = re.compile(r"^train\[:(\d+(?:\.\d+)?)%\]$")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
"""Keys of a message that the trainer reads."""
ROLE_NAMES = {
    "system": ("system", "developer"), "user": ("user", "human", "prompter"), "assistant": ("assistant", "gpt", "bot", "model", "chatgpt"),
    "tool": ("tool", "function", "observation", "ipython"),
}  # fmt: skip
"""Names of roles that the trainer knows, by the role's name in chat templates."""


@dataclass(frozen=True)
class DataPart:
    """One source of data. `row_count` is None if the number of rows is unknown; `fraction` is the part of the rows that the file selects."""

    source: str
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    row_count: int | None = None
    fraction: float = 1.0
    weight: float | None = None


def hub_file_url(repository: str, file: str, revision: str | None = None) -> str:
    """Return the URL of one file of a data set on the hub."""
    return f"https://huggingface.co/datasets/{repository}/resolve/{revision or 'main'}/{file}"


def fraction_of_split(split: str) -> float | None:
    """Return 0.2 for `train[:20%]`, 1 for `train`, and None for every other split."""
    if split.strip() == "train":
        return 1.0
    match = PERCENT_OF_SPLIT.match(split.replace(" ", ""))
    return float(match[1]) / 100 if match and 0 < float(match[1]) <= 100 else None


def assign_parts(draft: JobDraft, key: str, parts: list[DataPart]) -> None:
    """Set the training data. Several sources become a mixture with the weights of the parts, or with their numbers of rows if these are known."""
    if not parts:
        return
    formats = {part.format for part in parts}
    columns = [dict(part.columns) for part in parts]
    if len(formats) == 1 and parts[0].format and not draft.has_value("dataset.format"):
        draft.assign("dataset.format", parts[0].format, key)
    if all(columns[0] == other for other in columns):
        for name, column in columns[0].items():
            draft.assign(f"dataset.columns.{name}", column, key)
    if "dataset.train" in draft.request.overrides or "dataset.mixture" in draft.request.overrides:
        draft.paths_without_default.add("dataset.train")
    elif len(parts) == 1:
        draft.assign("dataset.train", parts[0].source, key)
    else:
        draft.assign(
            "dataset.mixture",
            _mixture(draft, key, parts, len(formats) == 1, all(columns[0] == other for other in columns)),
            key,
        )
    _assign_fraction(draft, key, parts)


def _mixture(
    draft: JobDraft, key: str, parts: list[DataPart], has_one_format: bool, has_same_columns: bool
) -> list[dict[str, Any]]:
    weights: list[float | None] = [part.weight for part in parts]
    if all(weight is None for weight in weights):
        weights = [part.row_count for part in parts]
    if any(weight is None for weight in weights):
        weights = [None] * len(parts)
        draft.add_warning(
            f"{draft.given_options[key].origin.location}: {key}: the tool reads the rows of all sources; a mixture takes the same number of rows from each "
            "source: set dataset.mixture[].weight to the numbers of rows"
        )
    items = []
    for part, weight in zip(parts, weights, strict=True):
        item: dict[str, Any] = {"source": part.source}
        if weight is not None:
            item["weight"] = weight
        if not has_one_format and part.format:
            item["format"] = part.format
        if not has_same_columns and part.columns:
            item["columns"] = dict(part.columns)
        items.append(item)
    return items


def _assign_fraction(draft: JobDraft, key: str, parts: list[DataPart]) -> None:
    """Train on a part of the rows. The other rows become validation rows that are never evaluated, or test rows if there are validation rows."""
    fractions = {part.fraction for part in parts}
    if fractions == {1.0}:
        return
    if len(fractions) > 1:
        draft.refuse_feature(
            key, "a different part of the rows of each source", "store the rows that you need in separate files"
        )
        return
    fraction = fractions.pop()
    validation = round(fraction * (draft.value("dataset.split.validation") or 0), 6)
    train, rest = round(fraction - validation, 6), round(1 - fraction, 6)
    draft.assign("dataset.split.train", train, key)
    location = draft.given_options[key].origin.location
    if validation or draft.has_value("dataset.validation"):
        if validation:
            draft.values["dataset.split.validation"] = replace(
                draft.values["dataset.split.validation"], value=validation
            )
        draft.assign("dataset.split.test", round(1 - train - validation, 6), key)
        draft.add_warning(
            f"{location}: {key}: the job trains on {fraction:g} of the rows, drawn at random. The other rows become the test set, and the job measures "
            "the loss on them after training; to avoid this, store the rows that you need in a separate file"
        )
    else:
        draft.assign("dataset.split.validation", rest, key)
        draft.assign("evaluation.strategy", "no", key)
        draft.add_note(
            f"{key}: the job trains on {fraction:g} of the rows, drawn at random; the other rows are held out and not used"
        )


def set_validation_split(draft: JobDraft, size_key: str, data_key: str) -> None:
    """Set the fraction of the rows that is used for validation. `data_key`: the option that names validation data instead."""
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
