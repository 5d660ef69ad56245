"""EVA: initialises matrix A of each adapter with the principal directions of the inputs that the layer gets from training data.

Source: Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation, https://arxiv.org/abs/2410.07170.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_api.errors import ConfigError

from finetune_trainer.method.peft_method import ADAPTER_NAME

MAX_BATCHES = 2000
"""Maximum number of batches to read. If the directions have not converged after this number of batches, the job fails. Usually, a few hundred batches
are enough."""


def initialize_from_inputs(trainer: Any) -> None:
    """Compute the initial matrix A of every adapter. PEFT's `init_lora_weights="eva"` leaves A random until this function is called.

    Every layer keeps the rank of the spec, because rho is 1.
    Errors: ConfigError InitUnavailable for packed rows (PEFT cannot recognise their padding), for a rank above the number of inputs of a
    layer or of tokens in a batch, and if the directions do not converge.
    """
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer

    if getattr(trainer.args, "packing", False):
        raise ConfigError(
            "InitUnavailable", "method.lora.init eva needs separate rows, but dataset.packing joins them",
            hint="remove packing, or write another init",
        )  # fmt: skip
    model, device = trainer.model, next(trainer.model.parameters()).device
    rank = model.peft_config[ADAPTER_NAME].r
    smallest_input_count = min(layer.in_features for layer in model.modules() if isinstance(layer, LoraLayer))
    if rank > smallest_input_count:
        raise ConfigError(
            "InitUnavailable", f"method.lora.init eva needs {rank} directions (method.lora.rank), but a layer has only {smallest_input_count} inputs",
            hint=f"write a rank of at most {smallest_input_count}, or another init",
        )  # fmt: skip
    if device != trainer.args.device:  # a model that will be sharded is moved to the GPU when training begins
        model.to(trainer.args.device)
    with _use_padded_batches(trainer.data_collator):
        initialize_lora_eva_weights(
            model, dataloader=_EndlessInputs(trainer, rank), show_progress_bar=False,
            gather_distributed_inputs=trainer.accelerator.num_processes > 1,
        )  # fmt: skip
    if device != trainer.args.device:
        model.to(device)


@contextmanager
def _use_padded_batches(collator: Any) -> Iterator[None]:
    """Make the collator pad its batches within the context, even in a padding-free run.

    PEFT recognises padding by the attention mask, and accepts only batches of tensors.
    """
    padding_free_before = collator.padding_free
    collator.padding_free = False
    try:
        yield
    finally:
        collator.padding_free = padding_free_before


class _EndlessInputs:
    """Yields the batches of the training data again and again, in order and without labels, because PEFT reads until the directions converge.

    PEFT skips batches that have fewer tokens than the rank. If PEFT skipped all batches, it would never stop reading.
    Errors: ConfigError InitUnavailable if all batches have fewer tokens than the rank, and after `MAX_BATCHES` batches.
    """

    def __init__(self, trainer: Any, rank: int):
        self._trainer, self._rank = trainer, rank

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read_batch_count = max_token_count = 0
        while True:
            for batch in self._trainer.get_train_dataloader():
                inputs = {name: batch[name].to(self._trainer.args.device) for name in ("input_ids", "attention_mask")}
                token_count = self._trainer.accelerator.reduce(inputs["attention_mask"].sum(), reduction="sum")
                max_token_count = max(max_token_count, int(token_count))
                read_batch_count += 1
                if read_batch_count > MAX_BATCHES:
                    break
                yield inputs
            if max_token_count < self._rank:
                raise ConfigError(
                    "InitUnavailable",
                    f"method.lora.init eva needs {self._rank} directions (method.lora.rank), but no batch has more than {max_token_count} tokens",
                    hint="lower the rank, raise training.batchSizePerDevice, or write another init",
                )
            if read_batch_count > MAX_BATCHES:
                raise ConfigError(
                    "InitUnavailable", f"method.lora.init eva did not find {self._rank} stable directions in {MAX_BATCHES} batches",
                    hint="lower method.lora.rank, raise training.batchSizePerDevice, or write another init",
                )  # fmt: skip

    def __len__(self) -> int:
        return len(self._trainer.get_train_dataloader())
