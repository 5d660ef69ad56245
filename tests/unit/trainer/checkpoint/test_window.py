"""Each rank saves and restores its sums of the current logging window. If the number of ranks changes, the sums are redistributed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.checkpoint.window import LoggingWindow  # noqa: E402 - torch first: without it there is nothing to test


def make_trainer(loss: float = 0.0, *, last_logged_step: int = 0, **fields: Any) -> Any:
    return SimpleNamespace(_tr_loss=torch.tensor(loss), _globalstep_last_logged=last_logged_step, **fields)


def test_the_sums_are_restored_bit_by_bit(tmp_path: Path) -> None:
    """One third has no exact binary or decimal form. Writing and reading a sum must not round the sum again."""
    one_third = torch.tensor(1.0) / 3
    saved_trainer = make_trainer(
        last_logged_step=20, _sums={"train": {"nll": one_third, "trained": torch.tensor(11)}}, _metrics={"train": {"a": [one_third, 2]}}
    )
    saved_trainer._tr_loss = one_third + one_third
    LoggingWindow(saved_trainer, 0, 1).write(tmp_path)
    restored_trainer = make_trainer(last_logged_step=23, _sums={"train": {}}, _metrics={"train": {}})
    LoggingWindow(restored_trainer, 0, 1).read(tmp_path)
    assert torch.equal(restored_trainer._tr_loss + one_third, one_third + one_third + one_third)
    assert restored_trainer._globalstep_last_logged == 20
    assert restored_trainer._sums["train"]["nll"] + one_third == one_third + one_third and restored_trainer._sums["train"]["trained"] == 11
    assert restored_trainer._metrics["train"] == {"a": [one_third.item(), 2]}


def test_windows_are_exchanged_with_version_0_1_0_in_both_directions(tmp_path: Path) -> None:
    """Both versions must restore the numbers of correct and of trained tokens: their quotient is wrong if the two numbers cover different steps."""
    sums = {"correct": 3, "trained": 4, "positions": 9, "tokens": 8, "letters": 2, "correct_letters": 1}
    stored_sums = {"correct": 3, "learned": 4, "places": 9, "tokens": 8, "letters": 2, "right": 1}
    LoggingWindow(make_trainer(_sums={"train": dict(sums)}), 0, 1).write(tmp_path)
    assert json.loads((tmp_path / "window-0.json").read_text())["ours"] == stored_sums
    restored_trainer = make_trainer(_sums={"train": {}})
    LoggingWindow(restored_trainer, 0, 1).read(tmp_path)
    assert restored_trainer._sums["train"] == sums


def test_each_rank_restores_its_own_sums(tmp_path: Path) -> None:
    for rank in (0, 1):
        LoggingWindow(make_trainer(1.0 + rank), rank, 2).write(tmp_path)
    for rank in (0, 1):
        restored_trainer = make_trainer()
        LoggingWindow(restored_trainer, rank, 2).read(tmp_path)
        assert restored_trainer._tr_loss.item() == 1.0 + rank


def test_another_number_of_ranks_redistributes_the_sums(tmp_path: Path) -> None:
    for rank in range(4):
        LoggingWindow(make_trainer(float(rank), _sums={"train": {"tokens": 10}}), rank, 4).write(tmp_path)
    restored_trainers = [make_trainer(_sums={"train": {}}) for _ in range(2)]
    for rank, restored_trainer in enumerate(restored_trainers):
        LoggingWindow(restored_trainer, rank, 2).read(tmp_path)
    assert [restored_trainer._tr_loss.item() for restored_trainer in restored_trainers] == [1.5, 1.5], "the mean over ranks stays"
    assert [restored_trainer._sums["train"] for restored_trainer in restored_trainers] == [{"tokens": 40}, {}], "the sum over ranks stays"


def test_a_checkpoint_without_sums_starts_an_empty_window(tmp_path: Path) -> None:
    trainer = make_trainer(0.5, last_logged_step=7)
    LoggingWindow(trainer, 0, 1).read(tmp_path)
    assert (trainer._tr_loss.item(), trainer._globalstep_last_logged) == (0.5, 7)


def test_the_token_count_of_trl_is_restored(tmp_path: Path) -> None:
    LoggingWindow(make_trainer(_total_train_tokens=123), 0, 1).write(tmp_path)
    restored_trainer = make_trainer(_total_train_tokens=0)
    LoggingWindow(restored_trainer, 0, 1).read(tmp_path)
    assert restored_trainer._total_train_tokens == 123
