"""Direct preference optimisation: the better answer of a pair becomes likelier than the worse one, relative to a reference."""

from __future__ import annotations

from typing import Any

from finetune_api.spec.enums import DpoLoss
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from finetune_trainer.arguments import common
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import OwnDatasetPreparation
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting
from finetune_trainer.objective.reference import Referenced, named_reference

MODEL_KIND = "causal"
LOSSES = {
    DpoLoss.SIGMOID: "sigmoid", DpoLoss.HINGE: "hinge", DpoLoss.IPO: "ipo", DpoLoss.EXO_PAIR: "exo_pair", DpoLoss.NCA_PAIR: "nca_pair",
    DpoLoss.ROBUST: "robust", DpoLoss.BCO_PAIR: "bco_pair", DpoLoss.APO_ZERO: "apo_zero", DpoLoss.APO_DOWN: "apo_down", DpoLoss.SFT: "sft",
}  # fmt: skip


class Dpo(GuardedTrainer, Referenced, OwnDatasetPreparation, DPOTrainer):
    """TRL's trainer on pairs that the data room has tokenised."""


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Pairs."""
    return answers.pairs(setting)


def arguments(setting: Setting, *, evaluates: bool) -> DPOConfig:
    """TRL's configuration."""
    spec = setting.run.spec.trainer.dpo or DpoSpec()
    losses = spec.loss_types or [DpoLoss.SIGMOID]
    return DPOConfig(
        **common(setting.run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates),
        beta=0.1 if spec.beta is None else spec.beta,
        loss_type=[LOSSES[loss] for loss in losses],
        label_smoothing=spec.label_smoothing or 0.0,
        max_length=None,
    )


def build(setting: Setting, args: DPOConfig, model: Any, parts: answers.Parts) -> Dpo:
    """The trainer, ready to run."""
    trainer: Dpo = connected(Dpo, setting.plan)(
        model=model, ref_model=named_reference(setting), args=args, train_dataset=parts.train, eval_dataset=parts.validation,
        processing_class=setting.tokenizer, callbacks=list(setting.callbacks),
    )  # fmt: skip
    return trainer
