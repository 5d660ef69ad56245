"""Writes the trained end tokens to those files of the artefact from which transformers and inference servers read end tokens."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_generation_files(folder: Path, base: Path, model_config: Any, tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Write `generation_config.json`, and save the tokenizer again if its end token is not one of the trained end tokens.

    `base`: folder of the base model. `model_config`: the model's configuration, which is used if `base` has no generation settings.
    `end_ids`: ids of the trained end tokens, the most frequent first. If `end_ids` is empty, the base model's end tokens stay.
    """
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(base)
    except OSError:
        settings = GenerationConfig.from_model_config(model_config)
    base_end_ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    all_end_ids = [index for index in dict.fromkeys([*end_ids, *base_end_ids, tokenizer.eos_token_id]) if index is not None]
    settings.eos_token_id = all_end_ids[0] if len(all_end_ids) == 1 else all_end_ids or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    # Some published models have settings that contradict each other, and `save_pretrained` would refuse to write them.
    settings.to_json_file(folder / GENERATION_FILE)
    copy_end_tokens_to_model_config(folder)
    if end_ids and tokenizer.eos_token_id not in end_ids and "eos_token" not in str(tokenizer.chat_template or ""):
        # The tokenizer is not changed if its chat template writes `eos_token`, because another end token would change the rendered text.
        changed_tokenizer = copy.deepcopy(tokenizer)
        changed_tokenizer.eos_token = changed_tokenizer.convert_ids_to_tokens(end_ids[0])
        changed_tokenizer.save_pretrained(folder)


def copy_processor_files(base: Path, folder: Path) -> None:
    """Copy the settings of the base model's processors for images and videos.

    The files are copied without being loaded, because the trainer image cannot load processors for videos.
    """
    for name in PROCESSOR_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)


def copy_end_tokens_to_model_config(folder: Path) -> None:
    """Write the end tokens of `generation_config.json` to `config.json` too, because some servers and converters read only this file.

    If `config.json` has a single number, it stays a single number: the first end token. If one of the two files is missing or has no field
    `eos_token_id`, nothing is changed.
    """
    config_file, settings_file = folder / "config.json", folder / GENERATION_FILE
    if not config_file.exists() or not settings_file.exists():
        return
    config, end_ids = json.loads(config_file.read_text()), json.loads(settings_file.read_text()).get("eos_token_id")
    if config.get("eos_token_id") is None or end_ids is None:
        return
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    config["eos_token_id"] = end_ids if isinstance(config["eos_token_id"], list) else end_ids[0]
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
