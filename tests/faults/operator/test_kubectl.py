"""FineTuneJobs in kubectl: the columns of `get`, the descriptions of `explain`, and the conditions for `wait`."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Phase

from tests.support.kubeapi import KubeApi, resource_path
from tests.support.kubelet import PodPlan, PodStart, failure_exit, success_exit
from tests.support.rig import FINETUNEJOBS, Rig

pytestmark = pytest.mark.faults
DEFAULT_COLUMNS = ["Name", "Status", "Progress", "Loss", "Eta", "Workers", "Restarts", "Reason", "Age"]
MAY_BE_EMPTY = {"Loss", "Checkpoint", "Result", "Duration"}
"""Columns that are empty until the job has a value for them."""
WIDE_COLUMNS = ["Model", "Checkpoint", "Result", "Duration"]


def read_table(api: KubeApi, namespace: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the table that kubectl receives: the definitions of its columns, and the cells of each job by column."""
    url = api.endpoint.server + resource_path(FINETUNEJOBS, namespace)
    headers = {
        "Authorization": f"Bearer {api.endpoint.token}",
        "Accept": "application/json;as=Table;v=v1;g=meta.k8s.io",
    }
    body = api.pool.request("GET", url, headers=headers).json()
    columns = body["columnDefinitions"]
    titles = [column["name"] for column in columns]
    rows = [dict(zip(titles, row["cells"], strict=True)) for row in body["rows"]]
    return columns, {row["Name"]: row for row in rows}


@pytest.mark.row(55)
def test_only_columns_without_a_value_are_empty(rig: Rig) -> None:
    rig.start_operator()
    rig.submit("asleep", suspend=True)
    rig.wait_phase(Phase.SUSPENDED, "asleep")
    rig.submit("done")
    rig.kubelet.set_progress(
        rig.namespace, "done", progress={"step": 12, "totalSteps": 50, "display": "12/50 (24%)", "secondsRemaining": 4320},
        metrics={"trainLoss": 1.25},
    )  # fmt: skip
    pod = rig.kubelet.wait_running(rig.namespace, "done")[0]
    rig.wait(lambda b: (b["status"].get("progress") or {}).get("step") == 12, "done")
    columns, rows = read_table(rig.api, rig.namespace)
    titles = [column["name"].capitalize() for column in columns]
    assert titles == [*DEFAULT_COLUMNS, *WIDE_COLUMNS]
    assert [c["name"].capitalize() for c in columns if not c["priority"]] == DEFAULT_COLUMNS
    running_row = {key.capitalize(): value for key, value in rows["done"].items()}
    assert (running_row["Status"], running_row["Progress"], running_row["Eta"]) == ("Running", "12/50 (24%)", "1h12m")
    assert float(running_row["Loss"]) == 1.25
    rig.kubelet.end_pod(pod, success_exit())
    rig.wait_finished("done")
    rig.submit("broken")
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "broken")[0], failure_exit(65, message="row 7"))
    rig.wait_finished("broken")
    rig.kubelet.set_plan(rig.namespace, PodPlan(start=PodStart.STAY_PENDING))
    rig.submit("waiting")
    rig.wait_attempt(1, "waiting")
    _, rows = read_table(rig.api, rig.namespace)
    assert {name: row["Status"] for name, row in rows.items()} == {
        "asleep": "Suspended", "broken": "Failed", "done": "Succeeded", "waiting": "Starting",
    }  # fmt: skip
    assert {name: row["Reason"] for name, row in rows.items()} == {
        "asleep": "-", "broken": "DataInvalid", "done": "-", "waiting": "PodsNotReady",
    }  # fmt: skip
    empty_cells = {(name, title) for name, row in rows.items() for title, cell in row.items() if cell in (None, "")}
    assert {title for _, title in empty_cells} <= MAY_BE_EMPTY


@pytest.mark.row(55)
def test_every_field_has_a_description(rig: Rig) -> None:
    document = rig.api.request("GET", f"/openapi/v3/apis/{names.API_VERSION}").body
    schemas = document["components"]["schemas"].values()
    job_schema = next(schema for schema in schemas if {"spec", "status"} <= set(schema.get("properties") or {}))
    undescribed_paths = [path for group in ("spec", "status") for path in _list_undescribed(job_schema["properties"][group], group)]
    assert undescribed_paths == []


def _list_undescribed(schema: dict[str, Any], path: str) -> Any:
    """Yield the path of each field that has no description."""
    if not schema.get("description"):
        yield path
    for name, inner_schema in (schema.get("properties") or {}).items():
        yield from _list_undescribed(inner_schema, f"{path}.{name}")


@pytest.mark.row(55)
def test_one_kubectl_wait_command_covers_every_end_of_a_job(rig: Rig) -> None:
    """`kubectl wait --for=condition=Finished` ignores a condition with an old observedGeneration."""
    rig.start_operator()
    for name, container_exit in (("good", success_exit()), ("bad", failure_exit(64, message="no"))):
        rig.submit(name)
        rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, name)[0], container_exit)
        body = rig.wait_finished(name)
        finished_condition = next(c for c in body["status"]["conditions"] if c["type"] == "Finished")
        assert finished_condition["observedGeneration"] == body["metadata"]["generation"]
        assert body["status"]["observedGeneration"] == body["metadata"]["generation"]
