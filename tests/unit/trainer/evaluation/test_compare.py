"""The results of the stage `comparing`, which follow from the spec and the stored measurements of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import InternalError
from finetune_api.pod import RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Stage
from finetune_trainer.evaluation.measurements import Measurements
from finetune_trainer.evaluation.values import MetricValue, mean_of_rows
from finetune_trainer.stages.compare import _read_trained_measurements, summarise
from finetune_trainer.stages.files import StageTask
from finetune_trainer.stages.plan import list_planned_stages

from tests.support.learning import make_run

TEST_SPLIT_SPEC: dict[str, Any] = {"dataset": {"split": {"test": 0.2}}}


def make_run_config(folder: Path, evaluation: dict[str, Any], **groups: Any) -> RunConfig:
    return make_run(folder, folder / "model", {"evaluation": evaluation, **TEST_SPLIT_SPEC, **groups})[0]


def make_rouge(scores: list[float | None]) -> dict[str, MetricValue]:
    return {"rougeL": mean_of_rows(scores, {})}


def test_each_metric_has_both_values_a_difference_and_an_interval_or_a_reason(tmp_path: Path) -> None:
    base = Measurements().with_values({
        **make_rouge([0.1, 0.2, 0.3, 0.1]), "letterF1": MetricValue(0.5), "answerAccuracy": MetricValue.missing("the judge is down"),
    })  # fmt: skip
    trained_measurements = Measurements().with_values({
        **make_rouge([0.2, 0.3, 0.5, 0.2]), "letterF1": MetricValue(0.75), "answerAccuracy": MetricValue(0.5, None, [0.5]), "bertscore": MetricValue(0.5),
    })  # fmt: skip
    result = summarise(make_run_config(tmp_path, {"metrics": ["rouge"], "comparison": {}}), base, trained_measurements)
    metrics = result.metrics or {}
    rouge = metrics["rougeL"]
    assert (rouge.value, rouge.base, rouge.difference, rouge.reason) == (0.3, 0.175, pytest.approx(0.125), None)
    assert rouge.low is not None and rouge.high is not None and 0 < rouge.low < 0.125 < rouge.high
    letter_f1 = metrics["letterF1"]
    assert (letter_f1.difference, letter_f1.low, letter_f1.reason) == (0.25, None, "no confidence interval: the metric has no scores of single rows")
    assert (metrics["answerAccuracy"].value, metrics["answerAccuracy"].reason) == (0.5, "of the base model: the judge is down")
    assert metrics["bertscore"].reason == "the base model was not measured"
    assert result.gates is None and result.comparison_uri is None


def test_a_single_row_has_a_difference_but_no_interval(tmp_path: Path) -> None:
    run = make_run_config(tmp_path, {"metrics": ["rouge"], "comparison": {}})
    metrics = summarise(run, Measurements().with_values(make_rouge([0.1])), Measurements().with_values(make_rouge([0.4]))).metrics or {}
    assert metrics["rougeL"].difference == pytest.approx(0.3) and metrics["rougeL"].low is None
    assert metrics["rougeL"].reason == "no confidence interval: a confidence interval needs at least 2 rows"


@pytest.mark.parametrize(("trained_score", "passes"), [(0.25, True), (0.05, False)])
def test_a_gate_for_rouge_compares_rouge_l_of_both_models(trained_score: float, passes: bool, tmp_path: Path) -> None:
    run = make_run_config(tmp_path, {"metrics": ["rouge"], "gates": [{"metric": "rouge", "notWorseThanBase": {"margin": 0.05}}]})
    base = Measurements().with_values(make_rouge([0.2, 0.21] * 10))
    trained_measurements = Measurements().with_values(make_rouge([trained_score, trained_score + 0.02] * 10))
    first_result = summarise(run, base, trained_measurements)
    assert [(gate.metric, gate.passed) for gate in first_result.gates or []] == [("rouge", passes)]
    assert summarise(run, base, trained_measurements) == first_result


def test_measurements_that_cannot_be_read_are_a_named_failure(tmp_path: Path) -> None:
    (tmp_path / "measurements.json").write_text("{")
    task = StageTask(stage=Stage.COMPARING, model=tmp_path, kind=OutputKind.ADAPTER, uri="file:///m", evaluated=tmp_path)
    with pytest.raises(InternalError, match="measurements.json cannot be read") as caught:
        _read_trained_measurements(task)
    assert caught.value.code == "MeasurementsUnreadable"


@pytest.mark.parametrize(
    ("evaluation", "planned_stages"),
    [
        ({"metrics": ["bleu"]}, [Stage.EVALUATING]),
        ({"metrics": ["bleu"], "comparison": {}}, [Stage.EVALUATING, Stage.COMPARING]),
        ({"comparison": {"promptsRef": {"name": "p", "key": "k"}}}, [Stage.EVALUATING, Stage.COMPARING]),
        ({"comparison": {"generation": {"maxNewTokens": 5}}}, []),
    ],
)
def test_a_comparison_adds_the_stages_that_it_needs(evaluation: dict[str, Any], planned_stages: list[Stage], tmp_path: Path) -> None:
    assert list_planned_stages(make_run_config(tmp_path, evaluation)) == planned_stages


EVALUATION_ONLY_PHASES = {"train": False, "from": "s3://bucket/job/model"}


@pytest.mark.parametrize(
    ("spec", "planned_stages"),
    [
        ({}, [Stage.VERIFYING]),
        ({"output": {"verify": False}}, []),
        ({"phases": EVALUATION_ONLY_PHASES}, []),
        ({"phases": EVALUATION_ONLY_PHASES, "output": {"verify": True}}, [Stage.VERIFYING]),
        ({"phases": EVALUATION_ONLY_PHASES, "output": {"mergeAdapter": True}}, [Stage.MERGING, Stage.VERIFYING]),
        ({"phases": EVALUATION_ONLY_PHASES, "output": {"mergeAdapter": True, "verify": False}}, [Stage.MERGING]),
        ({"phases": EVALUATION_ONLY_PHASES, "output": {"serving": ["vllm"]}}, [Stage.VERIFYING]),
        ({"phases": EVALUATION_ONLY_PHASES, "output": {"serving": ["vllm"], "verify": False}}, [Stage.VERIFYING]),
    ],
)
def test_a_job_without_training_verifies_if_the_spec_requests_it_or_an_artefact_is_written(
    spec: dict[str, Any], planned_stages: list[Stage], tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model")
    changed_spec = FineTuneJobSpec.model_validate(spec)
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"phases": changed_spec.phases, "output": changed_spec.output})})
    assert list_planned_stages(run) == planned_stages
