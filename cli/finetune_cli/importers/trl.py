"""`trl`: the importer for TRL's command line: its flags, and the YAML file of its flag `--config`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune_cli.importers.accelerate import is_accelerate, read_accelerate
from finetune_cli.importers.command_lines import (
    ParsedFlags,
    add_config_file,
    add_stray_mistakes,
    build_flag_entry,
    parse_flags,
    strip_launcher,
)
from finetune_cli.importers.deepspeed import is_deepspeed
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_mapping
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry
from finetune_cli.importers.llamafactory import RECOGNISED_KEYS as LLAMAFACTORY_KEYS
from finetune_cli.importers.options import assign_source_uri
from finetune_cli.importers.trl_options import DEFAULTS, OPAQUE_PATHS, OPTION_TABLE, set_trl_options
from finetune_cli.yaml_reader import parse_value

TRAINER_BY_COMMAND = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "grpo": "grpo",
    "reward": "reward",
    "rloo": "rloo",
    "cpo": "cpo",
    "ppo": "ppo",
}
SUPPORTED_TRAINERS = ("sft", "dpo", "kto", "orpo", "grpo", "reward")
RECOGNISED_KEYS = (
    "dataset_name",
    "use_peft",
    "dataset_train_split",
    "dataset_text_field",
    "assistant_only_loss",
    "lora_target_modules",
    "max_length",
    "packing",
)
KEYS_BY_TRAINER = {
    "grpo": ("num_generations", "reward_funcs", "epsilon", "scale_rewards"), "kto": ("desirable_weight", "undesirable_weight"),
    "dpo": ("precompute_ref_log_probs", "f_divergence_type", "label_smoothing", "beta"), "reward": ("center_rewards_coefficient",),
}  # fmt: skip
"""For each trainer: keys that files of other trainers do not have. If no command names the trainer, the importer infers it from these keys."""


def recognises_input(documents: tuple[InputDocument, ...], command_words: tuple[str, ...]) -> bool:
    """Return whether the command starts TRL, or a document has `model_name_or_path` and another key of TRL but none of LLaMA-Factory."""
    if command_words[:1] == ("trl",) or any(re.search(r"trl/scripts/\w+\.py$|^trl$", word) for word in command_words):
        return True
    if not documents:
        return "--model_name_or_path" in command_words and "--dataset_name" in command_words
    for document in documents:
        content = peek_mapping(document)
        is_llamafactory = any(key in content for key in LLAMAFACTORY_KEYS)
        if "model_name_or_path" in content and any(key in content for key in (*RECOGNISED_KEYS, "datasets")) and not is_llamafactory:
            return True
    return False


def read_options(draft: JobDraft) -> Iterator[OptionEntry]:
    """Yield the options of the files in order, then the flags."""
    flags = parse_command(draft, draft.request.tool_arguments)
    for name, value in flags.name_value_pairs:
        if name == "--config" and value:
            add_config_file(draft, value)
    for document in draft.documents:
        if not (is_deepspeed(document) or is_accelerate(document)):
            yield from iterate_entries(document, parse_document(document), OPAQUE_PATHS)
    yield from read_flags(flags)


def parse_command(draft: JobDraft, command: tuple[str, ...]) -> ParsedFlags:
    """Return the flags of TRL's command line. Skip the launcher and the trainer."""
    command_words = [word for word in strip_launcher(command) if word not in ("trl", *TRAINER_BY_COMMAND) and not word.endswith(".py")]
    flags = parse_flags(_join_lists(command_words), lambda name: True)
    add_stray_mistakes(draft, flags)
    return flags


def read_flags(flags: ParsedFlags) -> Iterator[OptionEntry]:
    """Yield the options of parsed flags, without the flags that name a file. `--no_x` sets the option `x` to false."""
    for name, value in flags.name_value_pairs:
        if name not in ("--config", "--config_file", "--accelerate_config"):
            entry = build_flag_entry(name, True if value is None else parse_value(value))
            yield OptionEntry(
                entry.key.removeprefix("--").removeprefix("no_"),
                False if name.startswith("--no_") else entry.value,
                entry.origin,
            )


def _join_lists(command_words: list[str]) -> list[str]:
    """Join several values of a flag with commas: `--lora_target_modules q_proj v_proj` becomes `--lora_target_modules q_proj,v_proj`."""
    joined_words: list[str] = []
    for word in command_words:
        if (
            not word.startswith("--")
            and len(joined_words) > 1
            and not joined_words[-1].startswith("--")
            and joined_words[-2].startswith("--")
        ):
            joined_words[-1] += f",{word}"
        else:
            joined_words.append(word)
    return joined_words


def find_trainer(draft: JobDraft, command: tuple[str, ...]) -> tuple[str, bool]:
    """Return the name of the trainer, and whether the command names it. If the command does not name it, infer the trainer from the keys of the file."""
    for word in command:
        name = re.sub(r"^.*/|\.py$", "", word)
        if name in TRAINER_BY_COMMAND:
            return name, True
    for trainer, keys in KEYS_BY_TRAINER.items():
        if any(draft.has_key(key) or key in draft.reasons for key in keys):
            return trainer, False
    return "sft", False


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    combine_command(draft, draft.request.tool_arguments)


def combine_command(draft: JobDraft, command: tuple[str, ...]) -> None:
    """Set the fields whose value depends on the trainer, which the command names or the keys of the file imply."""
    trainer, is_named_by_command = find_trainer(draft, command)
    if trainer not in SUPPORTED_TRAINERS:
        assign_source_uri(draft, "model_name_or_path", "model.source")
        draft.refuse_feature_at(
            "command line", trainer, trainer.upper(), "use dpo, kto, orpo or grpo", is_droppable=False
        )
        return
    if not is_named_by_command:
        draft.add_note(
            f"the file does not name the trainer, and the import chose {trainer} by its keys: "
            f"name the trainer with the command after `--`, for example `-- trl {trainer}`"
        )
    draft.assign_default("trainer.type", trainer, "the command" if is_named_by_command else "chosen by the keys of the file")
    for document in draft.documents:
        if is_accelerate(document):
            read_accelerate(draft, document)
    set_trl_options(draft, trainer)


IMPORTER = Importer("trl", "TRL", OPTION_TABLE, DEFAULTS, recognises_input, read_options, combine_options, reports_every_key=True)
