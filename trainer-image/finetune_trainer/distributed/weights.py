"""Weights of a plain checkpoint folder into a model whose parameters are in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import NoCheckpointError


def load_whole(model: Any, folder: Path, reader: bool) -> None:
    """Put the weights of a plain checkpoint folder into a sharded model; only the `reader` rank touches the disk.

    Errors: NoCheckpointError CheckpointForeign if the folder's names are not those that this run trains.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state = _stored(model, folder, reader)
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )


def load_gathered(model: Any, folder: Path, reader: bool) -> None:
    """The same for DeepSpeed: parameters are gathered one by one, set by the `reader` rank, and shared out again.

    Optimizer states stay as they are: this is for weights that are to be saved, not trained on. Errors: as `load_whole`.
    """
    import deepspeed

    state = _stored(model, folder, reader)
    trained = set(saved_names(model).values())
    for name, parameter in model.named_parameters():
        if name not in trained:
            continue
        sliced = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sliced), torch.no_grad():
            if reader and name in state:
                parameter.data.copy_(state[name])
            if not sliced:
                torch.distributed.broadcast(parameter.data, 0)


def _stored(model: Any, folder: Path, reader: bool) -> dict[str, Any]:
    """Name in the model -> tensor, on the reader; empty elsewhere. All ranks learn whether the names fit."""
    names = saved_names(model)
    state: dict[str, Any] = {}
    strange: list[str] = []
    if reader:
        stored = read_weights(folder)
        strange = sorted(set(stored) ^ set(names) if hasattr(model, "peft_config") else set(stored) - set(names))
        state = {names[name]: value for name, value in stored.items() if name in names}
    counted = torch.tensor([len(strange)], device=next(model.parameters()).device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(counted, 0)
    if int(counted):
        raise NoCheckpointError(
            "CheckpointForeign", f"the checkpoint has other weights than this run trains{': ' + ', '.join(strange[:4]) if strange else ''}",
            hint="resume with the method, targets and model that it was made with",
        )  # fmt: skip
    return state


def saved_names(model: Any) -> dict[str, str]:
    """Name in a saved folder -> name in the model. PEFT leaves the adapter's name out when it saves."""
    places = {name: torch.empty(0) for name in model.state_dict()}
    if not hasattr(model, "peft_config"):
        return {name: name for name in places}
    from peft import get_peft_model_state_dict

    kept = get_peft_model_state_dict(model, state_dict=places, save_embedding_layers=False)
    own = {id(value): name for name, value in places.items()}
    return {saved: own[id(value)] for saved, value in kept.items()}


def read_weights(folder: Path) -> dict[str, Any]:
    """All tensors of a folder: one safetensors file, or several with an index. Errors: NoCheckpointError CheckpointIncomplete."""
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
