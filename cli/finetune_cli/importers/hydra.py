"""`hydra`: the importer for a Hydra configuration: a composed file, a folder of groups, or an older command line with dashed flags.

The tool's code has fixed values for method, adapter sizes and warm-up. The importer writes these values into the spec, so that the job trains in the
same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from finetune_cli.importers.accelerate import is_accelerate, read_accelerate
from finetune_cli.importers.command_lines import add_stray_mistakes, build_flag_entry, parse_flags, strip_launcher
from finetune_cli.importers.converters import to_boolean, to_choice, to_integer, to_number
from finetune_cli.importers.documents import peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry, OptionRow, ToolDefault
from finetune_cli.importers.hydra_compose import (
    TRAINING_GROUP_NAMES,
    find_config_file,
    has_dashed_flags,
    list_group_options,
    normalise_key,
    read_composed_options,
    read_default_options,
    split_hydra_flags,
)
from finetune_cli.importers.sources import assign_source, is_local
from finetune_cli.importers.toml import DEFAULT_PROJECTIONS, SCHEDULER_BY_NAME
from finetune_cli.importers.yaml import assume_two_gpus
from finetune_cli.mistakes import Mistake
from finetune_cli.suggestions import find_closest_name

TRACKERS_BY_NAME = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
DATASET_FORMAT_BY_NAME = {
    "standard": "promptCompletion", "conversational": "messages", "preference": "preference", "no": "plainText", "simple": "plainText",
}  # fmt: skip
COLUMNS_BY_FORMAT: dict[str, dict[str, str]] = {
    "messages": {"question": "Question", "answer": "Response"},
    "plainText": {"text": "text"},
}
"""For each format of the rows: the column names that are fixed in the tool's code.

In rows of any other format, the trainer finds columns by their usual names, in upper or lower case.
"""
SYSTEM_PROMPT = "You are a personal assistant."


def make_training_option(option_key: str, *args: Any, **kwargs: Any) -> OptionRow:
    """Return the row of the option table for a key of the training group. `normalise_key` turns the dashed flag of an option into this key."""
    return OptionRow(f"training_config.{option_key}", *args, **kwargs)


OPTION_TABLE: tuple[OptionRow, ...] = (
    make_training_option("model", "model.source", is_required=True, is_set_by_combine=True),
    OptionRow("dataset.path", "dataset.train", is_set_by_combine=True, aliases=("--dataset",)),
    OptionRow("dataset.format", "dataset.format", to_choice(DATASET_FORMAT_BY_NAME), is_set_by_combine=True, aliases=("--format",)),
    make_training_option("trainer", "trainer.type", to_choice({"SFT": "sft", "DPO": "dpo", "GRPO": "grpo"})),
    make_training_option("distributed_training", "distributed.strategy", to_choice({"DDP": "ddp", "FSDP": "fsdp", "Unsloth": "unsloth"}),
        is_set_by_combine=True),
    make_training_option("per_device_train_batch_size", "training.batchSizePerDevice", to_integer(1)),
    make_training_option("gradient_acc_steps", "training.gradientAccumulationSteps", to_integer(1)),
    make_training_option("optim", "training.optimizer"),
    make_training_option("learning_rate", "training.learningRate", to_number(exclusive_low=0)),
    make_training_option("num_train_epochs", "training.epochs", to_integer(1)),
    make_training_option("lr_scheduler_type", "training.scheduler", to_choice(SCHEDULER_BY_NAME)),
    make_training_option("save_steps", "checkpoint.steps", to_integer(1)),
    make_training_option("max_completion_length", "trainer.maxCompletionLength", to_integer(1)),
    make_training_option("max_seq_length", "dataset.maxSequenceLength", to_integer(1)),
    make_training_option("gradient_checkpointing", "training.gradientCheckpointing", to_boolean, is_set_by_combine=True),
    make_training_option("report_to", "tracking.reportTo", to_choice(TRACKERS_BY_NAME), is_set_by_combine=True, empty_is_absent=False),
    make_training_option("warmup_ratio", "training.warmupRatio", to_number(0, exclusive_high=1)),
    make_training_option("warmup_steps", "training.warmupSteps", to_integer(0)),
    make_training_option("weight_decay", "training.weightDecay", to_number(0)),
    make_training_option("max_grad_norm", "training.maxGradNorm", to_number(0)),
    make_training_option("logging_steps", "tracking.loggingSteps", to_integer(1)),
    make_training_option("max_steps", "training.maxSteps", to_integer(1)),
    make_training_option("save_total_limit", "checkpoint.keep", to_integer(1)),
    make_training_option("seed", "training.seed", to_integer(0, 4294967295)),
    make_training_option("beta", "trainer.dpo.beta", to_number(0), is_set_by_combine=True),
    make_training_option("num_generations", "trainer.grpo.numGenerations", to_integer(2), is_set_by_combine=True),
    make_training_option("temperature", "trainer.grpo.temperature", to_number(exclusive_low=0), is_set_by_combine=True),
)  # fmt: skip
HARD_CODED_REASON = "hard-coded in the tool"
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("method.type", "lora", HARD_CODED_REASON),
    ToolDefault("method.lora.rank", 128, HARD_CODED_REASON),
    ToolDefault("method.lora.alpha", 64, HARD_CODED_REASON),
    ToolDefault("method.lora.dropout", 0, "hard-coded in the tool for Unsloth", lambda draft: draft.value("trainer.backend") == "unsloth"),
    ToolDefault("method.lora.dropout", 0.05, HARD_CODED_REASON),
    ToolDefault("method.lora.targetModules", DEFAULT_PROJECTIONS, HARD_CODED_REASON),
    ToolDefault("method.lora.bias", "none", HARD_CODED_REASON),
    ToolDefault("model.dtype", "bfloat16", HARD_CODED_REASON, needs_gpu=True),
    ToolDefault("model.attention", "flashAttention2", HARD_CODED_REASON, lambda draft: draft.value("trainer.backend") != "unsloth", needs_gpu=True),
    ToolDefault("trainer.type", "sft", "default in the tool's code"),
    ToolDefault("training.batchSizePerDevice", 2, "default in the tool's code"),
    ToolDefault("training.gradientAccumulationSteps", 4, "default in the tool's code"),
    ToolDefault("training.optimizer", "adamw_torch_fused", "default in the tool's code"),
    ToolDefault("training.epochs", 1, "default in the tool's code"),
    ToolDefault("training.scheduler", "cosine", "default in the tool's code"),
    ToolDefault("training.warmupRatio", 0.1, HARD_CODED_REASON, lambda draft: not draft.has_value("training.warmupSteps")),
    ToolDefault("training.weightDecay", 0, HARD_CODED_REASON),
    ToolDefault("training.maxGradNorm", 1, HARD_CODED_REASON),
    ToolDefault("training.mixedPrecision", "bf16", HARD_CODED_REASON, needs_gpu=True),
    ToolDefault("dataset.maxSequenceLength", 2048, "default in the tool's code"),
    ToolDefault("dataset.responseOnly.enabled", False, HARD_CODED_REASON, lambda draft: draft.value("trainer.type", "sft") == "sft"),
    ToolDefault("dataset.useChatTemplate", True, HARD_CODED_REASON, lambda draft: draft.value("dataset.format") not in ("plainText", None)),
    ToolDefault("checkpoint.strategy", "steps", HARD_CODED_REASON),
    ToolDefault("checkpoint.steps", 100, "default in the tool's code"),
    ToolDefault("checkpoint.keep", 0, HARD_CODED_REASON),
    ToolDefault("output.dir", "adapters", HARD_CODED_REASON),
    ToolDefault("output.layout", "flat", HARD_CODED_REASON),
    ToolDefault("tracking.loggingSteps", 50, HARD_CODED_REASON),
)  # fmt: skip
DEFAULT_CONFIG: dict[str, Any] = {
    "training_config.model": "./my_saved_model/qwen3-full", "training_config.trainer": "SFT", "training_config.distributed_training": "Unsloth",
    "training_config.per_device_train_batch_size": 2, "training_config.gradient_acc_steps": 1, "training_config.optim": "adamw_torch_fused",
    "training_config.learning_rate": 5e-5, "training_config.num_train_epochs": 2, "training_config.lr_scheduler_type": "cosine",
    "training_config.save_steps": 100, "training_config.max_completion_length": 2048, "training_config.max_seq_length": 4096,
    "training_config.gradient_checkpointing": True, "training_config.report_to": "tensorboard", "dataset.path": None, "dataset.format": "standard",
}  # fmt: skip
"""The configuration that the tool ships. If the user gives no file, the overrides change this configuration."""


KNOWN_KEYS = frozenset(normalise_key(option_row.key) for option_row in OPTION_TABLE)


# --- reading --------------------------------------------------------------------------------------------------------

RECOGNISED_KEYS = ("distributed_training", "gradient_acc_steps", "max_completion_length")
RECOGNISED_FLAGS = (
    "--distributed-training",
    "--gradient-acc-steps",
    "--max-completion-length",
    "---max-seq-length",
    "--trainer",
    "--num-train-epochs",
)


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether the input is a composed file, the file of one group, a folder of groups or, without files, flags or overrides of the tool."""
    if not documents:
        return any(
            word.partition("=")[0] in RECOGNISED_FLAGS or re.match(r"^[+~]*(training_configs?|training|dataset)[.=]", word)
            for word in command_words
        )
    for document in documents:
        if document.is_folder:
            return find_config_file(document.path) is not None or any(list_group_options(document.path))
        content = peek_mapping(document)
        model = content.get("model")
        if any(isinstance(content.get(group), dict) for group in TRAINING_GROUP_NAMES[:2]):
            return True
        if any(key in content for key in RECOGNISED_KEYS) or any(
            isinstance(entry, str) and re.match(r"^(training_configs?|training)(:|$)", str(entry))
            for entry in content.get("defaults") or []
        ):
            return True
        if isinstance(content.get("defaults"), list) or (
            isinstance(content.get("training"), dict)
            and "distributed_training" in content["training"]
            and model is None
        ):
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of files, overrides and dashed flags. The words `None` and `null`, in any letter case, count as no value."""
    for entry in _read_entries(draft):
        is_none = entry.value is None or str(entry.value).strip().lower() in ("none", "null")
        value_for_none = "none" if normalise_key(entry.key).endswith("report_to") else None
        yield replace(entry, value=value_for_none) if is_none else entry


def _read_entries(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options that Hydra composes from files and overrides, and then the dashed flags, which belong to older releases of the tool."""
    command_words, config_name = split_hydra_flags(draft, strip_launcher(draft.request.tool_arguments))
    base_documents = [document for document in draft.documents if not is_accelerate(document)]
    uses_dashed_flags = has_dashed_flags(command_words)
    if len(base_documents) > 1:
        draft.mistakes.append(
            Mistake(
                ", ".join(d.name for d in base_documents),
                "",
                "several main files are given",
                "give one file or folder, and at most one accelerate file",
            )
        )
        return
    if uses_dashed_flags:
        if base_documents:
            yield from read_composed_options(draft, base_documents[0], [], config_name)
        yield from _read_flags(draft, command_words)
    elif base_documents:
        yield from read_composed_options(draft, base_documents[0], command_words, config_name)
    else:
        yield from read_default_options(draft, command_words, DEFAULT_CONFIG)


def _read_flags(draft: JobDraft, command_words: list[str]) -> Iterator[OptionEntry]:
    flags = parse_flags(command_words, lambda name: True)
    add_stray_mistakes(draft, flags)
    known_flags = sorted({f"--{key.partition('.')[2].replace('_', '-')}" for key in KNOWN_KEYS} | {"--dataset", "--format"})
    for name, value in flags.name_value_pairs:
        if normalise_key(name) not in KNOWN_KEYS:
            closest_flag = find_closest_name(name, known_flags)
            draft.mistakes.append(
                Mistake("command line", name, "unknown option", f"did you mean {closest_flag}?" if closest_flag else "remove it")
            )
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        else:
            yield build_flag_entry("--" + name.lstrip("-"), value)


# --- fields that depend on several options --------------------------------------------------------------------------


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options of the tool."""
    assign_source(draft, "training_config.model", "model.source")
    dataset_path = str(draft.get("dataset.path", ""))
    assign_source(draft, "dataset.path", "dataset.train", always_local=is_local(dataset_path))
    if (
        not draft.has_key("dataset.path")
        and (draft.has_key("dataset.format") or has_dashed_flags(draft.request.tool_arguments))
        and "dataset.train" not in draft.request.overrides
    ):
        draft.mistakes.append(
            Mistake(draft.location, "dataset.path", "this required option is missing", "add it, or give --data URI")
        )
        draft.paths_of_invalid_keys["dataset.path"] = "dataset.train"
    _set_learning_rate(draft)
    for document in draft.documents:
        if is_accelerate(document):
            _read_accelerate_file(draft, document)
    _set_strategy(draft)
    _set_dataset_format(draft)
    _set_objective(draft)
    _set_gradient_checkpointing(draft)
    _set_trackers(draft)


def _set_learning_rate(draft: JobDraft) -> None:
    if draft.has_key("training_config.learning_rate"):
        return
    if has_dashed_flags(draft.request.tool_arguments) and not [d for d in draft.documents if not is_accelerate(d)]:
        draft.assign_default("training.learningRate", 2e-4, "documented advice")
        draft.add_note(
            "no learning rate is given; the job uses 2e-4, which the tool's documentation advises for its dashed flags"
        )
    else:
        draft.assign_default("training.learningRate", 5e-5, "default in the tool's code")


def _read_accelerate_file(draft: JobDraft, document: InputDocument) -> None:
    """Read an accelerate file.

    Before that, set the strategy that the main file names, so that a different strategy in the accelerate file is reported as a mistake.
    """
    given_option = draft.given_options.get("training_config.distributed_training")
    if given_option is not None:
        draft.assign(
            "distributed.strategy",
            "none" if given_option.value == "unsloth" else given_option.value,
            "training_config.distributed_training",
        )
    read_accelerate(draft, document)


def _set_strategy(draft: JobDraft) -> None:
    key = "training_config.distributed_training"
    if key in draft.paths_of_invalid_keys:
        return
    given_option = draft.given_options.get(key)
    if given_option is None and draft.has_value("distributed.strategy"):
        draft.assign_default("trainer.backend", "transformers", "hard-coded in the tool")
        return
    distributed_training = given_option.value if given_option else "unsloth"
    backend, strategy = (
        ("unsloth", "none") if distributed_training == "unsloth" else ("transformers", distributed_training)
    )
    if given_option:
        draft.assign("trainer.backend", backend, key)
        draft.assign("distributed.strategy", strategy, key)
    else:
        has_gpu = draft.value("resources.gpusPerNode") != 0
        draft.assign_default("trainer.backend", backend if has_gpu else "transformers", "documented default" if has_gpu else "the job uses no GPU")
        draft.assign_default("distributed.strategy", strategy, "documented default")
    if strategy == "fsdp":
        assume_two_gpus(draft, "FSDP")


def _set_dataset_format(draft: JobDraft) -> None:
    if "dataset.format" in draft.given_options:
        draft.assign("dataset.format", draft.get("dataset.format"), "dataset.format")
    dataset_format = draft.get("dataset.format")
    for column, name in COLUMNS_BY_FORMAT.get(str(dataset_format), {}).items():
        draft.assign_default(f"dataset.columns.{column}", name, "hard-coded in the tool")
    if dataset_format == "messages":
        draft.assign_default("dataset.systemPrompt", SYSTEM_PROMPT, "hard-coded in the tool")


def _set_objective(draft: JobDraft) -> None:
    trainer = draft.get("training_config.trainer", "sft")
    if "training_config.beta" in draft.given_options:
        path = {"dpo": "trainer.dpo.beta", "grpo": "trainer.grpo.beta"}.get(trainer)
        _assign_or_warn(draft, "training_config.beta", path)
    for key in ("num_generations", "temperature"):
        field_name = {"num_generations": "numGenerations"}.get(key, key)
        _assign_or_warn(draft, f"training_config.{key}", f"trainer.grpo.{field_name}" if trainer == "grpo" else None)
    if trainer != "sft":
        _set_completion_length(draft)
    if trainer == "grpo":
        _set_grpo(draft)


def _set_completion_length(draft: JobDraft) -> None:
    """Set the maximum completion length.

    If completions of this length leave no tokens of the sequence for the prompt, set half of the sequence length instead.
    """
    path, key = "trainer.maxCompletionLength", "training_config.max_completion_length"
    completion_length, sequence_length = draft.get(key, 2048), draft.get("training_config.max_seq_length", 2048)
    half_length = max(1, sequence_length // 2)
    if completion_length < sequence_length and key not in draft.given_options:
        draft.assign_default(path, completion_length, "default in the tool's code")
    elif completion_length >= sequence_length and key in draft.given_options:
        given_option = draft.given_options[key]
        draft.assign(path, half_length, key)
        draft.add_warning(
            f"{given_option.origin.location}: {given_option.key}: {completion_length} leaves no room for the prompt in a sequence of {sequence_length} tokens, "
            f"so the job uses {half_length}"
        )
    elif key not in draft.paths_of_invalid_keys:
        draft.assign_default(
            path,
            half_length,
            f"chosen by the importer: the tool's 2048 leaves no room for the prompt in a sequence of {sequence_length} tokens",
        )


def _assign_or_warn(draft: JobDraft, option_key: str, spec_path: str | None) -> None:
    given_option = draft.given_options.get(option_key)
    if given_option is None:
        return
    if spec_path:
        draft.assign(spec_path, given_option.value, option_key)
    else:
        draft.add_warning(f"{given_option.origin.location}: {given_option.key} has no effect with this trainer")


def _set_grpo(draft: JobDraft) -> None:
    draft.assign_default("trainer.rewards", [{"builtin": "citationFormat"}], "hard-coded in the tool")
    draft.add_note(
        "GRPO uses the reward citationFormat, which is hard-coded in the tool; set other rewards in trainer.rewards"
    )
    completion_count = int(draft.get("training_config.per_device_train_batch_size", 2)) * int(
        draft.get("training_config.gradient_acc_steps", 4)
    )
    num_generations = int(draft.get("training_config.num_generations", 8))
    if completion_count % num_generations and "training_config.num_generations" not in draft.given_options:
        divisor = next((n for n in range(min(num_generations, completion_count), 1, -1) if completion_count % n == 0), None)
        if divisor is None:
            draft.assign_default(
                "training.gradientAccumulationSteps",
                8,
                "chosen by the importer, because each step must contain several completions of the same prompt",
            )
        else:
            draft.assign_default(
                "trainer.grpo.numGenerations",
                divisor,
                "chosen by the importer, because the number of completions in a step must be a multiple of numGenerations",
            )
            draft.add_note(
                f"GRPO samples {divisor} completions per prompt, because the {completion_count} completions of a step are not a multiple of {num_generations}"
            )


def _set_gradient_checkpointing(draft: JobDraft) -> None:
    key, path = "training_config.gradient_checkpointing", "training.gradientCheckpointing"
    has_gpus = draft.value("resources.gpusPerNode") != 0
    enabled_value = "unsloth" if has_gpus and draft.value("trainer.backend") == "unsloth" else "enabled"
    if key in draft.given_options:
        draft.assign(path, enabled_value if draft.get(key) else "disabled", key)
    elif key not in draft.paths_of_invalid_keys:
        draft.assign_default(path, enabled_value, "default in the tool's code")


def _set_trackers(draft: JobDraft) -> None:
    key = "training_config.report_to"
    if key in draft.given_options:
        draft.assign("tracking.reportTo", draft.get(key), key)
    elif key not in draft.paths_of_invalid_keys:
        uses_dashed_flags = has_dashed_flags(draft.request.tool_arguments)
        draft.assign_default("tracking.reportTo", ["wandb"] if uses_dashed_flags else ["tensorboard"], "default in the tool's code")


IMPORTER = Importer("hydra", "this Hydra tool", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, normalise_key)
