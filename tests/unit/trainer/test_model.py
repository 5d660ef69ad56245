"""Base models that do not fit the spec are refused before their weights are loaded. Loaded models can be trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.hardware import Hardware
from finetune_trainer.model import load_model, model_class
from transformers import LlamaConfig

from tests.support.learning import make_run
from tests.support.tiny import make_tiny_model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_stored_by_bitsandbytes_needs_the_bits_in_the_spec(bits: int, tmp_path: Path) -> None:
    """bitsandbytes is hidden from jobs without `bits`, so the error of transformers would ask the user to install bitsandbytes."""
    quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    LlamaConfig(quantization_config=quantization_config).save_pretrained(tmp_path / "model")  # type: ignore[call-arg]  # passed on to PretrainedConfig
    run, inputs = make_run(tmp_path, tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        load_model(run, inputs, Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa"))
    assert caught.value.code == "QuantizedBase"
    assert f"model: {{quantization: {{bits: {bits}}}}}" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("modality", "model_kind", "expected_class"),
    [
        ("text", "causal", "AutoModelForCausalLM"), ("visionLanguage", "causal", "AutoModelForImageTextToText"),
        ("text", "reward", "AutoModelForSequenceClassification"),
    ],
)  # fmt: skip
def test_the_class_follows_from_the_modality_and_the_kind_of_model(tmp_path: Path, modality: str, model_kind: str, expected_class: str) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model", spec={"model": {"modality": modality}})
    assert model_class(run, model_kind).__name__ == expected_class


def test_gradients_of_a_4_bit_base_are_the_same_after_an_evaluation(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes would pack the weights at the first evaluation, and the gradients would be lost."""
    run, inputs = make_run(tmp_path, make_tiny_model(tmp_path / "model", attention_bias=True), spec={"model": {"quantization": {"bits": 4}}})
    model, _ = load_model(run, inputs, Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa"))
    vectors = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))

    def compute_gradient() -> torch.Tensor:
        inputs_embeds = vectors.clone().requires_grad_()
        model.train()(inputs_embeds=inputs_embeds).logits.square().sum().backward()
        assert inputs_embeds.grad is not None
        return inputs_embeds.grad

    gradient_before = compute_gradient()
    with torch.no_grad():
        model.eval()(inputs_embeds=vectors)
    assert gradient_before.abs().max() > 0 and torch.equal(compute_gradient(), gradient_before)
