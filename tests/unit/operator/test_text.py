"""Text for users contains no secrets and no control characters, and its length is limited."""

from __future__ import annotations

import sys

import pytest
from finetune_operator.text import clean, format_duration


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("AWS_SECRET_ACCESS_KEY=abcdefgh1234 x", "AWS_SECRET_ACCESS_KEY=[redacted] x"),
        ('{"password": "hunter22"}', '{"password": "[redacted]"}'),
        ("key AKIAABCDEFGHIJKLMNOP end", "key [redacted] end"),
        ("token hf_abcdefghijklmnopqrst", "token [redacted]"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer [redacted]"),
        ("https://user:secret@host/x", "https://[redacted]@host/x"),
        ("maxTokens = 500 and tokenizer: fine", "maxTokens = 500 and tokenizer: fine"),
        ("a\x00b\x1b[31m", "a b [31m"),
        ("MY_OTHER-api_key: abcdefgh, mytoken=abcd, my-token=abcd", "MY_OTHER-api_key: [redacted], mytoken=abcd, my-token=[redacted]"),
    ],
)
def test_secrets_and_control_characters_are_not_shown(text: str, shown_text: str) -> None:
    assert clean(text) == shown_text


def test_long_text_is_cut() -> None:
    assert len(clean("x" * 1_000_000)) == 1024


def test_cache_of_cleaned_texts_does_not_hold_long_texts() -> None:
    text = "y" * 1_000_000
    reference_count = sys.getrefcount(text)
    clean(text)
    assert sys.getrefcount(text) == reference_count


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (90, "1m30s"), (720, "12m"), (4320, "1h12m"), (7200, "2h"), (273600, "3d4h"), (-5, "0s")],
)
def test_durations_are_formatted(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
