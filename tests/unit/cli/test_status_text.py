"""The output of `finetune status`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_cli.status_text import (
    describe_job,
    draw_progress_bar,
    draw_sparkline,
    format_age,
    format_bytes,
    format_stage_line,
)


def test_bars_sparklines_stages_sizes_and_ages_are_formatted() -> None:
    assert draw_progress_bar(50) == "█" * 15 + "░" * 15
    assert (draw_progress_bar(None), draw_progress_bar(100)) == ("░" * 30, "█" * 30)
    assert draw_sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert (draw_sparkline([]), draw_sparkline([1.0, 1.0])) == ("", "▁▁")
    assert format_stage_line("Running").startswith("● accepted  ● started  ◐ trained  ○ evaluated")
    assert format_stage_line("Succeeded").endswith("● done")
    assert (format_bytes(None), format_bytes(10), format_bytes(2048), format_bytes(3 * 1024**3)) == (
        "-",
        "10 B",
        "2.0 KiB",
        "3.0 GiB",
    )
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert [format_age(datetime(2026, 1, d, h, m, tzinfo=UTC), now) for d, h, m in ((1, 23, 59), (1, 23, 0), (1, 12, 0))] == [
        "60s",
        "60m",
        "12h",
    ]


@pytest.mark.parametrize(
    ("status", "lines"),
    [
        ({"phase": "Pending", "reason": "Unschedulable"}, ["team/bot  Pending (Unschedulable)"]),
        ({"phase": "Running"}, ["team/bot  Running"]),
        (
            {"phase": "Running", "plan": {"choices": [
                {"field": "resources.nodePool", "value": "h100", "reason": "r"}, {"field": "training.batchSizePerDevice", "value": 16, "reason": "r"},
            ]}},
            ["by plan   nodePool h100, batchSizePerDevice 16"],
        ),
        ({"phase": "Running", "latestCheckpointStep": 400}, ["saved     step 400"]),
        ({"phase": "Running", "resolved": {"modelName": "tiny"}}, ["model     tiny (s3://models/tiny)"]),
        (
            {"phase": "Succeeded",
             "output": {"uri": "s3://m", "kind": "adapter", "publishedUri": "s3://c", "mergedUri": "s3://g", "hubUri": "https://h", "adoptedUid": "u0"},
             "evaluation": {"rows": 8, "metrics": {"bleu": {"value": 12.34567}, "bertscore": {"reason": "no model"}}}},
            ["output    s3://m (adapter)", "merged    s3://g", "copy      s3://c", "hub       https://h",
             "adopted   from the earlier job with uid u0, without training",
             "evaluation on 8 rows", f"  {'bleu':<22} 12.35", f"  {'bertscore':<22} - (no model)"],
        ),
        (
            {"phase": "Succeeded", "evaluation": {"benchmarks": [
                {"name": "lm-eval", "task": "hellaswag", "metric": "acc", "value": 0.56, "stderr": 0.005, "base": 0.58},
                {"name": "lm-eval", "task": "sums", "metric": "bypass", "reason": "no number"},
            ]}},
            ["benchmarks", f"  {'hellaswag acc':<30} 0.56 ± 0.005  (base model 0.58)", f"  {'sums bypass':<30} - (no number)"],
        ),
        (
            {"phase": "Failed", "evaluation": {
                "metrics": {"loss": {"value": 1.5, "base": 2.0, "difference": -0.5, "low": -0.625, "high": -0.375}},
                "gates": [{"metric": "loss", "passed": True}, {"metric": "bleu", "passed": False, "text": "bleu is 3, and the gate requires at least 5"}]}},
            ["evaluation", f"  {'loss':<22} 1.5  base 2, difference -0.5 (-0.625 to -0.375)", "gate      passed: loss",
             "gate      FAILED: bleu is 3, and the gate requires at least 5"],
        ),
    ],
)
def test_status_shows_reason_checkpoint_step_and_model_name(status: dict[str, Any], lines: list[str]) -> None:
    job = {"metadata": {"name": "bot", "namespace": "team"}, "spec": {"model": {"source": "s3://models/tiny"}}}
    output_lines = describe_job({**job, "status": status}).splitlines()
    assert [line for line in lines if line not in output_lines] == []


def test_adaptations_are_shown_with_their_explanation() -> None:
    first_adaptation = {"time": "2026-03-01T12:00:00Z", "reason": "OutOfMemory", "change": "batchSizePerDevice 4 -> 2"}
    second_adaptation = first_adaptation | {"change": "batchSizePerDevice 2 -> 1", "explanation": "the attempt needed 3 GB"}
    lines = describe_job({"metadata": {"name": "bot"}, "status": {"adaptations": [first_adaptation, second_adaptation]}}).splitlines()
    assert [line for line in lines if "batchSize" in line or "needed" in line] == [
        "adapted   batchSizePerDevice 4 -> 2 (OutOfMemory)", "adapted   batchSizePerDevice 2 -> 1 (OutOfMemory)", "          the attempt needed 3 GB",
    ]  # fmt: skip


def test_cost_and_largest_parts_of_the_time_are_shown() -> None:
    goodput = {"wallSeconds": 1000, "parts": {"steps": 800, "loading": 150, "podStart": 45, "other": 5}}
    cost = {"gpuHours": 2.5, "amount": 7.5, "display": "7.50 EUR"}
    output_lines = describe_job({"metadata": {"name": "bot"}, "status": {"goodput": goodput, "cost": cost}}).splitlines()
    assert "time      1,000 s: steps 80%, loading 15%, podStart 4%" in output_lines
    assert "cost      7.50 EUR for 2.5 GPU-hours" in output_lines
