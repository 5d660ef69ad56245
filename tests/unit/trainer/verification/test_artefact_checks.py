"""Each type of damage of an adapter or model is reported with a different code. An undamaged adapter or model passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.verification.artefact_checks import find_fault
from finetune_trainer.verification.reference import ReferenceRow, ReferenceValues, TrainedAdapter, hash_text
from safetensors.torch import load_file, save_file

from tests.support.tiny import CHATML_TEMPLATE, make_tiny_model

RANK, ALPHA = 4, 8
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def wider_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wider", hidden=96)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another architecture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=448, n_embd=64, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapters") / "good"
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(good_adapter: Path, tmp_path: Path) -> Path:
    """A copy of the good adapter, which a test may damage."""
    return Path(shutil.copytree(good_adapter, tmp_path / "adapter"))


def make_reference(**changes: Any) -> ReferenceValues:
    modules = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    trained = TrainedAdapter(peft_type="LORA", scaling=dict.fromkeys(modules, ALPHA / RANK), changes_output=True)
    facts = {"tokenizer_length": 448, "chat_template_sha256": hash_text(CHATML_TEMPLATE), "adapter": trained}
    return ReferenceValues.model_validate(facts | changes)


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        name = WEIGHTS if (folder / WEIGHTS).exists() else "model.safetensors"
        save_file({key: value.contiguous() for key, value in change(load_file(folder / name)).items()}, folder / name)

    return damage


def change_config(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def cut_file(folder: Path) -> None:
    path = next(path for path in (folder / WEIGHTS, folder / "model.safetensors") if path.exists())
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:50])


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["another"] = 448
    path.write_text(json.dumps(tokenizer))


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def change_template(folder: Path) -> None:
    remove_template(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def make_value_setter(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights[name].view(-1)[3] = value
        return weights

    return change


ADAPTER_DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no prefix": (change_weights(lambda w: {k.removeprefix("base_model.model."): v for k, v in w.items()}), "AdapterPrefixIgnored", "does not begin with"),
    "compiler": (
        change_weights(lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()}),
        "AdapterPrefixIgnored", "_orig_mod.",
    ),
    "DDP": (change_weights(lambda w: {f"module.{k}": v for k, v in w.items()}), "AdapterPrefixIgnored", "module."),
    "zero B": (change_weights(lambda w: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in w.items()}), "AdapterHasNoEffect", "all B matrices"),
    "minus zero B": (
        change_weights(lambda w: {k: torch.full_like(v, -0.0) if "lora_B" in k else v for k, v in w.items()}), "AdapterHasNoEffect", "all B matrices",
    ),
    "layer missing": (
        change_weights(lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.q_proj" not in k}), "TargetWeightsMissing", "targets model.layers.1",
    ),
    "B missing": (change_weights(lambda w: {k: v for k, v in w.items() if k != FIRST_B}), "TargetWeightsMissing", "has no matrix lora_B"),
    "truncated": (cut_file, "AdapterFileDamaged", "but its header describes"),
    "truncated header": (cut_header, "AdapterFileDamaged", "ends within its header"),
    "alpha": (change_config(lora_alpha=2 * ALPHA), "AdapterScaleDiffers", "by 4, but it was trained with 2"),
    "rsLoRA": (change_config(use_rslora=True), "AdapterScaleDiffers", "by 4, but it was trained with 2"),
    "alpha of one module": (change_config(alpha_pattern={"down_proj": 1}), "AdapterScaleDiffers", "mlp.down_proj by 0.25"),
    "NaN": (change_weights(make_value_setter(FIRST_B, float("nan"))), "WeightsNotFinite", "lora_B"),
    "infinite": (change_weights(make_value_setter(FIRST_B, float("-inf"))), "WeightsNotFinite", "lora_B"),
    "rank": (change_config(r=8, lora_alpha=2 * ALPHA), "RankDiffers", "says rank 8"),
    "vocabulary": (add_token, "TokenizerDiffers", "has 449 tokens, but the model was trained with 448"),
    "no template": (remove_template, "ChatTemplateMissing", "no chat template"),
    "other template": (change_template, "ChatTemplateDiffers", "differs"),
    "empty": (change_weights(lambda w: {}), "AdapterFileEmpty", "no tensors"),
    "no file": (lambda folder: (folder / WEIGHTS).unlink(), "AdapterFileEmpty", "missing"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "AdapterConfigMissing", "missing"),
    "unknown keys": (change_weights(lambda w: w | {"base_model.model.model.norm.weight": torch.ones(64)}), "AdapterKeysUnknown", "model.norm.weight"),
    "other method": (change_config(peft_type="IA3"), "AdapterOfAnotherMethod", "LORA was trained"),
}  # fmt: skip


def test_zero_b_matrices_are_no_fault_if_only_the_comparison_of_values_can_judge_them(adapter: Path, base: Path) -> None:
    """The first step of a warm-up has the learning rate 0, so the matrices are still zero after a run of one step."""
    ADAPTER_DAMAGES["zero B"][0](adapter)
    trained = make_reference().adapter
    assert trained is not None
    reference_without_effect = make_reference(adapter=trained.model_copy(update={"changes_output": None}))
    reference_with_values = reference_without_effect.model_copy(update={"rows": [ReferenceRow(ids=[1, 2], is_counted=[False, True], values=[-1.0])]})
    assert find_fault(adapter, base, reference_with_values, is_adapter=True) is None
    fault = find_fault(adapter, base, reference_without_effect, is_adapter=True)
    assert fault is not None and fault.code == "AdapterHasNoEffect"


def test_a_good_adapter_passes(adapter: Path, base: Path) -> None:
    assert find_fault(adapter, base, make_reference(), is_adapter=True) is None
    assert find_fault(adapter, base, None, is_adapter=True) is None


def test_experts_that_transformers_joins_need_no_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    """The files of the base model contain one weight for each expert. `down_proj` in the adapter's configuration is the name of a dense layer."""
    base_with_experts = Path(shutil.copytree(base, tmp_path / "base"))
    expert_weights = {f"model.layers.0.mlp.experts.{number}.down_proj.weight": torch.ones(64, 32) for number in range(2)}
    change_weights(lambda weights: weights | expert_weights)(base_with_experts)
    assert find_fault(adapter, base_with_experts, make_reference(), is_adapter=True) is None
    prefix = "base_model.model.model.layers.0.mlp.experts.1.down_proj"
    change_weights(lambda weights: weights | {f"{prefix}.lora_A.weight": torch.ones(RANK, 32), f"{prefix}.lora_B.weight": torch.ones(64, RANK)})(adapter)
    fault = find_fault(adapter, base_with_experts, None, is_adapter=True)
    assert fault is not None and fault.code == "TargetWeightsMissing"
    assert "targets model.layers.0.mlp.experts.0.down_proj" in fault.message


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_each_damage_of_an_adapter_is_refused_with_its_code(name: str, adapter: Path, base: Path) -> None:
    damage, code, message_part = ADAPTER_DAMAGES[name]
    damage(adapter)
    fault = find_fault(adapter, base, make_reference(), is_adapter=True)
    assert fault is not None and fault.code == code
    assert message_part in fault.message


def test_the_wrong_base_is_refused_by_its_shapes_and_by_its_architecture(adapter: Path, wider_base: Path, other_base: Path) -> None:
    shape_fault = find_fault(adapter, wider_base, make_reference(), is_adapter=True)
    assert shape_fault is not None and shape_fault.code == "AdapterOfAnotherBase"
    assert "96" in shape_fault.message and "64" in shape_fault.message
    name_fault = find_fault(adapter, other_base, make_reference(), is_adapter=True)
    assert name_fault is not None and name_fault.code == "AdapterOfAnotherBase" and "has no module" in name_fault.message


def test_an_adapter_that_training_did_not_change_is_not_refused(adapter: Path, base: Path) -> None:
    """The stored file equals the trained adapter. The comparison of values, not this check, reports that training had no effect."""
    ADAPTER_DAMAGES["zero B"][0](adapter)
    unchanged_adapter = TrainedAdapter(peft_type="LORA", scaling={}, changes_output=False)
    assert find_fault(adapter, base, make_reference(adapter=unchanged_adapter), is_adapter=True) is None


MODEL_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut_file, "ModelFileDamaged"),
    "compiler": (change_weights(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}), "ModelPrefixIgnored"),
    "NaN": (change_weights(make_value_setter("model.norm.weight", float("nan"))), "WeightsNotFinite"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "ModelFileEmpty"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "ModelConfigMissing"),
    "no template": (remove_template, "ChatTemplateMissing"),
}


@pytest.mark.parametrize("name", MODEL_DAMAGES)
def test_each_damage_of_a_model_is_refused_with_its_code(name: str, base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    assert find_fault(model, base, make_reference(adapter=None), is_adapter=False) is None
    damage, code = MODEL_DAMAGES[name]
    damage(model)
    fault = find_fault(model, base, make_reference(adapter=None), is_adapter=False)
    assert fault is not None and fault.code == code


def test_a_model_in_several_files_needs_all_of_them(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(model, max_shard_size="200KB")
    files = sorted(model.glob("model-*.safetensors"))
    assert len(files) > 1 and find_fault(model, base, None, is_adapter=False) is None
    files[0].unlink()
    fault = find_fault(model, base, None, is_adapter=False)
    assert fault is not None and fault.code == "ModelFileDamaged" and files[0].name in fault.message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_found_in_every_format(dtype: torch.dtype, tmp_path: Path) -> None:
    from finetune_trainer.verification.weight_files import read_header

    largest = torch.finfo(dtype).max
    save_file({"good": torch.tensor([largest, -largest, 0.0], dtype=dtype), "bad": torch.tensor([1.0, float("inf")], dtype=dtype)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    assert tensors["good"].is_finite() and not tensors["bad"].is_finite()
    assert not tensors["good"].is_zero()
