"""`hydra`: a composed file, a folder of groups or an older dashed command line, with Hydra's own composition and override grammar.

That tool's method, adapter sizes and warm-up are fixed in its code; an import writes them out, or the run would be another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.commands import after_launcher, flag_entry, parse_flags, stray_mistakes
from finetune_cli.importers.companions import is_accelerate, read_accelerate
from finetune_cli.importers.convert import boolean, choice, integer, nearest, number
from finetune_cli.importers.hydra_compose import (
    GROUPS,
    composed,
    config_file,
    config_name,
    dashed,
    key_of,
    options,
    shipped,
)
from finetune_cli.importers.material import Document, Draft, Entry, Fill, Importer, Mistake, Row
from finetune_cli.importers.paths import is_local, place_source
from finetune_cli.importers.toml import PROJECTIONS, SCHEDULERS
from finetune_cli.importers.yaml import assume_ranks
from finetune_cli.importers.yaml_tree import sniff

TRACKERS = {"wandb": ["wandb"], "tensorboard": ["tensorboard"], "mlflow": ["mlflow"], "none": []}
FORMATS = {
    "standard": "promptCompletion", "conversational": "messages", "preference": "preference", "no": "plainText", "simple": "plainText",
}  # fmt: skip
COLUMNS: dict[str, dict[str, str]] = {
    "messages": {"question": "Question", "answer": "Response"},
    "plainText": {"text": "text"},
}
"""Columns that its code wants. Those of the other formats the trainer finds by itself, in any letter case, after TRL's own."""
SYSTEM_PROMPT = "You are a personal assistant."


def config(key: str, *args: Any, **kwargs: Any) -> Row:
    """A key of the training group; its dashed flag is another spelling."""
    return Row(f"training_config.{key}", *args, **kwargs)


ROWS: tuple[Row, ...] = (
    config("model", "model.source", required=True, manual=True),
    Row("dataset.path", "dataset.train", manual=True, aliases=("--dataset",)),
    Row("dataset.format", "dataset.format", choice(FORMATS), manual=True, aliases=("--format",)),
    config("trainer", "trainer.type", choice({"SFT": "sft", "DPO": "dpo", "GRPO": "grpo"})),
    config("distributed_training", "distributed.strategy", choice({"DDP": "ddp", "FSDP": "fsdp", "Unsloth": "unsloth"}), manual=True),
    config("per_device_train_batch_size", "training.batchSizePerDevice", integer(1)),
    config("gradient_acc_steps", "training.gradientAccumulationSteps", integer(1)),
    config("optim", "training.optimizer"),
    config("learning_rate", "training.learningRate", number(above=0)),
    config("num_train_epochs", "training.epochs", integer(1)),
    config("lr_scheduler_type", "training.scheduler", choice(SCHEDULERS)),
    config("save_steps", "checkpoint.steps", integer(1)),
    config("max_completion_length", "trainer.maxCompletionLength", integer(1)),
    config("max_seq_length", "dataset.maxSequenceLength", integer(1)),
    config("gradient_checkpointing", "training.gradientCheckpointing", boolean, manual=True),
    config("report_to", "tracking.reportTo", choice(TRACKERS), manual=True, empty_is_absent=False),
    config("warmup_ratio", "training.warmupRatio", number(0, below=1)),
    config("warmup_steps", "training.warmupSteps", integer(0)),
    config("weight_decay", "training.weightDecay", number(0)),
    config("max_grad_norm", "training.maxGradNorm", number(0)),
    config("logging_steps", "tracking.loggingSteps", integer(1)),
    config("max_steps", "training.maxSteps", integer(1)),
    config("save_total_limit", "checkpoint.keep", integer(1)),
    config("seed", "training.seed", integer(0, 4294967295)),
    config("beta", "trainer.dpo.beta", number(0), manual=True),
    config("num_generations", "trainer.grpo.numGenerations", integer(2), manual=True),
    config("temperature", "trainer.grpo.temperature", number(above=0), manual=True),
)  # fmt: skip
FIXED = "fixed in its code"
PROFILE: tuple[Fill, ...] = (
    Fill("method.type", "lora", FIXED),
    Fill("method.lora.rank", 128, FIXED),
    Fill("method.lora.alpha", 64, FIXED),
    Fill("method.lora.dropout", 0, "fixed in its code for Unsloth", lambda d: d.value("trainer.backend") == "unsloth"),
    Fill("method.lora.dropout", 0.05, FIXED),
    Fill("method.lora.targetModules", PROJECTIONS, FIXED),
    Fill("method.lora.bias", "none", FIXED),
    Fill("model.dtype", "bfloat16", FIXED, gpu=True),
    Fill("model.attention", "flashAttention2", FIXED, lambda d: d.value("trainer.backend") != "unsloth", gpu=True),
    Fill("trainer.type", "sft", "code default"),
    Fill("training.batchSizePerDevice", 2, "code default"),
    Fill("training.gradientAccumulationSteps", 4, "code default"),
    Fill("training.optimizer", "adamw_torch_fused", "code default"),
    Fill("training.epochs", 1, "code default"),
    Fill("training.scheduler", "cosine", "code default"),
    Fill("training.warmupRatio", 0.1, FIXED, lambda d: not d.has("training.warmupSteps")),
    Fill("training.weightDecay", 0, FIXED),
    Fill("training.maxGradNorm", 1, FIXED),
    Fill("training.mixedPrecision", "bf16", FIXED, gpu=True),
    Fill("dataset.maxSequenceLength", 2048, "code default"),
    Fill("dataset.responseOnly.enabled", False, FIXED, lambda d: d.value("trainer.type", "sft") == "sft"),
    Fill("dataset.useChatTemplate", True, FIXED, lambda d: d.value("dataset.format") not in ("plainText", None)),
    Fill("checkpoint.strategy", "steps", FIXED),
    Fill("checkpoint.steps", 100, "code default"),
    Fill("checkpoint.keep", 0, FIXED),
    Fill("output.dir", "adapters", FIXED),
    Fill("output.layout", "flat", FIXED),
    Fill("tracking.loggingSteps", 50, FIXED),
)  # fmt: skip
SHIPPED: dict[str, Any] = {
    "training_config.model": "./my_saved_model/qwen3-full", "training_config.trainer": "SFT", "training_config.distributed_training": "Unsloth",
    "training_config.per_device_train_batch_size": 2, "training_config.gradient_acc_steps": 1, "training_config.optim": "adamw_torch_fused",
    "training_config.learning_rate": 5e-5, "training_config.num_train_epochs": 2, "training_config.lr_scheduler_type": "cosine",
    "training_config.save_steps": 100, "training_config.max_completion_length": 2048, "training_config.max_seq_length": 4096,
    "training_config.gradient_checkpointing": True, "training_config.report_to": "tensorboard", "dataset.path": None, "dataset.format": "standard",
}  # fmt: skip
"""What that tool's own configuration files say: the base of overrides that come without a file."""


KNOWN = frozenset(key_of(row.key) for row in ROWS)


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


def recognise(documents: tuple[Document, ...], words: tuple[str, ...]) -> bool:
    """A mapping with a training group, a flat group file, a folder of groups, or that tool's flags and overrides."""
    if not documents:
        return any(
            w.partition("=")[0] in FLAG_MARKS or re.match(r"^[+~]*(training_configs?|training|dataset)[.=]", w)
            for w in words
        )
    for document in documents:
        if document.folder:
            return config_file(document.path) is not None or any(options(document.path))
        found = sniff(document)
        model = found.get("model")
        if any(isinstance(found.get(group), dict) for group in GROUPS[:2]):
            return True
        if any(mark in found for mark in FLAT_MARKS) or any(
            isinstance(one, str) and re.match(r"^(training_configs?|training)(:|$)", str(one))
            for one in found.get("defaults") or []
        ):
            return True
        if isinstance(found.get("defaults"), list) or (
            isinstance(found.get("training"), dict) and "distributed_training" in found["training"] and model is None
        ):
            return True
    return False


def read(draft: Draft) -> Iterator[Entry]:
    """Compose files and overrides with Hydra, or take the older dashed flags."""
    words, config = config_name(draft, after_launcher(draft.request.words))
    bases = [document for document in draft.documents if not is_accelerate(document)]
    flagged = dashed(words)
    if len(bases) > 1:
        draft.mistakes.append(
            Mistake(
                ", ".join(d.name for d in bases),
                "",
                "one base file or folder is needed",
                "give one, and the accelerate file beside it",
            )
        )
        return
    if flagged:
        if bases:
            yield from composed(draft, bases[0], [], config)
        yield from _flags(draft, words)
    elif bases:
        yield from composed(draft, bases[0], words, config)
    else:
        yield from shipped(draft, words, SHIPPED)


def _flags(draft: Draft, words: list[str]) -> Iterator[Entry]:
    flags = parse_flags(words, lambda name: True)
    stray_mistakes(draft, flags)
    known = sorted({f"--{key.partition('.')[2].replace('_', '-')}" for key in KNOWN} | {"--dataset", "--format"})
    for name, value in flags.pairs:
        if key_of(name) not in KNOWN:
            near = nearest(name, known)
            draft.mistakes.append(
                Mistake("command line", name, "unknown option", f"did you mean {near}?" if near else "remove it")
            )
        elif value is None:
            draft.mistakes.append(Mistake("command line", name, "it has no value", f"write {name} VALUE"))
        else:
            yield flag_entry(
                "--" + name.lstrip("-"),
                None if value.lower() in ("null", "none") and key_of(name).endswith("report_to") else value,
            )


# --- options that belong together -----------------------------------------------------------------------------------


def combine(draft: Draft) -> None:
    """What one option of that tool means depends on others."""
    place_source(draft, "training_config.model", "model.source")
    found = str(draft.get("dataset.path", ""))
    place_source(draft, "dataset.path", "dataset.train", always_local=is_local(found))
    if (
        not draft.wrote("dataset.path")
        and (draft.wrote("dataset.format") or dashed(draft.request.words))
        and "dataset.train" not in draft.request.own
    ):
        draft.mistakes.append(
            Mistake(draft.where, "dataset.path", "it is missing, and it is required", "add it, or give --data URI")
        )
        draft.broken["dataset.path"] = "dataset.train"
    _learning_rate(draft)
    for document in draft.documents:
        if is_accelerate(document):
            _with_accelerate(draft, document)
    _strategy(draft)
    _format(draft)
    _objective(draft)
    _checkpointing(draft)
    _report(draft)


def _learning_rate(draft: Draft) -> None:
    if draft.wrote("training_config.learning_rate"):
        return
    if dashed(draft.request.words) and not [d for d in draft.documents if not is_accelerate(d)]:
        draft.fill("training.learningRate", 2e-4, "page advice")
        draft.note("no learning rate is given: 2e-4, as that tool's page advises for its flags")
    else:
        draft.fill("training.learningRate", 5e-5, "code default")


def _with_accelerate(draft: Draft, document: Document) -> None:
    """The strategy of the file is set first, so that another one there is told as a contradiction."""
    wanted = draft.given.get("training_config.distributed_training")
    if wanted is not None:
        draft.put(
            "distributed.strategy",
            "none" if wanted.value == "unsloth" else wanted.value,
            "training_config.distributed_training",
        )
    read_accelerate(draft, document)


def _strategy(draft: Draft) -> None:
    key = "training_config.distributed_training"
    if key in draft.broken:
        return
    given = draft.given.get(key)
    if given is None and draft.has("distributed.strategy"):
        draft.fill("trainer.backend", "transformers", "fixed in its code")
        return
    wanted = given.value if given else "unsloth"
    backend, strategy = ("unsloth", "none") if wanted == "unsloth" else ("transformers", wanted)
    if given:
        draft.put("trainer.backend", backend, key)
        draft.put("distributed.strategy", strategy, key)
    else:
        draft.fill("trainer.backend", backend, "page default")
        draft.fill("distributed.strategy", strategy, "page default")
    if strategy == "fsdp":
        assume_ranks(draft, "FSDP")


def _format(draft: Draft) -> None:
    if "dataset.format" in draft.given:
        draft.put("dataset.format", draft.get("dataset.format"), "dataset.format")
    form = draft.get("dataset.format")
    for column, name in COLUMNS.get(str(form), {}).items():
        draft.fill(f"dataset.columns.{column}", name, "fixed in its code")
    if form == "messages":
        draft.fill("dataset.systemPrompt", SYSTEM_PROMPT, "fixed in its code")


def _objective(draft: Draft) -> None:
    trainer = draft.get("training_config.trainer", "sft")
    if "training_config.beta" in draft.given:
        path = {"dpo": "trainer.dpo.beta", "grpo": "trainer.grpo.beta"}.get(trainer)
        _put_or_warn(draft, "training_config.beta", path)
    for key in ("num_generations", "temperature"):
        name = {"num_generations": "numGenerations"}.get(key, key)
        _put_or_warn(draft, f"training_config.{key}", f"trainer.grpo.{name}" if trainer == "grpo" else None)
    if trainer != "sft":
        _completions(draft)
    if trainer == "grpo":
        _grpo(draft)


def _completions(draft: Draft) -> None:
    """That tool's two limits may be equal, which leaves nothing to the prompt: then each gets one half."""
    path, key = "trainer.maxCompletionLength", "training_config.max_completion_length"
    wanted, whole = draft.get(key, 2048), draft.get("training_config.max_seq_length", 2048)
    half = max(1, whole // 2)
    if wanted < whole and key not in draft.given:
        draft.fill(path, wanted, "code default")
    elif wanted >= whole and key in draft.given:
        given = draft.given[key]
        draft.put(path, half, key)
        draft.warn(
            f"{given.origin.place}: {given.key}: {wanted} leaves no room in {whole} tokens to the prompt: {half} is written"
        )
    elif key not in draft.broken:
        draft.fill(path, half, f"our choice: the code's 2048 leaves no room in {whole} tokens to the prompt")


def _put_or_warn(draft: Draft, key: str, path: str | None) -> None:
    given = draft.given.get(key)
    if given is None:
        return
    if path:
        draft.put(path, given.value, key)
    else:
        draft.warn(f"{given.origin.place}: {given.key} has no effect with this trainer")


def _grpo(draft: Draft) -> None:
    draft.fill("trainer.rewards", [{"builtin": "citationFormat"}], "fixed in its code")
    draft.note(
        "trainer GRPO: the reward of that tool's code, citationFormat, is filled in; name others in trainer.rewards"
    )
    rows = int(draft.get("training_config.per_device_train_batch_size", 2)) * int(
        draft.get("training_config.gradient_acc_steps", 4)
    )
    wanted = int(draft.get("training_config.num_generations", 8))
    if rows % wanted and "training_config.num_generations" not in draft.given:
        fitting = next((n for n in range(min(wanted, rows), 1, -1) if rows % n == 0), None)
        if fitting is None:
            draft.fill(
                "training.gradientAccumulationSteps", 8, "our choice: GRPO compares several completions in a step"
            )
        else:
            draft.fill("trainer.grpo.numGenerations", fitting, "our choice: divides the completions of a step")
            draft.note(f"GRPO samples {fitting} completions for a prompt, since 8 do not divide the {rows} of one step")


def _checkpointing(draft: Draft) -> None:
    key, path = "training_config.gradient_checkpointing", "training.gradientCheckpointing"
    gpus = draft.value("resources.gpusPerNode") != 0
    on = "unsloth" if gpus and draft.value("trainer.backend") == "unsloth" else "enabled"
    if key in draft.given:
        draft.put(path, on if draft.get(key) else "disabled", key)
    elif key not in draft.broken:
        draft.fill(path, on, "code default")


def _report(draft: Draft) -> None:
    key = "training_config.report_to"
    if key in draft.given:
        draft.put("tracking.reportTo", draft.get(key), key)
    elif key not in draft.broken:
        flags = dashed(draft.request.words)
        draft.fill("tracking.reportTo", ["wandb"] if flags else ["tensorboard"], "code default")


IMPORTER = Importer("hydra", "this Hydra tool", ROWS, PROFILE, recognise, read, combine, key_of)
