"""Reward modelling: a head with one number that scores the better answer of a pair above the worse one."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset
from finetune_api.errors import ConfigError
from finetune_api.spec.enums import MethodType
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from finetune_trainer.arguments import common
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting

MODEL_KIND = "reward"


class RewardModel(GuardedTrainer, RewardTrainer):
    """TRL's trainer on pairs that the data room has tokenised."""


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Pairs; a score is given to prompt and answer together."""
    parts, facts = answers.pairs(setting)
    return parts.mapped(_joined), facts


def _joined(pairs: Dataset) -> Dataset:
    def join(row: dict[str, Any]) -> dict[str, Any]:
        return {f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}

    return pairs.map(join, remove_columns=["prompt_ids"])


def arguments(setting: Setting, *, evaluates: bool) -> RewardConfig:
    """TRL's configuration. Errors: ConfigError AdapterWithoutHead."""
    _require_head(setting)
    fields = common(setting.run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates)
    return RewardConfig(**fields, max_length=None)


def _require_head(setting: Setting) -> None:
    """An adapter that was trained to write text has no head, and would be saved without the one that is trained here."""
    folder = setting.inputs.adapter
    if setting.run.spec.method.type is not MethodType.ADAPTER or folder is None:
        return
    kind = json.loads((folder / "adapter_config.json").read_text()).get("task_type")
    if kind != "SEQ_CLS":
        raise ConfigError(
            "AdapterWithoutHead", f"method.adapter.source is an adapter for {kind or 'an unnamed task'}, without the head that a reward model needs",
            hint="write `method: {type: lora}` for a new adapter, or give one that trainer.type reward made",
        )  # fmt: skip


def build(setting: Setting, args: RewardConfig, model: Any, parts: answers.Parts) -> RewardModel:
    """The trainer, ready to run."""
    trainer: RewardModel = connected(RewardModel, setting.plan)(
        model=model, args=args, train_dataset=parts.train, eval_dataset=parts.validation, processing_class=setting.tokenizer,
        callbacks=list(setting.callbacks),
    )  # fmt: skip
    return trainer
