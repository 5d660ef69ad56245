"""The cached scan of a model for Spectrum."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from finetune_trainer.method import spectrum

from tests.support.learning import make_run


class TwoLayerModel(torch.nn.Module):
    """A model with two layers. Each layer has one linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)}) for _ in range(2))


def test_a_scan_that_version_0_1_0_left_in_the_work_folder_is_ignored(tmp_path: Path) -> None:
    """A local run uses the same work folder before and after an update. The file of a scan by version 0.1.0 has other fields."""
    run, inputs = make_run(tmp_path, tmp_path / "model", {"method": {"type": "spectrum"}})
    old_scan = [{"name": f"layers.{layer}.proj", "layer": layer, "kind": "proj", "snr": "1.0"} for layer in range(2)]
    (tmp_path / "spectrum-marchenkoPastur-tiny.json").write_text(json.dumps(old_scan))
    selection = spectrum.select_modules(run, inputs, TwoLayerModel())
    assert [module.type for module in selection.scanned_modules] == ["proj", "proj"]
    assert spectrum.select_modules(run, inputs, TwoLayerModel()) == selection, "the scan is cached"
