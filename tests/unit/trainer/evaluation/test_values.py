"""The value of a metric."""

from __future__ import annotations

import math

import pytest
from finetune_trainer.evaluation.values import MetricValue, mean_of_rows


def test_a_metric_without_a_value_must_have_a_reason() -> None:
    assert MetricValue.missing("no rows") == MetricValue(None, "no rows")
    with pytest.raises(ValueError, match="needs a reason"):
        MetricValue(None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        MetricValue(value)


def test_the_mean_leaves_out_rows_without_a_score() -> None:
    metric = mean_of_rows([0.25, None, 0.75], {1: "why"}, reason="1 of 3 rows is not scored")
    assert metric == MetricValue(0.5, "1 of 3 rows is not scored", [0.25, None, 0.75], {1: "why"})
    assert metric.scores == [0.25, 0.75]
