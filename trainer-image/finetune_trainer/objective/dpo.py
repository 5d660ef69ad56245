"""Direct preference optimisation (DPO): raise the likelihood of the better answer against that of the worse answer, compared with a reference model."""

from __future__ import annotations

from typing import Any

from finetune_api.spec.enums import DpoLoss, TrainerType
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from finetune_trainer.arguments import shared_arguments
from finetune_trainer.data.vision import PairCollator
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import OwnDatasetPreparation
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import (
    TEST_LOSS,
    TEST_PREFERENCE_ACCURACY,
    TEST_TOKEN_ACCURACY,
    DataFacts,
    Objective,
    TrainingContext,
    image_arguments,
)
from finetune_trainer.objective.reference_model import ReferenceModelMixin, load_reference_model

TRL_LOSS_NAMES = {
    DpoLoss.SIGMOID: "sigmoid", DpoLoss.HINGE: "hinge", DpoLoss.IPO: "ipo", DpoLoss.EXO_PAIR: "exo_pair", DpoLoss.NCA_PAIR: "nca_pair",
    DpoLoss.ROBUST: "robust", DpoLoss.BCO_PAIR: "bco_pair", DpoLoss.APO_ZERO: "apo_zero", DpoLoss.APO_DOWN: "apo_down", DpoLoss.SFT: "sft",
}  # fmt: skip
"""TRL's name of each loss."""


class DpoTrainer(GuardedTrainer, ReferenceModelMixin, OwnDatasetPreparation, DPOTrainer):
    """TRL's trainer for pairs that are already tokenised."""


class DpoObjective(Objective[answers.Splits, DPOConfig]):
    """`trainer.type: dpo`."""

    trainer_type = TrainerType.DPO
    trainer_class = DpoTrainer
    held_out_metrics = (TEST_LOSS, TEST_TOKEN_ACCURACY, TEST_PREFERENCE_ACCURACY)

    def load_data(self, context: TrainingContext) -> tuple[answers.Splits, DataFacts]:
        return answers.load_rows(context, answers.RowLayout.PAIRS if context.vision is None else answers.RowLayout.PAIRS_WITH_IMAGES)

    def training_arguments(self, context: TrainingContext, *, has_validation_data: bool) -> DPOConfig:
        spec = context.run.spec.trainer.dpo or DpoSpec()
        loss_types = spec.loss_types or [DpoLoss.SIGMOID]
        shared_fields = shared_arguments(context.run, context.inputs, context.hardware, context.strategy, has_validation_data=has_validation_data)
        return DPOConfig(
            **shared_fields | image_arguments(context),
            beta=0.1 if spec.beta is None else spec.beta,
            loss_type=[TRL_LOSS_NAMES[loss] for loss in loss_types],
            label_smoothing=spec.label_smoothing or 0.0,
            max_length=None,
        )

    def trainer_options(self, context: TrainingContext) -> dict[str, Any]:
        options = {"ref_model": load_reference_model(context)}
        if context.vision is not None:
            options["data_collator"] = PairCollator(context.vision, int(context.tokenizer.pad_token_id))
        return options


OBJECTIVE = DpoObjective()
