"""The weights and the forward pass of a decoder, as transformers 5 computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.memory import operations as op
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.operations import Compute
from finetune_api.memory.tape import Gradient, Parameter, Part, Tape, Tensor


@dataclass(frozen=True)
class Kernels:
    """Which implementation computes the layers."""

    is_gpu: bool = True
    uses_liger: bool = False
    attention: str = "sdpa"
    """`sdpa`, `eager`, or a kernel for packed sequences (`varlen`, `flash_attention_2`)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    rows: int
    tokens: int
    """Tokens of each row, with padding."""
    has_mask: bool = False
    """Whether attention gets a mask of all pairs of tokens, because of padding or of several documents in a row."""


@dataclass(eq=False)
class Adapter:
    """The matrices of a LoRA adapter of one layer, and DoRA's magnitudes."""

    a: Parameter
    b: Parameter
    dropout: bool = False
    magnitude: Parameter | None = None
    casts_inputs: bool = True
    """Whether PEFT converts the inputs to the precision of the matrices. The trainer turns this off under autocast."""


@dataclass(eq=False)
class LinearLayer:
    """A linear layer with an adapter or without."""

    weight: Parameter
    bias: Parameter | None = None
    adapter: Adapter | None = None
    scales: Parameter | None = None
    """IA3's scales of the outputs, or of the inputs of the last layer of a feed-forward layer."""
    scales_inputs: bool = False

    def __call__(self, on: Compute, x: Tensor) -> Tensor:
        if self.scales is not None:
            return self._scaled(on, x, self.scales)
        if self.adapter is None:
            return op.linear(on, x, self.weight, self.bias)
        return _adapted(on, x, self, self.adapter)

    def _scaled(self, on: Compute, x: Tensor, scales: Parameter) -> Tensor:
        """The layer with IA3's scales, as PEFT computes it."""
        if self.scales_inputs:
            item = x.item_bytes
            x = op.cast(on, x, scales.item_bytes)
            scaled = op.cast(on, op.multiply(on, x, op.weight_row(on, scales, len(x.shape))), item)
            return op.linear(on, scaled, self.weight, self.bias)
        result = op.linear(on, x, self.weight, self.bias)
        return op.cast(on, op.multiply(on, result, op.weight_row(on, scales, len(result.shape))), result.item_bytes)


def _adapted(on: Compute, x: Tensor, layer: LinearLayer, adapter: Adapter) -> Tensor:
    """A linear layer plus the scaled product of the adapter's matrices, as PEFT computes it."""
    result = op.linear(on, x, layer.weight, layer.bias)
    item = result.item_bytes
    x = op.cast(on, x, adapter.a.item_bytes) if adapter.casts_inputs else x
    if adapter.magnitude is not None:
        result = op.add(on, result, _dora(on, op.dropout(on, x) if adapter.dropout else x, layer, adapter, result))
    elif adapter.dropout:
        result = op.add(on, result, op.scale(on, op.linear(on, op.linear(on, op.dropout(on, x), adapter.a), adapter.b)))
    else:
        result = op.add(on, result, op.scale(on, op.linear(on, op.linear(on, x, adapter.a), adapter.b)))
    return op.cast(on, result, item)


def _dora(on: Compute, x: Tensor, layer: LinearLayer, adapter: Adapter, result: Tensor) -> Tensor:
    """DoRA's change of the output. It computes the norms of the changed weight, which needs two weights of full size for a moment."""
    weight_values = layer.weight.values
    product = on.tape.allocate(weight_values * adapter.a.item_bytes)
    changed = on.tape.allocate(2 * weight_values * adapter.a.item_bytes)
    del product, changed
    update = op.linear(on, op.linear(on, x, adapter.a), adapter.b)
    assert adapter.magnitude is not None
    row = op.weight_row(on, adapter.magnitude, len(result.shape))
    return op.add(on, op.multiply(on, row, result), op.scale(on, op.multiply(on, row, update)))


@dataclass(eq=False)
class Experts:
    """Routed experts: the weights of all experts are one tensor each."""

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
    """Trained keys and values in front of those of the tokens."""

    def parameters(self) -> list[Parameter]:
        """All weights of the layer, adapters included."""
        found: list[Parameter] = []
        for one in self.linear.values():
            found += [one.weight, *([one.bias] if one.bias else [])]
            if one.scales:
                found.append(one.scales)
            if one.adapter:
                found += [one.adapter.a, one.adapter.b, *([one.adapter.magnitude] if one.adapter.magnitude else [])]
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
    """Virtual tokens in front of each row."""

    def parameters(self) -> list[Parameter]:
        """All weights; tied weights once."""
        found = [self.embeddings, *(one for layer in self.layers for one in layer.parameters()), self.norm]
        found += [] if self.head is self.embeddings else [self.head]
        return [*found, *([self.prompt] if self.prompt else [])]


def linear_sizes(shape: ModelShape, layer: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers of a decoder layer, by transformers' names."""
    query, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    if shape.has_fused_projections:
        sizes = {"qkv_proj": (query + 2 * keys, shape.hidden)}
    else:
        sizes = {"q_proj": (query, shape.hidden), "k_proj": (keys, shape.hidden), "v_proj": (keys, shape.hidden)}
    sizes["o_proj"] = (shape.hidden, query)
    feed_forward = shape.feed_forward if layer < shape.layers - shape.expert_layers else shape.shared_feed_forward
    if feed_forward and shape.has_fused_projections:
        sizes |= {"gate_up_proj": (2 * feed_forward, shape.hidden), "down_proj": (shape.hidden, feed_forward)}
    elif feed_forward:
        sizes |= {"gate_proj": (feed_forward, shape.hidden), "up_proj": (feed_forward, shape.hidden), "down_proj": (shape.hidden, feed_forward)}
    return sizes


class ForwardPass:
    """Runs the layers of a decoder on a tape."""

    def __init__(self, model: Decoder, on: Compute, kernels: Kernels, batch: Batch) -> None:
        self.model, self.shape, self.on, self.kernels, self.batch = model, model.shape, on, kernels, batch

    def embed(self, *, requires_gradient: bool) -> Tensor:
        """Look up the embeddings. `requires_gradient`: whether the output requires a gradient although the embeddings are frozen."""
        tape, weight = self.on.tape, self.model.embeddings
        output = tape.tensor((self.batch.rows, self.batch.tokens, self.shape.hidden), max(weight.item_bytes, 2))
        output = tape.record([weight], output, [Gradient(weight.values, weight.item_bytes)])
        if self.model.prompt is not None:
            output = tape.record([self.model.prompt], output, [Gradient(self.model.prompt.values, self.model.prompt.item_bytes)])
        if requires_gradient and output.node is None:
            unused = Parameter((0,), 1, tape.allocate(0), is_trained=True)
            output = tape.record([unused], output, [Gradient(0, 1)])
        return op.scale(self.on, output) if self.shape.is_gemma else output

    def positions(self, item_bytes: float) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions."""
        shape = (1 if self.batch.rows > 1 else self.batch.rows, self.batch.tokens, 1, self.shape.head_size)
        tensor = self.on.tape.tensor
        return tensor(shape, item_bytes, Part.BUFFERS), tensor(shape, item_bytes, Part.BUFFERS)

    def layer(self, layer: Layer, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """One decoder layer: attention and feed-forward layer, each with a norm before and possibly after it."""
        on, residual = self.on, x
        x = self._norm(x, layer.norms[0])
        x = self._attention(layer, x, positions)
        if len(layer.norms) == 4:
            x = self._norm(x, layer.norms[1])
        x = op.add(on, residual, x)
        residual = x
        x = self._norm(x, layer.norms[-2 if len(layer.norms) == 4 else 1])
        x = self._feed_forward(layer, x)
        if len(layer.norms) == 4:
            x = self._norm(x, layer.norms[-1])
        return op.add(on, residual, x)

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last layer."""
        return self._norm(x, self.model.norm)

    def _norm(self, x: Tensor, weight: Parameter) -> Tensor:
        return op.mean_square_norm(self.on, x, weight, adds_one=self.shape.is_gemma, is_fused=self.kernels.uses_liger)

    def _attention(self, layer: Layer, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self._project(layer, x)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        if layer.prefix is not None:
            count = layer.prefix.shape[0]
            key, value = op.prepend(self.on, key, layer.prefix, count), op.prepend(self.on, value, layer.prefix, count)
        output = self._attend(query, key, value)
        # These variables live until the function returns, as in transformers.
        return layer.linear["o_proj"](self.on, output.view(*x.shape[:-1], self.shape.heads * self.shape.head_size))

    def _project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape, rows, tokens = self.shape, self.batch.rows, self.batch.tokens
        if shape.has_fused_projections:
            joint = layer.linear["qkv_proj"](self.on, x)
            heads = (shape.heads, shape.key_heads, shape.key_heads)
            query, key, value = (self._slice(joint, rows, tokens, count, shape.head_size) for count in heads)
            return query, key, value
        query = layer.linear["q_proj"](self.on, x).view(rows, tokens, shape.heads, shape.head_size)
        query = self._norm(query, layer.head_norms[0]) if layer.head_norms else query
        key = layer.linear["k_proj"](self.on, x).view(rows, tokens, shape.key_heads, shape.head_size)
        key = self._norm(key, layer.head_norms[1]) if layer.head_norms else key
        value = layer.linear["v_proj"](self.on, x).view(rows, tokens, shape.key_heads, shape.head_size)
        return query, key, value

    def _slice(self, x: Tensor, *size: int) -> Tensor:
        """A slice of a tensor. Its gradient has the size of the whole tensor."""
        return self.on.tape.record([x], Tensor(size, x.item_bytes, x.storage), [Gradient(x.values, x.item_bytes)])

    def _rotate(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        if self.kernels.uses_liger:  # the kernel writes into its input
            return self.on.tape.record([x], x.view(*x.shape), [Gradient(x.values, x.item_bytes, is_shared=True)])
        return op.rotate(self.on, x, *positions)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_eager = self.kernels.attention == "eager"
        repeats = self.shape.heads // self.shape.key_heads
        if is_eager or (self.kernels.attention == "sdpa" and (self.batch.has_mask or not self.kernels.is_gpu)):
            key, value = op.repeat_heads(self.on, key, repeats), op.repeat_heads(self.on, value, repeats)
        if is_eager:
            return op.attend_eagerly(self.on, query, key, value)
        return op.attend(self.on, query, key, value, has_mask=self.batch.has_mask and self.kernels.attention == "sdpa")

    def _feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        if layer.experts is None:
            return self._dense(layer, x)
        shared = self._dense(layer, x) if "down_proj" in layer.linear else None
        routed = self._experts(layer.experts, x)
        return routed if shared is None else op.add(self.on, routed, shared)

    def _dense(self, layer: Layer, x: Tensor) -> Tensor:
        on, linear = self.on, layer.linear
        if self.shape.has_fused_projections:
            joint = linear["gate_up_proj"](on, x)
            size = (*joint.shape[:-1], joint.shape[-1] // 2)
            return linear["down_proj"](on, op.multiply(on, self._slice(joint, *size), op.activate(on, self._slice(joint, *size))))
        if self.kernels.uses_liger:
            return linear["down_proj"](on, self._fused_gate(linear["gate_proj"](on, x), linear["up_proj"](on, x)))
        return linear["down_proj"](
            on, op.multiply(on, op.activate(on, linear["gate_proj"](on, x)), linear["up_proj"](on, x))
        )

    def _fused_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Liger's kernel keeps its inputs and writes the gradients into them."""
        gradients = [Gradient(0, 1), Gradient(0, 1)]
        return self.on.tape.record([gate, up], self.on.tape.tensor(up.shape, up.item_bytes), gradients, [gate.storage, up.storage])

    def _experts(self, experts: Experts, x: Tensor) -> Tensor:
        """Routed experts, as one grouped product for all experts. Each token is copied once for each of its experts."""
        on, tape, chosen = self.on, self.on.tape, self.shape.experts_per_token
        tokens = x.values // x.shape[-1]
        flat = x.view(tokens, x.shape[-1])
        weights = self._route(experts, flat)
        copies = tape.record(
            [flat], tape.tensor((tokens * chosen, x.shape[-1]), x.item_bytes), [Gradient(flat.values, x.item_bytes)], [tape.allocate(tokens * chosen * 8)]
        )
        joint = op.grouped_linear(on, copies, experts.gate_up)
        size = (joint.shape[0], joint.shape[1] // 2)
        gate, up = self._slice(joint, *size), Tensor(size, joint.item_bytes, joint.storage, None)
        up.node = joint.node
        joint = op.multiply(on, op.activate(on, gate), up)
        joint = op.grouped_linear(on, joint, experts.down)
        weighted = op.multiply(on, joint, weights)
        ordered = tape.record(
            [weighted], tape.tensor(weighted.shape, weighted.item_bytes), [Gradient(weighted.values, weighted.item_bytes)],
            [tape.allocate(tokens * chosen * 8)],
        )  # fmt: skip
        output = tape.tensor((tokens, x.shape[-1]), ordered.item_bytes)
        output = tape.record([ordered], output, [Gradient(output.values, output.item_bytes, is_shared=True)])
        return op.cast(on, output, x.item_bytes).view(*x.shape)

    def _route(self, experts: Experts, x: Tensor) -> Tensor:
        """The weight of each of the chosen experts of each token."""
        on, tape = self.on, self.on.tape
        probabilities = op.cast(on, op.linear(on, x, experts.router), op.FLOAT)
        chances = tape.tensor(probabilities.shape, op.FLOAT)
        chances = tape.record([probabilities], chances, [Gradient(chances.values, op.FLOAT)], [chances.storage])
        chosen = tape.tensor((x.shape[0] * self.shape.experts_per_token, 1), op.FLOAT)
        return tape.record([chances], chosen, [Gradient(chances.values, op.FLOAT)], [tape.allocate(chosen.values * 8)])


@dataclass(frozen=True)
class TrainedWeights:
    """Which weights a method trains, and in which precision."""

    base_bytes: float
    """Bytes of each value of the base model's linear layers."""
    other_bytes: float
    """Bytes of each value of embeddings, head and norms."""
    trains_base: bool
    rank: int = 0
    targets: frozenset[str] = frozenset()
    dropout: bool = False
    is_dora: bool = False
    casts_inputs: bool = True
    """See `Adapter`."""
    scaled: frozenset[str] = frozenset()
    """Linear layers with IA3's scales."""
    input_scaled: frozenset[str] = frozenset()
    """Those of them whose inputs are scaled instead of their outputs."""
    prompt_tokens: int = 0
    """Trained virtual tokens in front of each row (prompt tuning). The tokens of the batch include them."""
    prefix_tokens: int = 0
    """Trained keys and values of each layer (prefix tuning)."""
    weight_shards: int = 1
    gradient_shards: int = 1


def build_decoder(tape: Tape, shape: ModelShape, trained: TrainedWeights) -> Decoder:
    """Allocate the weights of a model."""

    def weight(item_bytes: float, *size: int, is_trained: bool = trained.trains_base) -> Parameter:
        values = 1
        for one in size:
            values *= one
        storage = tape.allocate(values * item_bytes / trained.weight_shards, Part.WEIGHTS)
        return Parameter(size, item_bytes, storage, is_trained, shards=trained.gradient_shards)

    def linear(name: str, outputs: int, inputs: int, has_bias: bool) -> LinearLayer:
        bias = weight(trained.other_bytes, outputs) if has_bias else None
        layer = LinearLayer(weight(trained.base_bytes, outputs, inputs), bias)
        if name in trained.targets:
            a = weight(op.FLOAT, trained.rank, inputs, is_trained=True)
            b = weight(op.FLOAT, outputs, trained.rank, is_trained=True)
            magnitude = weight(op.FLOAT, outputs, is_trained=True) if trained.is_dora else None
            layer.adapter = Adapter(a, b, trained.dropout, magnitude, trained.casts_inputs)
        if name in trained.scaled:
            layer.scales_inputs = name in trained.input_scaled
            layer.scales = weight(op.FLOAT, inputs if layer.scales_inputs else outputs, is_trained=True)
        return layer

    def one_layer(number: int) -> Layer:
        sizes, biases = linear_sizes(shape, number), _biases(shape)
        layer = Layer({name: linear(name, *size, biases.get(name, False)) for name, size in sizes.items()}, [])
        layer.norms = [weight(trained.other_bytes, shape.hidden) for _ in range(shape.norms)]
        if shape.has_head_norms:
            layer.head_norms = [weight(trained.other_bytes, shape.head_size) for _ in range(2)]
        if trained.prefix_tokens:
            layer.prefix = weight(op.FLOAT, trained.prefix_tokens, 2 * shape.key_heads * shape.head_size, is_trained=True)
        if number >= shape.layers - shape.expert_layers:
            inner = shape.expert_feed_forward
            # bitsandbytes quantises linear layers only, not the joint weights of experts.
            gate_up = weight(trained.other_bytes, shape.experts, 2 * inner, shape.hidden)
            down = weight(trained.other_bytes, shape.experts, shape.hidden, inner)
            layer.experts = Experts(weight(trained.other_bytes, shape.experts, shape.hidden), gate_up, down)
        return layer

    embeddings = weight(trained.other_bytes, shape.vocabulary, shape.hidden)
    head = embeddings if shape.ties_embeddings else weight(trained.other_bytes, shape.vocabulary, shape.hidden)
    prompt = weight(op.FLOAT, trained.prompt_tokens, shape.hidden, is_trained=True) if trained.prompt_tokens else None
    layers = [one_layer(number) for number in range(shape.layers)]
    return Decoder(shape, embeddings, head, weight(trained.other_bytes, shape.hidden), layers, prompt)


def _biases(shape: ModelShape) -> Mapping[str, bool]:
    feed_forward = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.feed_forward_bias)
    return dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), shape.attention_bias) | {"o_proj": shape.output_bias} | feed_forward
