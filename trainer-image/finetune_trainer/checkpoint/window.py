"""Saves the sums of the current logging window in the checkpoint.

A logged loss is a mean over `tracking.loggingSteps` steps (the logging window), and a checkpoint may be saved within such a window. When transformers
resumes, it starts a new sum. A resumed run would then log a mean over fewer steps than an uninterrupted run. Each rank therefore writes its sums to
the checkpoint and restores them, so that both runs log the same values. Before a checkpoint is saved, the sums also show whether the loss is finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from finetune_api.base import LenientModel
from finetune_api.errors import DivergedError
from pydantic import Field

from finetune_trainer.library_internals import (
    last_logged_step,
    loss_sum,
    metric_lists,
    set_last_logged_step,
    set_trained_tokens,
    trained_tokens,
)

WINDOW_FILE = "window-{rank}.json"
TRAIN_MODE = "train"
STORED_SUM_NAMES = {"trained": "learned", "positions": "places", "correct_letters": "right"}
"""The stored name of each sum that was renamed after version 0.1.0. Checkpoints keep the old names, so that older and newer versions of the trainer
can read them."""
CURRENT_SUM_NAMES = {stored_name: name for name, stored_name in STORED_SUM_NAMES.items()}


class WindowSums(LenientModel):
    """The sums of one rank, as stored in a checkpoint. Floats in JSON keep every bit."""

    since: int = Field(description="Step of the last log line.")
    loss: float = Field(description="Sum of this rank's losses.")
    ours: dict[str, float | int] = Field(
        default_factory=dict, description="Sums of this package's trainer for sft, by name."
    )
    values: dict[str, list[float | int]] = Field(
        default_factory=dict, description="TRL's lists of metric values. A log line shows their means."
    )
    tokens: int = Field(default=0, description="TRL's token count since the start of the run.")


class LoggingWindow:
    """The sums of one rank's current logging window. transformers and TRL keep these sums in attributes of the trainer."""

    def __init__(self, trainer: Any, rank: int, world_size: int) -> None:
        self._trainer, self._rank, self._world_size = trainer, rank, world_size

    def write(self, checkpoint_folder: Path) -> None:
        """Write this rank's sums to a checkpoint."""
        trainer = self._trainer
        window_sums = WindowSums(
            since=last_logged_step(trainer), loss=loss_sum(trainer).item(),
            ours={STORED_SUM_NAMES.get(name, name): _to_number(value) for name, value in self._read_sums_of_this_rank().items()},
            values={name: [_to_number(value) for value in values] for name, values in self._get_trl_metric_lists().items()},
            tokens=trained_tokens(trainer),
        )  # fmt: skip
        checkpoint_folder.mkdir(exist_ok=True)
        (checkpoint_folder / WINDOW_FILE.format(rank=self._rank)).write_text(json.dumps(window_sums.to_wire()))

    def read(self, checkpoint_folder: Path) -> None:
        """Restore the sums from a checkpoint. If an earlier version saved the checkpoint without sums, the window starts empty."""
        files = sorted(checkpoint_folder.glob(WINDOW_FILE.format(rank="*")))
        all_sums = [WindowSums.model_validate(json.loads(file.read_text())) for file in files]
        if not all_sums:
            return
        own_file = checkpoint_folder / WINDOW_FILE.format(rank=self._rank)
        if len(all_sums) == self._world_size and own_file in files:
            self._restore_sums(all_sums[files.index(own_file)])
        else:  # If the number of ranks has changed, redistribute the sums, so that means and totals stay the same.
            self._restore_sums(_redistribute_sums(all_sums, is_first_rank=self._rank == 0))

    def _restore_sums(self, window_sums: WindowSums) -> None:
        trainer = self._trainer
        set_last_logged_step(trainer, window_sums.since)
        loss_sum(trainer).fill_(window_sums.loss)
        self._read_sums_of_this_rank().update({CURRENT_SUM_NAMES.get(name, name): value for name, value in window_sums.ours.items()})
        self._get_trl_metric_lists().update(window_sums.values)
        set_trained_tokens(trainer, window_sums.tokens)

    def _read_sums_of_this_rank(self) -> dict[str, Any]:
        sums_by_mode: dict[str, dict[str, Any]] = getattr(self._trainer, "_sums", {TRAIN_MODE: {}})
        return sums_by_mode[TRAIN_MODE]

    def _get_trl_metric_lists(self) -> MutableMapping[str, Any]:
        return metric_lists(self._trainer)

    def require_finite(self, model: Any, step: int) -> int:
        """Check that the loss and the weights of all ranks are finite. Returns the number of tokens of all ranks in the current window.

        A collective: every rank must call this method. Errors: DivergedError `LossNotFinite`, `WeightsNotFinite`.
        """
        loss, weight_norm = loss_sum(self._trainer), _compute_local_weight_norm(model)
        token_count = _to_number(self._read_sums_of_this_rank().get("tokens", 0))
        sums_over_ranks = torch.tensor(
            [float(not torch.isfinite(loss)), float(not math.isfinite(weight_norm)), token_count],
            dtype=torch.float64, device=self._trainer.args.device,
        )  # fmt: skip
        if self._world_size > 1:
            torch.distributed.all_reduce(sums_over_ranks)
        bad_loss_count, bad_weights_count, token_count = sums_over_ranks.tolist()
        hint = "lower training.learningRate, raise warmupSteps, or use bf16 instead of fp16"
        if bad_loss_count:
            raise DivergedError("LossNotFinite", f"the loss before step {step} is not finite", hint=hint)
        if bad_weights_count:
            raise DivergedError("WeightsNotFinite", f"the weights of step {step} are not all finite", hint=hint)
        return int(token_count)


def _redistribute_sums(all_sums: list[WindowSums], *, is_first_rank: bool) -> WindowSums:
    """Return the sums of one rank after the number of ranks has changed.

    Each rank gets the mean of the ranks' loss sums; the first rank also gets the totals of this package's other sums.
    """
    sum_names = {name for window_sums in all_sums for name in window_sums.ours} if is_first_rank else set()
    return WindowSums(
        since=all_sums[0].since, loss=sum(window_sums.loss for window_sums in all_sums) / len(all_sums),
        ours={name: sum(window_sums.ours.get(name, 0) for window_sums in all_sums) for name in sum_names},
        values=all_sums[0].values, tokens=all_sums[0].tokens,
    )  # fmt: skip


def _to_number(value: Any) -> float | int:
    return value.item() if isinstance(value, torch.Tensor) else value


def _compute_local_weight_norm(model: Any) -> float:
    """Return the norm of this rank's shard of the trained weights. The norm is not finite if any weight is not finite."""
    if model is None:
        return 0.0
    trained_weights = [getattr(weight, "_local_tensor", weight).detach() for weight in model.parameters() if weight.requires_grad]
    return float(torch.nn.utils.get_total_norm(trained_weights)) if trained_weights else 0.0
