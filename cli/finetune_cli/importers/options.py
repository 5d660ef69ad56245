"""Rows for the option tables of tools with hundreds of options, and the values that several of these tools share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_cli.importers.converters import ConversionError, any_value, to_number
from finetune_cli.importers.draft import JobDraft, Row
from finetune_cli.importers.sources import OPTION_BY_PATH, URI, is_local

SCHEDULERS = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constantWithWarmup", "polynomial": "polynomial",
    "cosine_with_restarts": "cosineWithRestarts", "cosine_with_min_lr": "cosineWithMinLr", "inverse_sqrt": "inverseSqrt",
    "warmup_stable_decay": "warmupStableDecay",
}  # fmt: skip
FROM_TOOL = "the tool's default"
DEVICES_REASON = "the trainer assigns the model to devices"
RANKS_REASON = "the operator starts the ranks and connects them"
LOADER_REASON = "the trainer chooses how it loads rows, which does not change the result"
SPEED_REASON = "the trainer chooses its kernels; the option changes only speed and memory"


def ignored(reason: str, keys: str) -> tuple[Row, ...]:
    """Return rows for options that have no effect on a FineTuneJob. `keys`: names, separated by spaces."""
    return tuple(Row(key, convert=any_value, no_effect=reason) for key in keys.split())


def refused(feature: str, keys: str, hint: str = "", *neutral_values: Any) -> tuple[Row, ...]:
    """Return rows for options whose features a FineTuneJob does not have. `neutral_values` turn the feature off."""
    return tuple(
        Row(key, convert=any_value, missing_feature=feature, hint=hint, neutral_values=neutral_values)
        for key in keys.split()
    )


def group_rows(keys: str) -> tuple[Row, ...]:
    """Return rows for the keys of option groups. The value of such a key may be null."""
    return tuple(Row(key, convert=_group, is_set_by_combine=True) for key in keys.split())


def _group(value: Any) -> Any:
    if value in ({}, [], "", False):
        return None
    raise ConversionError("is a single value, but a group of options is needed", "names and values")


def to_steps_or_fraction(value: Any) -> Any:
    """Convert a number of steps, or a fraction of all steps below 1."""
    number = to_number(0)(value)
    if number >= 1 and number != int(number):
        raise ConversionError("is neither a fraction nor a whole number of steps", "a number below 1, or an integer")
    return int(number) if number >= 1 else number


def to_source_uri(draft: JobDraft, key: str, path: str, text: str) -> str:
    """Return the source for a name or path in the user's file. A path becomes an absolute `file://` URI, with a warning."""
    if URI.match(text) or not (is_local(text) or Path(text).expanduser().exists()):
        return text
    option = OPTION_BY_PATH.get(path, f"--set {path}=URI")
    given_option = draft.given_options[key]
    draft.add_warning(
        f"{given_option.origin.location}: {given_option.key}: {text} is a path on this machine, which pods cannot read; "
        f"give {option if option.startswith('--set') else f'{option} URI'} (`finetune run --local` can read the path)"
    )
    return f"file://{Path(text).expanduser().absolute()}"


def assign_source_uri(draft: JobDraft, key: str, path: str, revision: str | None = None) -> None:
    """Set a source field from an option, unless an override sets the field. The revision is added to the name of a hub repository."""
    if key not in draft.given_options or path in draft.request.overrides:
        return
    source = to_source_uri(draft, key, path, str(draft.get(key)))
    if revision and not URI.match(source) and "@" not in source:
        source = f"{source}@{revision}"
    draft.assign(path, source, key)
    packed = PACKED_MODEL.search(source) if path == "model.source" else None
    if packed:
        hint = "use the unquantised model; a FineTuneJob quantises it to 4 or 8 bits itself"
        draft.refuse_feature(key, f"training on a base model in {packed[1].upper()}", hint)


PACKED_MODEL = re.compile(r"[-_.](awq|gptq|aqlm|hqq|exl2|gguf)(?:[-_.]|$)", re.IGNORECASE)
"""Names of models whose weights are stored quantised."""


def assign_secret_reference(draft: JobDraft, path: str, purpose: str, description: str) -> None:
    """Set a reference to a Secret that the user has to create, with a warning that contains the command."""
    if draft.has_value(path) or any(override.startswith(f"{path}.") for override in draft.request.overrides):
        return
    name = f"{draft.name}-{purpose}"
    draft.assign_default(path, {"name": name, "key": "token"}, f"needed for {description}")
    draft.add_warning(
        f"{description} needs a Secret: create it with `kubectl create secret generic {name} --from-literal=token=...`, "
        f"or give another one with --set {path}.name=NAME --set {path}.key=KEY"
    )


def assign_hub_push(draft: JobDraft, repository_key: str) -> None:
    """Push the final model to the repository of an option."""
    draft.assign("output.hub.push", True, repository_key)
    draft.assign("output.hub.repository", draft.get(repository_key), repository_key)
    assign_secret_reference(draft, "output.hub.tokenSecretRef", "hub", "pushing the model to the hub")


def assign_default_gpus(draft: JobDraft) -> None:
    """Request two GPUs if the strategy needs several ranks, and say that the number of GPUs is not part of the tool's files."""
    if "resources.gpusPerNode" in draft.request.overrides or draft.has_value("resources.gpusPerNode"):
        return
    gpus = 2 if draft.value("distributed.strategy") == "fsdp" and not draft.value("resources.nodes", 1) > 1 else 1
    if gpus > 1:
        draft.assign_default("resources.gpusPerNode", gpus, "chosen by the importer: FSDP needs several GPUs")
    draft.add_note(
        f"the files do not contain the number of GPUs: the job has {gpus}; set the number with --gpus and --nodes"
    )


def assign_optimizer(draft: JobDraft, key: str) -> None:
    """Set the optimizer. With FSDP, AdamW with a compressed state is replaced by AdamW, because FSDP cannot shard the compressed state."""
    option = draft.given_options[key]
    name = OTHER_OPTIMIZER_NAMES.get(str(option.value), str(option.value))
    if draft.value("distributed.strategy") == "fsdp" and name in COMPRESSED_ADAMW:
        draft.assign("training.optimizer", "adamw_torch_fused", key)
        draft.add_warning(
            f"{option.origin.location}: {option.key}: FSDP cannot shard the state of {name}, so the job uses adamw_torch_fused, "
            "which needs more memory"
        )
    else:
        draft.assign("training.optimizer", name, key)


def fit_kto_batch(draft: JobDraft, key: str) -> None:
    """Double a batch size of 1 for KTO and halve the accumulation, because KTO compares the rows of one batch."""
    steps = draft.value("training.gradientAccumulationSteps", 1)
    if (
        draft.value("trainer.type") == "kto"
        and draft.value("training.batchSizePerDevice") == 1
        and steps % 2 == 0
        and key in draft.given_options
    ):
        draft.assign("training.batchSizePerDevice", 2, key)
        draft.values["training.gradientAccumulationSteps"] = replace(
            draft.values["training.gradientAccumulationSteps"], value=steps // 2
        )
        draft.add_note(
            f"{key}: KTO compares the rows of one batch, so the job has 2 rows per batch and half as many accumulation steps"
        )


OTHER_OPTIMIZER_NAMES = {
    "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused", "paged_adamw": "paged_adamw_32bit", "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit", "ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit",
}  # fmt: skip
"""Names of optimizers that are the same as an optimizer of a FineTuneJob."""
COMPRESSED_ADAMW = (
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "adamw_torch_8bit", "adamw_torch_4bit",
)  # fmt: skip


def zero_stage_of_file(path: str) -> dict[str, Any] | None:
    """Return the DeepSpeed fields that follow from the name of a DeepSpeed JSON, such as `zero3_bf16_cpuoffload_all.json`, or None for other names."""
    name = path.replace("\\", "/").rpartition("/")[2].lower()
    match = re.search(r"(?:zero|ds_z|stage|_z)_?([0-3])", name)
    if match is None:
        return None
    fields: dict[str, Any] = {"zeroStage": int(match[1])}
    if "offload" in name:
        parameters_only = "param" in name
        if not parameters_only:
            fields["offloadOptimizer"] = True
        if fields["zeroStage"] == 3 and (parameters_only or "optim" not in name):
            fields["offloadParameters"] = True
    return fields
