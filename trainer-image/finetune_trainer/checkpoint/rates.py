"""Loads the state of the optimizer and of the scheduler from a checkpoint, but keeps the current settings, such as the learning rate.

Optimizers and schedulers save their settings with their state, and loading a checkpoint restores both. Without this module, the old settings
would silently replace the new ones after a rollback with a smaller learning rate, or when resuming from another job's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KEPT_SETTINGS = ("betas", "eps", "weight_decay")
"""Keys of an optimizer's parameter group whose values are settings. Other keys, such as a schedule-free optimizer's sums, hold state."""


def load_states_keeping_settings(optimizer: Any, scheduler: Any, load_states: Callable[[], None]) -> None:
    """Run `load_states`, which loads state and settings of the optimizer and the scheduler, and then restore the settings that were in effect before.

    A scheduler without base rates, such as ReduceLROnPlateau, keeps the learning rate of the checkpoint.
    """
    current_rates = list(getattr(scheduler, "base_lrs", ()))
    settings_by_group = [{name: group[name] for name in KEPT_SETTINGS if name in group} for group in _list_parameter_groups(optimizer)]
    load_states()
    for group, group_settings in zip(_list_parameter_groups(optimizer), settings_by_group, strict=True):
        group.update({name: value for name, value in group_settings.items() if group.get(name) != value})
    loaded_rates = getattr(scheduler, "base_lrs", ())
    for index, (loaded_rate, current_rate) in enumerate(zip(loaded_rates, current_rates, strict=True)):
        if loaded_rate != current_rate and loaded_rate:
            _scale_rates(_list_parameter_groups(optimizer)[index], scheduler, index, current_rate, current_rate / loaded_rate)


def _list_parameter_groups(optimizer: Any) -> list[dict[str, Any]]:
    return getattr(optimizer, "param_groups", None) or []


def _scale_rates(parameter_group: dict[str, Any], scheduler: Any, index: int, base_rate: float, factor: float) -> None:
    """Set the base learning rate of the parameter group with this index, and multiply the group's current learning rate by `factor`."""
    scheduler.base_lrs[index] = base_rate
    scheduler._last_lr[index] *= factor
    parameter_group["initial_lr"] = base_rate
    parameter_group["lr"] *= factor
