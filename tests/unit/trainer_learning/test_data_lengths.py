"""How long a row may be: the model's positions, less what a method puts before every row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_trainer.data.prepare import NO_TOKENIZER_LIMIT, max_sequence_length

from tests.support.learning import make_run


def longest(folder: Path, spec: dict[str, Any], limit: int | None, own: int = NO_TOKENIZER_LIMIT) -> int:
    run, _ = make_run(folder, Path("/models/tiny"), spec)
    return max_sequence_length(run, SimpleNamespace(model_max_length=own), limit)


@pytest.mark.parametrize(
    ("method", "taken"),
    [({}, 0), ({"type": "prefixTuning"}, 20), ({"type": "promptTuning", "promptLength": 8}, 8)],
    ids=["lora", "prefix", "prompt"],
)
def test_virtual_tokens_take_positions_of_the_model(method: dict[str, Any], taken: int, tmp_path: Path) -> None:
    assert longest(tmp_path, {"method": method}, 512) == 512 - taken
    assert longest(tmp_path, {"method": method}, None, own=256) == 256 - taken
    assert longest(tmp_path, {"method": method}, 4096) == 2048, "the default is what fits, not more"
    assert longest(tmp_path, {"method": method, "dataset": {"maxSequenceLength": 512 - taken}}, 512) == 512 - taken
    with pytest.raises(ConfigError, match=f"write {512 - taken} or less") as caught:
        longest(tmp_path, {"method": method, "dataset": {"maxSequenceLength": 513 - taken}}, 512)
    assert caught.value.code == "SequenceTooLong"
    assert ("method.promptLength takes" in caught.value.message) is bool(taken)


def test_virtual_tokens_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    spec = {"method": {"type": "promptTuning", "promptLength": 64}}
    with pytest.raises(ConfigError, match="64 positions, of which method.promptLength takes 64: no row fits") as caught:
        longest(tmp_path, spec, 64)
    assert (caught.value.code, caught.value.exit_code) == ("SequenceTooLong", 64)
    assert "promptLength 32" in (caught.value.hint or "")
