"""Converts 16-bit weight files to 32 bits once per pod, so that its ranks share one copy of the weights in the file cache.

torch maps a weight file into memory if it has the number format in which the model is loaded. Ranks then share the pages of the
file, and FSDP copies only each rank's shard out of it. If the formats differed, every rank would hold a converted copy of all
weights until they are sharded. Converting 16 bits to 32 bits is exact, so the loaded values are the same in both cases.

ZeRO-3 needs no conversion: in transformers, only rank 0 reads the values, and each weight is sharded when it is loaded.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_trainer.disk import free_bytes

log = logging.getLogger(__name__)
FOLDER = "float32-weights"
"""Name of the folder with the converted weights, in the pod's work folder. It exists only while the model is loaded."""
WEIGHT_FILES = "*.safetensors"
SIXTEEN_BIT_FORMATS = ("F16", "BF16")
"""Names of the number formats in safetensors files that are converted."""
DISK_RESERVE_BYTES = 256 * 1024 * 1024


@contextmanager
def float32_weights(model: Path, work: Path, *, converts: bool, wait_for_ranks: Callable[[], None]) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder to load the model from, and notes for the status. All ranks of all pods must enter the context.

    `converts`: whether this rank converts the weights for its pod; exactly one rank of each pod does. `wait_for_ranks` waits for all ranks.
    If the pod's disk is too small for the converted weights, the folder is `model`. `model` is not changed.
    """
    folder, notes = work / FOLDER, []
    if converts and not _convert(model, folder):
        notes.append("every rank loads all weights before they are sharded: the pod's disk has no space for 32-bit copies of the weight files")
    wait_for_ranks()
    try:
        yield (folder if folder.exists() else model), notes
        wait_for_ranks()  # all ranks have mapped the files, and keep them until the weights are sharded
    finally:
        if converts:
            shutil.rmtree(folder, ignore_errors=True)


def has_16_bit_weights(model: Path) -> bool:
    """Whether the model is stored in safetensors files with 16-bit numbers."""
    return any(name in SIXTEEN_BIT_FORMATS for file in model.glob(WEIGHT_FILES) for name, _ in _stored_formats(file).values())


def _convert(model: Path, folder: Path) -> bool:
    """Write the weights of `model` as 32-bit numbers to `folder`, with links to all other files. Returns False if the disk is too small."""
    weight_files = sorted(model.glob(WEIGHT_FILES))
    size = sum(_converted_size(shape, name) for file in weight_files for name, shape in _stored_formats(file).values())
    if free_bytes(folder.parent) < size + DISK_RESERVE_BYTES:
        return False
    partial = folder.with_name(folder.name + ".part")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in model.iterdir():
        if path in weight_files:
            write_as_float32(path, partial / path.name)
        else:
            (partial / path.name).symlink_to(path.resolve())
    partial.rename(folder)
    log.info("converted %d weight files to 32 bits (%d bytes)", len(weight_files), size)
    return True


def write_as_float32(source: Path, target: Path) -> None:
    """Copy a safetensors file, with 16-bit numbers as 32-bit numbers. Only one tensor at a time is in memory."""
    import torch
    from safetensors import safe_open

    formats = _stored_formats(source)
    with safe_open(source, framework="pt") as stored, target.open("wb") as file:
        header: dict[str, Any] = {"__metadata__": stored.metadata() or {"format": "pt"}}
        end = 0
        for name, (stored_format, shape) in formats.items():
            start, end = end, end + _converted_size(shape, stored_format)
            header[name] = {"dtype": _converted_format(stored_format), "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the numbers
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (stored_format, _) in formats.items():
            tensor = stored.get_tensor(name)
            converted = tensor.to(torch.float32) if stored_format in SIXTEEN_BIT_FORMATS else tensor
            file.write(converted.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _stored_formats(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Number format and shape of each tensor in a safetensors file, by its name."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 -- the object is no mapping
        return {name: (str(one.get_dtype()), list(one.get_shape())) for name, one in slices.items()}


def _converted_format(stored_format: str) -> str:
    return "F32" if stored_format in SIXTEEN_BIT_FORMATS else stored_format


def _converted_size(shape: list[int], stored_format: str) -> int:
    """Bytes of a converted tensor. The names of number formats contain the number of bits, except for booleans."""
    bits = "".join(character for character in _converted_format(stored_format).partition("_")[0] if character.isdigit())
    return math.prod(shape) * (int(bits or 8) // 8)
