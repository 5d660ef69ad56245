"""Models that do not fit on one GPU are spread over all GPUs of the pod."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.stages import final_model
from finetune_trainer.stages.placement import MEMORY_FACTOR, estimate_needed_bytes, must_be_spread
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a model with 1000 weights in 16 bits."""
    save_file({"a": torch.zeros(600, dtype=torch.bfloat16), "b": torch.zeros(400, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    return tmp_path


def test_the_needed_memory_follows_from_the_number_of_weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert (estimate_needed_bytes(folder, 2), estimate_needed_bytes(folder, 4)) == (int(2000 * MEMORY_FACTOR), int(4000 * MEMORY_FACTOR))
    assert estimate_needed_bytes(tmp_path_factory.mktemp("empty"), 2) in (None, 0)


@pytest.mark.parametrize(
    ("free_bytes", "is_spread"), [([2400], False), ([2399], False), ([2399, 1], True), ([2000, 2000], True), ([2400, 2400], False), ([1000, 1000], False)]
)
def test_a_model_is_spread_if_it_fits_only_on_all_gpus_together(folder: Path, free_bytes: list[int], is_spread: bool) -> None:
    assert must_be_spread(folder, 2, free_bytes) is is_spread


@pytest.mark.parametrize(
    ("device", "method", "is_spread"), [("cuda", "lora", True), ("cpu", "lora", False), ("cuda", "qlora", False)]
)
def test_only_unquantised_models_on_gpus_are_spread(folder: Path, device: str, method: str, is_spread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    load_options: dict[str, Any] = {}

    def load_model(*_: Any, **options: Any) -> tuple[Any, list[str]]:
        load_options.update(options)
        return SimpleNamespace(hf_device_map={"": 0}, eval=lambda: None), []

    monkeypatch.setattr(final_model.models, "load_model", load_model)
    monkeypatch.setattr(final_model.models, "load_config", lambda *_: None)
    monkeypatch.setattr("finetune_trainer.attention.require_supported_attention", lambda *_: ("sdpa", None))
    monkeypatch.setattr(final_model, "free_gpu_bytes", lambda: [2399, 2399])
    run: Any = SimpleNamespace(spec=FineTuneJobSpec.model_validate({"model": {"source": "org/m"}, "dataset": {"train": "org/d"}, "method": {"type": method}}))
    hardware = final_model.Hardware(torch.device(device), device, torch.bfloat16, True, False, "sdpa")
    final_model.load_base_model(run, SimpleNamespace(model=folder), hardware)  # type: ignore[arg-type]
    assert load_options["is_spread"] is is_spread
