"""Best-fit packing of rows into sequences."""

from __future__ import annotations

from finetune_trainer.data.pack import pack, padding_share
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 64), max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_row_is_packed_once_and_no_bin_is_overfull(lengths: list[int]) -> None:
    bins = pack(lengths, 64)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in bins)


def test_each_row_goes_into_the_fullest_bin_with_enough_space() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    lengths = [(17 * i) % 97 + 30 for i in range(2000)]
    bins = pack(lengths, 2048)
    assert padding_share(sum(lengths), len(bins), 2048) < 0.03
