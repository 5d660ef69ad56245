"""`load_spec` refuses the same values in a spec as the API server."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.spec import FineTuneJobSpec, load_spec
from pydantic import ValidationError

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def test_unknown_fields_nan_and_values_outside_bounds_are_refused() -> None:
    for change in (
        {"training": {"learninRate": 1}},
        {"training": {"learningRate": float("nan")}},
        {"training": {"maxSteps": 0}},
    ):
        with pytest.raises(ValidationError):
            FineTuneJobSpec.model_validate(MINIMAL_SPEC | change)


@pytest.mark.parametrize(
    "change", [{"training": {"maxSteps": True}}, {"training": {"maxSteps": "3"}}, {"suspend": "true"}]
)
def test_a_value_of_another_json_type_is_refused(change: dict[str, Any]) -> None:
    assert load_spec(MINIMAL_SPEC | {"training": {"learningRate": 1}, "method": {"type": "qlora"}}).training.learning_rate == 1
    with pytest.raises(ValidationError):
        load_spec(MINIMAL_SPEC | change)


@pytest.mark.parametrize("endpoint", ["https://s3.example.com", "http://10.0.0.7:8333/", "http://[fd00::7]:8333"])
def test_an_endpoint_with_scheme_and_host_is_accepted(endpoint: str) -> None:
    assert load_spec(MINIMAL_SPEC | {"storage": {"endpoint": endpoint}}).storage.endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["https://key:secret@s3.example.com", "https://s3.example.com/bucket", "s3.example.com"])
def test_an_endpoint_with_credentials_with_a_path_or_without_a_scheme_is_refused(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="storage.endpoint"):
        load_spec(MINIMAL_SPEC | {"storage": {"endpoint": endpoint}})


@pytest.mark.parametrize("endpoint", ["https://api.openai.com/v1", "http://vllm:8000", "http://10.0.0.7:8000/v1/"])
def test_the_endpoint_of_a_judge_may_have_a_path(endpoint: str) -> None:
    judge = load_spec(MINIMAL_SPEC | {"evaluation": {"judge": {"endpoint": endpoint}}}).evaluation.judge
    assert judge is not None and judge.endpoint == endpoint


@pytest.mark.parametrize(
    "evaluation",
    [
        {"judge": {"endpoint": "https://key@host/v1"}}, {"judge": {"endpoint": "host/v1"}}, {"judge": {"endpoint": "https://host/v1?key=x"}},
        {"gates": []}, {"gates": [{"metric": "vibes", "op": "ge", "value": 1}]}, {"gates": [{"op": "ge", "value": 1}]},
        {"gates": [{"metric": "f1", "op": "eq", "value": 1}]}, {"gates": [{"metric": "f1", "notWorseThanBase": {"margin": -0.1}}]},
        {"gates": [{"metric": "f1", "notWorseThanBase": {"confidence": 0.5}}]}, {"gates": [{"metric": "f1", "notWorseThanBase": {"confidence": 1}}]},
        {"gates": [{"metric": "f1", "op": "ge", "value": 1}] * 17}, {"maxRows": 0},
    ],
)  # fmt: skip
def test_invalid_values_of_the_evaluation_are_refused(evaluation: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="evaluation"):
        load_spec(MINIMAL_SPEC | {"evaluation": evaluation})


def test_the_field_phases_from_has_the_same_name_in_json() -> None:
    phases = {"train": False, "from": "s3://b/model"}
    assert load_spec(MINIMAL_SPEC | {"phases": phases}).to_wire()["phases"] == phases


def test_a_float_without_a_fraction_is_accepted_as_an_integer() -> None:
    assert load_spec(MINIMAL_SPEC | {"training": {"maxSteps": 20.0, "epochs": 1}}).training.max_steps == 20


@pytest.mark.parametrize("bits", [2, 3, 5, 16])
def test_quantisation_to_any_number_of_bits_except_4_and_8_is_refused(bits: int) -> None:
    with pytest.raises(ValidationError, match="should be 4 or 8"):
        load_spec(MINIMAL_SPEC | {"model": {"source": "a/b", "quantization": {"bits": bits}}})
