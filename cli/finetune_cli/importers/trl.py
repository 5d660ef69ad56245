"""`trl`: the importer for TRL's command line: a YAML of `--config`, and flags."""

from __future__ import annotations

import re
from collections.abc import Iterator

from finetune_cli.importers.accelerate import is_accelerate, read_accelerate
from finetune_cli.importers.command_lines import (
    ParsedFlags,
    add_config_file,
    add_stray_mistakes,
    flag_entry,
    parse_flags,
    strip_launcher,
)
from finetune_cli.importers.deepspeed import is_deepspeed
from finetune_cli.importers.documents import iterate_entries, parse_document, peek_keys
from finetune_cli.importers.draft import Importer, InputDocument, JobDraft, OptionEntry
from finetune_cli.importers.llamafactory import OWN_KEYS as LLAMAFACTORY_KEYS
from finetune_cli.importers.options import assign_source_uri
from finetune_cli.importers.trl_options import DEFAULTS, OPAQUE_PATHS, ROWS, set_trl_options
from finetune_cli.yaml_reader import parse_value

TRAINERS = {
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
OWN_KEYS = (
    "dataset_name",
    "use_peft",
    "dataset_train_split",
    "dataset_text_field",
    "assistant_only_loss",
    "lora_target_modules",
    "max_length",
    "packing",
)
KEYS_OF_TRAINERS = {
    "grpo": ("num_generations", "reward_funcs", "epsilon", "scale_rewards"), "kto": ("desirable_weight", "undesirable_weight"),
    "dpo": ("precompute_ref_log_probs", "f_divergence_type", "label_smoothing", "beta"), "reward": ("center_rewards_coefficient",),
}  # fmt: skip
"""Keys that show the trainer of a file without a command."""


def recognises_input(documents: tuple[InputDocument, ...], words: tuple[str, ...]) -> bool:
    """Return whether the command is `trl`, or a document names `model_name_or_path` and other keys of TRL."""
    if words[:1] == ("trl",) or any(re.search(r"trl/scripts/\w+\.py$|^trl$", word) for word in words):
        return True
    if not documents:
        return "--model_name_or_path" in words and "--dataset_name" in words
    for document in documents:
        content = peek_keys(document)
        is_other = any(key in content for key in LLAMAFACTORY_KEYS)
        if "model_name_or_path" in content and any(key in content for key in (*OWN_KEYS, "datasets")) and not is_other:
            return True
    return False


def read(draft: JobDraft) -> Iterator[OptionEntry]:
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
    """Parse TRL's command line: launcher, trainer and flags."""
    words = [word for word in strip_launcher(command) if word not in ("trl", *TRAINERS) and not word.endswith(".py")]
    flags = parse_flags(_join_lists(words), lambda name: True)
    add_stray_mistakes(draft, flags)
    return flags


def read_flags(flags: ParsedFlags) -> Iterator[OptionEntry]:
    """Yield the options of parsed flags."""
    for name, value in flags.name_value_pairs:
        if name not in ("--config", "--config_file", "--accelerate_config"):
            entry = flag_entry(name, True if value is None else parse_value(value))
            yield OptionEntry(
                entry.key.removeprefix("--").removeprefix("no_"),
                False if name.startswith("--no_") else entry.value,
                entry.origin,
            )


def _join_lists(words: list[str]) -> list[str]:
    """Join the values of a flag that takes several words: `--lora_target_modules q_proj v_proj` becomes one value with commas."""
    result: list[str] = []
    for word in words:
        if (
            not word.startswith("--")
            and len(result) > 1
            and not result[-1].startswith("--")
            and result[-2].startswith("--")
        ):
            result[-1] += f",{word}"
        else:
            result.append(word)
    return result


def trainer_of(draft: JobDraft, command: tuple[str, ...]) -> tuple[str, bool]:
    """Return the trainer, and whether the command names it. Without a command, the keys of the file decide."""
    for word in command:
        name = re.sub(r"^.*/|\.py$", "", word)
        if name in TRAINERS:
            return name, True
    for trainer, keys in KEYS_OF_TRAINERS.items():
        if any(draft.has_key(key) or key in draft.reasons for key in keys):
            return trainer, False
    return "sft", False


def combine_options(draft: JobDraft) -> None:
    """Set the fields whose value depends on several options."""
    combine_command(draft, draft.request.tool_arguments)


def combine_command(draft: JobDraft, command: tuple[str, ...]) -> None:
    """Set the fields for the trainer of a command."""
    trainer, is_given = trainer_of(draft, command)
    if trainer not in SUPPORTED_TRAINERS:
        assign_source_uri(draft, "model_name_or_path", "model.source")
        draft.refuse_feature_at(
            "command line", trainer, trainer.upper(), "use dpo, kto, orpo or grpo", is_droppable=False
        )
        return
    if not is_given:
        draft.add_note(
            f"the file does not name the trainer; its keys are those of {trainer}: give the command after `--`, for example `-- trl {trainer}`"
        )
    draft.assign_default("trainer.type", trainer, "the command" if is_given else "the keys of the file")
    for document in draft.documents:
        if is_accelerate(document):
            read_accelerate(draft, document)
    set_trl_options(draft, trainer)


IMPORTER = Importer("trl", "TRL", ROWS, DEFAULTS, recognises_input, read, combine_options, reports_every_key=True)
