"""The model that a preference objective measures against, and the traces it must not leave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.rules import trains_base_weights

from finetune_trainer import vocabulary
from finetune_trainer.library_internals import OpenTrainer
from finetune_trainer.model import load_config, load_model
from finetune_trainer.objective.base import Setting

ADAPTER = "ref"
"""TRL's name for the frozen copy of an adapter as it was before training."""


class Referenced(OpenTrainer):
    """Mixed into trainers that compare with the model before training.

    With an adapter, TRL keeps that as a second, frozen adapter beside the first. PEFT marks some kinds of it as trainable,
    which DDP then waits for in vain; and it would be saved with the result.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, parameter in self.model.named_parameters():
            if ADAPTER in name.split("."):  # inside, as lora_A.ref.weight, or at the end, as ia3_l.ref
                parameter.requires_grad_(False)

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the frozen copy."""
        super().save_files(output_dir, state_dict)
        if self.args.should_save:
            shutil.rmtree(Path(output_dir) / ADAPTER, ignore_errors=True)


def named_reference(setting: Setting) -> Any:
    """The model of `trainer.dpo.referenceModel`; None: the model as it was before training.

    A method that trains the weights themselves gets a second copy of the base, loaded in the same way, with the same modules
    quantised: both must say the same until one of them has learned.
    Errors: NotFoundError ModelUnreadable; ConfigError VocabularyDiffers.
    """
    if setting.inputs.reference is None and not trains_base_weights(setting.run.spec):
        return None
    inputs = setting.inputs.model_copy(update={"model": setting.inputs.reference or setting.inputs.model})
    model, _ = load_model(
        setting.run, inputs, setting.hardware, sharded=setting.plan.sharded_weights,
        skip_quantization=setting.unquantized,
    )  # fmt: skip
    if setting.inputs.reference is None:
        vocabulary.fit_embeddings(model, setting.tokenizer, setting.run)
    else:
        _require_tokens(model, setting)
    return model.requires_grad_(False).eval()


def _require_tokens(reference: Any, setting: Setting) -> None:
    """Whether a named reference has a row for every token that the model has one for: the data uses no others.

    The tokenizer may hold more, as it may beside the model itself. Errors: ConfigError VocabularyDiffers.
    """
    words = reference.get_input_embeddings().weight
    size, needed = (getattr(words, "ds_shape", None) or words.shape)[0], len(setting.tokenizer)
    if not setting.run.spec.model.new_tokens:
        needed = min(needed, load_config(setting.run, setting.inputs).get_text_config().vocab_size)
    if size < needed:
        raise ConfigError(
            "VocabularyDiffers", f"the reference model knows {size} tokens, and the model that is trained uses {needed}",
            hint="give a reference with the same tokenizer as model.source, such as an earlier step of the same model",
        )  # fmt: skip
