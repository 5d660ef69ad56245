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
    """Mixin for Trainers whose reference is the model before training.

    If an adapter is trained, TRL keeps its initial state as a second adapter. This mixin freezes the second adapter, because PEFT marks
    it as trainable for some adapter types, and DDP would then wait forever for its gradients. The mixin also excludes the second
    adapter from saved files, and keeps the forward passes of the reference model cheap.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, parameter in self.model.named_parameters():
            # Parameter names contain the adapter's name in the middle (lora_A.ref.weight) or at the end (ia3_l.ref).
            if REFERENCE_ADAPTER in name.split("."):
                parameter.requires_grad_(False)

    def run_epoch(self, *args: Any, **options: Any) -> None:
        """Train on one pass over the data. Forward passes of the reference model do not walk over all modules."""
        with cheap_reference_passes(self):
            super().run_epoch(*args, **options)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the frozen adapter."""
        super().save_files(output_dir, state_dict)
        if self.args.should_save:
            self.run_after_files(lambda: shutil.rmtree(Path(output_dir) / REFERENCE_ADAPTER, ignore_errors=True))


def load_reference_model(context: TrainingContext) -> Any:
    """Load the frozen reference model. Returns None if TRL must use the trained model without its adapter as the reference.

    The reference model is `trainer.dpo.referenceModel` if it is set. Otherwise, if the method trains base weights, it is a second copy
    of the base model. The copy has the same quantised modules, so that both models give equal outputs before the first step.
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
    """Refuse a reference model with fewer embedding rows than the trained model, because the data may contain the missing tokens.

    Tokens of the tokenizer are ignored if the base model has no row for them either. Errors: ConfigError VocabularyDiffers.
    """
    embedding = reference.get_input_embeddings().weight
    size = (getattr(embedding, "ds_shape", None) or embedding.shape)[0]
    needed = len(context.tokenizer)
    if not context.run.spec.model.new_tokens:
        needed = min(needed, load_config(context.run, context.inputs).get_text_config().vocab_size)
    if size < needed:
        raise ConfigError(
            "VocabularyDiffers", f"the reference model has {size} tokens, but the trained model uses {needed}",
            hint="give a reference model with the same tokenizer as model.source, such as an earlier checkpoint of the same model",
        )  # fmt: skip
