"""The e2e tests run every example that the importers accept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.page_examples import PAGE_EXAMPLES, SAME_JOB, accepted_examples
from tests.unit.cli.cases import import_cases
from tests.unit.cli.import_command import import_files


def imported_spec(name: str) -> dict[str, Any]:
    files, source, words = import_cases()[name]
    return import_files(*files, source=source, words=words, name="job", overrides={"model.source": "org/model", "dataset.train": "org/rows"}).spec


def test_every_accepted_example_runs() -> None:
    assert set(accepted_examples()) == set(PAGE_EXAMPLES)


@pytest.mark.parametrize(("name", "same"), SAME_JOB.items())
def test_an_example_that_is_left_out_is_the_same_job_as_another_one(name: str, same: str) -> None:
    assert imported_spec(name) == imported_spec(same) != {}
    assert PAGE_EXAMPLES[name] == PAGE_EXAMPLES[same]
    assert same not in SAME_JOB
