"""The page is well-formed, contains every value but no secret, and gives a reason for each missing value."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.pod import RunConfig
from finetune_api.status import EvaluationResult, GateResult, Output, TimeUse
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.report.page import render
from finetune_trainer.report.run_report import RunReport
from report_samples import make_attempt_record, make_sample_report, make_training_line

from tests.support.html_page import Element, parse_page, read_table

ATTACK = "<script>alert('x')</script>\"&"


def parse_sample_page(**fields: Any) -> Element:
    return parse_page(render(make_sample_report(**fields)))


def read_tiles(page: Element) -> dict[str, tuple[str, str]]:
    """Return value and detail of each number at the top of the page."""
    numbers_by_title = {}
    for tile in page.find_all("div"):
        if tile.attributes.get("class", "").split()[:1] == ["tile"]:
            span_texts = [span.full_text for span in tile.find_all("span")]
            numbers_by_title[tile.find_all("dt")[0].full_text] = (span_texts[0], span_texts[1] if len(span_texts) > 1 else "")
    return numbers_by_title


def test_the_page_of_a_completed_run_has_all_sections_and_numbers() -> None:
    page = parse_sample_page()
    assert page.find_all("h1")[0].full_text == "bot" and page.find_all("title")[0].full_text == "bot – fine-tuning report"
    assert page.find_all("span", **{"class": "badge good"})[0].full_text == "Completed"
    assert [element.attributes["id"] for element in page.find_all("section", **{"class": "card"})] == [
        "curves", "results", "answers", "request", "attempts", "data", "costs", "lineage", "notes",
    ]  # fmt: skip
    assert read_tiles(page) == {
        "Optimizer steps": ("4", "1 epoch"), "Training loss": ("0.5", "from 2"), "Best validation loss": ("1.5", "at step 2"),
        "accuracy": ("0.830", "+0.04 against the base model"), "Gates passed": ("1 of 1", ""), "GPU hours": ("0.67", "on 2 GPUs"),
        "Running time": ("20 min 0 s", "2 attempts"),
    }  # fmt: skip


def test_charts_show_attempts_and_have_tables() -> None:
    figures = {figure.find_all("strong")[0].full_text: figure for figure in parse_sample_page().find_all("figure")}
    assert list(figures) == ["Training loss", "Validation loss", "Learning rate", "Gradient norm", "Throughput", "GPU memory"]
    loss_figure = figures["Training loss"]
    rows = [[cell.full_text for cell in row.children] for row in loss_figure.find_all("tr")]
    assert rows == [["step", "training loss"], ["1", "2"], ["2", "1"], ["3", "not measured"], ["4", "0.5"]]
    assert loss_figure.find_all("path")[0].attributes["d"].count("M") == 1 and len(loss_figure.find_all("circle")) == 1, (
        "step 4 is a circle, because step 3 has no value"
    )
    assert [text.full_text for text in loss_figure.find_all("g", **{"class": "attempts"})[0].find_all("text")] == ["attempt 2"]
    svg = loss_figure.find_all("svg")[0]
    title_and_description_ids = [element.attributes["id"] for element in [*svg.find_all("title"), *svg.find_all("desc")] if "id" in element.attributes]
    assert svg.attributes["role"] == "img" and svg.attributes["aria-labelledby"].split() == title_and_description_ids
    assert figures["GPU memory"].find_all("p")[0].full_text == "not measured: the run used no GPU, and the trainer measures only GPU memory"


def test_results_have_intervals_gates_and_reasons() -> None:
    page = parse_sample_page(further_results={"benchmarks": [{"name": "arc_easy", "value": 0.5}], "verification": {"maxDifference": 0.001}})
    assert read_table(page, "Evaluation of 8 rows after training") == [
        ["metric", "trained model", "base model", "difference", "95 % interval"],
        ["accuracy", "0.830", "0.790", "+0.04", "+0.012 to +0.068"],
        ["bertscore", "not measured: the model of bertscore has no weights", "–", "–", "–"],
    ]
    assert read_table(page, "Gates")[1] == ["accuracy", "passed", "accuracy is 0.83"]
    assert read_table(page, "Test set, measured by the trainer")[1:] == [["testLoss", "1.25"]]
    assert read_table(page, "Benchmarks")[1:] == [["[].name", "arc_easy"], ["[].value", "0.5"]]
    assert read_table(page, "Verification")[1:] == [["maxDifference", "0.001"]]


def test_answers_are_side_by_side() -> None:
    articles = [article.full_text for article in parse_sample_page().find_all("article")]
    assert articles == [
        "Prompt 1 Which town? base model I cannot say. trained model Oslo.",
        "Row 1 2 + 2? trained model equals the data 4 answer of the data 4",
        "Row 2 2 + 3? trained model differs from the data 7 answer of the data 5",
    ]


def test_values_of_the_user_are_separate_from_filled_in_defaults() -> None:
    page = parse_sample_page()
    assert read_table(page, "Set by the user")[1:] == [["model.source", "org/base@main"], ["dataset.train", "s3://data/rows.jsonl"], ["training.epochs", "1"]]
    assert ["method.lora.rank", "16", "default"] in read_table(page, "Filled in")


def test_attempts_data_costs_and_origin_are_shown() -> None:
    page = parse_sample_page()
    assert read_table(page, "Attempts of the run")[1:] == [
        ["1", "2026-03-01 12:00:00", "2026-03-01 12:10:00", "0", "2", "0", "exit code 71, GpuOutOfMemory: no memory left"],
        ["2", "2026-03-01 13:00:00", "2026-03-01 13:10:00", "2", "4", "–", "completed"],
    ]
    lengths = {row[0]: row[1:] for row in read_table(page, "Rows and lengths")}
    no_token_counts = "not measured: this objective does not record token counts"
    assert (lengths["rows"], lengths["tokens"], lengths["rows that were cut"]) == (["1,200", "8"], ["54,321", no_token_counts], ["7", no_token_counts])
    checks = dict(read_table(page, "Checks of the training rows"))
    assert (checks["duplicates left out"], checks["rows that may hold personal data: email"]) == ("1", "3")
    usage = dict(read_table(page, "Use of the cluster"))
    assert (usage["GPU hours"], usage["device"], usage["ranks"], usage["tokens per second, median"]) == ("0.67", "H100", "2 in 1 pod", "100")
    origin = dict(read_table(page, "Model and inputs"))
    assert (origin["final model"], origin["sha256 of the model's manifest"], origin["seed"]) == ("s3://models/team-a/bot/uid/model/a2", "abc", "42")
    assert origin["digest of the image"].startswith("not recorded: a pod does not know it")
    assert read_table(page, "Committed checkpoints")[1] == ["4", "2", "12 MB", "1.5", "yes", "feed"]
    assert read_table(page, "Files of the final model")[1] == ["adapter.safetensors", "2.05 kB", "beef"]
    assert read_table(page, "Stages after training")[1] == ["evaluating", "2", "2026-03-01 13:08:00"]


def test_the_time_of_the_pods_is_shown_by_part() -> None:
    first_time_use = TimeUse(loading=20, first_step=5, steps=40, saving=0.01)
    second_time_use = TimeUse(loading=20, first_step=5, steps=80, upload=10)
    killed_attempt = make_attempt_record(3, ended_at=None, exit_code=None, last_step=None, start_step=10)
    second_attempt = make_attempt_record(2, start_step=6, last_step=10, time_use=second_time_use)
    attempts = (make_attempt_record(1, last_step=8, time_use=first_time_use), second_attempt, killed_attempt)
    page = parse_sample_page(attempts=attempts, last_lines={"a3-00000000": make_training_line(20)})
    # Attempt 2 repeated two of the eight steps of attempt 1, so a quarter of the 40 seconds of these steps is lost.
    # Attempt 3 logged its last line after 20 s.
    assert read_table(page, "What the time was used for")[1:] == [
        ["loading the model or a checkpoint", "40.0 s", "22.2%"], ["first step of each pod", "10.0 s", "5.6%"],
        ["optimizer steps that count", "1 min 50 s", "61.1%"], ["optimizer steps that a later attempt repeated", "10.0 s", "5.6%"],
        ["upload of the final model", "10.0 s", "5.6%"],
        ["backoff, suspension, queue, preparation, scheduling, start of the container",
         "not measured: a pod does not know it; status.goodput of the FineTuneJob shows it", "–"],
    ]  # fmt: skip
    assert any("66.7% of the time of rank 0's containers" in paragraph.full_text for paragraph in page.find_all("p"))


def test_without_records_of_time_use_the_table_of_time_use_is_missing() -> None:
    assert "What the time was used for" not in parse_sample_page().full_text


def test_the_time_of_a_killed_attempt_counts_until_its_last_log_line() -> None:
    killed_attempt = make_attempt_record(1, ended_at=None, exit_code=None, last_step=None)
    page = parse_sample_page(attempts=(killed_attempt, make_attempt_record(2, start_step=2)), last_lines={"a1-00000000": make_training_line(3)})
    assert read_table(page, "Attempts of the run")[1] == [
        "1", "2026-03-01 12:00:00", "2026-03-01 12:00:03 or later", "0", "3 or later", "not measured: the pod was killed",
        "The pod was killed before it could write a reason.",
    ]  # fmt: skip
    assert dict(read_table(page, "Use of the cluster"))["running time of all attempts"] == "at least 10 min 3 s"
    assert read_tiles(page)["GPU hours"] == ("≥ 0.34", "on 2 GPUs")


@pytest.mark.parametrize(
    ("attempt_fields", "has_model", "badge", "sentence"),
    [
        ({"exit_code": 65, "code": "DatasetEmpty", "message": "no rows"}, False, "Failed", "exit code 65 (DatasetEmpty): no rows."),
        ({"exit_code": 80, "code": "GateFailed", "message": "too low"}, True, "Failed after training", "but a stage after training failed."),
        ({"exit_code": 75, "code": "StoppedSaved", "message": "stopped on request"}, False, "Stopped", "A later attempt can continue the run."),
        ({"exit_code": None}, False, "Not finished", "before the attempt ended"),
    ],
)  # fmt: skip
def test_the_page_of_an_incomplete_run_says_why(attempt_fields: dict[str, Any], has_model: bool, badge: str, sentence: str) -> None:
    report = make_sample_report(attempts=(make_attempt_record(1, **attempt_fields),))
    page = parse_page(render(report if has_model else replace(report, output=None)))
    assert [element.full_text for element in page.find_all("span") if "badge" in element.attributes.get("class", "")] == [badge]
    assert sentence in page.find_all("section", **{"aria-label": "Outcome"})[0].full_text


def test_the_page_of_a_run_without_records_gives_reasons() -> None:
    report = make_sample_report()
    html = render(RunReport(run=report.run, config_sha256="c0ffee", written_at=report.written_at))
    page = parse_page(html)
    assert len(page.find_all("figure")) == 6 and not page.find_all("svg")
    assert "not measured: no line of the training log is stored" in page.full_text
    assert "Not measured: no attempt has checked the data." in page.full_text
    assert "Not measured: the run has no final model." in page.full_text
    assert "None" not in page.full_text and "nan" not in html


def test_every_text_of_a_user_is_escaped() -> None:
    report = make_sample_report(
        {"dataset": {"train": "s3://data/rows.jsonl", "systemPrompt": ATTACK}},
        attempts=(make_attempt_record(1, exit_code=65, code="X", message=ATTACK, hint=ATTACK, notes=[ATTACK]),),
        predictions=(Prediction(None, ATTACK, ATTACK, ATTACK),), prediction_count=1, output=Output(uri=f"s3://{ATTACK}", evaluation={ATTACK: 1.0}),
        evaluation=EvaluationResult(gates=[GateResult(metric=ATTACK, passed=False, text=ATTACK)]), further_results={ATTACK: {ATTACK: ATTACK}},
    )  # fmt: skip
    html = render(report)
    page = parse_page(html)
    assert not page.find_all("script") and "<script" not in html.lower()
    assert page.full_text.count(ATTACK) >= 11


def test_the_page_loads_nothing_from_outside() -> None:
    html = render(make_sample_report())
    links = re.findall(r"""(?:href|src|srcset|action)\s*=\s*["']([^"']*)""", html) + re.findall(r"url\(([^)]*)\)|@import", html)
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    policy = parse_page(html).find_all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_no_secret_is_on_the_page() -> None:
    source = "https://user:pass123456@host.example/rows.jsonl?X-Amz-Signature=5ecre7"
    notes = ["the key is s3cr3t-<&>-value", "its table is a secret"]
    report = make_sample_report(
        {"placement": {"env": [{"name": "MODE", "value": "plain-text-value"}]}},
        attempts=(make_attempt_record(1, exit_code=70, code="X", message=f"cannot read {source} with hf_abcdefghijklmnopqrst", notes=notes),),
    )  # fmt: skip
    report = replace(report, run=_replace_train_source(report.run, source))
    html = render(report, ["s3cr3t-<&>-value", "table"])
    for secret in ("pass123456", "plain-text-value", "hf_abcdefghijklmnopqrst", "s3cr3t-"):
        assert secret not in html, secret
    assert "the key is (hidden)" in parse_page(html).full_text and "its (hidden) is a secret" in parse_page(html).full_text
    assert ["placement.env[].value", "(hidden)"] in read_table(parse_page(html), "Set by the user")
    assert ["dataset.train", "https://host.example/rows.jsonl"] in read_table(parse_page(html), "Set by the user")


def _replace_train_source(run: RunConfig, source: str) -> RunConfig:
    dataset = run.spec.dataset.model_copy(update={"train": source})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"dataset": dataset})})
