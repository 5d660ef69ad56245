"""`guide`: the importer for the script of a fine-tuning guide. The script is configured with a flat or nested YAML file, and with flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.command_lines import (
    add_config_file,
    add_stray_mistakes,
    build_flag_entry,
    parse_flags,
    strip_launcher,
)
from finetune_cli.importers.converters import (
    ConversionError,
    keep_value,
    to_boolean,
    to_choice,
    to_integer,
    to_mapping,
    to_module_names,
    to_number,
    to_text,
    to_text_matching,
    try_converters,
)
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.sources import assign_output_folder, assign_source, is_local
from finetune_cli.importers.toml import BIAS_BY_NAME, DTYPE_BY_NAME, SCHEDULER_BY_NAME
from finetune_cli.mistakes import Mistake

GENERATION_PATH = "evaluation.comparison.generation"
TRACKERS_BY_NAME = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
DATASET_FORMAT_BY_NAME = {"alpaca": "alpaca", "sharegpt": "sharegpt", "completion": "promptCompletion", "custom": "custom"}
DEVICE_MAP_REASON = "the trainer assigns the model to devices"


to_train_split = to_text_matching(
    lambda t: t == "train",
    "is not supported, because the trainer always reads the split train",
    "train; for another split give --data URI",
)


def to_steps_or_none(value: Any) -> int | None:
    """Convert a number of steps. -1 and 0 become None, because they mean that there is no limit."""
    steps = to_integer(-1)(value)
    return steps if steps > 0 else None


def to_positive_number(value: Any) -> float | int:
    """Convert a number greater than 0."""
    try:
        number: float | int = to_number(exclusive_low=0)(value)
        return number
    except ConversionError as error:
        raise ConversionError("is not a positive number", error.allowed) from None


OPTION_TABLE: tuple[OptionRow, ...] = (
    OptionRow("model", "model.source", aliases=("base_model.name", "--model"), is_required=True, is_set_by_combine=True),
    OptionRow("base_model.dtype", "model.dtype", to_choice(DTYPE_BY_NAME)),
    OptionRow("base_model.device_map", no_effect_reason=DEVICE_MAP_REASON),
    OptionRow("base_model.trust_remote_code", "model.trustRemoteCode", to_boolean),
    OptionRow("lora_r", "method.lora.rank", to_integer(1), ("lora.r", "--lora-r")),
    OptionRow("lora_alpha", "method.lora.alpha", to_positive_number, ("lora.lora_alpha",)),
    OptionRow("lora.lora_dropout", "method.lora.dropout", to_number(0, exclusive_high=1)),
    OptionRow("lora.bias", "method.lora.bias", to_choice(BIAS_BY_NAME)),
    OptionRow("lora.task_type", "method.lora.taskType", to_choice({"CAUSAL_LM": "causalLM"})),
    OptionRow("target_modules", "method.lora.targetModules", try_converters(to_module_names, to_mapping), ("lora.target_modules",), is_set_by_combine=True),
    OptionRow("use_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("quantization.enabled", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("quantization.load_in_4bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("quantization.load_in_8bit", "model.quantization.bits", to_boolean, is_set_by_combine=True),
    OptionRow("quantization.bnb_4bit_quant_type", "model.quantization.type", to_choice(["nf4", "fp4"])),
    OptionRow("quantization.bnb_4bit_compute_dtype", "model.quantization.computeDtype", to_choice(["bfloat16", "float16", "float32"])),
    OptionRow("quantization.bnb_4bit_use_double_quant", "model.quantization.doubleQuant", to_boolean),
    OptionRow("batch_size", "training.batchSizePerDevice", to_integer(1), ("training.per_device_train_batch_size", "--batch-size")),
    OptionRow("training.per_device_eval_batch_size", "evaluation.batchSizePerDevice", to_integer(1)),
    OptionRow("gradient_accumulation", "training.gradientAccumulationSteps", to_integer(1), ("training.gradient_accumulation_steps",)),
    OptionRow("epochs", "training.epochs", to_number(exclusive_low=0), ("training.num_train_epochs", "--epochs")),
    OptionRow("training.max_steps", "training.maxSteps", to_steps_or_none),
    OptionRow("learning_rate", "training.learningRate", to_number(exclusive_low=0), ("training.learning_rate",)),
    OptionRow("training.lr_scheduler_type", "training.scheduler", to_choice(SCHEDULER_BY_NAME)),
    OptionRow("training.warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1)),
    OptionRow("training.warmup_steps", "training.warmupSteps", to_integer(0)),
    OptionRow("training.optim", "training.optimizer"),
    OptionRow("training.weight_decay", "training.weightDecay", to_number(0)),
    OptionRow("training.max_grad_norm", "training.maxGradNorm", to_number(0)),
    OptionRow("training.fp16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    OptionRow("training.bf16", "training.mixedPrecision", to_boolean, is_set_by_combine=True),
    OptionRow("training.gradient_checkpointing", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    OptionRow("training.logging_steps", "tracking.loggingSteps", to_integer(1)),
    OptionRow("training.logging_first_step", "tracking.logFirstStep", to_boolean),
    OptionRow("training.eval_strategy", "evaluation.strategy", to_choice(["steps", "epoch", "no"])),
    OptionRow("training.eval_steps", "evaluation.steps", to_integer(1), is_set_by_combine=True),
    OptionRow("training.eval_accumulation_steps", convert=keep_value, no_effect_reason="the trainer does not accumulate evaluation outputs"),
    OptionRow("training.save_strategy", "checkpoint.strategy", to_choice(["steps", "epoch", "no"])),
    OptionRow("training.save_steps", "checkpoint.steps", to_integer(1)),
    OptionRow("training.save_total_limit", "checkpoint.keep", to_integer(1)),
    OptionRow("training.load_best_model_at_end", "checkpoint.loadBestAtEnd", to_boolean),
    OptionRow("training.output_dir", "output.dir", aliases=("--output",), is_set_by_combine=True),
    OptionRow("training.overwrite_output_dir", convert=to_boolean, no_effect_reason="every run writes to its own folder"),
    OptionRow("training.report_to", "tracking.reportTo", to_choice(TRACKERS_BY_NAME), is_set_by_combine=True, empty_is_absent=False),
    OptionRow("training.seed", "training.seed", to_integer(0, 4294967295)),
    OptionRow("--data", "dataset.train", is_set_by_combine=True),
    OptionRow("dataset.format", "dataset.format", to_choice(DATASET_FORMAT_BY_NAME)),
    OptionRow("dataset.instruction_column", "dataset.columns.question"),
    OptionRow("dataset.input_column", "dataset.columns.input"),
    OptionRow("dataset.output_column", "dataset.columns.answer"),
    OptionRow("dataset.max_seq_length", "dataset.maxSequenceLength", to_integer(1)),
    OptionRow("dataset.packing", "dataset.packing", to_boolean),
    OptionRow("dataset.add_eos_token", "dataset.addEosToken", to_boolean),
    OptionRow("dataset.train_split", convert=to_train_split, is_set_by_combine=True),
    OptionRow("dataset.eval_split", "dataset.validation", is_set_by_combine=True),
    OptionRow("dataset.eval_size", "dataset.split.validation", to_number(0, exclusive_high=1)),
    OptionRow("callbacks.early_stopping.enabled", "training.earlyStopping", to_boolean, is_set_by_combine=True),
    OptionRow("callbacks.early_stopping.patience", "training.earlyStopping.patience", to_integer(1), is_set_by_combine=True),
    OptionRow("callbacks.early_stopping.threshold", "training.earlyStopping.threshold", to_number(0), is_set_by_combine=True),
    OptionRow("callbacks.wandb.enabled", "tracking.reportTo", to_boolean, is_set_by_combine=True),
    OptionRow("callbacks.wandb.project", "tracking.wandb.project"),
    OptionRow("callbacks.wandb.entity", "tracking.wandb.entity"),
    OptionRow("inference.max_new_tokens", f"{GENERATION_PATH}.maxNewTokens", to_integer(1)),
    OptionRow("inference.temperature", f"{GENERATION_PATH}.temperature", to_number(0, 10)),
    OptionRow("inference.top_p", f"{GENERATION_PATH}.topP", to_number(0, 1, exclusive_low=0)),
    OptionRow("inference.top_k", f"{GENERATION_PATH}.topK", to_integer(0)),
    OptionRow("inference.do_sample", f"{GENERATION_PATH}.doSample", to_boolean),
    OptionRow("inference.num_beams", convert=to_integer(1), no_effect_reason="generation is greedy or sampled, without beam search"),
    OptionRow("inference.repetition_penalty", f"{GENERATION_PATH}.repetitionPenalty", to_number(exclusive_low=0)),
    OptionRow("post_training.merge_adapter", "output.mergeAdapter", to_boolean, ("--merge",)),
    OptionRow("post_training.push_to_hub", "output.hub.push", to_boolean),
    OptionRow("post_training.hub_model_id", "output.hub.repository"),
    OptionRow("templates", "dataset.template", to_mapping, is_set_by_combine=True),
    OptionRow("requirements", convert=keep_value, no_effect_reason="the group only documents memory requirements"),
)  # fmt: skip
HARD_CODED_REASON = "hard-coded in the tool"


def _is_qlora(draft: JobDraft) -> bool:
    return bool(draft.value("method.type") == "qlora")


DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("method.lora.rank", 16),
    ToolDefault("method.lora.alpha", 32),
    ToolDefault("method.lora.dropout", 0.05, HARD_CODED_REASON),
    ToolDefault("method.lora.bias", "none", HARD_CODED_REASON),
    ToolDefault("model.quantization.type", "nf4", HARD_CODED_REASON, _is_qlora),
    ToolDefault("model.quantization.computeDtype", "bfloat16", HARD_CODED_REASON, _is_qlora),
    ToolDefault("model.quantization.doubleQuant", True, HARD_CODED_REASON, _is_qlora),
    ToolDefault("training.epochs", 3),
    ToolDefault("training.batchSizePerDevice", 4),
    ToolDefault("training.gradientAccumulationSteps", 4),
    ToolDefault("training.learningRate", 2e-4),
    ToolDefault("training.scheduler", "linear"),
    ToolDefault("training.warmupRatio", 0.03, is_applicable=lambda draft: not draft.has_value("training.warmupSteps")),
    ToolDefault("training.optimizer", "adamw_torch"),
    ToolDefault("training.weightDecay", 0),
    ToolDefault("training.maxGradNorm", 1),
    ToolDefault("training.mixedPrecision", "bf16", HARD_CODED_REASON, needs_gpu=True),
    ToolDefault("dataset.maxSequenceLength", 512),
    ToolDefault("checkpoint.strategy", "steps"),
    ToolDefault("checkpoint.steps", 100),
    ToolDefault("checkpoint.keep", 3),
    ToolDefault("output.dir", "output", HARD_CODED_REASON),
    ToolDefault("output.layout", "flat", HARD_CODED_REASON),
    ToolDefault("tracking.reportTo", ["tensorboard"]),
    ToolDefault("tracking.loggingSteps", 10),
)  # fmt: skip
OPAQUE_PATHS = frozenset({"templates", "requirements", "lora.target_modules", "target_modules"})
TOOL_FLAGS = ("--model", "--data", "--output", "--epochs", "--batch-size", "--lora-r", "--merge")


# --- reading --------------------------------------------------------------------------------------------------------


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether a document has the flat form (`model` as text, with `lora_r` or `use_4bit`) or the nested form (`base_model.name`)."""
    if not documents:
        return any(word.partition("=")[0] in ("--lora-r", "--merge") for word in command_words)
    for document in documents:
        content = peek_mapping(document)
        base_model = content.get("base_model")
        is_flat = isinstance(content.get("model"), str) and any(
            key in content for key in ("lora_r", "use_4bit", "lora_alpha")
        )
        if is_flat or (isinstance(base_model, dict) and "name" in base_model):
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the flags of the tool's script."""
    flags = parse_flags(strip_launcher(draft.request.tool_arguments), lambda name: name != "--merge")
    add_stray_mistakes(draft, flags)
    for name, value in flags.name_value_pairs:
        if name == "--config" and value:
            add_config_file(draft, value)
    for document in draft.documents:
        yield from iterate_entries(document, parse_document(document), OPAQUE_PATHS)
    for name, value in flags.name_value_pairs:
        if name == "--merge":
            yield build_flag_entry(name, True if value is None else value)
        elif name != "--config" and value is None:
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        elif name != "--config":
            yield build_flag_entry(name, value)


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "model", "model.source")
    assign_source(draft, "--data", "dataset.train", always_local=is_local(str(draft.get("--data", ""))))
    _set_method(draft)
    _set_target_modules(draft)
    _set_precision(draft)
    _set_data(draft)
    _set_evaluation(draft)
    _set_callbacks(draft)
    if "training.output_dir" in draft.given_options:
        assign_output_folder(draft, "training.output_dir")
    if "training.gradient_checkpointing" in draft.given_options:
        mode = "enabled" if draft.get("training.gradient_checkpointing") else "disabled"
        draft.assign("training.gradientCheckpointing", mode, "training.gradient_checkpointing")


def _set_method(draft: JobDraft) -> None:
    key_4bit = _find_loading_key(draft, "load_in_4bit")
    key_8bit = _find_loading_key(draft, "load_in_8bit")
    if key_4bit and key_8bit:
        keys = ("quantization.load_in_4bit", "quantization.load_in_8bit")
        draft.add_mistake(
            keys,
            "4-bit and 8-bit loading exclude each other, but both are true",
            "set one of them to false",
            explained_path="model.quantization",
        )
        return
    adapter_keys = [key for key in draft.given_options if key.startswith("lora") or key == "target_modules"]
    has_unreadable_key = any(key.startswith("lora") or "4bit" in key for key in draft.paths_of_invalid_keys) or any(
        m.key.startswith("lora") for m in draft.mistakes
    )
    if not adapter_keys and not key_4bit:
        if not has_unreadable_key:
            hint = "write lora_r for LoRA, and use_4bit: true for QLoRA"
            draft.mistakes.append(
                Mistake(
                    draft.location,
                    "lora_r",
                    "the file selects no method: it has neither LoRA options nor 4-bit loading",
                    hint,
                )
            )
        return
    source_key = key_4bit or (adapter_keys[0] if adapter_keys else key_8bit)
    if source_key is None:
        return
    draft.assign("method.type", "qlora" if key_4bit else "lora", source_key)
    if key_4bit or key_8bit:
        draft.assign("model.quantization.bits", 4 if key_4bit else 8, key_4bit or key_8bit or source_key)


def _find_loading_key(draft: JobDraft, name: str) -> str | None:
    """Return the key that turns on 4-bit or 8-bit loading, or None if no key does. `name`: `load_in_4bit` or `load_in_8bit`."""
    key, enabled = f"quantization.{name}", draft.get("quantization.enabled")
    if name == "load_in_4bit" and draft.get("use_4bit"):
        return "use_4bit"
    if draft.get(key) and enabled is False:
        given_option = draft.given_options[key]
        draft.warn_no_effect(given_option.option_row.key, "quantization.enabled is false")
        return None
    if draft.get(key):
        return key
    if name == "load_in_4bit" and enabled and not draft.has_key(key) and not draft.get("quantization.load_in_8bit"):
        return "quantization.enabled"
    return None


def _set_target_modules(draft: JobDraft) -> None:
    """Set the target modules from a list, or from a mapping of model families to lists.

    If the option is a mapping, use the list of the family that occurs in the model's name. If no family occurs in it, use the list at `default` or `auto`.
    """
    given_option = draft.given_options.get("target_modules")
    if given_option is None:
        return
    if not isinstance(given_option.value, dict):
        if given_option.value is not None:
            draft.assign("method.lora.targetModules", given_option.value, "target_modules")
        return
    model_source = str(draft.value("model.source", ""))
    normalised_source = re.sub(r"[^a-z0-9]", "", model_source.lower())
    family_names = sorted(given_option.value, key=len, reverse=True)
    matched_family = next((family for family in family_names if re.sub(r"[^a-z0-9]", "", family.lower()) in normalised_source), None)
    matched_family = matched_family or next((family for family in family_names if family in ("default", "auto")), None)
    if matched_family is None:
        draft.add_mistake(
            "target_modules",
            f"none of the model families {', '.join(given_option.value)} occurs in the model name {model_source}",
            "write a list",
        )
        return
    try:
        draft.assign("method.lora.targetModules", to_module_names(given_option.value[matched_family]), "target_modules")
    except ConversionError as error:
        draft.add_mistake("target_modules", f"{matched_family} {error.problem}", f"allowed: {error.allowed}")
    draft.add_note(f"target_modules: the list for {matched_family} is used for {model_source}")


def _set_precision(draft: JobDraft) -> None:
    fp16_key, bf16_key = "training.fp16", "training.bf16"
    if draft.get(fp16_key) and draft.get(bf16_key):
        draft.add_mistake((fp16_key, bf16_key), "fp16 and bf16 are both true", "set one of them to false")
        return
    if draft.get(bf16_key):
        draft.assign("training.mixedPrecision", "bf16", bf16_key)
        if draft.get("base_model.dtype") == "float16":
            given_option = draft.given_options["base_model.dtype"]
            draft.add_warning(
                f"{given_option.origin.location}: {given_option.key}: float16 weights do not fit bf16 training, so the job uses bfloat16"
            )
            draft.assign("model.dtype", "bfloat16", bf16_key)
    elif draft.get(fp16_key):
        draft.assign("training.mixedPrecision", "fp16", fp16_key)
    elif draft.get(bf16_key) is False:
        draft.assign("training.mixedPrecision", "no", bf16_key)


def _set_data(draft: JobDraft) -> None:
    given_option = draft.given_options.get("dataset.eval_split")
    if given_option is not None and not draft.has_value("dataset.validation"):
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: splits of hub data sets cannot be selected; give --validation URI or dataset.eval_size"
        )
    if draft.has_value("dataset.split.validation"):
        draft.assign_default("dataset.split.seed", 42, "chosen by the importer: the tool's split has no seed")
        if draft.get("dataset.eval_size") == 0:
            draft.values.pop("dataset.split.validation")
            draft.values.pop("dataset.split.seed")
    template_option = draft.given_options.get("templates")
    if draft.get("dataset.format") == "custom":
        _set_template(draft)
    elif template_option is not None:
        draft.add_warning(f"{template_option.origin.location}: templates has no effect: dataset.format is not custom")


def _set_template(draft: JobDraft) -> None:
    given_option = draft.given_options.get("templates")
    templates = (
        {}
        if given_option is None
        else {template_name: template for template_name, template in given_option.value.items() if isinstance(template, str)}
    )
    chosen_template = templates.get("custom") or (next(iter(templates.values())) if len(templates) == 1 else None)
    if chosen_template is None:
        draft.add_mistake(
            "dataset.format",
            "the format custom needs exactly one template",
            "write templates.custom",
            explained_path="dataset.template",
        )
    else:
        draft.assign("dataset.template", to_text(chosen_template), "templates")


def _set_evaluation(draft: JobDraft) -> None:
    has_validation_data = draft.has_value("dataset.validation") or bool(draft.value("dataset.split.validation"))
    if "training.eval_steps" in draft.given_options:
        if has_validation_data or draft.has_value("evaluation.strategy"):
            draft.assign("evaluation.steps", draft.get("training.eval_steps"), "training.eval_steps")
        else:
            given_option = draft.given_options["training.eval_steps"]
            draft.warn_no_effect(given_option.option_row.key, "there is no validation data")
    elif has_validation_data:
        draft.assign_default("evaluation.steps", 100)
    if has_validation_data:
        draft.assign_default("evaluation.strategy", "steps")


def _set_callbacks(draft: JobDraft) -> None:
    report_option = draft.given_options.get("training.report_to")
    trackers = list(draft.get("training.report_to") or []) if report_option is not None else None
    if draft.get("callbacks.wandb.enabled"):
        trackers = list(dict.fromkeys([*(trackers or []), "wandb"]))
    if trackers is not None:
        draft.assign(
            "tracking.reportTo",
            trackers,
            "callbacks.wandb.enabled" if draft.get("callbacks.wandb.enabled") else "training.report_to",
        )
    elif draft.has_key("training.report_to") and "training.report_to" not in draft.paths_of_invalid_keys:
        draft.assign_default("tracking.reportTo", [], "report_to is null")
    if draft.get("callbacks.early_stopping.enabled"):
        draft.assign(
            "training.earlyStopping.patience",
            draft.get("callbacks.early_stopping.patience", 3),
            "callbacks.early_stopping.enabled",
        )
        draft.assign(
            "training.earlyStopping.threshold",
            draft.get("callbacks.early_stopping.threshold", 0.01),
            "callbacks.early_stopping.enabled",
        )
        return
    for name in ("patience", "threshold"):
        given_option = draft.given_options.get(f"callbacks.early_stopping.{name}")
        if given_option is not None:
            draft.warn_no_effect(given_option.option_row.key, "early stopping is not enabled")


IMPORTER = Importer("guide", "this guide", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options)
