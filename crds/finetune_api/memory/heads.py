"""The head and the loss of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.memory import operations as op
from finetune_api.memory.layers import Batch, Decoder, Kernels
from finetune_api.memory.operations import FLOAT, Compute
from finetune_api.memory.tape import Gradient, Part, Storage, Tensor

TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
"""TRL's fused head computes the logits of so many tokens and words at a time (TRL 1.16, `trl/kernels/chunked_logprob.py`)."""


class LossHead(StrEnum):
    """How the loss is computed."""

    TILES = "tiles"
    """TRL's fused head, which computes the logits in tiles. The trainer uses it."""
    LOGITS = "logits"
    """All logits at once, as transformers' models do."""


@dataclass(frozen=True)
class _CpuTile:
    """32-bit copies of a tile that the kernel's replacement for CPUs needs at the same time."""

    forward: float = 3
    backward: float = 7.25


def fused_loss(on: Compute, model: Decoder, hidden: Tensor, batch: Batch, kernels: Kernels) -> None:
    """Record TRL's fused head on the model's last hidden states."""
    tape, width = on.tape, hidden.shape[-1]
    tokens = batch.rows * (batch.tokens - 1)
    item = on.autocast_bytes or hidden.item_bytes
    if kernels.is_gpu or batch.rows > 1:
        hidden = tape.record(
            [hidden], tape.tensor((tokens, width), hidden.item_bytes), [Gradient(hidden.values, hidden.item_bytes)], [tape.allocate(tokens * 8)]
        )
    vocabulary = model.shape.vocabulary
    tile_tokens, tile_words = min(tokens, TILE_TOKENS), min(vocabulary, TILE_VOCABULARY)
    with tape.counted_as(Part.LOGITS):
        buffer = tile_tokens * TILE_VOCABULARY * item
        copies = 0 if item == model.head.item_bytes else tile_words * width * item
        copies += 0 if item == hidden.item_bytes else tile_tokens * width * item
        on_cpu = 0 if kernels.is_gpu else tile_tokens * tile_words * FLOAT
        temporary = [tape.allocate(one) for one in (buffer, copies, _CpuTile.forward * on_cpu)]
        del temporary
        output = tape.tensor((tokens, 1), FLOAT)
        # Products of 16-bit tiles are added in 32 bits, for which a CPU converts both factors.
        converted = 0 if kernels.is_gpu or item == FLOAT else FLOAT * (tile_tokens * tile_words + max(tile_words, tile_tokens) * width)
        working = buffer + copies + max(_CpuTile.backward * on_cpu, converted)
        sums = tokens * width * FLOAT
        weight = model.head
        weight_sums = weight.values * FLOAT if weight.is_trained else 0
        to_hidden = (working + weight_sums,) if hidden.item_bytes == FLOAT else (working + weight_sums, sums)
        to_weight = () if weight.item_bytes == FLOAT else (weight_sums,)
        gradients = [
            Gradient(hidden.values, hidden.item_bytes, temporary_bytes=to_hidden),
            Gradient(weight.values, weight.item_bytes, temporary_bytes=to_weight),
        ]
        tape.record([hidden, weight], output, gradients, [hidden.storage])


def loss_of_logits(on: Compute, model: Decoder, hidden: Tensor) -> Storage:
    """Record transformers' loss on all logits. Returns the logits, which live as long as the model's output."""
    tape = on.tape
    logits = op.linear(on, hidden, model.head)
    kept = logits.storage
    kept.rename(Part.LOGITS)
    with tape.counted_as(Part.LOGITS):
        logits = op.cast(on, logits, FLOAT)
        scores = tape.tensor(logits.shape, FLOAT)
        scores = tape.record([logits], scores, [Gradient(scores.values, FLOAT)], [scores.storage])
        tape.record([scores], tape.tensor((1,), FLOAT), [Gradient(scores.values, FLOAT)], [scores.storage])
    return kept
