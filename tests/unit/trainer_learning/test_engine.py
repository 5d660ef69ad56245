"""Guards of the Trainer that all objectives share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.engine import GuardedTrainer  # noqa: E402 - the module needs torch
from transformers import Trainer, TrainingArguments  # noqa: E402 - the module needs torch

LAST_STEP = 4
"""The epoch has nine steps, so the run ends in the middle of it."""


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": (self.weight * x).square().mean()}


class PlainGuardedTrainer(GuardedTrainer):
    """Without a distributed strategy."""

    def create_accelerator_and_postprocess(self) -> None:
        Trainer.create_accelerator_and_postprocess(self)


def train(kind: type[Trainer], folder: Path, resume: Path | None = None) -> tuple[int, float]:
    """Steps done and the weight at the end."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=LAST_STEP, save_steps=LAST_STEP, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = kind(model=Linear(), args=args, train_dataset=[{"x": float(number)} for number in range(9)])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.state.global_step, trainer.model.weight.item()


def test_resuming_at_the_last_step_trains_no_further(tmp_path: Path) -> None:
    step, weight = train(PlainGuardedTrainer, tmp_path)
    assert step == LAST_STEP
    assert train(PlainGuardedTrainer, tmp_path / "again", tmp_path / f"checkpoint-{LAST_STEP}") == (LAST_STEP, weight)


def test_transformers_itself_does_one_step_too_many(tmp_path: Path) -> None:
    """When this fails, transformers checks before the step, and `GuardedTrainer.run_epoch` can be removed."""
    train(Trainer, tmp_path)
    step, _ = train(Trainer, tmp_path / "again", tmp_path / f"checkpoint-{LAST_STEP}")
    assert step == LAST_STEP + 1
