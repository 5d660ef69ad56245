"""Pods write the report of their run, also if the run fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.names import REPORT_KEY, ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows
from report_run import SECRET, STEPS, read_json, run_with_report, store_of

from tests.support.html_page import Element, parse, table
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def badge(page: Element) -> str:
    return next(element.full_text for element in page.all("span") if "badge" in element.attributes.get("class", ""))


def test_the_report_covers_all_steps_and_attempts(model: Path, tmp_path: Path) -> None:
    message = run_with_report(tmp_path, model)
    store = store_of(tmp_path)
    assert message.output is not None and message.output.report_uri == f"file://{store}/{REPORT_KEY}"
    text = (store / REPORT_KEY).read_text()
    page = parse(text)
    assert badge(page) == "Completed" and SECRET not in text
    attempts = table(page, "Attempts of the run")
    resumed_at = int(attempts[2][3])
    assert [row[0] for row in attempts] == ["attempt", "1", "2"] and attempts[2][4] == str(STEPS) and resumed_at % 20 == 0
    assert attempts[1][3:5] == ["0", attempts[1][4]] and int(attempts[1][4].removesuffix(" or later")) >= resumed_at
    assert (attempts[1][6], attempts[2][6]) == ("The pod was killed, and wrote no reason.", "completed")
    figures = {figure.all("strong")[0].full_text: figure for figure in page.all("figure")}
    lines = {figure: len(element.all("path")[0].attributes["d"].split("L")) for figure, element in figures.items() if element.all("path")}
    assert lines["Training loss"] == lines["Learning rate"] == lines["Gradient norm"] == STEPS
    assert lines["Validation loss"] == STEPS // 10
    assert figures["Training loss"].all("g", **{"class": "attempts"})[0].full_text == "attempt 2 attempt 2"
    steps = [row.children[0].full_text for row in figures["Validation loss"].all("tr")[1:]]
    assert steps == [str(step) for step in range(10, STEPS + 1, 10)]
    metrics = {row[0]: row[1] for row in table(page, "Evaluation of 23 rows after training")}
    assert {"loss", "perplexity", "accuracy", "f1", "bleu", "rougeL"} < metrics.keys()
    assert len(page.all("article")) == 2 * 12, "answers to the test questions, and the same answers beside those of the base model"
    checks = dict(table(page, "Checks of the training rows"))
    assert (checks["duplicates left out"], checks["rows that may hold personal data: email"]) == ("1", "1")
    origin = dict(table(page, "Model and inputs"))
    assert (origin["final model"], origin["sha256 of the model's manifest"]) == (message.output.uri, message.output.sha256)
    assert {row[0] for row in table(page, "Files of the final model")[1:]} >= {"model.safetensors", "tokenizer.json"}
    records = [read_json(path) for path in sorted((store / "run/records").iterdir())]
    assert [(record["attempt"], "endedAt" in record) for record in records] == [(1, False), (2, True)]


def test_a_run_that_fails_before_training_has_a_report_with_its_reason(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "alien", "content": "<script>"}]}])
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"}}
    run = run_config(spec, StoreTarget(uri=f"file://{tmp_path}/store/team/job/{UID}"))
    with Pod(run, tmp_path / "pod") as pod:
        assert pod.end() == ExitCode.DATA_INVALID, pod.text[-6000:]
    assert pod.termination_message().output is None
    page = parse((tmp_path / "store/team/job" / UID / REPORT_KEY).read_text())
    code = json.loads((tmp_path / "pod/termination-message").read_text())["code"]
    assert badge(page) == "Failed" and f"exit code 65 ({code})" in page.all("section", **{"aria-label": "Outcome"})[0].full_text
    assert "Not measured: no attempt has checked the data." in page.full_text
