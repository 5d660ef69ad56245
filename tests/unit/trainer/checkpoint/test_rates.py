"""When the optimizer's state is loaded from a checkpoint, the learning rate and the settings of this attempt stay in effect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.checkpoint.rates import load_states_keeping_settings  # noqa: E402 - torch first: without it there is nothing to test
from transformers import get_cosine_schedule_with_warmup  # noqa: E402 - likewise


def make_optimizer(rate: float, **settings: Any) -> tuple[Any, Any]:
    """Return an optimizer and its scheduler. The optimizer has two parameter groups; the rate of the second is a sixteenth of `rate`."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameter_groups = [{"params": [weights[0]], "lr": rate}, {"params": [weights[1]], "lr": rate / 16}]
    optimizer = torch.optim.AdamW(parameter_groups, lr=rate, **settings)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, 4, 40)


def train_steps(optimizer: Any, scheduler: Any, step_count: int) -> list[tuple[float, ...]]:
    rates = []
    for _ in range(step_count):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    return rates


def resume_with_rate(tmp_path: Path, new_rate: float, **settings: Any) -> tuple[Any, Any]:
    """Train ten steps at 1e-3, save the state as the Trainer does, and load it in another attempt with `new_rate`."""
    first_optimizer_and_scheduler = make_optimizer(1e-3)
    train_steps(*first_optimizer_and_scheduler, 10)
    torch.save([stateful.state_dict() for stateful in first_optimizer_and_scheduler], tmp_path / "state")
    resumed_optimizer_and_scheduler = make_optimizer(new_rate, **settings)

    def load_states() -> None:
        for stateful, state in zip(resumed_optimizer_and_scheduler, torch.load(tmp_path / "state", weights_only=True), strict=True):
            stateful.load_state_dict(state)

    load_states_keeping_settings(*resumed_optimizer_and_scheduler, load_states)
    return resumed_optimizer_and_scheduler


@pytest.mark.parametrize("rate", [5e-4, 2e-3])
def test_a_new_rate_applies_from_the_first_resumed_step(tmp_path: Path, rate: float) -> None:
    uninterrupted_rates = train_steps(*make_optimizer(rate), 20)
    resumed_rates = train_steps(*resume_with_rate(tmp_path, rate), 10)
    assert resumed_rates == [pytest.approx(rate_pair, rel=1e-12) for rate_pair in uninterrupted_rates[10:]]


def test_a_resume_with_the_same_rate_changes_no_bit(tmp_path: Path) -> None:
    assert train_steps(*resume_with_rate(tmp_path, 1e-3), 10) == train_steps(*make_optimizer(1e-3), 20)[10:]


def test_new_settings_apply_to_the_loaded_state(tmp_path: Path) -> None:
    optimizer, _ = resume_with_rate(tmp_path, 1e-3, weight_decay=0.25, betas=(0.5, 0.75))
    assert [(group["weight_decay"], group["betas"]) for group in optimizer.param_groups] == [(0.25, (0.5, 0.75))] * 2
    assert [float(state["step"]) for state in optimizer.state.values()] == [10.0, 10.0]


def test_a_scheduler_without_base_rates_keeps_the_loaded_rates() -> None:
    """A scheduler such as ReduceLROnPlateau has no base rates, so the rate of this attempt cannot replace the loaded rate."""
    optimizer, _ = make_optimizer(1e-3)
    scheduler = SimpleNamespace(factor=0.5)

    def load_other_settings() -> None:
        scheduler.factor = 0.25
        for group in optimizer.param_groups:
            group.update(lr=4e-4, weight_decay=0.75)

    load_states_keeping_settings(optimizer, scheduler, load_other_settings)
    assert vars(scheduler) == {"factor": 0.25}
    assert [group["lr"] for group in optimizer.param_groups] == [4e-4, 4e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01], (
        "AdamW's own default is restored"
    )
