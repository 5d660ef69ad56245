"""A real API server accepts a dry run of every object in every example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import names

from localcluster.api import Endpoint
from tests.integration.api.conftest import JOBS_PATH, ROOT, call

pytestmark = pytest.mark.integration

PATHS = {
    names.KIND: JOBS_PATH,
    "ConfigMap": "/api/v1/namespaces/default/configmaps",
    "ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
}
TOPICS = ("", "methods", "sources", "cluster", "results")
EXAMPLE_FILES = sorted(path for topic in TOPICS for path in (ROOT / "examples" / topic).glob("*.yaml"))


def read_objects(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.stem)
def test_api_server_accepts_the_example(api: Endpoint, path: Path) -> None:
    for document in read_objects(path):
        response = call(api, "POST", PATHS[document["kind"]], document, dryRun="All", fieldValidation="Strict")
        assert response.status == 201, response.message
        assert response.headers.get_all("Warning") is None
