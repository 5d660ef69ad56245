"""Rows for the option tables of tools with hundreds of options, and functions for the options that these tools have in common."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_cli.importers.converters import ConversionError, keep_value, to_number
from finetune_cli.importers.draft import JobDraft, OptionRow
from finetune_cli.importers.sources import OPTION_BY_PATH, URI_PATTERN, is_local

SCHEDULER_BY_NAME = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constantWithWarmup", "polynomial": "polynomial",
    "cosine_with_restarts": "cosineWithRestarts", "cosine_with_min_lr": "cosineWithMinLr", "inverse_sqrt": "inverseSqrt",
    "warmup_stable_decay": "warmupStableDecay",
}  # fmt: skip
DEVICES_REASON = "the trainer assigns the model to devices"
RANKS_REASON = "the operator starts the ranks and connects them"
LOADER_REASON = "the trainer chooses how it loads rows, which does not change the result"
SPEED_REASON = "the trainer chooses its kernels; the option changes only speed and memory"


def make_ignored_options(reason: str, keys: str) -> tuple[OptionRow, ...]:
    """Return option rows for options that have no effect on a FineTuneJob. `keys`: the names of the options, separated by spaces."""
    return tuple(OptionRow(key, convert=keep_value, no_effect_reason=reason) for key in keys.split())


def make_refused_options(feature: str, keys: str, hint: str = "", *neutral_values: Any) -> tuple[OptionRow, ...]:
    """Return option rows for options whose feature a FineTuneJob does not have. `neutral_values`: values of the options that turn the feature off."""
    return tuple(
        OptionRow(key, convert=keep_value, missing_feature=feature, hint=hint, neutral_values=neutral_values)
        for key in keys.split()
    )


def make_option_groups(keys: str) -> tuple[OptionRow, ...]:
    """Return option rows for keys that name a group of options.

    If such a key has a single value instead of a group, the value is refused, unless it is empty or false.
    """
    return tuple(OptionRow(key, convert=_convert_empty_group, is_set_by_combine=True) for key in keys.split())


def _convert_empty_group(value: Any) -> Any:
    if value in ({}, [], "", False):
        return None
    raise ConversionError("is a single value, but a group of options is needed", "names and values")


def to_steps_or_fraction(value: Any) -> Any:
    """Convert a number of steps. A number below 1 means a fraction of all steps."""
    converted_number = to_number(0)(value)
    if converted_number >= 1 and converted_number != int(converted_number):
        raise ConversionError("is neither a fraction nor a whole number of steps", "a number below 1, or an integer")
    return int(converted_number) if converted_number >= 1 else converted_number


def normalise_source_uri(draft: JobDraft, option_key: str, spec_path: str, name_or_path: str) -> str:
    """Return the source for a hub name, URI or path in the user's file. A path becomes an absolute `file://` URI, with a warning."""
    if URI_PATTERN.match(name_or_path) or not (is_local(name_or_path) or Path(name_or_path).expanduser().exists()):
        return name_or_path
    option = OPTION_BY_PATH.get(spec_path, f"--set {spec_path}=URI")
    given_option = draft.given_options[option_key]
    draft.add_warning(
        f"{given_option.origin.location}: {given_option.key}: {name_or_path} is a path on this machine, which pods cannot read; "
        f"give {option if option.startswith('--set') else f'{option} URI'} (`finetune run --local` can read the path)"
    )
    return f"file://{Path(name_or_path).expanduser().absolute()}"


def assign_source_uri(draft: JobDraft, option_key: str, spec_path: str, revision: str | None = None) -> None:
    """Set a source field from an option, unless an override sets the field. Add the revision to the name of a hub repository."""
    if option_key not in draft.given_options or spec_path in draft.request.overrides:
        return
    source = normalise_source_uri(draft, option_key, spec_path, str(draft.get(option_key)))
    if revision and not URI_PATTERN.match(source) and "@" not in source:
        source = f"{source}@{revision}"
    draft.assign(spec_path, source, option_key)
    format_match = QUANTISED_MODEL_PATTERN.search(source) if spec_path == "model.source" else None
    if format_match:
        hint = "use the unquantised model; a FineTuneJob quantises it to 4 or 8 bits itself"
        draft.refuse_feature(option_key, f"training on a base model in {format_match[1].upper()}", hint)


QUANTISED_MODEL_PATTERN = re.compile(r"[-_.](awq|gptq|aqlm|hqq|exl2|gguf)(?:[-_.]|$)", re.IGNORECASE)
"""Matches the names of models whose weights are stored in a quantised format."""


def assign_secret_reference(draft: JobDraft, spec_path: str, name_suffix: str, feature: str) -> None:
    """Set a reference to a Secret that the user must create, and warn with the command that creates it.

    `name_suffix`: the end of the Secret's name. `feature`: what needs the Secret, for the warning.
    """
    if draft.has_value(spec_path) or any(override.startswith(f"{spec_path}.") for override in draft.request.overrides):
        return
    name = f"{draft.name}-{name_suffix}"
    draft.assign_default(spec_path, {"name": name, "key": "token"}, f"needed for {feature}")
    draft.add_warning(
        f"{feature} needs a Secret: create it with `kubectl create secret generic {name} --from-literal=token=...`, "
        f"or give another one with --set {spec_path}.name=NAME --set {spec_path}.key=KEY"
    )


def assign_hub_push(draft: JobDraft, repository_key: str) -> None:
    """Make the job push the final model to the hub repository that an option names."""
    draft.assign("output.hub.push", True, repository_key)
    draft.assign("output.hub.repository", draft.get(repository_key), repository_key)
    assign_secret_reference(draft, "output.hub.tokenSecretRef", "hub", "pushing the model to the hub")


def assign_default_gpus(draft: JobDraft) -> None:
    """Set two GPUs if the strategy is FSDP on one node, because FSDP needs several GPUs. Add a note that the tool's files do not contain the number."""
    if "resources.gpusPerNode" in draft.request.overrides or draft.has_value("resources.gpusPerNode"):
        return
    gpu_count = 2 if draft.value("distributed.strategy") == "fsdp" and not draft.value("resources.nodes", 1) > 1 else 1
    if gpu_count > 1:
        draft.assign_default("resources.gpusPerNode", gpu_count, "chosen by the importer: FSDP needs several GPUs")
    draft.add_note(
        f"the files do not contain the number of GPUs: the job has {gpu_count}; set the number with --gpus and --nodes"
    )


def assign_optimizer(draft: JobDraft, option_key: str) -> None:
    """Set the optimizer.

    If the job uses FSDP, replace an AdamW optimizer with quantised or paged state by the standard AdamW, because FSDP cannot shard quantised or paged
    state.
    """
    option = draft.given_options[option_key]
    name = OPTIMIZER_BY_OTHER_NAME.get(str(option.value), str(option.value))
    if draft.value("distributed.strategy") == "fsdp" and name in ADAMW_THAT_FSDP_CANNOT_SHARD:
        draft.assign("training.optimizer", "adamw_torch_fused", option_key)
        draft.add_warning(
            f"{option.origin.location}: {option.key}: FSDP cannot shard the state of {name}, so the job uses adamw_torch_fused, "
            "which needs more memory"
        )
    else:
        draft.assign("training.optimizer", name, option_key)


def double_kto_batch(draft: JobDraft, option_key: str) -> None:
    """If a KTO job has a batch size of 1, set 2 and halve the accumulation steps, because KTO compares the rows of one batch with each other."""
    accumulation_steps = draft.value("training.gradientAccumulationSteps", 1)
    if (
        draft.value("trainer.type") == "kto"
        and draft.value("training.batchSizePerDevice") == 1
        and accumulation_steps % 2 == 0
        and option_key in draft.given_options
    ):
        draft.assign("training.batchSizePerDevice", 2, option_key)
        draft.values["training.gradientAccumulationSteps"] = replace(
            draft.values["training.gradientAccumulationSteps"], value=accumulation_steps // 2
        )
        draft.add_note(
            f"{option_key}: KTO compares the rows of one batch, so the job has 2 rows per batch and half as many accumulation steps"
        )


OPTIMIZER_BY_OTHER_NAME = {
    "adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused", "paged_adamw": "paged_adamw_32bit", "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit", "ao_adamw_8bit": "adamw_torch_8bit", "ao_adamw_4bit": "adamw_torch_4bit",
}  # fmt: skip
"""The FineTuneJob's name of each optimizer that other tools name differently, by the other tool's name."""
ADAMW_THAT_FSDP_CANNOT_SHARD = (
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "adamw_torch_8bit", "adamw_torch_4bit",
)  # fmt: skip


def guess_deepspeed_fields(path: str) -> dict[str, Any] | None:
    """Return the fields of `distributed.deepspeed` that follow from the name of a DeepSpeed JSON file, such as `zero3_bf16_cpuoffload_all.json`.

    Return None for a name without a ZeRO stage.
    """
    name = path.replace("\\", "/").rpartition("/")[2].lower()
    match = re.search(r"(?:zero|ds_z|stage|_z)_?([0-3])", name)
    if match is None:
        return None
    fields: dict[str, Any] = {"zeroStage": int(match[1])}
    if "offload" in name:
        offloads_only_parameters = "param" in name
        if not offloads_only_parameters:
            fields["offloadOptimizer"] = True
        if fields["zeroStage"] == 3 and (offloads_only_parameters or "optim" not in name):
            fields["offloadParameters"] = True
    return fields
