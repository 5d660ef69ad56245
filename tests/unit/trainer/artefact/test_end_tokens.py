"""The end tokens that a model learns from training data, and the files that contain these tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.artefact.end_tokens import find_trained_end_tokens, read_trained_answers, split_into_answers
from finetune_trainer.artefact.generation import copy_end_tokens_to_model_config, write_generation_files

from tests.support.tiny import CHATML_TEMPLATE, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shared_tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    shared_tokenizer.eos_token = "<|endoftext|>"
    return shared_tokenizer


def encode_text(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_labels_between_ignored_labels_are_one_answer() -> None:
    assert list(split_into_answers([-100, 5, 6, -100, -100, 7])) == [[5, 6], [7]]
    assert list(split_into_answers([-100])) == []


def test_the_special_token_before_white_space_ends_an_answer(tokenizer: Any) -> None:
    answers = [encode_text(tokenizer, "red<|im_end|>"), encode_text(tokenizer, "blue<|im_end|>\n"), encode_text(tokenizer, "one<|endoftext|>")]
    assert find_trained_end_tokens(tokenizer, answers) == encode_text(tokenizer, "<|im_end|><|endoftext|>")


def test_ordinary_tokens_and_rare_special_tokens_end_no_answer(tokenizer: Any) -> None:
    assert find_trained_end_tokens(tokenizer, [encode_text(tokenizer, "Paris is red"), []]) == []
    answers_and_one_cut_answer = [*[encode_text(tokenizer, "red<|im_end|>")] * 199, encode_text(tokenizer, "<|im_start|>")]
    assert find_trained_end_tokens(tokenizer, answers_and_one_cut_answer) == encode_text(tokenizer, "<|im_end|>")


def test_a_new_token_that_ends_the_answers_counts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<stop>"])
    assert find_trained_end_tokens(tokenizer, [encode_text(tokenizer, "red<stop>")]) == [tokenizer.convert_tokens_to_ids("<stop>")]


@pytest.mark.parametrize(
    ("columns", "expected_answers"),
    [
        ({"input_ids": [[1, 2]], "labels": [[-100, 2]]}, [[2]]),
        ({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}, [[2]]),
        ({"prompt_ids": [[1], [1]], "completion_ids": [[2], [3]], "label": [False, True]}, [[3]]),
        ({"prompt": ["a"]}, []),
    ],
)
def test_answers_are_read_from_the_columns_of_each_objective(columns: dict[str, Any], expected_answers: list[list[int]]) -> None:
    from datasets import Dataset

    assert [list(answer) for answer in read_trained_answers(Dataset.from_dict(columns))] == expected_answers


def test_at_most_2000_rows_are_read() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"labels": [[number] for number in range(4001)]})
    read_labels = [answer[0] for answer in read_trained_answers(rows)]
    assert read_labels == list(range(0, 4001, 3))


def write_files(tokenizer: Any, tmp_path: Path, base_settings: dict[str, Any], end_ids: list[int]) -> tuple[dict[str, Any], bool]:
    """Write the generation files. Returns the generation settings, and whether the tokenizer was saved again."""
    from transformers import LlamaConfig

    (tmp_path / "base").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(base_settings))
    write_generation_files(tmp_path / "final", tmp_path / "base", LlamaConfig(), tokenizer, end_ids)
    return json.loads((tmp_path / "final" / "generation_config.json").read_text()), (tmp_path / "final" / "tokenizer_config.json").exists()


def test_trained_tokens_come_before_those_of_the_base_model(tokenizer: Any, tmp_path: Path) -> None:
    end_id, base_end_id = encode_text(tokenizer, "<|im_end|><|endoftext|>")
    # Some published models set a temperature but turn sampling off, although these settings contradict each other.
    settings, is_tokenizer_saved = write_files(tokenizer, tmp_path, {"eos_token_id": [base_end_id, 9], "temperature": 0.6, "do_sample": False}, [end_id])
    assert (settings["eos_token_id"], settings["temperature"], is_tokenizer_saved) == ([end_id, base_end_id, 9], 0.6, True)
    assert json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_tokenizer_whose_end_token_was_trained_is_not_saved_again(tokenizer: Any, tmp_path: Path) -> None:
    end_id, base_end_id = encode_text(tokenizer, "<|im_end|><|endoftext|>")
    assert write_files(tokenizer, tmp_path, {}, [end_id, base_end_id])[1] is False


def test_a_tokenizer_whose_template_writes_the_end_token_is_not_saved_again(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=CHATML_TEMPLATE + "{{ eos_token }}")
    tokenizer.eos_token = "<|endoftext|>"
    (tmp_path / "work").mkdir()
    assert write_files(tokenizer, tmp_path / "work", {}, encode_text(tokenizer, "<|im_end|>"))[1] is False


def test_without_trained_tokens_and_settings_the_end_tokens_come_from_the_model_configuration(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    write_generation_files(tmp_path, tmp_path / "none", LlamaConfig(eos_token_id=7, pad_token_id=8), tokenizer, [])
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == ([7, tokenizer.eos_token_id], 8)


@pytest.mark.parametrize(
    ("end_token_ids", "config", "expected_ids"),
    [([7, 2], {"eos_token_id": 2}, 7), ([7, 2], {"eos_token_id": [2, 3]}, [7, 2]), (7, {"eos_token_id": 2}, 7), (7, {}, None), (None, {"eos_token_id": 2}, 2)],
)
def test_the_configuration_of_a_complete_model_names_the_same_end_token(end_token_ids: Any, config: dict[str, Any], expected_ids: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, **config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end_token_ids}))
    copy_end_tokens_to_model_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"vocab_size": 9} | ({"eos_token_id": expected_ids} if expected_ids else {})


def test_no_model_configuration_is_written_for_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    copy_end_tokens_to_model_config(tmp_path)
    assert not (tmp_path / "config.json").exists()
