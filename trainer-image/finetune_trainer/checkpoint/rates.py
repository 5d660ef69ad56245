"""Loads the states of optimizer and scheduler from a checkpoint, but keeps the current settings, such as the learning rate.

Optimizers and schedulers save their settings with their state, and loading restores both. Without this module, the old settings
would silently replace the new ones after a rollback with a smaller learning rate, or when resuming from another job's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KEPT_SETTINGS = ("betas", "eps", "weight_decay")
"""Keys of a parameter group that are settings. Other keys, such as a schedule-free optimizer's sums, are state."""


def load_states_keeping_settings(optimizer: Any, scheduler: Any, load_states: Callable[[], None]) -> None:
    """Run `load_states`, then restore the current settings. (`load_states` replaces states and settings of optimizer and scheduler.)

    A scheduler without base rates (such as ReduceLROnPlateau) keeps the loaded settings.
    """
    base_rates = list(getattr(scheduler, "base_lrs", ()))
    settings = [{name: group[name] for name in KEPT_SETTINGS if name in group} for group in _groups(optimizer)]
    load_states()
    for group, before in zip(_groups(optimizer), settings, strict=True):
        group.update({name: value for name, value in before.items() if group.get(name) != value})
    loaded_rates = getattr(scheduler, "base_lrs", ())
    for number, (old, new) in enumerate(zip(loaded_rates, base_rates, strict=True)):
        if old != new and old:
            _scale_rates(_groups(optimizer)[number], scheduler, number, new, new / old)


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return getattr(optimizer, "param_groups", None) or []


def _scale_rates(group: dict[str, Any], scheduler: Any, number: int, base_rate: float, factor: float) -> None:
    scheduler.base_lrs[number] = base_rate
    scheduler._last_lr[number] *= factor
    group["initial_lr"] = base_rate
    group["lr"] *= factor
