"""An adapter that is continued: all of its file has a place, and all that is trained comes from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, FineTuneError, NotFoundError
from finetune_trainer.method import adapter
from safetensors.torch import load_file, save_file

from tests.support.learning import make_run, merged

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDINGS = "base_model.model.model.embed_tokens.weight"


def base(**options: Any) -> Any:
    """Two small layers, the same ones at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=32, **(sizes | options)))


def made(folder: Path, **options: Any) -> Path:
    """A saved LoRA adapter whose weights are none that PEFT would make up."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        base(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **options)
    )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data)
    wrapped.save_pretrained(folder)
    return folder


def continued(tmp_path: Path, folder: Path, spec: dict[str, Any] | None = None, model: Any = None) -> Any:
    """The adapter on its base."""
    asked = {"method": {"type": "adapter", "adapter": {"source": "s3://models/mine"}}}
    run, inputs = make_run(tmp_path, tmp_path / "model", merged(asked, spec or {}), adapter=folder)
    return adapter.apply(run, inputs, base() if model is None else model)


def change(folder: Path, by: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Other weights in the file."""
    save_file(by(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **options: Any) -> None:
    """Other options in the configuration."""
    value = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(value | options))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [3, 5]}],
)
def test_what_fits_is_continued_with_its_own_weights(options: dict[str, Any], tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter", **options)
    applied = continued(tmp_path, folder)
    applied.model.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert applied.notes == ["continues the LORA adapter of s3://models/mine"]


def shared(folder: Path) -> Path:
    """A saved VB-LoRA adapter: one bank of vectors, which every layer names and the file has once."""
    from peft import VBLoRAConfig, get_peft_model

    sizes = {"r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2}
    wrapped = get_peft_model(
        base(),
        VBLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_vector_bank_bound=0.5, **sizes),
    )
    wrapped.save_pretrained(folder)
    return folder


def test_a_weight_that_layers_share_is_there_under_one_of_its_names(tmp_path: Path) -> None:
    folder = shared(tmp_path / "adapter")
    continued(tmp_path, folder).model.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_weight_that_layers_share_and_no_name_brings_is_refused(tmp_path: Path) -> None:
    folder = shared(tmp_path / "adapter")
    change(folder, lambda held: {name: one for name, one in held.items() if "vector_bank" not in name})
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, folder)
    assert (caught.value.code, "1 weights are not in its file" in caught.value.message) == (
        "AdapterOfAnotherBase",
        True,
    )


def test_weights_of_the_base_that_are_its_own_do_no_harm(tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter")
    rows = base().get_input_embeddings().weight.detach()
    change(folder, lambda held: {**held, EMBEDDINGS: rows})
    continued(tmp_path, folder)
    change(folder, lambda held: {**held, EMBEDDINGS: rows + 1})
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, folder)
    assert (caught.value.code, "model.embed_tokens.weight" in caught.value.message) == ("AdapterNotContinuable", True)


@pytest.mark.parametrize(
    ("by", "told"),
    [
        (lambda held: {name: one for name, one in held.items() if ".layers.0." in name}, "4 weights are not in its file"),
        (
            lambda held: {name.replace(".layers.", ".blocks."): one for name, one in held.items()},
            "8 weights are not in its file, first base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight; 8 of its file have no place",
        ),
        (lambda held: {name: one[:1] if "lora_A" in name else one for name, one in held.items()}, "size mismatch for"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(by: Any, told: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter")
    change(folder, by)
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, folder)
    assert caught.value.code == "AdapterOfAnotherBase"
    assert told in caught.value.message


def test_a_target_that_the_file_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter")
    configure(folder, target_modules=["k_proj", "v_proj"])
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, folder)
    assert (caught.value.code, "have no place" in caught.value.message) == ("AdapterOfAnotherBase", True)


def test_a_base_with_more_layers_is_another_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        continued(tmp_path, made(tmp_path / "adapter"), model=base(num_hidden_layers=3))
    assert (caught.value.code, "layers.2" in caught.value.message) == ("AdapterOfAnotherBase", True)


@pytest.mark.parametrize("ruin", ["no weights", "cut weights", "no config", "odd config", "cut pickle"])
def test_what_cannot_be_read_is_told_as_the_models_fault(ruin: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "adapter")
    if "weights" in ruin or "pickle" in ruin:
        (folder / WEIGHTS).unlink()
    if ruin == "cut weights":
        (folder / WEIGHTS).write_bytes(b"xx")
    if ruin == "cut pickle":
        (folder / "adapter_model.bin").write_bytes(b"xx")
    if "config" in ruin:
        (folder / CONFIG).write_text("[]" if ruin == "odd config" else "")
    with pytest.raises(NotFoundError) as caught:
        continued(tmp_path, folder)
    assert caught.value.code == "AdapterUnreadable"


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"peft_type": "NEWKIND"}, {}),
        ({"peft_type": "PROMPT_TUNING"}, {}),
        ({"init_lora_weights": "pissa_niter_4"}, {"trainer": {"type": "dpo"}}),
        ({"bias": "all"}, {"trainer": {"type": "kto"}}),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(
    options: dict[str, Any], spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = made(tmp_path / "adapter")
    configure(folder, **options)
    with pytest.raises(FineTuneError) as caught:
        continued(tmp_path, folder, spec)
    assert caught.value.code == "AdapterNotContinuable"
