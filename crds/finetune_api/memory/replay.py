"""Replays training steps: forward pass, loss, backward pass and optimizer, for the bytes that one rank allocates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.heads import LossHead, fused_loss, loss_of_logits
from finetune_api.memory.layers import Batch, Decoder, ForwardPass, Kernels, TrainedWeights, build_decoder
from finetune_api.memory.operations import Compute
from finetune_api.memory.optimizers import Optimizer
from finetune_api.memory.tape import Meter, Part, Storage, Tape, Tensor


@dataclass(frozen=True)
class Step:
    """Everything that determines the memory of a training step on one rank."""

    shape: ModelShape
    weights: TrainedWeights
    batch: Batch
    optimizer: Optimizer
    kernels: Kernels = field(default_factory=Kernels)
    autocast_bytes: int | None = None
    quantized_compute_bytes: int = 2
    head: LossHead = LossHead.TILES
    recomputed_layers: int = 0
    """Layers, from the first, that recompute their activations in the backward pass."""
    offloads_layer_inputs: bool = False
    """Whether the inputs of recomputed layers are kept in host memory."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    keeps_outputs: bool = False
    """Whether the logits live until the next forward pass has ended."""
    gathers_weights: bool = False
    """Whether each layer's weights are gathered from all ranks for its computation (FSDP, ZeRO stage 3)."""
    has_gradient_buckets: bool = False
    """Whether the gradients are copied to buckets that all ranks sum up (DDP)."""
    optimizer_shards: int = 1


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes that are allocated at the same time."""

    total: int
    parts: Mapping[Part, int]


def replay(step: Step) -> Peak:
    """Return the peak of two training steps. The second step is the first with optimizer state."""
    meter = Meter()
    run = _Replay(step, Tape(meter))
    for _ in range(2):
        run.train()
    return Peak(meter.peak, dict(meter.peak_parts))


class _Replay:
    def __init__(self, step: Step, tape: Tape) -> None:
        self.step, self.tape = step, tape
        self.on = Compute(tape, step.autocast_bytes, step.quantized_compute_bytes, step.gathers_weights, step.kernels.is_gpu)
        self.model: Decoder = build_decoder(tape, step.shape, step.weights)
        self.trained = [one for one in self.model.parameters() if one.is_trained]
        self.state: list[Storage] = []
        self.kept: Storage | None = None
        bucket_bytes = sum(one.values * one.item_bytes for one in self.trained) if step.has_gradient_buckets else 0
        self.buckets = tape.allocate(bucket_bytes, Part.BUFFERS)
        self.gathered = tape.allocate(self._gathered_bytes(), Part.BUFFERS)

    def _gathered_bytes(self) -> float:
        """Whole weights of the layer that computes and of the next one, and of embeddings or head."""
        if not self.step.gathers_weights:
            return 0
        item = self.step.autocast_bytes
        layers = [sum(one.values * min(one.item_bytes, item or one.item_bytes) for one in layer.parameters()) for layer in self.model.layers]
        return 2 * max(layers) + self.model.head.values * (item or self.model.head.item_bytes)

    def train(self) -> None:
        """One optimizer step."""
        # Two micro-batches show all that more of them would show.
        for _ in range(min(self.step.accumulation, 2)):
            self._forward()
            self.tape.backward()
        self._optimize()
        for one in self.trained:
            one.gradient = None

    def _forward(self) -> None:
        step, tape, batch = self.step, self.tape, self.step.batch
        inputs = tape.allocate(batch.rows * batch.tokens * 8 * 3, Part.BUFFERS)
        mask_bytes = 2 if step.kernels.attention == "eager" else 1  # numbers, or true and false
        mask = tape.allocate(batch.rows * batch.tokens**2 * mask_bytes if batch.has_mask else 0, Part.BUFFERS)
        forward = ForwardPass(self.model, self.on, step.kernels, batch)
        hidden = forward.embed(requires_gradient=step.recomputed_layers > 0)
        positions = forward.positions(hidden.item_bytes)
        for number, layer in enumerate(self.model.layers):
            def run(x: Tensor, layer=layer) -> Tensor:  # type: ignore[no-untyped-def]
                return forward.layer(layer, x, positions)

            if number < step.recomputed_layers:
                hidden = tape.recomputed(run, hidden, offloads_input=step.offloads_layer_inputs)
            else:
                hidden = run(hidden)
        hidden = forward.final_norm(hidden)
        if step.head is LossHead.TILES:
            fused_loss(self.on, self.model, hidden, batch, step.kernels)
        else:
            kept = loss_of_logits(self.on, self.model, hidden)
            self.kept = kept if step.keeps_outputs else None
            del kept
        tape.end_autocast()
        del inputs, mask

    def _optimize(self) -> None:
        """The optimizer step: state on the first call, and temporary tensors on each."""
        optimizer, tape = self.step.optimizer, self.tape
        if not self.state:
            self.state = [tape.allocate(count, Part.OPTIMIZER) for count in optimizer.state_bytes(self.trained, self.step.optimizer_shards)]
        temporary = tape.allocate(optimizer.temporary_bytes(self.trained, self.step.optimizer_shards), Part.OPTIMIZER)
        del temporary
