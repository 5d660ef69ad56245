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


def cast(context: ComputeContext, tensor: Tensor, item_bytes: float) -> Tensor:
    """Convert a tensor to another precision. A tensor that already has this precision is returned unchanged."""
    if tensor.item_bytes == item_bytes:
        return tensor
    return context.tape.record([tensor], context.tape.tensor(tensor.shape, item_bytes), [Gradient(tensor.numel, tensor.item_bytes)])


def copy_view(context: ComputeContext, view: Tensor, *shape: int) -> Tensor:
    """Copy a view to a new tensor of the given shape, because the view's values are not contiguous in memory."""
    return context.tape.record([view], context.tape.tensor(shape, view.item_bytes), [Gradient(view.numel, view.item_bytes, is_shared=True)])


def take_slice(context: ComputeContext, tensor: Tensor, *slice_shape: int) -> Tensor:
    """Return a slice of a tensor, which shares its memory. The gradient of the slice has the size of the whole tensor."""
    return context.tape.record([tensor], Tensor(slice_shape, tensor.item_bytes, tensor.storage), [Gradient(tensor.numel, tensor.item_bytes)])


def add(context: ComputeContext, left: Tensor, right: Tensor) -> Tensor:
    """Add two tensors of the same shape."""
    item_bytes = max(left.item_bytes, right.item_bytes)
    # A GPU kernel converts values while it reads them. A CPU needs a converted copy.
    converted_copy = context.tape.allocate(0 if context.is_gpu or left.item_bytes == right.item_bytes else left.numel * item_bytes)
    gradients = [Gradient(operand.numel, operand.item_bytes, is_shared=operand.item_bytes == item_bytes) for operand in (left, right)]
    output = context.tape.tensor(left.shape, item_bytes)
    del converted_copy
    return context.tape.record([left, right], output, gradients)


def multiply(context: ComputeContext, left: Tensor, right: Tensor) -> Tensor:
    """Multiply two tensors with the same number of dimensions. A dimension of size 1 is broadcast to the size of the other tensor."""
    item_bytes = max(left.item_bytes, right.item_bytes)
    shape = tuple(max(sizes) for sizes in zip(left.shape, right.shape, strict=True))
    gradients = [
        Gradient(
            operand.numel, operand.item_bytes,
            temporary_bytes=() if operand.shape == shape and operand.item_bytes == item_bytes else (prod(shape) * item_bytes,),
        )
        for operand in (left, right)
    ]  # fmt: skip
    saved_storages = [right.storage] * (left.node is not None) + [left.storage] * (right.node is not None)
    return context.tape.record([left, right], context.tape.tensor(shape, item_bytes), gradients, saved_storages)


def view_vector_as_row(context: ComputeContext, vector: Parameter, dimension_count: int) -> Tensor:
    """Return a trained vector as a tensor with the given number of dimensions, of which all but the last have size 1."""
    row = context.tape.tensor((1,) * (dimension_count - 1) + (vector.numel,), vector.item_bytes)
    return context.tape.record([vector], row, [Gradient(vector.numel, vector.item_bytes)])


def prepend(context: ComputeContext, tensor: Tensor, prefix: Parameter, prefix_token_count: int) -> Tensor:
    """Put `prefix_token_count` trained keys or values in front of the keys or values of the tokens. `tensor`: (rows, tokens, heads, size of a head)."""
    row_count, token_count, head_count, head_size = tensor.shape
    output = context.tape.tensor((row_count, prefix_token_count + token_count, head_count, head_size), tensor.item_bytes)
    return context.tape.record([tensor, prefix], output, [Gradient(tensor.numel, tensor.item_bytes), Gradient(prefix.numel, prefix.item_bytes)])


def scale(context: ComputeContext, tensor: Tensor) -> Tensor:
    """Multiply a tensor by a number."""
    return context.tape.record([tensor], context.tape.tensor(tensor.shape, tensor.item_bytes), [Gradient(tensor.numel, tensor.item_bytes)])


def apply_activation(context: ComputeContext, tensor: Tensor) -> Tensor:
    """Apply an activation function."""
    return context.tape.record([tensor], context.tape.tensor(tensor.shape, tensor.item_bytes), [Gradient(tensor.numel, tensor.item_bytes)], [tensor.storage])


def apply_dropout(context: ComputeContext, tensor: Tensor) -> Tensor:
    """Set random values to zero. On a GPU the mask has one byte for each value; on a CPU it has the tensor's precision."""
    mask = context.tape.allocate(tensor.numel * (1 if context.is_gpu else tensor.item_bytes))
    return context.tape.record([tensor], context.tape.tensor(tensor.shape, tensor.item_bytes), [Gradient(tensor.numel, tensor.item_bytes)], [mask])


def _convert_weight_for_autocast(context: ComputeContext, weight: Parameter) -> tuple[float, Storage | None]:
    """Return the bytes of one value in the precision in which a weight is used, and the converted copy of the weight, or None if there is no copy.

    Autocast keeps the copy of a trained 32-bit weight until the end of the forward pass.
    """
    autocast_bytes = context.autocast_bytes
    if autocast_bytes is None or weight.item_bytes == autocast_bytes:
        return weight.item_bytes, None
    if context.gathers_weights:
        return autocast_bytes, None
    if not (weight.is_trained and weight.item_bytes == FLOAT32_BYTES):
        return autocast_bytes, context.tape.allocate(weight.numel * autocast_bytes)
    if weight.autocast_copy is None:
        weight.autocast_copy = context.tape.allocate(weight.numel * autocast_bytes)
        context.tape.converted_weights.append(weight)
    return autocast_bytes, weight.autocast_copy


def grouped_linear(context: ComputeContext, tensor: Tensor, weight: Parameter) -> Tensor:
    """Compute the linear layers of all routed experts as one product. Autocast does not apply to this product, so it has the precision of the weights."""
    return linear(replace(context, autocast_bytes=None), cast(context, tensor, weight.item_bytes), weight)


def linear(context: ComputeContext, input_tensor: Tensor, weight: Parameter, bias: Parameter | None = None) -> Tensor:
    """Compute a linear layer. `weight.shape` is (outputs, inputs), or (experts, outputs, inputs) for routed experts."""
    if weight.item_bytes < 2:
        return _quantized_linear(context, input_tensor, weight, bias)
    if context.autocast_bytes is not None:
        input_tensor = cast(context, input_tensor, context.autocast_bytes)
    weight_item_bytes, converted_weight = _convert_weight_for_autocast(context, weight)
    output = context.tape.tensor((*input_tensor.shape[:-1], weight.shape[-2]), max(weight_item_bytes, input_tensor.item_bytes))
    saved_storages = [input_tensor.storage] * weight.is_trained + ([converted_weight] if converted_weight is not None and input_tensor.node is not None else [])
    temporary_bytes = (weight.numel * weight_item_bytes,) if weight_item_bytes != weight.item_bytes else ()
    gradients = [Gradient(input_tensor.numel, input_tensor.item_bytes), Gradient(weight.numel, weight.item_bytes, temporary_bytes=temporary_bytes)]
    input_tensors: list[Tensor | Parameter] = [input_tensor, weight]
    if bias is not None:
        input_tensors.append(bias)
        gradients.append(Gradient(bias.numel, bias.item_bytes))
    return context.tape.record(input_tensors, output, gradients, saved_storages)


def _quantized_linear(context: ComputeContext, input_tensor: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
    """Compute a frozen linear layer with a 4-bit or 8-bit weight. The forward and the backward pass each dequantise the weight for a moment."""
    compute_bytes = context.quantized_compute_bytes
    input_item_bytes = input_tensor.item_bytes
    input_tensor = cast(context, input_tensor, compute_bytes)
    dequantized_bytes = weight.numel * compute_bytes
    dequantized_weight = context.tape.allocate(dequantized_bytes)
    output = context.tape.tensor((*input_tensor.shape[:-1], weight.shape[-2]), compute_bytes)
    del dequantized_weight
    input_tensors: list[Tensor | Parameter] = [input_tensor]
    gradients = [Gradient(input_tensor.numel, compute_bytes, temporary_bytes=(dequantized_bytes,))]
    if bias is not None and bias.is_trained:
        input_tensors.append(bias)
        gradients.append(Gradient(bias.numel, bias.item_bytes))
    return cast(context, context.tape.record(input_tensors, output, gradients), input_item_bytes)


def apply_rms_norm(context: ComputeContext, hidden_states: Tensor, weight: Parameter, *, adds_one: bool, is_fused: bool) -> Tensor:
    """Apply RMSNorm. `adds_one`: whether the norm multiplies by 1 + weight in 32 bits, as in Gemma. `is_fused`: whether Liger's kernel computes the norm."""
    if is_fused:
        return _apply_fused_rms_norm(context, hidden_states, weight)
    item_bytes, shape_per_row = hidden_states.item_bytes, (*hidden_states.shape[:-1], 1)
    hidden_states = cast(context, hidden_states, FLOAT32_BYTES)
    squares = context.tape.record(
        [hidden_states], context.tape.tensor(hidden_states.shape, FLOAT32_BYTES),
        [Gradient(hidden_states.numel, FLOAT32_BYTES, temporary_bytes=(hidden_states.numel * FLOAT32_BYTES,) * 2)], [hidden_states.storage],
    )  # fmt: skip
    mean_square = context.tape.record([squares], context.tape.tensor(shape_per_row, FLOAT32_BYTES), [Gradient(hidden_states.numel, FLOAT32_BYTES)])
    del squares
    inverse_root = context.tape.tensor(shape_per_row, FLOAT32_BYTES)
    inverse_root = context.tape.record([mean_square], inverse_root, [Gradient(mean_square.numel, FLOAT32_BYTES)], [inverse_root.storage])
    hidden_states = multiply(context, hidden_states, inverse_root)
    if adds_one:
        return cast(context, _scale_by_weight(context, hidden_states, weight, FLOAT32_BYTES), item_bytes)
    return _scale_by_weight(context, cast(context, hidden_states, item_bytes), weight, weight.item_bytes)


def _scale_by_weight(context: ComputeContext, hidden_states: Tensor, weight: Parameter, weight_item_bytes: float) -> Tensor:
    """Multiply each row by a weight vector."""
    item_bytes = max(hidden_states.item_bytes, weight_item_bytes)
    gradients = [
        Gradient(
            hidden_states.numel, hidden_states.item_bytes,
            temporary_bytes=() if hidden_states.item_bytes == item_bytes else (hidden_states.numel * item_bytes,),
        ),
        Gradient(weight.numel, weight.item_bytes, temporary_bytes=(hidden_states.numel * item_bytes,)),
    ]
    saved_storages = [hidden_states.storage] * weight.is_trained
    return context.tape.record([hidden_states, weight], context.tape.tensor(hidden_states.shape, item_bytes), gradients, saved_storages)


def _apply_fused_rms_norm(context: ComputeContext, hidden_states: Tensor, weight: Parameter) -> Tensor:
    """Apply RMSNorm as one kernel, which saves its input and the root mean square of each row."""
    row_roots = context.tape.allocate(hidden_states.numel / hidden_states.shape[-1] * FLOAT32_BYTES)
    gradients = [Gradient(hidden_states.numel, hidden_states.item_bytes), Gradient(weight.numel, weight.item_bytes)]
    output = context.tape.tensor(hidden_states.shape, hidden_states.item_bytes)
    return context.tape.record([hidden_states, weight], output, gradients, [hidden_states.storage, row_roots])


def apply_rotary_embedding(context: ComputeContext, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary position embedding to queries or keys.

    `heads`: (rows, tokens, heads, size of a head). `cosine`, `sine`: (rows, tokens, 1, size of a head).
    """
    return add(context, multiply(context, heads, cosine), multiply(context, _rotate_half(context, heads), sine))


def _rotate_half(context: ComputeContext, heads: Tensor) -> Tensor:
    """Exchange the two halves of each head and negate one of them."""
    half_bytes = heads.numel / 2 * heads.item_bytes
    negated_half = context.tape.allocate(half_bytes)
    output = context.tape.tensor(heads.shape, heads.item_bytes)
    del negated_half
    # The backward pass pads the gradient of each half with zeros to the full size, and then adds the two padded gradients.
    return context.tape.record([heads], output, [Gradient(heads.numel, heads.item_bytes, temporary_bytes=(half_bytes, heads.numel * heads.item_bytes))])


def repeat_heads(context: ComputeContext, tensor: Tensor, repeat_count: int, *, is_eager: bool) -> Tensor:
    """Repeat each head of keys or values, once for each query head that uses it.

    With a single head, the result is a view, because torch's `reshape` needs no copy. In eager attention, `matmul` copies this view if there are several
    rows.
    """
    if repeat_count == 1:
        return tensor
    row_count, token_count, head_count, head_size = tensor.shape
    shape = (row_count, token_count, head_count * repeat_count, head_size)
    repeated_tensor = tensor.view(*shape) if head_count == 1 and not (is_eager and row_count > 1) else context.tape.tensor(shape, tensor.item_bytes)
    return context.tape.record([tensor], repeated_tensor, [Gradient(tensor.numel, tensor.item_bytes)])


def attend(context: ComputeContext, query: Tensor, key: Tensor, value: Tensor, *, has_mask: bool) -> Tensor:
    """Compute attention with a fused kernel, which saves one number for each query and head instead of all scores.

    `query`, `key`, `value`: (rows, tokens, heads, size of a head). `has_mask`: whether a mask of all pairs of tokens is given. torch's sdpa
    converts this mask to floating-point numbers and saves them.
    """
    if context.autocast_bytes is not None:
        query, key, value = (cast(context, tensor, context.autocast_bytes) for tensor in (query, key, value))
    output = context.tape.tensor(query.shape, query.item_bytes)
    log_sums = context.tape.allocate(prod(query.shape[:-1]) * FLOAT32_BYTES)
    mask = context.tape.allocate(query.shape[0] * query.shape[1] * key.shape[1] * query.item_bytes if has_mask else 0)
    gradients = [Gradient(tensor.numel, tensor.item_bytes) for tensor in (query, key, value)]
    saved_storages = [query.storage, key.storage, value.storage, output.storage, log_sums, mask]
    return context.tape.record([query, key, value], output, gradients, saved_storages)


def attend_eagerly(context: ComputeContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention with the scores of all pairs of tokens. A CPU converts 16-bit scores to 32 bits before the softmax; a GPU does not."""
    row_count, token_count, head_count, _ = query.shape
    if context.autocast_bytes is not None:
        query, key, value = (cast(context, tensor, context.autocast_bytes) for tensor in (query, key, value))
    score_shape = (row_count, head_count, token_count, key.shape[1])
    gradients = [Gradient(query.numel, query.item_bytes), Gradient(key.numel, key.item_bytes)]
    scores = context.tape.record([query, key], context.tape.tensor(score_shape, query.item_bytes), gradients, [query.storage, key.storage])
    scores = scale(context, scores)
    scores = context.tape.record([scores], context.tape.tensor(score_shape, scores.item_bytes), [Gradient(scores.numel, scores.item_bytes, is_shared=True)])
    if not context.is_gpu:
        scores = cast(context, scores, FLOAT32_BYTES)
    attention_weights = context.tape.tensor(score_shape, FLOAT32_BYTES)
    attention_weights = context.tape.record([scores], attention_weights, [Gradient(scores.numel, scores.item_bytes)], [attention_weights.storage])
    attention_weights = cast(context, attention_weights, query.item_bytes)
    gradients = [Gradient(attention_weights.numel, attention_weights.item_bytes), Gradient(value.numel, value.item_bytes)]
    output = context.tape.tensor(query.shape, query.item_bytes)
    return copy_view(context, context.tape.record([attention_weights, value], output, gradients, [attention_weights.storage, value.storage]), *query.shape)
