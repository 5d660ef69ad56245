"""The open logging window: written by each rank, taken back bit by bit, and shared out where the ranks are others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.checkpoint.window import Window  # noqa: E402 - torch first: without it there is nothing to test


def trainer(loss: float = 0.0, *, since: int = 0, **fields: Any) -> Any:
    return SimpleNamespace(_tr_loss=torch.tensor(loss), _globalstep_last_logged=since, **fields)


def test_the_same_bits_come_back(tmp_path: Path) -> None:
    """Thirds have no end in decimals or in bits: what was rounded once must not be rounded again."""
    third = torch.tensor(1.0) / 3
    first = trainer(
        since=20, _sums={"train": {"nll": third, "learned": torch.tensor(11)}}, _metrics={"train": {"a": [third, 2]}}
    )
    first._tr_loss = third + third
    Window(first, 0, 1).write(tmp_path)
    second = trainer(since=23, _sums={"train": {}}, _metrics={"train": {}})
    Window(second, 0, 1).read(tmp_path)
    assert torch.equal(second._tr_loss + third, third + third + third)
    assert second._globalstep_last_logged == 20
    assert second._sums["train"]["nll"] + third == third + third and second._sums["train"]["learned"] == 11
    assert second._metrics["train"] == {"a": [third.item(), 2]}


def test_each_rank_takes_its_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        Window(trainer(1.0 + rank), rank, 2).write(tmp_path)
    for rank in (0, 1):
        again = trainer()
        Window(again, rank, 2).read(tmp_path)
        assert again._tr_loss.item() == 1.0 + rank


def test_other_ranks_share_what_all_had(tmp_path: Path) -> None:
    for rank in range(4):
        Window(trainer(float(rank), _sums={"train": {"tokens": 10}}), rank, 4).write(tmp_path)
    found = [trainer(_sums={"train": {}}) for _ in range(2)]
    for rank, one in enumerate(found):
        Window(one, rank, 2).read(tmp_path)
    assert [one._tr_loss.item() for one in found] == [1.5, 1.5], "the mean over ranks stays"
    assert [one._sums["train"] for one in found] == [{"tokens": 40}, {}], "the sum over ranks stays"


def test_a_checkpoint_without_any_begins_a_new_window(tmp_path: Path) -> None:
    fresh = trainer(0.5, since=7)
    Window(fresh, 0, 1).read(tmp_path)
    assert (fresh._tr_loss.item(), fresh._globalstep_last_logged) == (0.5, 7)


def test_a_trainer_that_counts_tokens_itself_goes_on_counting(tmp_path: Path) -> None:
    Window(trainer(_total_train_tokens=123), 0, 1).write(tmp_path)
    again = trainer(_total_train_tokens=0)
    Window(again, 0, 1).read(tmp_path)
    assert again._total_train_tokens == 123
