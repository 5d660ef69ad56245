"""The signature of a signed URL appears in no message, note or published file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_trainer.data.load import _mix_sources
from finetune_trainer.model import _check_complete, load_config
from finetune_trainer.train import _name_base_by_source

from tests.support.learning import create_method_for_run, make_run

URI = "https://host/jobs/model?signature=hidden"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    mixture = [{"source": URI, "weight": 1.0}, {"source": "s3://data/b", "weight": 1.0}]
    dataset = {"train": None, "mixture": mixture}
    method = {"type": "adapter", "adapter": {"source": URI}}
    return make_run(tmp_path, tmp_path, {"model": {"source": URI}, "dataset": dataset, "method": method})[0]


def test_error_messages_do_not_contain_the_signature(run: Any, tmp_path: Path) -> None:
    inputs: Any = SimpleNamespace(model=tmp_path, adapter=tmp_path)
    for failing_call in (
        lambda: load_config(run, inputs),
        lambda: _check_complete({"missing_keys": ["weight"]}, run),
        lambda: create_method_for_run(run, inputs).apply(None),
        lambda: _mix_sources(make_reader().summary, run, [[], []]),
    ):
        with pytest.raises(FineTuneError) as caught:
            failing_call()
        assert "https://host/jobs/model" in caught.value.message and "hidden" not in str(caught.value)


def make_reader() -> Any:
    return SimpleNamespace(summary=SimpleNamespace(notes=[]))


def test_notes_do_not_contain_the_signature(run: Any) -> None:
    reader, row = make_reader(), SimpleNamespace()
    _mix_sources(reader.summary, run, [[(0, row)], [(1, row)]])  # type: ignore[arg-type, list-item] # rows are not read
    assert "https://host/jobs/model 1 rows" in reader.summary.notes[0] and "hidden" not in reader.summary.notes[0]


def test_the_adapter_configuration_does_not_contain_the_signature(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text("{}")
    _name_base_by_source(tmp_path, run)
    assert json.loads(config.read_text())["base_model_name_or_path"] == "https://host/jobs/model"
