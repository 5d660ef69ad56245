"""Base models that are refused before their weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.hardware import Hardware
from finetune_trainer.model import load_model
from transformers import LlamaConfig

from tests.support.learning import make_run


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_stored_by_bitsandbytes_needs_the_bits_in_the_spec(bits: int, tmp_path: Path) -> None:
    """bitsandbytes is hidden from jobs without `bits`, so the error of transformers would ask the user to install bitsandbytes."""
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    LlamaConfig(quantization_config=stored).save_pretrained(tmp_path / "model")  # type: ignore[call-arg]  # passed on to PretrainedConfig
    run, inputs = make_run(tmp_path, tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        load_model(run, inputs, Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa"))
    assert caught.value.code == "QuantizedBase"
    assert f"model: {{quantization: {{bits: {bits}}}}}" in (caught.value.hint or "")
