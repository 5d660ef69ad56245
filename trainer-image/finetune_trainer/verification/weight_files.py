"""Reads safetensors files without torch: names, shapes and formats of tensors from the header, and whether values are finite or zero."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
BYTES_BY_FORMAT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIXTEEN_BIT_FORMATS = ("F16", "BF16")
EXPONENT_MASK_BY_FORMAT = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""Bit masks of the exponents of numbers, by format. A number is infinite or NaN if and only if all bits of its exponent are set."""
CHUNK_ITEMS = 1 << 22


class DamagedFileError(Exception):
    """A file is not a complete safetensors file. The message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the tensor's first byte in the file."""
    size: int
    """Size in bytes."""

    def is_finite(self) -> bool:
        """Whether no value is infinite or NaN. Always True for integers and 8-bit floats, whose values are not read."""
        mask = EXPONENT_MASK_BY_FORMAT.get(self.dtype)
        return mask is None or not any(bool(((chunk & mask) == mask).any()) for chunk in self._read_chunks())

    def is_zero(self) -> bool:
        """Whether all values are zero, with any sign."""
        mask = {8: 0x7FFFFFFFFFFFFFFF, 4: 0x7FFFFFFF, 2: 0x7FFF, 1: 0x7F}[BYTES_BY_FORMAT[self.dtype]]
        return not any(bool((chunk & mask).any()) for chunk in self._read_chunks())

    def _read_chunks(self) -> Any:
        """Yield the values in chunks, as unsigned integers with the same bits."""
        import numpy

        item_bytes = BYTES_BY_FORMAT[self.dtype]
        values = numpy.memmap(self.path, dtype=f"<u{item_bytes}", mode="r", offset=self.start, shape=(self.size // item_bytes,)) if self.size else []
        for start in range(0, len(values), CHUNK_ITEMS):
            yield values[start : start + CHUNK_ITEMS]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, by name. Errors: DamagedFileError if the file is truncated or its header is invalid."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if file_size < LENGTH_BYTES or header_size > min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
            raise DamagedFileError(f"{path.name} ends within its header")
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            raise DamagedFileError(f"the header of {path.name} is not JSON") from error
    data_start = LENGTH_BYTES + header_size
    tensors = {name: _parse_tensor(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    expected_size = max((tensor.start + tensor.size for tensor in tensors.values()), default=data_start)
    if expected_size != file_size:
        raise DamagedFileError(f"{path.name} has {file_size} bytes, but its header describes {expected_size}")
    return tensors


def _parse_tensor(path: Path, name: str, header_entry: Any, data_start: int) -> StoredTensor:
    try:
        (start_offset, end_offset), shape, dtype = header_entry["data_offsets"], tuple(map(int, header_entry["shape"])), str(header_entry["dtype"])
        if end_offset - start_offset != math.prod(shape) * BYTES_BY_FORMAT.get(dtype, 1) and dtype in BYTES_BY_FORMAT:
            raise DamagedFileError(f"{path.name}: the size of {name} does not match its shape")
        return StoredTensor(path, dtype, shape, data_start + int(start_offset), int(end_offset - start_offset))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"the header of {path.name} does not describe {name}") from error


def read_folder(folder: Path, file_name: str = "model.safetensors") -> dict[str, StoredTensor]:
    """Return all tensors in a model's folder, by name: those of the file `file_name` or, if it does not exist, of all files in its index.

    The result is empty if neither the file nor the index exists. Errors: DamagedFileError, for example if a file in the index is missing.
    """
    if (folder / file_name).exists():
        return read_header(folder / file_name)
    index_file = folder / f"{file_name}.index.json"
    if not index_file.exists():
        return {}
    try:
        weight_map: dict[str, str] = json.loads(index_file.read_text())["weight_map"]
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"{index_file.name} is not a valid index") from error
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).exists():
            raise DamagedFileError(f"{index_file.name} names {name}, which is missing")
        tensors |= read_header(folder / name)
    absent_names = sorted(set(weight_map) - set(tensors))
    if absent_names:
        raise DamagedFileError(f"{index_file.name} names {absent_names[0]}, which is in no file")
    return tensors


def has_16_bit_weights(folder: Path) -> bool:
    """Whether a model has weights that are stored in 16 bits. Errors: those of `read_folder`."""
    return any(tensor.dtype in SIXTEEN_BIT_FORMATS for tensor in read_folder(folder).values())
