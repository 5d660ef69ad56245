"""Each usual mistake gets a message that says what was given, why this is refused, and what to write instead."""

from __future__ import annotations

import pytest

from tests.unit.cli.mistakes import Row, list_messages_about, read_rows

ROWS = read_rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.text)
def test_mistake_gets_its_message(row: Row) -> None:
    assert list_messages_about(row.text) == row.messages


def test_no_mistake_passes_without_a_message() -> None:
    assert len(ROWS) == len({row.text for row in ROWS}) >= 60
    assert [row.text for row in ROWS if not row.messages] == []


def test_every_message_says_what_to_write() -> None:
    """If a message has no hint about what to write, the message itself must list the allowed values."""
    messages_without_hint = [message for row in ROWS for message in row.messages if "; " not in message and "should be '" not in message]
    assert messages_without_hint == []
