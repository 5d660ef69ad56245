"""Fields that this release does not implement."""

from __future__ import annotations

from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import UNSUPPORTED_FIELDS, unsupported_fields, wire_path

MINIMAL_SPEC = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def test_unsupported_fields_exist_in_the_spec() -> None:
    assert all(wire_path(row.path) for row in UNSUPPORTED_FIELDS)
    assert unsupported_fields(FineTuneJobSpec.model_validate(MINIMAL_SPEC)) == []
