"""A run ends before its first step if a library uses another strategy, attention or quantisation than the spec requests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_api.errors import FineTuneError
from finetune_trainer.distributed.base import Ddp, DistributedStrategy
from finetune_trainer.distributed.deepspeed import Deepspeed, DeepspeedOptions
from finetune_trainer.distributed.fsdp import Fsdp, FsdpOptions
from finetune_trainer.hardware import Hardware

from tests.support.learning import make_run, run_training
from tests.support.tiny import make_tiny_model

CPU_HARDWARE = Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


def make_trainer(engine: Any = None) -> Any:
    """Create a Trainer whose model is not wrapped by DDP, FSDP or DeepSpeed."""
    network = torch.nn.Linear(4, 4)
    return SimpleNamespace(
        model=network, model_wrapped=network, is_deepspeed_enabled=engine is not None, deepspeed=engine
    )


def make_strategy(strategy: str, folder: Path, ranks: int) -> DistributedStrategy:
    run, _ = make_run(folder, Path("/models/tiny"), ranks=ranks)
    match strategy:
        case "fsdp":
            return Fsdp(run, CPU_HARDWARE, ranks, FsdpOptions())
        case "zero":
            return Deepspeed(run, CPU_HARDWARE, ranks, DeepspeedOptions(3, {}))
        case "ddp":
            return Ddp(run, CPU_HARDWARE, ranks)
    return DistributedStrategy(run, CPU_HARDWARE, ranks)


@pytest.mark.parametrize(
    ("strategy", "expected_message"),
    [
        ("ddp", "ddp was requested over 2 ranks, but independent is active"),
        ("fsdp", "fsdp was requested over 2 ranks, but 2 of 2 parameters are not sharded; the first one is `weight`"),
        ("zero", "deepspeed was requested over 2 ranks, but independent is active"),
    ],
)
def test_two_independent_ranks_are_refused(
    strategy: str, expected_message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FineTuneError) as caught:
        make_strategy(strategy, tmp_path, 2).verify_active(make_trainer())
    assert (caught.value.code, caught.value.exit_code) == ("StrategyNotActive", 70)
    assert caught.value.message == expected_message


def test_the_strategy_of_one_rank_is_single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert make_strategy("none", tmp_path, 1).verify_active(make_trainer()) == "single"


@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 1), (3, 2)])
def test_deepspeed_with_a_wrong_stage_or_rank_count_or_without_sharding_is_refused(
    stage: int, ranks: int, tmp_path: Path
) -> None:
    """In the last of the three cases, the stage and the number of ranks are correct, but the parameters are not sharded."""
    engine = SimpleNamespace(zero_optimization_stage=lambda: stage, world_size=ranks)
    with pytest.raises(FineTuneError) as caught:
        make_strategy("zero", tmp_path, 2).verify_active(make_trainer(engine))
    assert caught.value.code == "StrategyNotActive"
    assert f"active: stage {stage} over {ranks} ranks, 0 of 2 parameters sharded" in caught.value.message


def test_another_attention_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer import model as loading

    original = loading.load_model

    def load_with_eager_attention(*args: Any, **options: Any) -> Any:
        loaded_model, notes = original(*args, **options)
        loaded_model.set_attn_implementation("eager")
        return loaded_model, notes

    monkeypatch.setattr(loading, "load_model", load_with_eager_attention)
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model)
    assert (caught.value.code, caught.value.message) == (
        "AttentionSwapped",
        "attention sdpa was requested, eager is active",
    )


@pytest.mark.parametrize(
    ("spec", "bits"),
    [({"method": {"type": "qlora"}}, 4), ({"method": {"type": "lora"}, "model": {"quantization": {"bits": 8}}}, 8)],
)
def test_an_unquantised_base_is_refused_if_bits_were_asked_for(
    spec: dict[str, Any], bits: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer import model as loading

    original = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda *args, **options: original(*args, **options | {"quantize": False})
    )
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model, spec)
    assert caught.value.code == "QuantizationNotActive"
    assert caught.value.message == f"{bits}-bit weights were requested, but no layer has such weights"


def test_an_adapter_without_trainable_weights_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.method.lora import Lora

    original = Lora.apply

    def apply_frozen(*args: Any, **options: Any) -> Any:
        trainable_model = original(*args, **options)
        trainable_model.model.requires_grad_(False)
        return trainable_model

    monkeypatch.setattr(Lora, "apply", apply_frozen)
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model)
    assert caught.value.code == "NothingTrainable"
