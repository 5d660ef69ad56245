"""The last step is the last: resumed from its checkpoint, a run learns nothing more. transformers itself does one step too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer.engine import Guarded  # noqa: E402 - torch first: without it there is nothing to test
from transformers import Trainer, TrainingArguments  # noqa: E402 - likewise

LAST = 4
"""Of nine steps of an epoch: the run ends in its middle."""


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": (self.weight * x).square().mean()}


class Plain(Guarded):
    """Guarded without a strategy."""

    def create_accelerator_and_postprocess(self) -> None:
        Trainer.create_accelerator_and_postprocess(self)


def trained(kind: type[Trainer], folder: Path, resume: Path | None = None) -> tuple[int, float]:
    """Steps done and the weight at the end."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=LAST, save_steps=LAST, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = kind(model=Line(), args=args, train_dataset=[{"x": float(number)} for number in range(9)])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.state.global_step, trainer.model.weight.item()


def test_nothing_is_learned_after_the_last_step(tmp_path: Path) -> None:
    step, weight = trained(Plain, tmp_path)
    assert step == LAST
    assert trained(Plain, tmp_path / "again", tmp_path / f"checkpoint-{LAST}") == (LAST, weight)


def test_transformers_still_needs_to_be_told(tmp_path: Path) -> None:
    """When this fails, transformers looks before the step: `Guarded._run_epoch` can go."""
    trained(Trainer, tmp_path)
    step, _ = trained(Trainer, tmp_path / "again", tmp_path / f"checkpoint-{LAST}")
    assert step == LAST + 1
