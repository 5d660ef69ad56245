"""ORPO: learn the better answer and push the worse one away in one loss, without a reference model."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from finetune_api.spec.trainer import Dpo as DpoSpec
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from finetune_trainer.arguments import common
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting

MODEL_KIND = "causal"
IGNORED = -100


class Orpo(GuardedTrainer, ORPOTrainer):
    """TRL's trainer (experimental there) on pairs that the data room has tokenised."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """The columns that TRL's collator reads, from token ids. Prompt, chosen and rejected are texts it looks at in vain."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row |= {
                f"{side}_input_ids": prompt + answer, f"{side}_attention_mask": [1] * (len(prompt) + len(answer)),
                f"{side}_labels": [IGNORED] * len(prompt) + answer,
            }  # fmt: skip
        return row

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> Any:
        """TRL tokenises the rows it is built with only: those of a test set come later."""
        if isinstance(eval_dataset, Dataset) and "prompt_input_ids" not in eval_dataset.column_names:
            eval_dataset = eval_dataset.map(self.tokenize_row)
        return super().evaluate(eval_dataset, *args, **options)


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Pairs."""
    parts, facts = answers.pairs(setting)
    return parts.mapped(_with_texts), facts


def _with_texts(pairs: Dataset) -> Dataset:
    """Empty texts under the names that TRL looks for before it asks for token ids."""
    return pairs.map(lambda _: {"prompt": "", "chosen": "", "rejected": ""})


def arguments(setting: Setting, *, evaluates: bool) -> ORPOConfig:
    """TRL's configuration."""
    run, spec = setting.run, setting.run.spec.trainer.dpo or DpoSpec()
    return ORPOConfig(
        **common(run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates),
        beta=0.1 if spec.beta is None else spec.beta, max_length=answers.limits(setting).whole, remove_unused_columns=False,
    )  # fmt: skip


def build(setting: Setting, args: ORPOConfig, model: Any, parts: answers.Parts) -> Orpo:
    """The trainer, ready to run."""
    trainer: Orpo = connected(Orpo, setting.plan)(
        model=model, args=args, train_dataset=parts.train, eval_dataset=parts.validation, processing_class=setting.tokenizer,
        callbacks=list(setting.callbacks),
    )  # fmt: skip
    return trainer
