"""The tokenizer never splits a new token, every method that supports new tokens trains them, and the loaded artefact generates them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.inputs import RestoredCheckpoint

from tests.support.learning import TEN_ROWS, RunOutcome, merge_mappings, run_training
from tests.support.preferences import PREFERENCE_PAIRS

pytestmark = pytest.mark.pod
NEW_TOKENS = ["<yes>", "<no>"]
ROWS = [
    {
        "messages": [
            row["messages"][0],
            {"role": "assistant", "content": f"{NEW_TOKENS[i % 2]}{row['messages'][1]['content']}"},
        ]
    }
    for i, row in enumerate(TEN_ROWS)
]
TOKENS_SPEC: dict[str, Any] = {"model": {"newTokens": NEW_TOKENS}}
SIXTY_STEPS = {"training": {"maxSteps": 60, "batchSizePerDevice": 10, "scheduler": "constant"}}
LORA_SPEC: dict[str, Any] = {"method": {"lora": {"dropout": 0}}}
METHOD_SPECS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "spectrum": {"method": {"type": "spectrum"}},
    "lora": LORA_SPEC,
    "qlora": merge_mappings(LORA_SPEC, {"method": {"type": "qlora"}, "training": {"learningRate": 1e-2}}),
    "trained head": {"method": {"lora": {"dropout": 0, "modulesToSave": ["lm_head"]}}},
}


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


def load_trained_model(outcome: RunOutcome, model: Path) -> tuple[Any, Any]:
    """Load the model and the tokenizer as a user does. For an adapter, the base model's embedding is resized before the adapter is loaded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert outcome.folder is not None
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder)
    if outcome.kind == "model":
        return AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.float32).eval(), tokenizer
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(base, outcome.folder).eval(), tokenizer


def generate_answer(trained_model: Any, tokenizer: Any, row: dict[str, Any]) -> str:
    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output_ids = trained_model.generate(**ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(output_ids[0, ids["input_ids"].shape[1] :]))


@pytest.mark.parametrize("name", METHOD_SPECS)
def test_new_tokens_are_learned_and_generated(name: str, model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, merge_mappings(merge_mappings(SIXTY_STEPS, TOKENS_SPEC), METHOD_SPECS[name]), ROWS)
    assert outcome.losses[-1] < 0.1
    assert "2 new tokens, ids 448 to 449" in outcome.notes
    trained_model, tokenizer = load_trained_model(outcome, model)
    assert tokenizer("a<yes><no>b", add_special_tokens=False)["input_ids"][1:3] == [448, 449]
    if name != "qlora":  # a qlora adapter is trained for a 4-bit base model, but `load_trained_model` loads the base model in full precision
        for row in ROWS[:2]:
            assert generate_answer(trained_model, tokenizer, row) == f"{row['messages'][1]['content']}<|im_end|>"


def test_an_adapter_stores_only_the_embedding_rows_of_the_new_tokens(model: Path, tied_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for base, place_count in ((model, 2), (tied_model, 1)):
        spec = merge_mappings(merge_mappings(TOKENS_SPEC, LORA_SPEC), {"checkpoint": {"strategy": "steps", "steps": 2}})
        outcome = run_training(tmp_path / base.name, base, spec, ROWS)
        assert outcome.folder is not None
        for folder in (outcome.folder, outcome.folder.parent / "checkpoint-2"):
            weights = load_file(folder / "adapter_model.safetensors")
            row_shapes = {key: value.shape for key, value in weights.items() if "lora" not in key}
            assert list(row_shapes.values()) == [(2, 64)] * place_count
        trained_names = [n for n, p in outcome.model.named_parameters() if p.requires_grad and "lora" not in n]
        assert len(trained_names) == place_count
        old_rows = outcome.model.get_base_model().get_input_embeddings().original_module.weight[:448]
        assert torch.equal(old_rows, load_file(base / "model.safetensors")["model.embed_tokens.weight"])


def test_embedding_rows_of_new_tokens_on_a_16_bit_base_are_trained_in_32_bits(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, merge_mappings(merge_mappings(TOKENS_SPEC, LORA_SPEC), {"model": {"dtype": "bfloat16"}}), ROWS)
    trained_dtypes = {name: p.dtype for name, p in outcome.model.named_parameters() if p.requires_grad}
    assert sum("trainable_tokens_delta" in name for name in trained_dtypes) == 2
    assert set(trained_dtypes.values()) == {torch.float32}
    assert outcome.losses[-1] < outcome.losses[0]


def test_embedding_rows_of_new_tokens_start_as_the_mean_of_the_old_rows(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    spec_without_learning = {"method": {"type": "full"}, "training": {"maxSteps": 1, "learningRate": 1e-12}}
    outcome = run_training(tmp_path, model, merge_mappings(TOKENS_SPEC, spec_without_learning), ROWS)
    assert outcome.folder is not None
    weights_after = load_file(outcome.folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weight_before = load_file(model / "model.safetensors")[key]
        assert weights_after[key].shape == (450, 64)
        assert torch.allclose(weights_after[key][448:], weight_before.mean(0).expand(2, -1), atol=1e-6)
        assert torch.allclose(weights_after[key][:448], weight_before, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_new_tokens_resumes_exactly(method: str, model: Path, tmp_path: Path) -> None:
    spec = merge_mappings(TOKENS_SPEC, {"method": {"type": method}, "checkpoint": {"strategy": "steps", "steps": 2}})
    uninterrupted_outcome = run_training(tmp_path / "a", model, spec, ROWS)
    restore = RestoredCheckpoint(path=tmp_path / "a" / "out" / "checkpoint-2", step=2, uri="file:///x")
    resumed_outcome = run_training(tmp_path / "b", model, spec, ROWS, restore=restore)
    assert resumed_outcome.losses == uninterrupted_outcome.losses[2:]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_model_has_the_new_tokens(method: str, model: Path, tmp_path: Path) -> None:
    import math

    rows = [{**row, "chosen": [{"role": "assistant", "content": "<yes>"}]} for row in PREFERENCE_PAIRS]
    spec = merge_mappings(TOKENS_SPEC, {"trainer": {"type": "dpo"}, "method": {"type": method}})
    outcome = run_training(tmp_path, model, spec, rows)
    assert outcome.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert outcome.losses[-1] < outcome.losses[0]


def test_an_adapter_can_be_continued_only_with_its_own_new_tokens(model: Path, tmp_path: Path) -> None:
    first_outcome = run_training(tmp_path / "a", model, merge_mappings(merge_mappings(TOKENS_SPEC, LORA_SPEC), {"training": {"maxSteps": 20}}), ROWS)
    spec = {"method": {"type": "adapter", "adapter": {"source": "s3://models/a"}}}
    repeated_outcome = run_training(tmp_path / "b", model, merge_mappings(TOKENS_SPEC, spec), ROWS, adapter=first_outcome.folder)
    assert repeated_outcome.losses[0] < 0.6 * first_outcome.losses[0]
    plain_outcome = run_training(tmp_path / "c", model, LORA_SPEC)
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path / "d", model, merge_mappings(TOKENS_SPEC, spec), ROWS, adapter=plain_outcome.folder)
    assert caught.value.code == "NewTokensNotTrained"


def test_new_tokens_that_cannot_be_added_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path / "a", model, {"model": {"newTokens": ["<new>", "<|im_end|>"]}})
    assert (caught.value.code, "<|im_end|>" in caught.value.message, "<new>" in caught.value.message) == (
        "TokenKnown",
        True,
        False,
    )
    with pytest.raises(ConfigError) as caught:
        run_training(
            tmp_path / "b",
            model,
            merge_mappings(TOKENS_SPEC, {"method": {"lora": {"targetModules": ["q_proj", "embed_tokens"]}}}),
        )
    assert caught.value.code == "NewTokensTwice"
    from tests.support.learning import make_run, train_here
    from tests.support.tiny import make_tokenizer

    own_tokenizer = make_tokenizer(tmp_path / "tokenizer")
    own_tokenizer.add_tokens(["<unknown>"])
    own_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer_inputs = {"tokenizer": tmp_path / "tokenizer"}
    run, inputs = make_run(tmp_path / "c", model, {"training": {"maxSteps": 1}})
    assert (
        len(train_here(run, inputs.model_copy(update=tokenizer_inputs)).losses) == 1
    )  # a token that the tokenizer already has needs no new embedding row
    unknown_token_rows = [{"messages": [TEN_ROWS[0]["messages"][0], {"role": "assistant", "content": "<unknown>"}]}, *TEN_ROWS]
    run, inputs = make_run(tmp_path / "d", model, {}, unknown_token_rows)
    with pytest.raises(ConfigError) as caught:
        train_here(run, inputs.model_copy(update=tokenizer_inputs))
    assert caught.value.code == "VocabularyDiffers" and "'<unknown>' has id 448" in caught.value.message
