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
    """Best path of every tree as a list of messages, with the row it starts at. A message that no root leads to is a bad row."""
    flat: dict[str, Raw] = {}
    for row in rows:
        value = row.value
        if isinstance(value.get("prompt"), Mapping):
            yield row, list(_nested(value["prompt"]))
        elif "message_id" not in value or "text" not in value or "role" not in value:
            there = ", ".join(value) or "no columns"
            yield row, RowError("ColumnMissing", f"no tree and no message; there are {there}", _WRITE)
        elif (first := flat.setdefault(str(value["message_id"]), row)) is not row:
            found = f"message_id {value['message_id']!r} stands in {first.place}, too"
            yield row, RowError("MessageIdTwice", found, "give each message an id of its own, or remove one of the two")
    yield from _flat_paths(flat)


def _flat_paths(flat: Mapping[str, Raw]) -> Iterator[tuple[Raw, list[Mapping[str, Any]] | RowError]]:
    """Messages by their ids: those without a root first, then the best path from each root."""
    children: dict[str, list[Raw]] = {}
    for row in flat.values():
        children.setdefault(_parent(row), []).append(row)
    roots = children.pop("", [])
    seen = {id(row) for root in roots for row in _below(root, children)}
    for parent in [one for one in children if one not in flat]:
        error = RowError(
            "ParentMissing", f"parent_id {parent!r} is the message_id of no row", "add the parent, or remove the reply"
        )
        for reply in children[parent]:
            yield reply, error
            for row in _below(reply, children):
                seen.add(id(row))
                if row is not reply:
                    found = f"it answers, over others, {reply.place}, whose parent_id {parent!r} is the message_id of no row"
                    yield row, RowError("ParentMissing", found, "add that parent, or remove all replies below it")
    for row in flat.values():
        if id(row) not in seen:
            found = f"its parents, from parent_id {_parent(row)!r} on, answer each other in a circle"
            yield row, RowError("ParentsInCircle", found, "leave parent_id of a tree's first message empty")
    for root in roots:
        yield root, list(_flat(root, children))


def _parent(row: Raw) -> str:
    """Id of the message that is answered; empty: none."""
    parent = row.value.get("parent_id")
    return "" if parent is None else str(parent)


def _below(root: Raw, children: Mapping[str, list[Raw]]) -> Iterator[Raw]:
    """A message and all that answer it, directly or not. Ends, since each message has one id and one parent, and the root none below it."""
    waiting = [root]
    while waiting:
        row = waiting.pop()
        yield row
        waiting += reversed(children.get(str(row.value["message_id"]), []))


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
