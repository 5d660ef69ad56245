"""Loads the weights of a plain checkpoint folder into a sharded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import NoCheckpointError


def load_into_fsdp(model: Any, folder: Path, is_reader: bool) -> None:
    """Load the weights of the folder into an FSDP model. Only the rank whose `is_reader` is true reads the folder; the other ranks receive the weights.

    Errors: NoCheckpointError CheckpointForeign if the weights in the folder are not those that this run trains.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    tensors = _read_tensors(model, folder, is_reader)
    set_model_state_dict(
        model, tensors, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def load_into_deepspeed(model: Any, folder: Path, is_reader: bool) -> None:
    """Load the weights of the folder into a DeepSpeed model: gather each parameter, set it on the reading rank, and shard it again.

    The optimizer keeps its old copies of the weights. So the model can be saved after this call, but not trained. Errors: those of `load_into_fsdp`.
    """
    import deepspeed

    tensors = _read_tensors(model, folder, is_reader)
    trained_names = set(map_saved_names(model).values())
    for name, parameter in model.named_parameters():
        if name not in trained_names:
            continue
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=is_sharded), torch.no_grad():
            if is_reader and name in tensors:
                parameter.data.copy_(tensors[name])
            if not is_sharded:
                torch.distributed.broadcast(parameter.data, 0)


def _read_tensors(model: Any, folder: Path, is_reader: bool) -> dict[str, Any]:
    """Return the tensors of the folder by their names in the model. Ranks whose `is_reader` is false get an empty dictionary.

    Errors: NoCheckpointError CheckpointForeign in every rank if the names in the folder do not match the names in the model.
    """
    model_name_by_saved_name = map_saved_names(model)
    tensors: dict[str, Any] = {}
    mismatched_names: list[str] = []
    if is_reader:
        stored_weights = read_weights(folder)
        mismatched_names = sorted(
            set(stored_weights) ^ set(model_name_by_saved_name) if hasattr(model, "peft_config")
            else set(stored_weights) - set(model_name_by_saved_name)
        )
        tensors = {model_name_by_saved_name[name]: value for name, value in stored_weights.items() if name in model_name_by_saved_name}
    mismatch_count = torch.tensor([len(mismatched_names)], device=next(model.parameters()).device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(mismatch_count, 0)
    if int(mismatch_count):
        raise NoCheckpointError(
            "CheckpointForeign", f"the checkpoint has other weights than this run trains{': ' + ', '.join(mismatched_names[:4]) if mismatched_names else ''}",
            hint="resume with the method, targets and model of the run that made the checkpoint",
        )  # fmt: skip
    return tensors


def map_saved_names(model: Any) -> dict[str, str]:
    """Return the name in the model for each name in a saved folder. The names differ because PEFT leaves out the adapter's name when it saves."""
    placeholders = {name: torch.empty(0) for name in model.state_dict()}
    if not hasattr(model, "peft_config"):
        return {name: name for name in placeholders}
    from peft import get_peft_model_state_dict

    saved_tensors = get_peft_model_state_dict(model, state_dict=placeholders, save_embedding_layers=False)
    model_name_by_id = {id(value): name for name, value in placeholders.items()}
    return {saved_name: model_name_by_id[id(value)] for saved_name, value in saved_tensors.items()}


def read_weights(folder: Path) -> dict[str, Any]:
    """Return all tensors of a folder with one safetensors file, or with several and an index. Errors: NoCheckpointError CheckpointIncomplete."""
    from safetensors.torch import load_file

    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return dict(load_file(folder / name))
    index_file = folder / "model.safetensors.index.json"
    if not index_file.exists():
        raise NoCheckpointError(
            "CheckpointIncomplete",
            f"{folder.name} holds neither weights nor an adapter",
            hint="resume from another step",
        )
    file_names = sorted(set(json.loads(index_file.read_text())["weight_map"].values()))
    return {name: value for file_name in file_names for name, value in load_file(folder / file_name).items()}
