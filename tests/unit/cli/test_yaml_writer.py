"""A reader of YAML 1.1 and a reader of YAML 1.2 get the same value from the YAML that the program writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml as yaml_1_1
from finetune_cli.yaml_writer import to_yaml
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tests.unit.cli.cases import list_accepted_cases, list_import_cases
from tests.unit.cli.import_command import import_files


def parse_with_yaml_1_1_and_1_2(text: str) -> tuple[list[Any], list[Any]]:
    return list(yaml_1_1.safe_load_all(text)), list(YAML(typ="safe", pure=True).load_all(text))


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "Yes",
        "off",
        "~",
        "",
        "010",
        "1e-4",
        "0x1f",
        "1:30",
        "2020-01-01",
        "1_000",
        "-",
        "a\nb",
        "a\n",
        "\n",
        ".5",
        "=",
        "<<",
        "- a",
        "a: b",
        "#c",
        " a ",
    ],
)
def test_strings_stay_strings(value: str) -> None:
    assert parse_with_yaml_1_1_and_1_2(to_yaml({"a": value, "b": [value]})) == ([{"a": value, "b": [value]}],) * 2


@pytest.mark.parametrize("value", [5e-06, 2e-4, 1e22, 0.1, 3.0, 0, -7, True, None])
def test_numbers_stay_numbers(value: Any) -> None:
    assert parse_with_yaml_1_1_and_1_2(to_yaml({"a": value})) == ([{"a": value}],) * 2


@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=12))
def test_any_string_is_preserved(value: str) -> None:
    assert parse_with_yaml_1_1_and_1_2(to_yaml({"a": value})) == ([{"a": value}],) * 2


@pytest.mark.parametrize("name", list_accepted_cases())
def test_imports_are_read_alike_by_both_versions(name: str) -> None:
    files, source, words = list_import_cases()[name]
    import_outcome = import_files(*files, source=source, words=words)
    documents_1_1, documents_1_2 = parse_with_yaml_1_1_and_1_2(import_outcome.text)
    assert documents_1_1 == documents_1_2
    assert documents_1_1[-1]["spec"] == json.loads(json.dumps(import_outcome.spec))
