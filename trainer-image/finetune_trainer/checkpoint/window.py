"""What has been summed up since the last log line, as a part of the checkpoint.

A logged loss is a mean over `tracking.loggingSteps` steps, and checkpoints and stops fall where they fall. transformers starts
a new sum when it resumes, so that a resumed run would log a mean over fewer steps than an undisturbed one. Here each rank puts
its sums into the checkpoint and takes them back: both log the same lines with the same numbers. The same sums tell whether
what is saved is finite, although it has not been logged yet.
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

FILE = "window-{rank}.json"
TRAIN = "train"


class Sums(LenientModel):
    """One rank's sums. Floats are written so that they come back as the same bits."""

    since: int = Field(description="Step of the last log line.")
    loss: float = Field(description="Sum of this rank's losses.")
    ours: dict[str, float | int] = Field(default_factory=dict, description="Sums of our supervised trainer, by name.")
    values: dict[str, list[float | int]] = Field(
        default_factory=dict, description="TRL's lists, averaged at a log line."
    )
    tokens: int = Field(default=0, description="TRL's own count of tokens, over the whole run.")


class Window:
    """One rank's open window, in the fields that transformers and TRL keep it in."""

    def __init__(self, trainer: Any, rank: int, world_size: int) -> None:
        self._trainer, self._rank, self._world_size = trainer, rank, world_size

    def write(self, folder: Path) -> None:
        """Put this rank's sums into a checkpoint."""
        trainer = self._trainer
        sums = Sums(
            since=last_logged_step(trainer), loss=loss_sum(trainer).item(),
            ours={name: _number(value) for name, value in self._ours().items()},
            values={name: [_number(one) for one in values] for name, values in self._values().items()},
            tokens=trained_tokens(trainer),
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / FILE.format(rank=self._rank)).write_text(json.dumps(sums.to_wire()))

    def read(self, folder: Path) -> None:
        """Go on with the sums of a checkpoint; one that has none (made by an earlier version) begins anew."""
        files = sorted(folder.glob(FILE.format(rank="*")))
        found = [Sums.model_validate(json.loads(file.read_text())) for file in files]
        if not found:
            return
        own = folder / FILE.format(rank=self._rank)
        if len(found) == self._world_size and own in files:
            self._set(found[files.index(own)])
        else:  # another number of ranks: what all had together, split so that means and totals stay
            self._set(_shared(found, first=self._rank == 0))

    def _set(self, sums: Sums) -> None:
        trainer = self._trainer
        set_last_logged_step(trainer, sums.since)
        loss_sum(trainer).fill_(sums.loss)
        self._ours().update(sums.ours)
        self._values().update(sums.values)
        set_trained_tokens(trainer, sums.tokens)

    def _ours(self) -> dict[str, Any]:
        kept: dict[str, dict[str, Any]] = getattr(self._trainer, "_sums", {TRAIN: {}})
        return kept[TRAIN]

    def _values(self) -> MutableMapping[str, Any]:
        return metric_lists(self._trainer)

    def settle(self, model: Any, step: int) -> int:
        """Tokens of the open window over all ranks, once all agree that what they are about to save is finite.

        Every rank calls it at the same time. Errors: DivergedError LossNotFinite, WeightsNotFinite.
        """
        loss, weights = loss_sum(self._trainer), _norm(model)
        tokens = _number(self._ours().get("tokens", 0))
        facts = torch.tensor(
            [float(not torch.isfinite(loss)), float(not math.isfinite(weights)), tokens],
            dtype=torch.float64, device=self._trainer.args.device,
        )  # fmt: skip
        if self._world_size > 1:
            torch.distributed.all_reduce(facts)
        bad_loss, bad_weights, tokens = facts.tolist()
        hint = "lower training.learningRate, raise warmupSteps, or use bf16 instead of fp16"
        if bad_loss:
            raise DivergedError("LossNotFinite", f"the loss before step {step} is no finite number", hint=hint)
        if bad_weights:
            raise DivergedError("WeightsNotFinite", f"the weights of step {step} hold no finite numbers", hint=hint)
        return int(tokens)


def _shared(found: list[Sums], *, first: bool) -> Sums:
    """One rank's share where another number of ranks goes on: losses are averaged over ranks, sums are added up."""
    names = {name for one in found for name in one.ours} if first else set()
    return Sums(
        since=found[0].since, loss=sum(one.loss for one in found) / len(found),
        ours={name: sum(one.ours.get(name, 0) for one in found) for name in names},
        values=found[0].values, tokens=found[0].tokens,
    )  # fmt: skip


def _number(value: Any) -> float | int:
    return value.item() if isinstance(value, torch.Tensor) else value


def _norm(model: Any) -> float:
    """Norm of this rank's part of the trained weights: not finite if any of them is not."""
    if model is None:
        return 0.0
    trained = [getattr(one, "_local_tensor", one).detach() for one in model.parameters() if one.requires_grad]
    return float(torch.nn.utils.get_total_norm(trained)) if trained else 0.0
