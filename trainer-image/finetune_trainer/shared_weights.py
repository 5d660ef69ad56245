"""Converts 16-bit weight files to 32 bits once per pod, so that the pod's ranks share one copy of the weights in the file cache.

torch maps a weight file into memory if the file has the number format in which the model is loaded. Ranks then share the pages of the
file, and FSDP copies only each rank's shard out of it. Without the conversion, every rank would hold a converted copy of all weights until the
weights are sharded. The conversion from 16 to 32 bits is exact, so it does not change the loaded values.

ZeRO-3 needs no conversion: in transformers, only rank 0 reads the values, and each weight is sharded when it is loaded.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from finetune_trainer.disk import free_bytes
from finetune_trainer.verification.weight_files import SIXTEEN_BIT_FORMATS, StoredTensor, read_folder

log = logging.getLogger(__name__)
CONVERTED_FOLDER_NAME = "float32-weights"
"""Name of the folder with the converted weights, in the pod's work folder. The folder exists only while the model is being loaded."""
DISK_RESERVE_BYTES = 256 * 1024 * 1024


@contextmanager
def float32_weights(
    model_folder: Path, work_folder: Path, *, converts: bool, local_rank_0_first: AbstractContextManager[None], wait_for_ranks: Callable[[], None]
) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder to load the model from, and notes for the status. All ranks of all pods must enter the context.

    `converts`: whether this rank converts the weights for its pod; local rank 0 of each pod does. `local_rank_0_first`: a context
    manager that makes the other ranks wait until local rank 0 has run the block. Their wait has no time limit, because the conversion of a large
    model takes long. `wait_for_ranks` returns when all ranks have called it. If the pod's disk is too small for the converted weights, the yielded folder is
    `model_folder`, which is never changed.
    """
    folder, notes = work_folder / CONVERTED_FOLDER_NAME, []
    with local_rank_0_first:
        if converts and not _convert_model(model_folder, folder):
            notes.append("every rank loads all weights before they are sharded: the pod's disk has no space for 32-bit copies of the weight files")
    try:
        yield (folder if folder.exists() else model_folder), notes
        wait_for_ranks()  # When all ranks have mapped the files, the files can be removed: a rank keeps its mappings until it has sharded the weights.
    finally:
        if converts:
            shutil.rmtree(folder, ignore_errors=True)


def _convert_model(model_folder: Path, folder: Path) -> bool:
    """Write the weights of `model_folder` as 32-bit numbers to `folder`, with links to all other files. Returns False if the disk is too small.

    Only the files that transformers loads are converted: `model.safetensors`, or the files that the index names. Some models contain their
    weights a second time in other files.
    """
    weights_by_file: dict[Path, dict[str, StoredTensor]] = {}
    for name, tensor in read_folder(model_folder).items():
        weights_by_file.setdefault(tensor.path, {})[name] = tensor
    needed_bytes = sum(_compute_converted_bytes(tensor) for weights in weights_by_file.values() for tensor in weights.values())
    partial_folder = folder.with_name(folder.name + ".part")
    for leftover_folder in (partial_folder, folder):
        shutil.rmtree(leftover_folder, ignore_errors=True)
    if free_bytes(folder.parent) < needed_bytes + DISK_RESERVE_BYTES:
        return False
    partial_folder.mkdir(parents=True)
    for path in model_folder.iterdir():
        if path in weights_by_file:
            write_as_float32(path, weights_by_file[path], partial_folder / path.name)
        else:
            (partial_folder / path.name).symlink_to(path.resolve())
    partial_folder.rename(folder)
    log.info("converted %d weight files to 32 bits (%d bytes)", len(weights_by_file), needed_bytes)
    return True


def write_as_float32(source_file: Path, weights: Mapping[str, StoredTensor], target_file: Path) -> None:
    """Copy a safetensors file, and convert 16-bit numbers to 32-bit numbers. Only one tensor at a time is in memory.

    `weights`: the tensors of the file, by name.
    """
    import torch
    from safetensors import safe_open

    with safe_open(source_file, framework="pt") as source_tensors, target_file.open("wb") as file:
        header: dict[str, Any] = {"__metadata__": source_tensors.metadata() or {"format": "pt"}}
        end_offset = 0
        for name, tensor in weights.items():
            start, end_offset = end_offset, end_offset + _compute_converted_bytes(tensor)
            dtype = "F32" if tensor.dtype in SIXTEEN_BIT_FORMATS else tensor.dtype
            header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end_offset]}
        header_bytes = json.dumps(header).encode()
        header_bytes += b" " * (-len(header_bytes) % 8)  # the file format aligns the start of the values to 8 bytes
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for name, tensor in weights.items():
            stored_values = source_tensors.get_tensor(name)
            converted_values = stored_values.to(torch.float32) if tensor.dtype in SIXTEEN_BIT_FORMATS else stored_values
            file.write(converted_values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _compute_converted_bytes(tensor: StoredTensor) -> int:
    return tensor.size * 2 if tensor.dtype in SIXTEEN_BIT_FORMATS else tensor.size
