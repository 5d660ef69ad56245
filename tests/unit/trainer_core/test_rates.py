"""Rates and settings of this attempt hold although the optimizer's state is another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.checkpoint.rates import keep_settings  # noqa: E402 - torch first: without it there is nothing to test
from transformers import get_cosine_schedule_with_warmup  # noqa: E402 - likewise


def made(rate: float, **settings: Any) -> tuple[Any, Any]:
    """An optimizer with two groups, the second with a sixteenth of the rate, and its scheduler."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": rate}, {"params": [weights[1]], "lr": rate / 16}]
    optimizer = torch.optim.AdamW(groups, lr=rate, **settings)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, 4, 40)


def run(optimizer: Any, scheduler: Any, steps: int) -> list[tuple[float, ...]]:
    rates = []
    for _ in range(steps):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    return rates


def resumed(tmp_path: Path, rate: float, **settings: Any) -> tuple[Any, Any]:
    """Ten steps at 1e-3, saved as the Trainer does, and taken over by another attempt."""
    before = made(1e-3)
    run(*before, 10)
    torch.save([one.state_dict() for one in before], tmp_path / "state")
    after = made(rate, **settings)

    def load() -> None:
        for one, state in zip(after, torch.load(tmp_path / "state", weights_only=True), strict=True):
            one.load_state_dict(state)

    keep_settings(*after, load)
    return after


@pytest.mark.parametrize("rate", [5e-4, 2e-3])
def test_another_rate_holds_from_the_first_step_on(tmp_path: Path, rate: float) -> None:
    undisturbed = run(*made(rate), 20)
    found = run(*resumed(tmp_path, rate), 10)
    assert found == [pytest.approx(one, rel=1e-12) for one in undisturbed[10:]]


def test_the_same_rate_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    assert run(*resumed(tmp_path, 1e-3), 10) == run(*made(1e-3), 20)[10:]


def test_other_settings_hold_and_the_state_is_the_checkpoints(tmp_path: Path) -> None:
    optimizer, _ = resumed(tmp_path, 1e-3, weight_decay=0.25, betas=(0.5, 0.75))
    assert [(one["weight_decay"], one["betas"]) for one in optimizer.param_groups] == [(0.25, (0.5, 0.75))] * 2
    assert [float(one["step"]) for one in optimizer.state.values()] == [10.0, 10.0]


def test_a_scheduler_without_base_rates_keeps_what_it_loads() -> None:
    keep_settings(None, object(), lambda: None)
