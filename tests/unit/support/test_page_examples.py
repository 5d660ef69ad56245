"""The e2e tests run every published example that the importers accept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.page_examples import EXAMPLE_WITH_SAME_JOB, PAGE_EXAMPLES, list_accepted_examples
from tests.unit.cli.cases import list_import_cases
from tests.unit.cli.import_command import import_files


def import_spec(name: str) -> dict[str, Any]:
    files, source, words = list_import_cases()[name]
    return import_files(*files, source=source, words=words, name="job", overrides={"model.source": "org/model", "dataset.train": "org/rows"}).spec


def test_every_accepted_example_runs() -> None:
    assert set(list_accepted_examples()) == set(PAGE_EXAMPLES)


@pytest.mark.parametrize(("name", "same"), EXAMPLE_WITH_SAME_JOB.items())
def test_an_example_that_is_left_out_is_the_same_job_as_another_one(name: str, same: str) -> None:
    assert import_spec(name) == import_spec(same) != {}
    assert PAGE_EXAMPLES[name] == PAGE_EXAMPLES[same]
    assert same not in EXAMPLE_WITH_SAME_JOB
