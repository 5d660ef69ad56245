"""`openai`: the importer for a fine-tuning job of an OpenAI-compatible API, as JSON. The job uses the API's JSONL data unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from finetune_cli.importers.converters import (
    ConversionError,
    any_value,
    text,
    to_choice,
    to_integer,
    to_mapping,
    to_number,
)
from finetune_cli.importers.documents import parse_document, parse_json, peek_json
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, Row, ToolDefault
from finetune_cli.importers.sources import assign_source, is_local
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin

REPORTED_BY_API = "the API only reports this field"


def auto_or(convert: Any) -> Any:
    """Return a converter that turns `auto` into None, so that the default applies."""

    def read_value(value: Any) -> Any:
        if value == "auto":
            return None
        try:
            return convert(value)
        except ConversionError as error:
            raise ConversionError(error.problem, f'"auto" or {error.allowed}') from None

    return read_value


def _hyperparameter_row(
    name: str, path: str, convert: Any, methods: tuple[str, ...] = ("supervised", "dpo"), *, is_set_by_combine: bool = False
) -> Row:
    aliases = tuple(f"method.{method}.hyperparameters.{name}" for method in methods)
    return Row(f"hyperparameters.{name}", path, auto_or(convert), aliases, is_set_by_combine=is_set_by_combine)


ROWS: tuple[Row, ...] = (
    Row("model", "model.source", is_required=True, is_set_by_combine=True),
    Row("training_file", "dataset.train", is_set_by_combine=True, is_required=True),
    Row("validation_file", "dataset.validation", is_set_by_combine=True),
    Row("method.type", "trainer.type", to_choice({"supervised": "sft", "dpo": "dpo"}), is_set_by_combine=True),
    _hyperparameter_row("n_epochs", "training.epochs", to_integer(1, 50)),
    _hyperparameter_row("batch_size", "training.batchSizePerDevice", to_integer(1), is_set_by_combine=True),
    _hyperparameter_row("learning_rate_multiplier", "training.learningRate", to_number(exclusive_low=0), is_set_by_combine=True),
    _hyperparameter_row("beta", "trainer.dpo.beta", to_number(exclusive_low=0, high=2), ("dpo",)),
    Row("seed", "training.seed", to_integer(0, 4294967295)),
    Row("suffix", "output.runName.suffix", text),
    Row("metadata", convert=to_mapping, is_set_by_combine=True),
    Row("integrations", "tracking.reportTo", any_value, is_set_by_combine=True),
    *(Row(key, convert=any_value, no_effect=REPORTED_BY_API) for key in (
        "id", "object", "created_at", "finished_at", "fine_tuned_model", "organization_id", "result_files", "status", "trained_tokens", "error",
        "estimated_finish", "user_provided_suffix", "shared_with_openai", "usage_metrics", "eval_id",
    )),
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.epochs", 3, "auto"),
    ToolDefault("method.type", "lora", "chosen by the importer: the API does not document its method"),
    ToolDefault("dataset.fileFormat", "jsonl", "fixed by the API"),
    ToolDefault(
        "dataset.responseOnly.enabled", True, "fixed by the API", lambda d: d.value("trainer.type", "sft") == "sft"
    ),
)
OPAQUE_PATHS = frozenset({"metadata", "integrations", "error"})
BASE_RATE = {"sft": 2e-4, "dpo": 5e-6}
"""Base of the learning rate multiplier: the default learning rates for adapters."""


# --- reading --------------------------------------------------------------------------------------------------------


def recognises_input(documents: tuple[InputDocument, ...], words: tuple[str, ...]) -> bool:
    """Return whether a document is a JSON object with a training file."""
    return any(_is_api_job(document) and not _has_flat_hyperparameters(document) for document in documents)


def _has_flat_hyperparameters(document: InputDocument) -> bool:
    """Return whether the hyperparameters are at the top level, as in Together's API."""
    return any(key in peek_json(document) for key in ("n_epochs", "learning_rate", "training_type", "training_method", "n_checkpoints", "lora", "batch_size"))


def _is_api_job(document: InputDocument) -> bool:
    if document.path.suffix == ".json" and '"training_file"' in document.text:
        return True
    return "training_file" in peek_json(document)


def read(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the fields of the job with file and line. `combine_options` checks the data files."""
    for word in draft.request.tool_arguments:
        draft.mistakes.append(
            Mistake(
                "command line",
                word,
                "this importer accepts no options of the training tool's command line",
                "change the file, or use the options of `finetune import`",
            )
        )
    for document in draft.documents:
        if document.path.suffix == ".jsonl":
            continue
        value = parse_json(document)
        lines = parse_document(document).lines
        yield from _iterate_leaves(value, "", document, lines)


def _iterate_leaves(value: dict[str, Any], prefix: str, document: InputDocument, lines: dict[str, int]) -> Iterator[OptionEntry]:
    for key, inner in value.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(inner, dict) and path not in OPAQUE_PATHS:
            yield from _iterate_leaves(inner, path, document, lines)
        elif inner is not None:
            yield OptionEntry(path, inner, ValueOrigin(f"{document.name}:{lines[path]}" if path in lines else document.name))


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several fields of the job."""
    assign_api_model(draft)
    trainer = draft.get("method.type", "sft")
    if "method.type" in draft.given_options:
        draft.assign("trainer.type", trainer, "method.type")
    else:
        draft.assign_default("trainer.type", trainer, "fixed by the API")
    assign_api_data(draft, trainer)
    _set_batch_size(draft)
    multiplier = draft.get("hyperparameters.learning_rate_multiplier")
    if multiplier is not None:
        base = draft.request.base_learning_rate or BASE_RATE[trainer]
        draft.assign(
            "training.learningRate", float(f"{base * multiplier:.6g}"), "hyperparameters.learning_rate_multiplier"
        )
        draft.add_note(f"learning_rate_multiplier {multiplier:g} multiplies the default learning rate {base:g}")
    if trainer != "dpo":
        draft.remove("trainer.dpo", "the method is not dpo")
    _set_annotations(draft)
    _set_trackers(draft)


def assign_api_model(draft: JobDraft) -> None:
    """Set the base model: an open model of the file, or the open model that `--model-map` names for a model of the API."""
    given_option = draft.given_options.get("model")
    if given_option is None or "model.source" in draft.request.overrides:
        return
    name = str(given_option.value)
    mapped_model = draft.request.model_map.get(name)
    if mapped_model is not None:
        draft.assign(
            "model.source", f"file://{mapped_model}" if is_local(mapped_model) and "://" not in mapped_model else mapped_model, "model"
        )
    elif "/" in name or is_local(name):
        assign_source(draft, "model", "model.source")
    else:
        draft.add_mistake(
            "model",
            f'"{name}" is a model that only the API can train',
            f"give an open model that replaces it: --model-map {name}=org/name",
            explained_path="model.source",
        )


def assign_api_data(draft: JobDraft, trainer: str, *, has_only_messages: bool = True) -> None:
    """Set the data of an API's job, and check the rows of data files that are given. `has_only_messages`: the API's rows for sft are messages."""
    data_documents = [document for document in draft.documents if document.path.suffix == ".jsonl"]
    for key, path, document in (
        ("training_file", "dataset.train", data_documents[0] if data_documents else None),
        ("validation_file", "dataset.validation", data_documents[1] if len(data_documents) > 1 else None),
    ):
        if key not in draft.given_options or path in draft.request.overrides:
            continue
        _set_data_source(draft, key, path, document)
    for document in data_documents if has_only_messages or trainer == "dpo" else ():
        _check_rows(draft, document, trainer)
    if trainer == "dpo":
        draft.assign_default("dataset.format", "preference", "fixed by the API")
        for column, name in (
            ("question", "input"),
            ("chosen", "preferred_output"),
            ("rejected", "non_preferred_output"),
        ):
            draft.assign_default(f"dataset.columns.{column}", name, "fixed by the API")
    elif has_only_messages:
        draft.assign_default("dataset.format", "messages", "fixed by the API")


def _set_data_source(draft: JobDraft, key: str, path: str, document: InputDocument | None) -> None:
    given_option = draft.given_options[key]
    if document is not None:
        option = "--data" if path == "dataset.train" else "--validation"
        draft.assign(path, f"file://{document.path}", key)
        draft.add_warning(
            f"{given_option.origin.location}: {key}: {document.path} is a path on this machine, which pods cannot read; give {option} URI"
        )
    elif re.match(r"^file-[A-Za-z0-9]+$", str(given_option.value)):
        option = "--data" if path == "dataset.train" else "--validation"
        draft.add_warning(
            f"{given_option.origin.location}: {key}: {given_option.value} is a file of the API; give the same rows with {option} URI"
        )
        draft.paths_of_invalid_keys[key] = path if path == "dataset.train" else ""
    else:
        assign_source(draft, key, path)


def _check_rows(draft: JobDraft, document: InputDocument, trainer: str) -> None:
    """Check the keys of the rows, so that data for another method is refused before a GPU is allocated."""
    # Not splitlines(): it also splits at Unicode line separators, which JSON strings may contain.
    mistake = find_row_mistake(document.name, document.text.split("\n"), trainer)
    if mistake is not None:
        draft.mistakes.append(mistake)


def find_row_mistake(file_name: str, lines: Iterable[str], trainer: str) -> Mistake | None:
    """Return the mistake of the first line that is not a JSON object with the keys that sft or dpo needs, or None if there is no such line."""
    required_keys = ("input", "preferred_output", "non_preferred_output") if trainer == "dpo" else ("messages",)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "the row holds a number that is too long, or is nested too deeply")
            return Mistake(f"{file_name}:{number}", "", f"invalid JSON: {reason}")
        missing_keys = [key for key in required_keys if not isinstance(row, dict) or key not in row]
        if missing_keys:
            present_keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            return Mistake(
                f"{file_name}:{number}",
                ", ".join(missing_keys),
                f"the key is missing: this row has {present_keys}",
                f"rows of {trainer} hold {', '.join(required_keys)}",
            )
    return None


def _set_batch_size(draft: JobDraft) -> None:
    """Set the batch size. In the API the batch size is the number of rows per optimizer step, over all ranks."""
    rows, key = draft.get("hyperparameters.batch_size"), "hyperparameters.batch_size"
    if rows is not None:
        split_batch(draft, key, rows)


def split_batch(draft: JobDraft, key: str, rows: int) -> None:
    """Divide the rows of one optimizer step among the ranks and into micro-batches."""
    ranks = _count_ranks(draft)
    rows_per_rank = rows // ranks
    if rows % ranks:
        allowed_sizes = f"{rows_per_rank * ranks} or {(rows_per_rank + 1) * ranks}" if rows_per_rank else str(ranks)
        draft.add_mistake(
            key,
            f"{rows} rows per step cannot be divided equally among {ranks} ranks",
            f"write {allowed_sizes}" + (", or change --gpus and --nodes" if draft.request.has_command_line else ""),
        )
        return
    batch_per_device = next(size for size in (4, 3, 2, 1) if rows_per_rank % size == 0)
    draft.assign("training.batchSizePerDevice", batch_per_device, key)
    draft.assign("training.gradientAccumulationSteps", rows_per_rank // batch_per_device, key)
    draft.add_note(
        f"batch_size {rows} becomes {batch_per_device} rows per rank, times {rows_per_rank // batch_per_device} accumulation steps, times {ranks} ranks"
    )


def _count_ranks(draft: JobDraft) -> int:
    """Return the number of ranks from the options of `finetune import`, because the API's files do not contain the number."""
    integer_options = {
        path: assigned.value for path, assigned in draft.request.overrides.items() if isinstance(assigned.value, int)
    }
    gpus = integer_options.get("resources.gpusPerNode", 1)
    ranks_per_node = integer_options.get("resources.processesPerNode", gpus) or 1
    return max(1, ranks_per_node * integer_options.get("resources.nodes", 1))


def _set_annotations(draft: JobDraft) -> None:
    for key, value in (draft.get("metadata") or {}).items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", str(key)).strip("_.-")[:63].strip("_.-")
        if name:
            draft.annotations[name] = str(value)


def _set_trackers(draft: JobDraft) -> None:
    given_option = draft.given_options.get("integrations")
    if given_option is None:
        return
    if not isinstance(given_option.value, list):
        draft.add_mistake(
            "integrations", "this is not a list", 'write [{"type": "wandb", "wandb": {"project": "..."}}]'
        )
        return
    for integration in given_option.value:
        options = integration.get("wandb") if isinstance(integration, dict) else None
        if not isinstance(integration, dict) or integration.get("type") != "wandb" or not isinstance(options, dict):
            draft.add_mistake(
                "integrations", "only wandb is supported", 'write [{"type": "wandb", "wandb": {"project": "..."}}]'
            )
            continue
        draft.assign("tracking.reportTo", ["wandb"], "integrations")
        ignored = [key for key in options if key not in ("project", "entity", "name")]
        if ignored:
            draft.add_warning(
                f"{given_option.origin.location}: integrations: {', '.join(ignored)} of wandb has no effect: a FineTuneJob has no such field"
            )
        for key, path in (
            ("project", "tracking.wandb.project"),
            ("entity", "tracking.wandb.entity"),
            ("name", "output.runName.name"),
        ):
            if options.get(key):
                draft.assign(path, str(options[key]), "integrations")


IMPORTER = Importer("openai", "the fine-tuning API", ROWS, DEFAULTS, recognises_input, read, combine_options)
