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
"""Number of 32-bit copies of a tile that exist at the same time on a CPU. On a CPU, TRL does not run its GPU kernel, but other code with the same result."""


class LossHead(StrEnum):
    """How the logits for the loss are computed."""

    TILES = "tiles"
    """TRL's fused head computes one tile of logits at a time. The trainer uses this head."""
    LOGITS = "logits"
    """All logits are computed at once, as in transformers' models."""
    PAIR_LOGITS = "pairLogits"
    """All logits are computed at once, and TRL's trainer for orpo computes two losses from them."""
    SCORE = "score"
    """A reward model computes one score for each row instead of logits."""


def record_fused_loss(context: ComputeContext, model: Decoder, hidden: Tensor, batch: Batch, kernels: Kernels) -> None:
    """Record TRL's fused head on the model's last hidden states."""
    tape, width = context.tape, hidden.shape[-1]
    trained_tokens = batch.trained_tokens_per_row if kernels.is_gpu else None  # only on a GPU, the head skips tokens that are not trained
    tokens = batch.row_count * min(batch.tokens_per_row - 1, trained_tokens or batch.tokens_per_row)
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
        # The products of 16-bit tiles are summed in 32 bits. For this sum, a CPU converts both factors of the product to 32 bits.
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
    """Record transformers' loss on all logits. Returns the storage of the logits, because the model's output keeps the logits in memory."""
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


def record_model_logits(context: ComputeContext, model: Decoder, hidden: Tensor) -> Tensor:
    """Record the head over the vocabulary. Returns the model's output, which accelerate converts to 32 bits if autocast is on.

    Source: `convert_outputs_to_fp32` of accelerate 1.15.
    """
    with context.tape.counted_as(MemoryPart.LOGITS):
        logits = op.linear(context, hidden, model.head)
        return logits if context.autocast_bytes is None else op.cast(context, logits, FLOAT32_BYTES)


def record_pair_losses(context: ComputeContext, logits: Tensor) -> None:
    """Record the losses of orpo: the cross entropy of the better answers, and the log-probabilities of all answers.

    `logits`: (rows, tokens, vocabulary). The first half of the rows holds the better answers. Source: `concatenated_forward` of
    `trl/experimental/orpo/orpo_trainer.py` (TRL 1.16).
    """
    tape = context.tape
    with tape.counted_as(MemoryPart.LOGITS):
        cross_entropy = _record_cross_entropy_of_better_answers(context, logits)
        log_probabilities = _record_log_probabilities(context, logits)
        gradients = [Gradient(one.numel, FLOAT32_BYTES) for one in (cross_entropy, *log_probabilities)]
        tape.record([cross_entropy, *log_probabilities], tape.tensor((1,), FLOAT32_BYTES), gradients)


def _record_cross_entropy_of_better_answers(context: ComputeContext, logits: Tensor) -> Tensor:
    tape, item = context.tape, logits.item_bytes
    rows, tokens, vocabulary = logits.shape
    better = op.take_slice(context, logits, rows // 2, tokens, vocabulary)
    shifted = tape.tensor((rows // 2, tokens - 1, vocabulary), item)  # a contiguous copy
    shifted = tape.record([better], shifted, [Gradient(better.numel, item)])
    scores = tape.tensor(shifted.shape, item)
    scores = tape.record([shifted], scores, [Gradient(scores.numel, item)], [scores.storage])
    return tape.record([scores], tape.tensor((1,), item), [Gradient(scores.numel, item)], [scores.storage])


def _record_log_probabilities(context: ComputeContext, logits: Tensor) -> list[Tensor]:
    """Record TRL's `selective_log_softmax`.

    On a GPU, one kernel computes all rows. On a CPU, the rows are computed one at a time, and differently for 16 and 32 bits.
    """
    tape, item = context.tape, logits.item_bytes
    rows, tokens, vocabulary = logits.shape
    shifted = op.take_slice(context, logits, rows, tokens - 1, vocabulary)
    index = tape.allocate(rows * (tokens - 1) * 8)
    per_token, row_bytes = (rows, tokens - 1), (tokens - 1) * vocabulary * item
    gradient = Gradient(shifted.numel, item)
    if context.is_gpu:
        return [tape.record([shifted], tape.tensor(per_token, FLOAT32_BYTES), [gradient], [shifted.storage, index])]
    if item < FLOAT32_BYTES:
        scores = tape.tensor(shifted.shape, item)
        scores = tape.record([op.take_slice(context, shifted, *shifted.shape)], scores, [gradient], [scores.storage])
        return [tape.record([scores], tape.tensor(per_token, item), [gradient], [index])]
    selected = tape.record([shifted], tape.tensor(per_token, item), [gradient], [shifted.storage, index])
    single_rows = op.take_slice(context, shifted, *shifted.shape)
    temporary = tape.allocate(row_bytes)
    del temporary
    sums = tape.tensor(per_token, item)
    by_row = Gradient(shifted.numel, item, temporary_bytes=(row_bytes, row_bytes))
    return [selected, tape.record([single_rows], sums, [by_row], [shifted.storage, sums.storage])]


def record_score_loss(context: ComputeContext, model: Decoder, hidden: Tensor) -> None:
    """Record the head of a reward model, which computes a score for each token, and the loss."""
    tape = context.tape
    scores = op.linear(context, hidden, model.head)
    tape.record([scores], tape.tensor((1,), FLOAT32_BYTES), [Gradient(scores.numel, scores.item_bytes)])
