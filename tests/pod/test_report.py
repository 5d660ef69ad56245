"""A pod also writes a report if its run fails. `test_resumed_run.py` tests the report of a complete run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.names import REPORT_KEY, ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.html_page import parse_page
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_the_report_of_a_run_that_fails_before_training_shows_the_reason(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "alien", "content": "<script>"}]}])
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"}}
    run = run_config(spec, StoreTarget(uri=f"file://{tmp_path}/store/team/job/{UID}"))
    with Pod(run, tmp_path / "pod") as pod:
        assert pod.end() == ExitCode.DATA_INVALID, pod.text[-6000:]
    assert pod.termination_message().output is None
    page = parse_page((tmp_path / "store/team/job" / UID / REPORT_KEY).read_text())
    badge = next(element.full_text for element in page.find_all("span") if "badge" in element.attributes.get("class", ""))
    code = json.loads((tmp_path / "pod/termination-message").read_text())["code"]
    assert badge == "Failed" and f"exit code 65 ({code})" in page.find_all("section", **{"aria-label": "Outcome"})[0].full_text
    assert "Not measured: no attempt has checked the data." in page.full_text
