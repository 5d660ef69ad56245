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
    ia3_scales: Parameter | None = None
    """The vector with which IA3 scales the inputs or the outputs of the layer."""
    ia3_scales_inputs: bool = False
    """Whether IA3 scales the inputs instead of the outputs."""

    def __call__(self, context: ComputeContext, hidden_states: Tensor) -> Tensor:
        if self.ia3_scales is not None:
            return self._run_with_ia3_scales(context, hidden_states, self.ia3_scales)
        if self.adapter is None:
            return op.linear(context, hidden_states, self.weight, self.bias)
        return _run_with_adapter(context, hidden_states, self, self.adapter)

    def _run_with_ia3_scales(self, context: ComputeContext, hidden_states: Tensor, scales: Parameter) -> Tensor:
        """Run the layer with IA3's scales, as PEFT does."""
        if self.ia3_scales_inputs:
            item_bytes = hidden_states.item_bytes
            hidden_states = op.cast(context, hidden_states, scales.item_bytes)
            scaled_states = op.cast(context, op.multiply(context, hidden_states, op.view_vector_as_row(context, scales, len(hidden_states.shape))), item_bytes)
            return op.linear(context, scaled_states, self.weight, self.bias)
        output = op.linear(context, hidden_states, self.weight, self.bias)
        return op.cast(context, op.multiply(context, output, op.view_vector_as_row(context, scales, len(output.shape))), output.item_bytes)


def _run_with_adapter(context: ComputeContext, hidden_states: Tensor, layer: LinearLayer, adapter: Adapter) -> Tensor:
    """Run a linear layer and add the scaled output of its adapter, as PEFT does."""
    output = op.linear(context, hidden_states, layer.weight, layer.bias)
    item_bytes = output.item_bytes
    hidden_states = op.cast(context, hidden_states, adapter.matrix_a.item_bytes) if adapter.casts_inputs else hidden_states
    if adapter.magnitude is not None:
        output = op.add(
            context, output,
            _compute_dora_change(context, op.apply_dropout(context, hidden_states) if adapter.has_dropout else hidden_states, layer, adapter, output),
        )  # fmt: skip
    elif adapter.has_dropout:
        output = op.add(
            context, output,
            op.scale(context, op.linear(context, op.linear(context, op.apply_dropout(context, hidden_states), adapter.matrix_a), adapter.matrix_b)),
        )  # fmt: skip
    else:
        output = op.add(context, output, op.scale(context, op.linear(context, op.linear(context, hidden_states, adapter.matrix_a), adapter.matrix_b)))
    return op.cast(context, output, item_bytes)


def _compute_dora_change(context: ComputeContext, hidden_states: Tensor, layer: LinearLayer, adapter: Adapter, output: Tensor) -> Tensor:
    """Return the change of the output by DoRA. While the norms of the changed weight are computed, this weight and two more tensors of the same size exist."""
    weight_value_count = layer.weight.numel
    adapter_product = context.tape.allocate(weight_value_count * adapter.matrix_a.item_bytes)
    changed_weight = context.tape.allocate(2 * weight_value_count * adapter.matrix_a.item_bytes)
    del adapter_product, changed_weight
    adapter_output = op.linear(context, op.linear(context, hidden_states, adapter.matrix_a), adapter.matrix_b)
    assert adapter.magnitude is not None
    magnitude_row = op.view_vector_as_row(context, adapter.magnitude, len(output.shape))
    return op.add(context, op.multiply(context, magnitude_row, output), op.scale(context, op.multiply(context, magnitude_row, adapter_output)))


@dataclass(eq=False)
class Experts:
    """The weights of the routed experts of one layer. Each tensor holds the weights of all experts."""

    router: Parameter
    gate_up: Parameter
    down: Parameter


@dataclass(eq=False)
class Layer:
    """The weights of one decoder layer."""

    linear_layers: dict[str, LinearLayer]
    """The linear layers, by their name in transformers."""
    norms: list[Parameter]
    head_norms: list[Parameter] = field(default_factory=list)
    experts: Experts | None = None
    prefix: Parameter | None = None
    """Trained keys and values that prefix tuning puts in front of the keys and values of the tokens."""

    def parameters(self) -> list[Parameter]:
        """Return all weights of the layer, including adapters."""
        parameters: list[Parameter] = []
        for linear_layer in self.linear_layers.values():
            parameters += [linear_layer.weight, *([linear_layer.bias] if linear_layer.bias else [])]
            if linear_layer.ia3_scales:
                parameters.append(linear_layer.ia3_scales)
            if linear_layer.adapter:
                adapter = linear_layer.adapter
                parameters += [adapter.matrix_a, adapter.matrix_b, *([adapter.magnitude] if adapter.magnitude else [])]
        parameters += [*self.head_norms, *self.norms, *([self.prefix] if self.prefix else [])]
        return parameters + ([self.experts.router, self.experts.gate_up, self.experts.down] if self.experts else [])


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
        parameters = [self.embeddings, *(parameter for layer in self.layers for parameter in layer.parameters()), self.norm]
        parameters += [] if self.head is self.embeddings else [self.head]
        return [*parameters, *([self.prompt] if self.prompt else [])]


def map_linear_layer_sizes(shape: ModelShape, layer_index: int) -> dict[str, tuple[int, int]]:
    """Return the numbers of outputs and inputs of each linear layer in decoder layer number `layer_index`, by the layer's name in transformers."""
    query_size, key_size = shape.head_count * shape.head_size, shape.key_value_head_count * shape.head_size
    if shape.has_fused_projections:
        sizes = {"qkv_proj": (query_size + 2 * key_size, shape.hidden_size)}
    else:
        sizes = {"q_proj": (query_size, shape.hidden_size), "k_proj": (key_size, shape.hidden_size), "v_proj": (key_size, shape.hidden_size)}
    sizes["o_proj"] = (shape.hidden_size, query_size)
    feed_forward_size = shape.feed_forward_size if layer_index < shape.layer_count - shape.expert_layer_count else shape.shared_feed_forward_size
    if feed_forward_size and shape.has_fused_projections:
        sizes |= {"gate_up_proj": (2 * feed_forward_size, shape.hidden_size), "down_proj": (shape.hidden_size, feed_forward_size)}
    elif feed_forward_size:
        sizes |= dict.fromkeys(("gate_proj", "up_proj"), (feed_forward_size, shape.hidden_size)) | {"down_proj": (shape.hidden_size, feed_forward_size)}
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
            placeholder_parameter = Parameter((0,), 1, tape.allocate(0), is_trained=True)
            output = tape.record([placeholder_parameter], output, [Gradient(0, 1)])
        return op.scale(self.context, output) if self.shape.is_gemma else output

    def compute_positions(self, item_bytes: float) -> tuple[Tensor, Tensor]:
        """Return the cosines and the sines of the rotary position embedding."""
        shape = (1 if self.batch.row_count > 1 else self.batch.row_count, self.batch.tokens_per_row, 1, self.shape.head_size)
        make_tensor = self.context.tape.tensor
        return make_tensor(shape, item_bytes, MemoryPart.BUFFERS), make_tensor(shape, item_bytes, MemoryPart.BUFFERS)

    def run_layer(self, layer: Layer, hidden_states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Run one decoder layer: attention, then the feed-forward layer.

        One norm precedes attention, and another one precedes the feed-forward layer. In some models, a norm also follows each of the two.
        """
        context, residual = self.context, hidden_states
        hidden_states = self._apply_norm(hidden_states, layer.norms[0])
        hidden_states = self._run_attention(layer, hidden_states, positions)
        if len(layer.norms) == 4:
            hidden_states = self._apply_norm(hidden_states, layer.norms[1])
        hidden_states = op.add(context, residual, hidden_states)
        residual = hidden_states
        hidden_states = self._apply_norm(hidden_states, layer.norms[-2 if len(layer.norms) == 4 else 1])
        hidden_states = self._run_feed_forward(layer, hidden_states)
        if len(layer.norms) == 4:
            hidden_states = self._apply_norm(hidden_states, layer.norms[-1])
        return op.add(context, residual, hidden_states)

    def apply_final_norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the norm that follows the last layer."""
        return self._apply_norm(hidden_states, self.model.norm)

    def _apply_norm(self, hidden_states: Tensor, weight: Parameter) -> Tensor:
        return op.apply_rms_norm(self.context, hidden_states, weight, adds_one=self.shape.is_gemma, is_fused=self.kernels.uses_liger)

    def _run_attention(self, layer: Layer, hidden_states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self._compute_query_key_value(layer, hidden_states)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        if layer.prefix is not None:
            prefix_token_count = layer.prefix.shape[0]
            key, value = op.prepend(self.context, key, layer.prefix, prefix_token_count), op.prepend(self.context, value, layer.prefix, prefix_token_count)
        output = self._attend(query, key, value)
        # `query`, `key` and `value` stay in memory until this function returns, as in transformers.
        return layer.linear_layers["o_proj"](self.context, output.view(*hidden_states.shape[:-1], self.shape.head_count * self.shape.head_size))

    def _compute_query_key_value(self, layer: Layer, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, row_count, token_count = self.shape, self.batch.row_count, self.batch.tokens_per_row
        if shape.has_fused_projections:
            joint_output = layer.linear_layers["qkv_proj"](self.context, hidden_states)
            head_counts = (shape.head_count, shape.key_value_head_count, shape.key_value_head_count)
            query, key, value = (op.take_slice(self.context, joint_output, row_count, token_count, head_count, shape.head_size) for head_count in head_counts)
            return query, key, value
        query = layer.linear_layers["q_proj"](self.context, hidden_states).view(row_count, token_count, shape.head_count, shape.head_size)
        query = self._apply_norm(query, layer.head_norms[0]) if layer.head_norms else query
        key = layer.linear_layers["k_proj"](self.context, hidden_states).view(row_count, token_count, shape.key_value_head_count, shape.head_size)
        key = self._apply_norm(key, layer.head_norms[1]) if layer.head_norms else key
        value = layer.linear_layers["v_proj"](self.context, hidden_states).view(row_count, token_count, shape.key_value_head_count, shape.head_size)
        return query, key, value

    def _rotate(self, heads: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        if self.kernels.uses_liger:  # Liger's kernel overwrites its input
            return self.context.tape.record([heads], heads.view(*heads.shape), [Gradient(heads.numel, heads.item_bytes, is_shared=True)])
        return op.apply_rotary_embedding(self.context, heads, *positions)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_eager = self.kernels.attention == "eager"
        repeat_count = self.shape.head_count // self.shape.key_value_head_count
        if is_eager or (self.kernels.attention == "sdpa" and (self.batch.has_mask or not self.kernels.is_gpu)):
            key, value = (op.repeat_heads(self.context, heads, repeat_count, is_eager=is_eager) for heads in (key, value))
        if is_eager:
            return op.attend_eagerly(self.context, query, key, value)
        return op.attend(self.context, query, key, value, has_mask=self.batch.has_mask and self.kernels.attention == "sdpa")

    def _run_feed_forward(self, layer: Layer, hidden_states: Tensor) -> Tensor:
        if layer.experts is None:
            return self._run_dense_feed_forward(layer, hidden_states)
        shared_output = self._run_dense_feed_forward(layer, hidden_states) if "down_proj" in layer.linear_layers else None
        routed_output = self._run_experts(layer.experts, hidden_states)
        return routed_output if shared_output is None else op.add(self.context, routed_output, shared_output)

    def _run_dense_feed_forward(self, layer: Layer, hidden_states: Tensor) -> Tensor:
        context, linear_layers = self.context, layer.linear_layers
        if self.shape.has_fused_projections:
            joint_output = linear_layers["gate_up_proj"](context, hidden_states)
            half_shape = (*joint_output.shape[:-1], joint_output.shape[-1] // 2)
            gate, up = (op.take_slice(context, joint_output, *half_shape) for _ in range(2))
            return linear_layers["down_proj"](context, op.multiply(context, up, op.apply_activation(context, gate)))
        if self.kernels.uses_liger:
            return linear_layers["down_proj"](
                context, self._multiply_by_fused_gate(linear_layers["gate_proj"](context, hidden_states), linear_layers["up_proj"](context, hidden_states))
            )
        return linear_layers["down_proj"](
            context,
            op.multiply(
                context, op.apply_activation(context, linear_layers["gate_proj"](context, hidden_states)), linear_layers["up_proj"](context, hidden_states)
            ),
        )

    def _multiply_by_fused_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply the activated gate by `up` with Liger's kernel, which keeps its inputs and writes their gradients into them."""
        gradients = [Gradient(0, 1), Gradient(0, 1)]
        return self.context.tape.record([gate, up], self.context.tape.tensor(up.shape, up.item_bytes), gradients, [gate.storage, up.storage])

    def _run_experts(self, experts: Experts, hidden_states: Tensor) -> Tensor:
        """Run the routed experts as grouped products over all experts. Each token is copied once for each expert that processes it."""
        context, tape, experts_per_token = self.context, self.context.tape, self.shape.experts_per_token
        token_count = hidden_states.numel // hidden_states.shape[-1]
        flat_states = hidden_states.view(token_count, hidden_states.shape[-1])
        expert_weights = self._compute_expert_weights(experts, flat_states)
        token_copies = tape.record(
            [flat_states], tape.tensor((token_count * experts_per_token, hidden_states.shape[-1]), hidden_states.item_bytes),
            [Gradient(flat_states.numel, hidden_states.item_bytes)], [tape.allocate(token_count * experts_per_token * 8)],
        )  # fmt: skip
        expert_output = op.grouped_linear(context, token_copies, experts.gate_up)
        half_shape = (expert_output.shape[0], expert_output.shape[1] // 2)
        gate, up = op.take_slice(self.context, expert_output, *half_shape), Tensor(half_shape, expert_output.item_bytes, expert_output.storage, None)
        up.node = expert_output.node
        expert_output = op.multiply(context, op.apply_activation(context, gate), up)
        expert_output = op.grouped_linear(context, expert_output, experts.down)
        weighted_output = op.multiply(context, expert_output, expert_weights)
        ordered_output = tape.record(
            [weighted_output], tape.tensor(weighted_output.shape, weighted_output.item_bytes), [Gradient(weighted_output.numel, weighted_output.item_bytes)],
            [tape.allocate(token_count * experts_per_token * 8)],
        )  # fmt: skip
        output = tape.tensor((token_count, hidden_states.shape[-1]), ordered_output.item_bytes)
        output = tape.record([ordered_output], output, [Gradient(output.numel, output.item_bytes, is_shared=True)])
        return op.cast(context, output, hidden_states.item_bytes).view(*hidden_states.shape)

    def _compute_expert_weights(self, experts: Experts, hidden_states: Tensor) -> Tensor:
        """Return the factors by which the outputs of each token's experts are multiplied before they are added."""
        context, tape = self.context, self.context.tape
        router_logits = op.cast(context, op.linear(context, hidden_states, experts.router), op.FLOAT32_BYTES)
        probabilities = tape.tensor(router_logits.shape, op.FLOAT32_BYTES)
        probabilities = tape.record([router_logits], probabilities, [Gradient(probabilities.numel, op.FLOAT32_BYTES)], [probabilities.storage])
        chosen_probabilities = tape.tensor((hidden_states.shape[0] * self.shape.experts_per_token, 1), op.FLOAT32_BYTES)
        gradients = [Gradient(probabilities.numel, op.FLOAT32_BYTES)]
        return tape.record([probabilities], chosen_probabilities, gradients, [tape.allocate(chosen_probabilities.numel * 8)])


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


def build_decoder(tape: Tape, shape: ModelShape, trained_weights: TrainedWeights) -> Decoder:
    """Allocate the weights of a model on a tape."""

    def make_weight(item_bytes: float, *shape_of_weight: int, is_trained: bool = trained_weights.trains_base_weights) -> Parameter:
        value_count = 1
        for dimension in shape_of_weight:
            value_count *= dimension
        storage = tape.allocate(value_count * item_bytes / trained_weights.weight_shards, MemoryPart.WEIGHTS)
        return Parameter(shape_of_weight, item_bytes, storage, is_trained, gradient_shards=trained_weights.gradient_shards)

    def make_linear_layer(name: str, output_count: int, input_count: int, has_bias: bool) -> LinearLayer:
        bias = make_weight(trained_weights.other_value_bytes, output_count) if has_bias else None
        layer = LinearLayer(make_weight(trained_weights.base_value_bytes, output_count, input_count), bias)
        if name in trained_weights.target_layers:
            matrix_a = make_weight(op.FLOAT32_BYTES, trained_weights.lora_rank, input_count, is_trained=True)
            matrix_b = make_weight(op.FLOAT32_BYTES, output_count, trained_weights.lora_rank, is_trained=True)
            magnitude = make_weight(op.FLOAT32_BYTES, output_count, is_trained=True) if trained_weights.is_dora else None
            layer.adapter = Adapter(matrix_a, matrix_b, trained_weights.has_dropout, magnitude, trained_weights.casts_inputs)
        if name in trained_weights.ia3_layers:
            layer.ia3_scales_inputs = name in trained_weights.ia3_input_layers
            layer.ia3_scales = make_weight(op.FLOAT32_BYTES, input_count if layer.ia3_scales_inputs else output_count, is_trained=True)
        return layer

    def make_decoder_layer(index: int) -> Layer:
        sizes_by_name, has_bias_by_name = map_linear_layer_sizes(shape, index), _map_layers_to_bias(shape)
        layer = Layer({name: make_linear_layer(name, *sizes, has_bias_by_name.get(name, False)) for name, sizes in sizes_by_name.items()}, [])
        layer.norms = [make_weight(trained_weights.other_value_bytes, shape.hidden_size) for _ in range(shape.norms_per_layer)]
        if shape.has_head_norms:
            layer.head_norms = [make_weight(trained_weights.other_value_bytes, shape.head_size) for _ in range(2)]
        if trained_weights.prefix_tokens:
            layer.prefix = make_weight(op.FLOAT32_BYTES, trained_weights.prefix_tokens, 2 * shape.key_value_head_count * shape.head_size, is_trained=True)
        if index >= shape.layer_count - shape.expert_layer_count:
            expert_feed_forward_size = shape.expert_feed_forward_size
            # bitsandbytes quantises only linear layers, not the tensors that hold the weights of all experts.
            gate_up = make_weight(trained_weights.other_value_bytes, shape.expert_count, 2 * expert_feed_forward_size, shape.hidden_size)
            down = make_weight(trained_weights.other_value_bytes, shape.expert_count, shape.hidden_size, expert_feed_forward_size)
            layer.experts = Experts(make_weight(trained_weights.other_value_bytes, shape.expert_count, shape.hidden_size), gate_up, down)
        return layer

    embeddings = make_weight(trained_weights.other_value_bytes, shape.vocabulary_size, shape.hidden_size)
    if trained_weights.has_score_head:  # with an adapter, the score head is trained in 32 bits
        head_value_bytes = trained_weights.other_value_bytes if trained_weights.trains_base_weights else op.FLOAT32_BYTES
        head = make_weight(head_value_bytes, 1, shape.hidden_size, is_trained=True)
    else:
        head = embeddings if shape.ties_embeddings else make_weight(trained_weights.other_value_bytes, shape.vocabulary_size, shape.hidden_size)
    prompt = make_weight(op.FLOAT32_BYTES, trained_weights.prompt_tokens, shape.hidden_size, is_trained=True) if trained_weights.prompt_tokens else None
    layers = [make_decoder_layer(index) for index in range(shape.layer_count)]
    return Decoder(shape, embeddings, head, make_weight(trained_weights.other_value_bytes, shape.hidden_size), layers, prompt)


def copy_adapters(tape: Tape, model: Decoder) -> Decoder:
    """Return a model with frozen copies of all trained weights of `model`. The returned model shares all other weights with `model`."""

    def copy_if_trained(weight: Parameter) -> Parameter:
        return Parameter(weight.shape, weight.item_bytes, tape.allocate(weight.storage.byte_count, MemoryPart.WEIGHTS)) if weight.is_trained else weight

    def copy_linear_layer(linear_layer: LinearLayer) -> LinearLayer:
        adapter = linear_layer.adapter
        if adapter is not None:
            magnitude = copy_if_trained(adapter.magnitude) if adapter.magnitude else None
            adapter = replace(adapter, matrix_a=copy_if_trained(adapter.matrix_a), matrix_b=copy_if_trained(adapter.matrix_b), magnitude=magnitude)
        ia3_scales = copy_if_trained(linear_layer.ia3_scales) if linear_layer.ia3_scales else None
        return replace(linear_layer, adapter=adapter, ia3_scales=ia3_scales)

    def copy_layer(layer: Layer) -> Layer:
        linear_layers = {name: copy_linear_layer(linear_layer) for name, linear_layer in layer.linear_layers.items()}
        return replace(layer, linear_layers=linear_layers, prefix=copy_if_trained(layer.prefix) if layer.prefix else None)

    return replace(model, layers=[copy_layer(layer) for layer in model.layers], prompt=copy_if_trained(model.prompt) if model.prompt else None)


def _map_layers_to_bias(shape: ModelShape) -> Mapping[str, bool]:
    """Return whether each linear layer has a bias, by the layer's name in transformers."""
    feed_forward_bias_by_name = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.has_feed_forward_bias)
    return dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), shape.has_attention_bias) | {"o_proj": shape.has_output_bias} | feed_forward_bias_by_name
