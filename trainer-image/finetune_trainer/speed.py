"""How fast a run is, counted honestly: tokens per second, model FLOPs utilisation, time spent waiting for data.

FLOPs per token, with N the parameters in matrix products (embedding lookup left out, head included; of experts those that a
token is sent to), T those of them that are trained, and A the attention's products over the tokens that a token really sees
(causal: half of the document):

    full          3 * (2N + A)     forward, and twice that backward
    spectrum      4N + 2T + 3A     no gradients of frozen weights
    adapters      4N + 2T + 3A     T: modulesToSave
    recomputing   one forward more, which is work done but not work asked for: it does not count
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

PEAK_BF16 = {
    "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12, "MI300X": 1307e12,
}  # fmt: skip
"""Dense bf16 (fp16 where there is none) peaks by words of the device's name, FLOP/s, from the makers' data sheets."""
LESSER = re.compile(r"\b(MIG|RTX A\d+|Laptop|Max-Q|4090 D)\b")
"""In the names of devices that hold a known name and are less: slices of a GPU, its namesakes for desks and laptops."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""How configurations call the number of experts in a layer."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides its work per token."""

    matrix_parameters: int
    layers: int
    heads: int
    head_size: int

    @staticmethod
    def of(model: Any) -> Shape:
        """Read it from a transformers model (before or after it was wrapped)."""
        config = model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        own = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return Shape(
            sum(numbers for _, numbers in _matrices(model)), int(getattr(config, "num_hidden_layers", 0) or 0), heads, int(own)
        )  # fmt: skip


def trained_parameters(model: Any) -> int:
    """Parameters of a model in matrix products that are trained, beside the adapters' own."""
    return sum(numbers for parameter, numbers in _matrices(model) if parameter.requires_grad)


def _matrices(model: Any) -> Iterator[tuple[Any, int]]:
    """Each parameter of the base that a token is multiplied with, and how many of its numbers."""
    from finetune_trainer.method.base import size

    config, head = model.config.get_text_config(), model.get_output_embeddings()
    heads = {id(one) for _, one in _used(head)} if head is not None else set()
    lookups = {id(one) for one in model.get_input_embeddings().parameters()} - heads
    experts = next((found for name in EXPERTS if (found := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    for name, parameter in _used(model, heads):
        if ".lora_" not in name and id(parameter) not in lookups:
            numbers = size(parameter)
            yield parameter, numbers * chosen // experts if experts and chosen and ".experts." in name else numbers


def _used(module: Any, anyway: Collection[int] = ()) -> Iterator[tuple[str, Any]]:
    """Named parameters without those whose place a copy has taken that is trained in full beside an adapter; `anyway`: ids."""
    every = dict(module.named_parameters())
    for name, parameter in every.items():
        copy = name.replace("original_module.", "modules_to_save.default.")
        if copy == name or copy not in every or id(parameter) in anyway:
            yield name, parameter


def attention_flops(shape: Shape, length: float, *, causal: bool = True) -> float:
    """FLOPs of the attention products per token, in documents of `length` tokens."""
    return 4 * shape.layers * shape.heads * shape.head_size * length * (0.5 if causal else 1.0)


def flops_per_token(shape: Shape, length: float, *, frozen_base: bool, trained: int = 0, causal: bool = True) -> float:
    """FLOPs that training asks for, per token. `trained`: parameters of a frozen base that are trained all the same."""
    seen = attention_flops(shape, length, causal=causal)
    matrix = 2 * shape.matrix_parameters
    return 2 * (matrix + trained) + 3 * seen if frozen_base else 3 * (matrix + seen)


def peak_of(device: str) -> float | None:
    """Peak FLOP/s of a device by its name, or None if it is not known: no figure is better than a wrong one."""
    if LESSER.search(device):
        return None
    return next((peak for words, peak in PEAK_BF16.items() if re.search(rf"\b{words}\b", device)), None)


class Meter:
    """Paces between log lines. Times are seconds of the wall clock, counts are of all ranks."""

    def __init__(self, *, flops_of_token: float, peak: float | None, ranks: int):
        self._flops, self._peak, self._ranks = flops_of_token, peak, ranks
        self._since: tuple[float, int] | None = None
        self.waited = 0.0

    def start(self, tokens: int, now: float | None = None) -> None:
        """Begin a window at `tokens` seen."""
        self._since, self.waited = (time.perf_counter() if now is None else now, tokens), 0.0

    def read(self, tokens: int, now: float | None = None) -> dict[str, float]:
        """Paces since the last call, and a new window."""
        now = time.perf_counter() if now is None else now
        since, waited = self._since, self.waited
        self.start(tokens, now)
        if since is None or now <= since[0] or tokens <= since[1]:
            return {}
        seconds = now - since[0]
        pace = (tokens - since[1]) / seconds
        found = {"tokens_per_second": pace, "data_wait_share": min(1.0, waited / seconds)}
        if self._peak:
            found["mfu"] = pace * self._flops / (self._peak * self._ranks)
        return found
