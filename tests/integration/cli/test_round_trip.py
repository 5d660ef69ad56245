"""The real API server accepts every successful import. The tests read the YAML as YAML 1.1, like kubectl."""

from __future__ import annotations

import pytest
import yaml
from finetune_api import names

from tests.support.kubeapi import KubeApi
from tests.unit.cli.cases import accepted_cases, import_cases
from tests.unit.cli.import_command import import_files


@pytest.mark.parametrize("name", accepted_cases())
def test_import_is_accepted_by_the_server(name: str, api: KubeApi) -> None:
    files, source, words = import_cases()[name]
    imported = import_files(*files, source=source, words=words, name="imported")
    for document in yaml.safe_load_all(imported.text):
        resource = {"Secret": "secrets", "ConfigMap": "configmaps", names.KIND: names.PLURAL}[document["kind"]]
        response = api.create(resource, "default", document, dryRun="All", fieldValidation="Strict")
        assert response["metadata"]["name"].startswith("imported")
