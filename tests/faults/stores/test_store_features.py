"""docs/reference/stores.md lists the features of each S3 server. The probes must find the same features again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.store_features import PAGE, PROBE_BY_FEATURE, load_results, probe_all_features, replace_table
from tests.support.stores import StoreName, running_store


def test_the_page_shows_every_feature_of_every_store() -> None:
    results = load_results()
    assert list(results) == list(StoreName)
    assert {tuple(values) for values in results.values()} == {tuple(PROBE_BY_FEATURE)}
    assert PAGE.read_text() == replace_table(PAGE.read_text(), results), "run `python -m tests.support.store_features`"


@pytest.mark.slow
@pytest.mark.parametrize("name", StoreName)
def test_a_store_behaves_as_the_page_says(name: StoreName, tmp_path: Path) -> None:
    with running_store(tmp_path / "store", name) as server:
        assert probe_all_features(server) == load_results()[name]
