"""Plain transformers can load the merged model, and the merged model computes the same values as the base model with its adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, DivergedError
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Stage
from finetune_trainer.artefact.combination import require_combinable
from finetune_trainer.channel import Channel
from finetune_trainer.stages import merge
from finetune_trainer.stages.files import OUTPUT_FOLDER, StageTask

from tests.support.learning import TEN_ROWS, make_run, train_here
from tests.support.slices import quick_slice

TRAINING_FIELDS = {"maxSteps": 6, "batchSizePerDevice": 5, "learningRate": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": {"type": "lora"}},
    "rslora": {"method": {"type": "lora", "lora": {"rankStabilized": True, "rank": 8}}},
    "dora": {"method": {"type": "dora"}},
    "a module in full": {"method": {"type": "lora", "lora": {"modulesToSave": ["lm_head"]}}},
    "pissa": {"method": {"type": "lora", "lora": {"init": "pissa", "rank": 8}}},
    "ia3": {"method": {"type": "ia3"}},
    "new tokens": {"method": {"type": "lora"}, "model": {"newTokens": ["<note>", "</note>"]}},
}


def train_and_merge(
    folder: Path, model: Path, spec: dict[str, Any], rows: list[dict[str, str]] | None = None, combined_folders: Sequence[Path] = ()
) -> tuple[Path, Path, Channel]:
    """Train an adapter and merge it, together with the adapters in `combined_folders`, in this process.

    Returns the folder of the adapter, the folder of the merged model, and the channel, which records the messages of the merge.
    """
    run, inputs = make_run(folder, model, {"training": TRAINING_FIELDS, "output": {"mergeAdapter": True}, **spec}, rows or TEN_ROWS)
    adapter = train_here(run, inputs).folder
    assert adapter is not None
    inputs = inputs.model_copy(update={"combined_adapters": list(combined_folders)})
    stage_folder, channel = folder / "stage", Channel.create_recording(folder / "work")
    (stage_folder / OUTPUT_FOLDER).mkdir(parents=True)
    merge.run_stage(run, channel, inputs, StageTask(stage=Stage.MERGING, model=adapter, kind=OutputKind.ADAPTER, uri="u"), stage_folder)
    return adapter, stage_folder / OUTPUT_FOLDER, channel


def compute_logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(5, 69).reshape(2, 32)).logits


def load_with_adapter(model: Path, adapter: Path, tokens: int = 0) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    if tokens:
        base.resize_token_embeddings(tokens, mean_resizing=False)
    return PeftModel.from_pretrained(base, adapter)


@pytest.mark.parametrize("case", quick_slice(CASES, ["lora", "a module in full", "pissa", "ia3", "new tokens"]))
def test_the_merged_model_equals_base_and_adapter(case: str, model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, merged, channel = train_and_merge(tmp_path, model, CASES[case])
    loaded_model, loading_info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    expected_logits = compute_logits(load_with_adapter(model, adapter, len(tokenizer) if case == "new tokens" else 0))
    assert torch.allclose(compute_logits(loaded_model), expected_logits, atol=1e-4)
    base = compute_logits(AutoModelForCausalLM.from_pretrained(model))
    assert not torch.allclose(expected_logits[..., : base.shape[-1]], base, atol=1e-2)
    details = [message.get("detail") for message in channel.sent if message["kind"] == "stage"]
    assert details[0] == "loading the base model" and details[-1] == "writing the merged model"
    total = next(detail.split()[2] for detail in details if "layers" in detail)
    assert details[-2] == f"{total} of {total} layers"


@pytest.fixture(scope="module")
def other_adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the same base model with another rank and scale, and for other modules."""
    lora = {"rank": 4, "alpha": 24, "targetModules": ["q_proj", "down_proj"]}
    folder = tmp_path_factory.mktemp("other")
    run, inputs = make_run(folder, model, {"training": TRAINING_FIELDS | {"seed": 7}, "method": {"type": "lora", "lora": lora}}, TEN_ROWS)
    adapter = train_here(run, inputs).folder
    assert adapter is not None
    return adapter


def compute_weight_changes(adapter: Path) -> dict[str, Any]:
    """Compute from the adapter's files how much the adapter changes each weight of the base model."""
    from safetensors.torch import load_file

    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    scale = config["lora_alpha"] / config["r"]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names
    }


def test_combined_adapters_are_added_up_with_their_weights(model: Path, other_adapter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    output = {"mergeAdapter": True, "adapterWeight": 0.75, "combineAdapters": [{"source": f"file://{other_adapter}", "weight": -0.5}]}
    adapter, merged, _ = train_and_merge(tmp_path, model, {"output": output}, combined_folders=[other_adapter])
    base_weights, merged_weights = load_file(model / "model.safetensors"), load_file(merged / "model.safetensors")
    own_changes, other_changes = compute_weight_changes(adapter), compute_weight_changes(other_adapter)
    assert set(other_changes) - set(own_changes) == set() and len(own_changes) > len(other_changes) > 0
    for name, weight in base_weights.items():
        expected_weight = weight + 0.75 * own_changes.get(name, 0) - 0.5 * other_changes.get(name, 0)
        assert torch.allclose(merged_weights[name], expected_weight, atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"use_dora": True}, "an adapter with DoRA: only plain LoRA adapters can be combined"),
        ({"bias": "all"}, "an adapter with trained biases"),
        ({"r": 5}, "says rank 5 for"),
    ],
)
def test_adapters_that_cannot_be_added_up_are_refused_before_training(
    change: dict[str, Any], problem: str, model: Path, other_adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(other_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    require_combinable(other_adapter, model, "output.combineAdapters[0].source", "s3://b/a")
    with pytest.raises(ConfigError, match=problem) as caught:
        require_combinable(folder, model, "output.combineAdapters[0].source", "s3://b/a")
    assert caught.value.code == "AdapterNotCombinable"


def test_an_adapter_of_another_base_is_refused_before_training(other_adapter: Path, tmp_path: Path) -> None:
    from tests.support.tiny import make_tiny_model

    with pytest.raises(ConfigError, match="its adapter fits"):
        require_combinable(other_adapter, make_tiny_model(tmp_path / "wide", hidden=96), "output.combineAdapters[0].source", "s3://b/a")


def test_the_merged_folder_is_complete_and_holds_no_adapter(model: Path, tmp_path: Path) -> None:
    adapter, merged, _ = train_and_merge(tmp_path, model, CASES["lora"])
    assert sorted(path.name for path in merged.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert (merged / "generation_config.json").read_bytes() == (adapter / "generation_config.json").read_bytes()
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == json.loads((merged / "generation_config.json").read_text())["eos_token_id"][0]
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card and "license: apache-2.0" in card and merge.CARD_FILE == "README.md"
    assert "AutoModelForCausalLM.from_pretrained" in card and "peft" not in card


def test_large_models_are_written_in_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SHARD_SIZE", "200KB")
    _, merged, _ = train_and_merge(tmp_path, model, CASES["lora"])
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


def test_tied_embeddings_are_stored_separately_if_only_one_of_them_was_trained(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.tiny import make_tiny_model

    tied_model = make_tiny_model(tmp_path / "tied", tied=True)
    adapter, merged, _ = train_and_merge(tmp_path, tied_model, {"method": {"type": "lora", "lora": {"modulesToSave": ["embed_tokens"]}}})
    expected_logits = compute_logits(load_with_adapter(tied_model, adapter))
    assert torch.allclose(compute_logits(AutoModelForCausalLM.from_pretrained(merged)), expected_logits, atol=1e-4)


def test_an_adapter_of_a_quantised_base_is_merged_into_the_base_in_16_bits(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model_in_16_bits = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model_in_16_bits)
    for path in model.iterdir():
        if not (model_in_16_bits / path.name).exists():
            (model_in_16_bits / path.name).write_bytes(path.read_bytes())
    adapter, merged, channel = train_and_merge(tmp_path, model_in_16_bits, {"method": {"type": "qlora"}})
    loaded_model = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded_model.dtype is torch.bfloat16 and getattr(loaded_model.config, "quantization_config", None) is None
    layer = load_with_adapter(model_in_16_bits, adapter).get_base_model().model.layers[0].self_attn.q_proj
    weight_change = layer.get_delta_weight("default")
    expected_weight = layer.get_base_layer().weight.float() + weight_change.float()
    merged_weight = loaded_model.model.layers[0].self_attn.q_proj.weight.float()
    assert weight_change.abs().max() > 0.01
    assert torch.all((merged_weight - expected_weight).abs() <= expected_weight.abs() * 2**-8)  # the relative rounding error of bfloat16
    notes = [message["text"] for message in channel.sent if message["kind"] == "note"]
    assert notes == ["the adapter was trained on the quantised base model, and is merged into the base model without quantisation"]


def test_the_head_of_a_reward_model_is_merged(model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rows = [{"prompt": "one", "chosen": "red", "rejected": "blue"}, {"prompt": "two", "chosen": "green", "rejected": "blue"}]
    adapter, merged, _ = train_and_merge(tmp_path, model, {"trainer": {"type": "reward"}}, rows)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    expected_logits = compute_logits(PeftModel.from_pretrained(base, adapter))
    loaded_model, loading_info = AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert not loading_info["missing_keys"] and torch.allclose(compute_logits(loaded_model), expected_logits, atol=1e-4)


def test_a_base_model_that_is_stored_quantised_is_refused_before_training(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    quantised_model = tmp_path / "quantised"
    shutil.copytree(model, quantised_model)
    (quantised_model / "config.json").write_text(json.dumps(config))
    run, inputs = make_run(tmp_path, quantised_model, {"output": {"mergeAdapter": True}})
    with pytest.raises(ConfigError, match=r"QuantizedBase: the model is stored quantised \(gptq\), but output.mergeAdapter needs"):
        train_here(run, inputs)


def test_a_disk_that_is_too_small_for_the_merged_model_is_reported(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "free_bytes", lambda _work: 1000)
    with pytest.raises(ConfigError, match="LocalDiskTooSmall"):
        train_and_merge(tmp_path, model, CASES["lora"])


def test_weights_that_are_not_finite_are_refused(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run, inputs = make_run(tmp_path, model, {"training": TRAINING_FIELDS, "output": {"mergeAdapter": True}})
    adapter = train_here(run, inputs).folder
    assert adapter is not None
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file(weights | {name: weights[name] / 0}, adapter / "adapter_model.safetensors")
    task = StageTask(stage=Stage.MERGING, model=adapter, kind=OutputKind.ADAPTER, uri="u")
    with pytest.raises(DivergedError, match="WeightsNotFinite"):
        merge.merge_adapter(run, Channel.create_recording(tmp_path / "work"), inputs, task)
