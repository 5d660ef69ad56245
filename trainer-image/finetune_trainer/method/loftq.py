"""LoftQ: adapters on a 4-bit base start as the best low-rank repair of what quantisation took away.

For each layer the rest W - Q(W) is approximated with the adapter's rank, by its largest singular directions, so that base and
adapter together begin closer to the whole model than the 4-bit base alone. PEFT has the same step for CUDA only and without
regard to alpha / rank; this one runs on any device and gives the adapter the scale that it is read with. One iteration, on
purpose: a second one would quantise another base, which nobody who loads the adapter later has.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "default"


@torch.no_grad()
def start(model: Any, whole: Any) -> int:
    """Set A and B of every adapter on a 4-bit layer of `model` (a PEFT model) from the same layer of `whole`; their number."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = [
        (name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, Linear4bit)
    ]
    for name, module in layers:
        packed = module.get_base_layer().weight
        quantised = dequantize_4bit(packed.data, packed.quant_state).float()
        weight = whole.get_submodule(name).weight.to(quantised.device, torch.float32)
        b, a = factors(weight - quantised, module.r[NAME])
        module.lora_A[NAME].weight.copy_(a)
        module.lora_B[NAME].weight.copy_(b / module.scaling[NAME])
    return len(layers)


def factors(rest: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (rows x rank) and A (rank x columns) whose product is the best approximation of `rest` of that rank.

    From the eigenvectors of the smaller Gram matrix, which costs a fraction of all singular vectors.
    """
    if rest.shape[0] > rest.shape[1]:
        b, a = factors(rest.T, rank)
        return a.T, b.T
    values, vectors = torch.linalg.eigh(rest @ rest.T)
    sizes = values[-rank:].clamp(min=0).sqrt()
    b = vectors[:, -rank:]
    a = b.T @ rest
    root = sizes.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return b * root, a / root[:, None]
