"""KTO: learn from single answers instead of pairs. Each answer is labelled good or bad."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from finetune_api.errors import DataError
from finetune_api.spec.enums import TrainerType
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import OwnDatasetPreparation
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import DataFacts, Objective, TrainingContext
from finetune_trainer.objective.reference_model import ReferenceModelMixin, load_reference_model


class KtoTrainer(GuardedTrainer, ReferenceModelMixin, OwnDatasetPreparation, KTOTrainer):
    """TRL's trainer for labelled answers that are already tokenised.

    KTO estimates the KL divergence from mismatched pairs: each prompt with the answer of the preceding row in the batch. The mismatched pairs are built once,
    before training, so the rows must keep their order during training. Therefore `load_data` shuffles the rows in advance.
    """

    def prepare_rows(self, rows: Dataset, args: KTOConfig, dataset_name: str) -> Dataset:
        """Add a mismatched answer to each row. `dataset_name`: if it is `train`, the batches have the size of training, otherwise the size of evaluation."""
        batch_size = args.per_device_train_batch_size if dataset_name == "train" else args.per_device_eval_batch_size
        return rows.map(_add_mismatched_answers, batched=True, batch_size=batch_size)


def _add_mismatched_answers(rows: dict[str, Any]) -> dict[str, Any]:
    """Add the answer of the preceding row to each prompt of a batch. The first prompt gets the answer of the last row."""
    completions = rows["completion_ids"]
    return {"KL_completion_ids": [completions[-1], *completions[:-1]]}


class KtoObjective(Objective[answers.Splits, KTOConfig]):
    """`trainer.type: kto`."""

    trainer_type = TrainerType.KTO
    trainer_class = KtoTrainer

    def load_data(self, context: TrainingContext) -> tuple[answers.Splits, DataFacts]:
        """Load the labelled answers and shuffle them. Errors: DataError OneSidedJudgement; errors of `load_rows`."""
        splits, facts = answers.load_rows(context, answers.RowLayout.LABELLED)
        good_count = sum(splits.train["label"])
        bad_count = len(splits.train) - good_count
        if not good_count or not bad_count:
            raise DataError(
                "OneSidedJudgement", f"all {len(splits.train)} answers are labelled {'good' if good_count else 'bad'}, but kto needs both labels",
                hint="give rows with both labels, or use trainer.type sft to learn from good answers alone",
            )  # fmt: skip
        facts.notes.append(f"train: {good_count} answers are labelled good, {bad_count} bad")
        splits.train = splits.train.shuffle(seed=context.run.spec.training.seed or 0)
        return splits, facts

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> KTOConfig:
        spec = context.run.spec.trainer.dpo or DpoSpec()
        argument_fields = shared_arguments(context.run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data)
        return KTOConfig(
            **{**argument_fields, "train_sampling_strategy": "sequential"},
            beta=0.1 if spec.beta is None else spec.beta,
            max_length=None,
        )

    def trainer_options(self, context: TrainingContext) -> dict[str, Any]:
        return {"ref_model": load_reference_model(context)}


OBJECTIVE = KtoObjective()
