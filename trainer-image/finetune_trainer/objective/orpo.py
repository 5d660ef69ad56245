"""ORPO: train on the better answer of a pair and lower the odds of the worse answer, with one loss and without a reference model."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from finetune_api.spec.enums import TrainerType
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.data.rows import IGNORED_LABEL
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import TEST_LOSS, TEST_PREFERENCE_ACCURACY, DataFacts, Objective, TrainingContext


class OrpoTrainer(GuardedTrainer, ORPOTrainer):
    """TRL's experimental trainer for pairs that are already tokenised."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Return the columns that TRL's collator expects. The columns are built from the row's token ids; TRL's own method would tokenise texts."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row |= {
                f"{side}_input_ids": prompt + answer, f"{side}_attention_mask": [1] * (len(prompt) + len(answer)),
                f"{side}_labels": [IGNORED_LABEL] * len(prompt) + answer,
            }  # fmt: skip
        return row

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> Any:
        """Evaluate. A test set first gets the collator's columns, because TRL adds them only to the data sets that the constructor receives."""
        if isinstance(eval_dataset, Dataset) and "prompt_input_ids" not in eval_dataset.column_names:
            eval_dataset = eval_dataset.map(self.tokenize_row)
        return super().evaluate(eval_dataset, *args, **options)


class OrpoObjective(Objective[answers.Splits, ORPOConfig]):
    """`trainer.type: orpo`."""

    trainer_type = TrainerType.ORPO
    trainer_class = OrpoTrainer
    held_out_metrics = (TEST_LOSS, TEST_PREFERENCE_ACCURACY)

    def load_data(self, context: TrainingContext) -> tuple[answers.Splits, DataFacts]:
        return answers.load_rows(context, answers.RowLayout.PAIRS_WITH_TEXTS)

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> ORPOConfig:
        run, spec = context.run, context.run.spec.trainer.dpo or DpoSpec()
        return ORPOConfig(
            **shared_arguments(run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data),
            beta=0.1 if spec.beta is None else spec.beta, max_length=answers.length_limits(context).max_row_length,
            remove_unused_columns=False,
        )  # fmt: skip


OBJECTIVE = OrpoObjective()
