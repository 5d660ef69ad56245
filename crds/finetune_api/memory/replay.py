"""Replays training steps (forward pass, loss, backward pass, optimizer) and counts the bytes that one rank allocates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.heads import (
    LossHead,
    record_fused_loss,
    record_logits_loss,
    record_model_logits,
    record_pair_losses,
    record_score_loss,
)
from finetune_api.memory.layers import (
    Batch,
    Decoder,
    ForwardPass,
    Kernels,
    TrainedWeights,
    build_decoder,
    copy_adapters,
)
from finetune_api.memory.operations import ComputeContext
from finetune_api.memory.optimizers import Optimizer
from finetune_api.memory.tape import MemoryMeter, MemoryPart, Storage, Tape, Tensor


class Reference(StrEnum):
    """The reference model, with which a loss compares the trained model. In each step, the reference model runs after the trained model, without gradients."""

    NONE = "none"
    ADAPTER = "adapter"
    """The base model with a frozen copy of the initial adapter."""
    MODEL = "model"
    """A second, frozen model of the same size."""


@dataclass(frozen=True)
class Step:
    """One training step of one rank: everything that determines its memory."""

    shape: ModelShape
    weights: TrainedWeights
    batch: Batch
    optimizer: Optimizer
    kernels: Kernels = field(default_factory=Kernels)
    autocast_bytes: int | None = None
    quantized_compute_bytes: int = 2
    loss_head: LossHead = LossHead.TILES
    reference: Reference = Reference.NONE
    recomputed_layer_count: int = 0
    """Number of layers that recompute their activations in the backward pass. The layers that recompute are the first layers of the model."""
    offloads_layer_inputs: bool = False
    """Whether the inputs of recomputed layers are moved to host memory until the backward pass."""
    accumulation: int = 1
    """Number of micro-batches in one optimizer step."""
    keeps_outputs: bool = False
    """Whether the logits stay in memory until the end of the next forward pass."""
    gathers_weights: bool = False
    """Whether a layer gathers its weights from all ranks before it computes (FSDP, ZeRO stage 3)."""
    has_gradient_buckets: bool = False
    """Whether the gradients are copied to buckets, which are summed over all ranks (DDP)."""
    optimizer_shards: int = 1
    """Number of ranks among which the optimizer state is split."""


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes that are allocated at the same time."""

    total_bytes: int
    bytes_by_part: Mapping[MemoryPart, int]


def replay(step: Step) -> Peak:
    """Return the peak of two training steps. The first step creates the optimizer state, so only the second step begins with it."""
    meter = MemoryMeter()
    step_replay = _Replay(step, Tape(meter))
    for _ in range(2):
        step_replay.train_step()
    return Peak(meter.peak_bytes, dict(meter.peak_bytes_by_part))


class _Replay:
    """Replays the training steps of one rank on one tape."""

    def __init__(self, step: Step, tape: Tape) -> None:
        self.step, self.tape = step, tape
        self.context = ComputeContext(tape, step.autocast_bytes, step.quantized_compute_bytes, step.gathers_weights, step.kernels.is_gpu)
        self.model: Decoder = build_decoder(tape, step.shape, step.weights)
        self.reference_model = _build_reference_model(tape, step, self.model)
        self.trained_parameters = [parameter for parameter in self.model.parameters() if parameter.is_trained]
        self.optimizer_state: list[Storage] = []
        self.kept_logits: Storage | None = None
        bucket_bytes = sum(parameter.numel * parameter.item_bytes for parameter in self.trained_parameters) if step.has_gradient_buckets else 0
        self.gradient_buckets = tape.allocate(bucket_bytes, MemoryPart.BUFFERS)
        self.gathered_weights = tape.allocate(self._compute_gathered_bytes(), MemoryPart.BUFFERS)

    def _compute_gathered_bytes(self) -> float:
        """Return the bytes of the gathered weights: those of the current layer, of the next layer, and of the embeddings or the head."""
        if not self.step.gathers_weights:
            return 0
        autocast_bytes = self.step.autocast_bytes
        bytes_per_layer = [
            sum(parameter.numel * min(parameter.item_bytes, autocast_bytes or parameter.item_bytes) for parameter in layer.parameters())
            for layer in self.model.layers
        ]
        return 2 * max(bytes_per_layer) + self.model.head.numel * (autocast_bytes or self.model.head.item_bytes)

    def train_step(self) -> None:
        """Replay one optimizer step."""
        # More than two micro-batches have the same peak as two.
        for _ in range(min(self.step.accumulation, 2)):
            self._forward()
            self.tape.backward()
        self._optimize()
        for parameter in self.trained_parameters:
            parameter.gradient = None

    def _forward(self) -> None:
        """Replay the forward pass of a micro-batch, the forward pass of the reference model, and the loss."""
        step, tape, batch = self.step, self.tape, self.step.batch
        batch_inputs = tape.allocate(batch.row_count * batch.tokens_per_row * 8 * 3, MemoryPart.BUFFERS)
        logits = self._run_model(self.model, step.kernels, step.recomputed_layer_count)
        if self.reference_model is not None:
            # Liger's kernels replace only the layers of the trained model.
            kernels = step.kernels if step.reference is Reference.ADAPTER else replace(step.kernels, uses_liger=False)
            # All weights of the reference model are frozen, so the tape records nothing.
            self._run_model(self.reference_model, kernels, recomputed_layer_count=0)
        if logits is not None:
            record_pair_losses(self.context, logits)
        del batch_inputs

    def _run_model(self, model: Decoder, kernels: Kernels, recomputed_layer_count: int) -> Tensor | None:
        """Replay the forward pass of a model with its head. Returns the logits if this function does not compute the loss, otherwise None."""
        step, tape, batch = self.step, self.tape, self.step.batch
        forward_pass = ForwardPass(model, self.context, kernels, batch)
        mask_bytes = forward_pass.eager_mask_bytes if kernels.attention == "eager" else 1  # the mask of other implementations contains booleans
        mask = tape.allocate(batch.row_count * batch.tokens_per_row**2 * mask_bytes if batch.has_mask else 0, MemoryPart.BUFFERS)
        hidden_states = self._run_layers(forward_pass, recomputed_layer_count, mask)
        logits: Tensor | None = None
        if step.loss_head is LossHead.TILES:
            record_fused_loss(self.context, model, hidden_states, batch, kernels)
        elif step.loss_head is LossHead.LOGITS:
            logits_storage = record_logits_loss(self.context, model, hidden_states)
            self.kept_logits = logits_storage if step.keeps_outputs else None
            del logits_storage
        elif step.loss_head is LossHead.SCORE:
            record_score_loss(self.context, model, hidden_states)
        else:
            logits = record_model_logits(self.context, model, hidden_states)
        tape.end_autocast()
        del mask
        return logits

    def _run_layers(self, forward_pass: ForwardPass, recomputed_layer_count: int, mask: Storage) -> Tensor:
        """Replay the layers of a model. Returns the last hidden states."""
        hidden_states = forward_pass.embed(requires_gradient=recomputed_layer_count > 0)
        positions = forward_pass.compute_positions(hidden_states.item_bytes)
        for layer_index, layer in enumerate(forward_pass.model.layers):
            def run_layer(layer_inputs: Tensor, layer=layer, mask=mask) -> Tensor:  # type: ignore[no-untyped-def] # noqa: ARG001 -- torch keeps the arguments of a recomputed layer until its backward pass
                return forward_pass.run_layer(layer, layer_inputs, positions)

            if layer_index < recomputed_layer_count:
                hidden_states = self.tape.run_recomputed(run_layer, hidden_states, offloads_input=self.step.offloads_layer_inputs)
            else:
                hidden_states = run_layer(hidden_states)
        return forward_pass.apply_final_norm(hidden_states)

    def _optimize(self) -> None:
        """Allocate the optimizer state on the first call, and temporary tensors on each call."""
        optimizer, tape = self.step.optimizer, self.tape
        if not self.optimizer_state:
            state_bytes = optimizer.state_bytes(self.trained_parameters, self.step.optimizer_shards)
            self.optimizer_state = [tape.allocate(byte_count, MemoryPart.OPTIMIZER) for byte_count in state_bytes]
        temporary_storage = tape.allocate(optimizer.temporary_bytes(self.trained_parameters, self.step.optimizer_shards), MemoryPart.OPTIMIZER)
        del temporary_storage


def _build_reference_model(tape: Tape, step: Step, model: Decoder) -> Decoder | None:
    if step.reference is Reference.NONE:
        return None
    if step.reference is Reference.ADAPTER:
        return copy_adapters(tape, model)
    weights = step.weights
    frozen_weights = TrainedWeights(weights.base_value_bytes, weights.other_value_bytes, trains_base_weights=False, weight_shards=weights.weight_shards)
    return build_decoder(tape, step.shape, frozen_weights)
