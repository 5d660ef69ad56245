"""Counts the bytes that automatic differentiation holds, without computing anything.

A `Tensor` has a shape and a number of bytes for each value, and no values. A `Tape` records operations as torch's autograd does: each operation
keeps references to the tensors that its backward pass needs. The bytes of a tensor are freed when its last reference disappears, as in torch, so
a function that uses these tensors must keep its local variables exactly as long as the layer that it describes. This needs CPython, which
deletes an object together with its last reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod


class Part(StrEnum):
    """What memory is used for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    BUFFERS = "buffers"


class Meter:
    """Bytes that are in use now, and the parts of the largest number so far."""

    def __init__(self) -> None:
        self.live = dict.fromkeys(Part, 0)
        self.total = self.peak = 0
        self.peak_parts = dict(self.live)

    def add(self, part: Part, count: int) -> None:
        """Count an allocation; a negative count is a release."""
        self.live[part] += count
        self.total += count
        if self.total > self.peak:
            self.peak = self.total
            self.peak_parts = dict(self.live)

    def move(self, source: Part, target: Part, count: int) -> None:
        """Count bytes as another part from now on."""
        self.live[source] -= count
        self.live[target] += count


class Storage:
    """One allocation. Its bytes are counted as long as the object exists."""

    __slots__ = ("count", "meter", "part")

    def __init__(self, meter: Meter, count: float, part: Part) -> None:
        self.meter, self.count, self.part = meter, int(count), part
        meter.add(part, self.count)

    def __del__(self) -> None:
        self.meter.add(self.part, -self.count)

    def rename(self, part: Part) -> None:
        """Count the allocation as another part."""
        self.meter.move(self.part, part, self.count)
        self.part = part


@dataclass(eq=False)
class Parameter:
    """A weight of the model."""

    shape: tuple[int, ...]
    item_bytes: float
    """Bytes of each value; fractions for weights of less than 8 bits."""
    storage: Storage
    is_trained: bool = False
    shards: int = 1
    """Number of ranks among which gradient and optimizer state are split."""
    gradient: Storage | None = None
    cast: Storage | None = None
    """Copy in the precision of autocast. Autocast keeps it until the end of the forward pass."""

    @property
    def values(self) -> int:
        return prod(self.shape)


@dataclass(eq=False)
class Tensor:
    """A tensor without values. Views share the storage."""

    shape: tuple[int, ...]
    item_bytes: float
    storage: Storage
    node: Node | None = None
    """The operation that computed the tensor; None if no gradient is needed."""

    @property
    def values(self) -> int:
        return prod(self.shape)

    def view(self, *shape: int) -> Tensor:
        """Return a tensor of another shape in the same storage."""
        return Tensor(shape, self.item_bytes, self.storage, self.node)


@dataclass(frozen=True)
class Gradient:
    """The gradient of one input of an operation."""

    values: int
    item_bytes: float
    is_shared: bool = False
    """Whether it is the gradient of the output itself, or a view of it."""
    temporary_bytes: tuple[float, ...] = ()
    """Temporary allocations while the gradient is computed."""


@dataclass(eq=False)
class Node:
    """A recorded operation."""

    inputs: tuple[Node | Parameter | None, ...]
    gradients: tuple[Gradient, ...]
    saved: list[Storage]
    part: Part
    segment: Segment | None = None
    """The layer that recomputes what this operation needs; None if the operation has saved it."""


@dataclass(eq=False)
class Segment:
    """A layer that saves only its input, and recomputes its activations in the backward pass."""

    recompute: Callable[[], None]
    nodes: list[Node] = field(default_factory=list)
    saved_count: int = 0
    """Tensors that the layer would have saved. The recomputation stops after the last of them."""
    is_recomputed: bool = False


class _AllRecomputed(Exception):
    """Stops the recomputation of a layer."""


class Tape:
    """Records operations and runs the backward pass."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.nodes: list[Node] = []
        self.part = Part.ACTIVATIONS
        self.converted: list[Parameter] = []
        """Weights whose copies autocast keeps."""
        self._segment: Segment | None = None
        self._recomputed: list[Node] | None = None
        self._still_to_save = 0

    def allocate(self, count: float, part: Part | None = None) -> Storage:
        """Allocate bytes. They are freed with the last reference to the result."""
        return Storage(self.meter, count, part or self.part)

    def tensor(self, shape: Sequence[int], item_bytes: float, part: Part | None = None) -> Tensor:
        """Return a new tensor that needs no gradient."""
        return Tensor(tuple(shape), item_bytes, self.allocate(prod(shape) * item_bytes, part))

    def record(
        self,
        inputs: Sequence[Tensor | Parameter],
        output: Tensor,
        gradients: Sequence[Gradient],
        saved: Sequence[Storage] = (),
    ) -> Tensor:
        """Record the operation that computed `output` and return `output`. `gradients`: one for each input, in the same order."""
        sources = tuple(one.node if isinstance(one, Tensor) else one if one.is_trained else None for one in inputs)
        if all(source is None for source in sources):
            return output
        node = Node(sources, tuple(gradients), list(saved), self.part, self._segment)
        output.node = node
        if self._recomputed is not None:
            self._recomputed.append(node)
            self._still_to_save -= len(node.saved)
            if self._still_to_save <= 0:
                raise _AllRecomputed
            return output
        if self._segment is not None:
            self._segment.nodes.append(node)
            self._segment.saved_count += len(node.saved)
            node.saved = []
        self.nodes.append(node)
        return output

    def recomputed(self, layer: Callable[[Tensor], Tensor], hidden: Tensor, *, offloads_input: bool = False) -> Tensor:
        """Run a layer that saves only its input. `offloads_input`: the input is moved to host memory until the backward pass."""
        shape, item_bytes, node = hidden.shape, hidden.item_bytes, hidden.node
        kept = None if offloads_input else hidden.storage

        def run_again() -> None:
            layer(Tensor(shape, item_bytes, kept or self.allocate(prod(shape) * item_bytes), node))

        self._segment = Segment(run_again)
        try:
            return layer(hidden)
        finally:
            self._segment = None

    def backward(self) -> None:
        """Run the backward pass of all recorded operations and forget them."""
        pending: dict[int, Storage] = {}
        if self.nodes:
            pending[id(self.nodes[-1])] = self.allocate(4)
        while self.nodes:
            node = self.nodes.pop()
            arriving = pending.pop(id(node), None)
            if arriving is None:
                continue
            if node.segment is not None and not node.segment.is_recomputed:
                self._recompute(node.segment)
            self._run_backward(node, arriving, pending)
            del arriving, node

    def _run_backward(self, node: Node, arriving: Storage, pending: dict[int, Storage]) -> None:
        computed: list[tuple[Node | Parameter, Storage]] = []
        for source, gradient in zip(node.inputs, node.gradients, strict=True):
            if source is None:
                continue
            if gradient.is_shared:
                computed.append((source, arriving))
                continue
            temporary = [self.allocate(count, node.part) for count in gradient.temporary_bytes]
            computed.append((source, self.allocate(gradient.values * gradient.item_bytes, node.part)))
            del temporary
        node.saved.clear()
        del arriving
        for source, storage in computed:
            if isinstance(source, Parameter):
                accumulate(source, storage)
            else:
                pending.setdefault(id(source), storage)  # a second gradient is added in place

    def _recompute(self, segment: Segment) -> None:
        """Compute what the operations of a layer need for their backward pass."""
        segment.is_recomputed = True
        self._recomputed, self._still_to_save = [], segment.saved_count
        part, self.part = self.part, Part.ACTIVATIONS
        try:
            if segment.saved_count:
                segment.recompute()
        except _AllRecomputed:
            pass
        finally:
            for node, again in zip(segment.nodes, self._recomputed, strict=False):
                node.saved = again.saved
            self._recomputed, self.part = None, part
            segment.nodes.clear()
            self.end_autocast()

    def end_autocast(self) -> None:
        """Drop the copies of weights that autocast keeps."""
        for one in self.converted:
            one.cast = None
        self.converted.clear()

    @contextmanager
    def counted_as(self, part: Part) -> Iterator[None]:
        """Count allocations as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


def accumulate(parameter: Parameter, storage: Storage) -> None:
    """Add a gradient to the parameter's gradient. The first gradient becomes the parameter's own."""
    if parameter.gradient is not None:
        return
    if parameter.shards > 1:  # the sum of all ranks is split among them
        storage = Storage(storage.meter, storage.count / parameter.shards, Part.GRADIENTS)
    storage.rename(Part.GRADIENTS)
    parameter.gradient = storage
