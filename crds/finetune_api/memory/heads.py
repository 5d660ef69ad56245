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


def record_fused_loss(context: ComputeContext, model: Decoder, hidden_states: Tensor, batch: Batch, kernels: Kernels) -> None:
    """Record TRL's fused head on the model's last hidden states."""
    tape, hidden_size = context.tape, hidden_states.shape[-1]
    trained_tokens = batch.trained_tokens_per_row if kernels.is_gpu else None  # only on a GPU, the head skips tokens that are not trained
    token_count = batch.row_count * min(batch.tokens_per_row - 1, trained_tokens or batch.tokens_per_row)
    item_bytes = context.autocast_bytes or hidden_states.item_bytes
    if kernels.is_gpu or batch.row_count > 1:
        hidden_states = tape.record(
            [hidden_states], tape.tensor((token_count, hidden_size), hidden_states.item_bytes), [Gradient(hidden_states.numel, hidden_states.item_bytes)],
            [tape.allocate(token_count * 8)],
        )  # fmt: skip
    vocabulary_size = model.shape.vocabulary_size
    tile_token_count, tile_vocabulary_size = min(token_count, TILE_TOKENS), min(vocabulary_size, TILE_VOCABULARY)
    with tape.counted_as(MemoryPart.LOGITS):
        tile_buffer_bytes = tile_token_count * TILE_VOCABULARY * item_bytes
        converted_copy_bytes = 0 if item_bytes == model.head.item_bytes else tile_vocabulary_size * hidden_size * item_bytes
        converted_copy_bytes += 0 if item_bytes == hidden_states.item_bytes else tile_token_count * hidden_size * item_bytes
        cpu_tile_bytes = 0 if kernels.is_gpu else tile_token_count * tile_vocabulary_size * FLOAT32_BYTES
        temporary_storages = [tape.allocate(byte_count) for byte_count in (tile_buffer_bytes, converted_copy_bytes, FORWARD_TILE_COPIES * cpu_tile_bytes)]
        del temporary_storages
        output = tape.tensor((token_count, 1), FLOAT32_BYTES)
        # The products of 16-bit tiles are summed in 32 bits. For this sum, a CPU converts both factors of the product to 32 bits.
        converted_factor_bytes = 0 if kernels.is_gpu or item_bytes == FLOAT32_BYTES else FLOAT32_BYTES * (
            tile_token_count * tile_vocabulary_size + max(tile_vocabulary_size, tile_token_count) * hidden_size
        )  # fmt: skip
        working_bytes = tile_buffer_bytes + converted_copy_bytes + max(BACKWARD_TILE_COPIES * cpu_tile_bytes, converted_factor_bytes)
        hidden_sum_bytes = token_count * hidden_size * FLOAT32_BYTES
        weight = model.head
        weight_sum_bytes = weight.numel * FLOAT32_BYTES if weight.is_trained else 0
        temporary_bytes_for_hidden_states = (
            (working_bytes + weight_sum_bytes,) if hidden_states.item_bytes == FLOAT32_BYTES else (working_bytes + weight_sum_bytes, hidden_sum_bytes)
        )
        temporary_bytes_for_weight = () if weight.item_bytes == FLOAT32_BYTES else (weight_sum_bytes,)
        gradients = [
            Gradient(hidden_states.numel, hidden_states.item_bytes, temporary_bytes=temporary_bytes_for_hidden_states),
            Gradient(weight.numel, weight.item_bytes, temporary_bytes=temporary_bytes_for_weight),
        ]
        tape.record([hidden_states, weight], output, gradients, [hidden_states.storage])


def record_logits_loss(context: ComputeContext, model: Decoder, hidden_states: Tensor) -> Storage:
    """Record transformers' loss on all logits. Returns the storage of the logits, because the model's output keeps the logits in memory."""
    tape = context.tape
    logits = op.linear(context, hidden_states, model.head)
    logits_storage = logits.storage
    logits_storage.count_as(MemoryPart.LOGITS)
    with tape.counted_as(MemoryPart.LOGITS):
        logits = op.cast(context, logits, FLOAT32_BYTES)
        log_probabilities = tape.tensor(logits.shape, FLOAT32_BYTES)
        log_probabilities = tape.record([logits], log_probabilities, [Gradient(log_probabilities.numel, FLOAT32_BYTES)], [log_probabilities.storage])
        tape.record([log_probabilities], tape.tensor((1,), FLOAT32_BYTES), [Gradient(log_probabilities.numel, FLOAT32_BYTES)], [log_probabilities.storage])
    return logits_storage


def record_model_logits(context: ComputeContext, model: Decoder, hidden_states: Tensor) -> Tensor:
    """Record the head over the vocabulary. Returns the model's output, which accelerate converts to 32 bits if autocast is on.

    Source: `convert_outputs_to_fp32` of accelerate 1.15.
    """
    with context.tape.counted_as(MemoryPart.LOGITS):
        logits = op.linear(context, hidden_states, model.head)
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
        gradients = [Gradient(loss_tensor.numel, FLOAT32_BYTES) for loss_tensor in (cross_entropy, *log_probabilities)]
        tape.record([cross_entropy, *log_probabilities], tape.tensor((1,), FLOAT32_BYTES), gradients)


def _record_cross_entropy_of_better_answers(context: ComputeContext, logits: Tensor) -> Tensor:
    tape, item_bytes = context.tape, logits.item_bytes
    row_count, token_count, vocabulary_size = logits.shape
    better_logits = op.take_slice(context, logits, row_count // 2, token_count, vocabulary_size)
    shifted_logits = tape.tensor((row_count // 2, token_count - 1, vocabulary_size), item_bytes)  # a contiguous copy
    shifted_logits = tape.record([better_logits], shifted_logits, [Gradient(better_logits.numel, item_bytes)])
    log_probabilities = tape.tensor(shifted_logits.shape, item_bytes)
    log_probabilities = tape.record([shifted_logits], log_probabilities, [Gradient(log_probabilities.numel, item_bytes)], [log_probabilities.storage])
    return tape.record([log_probabilities], tape.tensor((1,), item_bytes), [Gradient(log_probabilities.numel, item_bytes)], [log_probabilities.storage])


def _record_log_probabilities(context: ComputeContext, logits: Tensor) -> list[Tensor]:
    """Record TRL's `selective_log_softmax`.

    On a GPU, one kernel computes all rows. On a CPU, the rows are computed one at a time, and differently for 16 and 32 bits.
    """
    tape, item_bytes = context.tape, logits.item_bytes
    row_count, token_count, vocabulary_size = logits.shape
    shifted_logits = op.take_slice(context, logits, row_count, token_count - 1, vocabulary_size)
    token_ids = tape.allocate(row_count * (token_count - 1) * 8)
    shape_per_token, row_bytes = (row_count, token_count - 1), (token_count - 1) * vocabulary_size * item_bytes
    gradient = Gradient(shifted_logits.numel, item_bytes)
    if context.is_gpu:
        return [tape.record([shifted_logits], tape.tensor(shape_per_token, FLOAT32_BYTES), [gradient], [shifted_logits.storage, token_ids])]
    if item_bytes < FLOAT32_BYTES:
        log_probabilities = tape.tensor(shifted_logits.shape, item_bytes)
        log_probabilities = tape.record(
            [op.take_slice(context, shifted_logits, *shifted_logits.shape)], log_probabilities, [gradient], [log_probabilities.storage]
        )
        return [tape.record([log_probabilities], tape.tensor(shape_per_token, item_bytes), [gradient], [token_ids])]
    selected_logits = tape.record([shifted_logits], tape.tensor(shape_per_token, item_bytes), [gradient], [shifted_logits.storage, token_ids])
    logits_by_row = op.take_slice(context, shifted_logits, *shifted_logits.shape)
    temporary_storage = tape.allocate(row_bytes)
    del temporary_storage
    log_sums = tape.tensor(shape_per_token, item_bytes)
    gradient_by_row = Gradient(shifted_logits.numel, item_bytes, temporary_bytes=(row_bytes, row_bytes))
    return [selected_logits, tape.record([logits_by_row], log_sums, [gradient_by_row], [shifted_logits.storage, log_sums.storage])]


def record_score_loss(context: ComputeContext, model: Decoder, hidden_states: Tensor) -> None:
    """Record the head of a reward model, which computes a score for each token, and the loss."""
    tape = context.tape
    scores = op.linear(context, hidden_states, model.head)
    tape.record([scores], tape.tensor((1,), FLOAT32_BYTES), [Gradient(scores.numel, scores.item_bytes)])
