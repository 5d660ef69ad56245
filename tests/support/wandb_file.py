"""Reads a `.wandb` file with W&B's own message classes.

The file has LevelDB's log format: blocks of 32 KiB, and records that are stored in one piece or in several.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 32768
HEADER_BYTES = 7
MAGIC = b":W&B"
FULL, FIRST, LAST = 1, 2, 4


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of the file, in order."""
    record_class = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data = path.read_bytes()
    assert data[:4] == MAGIC, "not a file of W&B"
    position, record = HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        bytes_left = BLOCK_BYTES - position % BLOCK_BYTES
        if bytes_left < HEADER_BYTES:
            position += bytes_left
            continue
        length, piece_type = struct.unpack("<HB", data[position + 4 : position + HEADER_BYTES])
        piece = data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        record = piece if piece_type in (FULL, FIRST) else record + piece
        position += HEADER_BYTES + length
        if piece_type in (FULL, LAST):
            yield record_class.FromString(record)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows, each with its step as `_step`."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def read_summary(path: Path) -> dict[str, Any]:
    """Return the values of the run's summary."""
    summary = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") == "summary":
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
    return summary
