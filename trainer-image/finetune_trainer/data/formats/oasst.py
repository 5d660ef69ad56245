"""Open Assistant trees (`oasst`): the best-ranked path from each root becomes one conversation.

A file may have flat rows (message_id, parent_id, role, text, rank) or nested trees (`prompt` with `replies`). Rank 0 is the best.
Messages without a rank come after ranked messages, in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.formats.base import Format, ReadOptions, try_to_read
from finetune_trainer.data.formats.turns import parse_conversation
from finetune_trainer.data.rows import Conversation, Example, RawRow, RowError

_COLUMNS_HINT = "write message_id, parent_id, role and text, or a tree: prompt {text, role, replies [...]}"
MessagePath = list[Mapping[str, Any]]


class Oasst(Format):
    """Trees of messages. `read_all` accepts flat rows and whole trees; `read` accepts only a row that holds a whole tree."""

    name = DatasetFormat.OASST

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        prompt = row.get("prompt")
        return ("message_id" in row and "parent_id" in row) or (isinstance(prompt, dict) and "replies" in prompt)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Conversation:
        """Convert the best path of one nested tree to a conversation."""
        return parse_conversation(list(_find_best_path_of_tree(row["prompt"])), options)

    def read_all(self, rows: Iterable[RawRow], options: ReadOptions) -> Iterator[tuple[RawRow, Example | RowError]]:
        for row, path in best_paths(rows):
            yield row, path if isinstance(path, RowError) else try_to_read(parse_conversation, path, options)


def best_paths(rows: Iterable[RawRow]) -> Iterator[tuple[RawRow, MessagePath | RowError]]:
    """Yield the root row of each tree with the messages on the tree's best path. Yield an error for each message that has no root."""
    flat_rows_by_id: dict[str, RawRow] = {}
    for row in rows:
        columns = row.value
        if isinstance(columns.get("prompt"), Mapping):
            yield row, list(_find_best_path_of_tree(columns["prompt"]))
        elif "message_id" not in columns or "text" not in columns or "role" not in columns:
            present_columns = ", ".join(columns) or "no columns"
            yield row, RowError("ColumnMissing", f"the row is neither a tree nor a message; it has {present_columns}", _COLUMNS_HINT)
        elif (first_row := flat_rows_by_id.setdefault(str(columns["message_id"]), row)) is not row:
            message = f"message_id {columns['message_id']!r} is also the id of {first_row.location}"
            yield row, RowError("MessageIdTwice", message, "give each message its own id, or remove one of the two messages")
    yield from _find_paths_of_flat_rows(flat_rows_by_id)


def _find_paths_of_flat_rows(rows_by_id: Mapping[str, RawRow]) -> Iterator[tuple[RawRow, MessagePath | RowError]]:
    """Yield an error for each message without a root, then the best path from each root."""
    replies_by_parent: dict[str, list[RawRow]] = {}
    for row in rows_by_id.values():
        replies_by_parent.setdefault(_read_parent_id(row), []).append(row)
    roots = replies_by_parent.pop("", [])
    yielded_or_reachable_ids = {id(row) for root in roots for row in _list_messages_below(root, replies_by_parent)}
    for parent_id in [row_id for row_id in replies_by_parent if row_id not in rows_by_id]:
        error = RowError(
            "ParentMissing",
            f"no row has the parent_id {parent_id!r} as its message_id",
            "add the parent, or remove the reply",
        )
        for reply in replies_by_parent[parent_id]:
            yield reply, error
            for row in _list_messages_below(reply, replies_by_parent):
                yielded_or_reachable_ids.add(id(row))
                if row is not reply:
                    message = f"its ancestor {reply.location} has the parent_id {parent_id!r}, but no row has that message_id"
                    yield row, RowError("ParentMissing", message, "add the missing parent, or remove all replies below the missing parent")
    for row in rows_by_id.values():
        if id(row) not in yielded_or_reachable_ids:
            message = f"the chain of parents that starts at parent_id {_read_parent_id(row)!r} is a cycle"
            yield row, RowError("ParentsInCircle", message, "leave parent_id of each tree's first message empty")
    for root in roots:
        yield root, list(_find_best_path_of_rows(root, replies_by_parent))


def _read_parent_id(row: RawRow) -> str:
    """Return the id of the row's parent message; an empty text for a root."""
    parent = row.value.get("parent_id")
    return "" if parent is None else str(parent)


def _list_messages_below(root: RawRow, replies_by_parent: Mapping[str, list[RawRow]]) -> Iterator[RawRow]:
    """Yield the message and all messages below it. There are no cycles: ids are unique, and a root has no parent."""
    pending_rows = [root]
    while pending_rows:
        row = pending_rows.pop()
        yield row
        pending_rows += reversed(replies_by_parent.get(str(row.value["message_id"]), []))


def _find_best_path_of_rows(root: RawRow, replies_by_parent: Mapping[str, list[RawRow]]) -> Iterator[Mapping[str, Any]]:
    row: RawRow | None = root
    while row is not None:
        yield row.value
        direct_replies = replies_by_parent.get(str(row.value["message_id"]), [])
        row = min(direct_replies, key=lambda reply: _read_reply_rank(reply.value)) if direct_replies else None


def _find_best_path_of_tree(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    while True:
        yield node
        replies = [reply for reply in node.get("replies") or () if isinstance(reply, Mapping)]
        if not replies:
            return
        node = min(replies, key=_read_reply_rank)


def _read_reply_rank(message: Mapping[str, Any]) -> tuple[int, float]:
    """Return a sort key: ranked replies first, the best rank before the others."""
    rank = message.get("rank")
    return (0, float(rank)) if isinstance(rank, int | float) else (1, 0.0)
