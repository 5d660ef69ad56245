"""Open Assistant trees: the best-ranked path from each root becomes one conversation.

Two shapes: flat rows (message_id, parent_id, role, text, rank) and nested trees (`prompt` with `replies`). Rank 0 is best; a
message without a rank comes after those that have one, in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_trainer.data.rows import Raw, RowError

_WRITE = "write message_id, parent_id, role and text, or a tree: prompt {text, role, replies [...]}"


def paths(rows: Iterable[Raw]) -> Iterator[tuple[Raw, list[Mapping[str, Any]] | RowError]]:
    """Best path of every tree as a list of messages, with the row it starts at. A message without its parent is a bad row."""
    flat: dict[str, Raw] = {}
    children: dict[str, list[Raw]] = {}
    roots: list[Raw] = []
    for row in rows:
        value = row.value
        if isinstance(value.get("prompt"), Mapping):
            yield row, list(_nested(value["prompt"]))
        elif "message_id" not in value or "text" not in value or "role" not in value:
            yield (
                row,
                RowError(
                    "ColumnMissing", f"no tree and no message; there are {', '.join(value) or 'no columns'}", _WRITE
                ),
            )
        else:
            flat[str(value["message_id"])] = row
            parent = value.get("parent_id")
            if parent in (None, ""):
                roots.append(row)
            else:
                children.setdefault(str(parent), []).append(row)
    for parent, orphans in children.items():
        if parent not in flat:
            for row in orphans:
                yield (
                    row,
                    RowError(
                        "ParentMissing",
                        f"parent_id {parent!r} is the message_id of no row",
                        "add the parent, or remove the reply",
                    ),
                )
    for root in roots:
        yield root, list(_flat(root, children))


def _flat(root: Raw, children: Mapping[str, list[Raw]]) -> Iterator[Mapping[str, Any]]:
    row: Raw | None = root
    while row is not None:
        yield row.value
        replies = children.get(str(row.value["message_id"]), [])
        row = min(replies, key=lambda reply: _rank(reply.value)) if replies else None


def _nested(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    while True:
        yield node
        replies = [reply for reply in node.get("replies") or () if isinstance(reply, Mapping)]
        if not replies:
            return
        node = min(replies, key=_rank)


def _rank(message: Mapping[str, Any]) -> tuple[int, float]:
    rank = message.get("rank")
    return (0, float(rank)) if isinstance(rank, int | float) else (1, 0.0)
