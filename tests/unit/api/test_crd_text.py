"""The CRD file means the same to every reader: kubectl and Helm read YAML 1.1, where an unquoted `no` is false."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from finetune_api.schema import crd

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["crds/finetunejobs.yaml", "helm/finetune-operator/files/finetunejobs.yaml"])
def test_a_reader_of_yaml_1_1_finds_the_same_crd(name: str) -> None:
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) == crd()
