"""Reads a DeepSpeed JSON file that the user gives together with another tool's configuration."""

from __future__ import annotations

import re
from typing import Any

from finetune_cli.importers.documents import parse_json, peek_json
from finetune_cli.importers.draft import InputDocument, JobDraft
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import AssignedValue, ValueOrigin

DEEPSPEED_KEYS = (
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "bf16",
    "fp16",
    "gradient_clipping",
)


def is_deepspeed(document: InputDocument) -> bool:
    """Return whether a document is a DeepSpeed configuration: a JSON object with keys of DeepSpeed and without the key `model`."""
    content = peek_json(document)
    return any(key in content for key in DEEPSPEED_KEYS) and "model" not in content


def read_deepspeed(draft: JobDraft, document: InputDocument) -> None:
    """Set the fields that correspond to options in the DeepSpeed file, and store the whole file in a ConfigMap.

    If the DeepSpeed file and another input file give different values for a field, record a mistake.
    """
    content = parse_json(document)
    origin = ValueOrigin(document.name)
    zero_options = read_option_group(draft, content, "zero_optimization", origin)
    key_and_value_by_path: dict[str, tuple[str, Any]] = {
        "distributed.deepspeed.zeroStage": ("zero_optimization.stage", zero_options.get("stage")),
        "training.maxGradNorm": ("gradient_clipping", content.get("gradient_clipping")),
        "training.batchSizePerDevice": (
            "train_micro_batch_size_per_gpu",
            content.get("train_micro_batch_size_per_gpu"),
        ),
        "training.gradientAccumulationSteps": (
            "gradient_accumulation_steps",
            content.get("gradient_accumulation_steps"),
        ),
    }
    for path, (key, value) in key_and_value_by_path.items():
        if value is not None and value != "auto":
            assign_consistently(draft, path, key, value, origin)
    for path, key in (
        ("distributed.deepspeed.offloadOptimizer", "offload_optimizer"),
        ("distributed.deepspeed.offloadParameters", "offload_param"),
    ):
        device = (zero_options.get(key) or {}).get("device") if isinstance(zero_options.get(key), dict) else None
        if device in ("cpu", "nvme"):
            assign_consistently(draft, path, f"zero_optimization.{key}.device", True, origin)
    for precision in ("bf16", "fp16"):
        if isinstance(content.get(precision), dict) and content[precision].get("enabled") is True:
            assign_consistently(draft, "training.mixedPrecision", f"{precision}.enabled", precision, origin)
    _add_config_map(draft, document)


def read_option_group(draft: JobDraft, content: dict[str, Any], option_key: str, origin: ValueOrigin) -> dict[str, Any]:
    """Return the group of options at `option_key`, or an empty dict if the group is absent. Record a mistake if the value is not a mapping."""
    option_group = content.get(option_key) or {}
    if isinstance(option_group, dict):
        return option_group
    draft.mistakes.append(
        Mistake(
            origin.location, option_key, f"the value is {option_group}, but a group of options is needed", "write names and values"
        )
    )
    return {}


def assign_consistently(draft: JobDraft, spec_path: str, option_key: str, value: Any, origin: ValueOrigin) -> None:
    """Set a field. If another file gives a different value, record a mistake with both locations."""
    existing_value = draft.values.get(spec_path)
    if existing_value is not None and existing_value.key and existing_value.value != value:
        hint = f"make them equal, or write `auto` for {option_key}"
        draft.mistakes.append(
            Mistake(
                f"{existing_value.origin.location}, {origin.location}",
                f"{existing_value.key}, {option_key}",
                f"{existing_value.value} and {value} are given for the same option",
                hint,
            )
        )
        return
    if existing_value is None or not existing_value.key:
        draft.values[spec_path] = AssignedValue(value, origin, option_key)


def _add_config_map(draft: JobDraft, document: InputDocument) -> None:
    """Add a ConfigMap with the whole file to the manifest, and set `distributed.deepspeed.configRef` to it."""
    path = "distributed.deepspeed.configRef"
    if any(override.startswith(path) for override in draft.request.overrides):
        return
    name, key = f"{draft.name}-deepspeed", re.sub(r"[^-._a-zA-Z0-9]", "_", document.path.name) or "deepspeed.json"
    draft.config_maps[name] = {key: document.text}
    origin = ValueOrigin(document.name)
    draft.values[f"{path}.name"] = AssignedValue(name, origin, document.name)
    draft.values[f"{path}.key"] = AssignedValue(key, origin, document.name)
