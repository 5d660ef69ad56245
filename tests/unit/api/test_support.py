"""Fields that this release does not implement."""

from __future__ import annotations

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import UNSUPPORTED_FIELDS, unsupported_fields, wire_path

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def test_unsupported_fields_exist_in_the_spec() -> None:
    assert all(wire_path(row.path) for row in UNSUPPORTED_FIELDS)
    assert unsupported_fields(FineTuneJobSpec.model_validate(MINIMAL_SPEC)) == []


@pytest.mark.parametrize(("formats", "tool"), [(["gguf"], "llama.cpp"), (["safetensors", "onnx"], "optimum-onnx")])
def test_formats_that_no_library_writes_are_refused_with_a_way_to_convert_the_model(formats: list[str], tool: str) -> None:
    (problem,) = unsupported_fields(FineTuneJobSpec.model_validate({**MINIMAL_SPEC, "output": {"export": formats}}))
    assert (problem.path, problem.code) == ("output.export", "NotSupportedYet")
    assert problem.message.startswith(f"contains {formats[-1]}, but no library converts") and tool in problem.hint


def test_safetensors_are_accepted() -> None:
    spec = {**MINIMAL_SPEC, "output": {"export": ["safetensors"], "mergeAdapter": True, "hub": {"push": False}}}
    assert unsupported_fields(FineTuneJobSpec.model_validate(spec)) == []
