"""With plain transformers and PEFT, a trained model stops at the end token of its training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.learning import TEN_ROWS, run_training

QUESTION = [TEN_ROWS[0]["messages"][0]]


def generate_first_answer(model: Any, folder: Path, **options: Any) -> tuple[str, int]:
    """Let the model answer the first question of its training data.

    Returns the text of the answer including special tokens, and the answer's number of tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, **options)
    new_tokens = output[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens), len(new_tokens)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_trained_end_token_stops_plain_generation(method: str, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    outcome = run_training(tmp_path, model, {"method": {"type": method}, "training": {"maxSteps": 40, "batchSizePerDevice": 10}})
    folder = outcome.folder
    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end_id, base_end_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [end_id, base_end_id] and settings["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    if method == "full":
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end_id
    base = AutoModelForCausalLM.from_pretrained(model if method == "lora" else folder)
    trained_model = PeftModel.from_pretrained(base, folder) if method == "lora" else base
    options = {"generation_config": GenerationConfig.from_pretrained(folder)} if method == "lora" else {}
    expected_answer = TEN_ROWS[0]["messages"][1]["content"]
    assert generate_first_answer(trained_model, folder, **options)[0] == f"{expected_answer}<|im_end|>"
    # With the generation settings of the base model, the model continues after its answer.
    text, length = generate_first_answer(trained_model, folder, generation_config=GenerationConfig.from_pretrained(model))
    assert text.startswith(f"{expected_answer}<|im_end|>") and length == 24


def test_a_model_trained_on_plain_text_keeps_the_end_token_of_its_base_model(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = run_training(tmp_path, model, {"training": {"maxSteps": 1}}, rows=[{"text": "one two three"}] * 4).folder
    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_preference_pairs_teach_the_end_token_of_their_answers(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": q}], "chosen": [{"role": "assistant", "content": a}], "rejected": [{"role": "assistant", "content": "no"}]}
            for q, a in [("one", "red"), ("two", "green")]]  # fmt: skip
    folder = run_training(tmp_path, model, {"trainer": {"type": "dpo"}, "training": {"maxSteps": 1}}, rows=rows).folder
    assert folder is not None
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_a_reward_model_has_no_generation_settings(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "chosen": "red", "rejected": "blue"}, {"prompt": "two", "chosen": "green", "rejected": "blue"}]
    folder = run_training(tmp_path, model, {"trainer": {"type": "reward"}, "training": {"maxSteps": 1}}, rows=rows).folder
    assert folder is not None and not (folder / "generation_config.json").exists()
    assert "pipeline_tag: text-classification" in (folder / "README.md").read_text()
