"""Fields that this release does not implement."""

from __future__ import annotations

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import UNSUPPORTED_FIELDS, find_unsupported_fields, to_wire_path

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def test_every_unsupported_field_exists_in_the_spec() -> None:
    assert all(to_wire_path(field.path) for field in UNSUPPORTED_FIELDS)
    assert find_unsupported_fields(FineTuneJobSpec.model_validate(MINIMAL_SPEC)) == []


@pytest.mark.parametrize(("formats", "tool"), [(["gguf"], "llama.cpp"), (["safetensors", "onnx"], "optimum-onnx")])
def test_the_hint_for_an_unsupported_export_format_names_a_tool_that_converts_the_model(formats: list[str], tool: str) -> None:
    (problem,) = find_unsupported_fields(FineTuneJobSpec.model_validate({**MINIMAL_SPEC, "output": {"export": formats}}))
    assert (problem.path, problem.code) == ("output.export", "NotSupportedYet")
    assert problem.message.startswith(f"contains {formats[-1]}, but no library can convert") and tool in problem.hint


def test_export_as_safetensors_is_accepted() -> None:
    spec = {**MINIMAL_SPEC, "output": {"export": ["safetensors"], "mergeAdapter": True, "hub": {"push": False}}}
    assert find_unsupported_fields(FineTuneJobSpec.model_validate(spec)) == []
