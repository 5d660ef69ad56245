"""Counts the bytes that automatic differentiation keeps in memory. This module computes no values.

A `Tensor` has a shape and a number of bytes for each value, but no values. A `Tape` records operations as torch's autograd does: each operation
keeps references to the tensors that its backward pass needs. As in torch, a tensor is freed together with its last reference. A function that
replays a layer must therefore keep its local variables exactly as long as the code of that layer does. This requires CPython, which deletes an
object at once when its last reference disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod


class MemoryPart(StrEnum):
    """One use of memory in a training step."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    BUFFERS = "buffers"


class MemoryMeter:
    """Counts the bytes in use, in total and by part, and remembers their peak."""

    def __init__(self) -> None:
        self.bytes_by_part = dict.fromkeys(MemoryPart, 0)
        self.total_bytes = self.peak_bytes = 0
        self.peak_bytes_by_part = dict(self.bytes_by_part)

    def add(self, part: MemoryPart, byte_count: int) -> None:
        """Count an allocation. A negative `byte_count` means that memory was released."""
        self.bytes_by_part[part] += byte_count
        self.total_bytes += byte_count
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes = self.total_bytes
            self.peak_bytes_by_part = dict(self.bytes_by_part)

    def move(self, old_part: MemoryPart, new_part: MemoryPart, byte_count: int) -> None:
        """From now on, count `byte_count` bytes as `new_part` instead of `old_part`."""
        self.bytes_by_part[old_part] -= byte_count
        self.bytes_by_part[new_part] += byte_count


class Storage:
    """One allocation. The meter counts the bytes of the allocation as long as this object exists."""

    __slots__ = ("byte_count", "meter", "part")

    def __init__(self, meter: MemoryMeter, byte_count: float, part: MemoryPart) -> None:
        self.meter, self.byte_count, self.part = meter, int(byte_count), part
        meter.add(part, self.byte_count)

    def __del__(self) -> None:
        self.meter.add(self.part, -self.byte_count)

    def count_as(self, part: MemoryPart) -> None:
        """From now on, count the bytes of this allocation as another part of the memory."""
        self.meter.move(self.part, part, self.byte_count)
        self.part = part


@dataclass(eq=False)
class Parameter:
    """A weight of the model."""

    shape: tuple[int, ...]
    item_bytes: float
    """Bytes of one value. For a weight with less than 8 bits per value, this is a fraction, such as 0.5."""
    storage: Storage
    is_trained: bool = False
    gradient_shards: int = 1
    """Number of ranks among which the gradient is split."""
    gradient: Storage | None = None
    autocast_copy: Storage | None = None
    """A copy in the precision of autocast, which autocast keeps until the end of the forward pass."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(eq=False)
class Tensor:
    """A tensor without values. A view of a tensor has the same storage as the tensor."""

    shape: tuple[int, ...]
    item_bytes: float
    storage: Storage
    node: Node | None = None
    """The operation that computed the tensor; None if the tensor needs no gradient."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def view(self, *shape: int) -> Tensor:
        """Return a tensor of another shape in the same storage."""
        return Tensor(shape, self.item_bytes, self.storage, self.node)


@dataclass(frozen=True)
class Gradient:
    """The gradient of one input of an operation."""

    numel: int
    item_bytes: float
    is_shared: bool = False
    """Whether this gradient shares the memory of the output's gradient, so that it needs no allocation."""
    temporary_bytes: tuple[float, ...] = ()
    """Bytes of each allocation that exists only while the gradient is computed."""


@dataclass(eq=False)
class Node:
    """A recorded operation."""

    inputs: tuple[Node | Parameter | None, ...]
    gradients: tuple[Gradient, ...]
    saved_storages: list[Storage]
    """The memory that the backward pass of the operation needs."""
    part: MemoryPart
    segment: Segment | None = None
    """The layer that recomputes the tensors which this operation needs. None: the operation itself has saved these tensors."""


@dataclass(eq=False)
class Segment:
    """A layer that saves only its input, and recomputes its activations in the backward pass."""

    recompute: Callable[[], None]
    nodes: list[Node] = field(default_factory=list)
    saved_tensor_count: int = 0
    """Number of tensors that the layer would save without recomputation. The recomputation stops when all of these tensors are computed."""
    is_recomputed: bool = False


class _AllRecomputedSignal(Exception):
    """Stops the recomputation of a layer, because all tensors that its backward pass needs exist."""


class Tape:
    """Records operations and replays their backward pass."""

    def __init__(self, meter: MemoryMeter) -> None:
        self.meter = meter
        self.nodes: list[Node] = []
        self.part = MemoryPart.ACTIVATIONS
        self.converted_weights: list[Parameter] = []
        """Weights of which autocast keeps a converted copy."""
        self._segment: Segment | None = None
        self._recomputed_nodes: list[Node] | None = None
        """The operations that the current recomputation has recorded. None: no layer is being recomputed."""
        self._remaining_tensor_count = 0
        """Number of tensors that the current recomputation still has to save."""

    def allocate(self, byte_count: float, part: MemoryPart | None = None) -> Storage:
        """Allocate bytes, by default for the tape's current part. The bytes are freed when the last reference to the returned storage disappears."""
        return Storage(self.meter, byte_count, part or self.part)

    def tensor(self, shape: Sequence[int], item_bytes: float, part: MemoryPart | None = None) -> Tensor:
        """Return a new tensor that needs no gradient."""
        return Tensor(tuple(shape), item_bytes, self.allocate(prod(shape) * item_bytes, part))

    def record(
        self,
        inputs: Sequence[Tensor | Parameter],
        output: Tensor,
        gradients: Sequence[Gradient],
        saved_storages: Sequence[Storage] = (),
    ) -> Tensor:
        """Record the operation that computed `output`, and return `output`. `gradients`: one for each input, in the order of the inputs."""
        gradient_receivers = tuple(
            input_tensor.node if isinstance(input_tensor, Tensor) else input_tensor if input_tensor.is_trained else None for input_tensor in inputs
        )
        if all(receiver is None for receiver in gradient_receivers):
            return output
        node = Node(gradient_receivers, tuple(gradients), list(saved_storages), self.part, self._segment)
        output.node = node
        if self._recomputed_nodes is not None:
            self._recomputed_nodes.append(node)
            self._remaining_tensor_count -= len(node.saved_storages)
            if self._remaining_tensor_count <= 0:
                raise _AllRecomputedSignal
            return output
        if self._segment is not None:
            self._segment.nodes.append(node)
            self._segment.saved_tensor_count += len(node.saved_storages)
            node.saved_storages = []
        self.nodes.append(node)
        return output

    def run_recomputed(self, run_layer: Callable[[Tensor], Tensor], hidden_states: Tensor, *, offloads_input: bool = False) -> Tensor:
        """Run a layer that saves only its input. `offloads_input`: whether the input is moved to host memory until the backward pass."""
        shape, item_bytes, node = hidden_states.shape, hidden_states.item_bytes, hidden_states.node
        kept_storage = None if offloads_input else hidden_states.storage

        def run_again() -> None:
            run_layer(Tensor(shape, item_bytes, kept_storage or self.allocate(prod(shape) * item_bytes), node))

        self._segment = Segment(run_again)
        try:
            return run_layer(hidden_states)
        finally:
            self._segment = None

    def backward(self) -> None:
        """Replay the backward pass of all recorded operations, and remove these operations from the tape."""
        gradient_by_node_id: dict[int, Storage] = {}
        if self.nodes:
            gradient_by_node_id[id(self.nodes[-1])] = self.allocate(4)
        while self.nodes:
            node = self.nodes.pop()
            output_gradient = gradient_by_node_id.pop(id(node), None)
            if output_gradient is None:
                continue
            if node.segment is not None and not node.segment.is_recomputed:
                self._recompute(node.segment)
            self._run_backward(node, output_gradient, gradient_by_node_id)
            del output_gradient, node

    def _run_backward(self, node: Node, output_gradient: Storage, gradient_by_node_id: dict[int, Storage]) -> None:
        computed_gradients: list[tuple[Node | Parameter, Storage]] = []
        for receiver, gradient in zip(node.inputs, node.gradients, strict=True):
            if receiver is None:
                continue
            if gradient.is_shared:
                computed_gradients.append((receiver, output_gradient))
                continue
            temporary_storages = [self.allocate(byte_count, node.part) for byte_count in gradient.temporary_bytes]
            computed_gradients.append((receiver, self.allocate(gradient.numel * gradient.item_bytes, node.part)))
            del temporary_storages
        node.saved_storages.clear()
        del output_gradient
        for receiver, storage in computed_gradients:
            if isinstance(receiver, Parameter):
                accumulate_gradient(receiver, storage)
            else:
                gradient_by_node_id.setdefault(id(receiver), storage)  # a second gradient is added in place

    def _recompute(self, segment: Segment) -> None:
        """Run a layer again, to compute the tensors that its operations need for their backward pass."""
        segment.is_recomputed = True
        self._recomputed_nodes, self._remaining_tensor_count = [], segment.saved_tensor_count
        part_before, self.part = self.part, MemoryPart.ACTIVATIONS
        try:
            if segment.saved_tensor_count:
                segment.recompute()
        except _AllRecomputedSignal:
            pass
        finally:
            for node, recomputed_node in zip(segment.nodes, self._recomputed_nodes, strict=False):
                node.saved_storages = recomputed_node.saved_storages
            self._recomputed_nodes, self.part = None, part_before
            segment.nodes.clear()
            self.end_autocast()

    def end_autocast(self) -> None:
        """Free the converted copies of weights that autocast keeps."""
        for weight in self.converted_weights:
            weight.autocast_copy = None
        self.converted_weights.clear()

    @contextmanager
    def counted_as(self, part: MemoryPart) -> Iterator[None]:
        """Return a context manager, within which the tape counts allocations as `part`."""
        part_before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = part_before


def accumulate_gradient(parameter: Parameter, gradient: Storage) -> None:
    """Add a gradient to the parameter's gradient. The first gradient is kept as the parameter's gradient; later ones are added in place."""
    if parameter.gradient is not None:
        return
    if parameter.gradient_shards > 1:  # each rank keeps its share of the sum over all ranks
        gradient = Storage(gradient.meter, gradient.byte_count / parameter.gradient_shards, MemoryPart.GRADIENTS)
    gradient.count_as(MemoryPart.GRADIENTS)
    parameter.gradient = gradient
