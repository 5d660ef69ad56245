"""The operations of a training step, each with what torch's autograd keeps for it and allocates in its backward pass.

Functions that chain several operations keep their local variables as long as the functions of transformers and PEFT do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from finetune_api.memory.tape import Gradient, Parameter, Storage, Tape, Tensor

FLOAT = 4


@dataclass(frozen=True)
class Compute:
    """How operations compute."""

    tape: Tape
    autocast_bytes: int | None = None
    """Bytes of each value in the precision of autocast; None without autocast."""
    quantized_compute_bytes: int = 4
    """Bytes of each value in which 4-bit and 8-bit layers compute."""
    gathers_weights: bool = False
    """Whether weights are gathered from all ranks in the precision of the computation, so that they need no conversion."""
    is_gpu: bool = True


def cast(on: Compute, x: Tensor, item_bytes: float) -> Tensor:
    """Convert to another precision; the tensor itself if it has this precision."""
    if x.item_bytes == item_bytes:
        return x
    return on.tape.record([x], on.tape.tensor(x.shape, item_bytes), [Gradient(x.values, x.item_bytes)])


def copy(on: Compute, x: Tensor, *shape: int) -> Tensor:
    """Copy a view to a tensor of its own, because its values are not in the order of the new shape."""
    return on.tape.record([x], on.tape.tensor(shape, x.item_bytes), [Gradient(x.values, x.item_bytes, is_shared=True)])


def add(on: Compute, a: Tensor, b: Tensor) -> Tensor:
    """Add two tensors of the same shape."""
    item = max(a.item_bytes, b.item_bytes)
    # Kernels of a GPU convert values while they read them.
    converted = on.tape.allocate(0 if on.is_gpu or a.item_bytes == b.item_bytes else a.values * item)
    gradients = [Gradient(one.values, one.item_bytes, is_shared=one.item_bytes == item) for one in (a, b)]
    output = on.tape.tensor(a.shape, item)
    del converted
    return on.tape.record([a, b], output, gradients)


def multiply(on: Compute, a: Tensor, b: Tensor) -> Tensor:
    """Multiply two tensors of the same number of dimensions, which may differ in size where one has size 1."""
    item = max(a.item_bytes, b.item_bytes)
    shape = tuple(max(pair) for pair in zip(a.shape, b.shape, strict=True))
    gradients = [
        Gradient(one.values, one.item_bytes, temporary_bytes=() if one.shape == shape and one.item_bytes == item else (prod(shape) * item,))
        for one in (a, b)
    ]  # fmt: skip
    saved = [b.storage] * (a.node is not None) + [a.storage] * (b.node is not None)
    return on.tape.record([a, b], on.tape.tensor(shape, item), gradients, saved)


def weight_row(on: Compute, weight: Parameter, dimensions: int) -> Tensor:
    """A trained vector as a tensor of so many dimensions, all but the last of size 1."""
    row = on.tape.tensor((1,) * (dimensions - 1) + (weight.values,), weight.item_bytes)
    return on.tape.record([weight], row, [Gradient(weight.values, weight.item_bytes)])


def prepend(on: Compute, x: Tensor, weight: Parameter, count: int) -> Tensor:
    """Put trained keys or values in front of those of the tokens. `x`: (rows, tokens, heads, size of a head)."""
    rows, tokens, heads, size = x.shape
    output = on.tape.tensor((rows, count + tokens, heads, size), x.item_bytes)
    return on.tape.record([x, weight], output, [Gradient(x.values, x.item_bytes), Gradient(weight.values, weight.item_bytes)])


def scale(on: Compute, x: Tensor) -> Tensor:
    """Multiply by a number."""
    return on.tape.record([x], on.tape.tensor(x.shape, x.item_bytes), [Gradient(x.values, x.item_bytes)])


def activate(on: Compute, x: Tensor) -> Tensor:
    """Apply an activation function."""
    return on.tape.record([x], on.tape.tensor(x.shape, x.item_bytes), [Gradient(x.values, x.item_bytes)], [x.storage])


def dropout(on: Compute, x: Tensor) -> Tensor:
    """Set values to zero at random. A GPU keeps a mask of one byte for each value, a CPU one of the tensor's precision."""
    mask = on.tape.allocate(x.values * (1 if on.is_gpu else x.item_bytes))
    return on.tape.record([x], on.tape.tensor(x.shape, x.item_bytes), [Gradient(x.values, x.item_bytes)], [mask])


def _autocast_weight(on: Compute, weight: Parameter) -> tuple[float, Storage | None]:
    """Return the precision in which a weight is used, and its converted copy. Autocast keeps the copies of trained 32-bit weights."""
    item = on.autocast_bytes
    if item is None or weight.item_bytes == item:
        return weight.item_bytes, None
    if on.gathers_weights:
        return item, None
    if not (weight.is_trained and weight.item_bytes == FLOAT):
        return item, on.tape.allocate(weight.values * item)
    if weight.cast is None:
        weight.cast = on.tape.allocate(weight.values * item)
        on.tape.converted.append(weight)
    return item, weight.cast


def grouped_linear(on: Compute, x: Tensor, weight: Parameter) -> Tensor:
    """The product of routed experts, which autocast leaves in the precision of the weights."""
    return linear(replace(on, autocast_bytes=None), cast(on, x, weight.item_bytes), weight)


def linear(on: Compute, x: Tensor, weight: Parameter, bias: Parameter | None = None) -> Tensor:
    """A linear layer. `weight.shape`: outputs, inputs; with routed experts, their number comes first."""
    if weight.item_bytes < 2:
        return _quantized_linear(on, x, weight, bias)
    if on.autocast_bytes is not None:
        x = cast(on, x, on.autocast_bytes)
    item, converted = _autocast_weight(on, weight)
    output = on.tape.tensor((*x.shape[:-1], weight.shape[-2]), max(item, x.item_bytes))
    saved = [x.storage] * weight.is_trained + ([converted] if converted is not None and x.node is not None else [])
    temporary = (weight.values * item,) if item != weight.item_bytes else ()
    gradients = [Gradient(x.values, x.item_bytes), Gradient(weight.values, weight.item_bytes, temporary_bytes=temporary)]
    inputs: list[Tensor | Parameter] = [x, weight]
    if bias is not None:
        inputs.append(bias)
        gradients.append(Gradient(bias.values, bias.item_bytes))
    return on.tape.record(inputs, output, gradients, saved)


def _quantized_linear(on: Compute, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
    """A frozen linear layer of 4 or 8 bits. Both passes convert its weight to the precision of the computation for a moment."""
    item = on.quantized_compute_bytes
    given_item = x.item_bytes
    x = cast(on, x, item)
    dequantized = weight.values * item
    temporary = on.tape.allocate(dequantized)
    output = on.tape.tensor((*x.shape[:-1], weight.shape[-2]), item)
    del temporary
    inputs: list[Tensor | Parameter] = [x]
    gradients = [Gradient(x.values, item, temporary_bytes=(dequantized,))]
    if bias is not None and bias.is_trained:
        inputs.append(bias)
        gradients.append(Gradient(bias.values, bias.item_bytes))
    return cast(on, on.tape.record(inputs, output, gradients), given_item)


def mean_square_norm(on: Compute, x: Tensor, weight: Parameter, *, adds_one: bool, is_fused: bool) -> Tensor:
    """RMSNorm. `adds_one`: whether the layer multiplies by 1 + weight in 32 bits, as Gemma does. `is_fused`: Liger's kernel."""
    if is_fused:
        return _fused_norm(on, x, weight)
    item, rows = x.item_bytes, (*x.shape[:-1], 1)
    x = cast(on, x, FLOAT)
    squares = on.tape.record(
        [x], on.tape.tensor(x.shape, FLOAT), [Gradient(x.values, FLOAT, temporary_bytes=(x.values * FLOAT,) * 2)], [x.storage]
    )
    mean = on.tape.record([squares], on.tape.tensor(rows, FLOAT), [Gradient(x.values, FLOAT)])
    del squares
    root = on.tape.tensor(rows, FLOAT)
    root = on.tape.record([mean], root, [Gradient(mean.values, FLOAT)], [root.storage])
    x = multiply(on, x, root)
    if adds_one:
        return cast(on, _scale_by_weight(on, x, weight, FLOAT), item)
    return _scale_by_weight(on, cast(on, x, item), weight, weight.item_bytes)


def _scale_by_weight(on: Compute, x: Tensor, weight: Parameter, weight_item: float) -> Tensor:
    """Multiply each row by a weight vector."""
    item = max(x.item_bytes, weight_item)
    gradients = [
        Gradient(x.values, x.item_bytes, temporary_bytes=() if x.item_bytes == item else (x.values * item,)),
        Gradient(weight.values, weight.item_bytes, temporary_bytes=(x.values * item,)),
    ]
    return on.tape.record([x, weight], on.tape.tensor(x.shape, item), gradients, [x.storage] * weight.is_trained)


def _fused_norm(on: Compute, x: Tensor, weight: Parameter) -> Tensor:
    """One kernel that keeps its input and the root of each row."""
    roots = on.tape.allocate(x.values / x.shape[-1] * FLOAT)
    gradients = [Gradient(x.values, x.item_bytes), Gradient(weight.values, weight.item_bytes)]
    return on.tape.record([x, weight], on.tape.tensor(x.shape, x.item_bytes), gradients, [x.storage, roots])


def rotate(on: Compute, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, (rows, tokens, heads, size of a head). Cosine and sine: (rows, tokens, 1, size of a head)."""
    return add(on, multiply(on, x, cosine), multiply(on, _rotate_half(on, x), sine))


def _rotate_half(on: Compute, x: Tensor) -> Tensor:
    """Exchange the halves of each head and negate one."""
    half = x.values / 2 * x.item_bytes
    negative = on.tape.allocate(half)
    output = on.tape.tensor(x.shape, x.item_bytes)
    del negative
    # The backward pass fills the gradient of each half with zeros to the full size, and then adds them.
    return on.tape.record([x], output, [Gradient(x.values, x.item_bytes, temporary_bytes=(half, x.values * x.item_bytes))])


def repeat_heads(on: Compute, x: Tensor, repeats: int) -> Tensor:
    """Copy keys or values for each group of queries."""
    if repeats == 1:
        return x
    rows, tokens, heads, size = x.shape
    return on.tape.record([x], on.tape.tensor((rows, tokens, heads * repeats, size), x.item_bytes), [Gradient(x.values, x.item_bytes)])


def attend(on: Compute, query: Tensor, key: Tensor, value: Tensor, *, has_mask: bool) -> Tensor:
    """Attention of (rows, tokens, heads, size of a head) with a fused kernel, which keeps one sum for each row of scores.

    `has_mask`: torch's sdpa converts the mask of all pairs of tokens to numbers, and keeps them.
    """
    if on.autocast_bytes is not None:
        query, key, value = (cast(on, one, on.autocast_bytes) for one in (query, key, value))
    output = on.tape.tensor(query.shape, query.item_bytes)
    sums = on.tape.allocate(prod(query.shape[:-1]) * FLOAT)
    mask = on.tape.allocate(query.shape[0] * query.shape[1] * key.shape[1] * query.item_bytes if has_mask else 0)
    gradients = [Gradient(one.values, one.item_bytes) for one in (query, key, value)]
    saved = [query.storage, key.storage, value.storage, output.storage, sums, mask]
    return on.tape.record([query, key, value], output, gradients, saved)


def attend_eagerly(on: Compute, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention that computes the scores of all pairs of tokens. A CPU converts 16-bit scores to 32 bits, a GPU computes the softmax from 16 bits."""
    rows, tokens, heads, _ = query.shape
    if on.autocast_bytes is not None:
        query, key, value = (cast(on, one, on.autocast_bytes) for one in (query, key, value))
    shape = (rows, heads, tokens, key.shape[1])
    gradients = [Gradient(query.values, query.item_bytes), Gradient(key.values, key.item_bytes)]
    scores = on.tape.record([query, key], on.tape.tensor(shape, query.item_bytes), gradients, [query.storage, key.storage])
    scores = scale(on, scores)
    scores = on.tape.record([scores], on.tape.tensor(shape, scores.item_bytes), [Gradient(scores.values, scores.item_bytes, is_shared=True)])
    if not on.is_gpu:
        scores = cast(on, scores, FLOAT)
    weights = on.tape.tensor(shape, FLOAT)
    weights = on.tape.record([scores], weights, [Gradient(scores.values, scores.item_bytes)], [weights.storage])
    weights = cast(on, weights, query.item_bytes)
    gradients = [Gradient(weights.values, weights.item_bytes), Gradient(value.values, value.item_bytes)]
    output = on.tape.tensor(query.shape, query.item_bytes)
    return copy(on, on.tape.record([weights, value], output, gradients, [weights.storage, value.storage]), *query.shape)
