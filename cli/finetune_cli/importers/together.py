"""`together`: the importer for a fine-tuning job of Together's API, as JSON or YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_cli.importers.converters import (
    ConversionError,
    to_boolean,
    to_choice,
    to_integer,
    to_name_list,
    to_number,
)
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.openai import REPORTED_BY_API_REASON, assign_api_data, assign_api_model, assign_batch_sizes
from finetune_cli.importers.options import (
    assign_hub_push,
    assign_secret_reference,
    make_ignored_options,
    make_option_groups,
    make_refused_options,
)
from finetune_cli.mistakes import Mistake

RECOGNISED_KEYS = (
    "n_epochs", "training_type", "training_method", "n_checkpoints", "n_evals", "lora", "lora_r", "train_on_inputs", "batch_size", "warmup_ratio",
    "learning_rate", "wandb_api_key", "wandb_project_name",
)  # fmt: skip
"""Keys at the top level of a job of Together's API. None of these keys is at the top level of a job of OpenAI's API."""


def accept_word(word: str, convert: Any) -> Any:
    """Return a converter that turns `word`, such as `auto` or `max`, into None, so that the default is used, and converts other values with `convert`."""

    def convert_unless_word(value: Any) -> Any:
        if value == word:
            return None
        try:
            return convert(value)
        except ConversionError as error:
            raise ConversionError(error.problem, f'"{word}" or {error.allowed}') from None

    return convert_unless_word


OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model", "model.source", is_set_by_combine=True, is_required=True),
    OptionRow("training_file", "dataset.train", is_set_by_combine=True, is_required=True),
    OptionRow("validation_file", "dataset.validation", is_set_by_combine=True),
    OptionRow("n_epochs", "training.epochs", to_integer(1)),
    OptionRow("batch_size", "training.batchSizePerDevice", accept_word("max", to_integer(1)), is_set_by_combine=True),
    OptionRow("learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    OptionRow("lr_scheduler.lr_scheduler_type", "training.scheduler", to_choice({"linear": "linear", "cosine": "cosine"})),
    OptionRow("lr_scheduler.lr_scheduler_args.min_lr_ratio", "training.schedulerParameters", to_number(0, 1), ("min_lr_ratio",), is_set_by_combine=True),
    OptionRow("lr_scheduler.lr_scheduler_args.num_cycles", "training.schedulerParameters", to_number(0), ("scheduler_num_cycles",), is_set_by_combine=True),
    OptionRow("warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1)),
    OptionRow("max_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("n_checkpoints", "checkpoint.strategy", to_integer(0), is_set_by_combine=True),
    OptionRow("n_evals", "evaluation.strategy", to_integer(0), is_set_by_combine=True),
    OptionRow("suffix", "output.runName.suffix"),
    OptionRow("training_type.type", "method.type", to_choice({"Full": "full", "Lora": "lora"}), is_set_by_combine=True),
    OptionRow("lora", "method.type", to_boolean, is_set_by_combine=True),
    OptionRow("training_type.lora_r", "method.lora.rank", to_integer(1), ("lora_r",), is_set_by_combine=True),
    OptionRow("training_type.lora_alpha", "method.lora.alpha", to_number(exclusive_low=0), ("lora_alpha",), is_set_by_combine=True),
    OptionRow("training_type.lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1), ("lora_dropout",), is_set_by_combine=True),
    OptionRow("training_type.lora_trainable_modules", "method.lora.targetModules", to_name_list, ("lora_trainable_modules",), is_set_by_combine=True),
    OptionRow("training_method.method", "trainer.type", to_choice({"sft": "sft", "dpo": "dpo"}), is_set_by_combine=True),
    OptionRow("training_method.train_on_inputs", "dataset.responseOnly.enabled", accept_word("auto", to_boolean), ("train_on_inputs",), is_set_by_combine=True),
    OptionRow("training_method.dpo_beta", "trainer.dpo.beta", to_number(exclusive_low=0), ("dpo_beta",), is_set_by_combine=True),
    OptionRow("packing", "dataset.packing", to_boolean, is_set_by_combine=True),
    OptionRow("max_seq_length", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("random_seed", "training.seed", to_integer(0, 4294967295), ("seed",)),
    OptionRow("from_checkpoint", is_set_by_combine=True),
    OptionRow("wandb_api_key", "tracking.wandb.apiKeySecretRef", aliases=("wandb_key",), is_secret=True, is_set_by_combine=True),
    OptionRow("wandb_project_name", "tracking.wandb.project", is_set_by_combine=True),
    OptionRow("wandb_entity", "tracking.wandb.entity", is_set_by_combine=True),
    OptionRow("wandb_name", "output.runName.name", is_set_by_combine=True),
    OptionRow("hf_api_token", "model.tokenSecretRef", is_secret=True, is_set_by_combine=True),
    OptionRow("hf_output_repo_name", "output.hub.repository", is_set_by_combine=True),
    *make_option_groups("training_type training_method lr_scheduler lr_scheduler.lr_scheduler_args"),
    *make_ignored_options("set the environment variable WANDB_BASE_URL in placement.env instead", "wandb_base_url"),
    *make_refused_options("a loss term of RPO or SimPO", "training_method.rpo_alpha training_method.simpo_gamma rpo_alpha simpo_gamma"),
    *make_refused_options("DPO without a reference model, or normalised by length",
             "training_method.dpo_reference_free training_method.dpo_normalize_logratios_by_length "
             "dpo_reference_free dpo_normalize_logratios_by_length"),
    *make_refused_options("training on images, video or audio", "multimodal_params.train_vision train_vision"),
    *make_ignored_options(REPORTED_BY_API_REASON,
             "id object status job_id created_at updated_at started_at user_id owner_address output_name adapter_output_name token_count "
             "param_count total_price total_steps steps_completed epochs_completed evals_completed eval_steps queue_depth wandb_url training_file_num_lines "
             "training_file_size training_file_tokens model_output_name model_output_path events progress TrainingFileNumLines TrainingFileSize "
             "multimodal_params wandb_run_id checkpoints"),
)  # fmt: skip
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("method.type", "lora", "the API's default"),
    ToolDefault("training.epochs", 1, "the API's default"),
    ToolDefault("training.learningRate", 1e-5, "the API's default"),
    ToolDefault("training.scheduler", "cosine", "the API's default"),
    ToolDefault("training.warmupRatio", 0, "the API's default"),
    ToolDefault("training.maxGradNorm", 1, "the API's default"),
    ToolDefault("training.weightDecay", 0, "the API's default"),
    ToolDefault(
        "method.lora.targetModules", ["all-linear"], "the API's default", lambda draft: draft.value("method.type") == "lora"
    ),
)


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document names a training file and has keys of Together's API."""
    return any(
        "training_file" in peek_mapping(document) and any(key in peek_mapping(document) for key in RECOGNISED_KEYS)
        for document in documents
    )


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the fields of the job, with file and line."""
    for word in draft.request.tool_arguments:
        hint = "change the file, or use the options of `finetune import`"
        draft.mistakes.append(Mistake("command line", word, "this importer accepts no options of the training tool's command line", hint))
    for document in draft.documents:
        if document.path.suffix != ".jsonl":
            yield from iterate_entries(
                document, parse_document(document), frozenset({"events", "progress", "checkpoints"})
            )


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several fields of the job."""
    _use_hub_name(draft)
    assign_api_model(draft)
    trainer = draft.get("training_method.method", "sft")
    if "training_method.method" in draft.given_options:
        draft.assign("trainer.type", trainer, "training_method.method")
    assign_api_data(draft, trainer, has_only_messages=False)
    _set_method(draft)
    _set_objective(draft, trainer)
    rows_per_step = draft.get("batch_size")
    if rows_per_step is not None:
        assign_batch_sizes(draft, "batch_size", rows_per_step)
    elif "batch_size" in draft.given_options:
        draft.add_reason("batch_size", "the default batch size replaces max; policy.onOutOfMemory can adapt it")
    _set_schedule(draft)
    _set_intervals(draft)
    _set_results(draft)


def _use_hub_name(draft: JobDraft) -> None:
    """Remove `-Reference` from the model's name. The API adds this ending to the name that the model has on the hub."""
    option = draft.given_options.get("model")
    if option is not None and str(option.value).endswith("-Reference"):
        draft.given_options["model"] = replace(option, value=str(option.value).removesuffix("-Reference"))
        draft.add_note(f"model: {option.value} is {draft.get('model')} on the hub")


def _set_method(draft: JobDraft) -> None:
    key = "training_type.type" if "training_type.type" in draft.given_options else "lora"
    is_full = draft.get("training_type.type") == "full" or draft.get("lora") is False
    if key in draft.given_options:
        draft.assign("method.type", "full" if is_full else "lora", key)
    for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_trainable_modules"):
        option_key = f"training_type.{name}"
        if option_key in draft.given_options and is_full:
            draft.add_reason(option_key, "no effect: all weights are trained")
        elif option_key in draft.given_options:
            draft.assign(draft.given_options[option_key].option_row.path, draft.get(option_key), option_key)
    rank = draft.value("method.lora.rank")
    if rank is not None:
        draft.assign_default("method.lora.alpha", 2 * rank, "the API's default: twice the rank")
    if "from_checkpoint" in draft.given_options:
        draft.refuse_feature(
            "from_checkpoint", "continuing a job of the API", "download its model and give --model URI or --adapter URI"
        )


def _set_objective(draft: JobDraft, trainer: str) -> None:
    key = "training_method.dpo_beta"
    if key in draft.given_options and trainer == "dpo":
        draft.assign("trainer.dpo.beta", draft.get(key), key)
    elif key in draft.given_options:
        draft.add_reason(key, f"no effect: the objective is {trainer}")
    key = "training_method.train_on_inputs"
    if draft.get(key) is not None and trainer == "sft":
        draft.assign("dataset.responseOnly.enabled", not draft.get(key), key)
    elif key in draft.given_options:
        draft.add_reason(key, "the format of the rows determines which tokens are trained on, as in the API")
    if draft.get("packing") and trainer == "sft":
        draft.assign("dataset.packing", True, "packing")
    elif "packing" in draft.given_options:
        draft.add_reason("packing", "rows are not packed")


def _set_schedule(draft: JobDraft) -> None:
    ratio_key, cycles_key = "lr_scheduler.lr_scheduler_args.min_lr_ratio", "lr_scheduler.lr_scheduler_args.num_cycles"
    if draft.get(ratio_key):
        if draft.value("training.scheduler") == "linear":
            draft.refuse_feature(ratio_key, "a linear schedule whose learning rate does not fall to 0", "write cosine, or 0")
        else:
            draft.assign("training.scheduler", "cosineWithMinLr", ratio_key)
            draft.assign("training.schedulerParameters", {"min_lr_rate": str(draft.get(ratio_key))}, ratio_key)
    elif ratio_key in draft.given_options:
        draft.add_reason(ratio_key, "0 is the default: the learning rate falls to 0")
    if draft.get(cycles_key) not in (None, 0.5):
        draft.refuse_feature(cycles_key, "a number of cosine cycles other than 0.5", "write 0.5")
    elif cycles_key in draft.given_options:
        draft.add_reason(cycles_key, "every FineTuneJob has half a cycle")


def _set_intervals(draft: JobDraft) -> None:
    if "n_checkpoints" in draft.given_options:
        draft.assign("checkpoint.strategy", "epoch", "n_checkpoints")
        draft.assign("checkpoint.keep", draft.get("n_checkpoints"), "n_checkpoints")
    if draft.get("n_evals") and draft.has_key("validation_file"):
        draft.assign("evaluation.strategy", "epoch", "n_evals")
        draft.add_note(
            "n_evals: the job evaluates once per epoch; set evaluation.strategy and evaluation.steps for another interval"
        )
    elif "n_evals" in draft.given_options:
        draft.add_reason("n_evals", "no effect: there is no validation set, or n_evals is 0")


def _set_results(draft: JobDraft) -> None:
    if "hf_api_token" in draft.given_options:
        draft.assign("model.tokenSecretRef", draft.store_secret("hf-token", draft.get("hf_api_token")), "hf_api_token")
    if "hf_output_repo_name" in draft.given_options:
        assign_hub_push(draft, "hf_output_repo_name")
    given_keys = [
        key
        for key in ("wandb_project_name", "wandb_api_key", "wandb_entity", "wandb_name")
        if key in draft.given_options
    ]
    if not given_keys:
        return
    draft.assign("tracking.reportTo", ["wandb"], given_keys[0])
    for key in given_keys:
        if key == "wandb_api_key":
            draft.assign("tracking.wandb.apiKeySecretRef", draft.store_secret("wandb-api-key", draft.get(key)), key)
        else:
            draft.assign(draft.given_options[key].option_row.path, draft.get(key), key)
    if "wandb_api_key" not in given_keys:
        assign_secret_reference(draft, "tracking.wandb.apiKeySecretRef", "wandb", "reporting to wandb")


IMPORTER = Importer(
    "together", "Together's API", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, reports_every_key=True
)
