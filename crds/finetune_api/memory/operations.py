"""The operations of a training step. Each function records the tensors that torch's autograd saves for its operation, and the allocations of the operation's
backward pass.

A function that runs several operations keeps its local variables exactly as long as the corresponding function of transformers or PEFT does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from finetune_api.memory.tape import Gradient, Parameter, Storage, Tape, Tensor

FLOAT32_BYTES = 4
"""Bytes of one 32-bit floating-point value."""


@dataclass(frozen=True)
class ComputeContext:
    """The tape that records the operations, and the device and precision with which they compute."""

    tape: Tape
    autocast_bytes: int | None = None
    """Bytes of one value in the precision of autocast; None without autocast."""
    quantized_compute_bytes: int = 4
    """Bytes of one value in the precision in which 4-bit and 8-bit layers compute."""
    gathers_weights: bool = False
    """Whether weights are gathered from all ranks. Gathered weights already have the precision of the computation and need no conversion."""
    is_gpu: bool = True


def cast(context: ComputeContext, x: Tensor, item_bytes: float) -> Tensor:
    """Convert a tensor to another precision. A tensor that already has this precision is returned unchanged."""
    if x.item_bytes == item_bytes:
        return x
    return context.tape.record([x], context.tape.tensor(x.shape, item_bytes), [Gradient(x.numel, x.item_bytes)])


def copy_view(context: ComputeContext, x: Tensor, *shape: int) -> Tensor:
    """Copy a view to a new tensor of the given shape, because the view's values are not contiguous in memory."""
    return context.tape.record([x], context.tape.tensor(shape, x.item_bytes), [Gradient(x.numel, x.item_bytes, is_shared=True)])


def take_slice(context: ComputeContext, x: Tensor, *size: int) -> Tensor:
    """Return a slice of a tensor, which shares its memory. The gradient of the slice has the size of the whole tensor."""
    return context.tape.record([x], Tensor(size, x.item_bytes, x.storage), [Gradient(x.numel, x.item_bytes)])


def add(context: ComputeContext, a: Tensor, b: Tensor) -> Tensor:
    """Add two tensors of the same shape."""
    item = max(a.item_bytes, b.item_bytes)
    # A GPU kernel converts values while it reads them. A CPU needs a converted copy.
    converted = context.tape.allocate(0 if context.is_gpu or a.item_bytes == b.item_bytes else a.numel * item)
    gradients = [Gradient(one.numel, one.item_bytes, is_shared=one.item_bytes == item) for one in (a, b)]
    output = context.tape.tensor(a.shape, item)
    del converted
    return context.tape.record([a, b], output, gradients)


def multiply(context: ComputeContext, a: Tensor, b: Tensor) -> Tensor:
    """Multiply two tensors with the same number of dimensions. A dimension of size 1 is broadcast to the size of the other tensor."""
    item = max(a.item_bytes, b.item_bytes)
    shape = tuple(max(pair) for pair in zip(a.shape, b.shape, strict=True))
    gradients = [
        Gradient(one.numel, one.item_bytes, temporary_bytes=() if one.shape == shape and one.item_bytes == item else (prod(shape) * item,))
        for one in (a, b)
    ]  # fmt: skip
    saved = [b.storage] * (a.node is not None) + [a.storage] * (b.node is not None)
    return context.tape.record([a, b], context.tape.tensor(shape, item), gradients, saved)


def view_vector_as_row(context: ComputeContext, weight: Parameter, dimensions: int) -> Tensor:
    """Return a trained vector as a tensor with the given number of dimensions, of which all but the last have size 1."""
    row = context.tape.tensor((1,) * (dimensions - 1) + (weight.numel,), weight.item_bytes)
    return context.tape.record([weight], row, [Gradient(weight.numel, weight.item_bytes)])


def prepend(context: ComputeContext, x: Tensor, weight: Parameter, count: int) -> Tensor:
    """Put `count` trained keys or values in front of the keys or values of the tokens. `x`: (rows, tokens, heads, size of a head)."""
    rows, tokens, heads, size = x.shape
    output = context.tape.tensor((rows, count + tokens, heads, size), x.item_bytes)
    return context.tape.record([x, weight], output, [Gradient(x.numel, x.item_bytes), Gradient(weight.numel, weight.item_bytes)])


def scale(context: ComputeContext, x: Tensor) -> Tensor:
    """Multiply a tensor by a number."""
    return context.tape.record([x], context.tape.tensor(x.shape, x.item_bytes), [Gradient(x.numel, x.item_bytes)])


def apply_activation(context: ComputeContext, x: Tensor) -> Tensor:
    """Apply an activation function."""
    return context.tape.record([x], context.tape.tensor(x.shape, x.item_bytes), [Gradient(x.numel, x.item_bytes)], [x.storage])


def dropout(context: ComputeContext, x: Tensor) -> Tensor:
    """Set random values to zero. On a GPU the mask has one byte for each value; on a CPU it has the tensor's precision."""
    mask = context.tape.allocate(x.numel * (1 if context.is_gpu else x.item_bytes))
    return context.tape.record([x], context.tape.tensor(x.shape, x.item_bytes), [Gradient(x.numel, x.item_bytes)], [mask])


def _autocast_weight(context: ComputeContext, weight: Parameter) -> tuple[float, Storage | None]:
    """Return the bytes of one value in the precision in which a weight is used, and the converted copy of the weight, or None if there is no copy.

    Autocast keeps the copy of a trained 32-bit weight until the end of the forward pass.
    """
    item = context.autocast_bytes
    if item is None or weight.item_bytes == item:
        return weight.item_bytes, None
    if context.gathers_weights:
        return item, None
    if not (weight.is_trained and weight.item_bytes == FLOAT32_BYTES):
        return item, context.tape.allocate(weight.numel * item)
    if weight.autocast_copy is None:
        weight.autocast_copy = context.tape.allocate(weight.numel * item)
        context.tape.converted_weights.append(weight)
    return item, weight.autocast_copy


def grouped_linear(context: ComputeContext, x: Tensor, weight: Parameter) -> Tensor:
    """Compute the linear layers of all routed experts as one product. Autocast does not apply to this product, so it has the precision of the weights."""
    return linear(replace(context, autocast_bytes=None), cast(context, x, weight.item_bytes), weight)


def linear(context: ComputeContext, x: Tensor, weight: Parameter, bias: Parameter | None = None) -> Tensor:
    """Compute a linear layer. `weight.shape` is (outputs, inputs), or (experts, outputs, inputs) for routed experts."""
    if weight.item_bytes < 2:
        return _quantized_linear(context, x, weight, bias)
    if context.autocast_bytes is not None:
        x = cast(context, x, context.autocast_bytes)
    item, converted = _autocast_weight(context, weight)
    output = context.tape.tensor((*x.shape[:-1], weight.shape[-2]), max(item, x.item_bytes))
    saved = [x.storage] * weight.is_trained + ([converted] if converted is not None and x.node is not None else [])
    temporary = (weight.numel * item,) if item != weight.item_bytes else ()
    gradients = [Gradient(x.numel, x.item_bytes), Gradient(weight.numel, weight.item_bytes, temporary_bytes=temporary)]
    inputs: list[Tensor | Parameter] = [x, weight]
    if bias is not None:
        inputs.append(bias)
        gradients.append(Gradient(bias.numel, bias.item_bytes))
    return context.tape.record(inputs, output, gradients, saved)


def _quantized_linear(context: ComputeContext, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
    """Compute a frozen linear layer with a 4-bit or 8-bit weight. The forward and the backward pass each dequantise the weight for a moment."""
    item = context.quantized_compute_bytes
    given_item = x.item_bytes
    x = cast(context, x, item)
    dequantized = weight.numel * item
    temporary = context.tape.allocate(dequantized)
    output = context.tape.tensor((*x.shape[:-1], weight.shape[-2]), item)
    del temporary
    inputs: list[Tensor | Parameter] = [x]
    gradients = [Gradient(x.numel, item, temporary_bytes=(dequantized,))]
    if bias is not None and bias.is_trained:
        inputs.append(bias)
        gradients.append(Gradient(bias.numel, bias.item_bytes))
    return cast(context, context.tape.record(inputs, output, gradients), given_item)


def apply_rms_norm(context: ComputeContext, x: Tensor, weight: Parameter, *, adds_one: bool, is_fused: bool) -> Tensor:
    """Apply RMSNorm. `adds_one`: whether the norm multiplies by 1 + weight in 32 bits, as in Gemma. `is_fused`: whether Liger's kernel computes the norm."""
    if is_fused:
        return _apply_fused_rms_norm(context, x, weight)
    item, rows = x.item_bytes, (*x.shape[:-1], 1)
    x = cast(context, x, FLOAT32_BYTES)
    squares = context.tape.record(
        [x], context.tape.tensor(x.shape, FLOAT32_BYTES), [Gradient(x.numel, FLOAT32_BYTES, temporary_bytes=(x.numel * FLOAT32_BYTES,) * 2)], [x.storage]
    )
    mean = context.tape.record([squares], context.tape.tensor(rows, FLOAT32_BYTES), [Gradient(x.numel, FLOAT32_BYTES)])
    del squares
    root = context.tape.tensor(rows, FLOAT32_BYTES)
    root = context.tape.record([mean], root, [Gradient(mean.numel, FLOAT32_BYTES)], [root.storage])
    x = multiply(context, x, root)
    if adds_one:
        return cast(context, _scale_by_weight(context, x, weight, FLOAT32_BYTES), item)
    return _scale_by_weight(context, cast(context, x, item), weight, weight.item_bytes)


def _scale_by_weight(context: ComputeContext, x: Tensor, weight: Parameter, weight_item: float) -> Tensor:
    """Multiply each row by a weight vector."""
    item = max(x.item_bytes, weight_item)
    gradients = [
        Gradient(x.numel, x.item_bytes, temporary_bytes=() if x.item_bytes == item else (x.numel * item,)),
        Gradient(weight.numel, weight.item_bytes, temporary_bytes=(x.numel * item,)),
    ]
    return context.tape.record([x, weight], context.tape.tensor(x.shape, item), gradients, [x.storage] * weight.is_trained)


def _apply_fused_rms_norm(context: ComputeContext, x: Tensor, weight: Parameter) -> Tensor:
    """Apply RMSNorm as one kernel, which saves its input and the root mean square of each row."""
    roots = context.tape.allocate(x.numel / x.shape[-1] * FLOAT32_BYTES)
    gradients = [Gradient(x.numel, x.item_bytes), Gradient(weight.numel, weight.item_bytes)]
    return context.tape.record([x, weight], context.tape.tensor(x.shape, x.item_bytes), gradients, [x.storage, roots])


def apply_rotary_embedding(context: ComputeContext, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary position embedding to queries or keys.

    `x`: (rows, tokens, heads, size of a head). `cosine`, `sine`: (rows, tokens, 1, size of a head).
    """
    return add(context, multiply(context, x, cosine), multiply(context, _rotate_half(context, x), sine))


def _rotate_half(context: ComputeContext, x: Tensor) -> Tensor:
    """Exchange the two halves of each head and negate one of them."""
    half = x.numel / 2 * x.item_bytes
    negative = context.tape.allocate(half)
    output = context.tape.tensor(x.shape, x.item_bytes)
    del negative
    # The backward pass pads the gradient of each half with zeros to the full size, and then adds the two padded gradients.
    return context.tape.record([x], output, [Gradient(x.numel, x.item_bytes, temporary_bytes=(half, x.numel * x.item_bytes))])


def repeat_heads(context: ComputeContext, x: Tensor, repeats: int, *, is_eager: bool) -> Tensor:
    """Repeat each head of keys or values, once for each query head that uses it.

    With a single head, the result is a view, because torch's `reshape` needs no copy. In eager attention, `matmul` copies this view if there are several
    rows.
    """
    if repeats == 1:
        return x
    rows, tokens, heads, size = x.shape
    shape = (rows, tokens, heads * repeats, size)
    repeated = x.view(*shape) if heads == 1 and not (is_eager and rows > 1) else context.tape.tensor(shape, x.item_bytes)
    return context.tape.record([x], repeated, [Gradient(x.numel, x.item_bytes)])


def attend(context: ComputeContext, query: Tensor, key: Tensor, value: Tensor, *, has_mask: bool) -> Tensor:
    """Compute attention with a fused kernel, which saves one number for each query and head instead of all scores.

    `query`, `key`, `value`: (rows, tokens, heads, size of a head). `has_mask`: whether a mask of all pairs of tokens is given. torch's sdpa
    converts this mask to floating-point numbers and saves them.
    """
    if context.autocast_bytes is not None:
        query, key, value = (cast(context, one, context.autocast_bytes) for one in (query, key, value))
    output = context.tape.tensor(query.shape, query.item_bytes)
    sums = context.tape.allocate(prod(query.shape[:-1]) * FLOAT32_BYTES)
    mask = context.tape.allocate(query.shape[0] * query.shape[1] * key.shape[1] * query.item_bytes if has_mask else 0)
    gradients = [Gradient(one.numel, one.item_bytes) for one in (query, key, value)]
    saved = [query.storage, key.storage, value.storage, output.storage, sums, mask]
    return context.tape.record([query, key, value], output, gradients, saved)


def attend_eagerly(context: ComputeContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention with the scores of all pairs of tokens. A CPU converts 16-bit scores to 32 bits before the softmax; a GPU does not."""
    rows, tokens, heads, _ = query.shape
    if context.autocast_bytes is not None:
        query, key, value = (cast(context, one, context.autocast_bytes) for one in (query, key, value))
    shape = (rows, heads, tokens, key.shape[1])
    gradients = [Gradient(query.numel, query.item_bytes), Gradient(key.numel, key.item_bytes)]
    scores = context.tape.record([query, key], context.tape.tensor(shape, query.item_bytes), gradients, [query.storage, key.storage])
    scores = scale(context, scores)
    scores = context.tape.record([scores], context.tape.tensor(shape, scores.item_bytes), [Gradient(scores.numel, scores.item_bytes, is_shared=True)])
    if not context.is_gpu:
        scores = cast(context, scores, FLOAT32_BYTES)
    weights = context.tape.tensor(shape, FLOAT32_BYTES)
    weights = context.tape.record([scores], weights, [Gradient(scores.numel, scores.item_bytes)], [weights.storage])
    weights = cast(context, weights, query.item_bytes)
    gradients = [Gradient(weights.numel, weights.item_bytes), Gradient(value.numel, value.item_bytes)]
    output = context.tape.tensor(query.shape, query.item_bytes)
    return copy_view(context, context.tape.record([weights, value], output, gradients, [weights.storage, value.storage]), *query.shape)
