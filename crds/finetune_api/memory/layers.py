"""Builds the weights of a decoder and records its forward pass, with the same operations as transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from finetune_api.memory import operations as op
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.operations import ComputeContext
from finetune_api.memory.tape import Gradient, MemoryPart, Parameter, Tape, Tensor


@dataclass(frozen=True)
class Kernels:
    """The implementations that compute the layers."""

    is_gpu: bool = True
    uses_liger: bool = False
    attention: str = "sdpa"
    """The attention implementation: `sdpa`, `eager`, or a kernel for concatenated rows (`varlen`, `flash_attention_2`)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    row_count: int
    tokens_per_row: int
    """Tokens of each row, including padding."""
    has_mask: bool = False
    """Whether attention gets a mask of all pairs of tokens, because rows have padding or hold several documents."""
    trained_tokens_per_row: int | None = None
    """Largest number of trained tokens in a row; None: all tokens may be trained."""


@dataclass(eq=False)
class Adapter:
    """The LoRA adapter of one linear layer: its two matrices, and DoRA's magnitudes."""

    matrix_a: Parameter
    matrix_b: Parameter
    has_dropout: bool = False
    magnitude: Parameter | None = None
    casts_inputs: bool = True
    """Whether PEFT converts the inputs to the precision of the adapter's matrices. The trainer turns off this conversion under autocast."""


@dataclass(eq=False)
class LinearLayer:
    """A linear layer, with or without an adapter."""

    weight: Parameter
    bias: Parameter | None = None
    adapter: Adapter | None = None
    scales: Parameter | None = None
    """IA3's trained scales."""
    scales_inputs: bool = False
    """Whether IA3 scales the inputs instead of the outputs."""

    def __call__(self, context: ComputeContext, x: Tensor) -> Tensor:
        if self.scales is not None:
            return self._run_scaled(context, x, self.scales)
        if self.adapter is None:
            return op.linear(context, x, self.weight, self.bias)
        return _run_adapted(context, x, self, self.adapter)

    def _run_scaled(self, context: ComputeContext, x: Tensor, scales: Parameter) -> Tensor:
        """Run the layer with IA3's scales, as PEFT does."""
        if self.scales_inputs:
            item = x.item_bytes
            x = op.cast(context, x, scales.item_bytes)
            scaled = op.cast(context, op.multiply(context, x, op.view_vector_as_row(context, scales, len(x.shape))), item)
            return op.linear(context, scaled, self.weight, self.bias)
        result = op.linear(context, x, self.weight, self.bias)
        return op.cast(context, op.multiply(context, result, op.view_vector_as_row(context, scales, len(result.shape))), result.item_bytes)


def _run_adapted(context: ComputeContext, x: Tensor, layer: LinearLayer, adapter: Adapter) -> Tensor:
    """Run a linear layer and add the scaled output of its adapter, as PEFT does."""
    result = op.linear(context, x, layer.weight, layer.bias)
    item = result.item_bytes
    x = op.cast(context, x, adapter.matrix_a.item_bytes) if adapter.casts_inputs else x
    if adapter.magnitude is not None:
        result = op.add(context, result, _run_dora(context, op.dropout(context, x) if adapter.has_dropout else x, layer, adapter, result))
    elif adapter.has_dropout:
        result = op.add(context, result, op.scale(context, op.linear(context, op.linear(context, op.dropout(context, x), adapter.matrix_a), adapter.matrix_b)))
    else:
        result = op.add(context, result, op.scale(context, op.linear(context, op.linear(context, x, adapter.matrix_a), adapter.matrix_b)))
    return op.cast(context, result, item)


def _run_dora(context: ComputeContext, x: Tensor, layer: LinearLayer, adapter: Adapter, result: Tensor) -> Tensor:
    """Return the change of the output by DoRA. While the norms of the changed weight are computed, this weight and two more tensors of the same size exist."""
    weight_values = layer.weight.numel
    product = context.tape.allocate(weight_values * adapter.matrix_a.item_bytes)
    changed = context.tape.allocate(2 * weight_values * adapter.matrix_a.item_bytes)
    del product, changed
    update = op.linear(context, op.linear(context, x, adapter.matrix_a), adapter.matrix_b)
    assert adapter.magnitude is not None
    row = op.view_vector_as_row(context, adapter.magnitude, len(result.shape))
    return op.add(context, op.multiply(context, row, result), op.scale(context, op.multiply(context, row, update)))


@dataclass(eq=False)
class Experts:
    """The weights of the routed experts of one layer. Each tensor holds the weights of all experts."""

    router: Parameter
    gate_up: Parameter
    down: Parameter


@dataclass(eq=False)
class Layer:
    """The weights of one decoder layer."""

    linear: dict[str, LinearLayer]
    norms: list[Parameter]
    head_norms: list[Parameter] = field(default_factory=list)
    experts: Experts | None = None
    prefix: Parameter | None = None
    """Trained keys and values that prefix tuning puts in front of the keys and values of the tokens."""

    def parameters(self) -> list[Parameter]:
        """Return all weights of the layer, including adapters."""
        found: list[Parameter] = []
        for linear in self.linear.values():
            found += [linear.weight, *([linear.bias] if linear.bias else [])]
            if linear.scales:
                found.append(linear.scales)
            if linear.adapter:
                adapter = linear.adapter
                found += [adapter.matrix_a, adapter.matrix_b, *([adapter.magnitude] if adapter.magnitude else [])]
        found += [*self.head_norms, *self.norms, *([self.prefix] if self.prefix else [])]
        return found + ([self.experts.router, self.experts.gate_up, self.experts.down] if self.experts else [])


@dataclass(eq=False)
class Decoder:
    """The weights of a model."""

    shape: ModelShape
    embeddings: Parameter
    head: Parameter
    norm: Parameter
    layers: list[Layer]
    prompt: Parameter | None = None
    """Trained virtual tokens that prompt tuning puts in front of each row."""

    def parameters(self) -> list[Parameter]:
        """Return all weights of the model. Tied weights are returned once."""
        found = [self.embeddings, *(one for layer in self.layers for one in layer.parameters()), self.norm]
        found += [] if self.head is self.embeddings else [self.head]
        return [*found, *([self.prompt] if self.prompt else [])]


def linear_layer_sizes(shape: ModelShape, layer: int) -> dict[str, tuple[int, int]]:
    """Return the numbers of outputs and inputs of each linear layer in decoder layer number `layer`, by the layer's name in transformers."""
    query, keys = shape.head_count * shape.head_size, shape.key_value_head_count * shape.head_size
    if shape.has_fused_projections:
        sizes = {"qkv_proj": (query + 2 * keys, shape.hidden_size)}
    else:
        sizes = {"q_proj": (query, shape.hidden_size), "k_proj": (keys, shape.hidden_size), "v_proj": (keys, shape.hidden_size)}
    sizes["o_proj"] = (shape.hidden_size, query)
    feed_forward = shape.feed_forward_size if layer < shape.layer_count - shape.expert_layer_count else shape.shared_feed_forward_size
    if feed_forward and shape.has_fused_projections:
        sizes |= {"gate_up_proj": (2 * feed_forward, shape.hidden_size), "down_proj": (shape.hidden_size, feed_forward)}
    elif feed_forward:
        sizes |= {"gate_proj": (feed_forward, shape.hidden_size), "up_proj": (feed_forward, shape.hidden_size), "down_proj": (shape.hidden_size, feed_forward)}
    return sizes


class ForwardPass:
    """Records the forward pass of a decoder on a tape."""

    def __init__(self, model: Decoder, context: ComputeContext, kernels: Kernels, batch: Batch) -> None:
        self.model, self.shape, self.context, self.kernels, self.batch = model, model.shape, context, kernels, batch

    @property
    def eager_mask_bytes(self) -> float:
        """Bytes of each number of the mask that transformers builds for eager attention. The mask has the dtype of the embeddings."""
        return max(self.model.embeddings.item_bytes, 2)

    def embed(self, *, requires_gradient: bool) -> Tensor:
        """Return the embeddings of the tokens.

        `requires_gradient`: whether the embeddings of the tokens need a gradient even if the embedding weights are frozen.
        """
        tape, weight = self.context.tape, self.model.embeddings
        output = tape.tensor((self.batch.row_count, self.batch.tokens_per_row, self.shape.hidden_size), max(weight.item_bytes, 2))
        output = tape.record([weight], output, [Gradient(weight.numel, weight.item_bytes)])
        if self.model.prompt is not None:
            output = tape.record([self.model.prompt], output, [Gradient(self.model.prompt.numel, self.model.prompt.item_bytes)])
        if requires_gradient and output.node is None:
            unused = Parameter((0,), 1, tape.allocate(0), is_trained=True)
            output = tape.record([unused], output, [Gradient(0, 1)])
        return op.scale(self.context, output) if self.shape.is_gemma else output

    def compute_positions(self, item_bytes: float) -> tuple[Tensor, Tensor]:
        """Return the cosines and the sines of the rotary position embedding."""
        shape = (1 if self.batch.row_count > 1 else self.batch.row_count, self.batch.tokens_per_row, 1, self.shape.head_size)
        tensor = self.context.tape.tensor
        return tensor(shape, item_bytes, MemoryPart.BUFFERS), tensor(shape, item_bytes, MemoryPart.BUFFERS)

    def run_layer(self, layer: Layer, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Run one decoder layer:

        attention, then the feed-forward layer. A norm precedes both attention and the feed-forward layer; in some models, another norm follows each of them.
        """
        context, residual = self.context, x
        x = self._apply_norm(x, layer.norms[0])
        x = self._run_attention(layer, x, positions)
        if len(layer.norms) == 4:
            x = self._apply_norm(x, layer.norms[1])
        x = op.add(context, residual, x)
        residual = x
        x = self._apply_norm(x, layer.norms[-2 if len(layer.norms) == 4 else 1])
        x = self._run_feed_forward(layer, x)
        if len(layer.norms) == 4:
            x = self._apply_norm(x, layer.norms[-1])
        return op.add(context, residual, x)

    def apply_final_norm(self, x: Tensor) -> Tensor:
        """Apply the norm that follows the last layer."""
        return self._apply_norm(x, self.model.norm)

    def _apply_norm(self, x: Tensor, weight: Parameter) -> Tensor:
        return op.apply_rms_norm(self.context, x, weight, adds_one=self.shape.is_gemma, is_fused=self.kernels.uses_liger)

    def _run_attention(self, layer: Layer, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self._project(layer, x)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        if layer.prefix is not None:
            count = layer.prefix.shape[0]
            key, value = op.prepend(self.context, key, layer.prefix, count), op.prepend(self.context, value, layer.prefix, count)
        output = self._attend(query, key, value)
        # `query`, `key` and `value` stay in memory until this function returns, as in transformers.
        return layer.linear["o_proj"](self.context, output.view(*x.shape[:-1], self.shape.head_count * self.shape.head_size))

    def _project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, rows, tokens = self.shape, self.batch.row_count, self.batch.tokens_per_row
        if shape.has_fused_projections:
            joint = layer.linear["qkv_proj"](self.context, x)
            heads = (shape.head_count, shape.key_value_head_count, shape.key_value_head_count)
            query, key, value = (op.take_slice(self.context, joint, rows, tokens, count, shape.head_size) for count in heads)
            return query, key, value
        query = layer.linear["q_proj"](self.context, x).view(rows, tokens, shape.head_count, shape.head_size)
        query = self._apply_norm(query, layer.head_norms[0]) if layer.head_norms else query
        key = layer.linear["k_proj"](self.context, x).view(rows, tokens, shape.key_value_head_count, shape.head_size)
        key = self._apply_norm(key, layer.head_norms[1]) if layer.head_norms else key
        value = layer.linear["v_proj"](self.context, x).view(rows, tokens, shape.key_value_head_count, shape.head_size)
        return query, key, value

    def _rotate(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        if self.kernels.uses_liger:  # Liger's kernel overwrites its input
            return self.context.tape.record([x], x.view(*x.shape), [Gradient(x.numel, x.item_bytes, is_shared=True)])
        return op.apply_rotary_embedding(self.context, x, *positions)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_eager = self.kernels.attention == "eager"
        repeats = self.shape.head_count // self.shape.key_value_head_count
        if is_eager or (self.kernels.attention == "sdpa" and (self.batch.has_mask or not self.kernels.is_gpu)):
            key, value = (op.repeat_heads(self.context, one, repeats, is_eager=is_eager) for one in (key, value))
        if is_eager:
            return op.attend_eagerly(self.context, query, key, value)
        return op.attend(self.context, query, key, value, has_mask=self.batch.has_mask and self.kernels.attention == "sdpa")

    def _run_feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        if layer.experts is None:
            return self._run_dense(layer, x)
        shared = self._run_dense(layer, x) if "down_proj" in layer.linear else None
        routed = self._run_experts(layer.experts, x)
        return routed if shared is None else op.add(self.context, routed, shared)

    def _run_dense(self, layer: Layer, x: Tensor) -> Tensor:
        context, linear = self.context, layer.linear
        if self.shape.has_fused_projections:
            joint = linear["gate_up_proj"](context, x)
            size = (*joint.shape[:-1], joint.shape[-1] // 2)
            gate, up = (op.take_slice(context, joint, *size) for _ in range(2))
            return linear["down_proj"](context, op.multiply(context, up, op.apply_activation(context, gate)))
        if self.kernels.uses_liger:
            return linear["down_proj"](context, self._fused_gate(linear["gate_proj"](context, x), linear["up_proj"](context, x)))
        return linear["down_proj"](
            context, op.multiply(context, op.apply_activation(context, linear["gate_proj"](context, x)), linear["up_proj"](context, x))
        )

    def _fused_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply the activated gate by `up` with Liger's kernel, which keeps its inputs and writes their gradients into them."""
        gradients = [Gradient(0, 1), Gradient(0, 1)]
        return self.context.tape.record([gate, up], self.context.tape.tensor(up.shape, up.item_bytes), gradients, [gate.storage, up.storage])

    def _run_experts(self, experts: Experts, x: Tensor) -> Tensor:
        """Run the routed experts as grouped products over all experts. Each token is copied once for each expert that processes it."""
        context, tape, chosen = self.context, self.context.tape, self.shape.experts_per_token
        tokens = x.numel // x.shape[-1]
        flat = x.view(tokens, x.shape[-1])
        weights = self._compute_expert_weights(experts, flat)
        copies = tape.record(
            [flat], tape.tensor((tokens * chosen, x.shape[-1]), x.item_bytes), [Gradient(flat.numel, x.item_bytes)], [tape.allocate(tokens * chosen * 8)]
        )
        joint = op.grouped_linear(context, copies, experts.gate_up)
        size = (joint.shape[0], joint.shape[1] // 2)
        gate, up = op.take_slice(self.context, joint, *size), Tensor(size, joint.item_bytes, joint.storage, None)
        up.node = joint.node
        joint = op.multiply(context, op.apply_activation(context, gate), up)
        joint = op.grouped_linear(context, joint, experts.down)
        weighted = op.multiply(context, joint, weights)
        ordered = tape.record(
            [weighted], tape.tensor(weighted.shape, weighted.item_bytes), [Gradient(weighted.numel, weighted.item_bytes)],
            [tape.allocate(tokens * chosen * 8)],
        )  # fmt: skip
        output = tape.tensor((tokens, x.shape[-1]), ordered.item_bytes)
        output = tape.record([ordered], output, [Gradient(output.numel, output.item_bytes, is_shared=True)])
        return op.cast(context, output, x.item_bytes).view(*x.shape)

    def _compute_expert_weights(self, experts: Experts, x: Tensor) -> Tensor:
        """Return the factors by which the outputs of each token's experts are multiplied before they are added."""
        context, tape = self.context, self.context.tape
        probabilities = op.cast(context, op.linear(context, x, experts.router), op.FLOAT32_BYTES)
        chances = tape.tensor(probabilities.shape, op.FLOAT32_BYTES)
        chances = tape.record([probabilities], chances, [Gradient(chances.numel, op.FLOAT32_BYTES)], [chances.storage])
        chosen = tape.tensor((x.shape[0] * self.shape.experts_per_token, 1), op.FLOAT32_BYTES)
        return tape.record([chances], chosen, [Gradient(chances.numel, op.FLOAT32_BYTES)], [tape.allocate(chosen.numel * 8)])


@dataclass(frozen=True)
class TrainedWeights:
    """The weights that a fine-tuning method trains, and the precision of all weights."""

    base_value_bytes: float
    """Bytes of one value in the base model's linear layers."""
    other_value_bytes: float
    """Bytes of one value in embeddings, head, norms, biases and experts."""
    trains_base_weights: bool
    """Whether the method trains the weights of the base model."""
    lora_rank: int = 0
    """Rank of the LoRA adapters."""
    target_layers: frozenset[str] = frozenset()
    """Names of the linear layers that have a LoRA adapter."""
    has_dropout: bool = False
    is_dora: bool = False
    casts_inputs: bool = True
    """Whether PEFT converts the inputs of an adapter to the precision of its matrices."""
    ia3_layers: frozenset[str] = frozenset()
    """Names of the linear layers whose outputs or inputs IA3 scales."""
    ia3_input_layers: frozenset[str] = frozenset()
    """Names of those `ia3_layers` whose inputs IA3 scales. Of the other `ia3_layers`, IA3 scales the outputs."""
    prompt_tokens: int = 0
    """Number of trained virtual tokens in front of each row (prompt tuning). `Batch.tokens_per_row` includes the virtual tokens."""
    prefix_tokens: int = 0
    """Number of trained keys and values in each layer (prefix tuning)."""
    has_score_head: bool = False
    """Whether a trained head with one output replaces the head over the vocabulary, as in a reward model."""
    weight_shards: int = 1
    """Number of ranks among which the weights are split."""
    gradient_shards: int = 1
    """Number of ranks among which the gradients are split."""


def build_decoder(tape: Tape, shape: ModelShape, trained: TrainedWeights) -> Decoder:
    """Allocate the weights of a model on a tape."""

    def weight(item_bytes: float, *size: int, is_trained: bool = trained.trains_base_weights) -> Parameter:
        values = 1
        for dimension in size:
            values *= dimension
        storage = tape.allocate(values * item_bytes / trained.weight_shards, MemoryPart.WEIGHTS)
        return Parameter(size, item_bytes, storage, is_trained, gradient_shards=trained.gradient_shards)

    def linear(name: str, outputs: int, inputs: int, has_bias: bool) -> LinearLayer:
        bias = weight(trained.other_value_bytes, outputs) if has_bias else None
        layer = LinearLayer(weight(trained.base_value_bytes, outputs, inputs), bias)
        if name in trained.target_layers:
            a = weight(op.FLOAT32_BYTES, trained.lora_rank, inputs, is_trained=True)
            b = weight(op.FLOAT32_BYTES, outputs, trained.lora_rank, is_trained=True)
            magnitude = weight(op.FLOAT32_BYTES, outputs, is_trained=True) if trained.is_dora else None
            layer.adapter = Adapter(a, b, trained.has_dropout, magnitude, trained.casts_inputs)
        if name in trained.ia3_layers:
            layer.scales_inputs = name in trained.ia3_input_layers
            layer.scales = weight(op.FLOAT32_BYTES, inputs if layer.scales_inputs else outputs, is_trained=True)
        return layer

    def decoder_layer(index: int) -> Layer:
        sizes, biases = linear_layer_sizes(shape, index), _layers_with_bias(shape)
        layer = Layer({name: linear(name, *size, biases.get(name, False)) for name, size in sizes.items()}, [])
        layer.norms = [weight(trained.other_value_bytes, shape.hidden_size) for _ in range(shape.norms_per_layer)]
        if shape.has_head_norms:
            layer.head_norms = [weight(trained.other_value_bytes, shape.head_size) for _ in range(2)]
        if trained.prefix_tokens:
            layer.prefix = weight(op.FLOAT32_BYTES, trained.prefix_tokens, 2 * shape.key_value_head_count * shape.head_size, is_trained=True)
        if index >= shape.layer_count - shape.expert_layer_count:
            inner = shape.expert_feed_forward_size
            # bitsandbytes quantises only linear layers, not the tensors that hold the weights of all experts.
            gate_up = weight(trained.other_value_bytes, shape.expert_count, 2 * inner, shape.hidden_size)
            down = weight(trained.other_value_bytes, shape.expert_count, shape.hidden_size, inner)
            layer.experts = Experts(weight(trained.other_value_bytes, shape.expert_count, shape.hidden_size), gate_up, down)
        return layer

    embeddings = weight(trained.other_value_bytes, shape.vocabulary_size, shape.hidden_size)
    if trained.has_score_head:  # with an adapter, the score head is trained in 32 bits
        head = weight(trained.other_value_bytes if trained.trains_base_weights else op.FLOAT32_BYTES, 1, shape.hidden_size, is_trained=True)
    else:
        head = embeddings if shape.ties_embeddings else weight(trained.other_value_bytes, shape.vocabulary_size, shape.hidden_size)
    prompt = weight(op.FLOAT32_BYTES, trained.prompt_tokens, shape.hidden_size, is_trained=True) if trained.prompt_tokens else None
    layers = [decoder_layer(index) for index in range(shape.layer_count)]
    return Decoder(shape, embeddings, head, weight(trained.other_value_bytes, shape.hidden_size), layers, prompt)


def copy_adapters(tape: Tape, model: Decoder) -> Decoder:
    """Return a model with frozen copies of all trained weights of `model`. The returned model shares all other weights with `model`."""

    def copy(weight: Parameter) -> Parameter:
        return Parameter(weight.shape, weight.item_bytes, tape.allocate(weight.storage.byte_count, MemoryPart.WEIGHTS)) if weight.is_trained else weight

    def copy_linear(linear: LinearLayer) -> LinearLayer:
        adapter = linear.adapter
        if adapter is not None:
            magnitude = copy(adapter.magnitude) if adapter.magnitude else None
            adapter = replace(adapter, matrix_a=copy(adapter.matrix_a), matrix_b=copy(adapter.matrix_b), magnitude=magnitude)
        return replace(linear, adapter=adapter, scales=copy(linear.scales) if linear.scales else None)

    def copy_layer(layer: Layer) -> Layer:
        linear = {name: copy_linear(one) for name, one in layer.linear.items()}
        return replace(layer, linear=linear, prefix=copy(layer.prefix) if layer.prefix else None)

    return replace(model, layers=[copy_layer(layer) for layer in model.layers], prompt=copy(model.prompt) if model.prompt else None)


def _layers_with_bias(shape: ModelShape) -> Mapping[str, bool]:
    """Return whether a linear layer has a bias, by its name in transformers."""
    feed_forward = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.has_feed_forward_bias)
    return dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), shape.has_attention_bias) | {"o_proj": shape.has_output_bias} | feed_forward
