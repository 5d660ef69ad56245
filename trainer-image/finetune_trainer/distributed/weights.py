"""Loads the weights of a plain checkpoint folder into a sharded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import NoCheckpointError


def load_into_fsdp(model: Any, folder: Path, is_reader: bool) -> None:
    """Load the weights into an FSDP model. Only the rank with `is_reader` reads the folder; it sends the weights to the other ranks.

    Errors: NoCheckpointError CheckpointForeign if the weights in the folder are not those that this run trains.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = _read_state(model, folder, is_reader)
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def load_into_deepspeed(model: Any, folder: Path, is_reader: bool) -> None:
    """Load the weights into a DeepSpeed model: gather each parameter, set it on the reading rank, and shard it again.

    The optimizer states do not change, so the model can be saved but not trained afterwards. Errors: those of `load_into_fsdp`.
    """
    import deepspeed

    state = _read_state(model, folder, is_reader)
    trained = set(saved_names(model).values())
    for name, parameter in model.named_parameters():
        if name not in trained:
            continue
        is_sharded = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=is_sharded), torch.no_grad():
            if is_reader and name in state:
                parameter.data.copy_(state[name])
            if not is_sharded:
                torch.distributed.broadcast(parameter.data, 0)


def _read_state(model: Any, folder: Path, is_reader: bool) -> dict[str, Any]:
    """Return the tensors by their names in the model. Ranks that do not read the folder get an empty dictionary.

    Every rank raises NoCheckpointError CheckpointForeign if the names in the folder and in the model differ.
    """
    names = saved_names(model)
    state: dict[str, Any] = {}
    mismatched_names: list[str] = []
    if is_reader:
        stored_weights = read_weights(folder)
        mismatched_names = sorted(set(stored_weights) ^ set(names) if hasattr(model, "peft_config") else set(stored_weights) - set(names))
        state = {names[name]: value for name, value in stored_weights.items() if name in names}
    mismatch_count = torch.tensor([len(mismatched_names)], device=next(model.parameters()).device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(mismatch_count, 0)
    if int(mismatch_count):
        raise NoCheckpointError(
            "CheckpointForeign", f"the checkpoint has other weights than this run trains{': ' + ', '.join(mismatched_names[:4]) if mismatched_names else ''}",
            hint="resume with the method, targets and model of the run that made the checkpoint",
        )  # fmt: skip
    return state


def saved_names(model: Any) -> dict[str, str]:
    """Map the names in a saved folder to the names in the model. PEFT omits the adapter's name when it saves."""
    placeholders = {name: torch.empty(0) for name in model.state_dict()}
    if not hasattr(model, "peft_config"):
        return {name: name for name in placeholders}
    from peft import get_peft_model_state_dict

    kept = get_peft_model_state_dict(model, state_dict=placeholders, save_embedding_layers=False)
    model_names = {id(value): name for name, value in placeholders.items()}
    return {saved: model_names[id(value)] for saved, value in kept.items()}


def read_weights(folder: Path) -> dict[str, Any]:
    """Read all tensors of a folder: one safetensors file, or several with an index. Errors: NoCheckpointError CheckpointIncomplete."""
    from safetensors.torch import load_file

    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return dict(load_file(folder / name))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise NoCheckpointError(
            "CheckpointIncomplete",
            f"{folder.name} holds neither weights nor an adapter",
            hint="resume from another step",
        )
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: value for part in parts for key, value in load_file(folder / part).items()}
