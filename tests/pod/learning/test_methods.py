"""Every method learns, trains only its own parameters, and saves an artefact that plain transformers and PEFT can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, NotFoundError

from tests.support.learning import TEN_ROWS, RunOutcome, merge_mappings, run_training
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
SIXTY_STEPS = {"training": {"maxSteps": 60, "batchSizePerDevice": 10, "scheduler": "constant"}}
NO_DROPOUT = {"lora": {"dropout": 0}}

# Each entry has the spec of a method and an upper bound for its final loss. Most methods memorise the ten rows in sixty steps.
# Prefix and prompt tuning train only twenty vectors and cannot memorise the rows, so their bounds are just above the loss that they reach.
SPECS_AND_LOSS_BOUNDS = {
    "full": ({"method": {"type": "full"}}, 0.1),
    "lora": ({"method": NO_DROPOUT}, 0.1),
    "rslora": ({"method": {"lora": {"dropout": 0, "rankStabilized": True, "rank": 4, "alpha": 8}}}, 0.1),
    "loraPlus": ({"method": {"lora": {"dropout": 0, "plusRatio": 4}}, "training": {"learningRate": 2e-3}}, 0.1),
    "pissa": ({"method": {"lora": {"dropout": 0, "init": "pissa"}}}, 0.1),
    "olora": ({"method": {"lora": {"dropout": 0, "init": "olora"}}}, 0.1),
    "gaussian": ({"method": {"lora": {"dropout": 0, "init": "gaussian"}}}, 0.1),
    "qlora": ({"method": {"type": "qlora", **NO_DROPOUT}, "training": {"learningRate": 1e-2}}, 0.1),
    "lora8bit": (
        {"method": NO_DROPOUT, "model": {"quantization": {"bits": 8}}, "training": {"learningRate": 1e-2}},
        0.1,
    ),
    "loftq": ({"method": {"lora": {"dropout": 0, "init": "loftq"}}, "training": {"learningRate": 1e-2}}, 0.1),
    "dora": ({"method": {"type": "dora", **NO_DROPOUT}, "training": {"learningRate": 1e-2}}, 0.1),
    "ia3": ({"method": {"type": "ia3"}, "training": {"learningRate": 0.3}}, 0.1),
    "spectrum": ({"method": {"type": "spectrum"}}, 0.1),
    "eva": ({"method": {"lora": {"dropout": 0, "init": "eva", "rank": 8}}}, 0.1),
    "prefixTuning": ({"method": {"type": "prefixTuning"}, "training": {"learningRate": 0.1}}, 1.1),
    "promptTuning": ({"method": {"type": "promptTuning"}, "training": {"learningRate": 0.1}}, 1.3),
}


def load_trained_model(outcome: RunOutcome, model: Path, **options: Any) -> Any:
    """Load the artefact as a user does, with plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert outcome.folder is not None
    if outcome.kind == "model":
        return AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(base, outcome.folder)


def generate_answer(trained_model: Any, folder: Path, question: str) -> str:
    """Generate the tuned model's answer to a question by greedy decoding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output_ids = trained_model.eval().generate(**prompt_ids, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(output_ids[0, prompt_ids["input_ids"].shape[1] :])
    return str(text)


QUICK_METHODS = ("full", "lora", "pissa", "qlora", "loftq", "dora", "ia3", "spectrum", "prefixTuning")


@pytest.mark.parametrize("name", quick_slice(SPECS_AND_LOSS_BOUNDS, QUICK_METHODS))
def test_method_learns_and_its_artefact_answers(name: str, model: Path, tmp_path: Path) -> None:
    spec, bound = SPECS_AND_LOSS_BOUNDS[name]
    outcome = run_training(tmp_path, model, merge_mappings(SIXTY_STEPS, spec))
    assert outcome.losses[0] > 1.5 * bound
    assert outcome.losses[-1] < bound
    assert outcome.folder is not None
    trained_model = load_trained_model(outcome, model)
    if bound > 0.1:  # the method does not memorise the answers, so the test compares logits instead
        ids = torch.arange(5, 25).unsqueeze(0)
        with torch.no_grad():
            assert torch.allclose(trained_model.eval()(ids).logits, outcome.model.eval()(ids).logits, atol=1e-5)
        assert generate_answer(trained_model, outcome.folder, "Who?")
    else:
        for row in TEN_ROWS[:3]:
            question, reply = (turn["content"] for turn in row["messages"])
            assert generate_answer(trained_model, outcome.folder, question) == f"{reply}<|im_end|>"


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "promptTuning", "qlora", "lora8bit"])
def test_adapters_do_not_change_the_base_weights(name: str, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outcome = run_training(tmp_path, model, SPECS_AND_LOSS_BOUNDS[name][0])
    base_weights = outcome.model.get_base_model().state_dict()
    original_weights = load_file(model / "model.safetensors")
    compared_count = 0
    for key, value in original_weights.items():
        base_weight = base_weights.get(key, base_weights.get(key.replace(".weight", ".base_layer.weight")))
        if base_weight is not None and base_weight.dtype == value.dtype:
            assert torch.equal(base_weight, value), key
            compared_count += 1
    assert compared_count >= 7  # embeddings, head and norms are never quantised; without quantisation, all 21 tensors are compared
    if name in ("lora", "dora", "ia3", "promptTuning"):
        assert compared_count == 21
    assert outcome.kind == "adapter"
    assert outcome.resolved["trainableParameters"] < outcome.resolved["totalParameters"]


def test_loftq_starts_as_the_best_low_rank_correction_of_the_quantisation_error(model: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    spec_without_learning = {"training": {"maxSteps": 1, "learningRate": 1e-12}}
    lora = {"rank": 4, "alpha": 16, "init": "loftq", "dropout": 0, "targetModules": ["q_proj", "down_proj", "up_proj"]}
    outcome = run_training(tmp_path, model, merge_mappings(spec_without_learning, {"method": {"lora": lora}}))
    original_weights = load_file(model / "model.safetensors")
    layers = [m for m in outcome.model.get_base_model().named_modules() if hasattr(m[1], "lora_A")]
    assert len(layers) == 6
    for name, layer in layers:
        quantised_weight = layer.get_base_layer().weight
        quantisation_error = original_weights[f"{name}.weight"] - dequantize_4bit(quantised_weight.data, quantised_weight.quant_state)
        remaining_error = quantisation_error - 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        singular_values = torch.linalg.svdvals(quantisation_error)
        # The singular values after the fourth give the error of the best approximation of rank 4.
        assert float(remaining_error.norm()) == pytest.approx(float(singular_values[4:].norm()), rel=1e-4)


def test_full_training_changes_every_weight(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outcome = run_training(tmp_path, model, {"method": {"type": "full"}})
    assert outcome.folder is not None
    weights_before, weights_after = load_file(model / "model.safetensors"), load_file(outcome.folder / "model.safetensors")
    assert weights_before.keys() == weights_after.keys()
    assert [key for key in weights_before if torch.equal(weights_before[key], weights_after[key])] == []
    assert outcome.resolved["trainableParameters"] == outcome.resolved["totalParameters"] == 131392


def test_the_base_model_of_qlora_is_stored_in_4_bits(model: Path, tmp_path: Path) -> None:
    outcome = run_training(
        tmp_path, model, {"method": {"type": "qlora"}, "model": {"quantization": {"type": "fp4", "doubleQuant": False}}}
    )
    four_bit_weights = [p for p in outcome.model.parameters() if type(p).__name__ == "Params4bit"]
    assert len(four_bit_weights) == 14  # two blocks with seven linear layers each
    assert {p.quant_state.quant_type for p in four_bit_weights} == {"fp4"}
    assert {p.quant_state.nested for p in four_bit_weights} == {False}
    assert all(p.dtype == torch.float32 for p in outcome.model.parameters() if p.requires_grad)


def test_lora_options_are_written_to_the_adapter_configuration(model: Path, tmp_path: Path) -> None:
    lora = {
        "rank": 3,
        "alpha": 5,
        "dropout": 0.25,
        "targetModules": ["q_proj", "up_proj"],
        "bias": "loraOnly",
        "modulesToSave": ["lm_head"],
    }
    outcome = run_training(tmp_path, model, {"method": {"lora": lora}})
    assert outcome.folder is not None
    config = json.loads((outcome.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (3, 5, 0.25, "lora_only")
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert config["modules_to_save"] == ["lm_head"]
    assert config["base_model_name_or_path"] == f"file://{model}"


def test_lora_plus_changes_the_run_from_the_second_step(model: Path, tmp_path: Path) -> None:
    plain_outcome = run_training(tmp_path / "a", model, {"method": NO_DROPOUT})
    plus_outcome = run_training(tmp_path / "b", model, {"method": {"lora": {"dropout": 0, "plusRatio": 8}}})
    assert plain_outcome.losses[0] == plus_outcome.losses[0]
    assert plain_outcome.losses[1:] != plus_outcome.losses[1:]


def test_lora_on_the_head_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, {"method": {"lora": {"targetModules": ["q_proj", "lm_head"]}}})
    assert caught.value.code == "LoraOnHead"
    assert "modulesToSave" in (caught.value.hint or "")


def test_an_unknown_target_module_is_refused_with_the_known_names(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, {"method": {"lora": {"targetModules": ["q_proj", "wqkv"]}}})
    assert caught.value.code == "TargetModulesMissing"
    assert "wqkv" in caught.value.message and "q_proj" not in caught.value.message
    assert "down_proj" in (caught.value.hint or "")


def test_a_continued_adapter_starts_from_its_trained_weights(model: Path, tmp_path: Path) -> None:
    first_outcome = run_training(tmp_path / "a", model, merge_mappings(SIXTY_STEPS, {"method": NO_DROPOUT, "training": {"maxSteps": 20}}))
    spec = {"method": {"type": "adapter", "adapter": {"source": f"file://{first_outcome.folder}"}}}
    repeated_outcome = run_training(tmp_path / "b", model, merge_mappings(SIXTY_STEPS, spec), adapter=first_outcome.folder)
    assert repeated_outcome.losses[0] == pytest.approx(first_outcome.losses[-1], rel=0.5)
    assert repeated_outcome.losses[0] < 0.5 * first_outcome.losses[0]
    assert repeated_outcome.losses[-1] < repeated_outcome.losses[0]


def test_a_prompt_adapter_cannot_be_continued(model: Path, tmp_path: Path) -> None:
    first_outcome = run_training(tmp_path / "a", model, {"method": {"type": "promptTuning"}})
    spec = {"method": {"type": "adapter", "adapter": {"source": "s3://models/a"}}}
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path / "b", model, spec, adapter=first_outcome.folder)
    assert caught.value.code == "AdapterNotContinuable"


def test_a_folder_without_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        run_training(
            tmp_path, model, {"method": {"type": "adapter", "adapter": {"source": "s3://models/a"}}}, adapter=model
        )
    assert caught.value.code == "AdapterUnreadable"


def test_spectrum_trains_the_selected_modules_only(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outcome = run_training(tmp_path, model, {"method": {"type": "spectrum", "spectrum": {"snrThreshold": 0.5}}})
    assert outcome.folder is not None
    record = json.loads((outcome.folder / "spectrum_snr.json").read_text())
    assert len(record["modules"]) == 14 and len(record["trained"]) == 7
    weights_before, weights_after = load_file(model / "model.safetensors"), load_file(outcome.folder / "model.safetensors")
    changed_names = {key.removesuffix(".weight") for key in weights_before if not torch.equal(weights_before[key], weights_after[key])}
    assert changed_names == {*record["trained"], "lm_head", "model.embed_tokens"}
    for kind in {module["type"] for module in record["modules"].values()}:
        ratio_by_name = {name: module["snr"] for name, module in record["modules"].items() if module["type"] == kind}
        trained_names = [name for name in ratio_by_name if name in record["trained"]]
        assert trained_names == [max(ratio_by_name, key=lambda name: ratio_by_name[name])]


def test_spectrum_trains_the_given_layers(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, {"method": {"type": "spectrum", "spectrum": {"layers": [1]}}})
    assert outcome.folder is not None
    trained_names = json.loads((outcome.folder / "spectrum_snr.json").read_text())["trained"]
    assert len(trained_names) == 7 and all(name.startswith("model.layers.1.") for name in trained_names)


def test_an_unknown_spectrum_layer_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, {"method": {"type": "spectrum", "spectrum": {"layers": [0, 2]}}})
    assert caught.value.code == "SpectrumLayerMissing"
    assert "layers 0 to 1" in caught.value.message
