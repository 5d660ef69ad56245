"""`openai`: the importer for a fine-tuning job of an OpenAI-compatible API, as JSON. The FineTuneJob reads the API's JSONL data unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from finetune_cli.importers.converters import (
    ConversionError,
    keep_value,
    to_choice,
    to_integer,
    to_mapping,
    to_number,
    to_text,
)
from finetune_cli.importers.documents import parse_document, parse_json, peek_json
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.sources import assign_source, is_local
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin

REPORTED_BY_API_REASON = "the API only reports this field"


def accept_auto(convert: Any) -> Any:
    """Return a converter that turns `auto` into None, so that the default is used, and converts other values with `convert`."""

    def convert_unless_auto(value: Any) -> Any:
        if value == "auto":
            return None
        try:
            return convert(value)
        except ConversionError as error:
            raise ConversionError(error.problem, f'"auto" or {error.allowed}') from None

    return convert_unless_auto


def _make_hyperparameter_option(
    name: str, spec_path: str, convert: Any, methods: tuple[str, ...] = ("supervised", "dpo"), *, is_set_by_combine: bool = False
) -> OptionRow:
    aliases = tuple(f"method.{method}.hyperparameters.{name}" for method in methods)
    return OptionRow(f"hyperparameters.{name}", spec_path, accept_auto(convert), aliases, is_set_by_combine=is_set_by_combine)


OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("training_file", "dataset.train", is_set_by_combine=True, is_required=True),
    OptionRow("validation_file", "dataset.validation", is_set_by_combine=True),
    OptionRow("method.type", "trainer.type", to_choice({"supervised": "sft", "dpo": "dpo"}), is_set_by_combine=True),
    _make_hyperparameter_option("n_epochs", "training.epochs", to_integer(1, 50)),
    _make_hyperparameter_option("batch_size", "training.batchSizePerDevice", to_integer(1), is_set_by_combine=True),
    _make_hyperparameter_option("learning_rate_multiplier", "training.learningRate", to_number(exclusive_low=0), is_set_by_combine=True),
    _make_hyperparameter_option("beta", "trainer.dpo.beta", to_number(exclusive_low=0, high=2), ("dpo",)),
    OptionRow("seed", "training.seed", to_integer(0, 4294967295)),
    OptionRow("suffix", "output.runName.suffix", to_text),
    OptionRow("metadata", convert=to_mapping, is_set_by_combine=True),
    OptionRow("integrations", "tracking.reportTo", keep_value, is_set_by_combine=True),
    *(OptionRow(key, convert=keep_value, no_effect_reason=REPORTED_BY_API_REASON) for key in (
        "id", "object", "created_at", "finished_at", "fine_tuned_model", "organization_id", "result_files", "status", "trained_tokens", "error",
        "estimated_finish", "user_provided_suffix", "shared_with_openai", "usage_metrics", "eval_id",
    )),
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("training.epochs", 3, "auto"),
    ToolDefault("method.type", "lora", "chosen by the importer: the API does not document its method"),
    ToolDefault("dataset.fileFormat", "jsonl", "fixed by the API"),
    ToolDefault(
        "dataset.responseOnly.enabled", True, "fixed by the API", lambda draft: draft.value("trainer.type", "sft") == "sft"
    ),
)
OPAQUE_PATHS = frozenset({"metadata", "integrations", "error"})
BASE_LEARNING_RATE_BY_TRAINER = {"sft": 2e-4, "dpo": 5e-6}
"""For each objective: the default learning rate for adapters. It is multiplied by `learning_rate_multiplier`."""


# --- reading --------------------------------------------------------------------------------------------------------


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document is a job of the API: a JSON object with a training file, but without the keys of Together's API."""
    return any(_is_api_job(document) and not _has_flat_hyperparameters(document) for document in documents)


def _has_flat_hyperparameters(document: InputDocument) -> bool:
    """Return whether the hyperparameters are at the top level of the file, where Together's API has them."""
    return any(key in peek_json(document) for key in ("n_epochs", "learning_rate", "training_type", "training_method", "n_checkpoints", "lora", "batch_size"))


def _is_api_job(document: InputDocument) -> bool:
    if document.path.suffix == ".json" and '"training_file"' in document.text:
        return True
    return "training_file" in peek_json(document)


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the fields of the job, with file and line. The data files (JSONL) are not read here, but checked by `combine_options`."""
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
        job = parse_json(document)
        lines = parse_document(document).lines
        yield from _iterate_leaves(job, "", document, lines)


def _iterate_leaves(option_group: dict[str, Any], prefix: str, document: InputDocument, lines: dict[str, int]) -> Iterator[OptionEntry]:
    for key, value in option_group.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and path not in OPAQUE_PATHS:
            yield from _iterate_leaves(value, path, document, lines)
        elif value is not None:
            yield OptionEntry(path, value, ValueOrigin(f"{document.name}:{lines[path]}" if path in lines else document.name))


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
        base_rate = draft.request.base_learning_rate or BASE_LEARNING_RATE_BY_TRAINER[trainer]
        draft.assign(
            "training.learningRate", float(f"{base_rate * multiplier:.6g}"), "hyperparameters.learning_rate_multiplier"
        )
        draft.add_note(f"learning_rate_multiplier {multiplier:g} multiplies the default learning rate {base_rate:g}")
    if trainer != "dpo":
        draft.remove("trainer.dpo", "the method is not dpo")
    _set_annotations(draft)
    _set_trackers(draft)


def assign_api_model(draft: JobDraft) -> None:
    """Set the base model: the open model in the file, or the open model with which `--model-map` replaces a model of the API."""
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
    """Set the data of an API's job, and check the rows of given data files.

    `has_only_messages`: whether the API accepts no rows for sft except rows with messages.
    """
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


def _set_data_source(draft: JobDraft, option_key: str, spec_path: str, document: InputDocument | None) -> None:
    given_option = draft.given_options[option_key]
    if document is not None:
        cli_option = "--data" if spec_path == "dataset.train" else "--validation"
        draft.assign(spec_path, f"file://{document.path}", option_key)
        draft.add_warning(
            f"{given_option.origin.location}: {option_key}: {document.path} is a path on this machine, which pods cannot read; give {cli_option} URI"
        )
    elif re.match(r"^file-[A-Za-z0-9]+$", str(given_option.value)):
        cli_option = "--data" if spec_path == "dataset.train" else "--validation"
        draft.add_warning(
            f"{given_option.origin.location}: {option_key}: {given_option.value} is a file of the API; give the same rows with {cli_option} URI"
        )
        draft.paths_of_invalid_keys[option_key] = spec_path if spec_path == "dataset.train" else ""
    else:
        assign_source(draft, option_key, spec_path)


def _check_rows(draft: JobDraft, document: InputDocument, trainer: str) -> None:
    """Check the keys of the rows, so that data in the format of another method is refused at the import, and not after the job has started on a GPU."""
    # splitlines() would also split at Unicode line separators, which JSON strings may contain.
    mistake = find_row_mistake(document.name, document.text.split("\n"), trainer)
    if mistake is not None:
        draft.mistakes.append(mistake)


def find_row_mistake(file_name: str, lines: Iterable[str], trainer: str) -> Mistake | None:
    """Return the mistake in the first line that is not a JSON object with the keys that sft or dpo needs, or None if all lines are correct."""
    required_keys = ("input", "preferred_output", "non_preferred_output") if trainer == "dpo" else ("messages",)
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "the row holds a number that is too long, or is nested too deeply")
            return Mistake(f"{file_name}:{line_number}", "", f"invalid JSON: {reason}")
        missing_keys = [key for key in required_keys if not isinstance(row, dict) or key not in row]
        if missing_keys:
            present_keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            return Mistake(
                f"{file_name}:{line_number}",
                ", ".join(missing_keys),
                f"the key is missing: this row has {present_keys}",
                f"rows of {trainer} hold {', '.join(required_keys)}",
            )
    return None


def _set_batch_size(draft: JobDraft) -> None:
    """Set the batch size from the API's batch size, which counts the rows of an optimizer step over all ranks."""
    rows_per_step, key = draft.get("hyperparameters.batch_size"), "hyperparameters.batch_size"
    if rows_per_step is not None:
        assign_batch_sizes(draft, key, rows_per_step)


def assign_batch_sizes(draft: JobDraft, option_key: str, rows_per_step: int) -> None:
    """Set micro-batch and accumulation steps so that all ranks together train on `rows_per_step` rows in an optimizer step."""
    rank_count = _count_ranks(draft)
    rows_per_rank = rows_per_step // rank_count
    if rows_per_step % rank_count:
        allowed_sizes = f"{rows_per_rank * rank_count} or {(rows_per_rank + 1) * rank_count}" if rows_per_rank else str(rank_count)
        draft.add_mistake(
            option_key,
            f"{rows_per_step} rows per step cannot be divided equally among {rank_count} ranks",
            f"write {allowed_sizes}" + (", or change --gpus and --nodes" if draft.request.has_command_line else ""),
        )
        return
    rows_per_batch = next(size for size in (4, 3, 2, 1) if rows_per_rank % size == 0)
    draft.assign("training.batchSizePerDevice", rows_per_batch, option_key)
    draft.assign("training.gradientAccumulationSteps", rows_per_rank // rows_per_batch, option_key)
    draft.add_note(
        f"batch_size {rows_per_step} becomes micro-batches of {rows_per_batch} rows, times {rows_per_rank // rows_per_batch} accumulation steps, "
        f"times {rank_count} ranks"
    )


def _count_ranks(draft: JobDraft) -> int:
    """Return the number of ranks that follows from the options of `finetune import`, or 1 without these options.

    The files of the API do not contain this number.
    """
    integer_options = {
        path: assigned_value.value for path, assigned_value in draft.request.overrides.items() if isinstance(assigned_value.value, int)
    }
    gpus_per_node = integer_options.get("resources.gpusPerNode", 1)
    ranks_per_node = integer_options.get("resources.processesPerNode", gpus_per_node) or 1
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
        wandb_options = integration.get("wandb") if isinstance(integration, dict) else None
        if not isinstance(integration, dict) or integration.get("type") != "wandb" or not isinstance(wandb_options, dict):
            draft.add_mistake(
                "integrations", "only wandb is supported", 'write [{"type": "wandb", "wandb": {"project": "..."}}]'
            )
            continue
        draft.assign("tracking.reportTo", ["wandb"], "integrations")
        unused_options = [key for key in wandb_options if key not in ("project", "entity", "name")]
        if unused_options:
            draft.add_warning(
                f"{given_option.origin.location}: integrations: {', '.join(unused_options)} of wandb has no effect: a FineTuneJob has no such field"
            )
        for key, path in (
            ("project", "tracking.wandb.project"),
            ("entity", "tracking.wandb.entity"),
            ("name", "output.runName.name"),
        ):
            if wandb_options.get(key):
                draft.assign(path, str(wandb_options[key]), "integrations")


IMPORTER = Importer("openai", "the fine-tuning API", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options)
