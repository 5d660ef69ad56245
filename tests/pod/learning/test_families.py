"""Every type of model trains with LoRA and with full training under its default settings, and plain PEFT can load its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.verification.artefact_checks import find_fault
from transformers import AutoModelForCausalLM

from tests.support.families import DENSE_LAYERS, FAMILIES, ROWS, make_family
from tests.support.learning import merge_mappings, run_training

pytestmark = pytest.mark.pod
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.experts]


def mark_slow(names: Any) -> list[Any]:
    """Return the names of model families as test parameters. The slow families run only with `make test-faults`."""
    return [pytest.param(name, marks=[pytest.mark.faults] if FAMILIES[name].is_slow else []) for name in names]


def train(folder: Path, name: str, method: dict[str, Any], spec: dict[str, Any] | None = None) -> Any:
    return run_training(folder, make_family(folder / "model", name), merge_mappings({"method": method}, spec or {}), ROWS)


def compute_logit_differences(folder: Path, outcome: Any) -> tuple[float, float]:
    """Return the largest difference of the trained model's logits from the logits of two other models.

    The first model is the adapter as plain PEFT loads it. The second model is the base model.
    """
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation=outcome.resolved["attention"]).eval()
    ids = torch.randint(5, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base_logits, trained_logits = base(ids).logits.clone(), outcome.model.eval()(ids).logits
        logits_of_loaded_model = PeftModel.from_pretrained(base, outcome.folder).eval()(ids).logits
    return (logits_of_loaded_model - trained_logits).abs().max().item(), (base_logits - trained_logits).abs().max().item()


@pytest.mark.parametrize("name", mark_slow(FAMILIES))
def test_an_adapter_learns_and_can_be_loaded(name: str, tmp_path: Path) -> None:
    family, outcome = FAMILIES[name], train(tmp_path, name, {"type": "lora"})
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None
    assert len(outcome.losses) == 4 and 5.5 < outcome.losses[0] < 7 and outcome.losses[-1] < outcome.losses[0]
    assert outcome.resolved["attention"] == ("sdpa" if family.has_sdpa else "eager")
    assert any(note.startswith("attention eager is used, because ") for note in outcome.notes) is not family.has_sdpa
    assert [f"{family.experts}.down_proj, {family.experts}.gate_up_proj" in note for note in outcome.notes if "routed experts (" in note] == (
        [True] if family.experts else []
    )
    assert [note.split(" have no adapter")[0] for note in outcome.notes if note.startswith("layers named ")] == (
        [f"layers named {', '.join(family.left_out)}"] if family.left_out else []
    )
    trained_names = {name.rsplit(".lora_", 1)[0] for name, value in outcome.model.named_parameters() if value.requires_grad}
    assert not any(path.rsplit(".", 1)[-1] in (*family.left_out, "experts", "gate", "router", "lm_head") for path in trained_names)
    loading_difference, training_difference = compute_logit_differences(tmp_path, outcome)
    assert loading_difference < 1e-5 < training_difference


@pytest.mark.parametrize("name", mark_slow(FAMILIES))
def test_full_training_changes_all_weights(name: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, name, {"type": "full"})
    assert len(outcome.losses) == 4 and outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("name", mark_slow(WITH_EXPERTS))
def test_adapters_of_experts_can_be_loaded(name: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, name, {"type": "lora", "lora": {"targetParameters": ["all-experts"]}})
    assert not [note for note in outcome.notes if "routed experts (" in note]
    trained_experts = [key for key, value in outcome.model.named_parameters() if value.requires_grad and ".experts." in key]
    assert trained_experts and not [key for key, value in outcome.model.named_parameters() if value.requires_grad and ".gate." in key]
    loading_difference, training_difference = compute_logit_differences(tmp_path, outcome)
    assert loading_difference < 1e-5 < training_difference
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None


def test_an_adapter_can_train_one_parameter_of_the_experts(tmp_path: Path) -> None:
    outcome = train(tmp_path, "gpt_oss", {"type": "lora", "lora": {"targetParameters": ["experts.down_proj"], "rank": 4}})
    shapes = {tuple(value.shape) for key, value in outcome.model.named_parameters() if value.requires_grad and ".experts." in key}
    assert shapes == {(4 * 4, 128), (64, 4 * 4)}, "the adapter must have rank 4 for each of four experts"
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None


@pytest.mark.parametrize(
    ("name", "lora", "code", "text"),
    [
        ("mixtral", {"targetParameters": ["experts.w1"]}, "TargetParametersMissing", "experts.w1"),
        ("gemma3_text", {"targetParameters": ["all-experts"]}, "TargetParametersMissing", "the model has no routed experts"),
        ("qwen3_next", {"targetModules": list(DENSE_LAYERS), "dropout": 0.1}, "DropoutOnExperts", "write `dropout: 0`"),
    ],
)
def test_modules_that_cannot_have_an_adapter_are_refused(name: str, lora: dict[str, Any], code: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, name, {"type": "lora", "lora": lora})
    assert caught.value.code == code and text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mamba2", "attention eager lets them attend to each other"),
        pytest.param("lfm2", "can't keep packed sequences apart without `causal_conv1d`", marks=pytest.mark.faults),
    ],
)
def test_packing_is_refused_if_the_layers_mix_documents(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, name, {"type": "lora"}, {"dataset": {"packing": True, "maxSequenceLength": 128}})
    assert caught.value.code == "PackingLeaks" and f"a model of type {name}: " in caught.value.message and text in caught.value.message


def test_sdpa_is_refused_for_a_type_of_model_without_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, "gemma2", {"type": "lora"}, {"model": {"attention": "sdpa"}})
    assert caught.value.code == "AttentionUnavailable" and "gemma2" in str(caught.value) and "eager" in str(caught.value)
