"""Direct preference optimisation: the better answer of a pair becomes likelier than the worse one, relative to a reference."""

from __future__ import annotations

from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec.enums import DpoLoss
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from finetune_trainer.arguments import common
from finetune_trainer.distributed import connected
from finetune_trainer.engine import Guarded
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting
from finetune_trainer.objective.reference import Referenced, named_reference

MODEL_KIND = "causal"
LOSSES = {
    DpoLoss.SIGMOID: "sigmoid", DpoLoss.HINGE: "hinge", DpoLoss.IPO: "ipo", DpoLoss.EXO_PAIR: "exo_pair", DpoLoss.NCA_PAIR: "nca_pair",
    DpoLoss.ROBUST: "robust", DpoLoss.BCO_PAIR: "bco_pair", DpoLoss.APO_ZERO: "apo_zero", DpoLoss.APO_DOWN: "apo_down", DpoLoss.SFT: "sft",
}  # fmt: skip
SMOOTHED = (DpoLoss.ROBUST, DpoLoss.EXO_PAIR)
"""Losses that read the label smoothing."""


class Dpo(Guarded, Referenced, DPOTrainer):
    """TRL's trainer on pairs that the data room has tokenised."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Pairs."""
    return answers.pairs(setting)


def arguments(setting: Setting, *, evaluates: bool) -> DPOConfig:
    """TRL's configuration. Errors: ConfigError OptionWithoutEffect, LabelSmoothingMissing, LossTwice."""
    answers.only_for_sft(setting)
    spec = setting.run.spec.trainer.dpo or DpoSpec()
    losses = spec.loss_types or [DpoLoss.SIGMOID]
    return DPOConfig(
        **common(setting.run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates),
        beta=0.1 if spec.beta is None else spec.beta,
        loss_type=[LOSSES[loss] for loss in _checked(losses)],
        label_smoothing=_smoothing(losses, spec.label_smoothing or 0.0),
        max_length=None,
    )


def _checked(losses: list[DpoLoss]) -> list[DpoLoss]:
    twice = next((loss for loss in losses if losses.count(loss) > 1), None)
    if twice is not None:
        raise ConfigError("LossTwice", f"trainer.dpo.lossTypes names {twice} twice", hint="name every loss once")
    return losses


def _smoothing(losses: list[DpoLoss], asked: float) -> float:
    if asked and not any(loss in SMOOTHED for loss in losses):
        raise ConfigError(
            "OptionWithoutEffect", f"trainer.dpo.labelSmoothing is {asked:g}, and {', '.join(losses)} do not read it",
            hint="write `lossTypes: [robust]`, the loss for pairs that may be labelled the wrong way round, or remove it",
        )  # fmt: skip
    if not asked and DpoLoss.EXO_PAIR in losses:
        raise ConfigError(
            "LabelSmoothingMissing", "loss exoPair takes the logarithm of trainer.dpo.labelSmoothing, which is 0",
            hint="write `labelSmoothing: 0.001`",
        )  # fmt: skip
    return asked


def build(setting: Setting, args: DPOConfig, model: Any, parts: answers.Parts) -> Dpo:
    """The trainer, ready to run."""
    trainer: Dpo = connected(Dpo, setting.plan)(
        model=model, ref_model=named_reference(setting), args=args, train_dataset=parts.train, eval_dataset=parts.validation,
        processing_class=setting.tokenizer, callbacks=list(setting.callbacks),
    )  # fmt: skip
    return trainer
