"""The reference model of the objectives dpo, kto and grpo, and the mixin for their Trainers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.rules import trains_base_weights

from finetune_trainer import vocabulary
from finetune_trainer.library_internals import OpenTrainer, cheap_reference_passes
from finetune_trainer.model import load_config, load_model
from finetune_trainer.objective.base import TrainingContext

REFERENCE_ADAPTER = "ref"
"""TRL's name for the frozen copy of the untrained adapter."""


class ReferenceModelMixin(OpenTrainer):
    """Mixin for Trainers that compare the trained model with a reference model.

    If an adapter is trained, TRL keeps a copy of the initial adapter as a second adapter. This mixin freezes the second adapter: PEFT marks
    it as trainable for some adapter types, and DDP would then wait forever for its gradients. The mixin also leaves the second adapter
    out of saved files, and keeps the forward passes of the reference model fast.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, parameter in self.model.named_parameters():
            # Parameter names contain the adapter's name in the middle (lora_A.ref.weight) or at the end (ia3_l.ref).
            if REFERENCE_ADAPTER in name.split("."):
                parameter.requires_grad_(False)

    def run_epoch(self, *args: Any, **options: Any) -> None:
        """Train for one epoch, with fast forward passes of the reference model: see `cheap_reference_passes`."""
        with cheap_reference_passes(self):
            super().run_epoch(*args, **options)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Save the files without the frozen second adapter."""
        super().save_files(output_dir, state_dict)
        if self.args.should_save:
            self.run_after_files(lambda: shutil.rmtree(Path(output_dir) / REFERENCE_ADAPTER, ignore_errors=True))


def load_reference_model(context: TrainingContext) -> Any:
    """Load the frozen reference model. Return None if the trained model, without its adapter, is the reference.

    If `trainer.dpo.referenceModel` is set, this model is the reference. If it is not set and the method trains base weights, the reference is a
    second copy of the base model. The copy has the same quantised modules, so that both models give equal outputs before the first step.
    Errors: NotFoundError ModelUnreadable; ConfigError VocabularyDiffers.
    """
    if context.inputs.reference is None and not trains_base_weights(context.run.spec):
        return None
    inputs = context.inputs.model_copy(update={"model": context.inputs.reference or context.inputs.model})
    model, _ = load_model(
        context.run, inputs, context.hardware, is_sharded=context.strategy.shards_weights,
        skip_quantization=context.unquantized,
    )  # fmt: skip
    if context.inputs.reference is None:
        vocabulary.fit_embeddings(model, context.tokenizer, context.run)
    else:
        _require_same_vocabulary(model, context)
    return model.requires_grad_(False).eval()


def _require_same_vocabulary(reference: Any, context: TrainingContext) -> None:
    """Refuse a reference model with fewer embedding rows than the trained model.

    The data can contain tokens for which such a reference model has no row.

    Tokens for which the base model has no row are ignored, unless the job adds new tokens. Errors: ConfigError VocabularyDiffers.
    """
    embedding_weight = reference.get_input_embeddings().weight
    row_count = (getattr(embedding_weight, "ds_shape", None) or embedding_weight.shape)[0]
    needed_row_count = len(context.tokenizer)
    if not context.run.spec.model.new_tokens:
        needed_row_count = min(needed_row_count, load_config(context.run, context.inputs).get_text_config().vocab_size)
    if row_count < needed_row_count:
        raise ConfigError(
            "VocabularyDiffers", f"the reference model has {row_count} tokens, but the trained model uses {needed_row_count}",
            hint="give a reference model with the same tokenizer as model.source, such as an earlier checkpoint of the same model",
        )  # fmt: skip
