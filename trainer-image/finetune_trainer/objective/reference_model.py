"""The reference model that preference objectives compare with, and the mixin for Trainers that have one."""

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
    """For Trainers that compare with the model as it was before training.

    With an adapter, TRL keeps that model as a second, frozen adapter. Two corrections are needed: PEFT marks some kinds of
    adapters as trainable, for whose gradients DDP then waits for ever; and the second adapter must not be saved with the result.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, parameter in self.model.named_parameters():
            if REFERENCE_ADAPTER in name.split("."):  # in the middle (lora_A.ref.weight) or at the end (ia3_l.ref)
                parameter.requires_grad_(False)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the frozen adapter."""
        super().save_files(output_dir, state_dict)
        if self.args.should_save:
            shutil.rmtree(Path(output_dir) / REFERENCE_ADAPTER, ignore_errors=True)


def load_reference_model(context: TrainingContext) -> Any:
    """The reference model, frozen; None: TRL uses the trained model without its adapter.

    That is the model of `trainer.dpo.referenceModel` if there is one. Otherwise a method that trains the base's own weights gets a
    second copy of the base. It is loaded in the same way, with the same modules quantised: before the first step both models must
    give the same outputs.
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
    """Refuse a named reference whose embedding has fewer rows than the trained model's: the data may use every one of them.

    The tokenizer may know more tokens than both models have rows. Errors: ConfigError VocabularyDiffers.
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
