"""`model_comparison.json` has the expected contents, and the file of its prompts is read as documented."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from finetune_api.errors import DataError
from finetune_trainer.results.model_comparison import (
    ComparedAnswers,
    ComparisonMetadata,
    GenerationParams,
    ModelComparison,
    format_iso_time,
    parse_prompts,
)
from pydantic import ValidationError

TIME = datetime(2025, 10, 9, 19, 40, 1, 500000, tzinfo=timezone(timedelta(hours=2)))
METADATA = ComparisonMetadata(
    base_model="gpt2", finetuned_model_path="s3://bucket/results/model/", prompts_file="prompts.txt", num_prompts=2,
    generation_params=GenerationParams(max_new_tokens=150, temperature=0.7, top_p=0.9, do_sample=True), device="cpu",
    comparison_date=format_iso_time(TIME),
)  # fmt: skip


def test_the_file_has_exactly_the_expected_content() -> None:
    long_prompt = "x" * 99 + "éyz"
    comparison = ModelComparison(
        metadata=METADATA,
        comparisons=[
            ComparedAnswers.of(1, "What is it?", base_answer="No idea.", trained_answer="It.", time=TIME),
            ComparedAnswers.of(2, long_prompt, base_answer="", trained_answer="Answer", time=TIME, label="B"),
        ],
    )
    text = comparison.to_json()
    assert "éyz" in text
    assert json.loads(text) == {
        "metadata": {
            "base_model": "gpt2", "finetuned_model_path": "s3://bucket/results/model/", "prompts_file": "prompts.txt", "num_prompts": 2,
            "generation_params": {"max_new_tokens": 150, "temperature": 0.7, "top_p": 0.9, "do_sample": True}, "device": "cpu",
            "comparison_date": "2025-10-09T17:40:01.500+00:00",
        },
        "comparisons": [
            {
                "prompt_id": 1, "prompt": "What is it?", "prompt_preview": "What is it?", "base_model_response": "No idea.",
                "finetuned_model_response": "It.", "timestamp": "2025-10-09T17:40:01.500+00:00", "response_length_diff": -5,
            },
            {
                "prompt_id": 2, "prompt": long_prompt, "prompt_preview": "x" * 99 + "é", "base_model_response": "",
                "finetuned_model_response": "Answer", "timestamp": "2025-10-09T17:40:01.500+00:00", "response_length_diff": 6, "label": "B",
            },
        ],
    }  # fmt: skip
    assert list(json.loads(text)["metadata"]) == list(ComparisonMetadata.model_fields)


def test_only_generation_options_that_are_set_are_in_the_file() -> None:
    options = GenerationParams(max_new_tokens=1, temperature=0, top_p=1, do_sample=False, top_k=50)
    metadata = METADATA.model_copy(update={"generation_params": options})
    written_params = json.loads(ModelComparison(metadata=metadata, comparisons=[]).to_json())["metadata"]["generation_params"]
    assert written_params == {"max_new_tokens": 1, "temperature": 0, "top_p": 1, "do_sample": False, "top_k": 50}
    with pytest.raises(ValidationError):
        GenerationParams.model_validate({"max_new_tokens": 1, "temperature": 0, "top_p": 1, "do_sample": False, "topK": 50})


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("one\rtwo", ["one", "two"]),
        ("\ufeffone\ntwo", ["one", "two"]),
        ("\n\n  \none\ntwo\n\n\n", ["one", "two"]),  # blank lines at the beginning and end do not separate prompts
        ("  one \n\ttwo", ["one", "two"]),
        ("only one", ["only one"]),
        ("one\nmore\n\ntwo\n", ["one\nmore", "two"]),
        ("one\r\nmore\r\n \t\r\n\r\n\r\ntwo\r\n", ["one\nmore", "two"]),
        ("def f():\n    return 1\n\nnext", ["def f():\n    return 1", "next"]),
        ("one\u2028still one\x0band still one\ntwo", ["one\u2028still one\x0band still one", "two"]),
    ],
)
def test_blank_lines_separate_prompts_if_there_are_any(text: str, prompts: list[str]) -> None:
    assert parse_prompts(text.encode(), name="prompts.txt") == prompts


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_prompts_is_refused(content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        parse_prompts(content, name="prompts.txt")
    assert caught.value.code == "PromptsEmpty" and caught.value.message == "prompts.txt: no prompts"


def test_a_file_in_another_encoding_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        parse_prompts("one é".encode("latin-1"), name="prompts.txt")
    assert caught.value.code == "PromptsNotUtf8" and "byte 5 " in caught.value.message


def test_times_are_utc() -> None:
    assert format_iso_time(datetime(2025, 1, 1, tzinfo=UTC)) == "2025-01-01T00:00:00.000+00:00"
