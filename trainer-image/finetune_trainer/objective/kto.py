"""KTO: single answers, each judged good or bad, move the model without pairs."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from finetune_api.errors import DataError
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from finetune_trainer.arguments import common
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import OwnDatasetPreparation
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting
from finetune_trainer.objective.reference import Referenced, named_reference

MODEL_KIND = "causal"


class Kto(GuardedTrainer, Referenced, OwnDatasetPreparation, KTOTrainer):
    """TRL's trainer on judged answers that the data room has tokenised.

    How far the model has moved is estimated from prompts with the answers of their neighbours in the batch, so rows must keep
    their order through training; they are shuffled once, before.
    """

    def prepare_rows(self, rows: Dataset, args: KTOConfig, part: str) -> Dataset:
        """Add each row's neighbour."""
        size = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
        return rows.map(_neighbours, batched=True, batch_size=size)


def _neighbours(rows: dict[str, Any]) -> dict[str, Any]:
    """Each prompt with the answer of the row before it in the batch."""
    found = rows["completion_ids"]
    return {"KL_completion_ids": [found[-1], *found[:-1]]}


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Judged answers, shuffled. Errors: DataError OneSidedJudgement and those of `answers.judged`."""
    parts, facts = answers.judged(setting)
    wanted = sum(parts.train["label"])
    if wanted in (0, len(parts.train)):
        raise DataError(
            "OneSidedJudgement", f"all {len(parts.train)} answers are judged {'good' if wanted else 'bad'}: there is nothing to tell apart",
            hint="give rows of both labels, or use trainer.type sft for good answers alone",
        )  # fmt: skip
    facts.notes.append(f"train: {wanted} answers judged good, {len(parts.train) - wanted} bad")
    parts.train = parts.train.shuffle(seed=setting.run.spec.training.seed or 0)
    return parts, facts


def arguments(setting: Setting, *, evaluates: bool) -> KTOConfig:
    """TRL's configuration."""
    spec = setting.run.spec.trainer.dpo or DpoSpec()
    fields = common(setting.run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates)
    return KTOConfig(
        **{**fields, "train_sampling_strategy": "sequential"},
        beta=0.1 if spec.beta is None else spec.beta,
        max_length=None,
    )


def build(setting: Setting, args: KTOConfig, model: Any, parts: answers.Parts) -> Kto:
    """The trainer, ready to run."""
    trainer: Kto = connected(Kto, setting.plan)(
        model=model, ref_model=named_reference(setting), args=args, train_dataset=parts.train, eval_dataset=parts.validation,
        processing_class=setting.tokenizer, callbacks=list(setting.callbacks),
    )  # fmt: skip
    return trainer
