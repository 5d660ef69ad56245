"""Compares small models with and without Liger's kernels."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
}  # fmt: skip
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_model(model_type: str, kind: str) -> Any:
    """Return a model with random weights. `kind` is `causal` or `reward`. Returns None if transformers has no model of this kind for `model_type`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    default_config = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default_config, name)}
    config = AutoConfig.for_model(model_type, **sizes, **SPECIAL_TOKENS, num_labels=1)
    loader = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    return loader.from_config(config).train() if type(config) in loader._model_mapping else None


def uses_kernels(model: Any) -> bool:
    """Whether any layer of the model uses a Liger kernel."""
    return any(getattr(module.forward, "__module__", "").startswith("liger_kernel") for module in model.modules())


def compare_kernels(model_type: str, kind: str, device: str) -> tuple[float, float] | None:
    """Compare a model with and without Liger's kernels. Returns the largest relative difference between the outputs, and the largest relative difference
    between the gradients of a parameter.

    Returns None if transformers has no model of this type and kind (see `make_model`).
    """
    import torch
    from finetune_trainer.kernels import LIGER_OPTIONS
    from transformers.integrations.liger import apply_liger_kernel

    torch.manual_seed(0)
    model = make_model(model_type, kind)
    if model is None:
        return None
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 if parameter.ndim > 1 else parameter + torch.randn_like(parameter) * 0.1
    model = model.to(device)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 9), device=device)

    def compute_outputs_and_gradients() -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        outputs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        outputs.pow(2).mean().backward()
        return outputs.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected_outputs, expected_gradients = compute_outputs_and_gradients()
    apply_liger_kernel(model, LIGER_OPTIONS)
    assert uses_kernels(model)
    outputs, gradients = compute_outputs_and_gradients()
    assert gradients.keys() == expected_gradients.keys()
    differences = [float((gradients[name] - gradient).norm() / (gradient.norm() + 1e-12)) for name, gradient in expected_gradients.items()]
    return float((outputs - expected_outputs).abs().max() / expected_outputs.abs().max()), max(differences)
