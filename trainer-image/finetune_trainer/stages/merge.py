"""Runs the stage `merging`: merges the adapter into the base model, and writes a complete model.

The base model is loaded without quantisation, in the number format of its files, into the host's memory. GPUs are not used, because merging
needs little computation, and a model that was trained on several GPUs may not fit on one. An adapter that was trained on a quantised base model
(QLoRA) is merged into the unquantised base model too. Because of the quantisation error, the merged model then differs slightly from the model in training.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api import rules
from finetune_api.errors import ConfigError, DivergedError, NotFoundError
from finetune_api.pod import RunConfig
from finetune_api.status import Stage

from finetune_trainer.artefact.card import CARD_FILE, build_merged_card
from finetune_trainer.artefact.combination import load_combined_adapters
from finetune_trainer.artefact.generation import GENERATION_FILE, copy_end_tokens_to_model_config
from finetune_trainer.channel import Channel
from finetune_trainer.disk import free_bytes
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.files import OUTPUT_FOLDER, StageResult, StageTask
from finetune_trainer.stages.heartbeats import send_heartbeats_while_computing

SHARD_SIZE = "4GB"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "manifest.json")
"""Patterns of the adapter's files that are not copied to the merged model."""


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Merge the adapter, and write the complete model to the stage's output folder.

    Errors: NotFoundError ModelUnreadable, ModelIncomplete; ConfigError LocalDiskTooSmall; DivergedError WeightsNotFinite.
    """
    with send_heartbeats_while_computing(channel):
        model = merge_adapter(run, channel, inputs, task)
        if rules.base_bits(run.spec) is not None:
            channel.report_note("the adapter was trained on the quantised base model, and is merged into the base model without quantisation")
        channel.report_stage(Stage.MERGING, "writing the merged model")
        _require_disk_space(model, channel.work_folder)
        _write_merged_model(model, run, inputs, task, folder / OUTPUT_FOLDER)
    return StageResult()


def merge_adapter(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask) -> Any:
    """Merge the adapter, and return the complete model in the number format of the base model's files."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from finetune_trainer.stages.final_model import load_tokenizer

    channel.report_stage(Stage.MERGING, "loading the base model")
    tokenizer = load_tokenizer(run, inputs, task)
    peft_model = _load_adapter(run, inputs, task, tokenizer)
    adapters = load_combined_adapters(peft_model, run, inputs.combined_adapters) if run.spec.output.combine_adapters else None
    dtype_by_name = {name.replace(".base_layer.", "."): parameter.dtype for name, parameter in peft_model.get_base_model().named_parameters()}
    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `merge_and_unload` warns about each layer that is already merged.
            for number, layer in enumerate(layers, 1):
                _merge_layer(layer, adapters)
                channel.report_stage(Stage.MERGING, f"{number} of {len(layers)} layers")
            model = peft_model.merge_and_unload()
    except ValueError as error:  # PEFT raises this error if the merged weights of a layer are not finite.
        raise DivergedError("WeightsNotFinite", f"the adapter cannot be merged: {error}", hint="lower training.learningRate") from error
    for name, parameter in model.named_parameters():  # PEFT keeps modules that were trained in full as copies in 32 bits.
        parameter.data = parameter.data.to(dtype_by_name.get(name, model.dtype))
    return model


def _merge_layer(layer: Any, adapters: list[str] | None) -> None:
    """Merge the adapters of one layer into the layer's weights. The merged weights are computed in 32 bits, so that weights in 16 bits are rounded only once.

    `adapters`: names of the adapters to merge. If it is None, only the trained adapter is merged.
    """
    import torch

    parameters = [parameter for parameter in layer.get_base_layer().parameters() if parameter.dtype in (torch.bfloat16, torch.float16)]
    dtypes = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    layer.merge(safe_merge=True, adapter_names=[name for name in adapters if name in layer.scaling] if adapters else None)
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)


def _load_adapter(run: RunConfig, inputs: Inputs, task: StageTask, tokenizer: Any) -> Any:
    """Load the unquantised base model on the CPU, with the adapter. Errors: NotFoundError ModelUnreadable, ModelIncomplete."""
    import torch
    from peft import PeftModel

    from finetune_trainer import hardware
    from finetune_trainer import model as models
    from finetune_trainer.objective import load_objective

    model_kind = load_objective(rules.trainer_type_of(run.spec)).model_kind
    host_hardware = replace(hardware.detect_hardware(run, 0), device=torch.device("cpu"), dtype="auto", attention="sdpa")
    base_model, _ = models.load_model(run, inputs, host_hardware, model_kind=model_kind, quantize=False)
    if run.spec.model.new_tokens and base_model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    try:
        return PeftModel.from_pretrained(base_model, task.model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NotFoundError("ModelUnreadable", f"the adapter {task.uri} cannot be loaded: {error}") from error


def _require_disk_space(model: Any, work_folder: Path) -> None:
    """Check that the merged model fits on the pod's disk. Errors: ConfigError LocalDiskTooSmall."""
    needed_bytes, available_bytes = sum(parameter.nbytes for parameter in model.parameters()), free_bytes(work_folder)
    if needed_bytes > available_bytes:
        raise ConfigError(
            "LocalDiskTooSmall", f"the merged model has {needed_bytes / 1e9:.2f} GB, but the pod's disk has only {available_bytes / 1e9:.2f} GB left",
            hint="raise resources.ephemeralStorage",
        )  # fmt: skip


def _write_merged_model(model: Any, run: RunConfig, inputs: Inputs, task: StageTask, target_folder: Path) -> None:
    """Write the model in shards. Copy the tokenizer and the generation settings from the adapter's folder, and adapt the adapter's card."""
    from transformers import GenerationConfig

    if (task.model / GENERATION_FILE).exists():
        # These empty settings are a placeholder, because transformers refuses to save the generation settings of some base models. The adapter's file
        # replaces the placeholder below.
        model.generation_config = GenerationConfig()
    model.save_pretrained(target_folder, max_shard_size=SHARD_SIZE)
    copied_files = [path for path in task.model.iterdir() if path.is_file() and not any(path.match(pattern) for pattern in ADAPTER_FILES)]
    if run.spec.model.trust_remote_code:
        copied_files += inputs.model.glob("*.py")
    for path in copied_files:
        shutil.copyfile(path, target_folder / path.name)
    copy_end_tokens_to_model_config(target_folder)
    card_file = target_folder / CARD_FILE
    if card_file.exists():
        card_file.write_text(build_merged_card(card_file.read_text(encoding="utf-8")), encoding="utf-8")
