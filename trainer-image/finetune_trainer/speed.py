"""Measures the throughput of a run: tokens per second, model FLOPs utilisation (MFU), and the share of time spent waiting for data.

The table has formulas for the FLOPs per token. N: number of parameters in matrix products. N includes the head and the experts to which a token is routed,
but not the embedding lookup. T: number of those parameters in N that are trained. A: FLOPs of the attention per token; a token attends to all tokens
of its document, or with causal attention to half of them on average.

    full          3 * (2N + A)     the backward pass costs twice the forward pass
    spectrum      4N + 2T + 3A     no gradients of frozen weights
    adapters      4N + 2T + 3A     T: only modulesToSave

The additional forward pass of gradient checkpointing is not counted, because it is not part of the model's FLOPs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_trainer.model import count_parameter_values

PEAK_BF16_FLOPS = {
    "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12, "MI300X": 1307e12,
}  # fmt: skip
"""Peak FLOP/s of dense bf16 (or fp16) matrix products, from the vendors' data sheets. Each key is a word, or words, in the name of the device."""
SLOWER_VARIANTS = re.compile(r"\b(MIG|RTX A\d+|Laptop|Max-Q|4090 D)\b")
"""Matches names of slower devices (MIG slices, workstation and laptop GPUs) that also contain a key of `PEAK_BF16_FLOPS`."""

EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields of a model's configuration that hold the number of experts in a layer."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine its FLOPs per token."""

    matrix_parameters: int
    layers: int
    heads: int
    head_size: int

    @staticmethod
    def of(model: Any) -> ModelShape:
        """Return the shape of a transformers model, with or without PEFT layers."""
        config = model.config.get_text_config()
        head_count = int(getattr(config, "num_attention_heads", 0) or 0)
        head_size = getattr(config, "head_dim", None) or (config.hidden_size // head_count if head_count else 0)
        return ModelShape(
            sum(used_count for _, used_count in _count_matrix_parameters(model)), int(getattr(config, "num_hidden_layers", 0) or 0), head_count, int(head_size)
        )  # fmt: skip


def trained_parameters(model: Any) -> int:
    """Return the number of trained parameters in matrix products of the base model, without adapters."""
    return sum(used_count for parameter, used_count in _count_matrix_parameters(model) if parameter.requires_grad)


def _count_matrix_parameters(model: Any) -> Iterator[tuple[Any, int]]:
    """Yield each parameter of the base model that is used in matrix products, with the number of its values that one token uses."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    head_ids = {id(head_parameter) for _, head_parameter in _list_effective_parameters(head)} if head is not None else set()
    lookup_ids = {id(embedding_parameter) for embedding_parameter in model.get_input_embeddings().parameters()} - head_ids
    expert_count = next((count for name in EXPERT_COUNT_FIELDS if (count := getattr(config, name, None))), None)
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    for name, parameter in _list_effective_parameters(model, head_ids):
        if ".lora_" not in name and id(parameter) not in lookup_ids:
            used_count = count_parameter_values(parameter)
            yield parameter, used_count * experts_per_token // expert_count if expert_count and experts_per_token and ".experts." in name else used_count


def _list_effective_parameters(module: Any, kept_ids: Collection[int] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the named parameters of a module, without those that PEFT has replaced by a trained copy (`modules_to_save`).

    A replaced parameter is also yielded if its id is in `kept_ids`.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        trained_copy_name = name.replace("original_module.", "modules_to_save.default.")
        if trained_copy_name == name or trained_copy_name not in parameters or id(parameter) in kept_ids:
            yield name, parameter


def attention_flops(shape: ModelShape, document_length: float, *, is_causal: bool = True) -> float:
    """Return the FLOPs per token of the attention's matrix products, in documents of `document_length` tokens."""
    return 4 * shape.layers * shape.heads * shape.head_size * document_length * (0.5 if is_causal else 1.0)


def flops_per_token(shape: ModelShape, mean_length: float, *, frozen_base: bool, trained_count: int = 0, is_causal: bool = True) -> float:
    """Return the FLOPs of training per token. `trained_count`: with a frozen base model, the number of its parameters that are trained nevertheless."""
    attention_flops_per_token = attention_flops(shape, mean_length, is_causal=is_causal)
    matrix_flops = 2 * shape.matrix_parameters
    return 2 * (matrix_flops + trained_count) + 3 * attention_flops_per_token if frozen_base else 3 * (matrix_flops + attention_flops_per_token)


def peak_flops_of(device: str) -> float | None:
    """Return the peak FLOP/s of the device with this name. None for unknown devices, so that no wrong utilisation is reported."""
    if SLOWER_VARIANTS.search(device):
        return None
    return next((peak for words, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{words}\b", device)), None)


class SpeedMeter:
    """Measures the throughput between two log lines. Tokens are counted over all ranks."""

    def __init__(self, *, flops_of_token: float, peak_flops: float | None, rank_count: int):
        self._flops_of_token, self._peak_flops, self._rank_count = flops_of_token, peak_flops, rank_count
        self._last_reading: tuple[float, int] | None = None
        """Time and tokens at the last log line."""
        self.waited_seconds = 0.0
        """Seconds spent waiting for data since the last log line."""

    def start(self, tokens: int, now: float | None = None) -> None:
        """Start a new measurement. `tokens`: number of tokens processed so far."""
        self._last_reading, self.waited_seconds = (time.perf_counter() if now is None else now, tokens), 0.0

    def read(self, tokens: int, now: float | None = None) -> dict[str, float]:
        """Return the throughput since the last call, by the names of the logged values.

        The result is empty on the first call, and if no token was counted.
        """
        now = time.perf_counter() if now is None else now
        last_reading, waited_seconds = self._last_reading, self.waited_seconds
        self.start(tokens, now)
        if last_reading is None or now <= last_reading[0] or tokens <= last_reading[1]:
            return {}
        seconds = now - last_reading[0]
        tokens_per_second = (tokens - last_reading[1]) / seconds
        value_by_name = {"tokens_per_second": tokens_per_second, "data_wait_share": min(1.0, waited_seconds / seconds)}
        if self._peak_flops:
            value_by_name["mfu"] = tokens_per_second * self._flops_of_token / (self._peak_flops * self._rank_count)
        return value_by_name
