"""A real API server accepts the objects and the kubectl commands in the documentation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from finetune_api import names

from localcluster import build
from localcluster.api import Endpoint
from tests.integration.api.conftest import JOBS_PATH, call
from tests.support.doc_blocks import Block, is_chart_values, read_blocks, read_objects

pytestmark = pytest.mark.integration

PATHS = {
    names.KIND: JOBS_PATH,
    "ConfigMap": "/api/v1/namespaces/default/configmaps",
    "ServiceAccount": "/api/v1/namespaces/default/serviceaccounts",
    "PersistentVolumeClaim": "/api/v1/namespaces/default/persistentvolumeclaims",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
}
YAML_BLOCKS = [block for block in read_blocks() if block.language == "yaml" and not is_chart_values(block)]


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=lambda block: block.name)
def test_the_server_accepts_the_objects_of_a_block(api: Endpoint, block: Block) -> None:
    for item in read_objects(block):
        response = call(api, "POST", PATHS[item["kind"]], item, dryRun="All", fieldValidation="Strict")
        assert response.status == 201, response.message


def list_pages_with_kubectl() -> list[Path]:
    return sorted({block.page for block in read_blocks() if block.language == "sh" and block.is_run and "kubectl " in block.text})


@pytest.mark.parametrize("page", list_pages_with_kubectl(), ids=lambda page: page.stem)
def test_kubectl_commands_of_a_page_succeed(api: Endpoint, page: Path, tmp_path: Path) -> None:
    """The commands of each page run in the order in which the page shows them, in a namespace of their own. No operator is running, so no job starts."""
    program = [str(build.ensure_built(build.KUBE_PROGRAM)), "kubectl", "--kubeconfig", str(api.kubeconfig)]
    namespace = f"docs-{page.stem}"
    subprocess.run([*program, "create", "namespace", namespace], check=True, capture_output=True)
    for block in (block for block in read_blocks() if block.page == page and block.is_run):
        if block.title:
            (tmp_path / block.title).write_text(block.text, "utf-8")
        elif block.language == "sh":
            for words in (words for words in block.words() if words[0] == "kubectl"):
                completed_process = subprocess.run([*program, "-n", namespace, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
                assert completed_process.returncode == 0, f"{block.name}: {' '.join(words)}: {completed_process.stderr}"
