"""The reference model of preference objectives, and the mixin for Trainers that have a reference model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.rules import trains_base_weights

from finetune_trainer import vocabulary
from finetune_trainer.library_internals import OpenTrainer
from finetune_trainer.model import load_config, load_model
from finetune_trainer.objective.base import TrainingContext

REFERENCE_ADAPTER = "ref"
"""TRL's name for the frozen copy of the adapter as it was before training."""


class ReferenceModelMixin(OpenTrainer):
    """Mixin for Trainers whose reference is the model before training.

    If an adapter is trained, TRL keeps its initial state as a second, frozen adapter. This mixin fixes two problems. PEFT marks the
    second adapter as trainable for some adapter types, and DDP then waits forever for its gradients. TRL would save the second
    adapter with the result.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, parameter in self.model.named_parameters():
            # A parameter's name has the adapter's name in the middle (lora_A.ref.weight) or at the end (ia3_l.ref).
            if REFERENCE_ADAPTER in name.split("."):
                parameter.requires_grad_(False)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the frozen adapter."""
        super().save_files(output_dir, state_dict)
        if self.args.should_save:
            shutil.rmtree(Path(output_dir) / REFERENCE_ADAPTER, ignore_errors=True)


def load_reference_model(context: TrainingContext) -> Any:
    """The reference model, frozen; None: TRL uses the trained model without its adapter.

    If `trainer.dpo.referenceModel` is set, that model is loaded. Otherwise, if the method trains the base's own weights, a second copy
    of the base is loaded with the same quantised modules: before the first step both models must give the same outputs.
    Errors: NotFoundError ModelUnreadable; ConfigError VocabularyDiffers.
    """
    if context.inputs.reference is None and not trains_base_weights(context.run.spec):
        return None
    inputs = context.inputs.model_copy(update={"model": context.inputs.reference or context.inputs.model})
    model, _ = load_model(
        context.run, inputs, context.hardware, sharded=context.strategy.shards_weights,
        skip_quantization=context.unquantized,
    )  # fmt: skip
    if context.inputs.reference is None:
        vocabulary.fit_embeddings(model, context.tokenizer, context.run)
    else:
        _require_same_vocabulary(model, context)
    return model.requires_grad_(False).eval()


def _require_same_vocabulary(reference: Any, context: TrainingContext) -> None:
    """Refuse a reference model whose embedding lacks rows that the trained model has, because the data may use these tokens.

    Tokens of the tokenizer for which neither model has a row are ignored. Errors: ConfigError VocabularyDiffers.
    """
    embedding = reference.get_input_embeddings().weight
    size = (getattr(embedding, "ds_shape", None) or embedding.shape)[0]
    needed = len(context.tokenizer)
    if not context.run.spec.model.new_tokens:
        needed = min(needed, load_config(context.run, context.inputs).get_text_config().vocab_size)
    if size < needed:
        raise ConfigError(
            "VocabularyDiffers", f"the reference model knows {size} tokens, and the model that is trained uses {needed}",
            hint="give a reference with the same tokenizer as model.source, such as an earlier checkpoint of the same model",
        )  # fmt: skip
