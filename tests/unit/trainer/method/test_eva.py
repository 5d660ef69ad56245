"""EVA's search for principal directions always ends: with an initialised adapter, or with an error that gives a correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_trainer.method import eva

from tests.support.learning import run_training
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


def make_eva_spec(rank: int, batch_size: int) -> dict[str, Any]:
    lora_spec = {"init": "eva", "rank": rank, "targetModules": ["q_proj"]}
    return {"method": {"lora": lora_spec}, "training": {"maxSteps": 1, "batchSizePerDevice": batch_size}}


def test_batches_with_enough_tokens_initialise_the_adapter(model: Path, tmp_path: Path) -> None:
    assert len(run_training(tmp_path, model, make_eva_spec(24, 2)).losses) == 1


@pytest.mark.parametrize(
    ("rank", "batch_size", "message_part"),
    [
        (32, 1, "needs 32 directions (method.lora.rank), but no batch has more than 18 tokens"),
        (65, 8, "needs 65 directions (method.lora.rank), but a layer has only 64 inputs"),
    ],
    ids=["small batches", "small layers"],
)
def test_a_rank_above_the_possible_directions_is_refused(
    rank: int, batch_size: int, message_part: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, make_eva_spec(rank, batch_size))
    assert caught.value.code == "InitUnavailable"
    assert message_part in caught.value.message


def test_directions_that_do_not_converge_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # EVA finds the directions in one batch, but needs two more batches to see that they are stable.
    monkeypatch.setattr(eva, "MAX_BATCHES", 2)
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, make_eva_spec(24, 2))
    assert (caught.value.code, "in 2 batches" in caught.value.message) == ("InitUnavailable", True)
