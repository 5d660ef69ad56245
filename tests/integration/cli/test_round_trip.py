"""Every import that succeeds is accepted by the real API server, word for word."""

from __future__ import annotations

import pytest
from finetune_api import names

from tests.support.kubeapi import KubeApi
from tests.unit.cli.cases import cases
from tests.unit.cli.imports import HERE, import_

ACCEPTED = [
    name for name in cases() if '"refused"' not in (HERE / "expected" / f"{name}.json").read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_import_is_accepted_by_the_server(name: str, api: KubeApi) -> None:
    files, source, words = cases()[name]
    found = import_(*files, source=source, words=words, name="imported")
    assert found.mistakes == []
    for document in found.documents:
        resource = {"Secret": "secrets", "ConfigMap": "configmaps", names.KIND: names.PLURAL}[document["kind"]]
        answer = api.create(resource, "default", document, dryRun="All", fieldValidation="Strict")
        assert answer["metadata"]["name"].startswith("imported")
