"""Records the head and the loss of a language model."""

from __future__ import annotations

from enum import StrEnum

from finetune_api.memory import operations as op
from finetune_api.memory.layers import Batch, Decoder, Kernels
from finetune_api.memory.operations import FLOAT32_BYTES, ComputeContext
from finetune_api.memory.tape import Gradient, MemoryPart, Storage, Tensor

TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
"""Tokens and vocabulary entries of one tile of logits in TRL's fused head (TRL 1.16, `trl/kernels/chunked_logprob.py`)."""
FORWARD_TILE_COPIES, BACKWARD_TILE_COPIES = 3, 7.25
"""Number of 32-bit copies of a tile that exist at the same time on a CPU, on which TRL uses a replacement of its GPU kernel."""


class LossHead(StrEnum):
    """How the logits for the loss are computed."""

    TILES = "tiles"
    """TRL's fused head computes one tile of logits at a time. The trainer uses this head."""
    LOGITS = "logits"
    """All logits are computed at once, as in transformers' models."""


def record_fused_loss(context: ComputeContext, model: Decoder, hidden: Tensor, batch: Batch, kernels: Kernels) -> None:
    """Record TRL's fused head on the model's last hidden states."""
    tape, width = context.tape, hidden.shape[-1]
    tokens = batch.row_count * (batch.tokens_per_row - 1)
    item = context.autocast_bytes or hidden.item_bytes
    if kernels.is_gpu or batch.row_count > 1:
        hidden = tape.record(
            [hidden], tape.tensor((tokens, width), hidden.item_bytes), [Gradient(hidden.numel, hidden.item_bytes)], [tape.allocate(tokens * 8)]
        )
    vocabulary = model.shape.vocabulary_size
    tile_tokens, tile_words = min(tokens, TILE_TOKENS), min(vocabulary, TILE_VOCABULARY)
    with tape.counted_as(MemoryPart.LOGITS):
        buffer = tile_tokens * TILE_VOCABULARY * item
        copies = 0 if item == model.head.item_bytes else tile_words * width * item
        copies += 0 if item == hidden.item_bytes else tile_tokens * width * item
        cpu_tile_bytes = 0 if kernels.is_gpu else tile_tokens * tile_words * FLOAT32_BYTES
        temporary = [tape.allocate(byte_count) for byte_count in (buffer, copies, FORWARD_TILE_COPIES * cpu_tile_bytes)]
        del temporary
        output = tape.tensor((tokens, 1), FLOAT32_BYTES)
        # The products of 16-bit tiles are summed in 32 bits. A CPU converts both factors to 32 bits for this.
        converted = 0 if kernels.is_gpu or item == FLOAT32_BYTES else FLOAT32_BYTES * (tile_tokens * tile_words + max(tile_words, tile_tokens) * width)
        working = buffer + copies + max(BACKWARD_TILE_COPIES * cpu_tile_bytes, converted)
        sums = tokens * width * FLOAT32_BYTES
        weight = model.head
        weight_sums = weight.numel * FLOAT32_BYTES if weight.is_trained else 0
        to_hidden = (working + weight_sums,) if hidden.item_bytes == FLOAT32_BYTES else (working + weight_sums, sums)
        to_weight = () if weight.item_bytes == FLOAT32_BYTES else (weight_sums,)
        gradients = [
            Gradient(hidden.numel, hidden.item_bytes, temporary_bytes=to_hidden),
            Gradient(weight.numel, weight.item_bytes, temporary_bytes=to_weight),
        ]
        tape.record([hidden, weight], output, gradients, [hidden.storage])


def record_logits_loss(context: ComputeContext, model: Decoder, hidden: Tensor) -> Storage:
    """Record transformers' loss on all logits. Returns the storage of the logits, which the model's output keeps."""
    tape = context.tape
    logits = op.linear(context, hidden, model.head)
    kept = logits.storage
    kept.count_as(MemoryPart.LOGITS)
    with tape.counted_as(MemoryPart.LOGITS):
        logits = op.cast(context, logits, FLOAT32_BYTES)
        scores = tape.tensor(logits.shape, FLOAT32_BYTES)
        scores = tape.record([logits], scores, [Gradient(scores.numel, FLOAT32_BYTES)], [scores.storage])
        tape.record([scores], tape.tensor((1,), FLOAT32_BYTES), [Gradient(scores.numel, FLOAT32_BYTES)], [scores.storage])
    return kept
