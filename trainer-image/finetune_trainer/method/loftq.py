"""LoftQ: initialises an adapter on a 4-bit base model with the best low-rank correction of the quantisation error.

In each layer, the adapter is set to the best approximation, with the adapter's rank, of the quantisation error W - Q(W). So the base model
with its adapter is closer to the unquantised model when training begins. PEFT's implementation needs CUDA and ignores the adapter's scale
(alpha / rank); this implementation runs on any device and divides by the scale. This implementation runs only one iteration. A second iteration would
change the quantised base model, but users will load the adapter on the base model as bitsandbytes quantises it.
Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization, https://arxiv.org/abs/2310.08659.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.method.peft_method import ADAPTER_NAME


@torch.no_grad()
def correct_quantization_error(model: Any, unquantized_model: Any) -> int:
    """Set the matrices A and B of every adapter on a 4-bit layer. Return the number of adapters that were set.

    `model`: the PEFT model. `unquantized_model`: the base model with unquantised weights.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    layers = [
        (name, module) for name, module in model.get_base_model().named_modules() if isinstance(module, Linear4bit)
    ]
    for name, layer in layers:
        packed_weight = layer.get_base_layer().weight
        quantized_weight = dequantize_4bit(packed_weight.data, packed_weight.quant_state).float()
        weight = unquantized_model.get_submodule(name).weight.to(quantized_weight.device, torch.float32)
        b, a = low_rank_factors(weight - quantized_weight, layer.r[ADAPTER_NAME])
        layer.lora_A[ADAPTER_NAME].weight.copy_(a)
        layer.lora_B[ADAPTER_NAME].weight.copy_(b / layer.scaling[ADAPTER_NAME])
    return len(layers)


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (rows x rank) and A (rank x columns), whose product B A is the best approximation of `matrix` with this rank.

    B and A are computed from the eigenvectors of the smaller Gram matrix, because a full singular value decomposition is much slower.
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a = low_rank_factors(matrix.T, rank)
        return a.T, b.T
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix @ matrix.T)
    singular_values = eigenvalues[-rank:].clamp(min=0).sqrt()
    b = eigenvectors[:, -rank:]
    a = b.T @ matrix
    root_scale = singular_values.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return b * root_scale, a / root_scale[:, None]
