"""`hydra`: the importer for a Hydra configuration: a composed file, a folder of groups, or an older command line with dashed flags.

Method, adapter sizes and warm-up are hard-coded in the tool. The importer writes these values into the spec, so that the run is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.accelerate import is_accelerate, read_accelerate
from finetune_cli.importers.command_lines import add_stray_mistakes, flag_entry, parse_flags, strip_launcher
from finetune_cli.importers.converters import boolean, choice, integer, number
from finetune_cli.importers.documents import peek
from finetune_cli.importers.draft import Document, Draft, Entry, Importer, Row, ToolDefault
from finetune_cli.importers.hydra_compose import (
    GROUPS,
    config_file,
    has_dashed_flags,
    normalise_key,
    options_by_group,
    read_composed,
    read_shipped,
    split_hydra_flags,
)
from finetune_cli.importers.sources import assign_source, is_local
from finetune_cli.importers.toml import PROJECTIONS, SCHEDULERS
from finetune_cli.importers.yaml import assume_two_gpus
from finetune_cli.mistakes import Mistake
from finetune_cli.suggestions import closest_name

TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
FORMATS = {
    "standard": "promptCompletion", "conversational": "messages", "preference": "preference", "no": "plainText", "simple": "plainText",
}  # fmt: skip
COLUMNS: dict[str, dict[str, str]] = {
    "messages": {"question": "Question", "answer": "Response"},
    "plainText": {"text": "text"},
}
"""Column names that are hard-coded in the tool. For all other formats the trainer detects the columns, in any letter case."""
SYSTEM_PROMPT = "You are a personal assistant."


def training_row(key: str, *args: Any, **kwargs: Any) -> Row:
    """Return the row of the option table for a key of the training group. The dashed flag is another spelling of the key."""
    return Row(f"training_config.{key}", *args, **kwargs)


ROWS: tuple[Row, ...] = (
    training_row("model", "model.source", required=True, manual=True),
    Row("dataset.path", "dataset.train", manual=True, aliases=("--dataset",)),
    Row("dataset.format", "dataset.format", choice(FORMATS), manual=True, aliases=("--format",)),
    training_row("trainer", "trainer.type", choice({"SFT": "sft", "DPO": "dpo", "GRPO": "grpo"})),
    training_row("distributed_training", "distributed.strategy", choice({"DDP": "ddp", "FSDP": "fsdp", "Unsloth": "unsloth"}), manual=True),
    training_row("per_device_train_batch_size", "training.batchSizePerDevice", integer(1)),
    training_row("gradient_acc_steps", "training.gradientAccumulationSteps", integer(1)),
    training_row("optim", "training.optimizer"),
    training_row("learning_rate", "training.learningRate", number(above=0)),
    training_row("num_train_epochs", "training.epochs", integer(1)),
    training_row("lr_scheduler_type", "training.scheduler", choice(SCHEDULERS)),
    training_row("save_steps", "checkpoint.steps", integer(1)),
    training_row("max_completion_length", "trainer.maxCompletionLength", integer(1)),
    training_row("max_seq_length", "dataset.maxSequenceLength", integer(1)),
    training_row("gradient_checkpointing", "training.gradientCheckpointing", boolean, manual=True),
    training_row("report_to", "tracking.reportTo", choice(TRACKERS), manual=True, empty_is_absent=False),
    training_row("warmup_ratio", "training.warmupRatio", number(0, below=1)),
    training_row("warmup_steps", "training.warmupSteps", integer(0)),
    training_row("weight_decay", "training.weightDecay", number(0)),
    training_row("max_grad_norm", "training.maxGradNorm", number(0)),
    training_row("logging_steps", "tracking.loggingSteps", integer(1)),
    training_row("max_steps", "training.maxSteps", integer(1)),
    training_row("save_total_limit", "checkpoint.keep", integer(1)),
    training_row("seed", "training.seed", integer(0, 4294967295)),
    training_row("beta", "trainer.dpo.beta", number(0), manual=True),
    training_row("num_generations", "trainer.grpo.numGenerations", integer(2), manual=True),
    training_row("temperature", "trainer.grpo.temperature", number(above=0), manual=True),
)  # fmt: skip
HARD_CODED = "hard-coded in the tool"
DEFAULTS: tuple[ToolDefault, ...] = (
    ToolDefault("method.type", "lora", HARD_CODED),
    ToolDefault("method.lora.rank", 128, HARD_CODED),
    ToolDefault("method.lora.alpha", 64, HARD_CODED),
    ToolDefault("method.lora.dropout", 0, "hard-coded in the tool for Unsloth", lambda d: d.value("trainer.backend") == "unsloth"),
    ToolDefault("method.lora.dropout", 0.05, HARD_CODED),
    ToolDefault("method.lora.targetModules", PROJECTIONS, HARD_CODED),
    ToolDefault("method.lora.bias", "none", HARD_CODED),
    ToolDefault("model.dtype", "bfloat16", HARD_CODED, needs_gpu=True),
    ToolDefault("model.attention", "flashAttention2", HARD_CODED, lambda d: d.value("trainer.backend") != "unsloth", needs_gpu=True),
    ToolDefault("trainer.type", "sft", "default in the tool's code"),
    ToolDefault("training.batchSizePerDevice", 2, "default in the tool's code"),
    ToolDefault("training.gradientAccumulationSteps", 4, "default in the tool's code"),
    ToolDefault("training.optimizer", "adamw_torch_fused", "default in the tool's code"),
    ToolDefault("training.epochs", 1, "default in the tool's code"),
    ToolDefault("training.scheduler", "cosine", "default in the tool's code"),
    ToolDefault("training.warmupRatio", 0.1, HARD_CODED, lambda d: not d.has_value("training.warmupSteps")),
    ToolDefault("training.weightDecay", 0, HARD_CODED),
    ToolDefault("training.maxGradNorm", 1, HARD_CODED),
    ToolDefault("training.mixedPrecision", "bf16", HARD_CODED, needs_gpu=True),
    ToolDefault("dataset.maxSequenceLength", 2048, "default in the tool's code"),
    ToolDefault("dataset.responseOnly.enabled", False, HARD_CODED, lambda d: d.value("trainer.type", "sft") == "sft"),
    ToolDefault("dataset.useChatTemplate", True, HARD_CODED, lambda d: d.value("dataset.format") not in ("plainText", None)),
    ToolDefault("checkpoint.strategy", "steps", HARD_CODED),
    ToolDefault("checkpoint.steps", 100, "default in the tool's code"),
    ToolDefault("checkpoint.keep", 0, HARD_CODED),
    ToolDefault("output.dir", "adapters", HARD_CODED),
    ToolDefault("output.layout", "flat", HARD_CODED),
    ToolDefault("tracking.loggingSteps", 50, HARD_CODED),
)  # fmt: skip
SHIPPED_CONFIG: dict[str, Any] = {
    "training_config.model": "./my_saved_model/qwen3-full", "training_config.trainer": "SFT", "training_config.distributed_training": "Unsloth",
    "training_config.per_device_train_batch_size": 2, "training_config.gradient_acc_steps": 1, "training_config.optim": "adamw_torch_fused",
    "training_config.learning_rate": 5e-5, "training_config.num_train_epochs": 2, "training_config.lr_scheduler_type": "cosine",
    "training_config.save_steps": 100, "training_config.max_completion_length": 2048, "training_config.max_seq_length": 4096,
    "training_config.gradient_checkpointing": True, "training_config.report_to": "tensorboard", "dataset.path": None, "dataset.format": "standard",
}  # fmt: skip
"""Content of the tool's own configuration files. Without an input file, the overrides change this content."""


KNOWN = frozenset(normalise_key(row.key) for row in ROWS)


# --- reading --------------------------------------------------------------------------------------------------------

FLAT_MARKS = ("distributed_training", "gradient_acc_steps", "max_completion_length")
FLAG_MARKS = (
    "--distributed-training",
    "--gradient-acc-steps",
    "--max-completion-length",
    "---max-seq-length",
    "--trainer",
    "--num-train-epochs",
)


def recognises(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """Return whether the input is a training group, a flat group file, a folder of groups, or flags or overrides of the tool."""
    if not documents:
        return any(
            w.partition("=")[0] in FLAG_MARKS or re.match(r"^[+~]*(training_configs?|training|dataset)[.=]", w)
            for w in words
        )
    for document in documents:
        if document.is_folder:
            return config_file(document.path) is not None or any(options_by_group(document.path))
        content = peek(document)
        model = content.get("model")
        if any(isinstance(content.get(group), dict) for group in GROUPS[:2]):
            return True
        if any(mark in content for mark in FLAT_MARKS) or any(
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


def read(draft: Draft) -> Iterator[Entry]:
    """Yield the options of files and overrides that Hydra composes, and those of the older dashed flags."""
    words, config = split_hydra_flags(draft, strip_launcher(draft.request.tool_arguments))
    bases = [document for document in draft.documents if not is_accelerate(document)]
    flagged = has_dashed_flags(words)
    if len(bases) > 1:
        draft.mistakes.append(
            Mistake(
                ", ".join(d.name for d in bases),
                "",
                "several base files are given",
                "give one file or folder, and at most one accelerate file",
            )
        )
        return
    if flagged:
        if bases:
            yield from read_composed(draft, bases[0], [], config)
        yield from _read_flags(draft, words)
    elif bases:
        yield from read_composed(draft, bases[0], words, config)
    else:
        yield from read_shipped(draft, words, SHIPPED_CONFIG)


def _read_flags(draft: Draft, words: list[str]) -> Iterator[Entry]:
    flags = parse_flags(words, lambda name: True)
    add_stray_mistakes(draft, flags)
    known = sorted({f"--{key.partition('.')[2].replace('_', '-')}" for key in KNOWN} | {"--dataset", "--format"})
    for name, value in flags.pairs:
        if normalise_key(name) not in KNOWN:
            closest = closest_name(name, known)
            draft.mistakes.append(
                Mistake("command line", name, "unknown option", f"did you mean {closest}?" if closest else "remove it")
            )
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "the value is missing", f"write {name} VALUE"))
        else:
            yield flag_entry(
                "--" + name.lstrip("-"),
                None if value.lower() in ("null", "none") and normalise_key(name).endswith("report_to") else value,
            )


# --- fields that depend on several options --------------------------------------------------------------------------


def combine(draft: Draft) -> None:
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
        draft.unreadable["dataset.path"] = "dataset.train"
    _set_learning_rate(draft)
    for document in draft.documents:
        if is_accelerate(document):
            _read_accelerate_file(draft, document)
    _set_strategy(draft)
    _set_dataset_format(draft)
    _set_objective(draft)
    _set_gradient_checkpointing(draft)
    _set_trackers(draft)


def _set_learning_rate(draft: Draft) -> None:
    if draft.has_key("training_config.learning_rate"):
        return
    if has_dashed_flags(draft.request.tool_arguments) and not [d for d in draft.documents if not is_accelerate(d)]:
        draft.assign_default("training.learningRate", 2e-4, "documented advice")
        draft.add_note(
            "no learning rate is given; the job uses 2e-4, as the tool's documentation advises for the tool's flags"
        )
    else:
        draft.assign_default("training.learningRate", 5e-5, "default in the tool's code")


def _read_accelerate_file(draft: Draft, document: Document) -> None:
    """Read an accelerate file. A strategy that differs from the main file's strategy is a mistake, so set the main file's strategy first."""
    given = draft.given.get("training_config.distributed_training")
    if given is not None:
        draft.assign(
            "distributed.strategy",
            "none" if given.value == "unsloth" else given.value,
            "training_config.distributed_training",
        )
    read_accelerate(draft, document)


def _set_strategy(draft: Draft) -> None:
    key = "training_config.distributed_training"
    if key in draft.unreadable:
        return
    given = draft.given.get(key)
    if given is None and draft.has_value("distributed.strategy"):
        draft.assign_default("trainer.backend", "transformers", "hard-coded in the tool")
        return
    distributed_training = given.value if given else "unsloth"
    backend, strategy = (
        ("unsloth", "none") if distributed_training == "unsloth" else ("transformers", distributed_training)
    )
    if given:
        draft.assign("trainer.backend", backend, key)
        draft.assign("distributed.strategy", strategy, key)
    else:
        draft.assign_default("trainer.backend", backend, "documented default")
        draft.assign_default("distributed.strategy", strategy, "documented default")
    if strategy == "fsdp":
        assume_two_gpus(draft, "FSDP")


def _set_dataset_format(draft: Draft) -> None:
    if "dataset.format" in draft.given:
        draft.assign("dataset.format", draft.get("dataset.format"), "dataset.format")
    dataset_format = draft.get("dataset.format")
    for column, name in COLUMNS.get(str(dataset_format), {}).items():
        draft.assign_default(f"dataset.columns.{column}", name, "hard-coded in the tool")
    if dataset_format == "messages":
        draft.assign_default("dataset.systemPrompt", SYSTEM_PROMPT, "hard-coded in the tool")


def _set_objective(draft: Draft) -> None:
    trainer = draft.get("training_config.trainer", "sft")
    if "training_config.beta" in draft.given:
        path = {"dpo": "trainer.dpo.beta", "grpo": "trainer.grpo.beta"}.get(trainer)
        _assign_or_warn(draft, "training_config.beta", path)
    for key in ("num_generations", "temperature"):
        name = {"num_generations": "numGenerations"}.get(key, key)
        _assign_or_warn(draft, f"training_config.{key}", f"trainer.grpo.{name}" if trainer == "grpo" else None)
    if trainer != "sft":
        _set_completion_length(draft)
    if trainer == "grpo":
        _set_grpo(draft)


def _set_completion_length(draft: Draft) -> None:
    """Set the maximum completion length.

    If the length leaves no tokens for the prompt, the completion gets half of the sequence length.
    """
    path, key = "trainer.maxCompletionLength", "training_config.max_completion_length"
    completion_length, sequence_length = draft.get(key, 2048), draft.get("training_config.max_seq_length", 2048)
    half_length = max(1, sequence_length // 2)
    if completion_length < sequence_length and key not in draft.given:
        draft.assign_default(path, completion_length, "default in the tool's code")
    elif completion_length >= sequence_length and key in draft.given:
        given = draft.given[key]
        draft.assign(path, half_length, key)
        draft.add_warning(
            f"{given.origin.location}: {given.key}: {completion_length} leaves no room for the prompt in {sequence_length} tokens, "
            f"so the job uses {half_length}"
        )
    elif key not in draft.unreadable:
        draft.assign_default(
            path,
            half_length,
            f"chosen by the importer: the tool's 2048 leaves no room for the prompt in {sequence_length} tokens",
        )


def _assign_or_warn(draft: Draft, key: str, path: str | None) -> None:
    given = draft.given.get(key)
    if given is None:
        return
    if path:
        draft.assign(path, given.value, key)
    else:
        draft.add_warning(f"{given.origin.location}: {given.key} has no effect with this trainer")


def _set_grpo(draft: Draft) -> None:
    draft.assign_default("trainer.rewards", [{"builtin": "citationFormat"}], "hard-coded in the tool")
    draft.add_note(
        "GRPO uses the reward citationFormat, which is hard-coded in the tool; set other rewards in trainer.rewards"
    )
    rows = int(draft.get("training_config.per_device_train_batch_size", 2)) * int(
        draft.get("training_config.gradient_acc_steps", 4)
    )
    num_generations = int(draft.get("training_config.num_generations", 8))
    if rows % num_generations and "training_config.num_generations" not in draft.given:
        divisor = next((n for n in range(min(num_generations, rows), 1, -1) if rows % n == 0), None)
        if divisor is None:
            draft.assign_default(
                "training.gradientAccumulationSteps",
                8,
                "chosen by the importer: a step must contain several completions of a prompt",
            )
        else:
            draft.assign_default(
                "trainer.grpo.numGenerations",
                divisor,
                "chosen by the importer: the number must divide the completions of a step",
            )
            draft.add_note(
                f"GRPO samples {divisor} completions per prompt, because 8 does not divide the {rows} completions of a step"
            )


def _set_gradient_checkpointing(draft: Draft) -> None:
    key, path = "training_config.gradient_checkpointing", "training.gradientCheckpointing"
    gpus = draft.value("resources.gpusPerNode") != 0
    enabled_value = "unsloth" if gpus and draft.value("trainer.backend") == "unsloth" else "enabled"
    if key in draft.given:
        draft.assign(path, enabled_value if draft.get(key) else "disabled", key)
    elif key not in draft.unreadable:
        draft.assign_default(path, enabled_value, "default in the tool's code")


def _set_trackers(draft: Draft) -> None:
    key = "training_config.report_to"
    if key in draft.given:
        draft.assign("tracking.reportTo", draft.get(key), key)
    elif key not in draft.unreadable:
        flags = has_dashed_flags(draft.request.tool_arguments)
        draft.assign_default("tracking.reportTo", ["wandb"] if flags else ["tensorboard"], "default in the tool's code")


IMPORTER = Importer("hydra", "this Hydra tool", ROWS, DEFAULTS, recognises, read, combine, normalise_key)
