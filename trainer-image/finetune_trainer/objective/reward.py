"""Reward modelling: train a model with a score head, so that the better answer of a pair gets a higher score than the worse answer."""

from __future__ import annotations

import json

from finetune_api.errors import ConfigError
from finetune_api.spec.enums import MethodType, TrainerType
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import TEST_LOSS, DataFacts, HeldOutMetric, Objective, TrainingContext


class RewardModelTrainer(GuardedTrainer, RewardTrainer):
    """TRL's trainer for pairs that are already tokenised."""


class RewardObjective(Objective[answers.Splits, RewardConfig]):
    """`trainer.type: reward`."""

    trainer_type = TrainerType.REWARD
    trainer_class = RewardModelTrainer
    model_kind = "reward"
    held_out_metrics = (TEST_LOSS, HeldOutMetric("accuracy", "testPreferenceAccuracy", "preference accuracy"))

    def load_data(self, context: TrainingContext) -> tuple[answers.Splits, DataFacts]:
        return answers.load_rows(context, answers.RowLayout.WHOLE_PAIRS)

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> RewardConfig:
        """Create TRL's configuration. Errors: ConfigError AdapterWithoutHead."""
        _require_score_head(context)
        argument_fields = shared_arguments(context.run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data)
        return RewardConfig(**argument_fields, max_length=None)


def _require_score_head(context: TrainingContext) -> None:
    """Refuse to continue an adapter that has no score head, because PEFT would not save a new head with this adapter.

    Errors: ConfigError AdapterWithoutHead.
    """
    folder = context.inputs.adapter
    if context.run.spec.method.type is not MethodType.ADAPTER or folder is None:
        return
    task_type = json.loads((folder / "adapter_config.json").read_text()).get("task_type")
    if task_type != "SEQ_CLS":
        raise ConfigError(
            "AdapterWithoutHead", f"method.adapter.source is an adapter for {task_type or 'an unnamed task'}, "
            "but a reward model needs an adapter with a score head",
            hint="write `method: {type: lora}` for a new adapter, or give an adapter from a job with trainer.type reward",
        )  # fmt: skip


OBJECTIVE = RewardObjective()
