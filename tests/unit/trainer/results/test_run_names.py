"""The name of a run follows from `output.runName`, and names of files and folders follow from the name."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from finetune_api.spec.results import RunName
from finetune_trainer.results.run_names import build_run_name, make_slug, time_folder_name
from pydantic import ValidationError

STARTED_AT = datetime(2025, 6, 29, 14, 30, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("run_name", "expected_name"),
    [
        (None, "job"),
        (RunName(name="my-model"), "my-model"),
        (RunName(prefix="exp-"), "exp-20250629-143022"),
        (RunName(suffix="-v1"), "20250629-143022-v1"),
        (RunName(prefix="exp-", name="0.0.1", suffix="-v1"), "exp-0.0.1-v1"),
        (RunName(prefix="a", name="b", suffix="c"), "abc"),
        (RunName(), "20250629-143022"),
        (RunName(name="", suffix="-x"), "20250629-143022-x"),
    ],
)
def test_a_name_is_prefix_base_and_suffix_without_separators(run_name: RunName | None, expected_name: str) -> None:
    assert build_run_name(run_name, job_name="job", started_at=STARTED_AT) == expected_name


@pytest.mark.parametrize("part", ["name", "prefix", "suffix"])
@pytest.mark.parametrize("character", "$#@&*!")
def test_the_api_refuses_six_characters_in_each_part(part: str, character: str) -> None:
    with pytest.raises(ValidationError):
        RunName.model_validate({part: f"a{character}b"})


def test_times_are_utc() -> None:
    start_in_berlin = STARTED_AT.astimezone(timezone(timedelta(hours=2)))
    assert build_run_name(RunName(), job_name="job", started_at=start_in_berlin) == "20250629-143022"
    assert time_folder_name(start_in_berlin) == "20250629_143022"
    with pytest.raises(ValueError, match="has no time zone"):
        time_folder_name(STARTED_AT.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("name", "expected_slug"),
    [
        ("my-model", "my-model"),
        ("exp-0.0.1-v1", "exp-0.0.1-v1"),
        ("My_Model v2", "my-model-v2"),
        ("Größe é", "gro-e-e"),
        ("../../etc/passwd", "etc-passwd"),
        ("-a.-b-.c.", "a.b.c"),
        ("x" * 70, "x" * 63),
        ("x" * 62 + "--y", "x" * 62),
        ("模型", "run-c98e118e"),
        ("", "run-e3b0c442"),
    ],
)
def test_a_slug_is_a_valid_object_name_label_value_and_folder(name: str, expected_slug: str) -> None:
    slug = make_slug(name)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", slug) and len(slug) <= 63
    assert slug == expected_slug
