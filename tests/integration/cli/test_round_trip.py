"""A real API server accepts every object that a successful `finetune import` prints. The tests read the printed YAML as YAML 1.1, like kubectl."""

from __future__ import annotations

import pytest
import yaml
from finetune_api import names

from tests.support.kubeapi import KubeApi
from tests.unit.cli.cases import list_accepted_cases, list_import_cases
from tests.unit.cli.import_command import import_files


@pytest.mark.parametrize("name", list_accepted_cases())
def test_the_server_accepts_the_objects_of_an_import(name: str, api: KubeApi) -> None:
    files, source, words = list_import_cases()[name]
    import_outcome = import_files(*files, source=source, words=words, name="imported")
    for document in yaml.safe_load_all(import_outcome.text):
        resource = {"Secret": "secrets", "ConfigMap": "configmaps", names.KIND: names.PLURAL}[document["kind"]]
        response = api.create(resource, "default", document, dryRun="All", fieldValidation="Strict")
        assert response["metadata"]["name"].startswith("imported")
