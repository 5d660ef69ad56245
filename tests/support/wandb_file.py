"""Reads a `.wandb` file with W&B's own message classes. Its frame is LevelDB's log format: blocks of 32 KiB with records in one or several parts."""

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
    """Yield the records of a run, in order."""
    record_class = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data = path.read_bytes()
    assert data[:4] == MAGIC, "not a file of W&B"
    position, record = HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER_BYTES])
        part = data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        record = part if kind in (FULL, FIRST) else record + part
        position += HEADER_BYTES + length
        if kind in (FULL, LAST):
            yield record_class.FromString(record)


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, with their step as `_step`."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def summary(path: Path) -> dict[str, Any]:
    """The values of the run's summary."""
    values = {}
    for record in read_records(path):
        if record.WhichOneof("record_type") == "summary":
            values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
    return values
