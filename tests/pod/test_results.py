"""A pod copies all results below `output.dir`. `test_stages.py` tests the flat layout, and `test_resumed_run.py` tests the metric files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.tiny import make_tiny_model


@pytest.mark.faults
def test_all_results_are_copied_below_the_output_folder(tmp_path: Path) -> None:
    model, rows = make_tiny_model(tmp_path / "tiny"), write_rows(tmp_path / "rows.jsonl")
    spec = {
        "model": {"source": f"file://{model}"},
        "dataset": {"train": f"file://{rows}", "split": {"train": 0.5, "validation": 0.25, "test": 0.25}},
        "training": {"maxSteps": 12, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1}, "checkpoint": {"steps": 3},
        "tracking": {"loggingSteps": 1}, "evaluation": {"steps": 3, "metrics": ["perplexity"]}, "output": {"dir": "results", "project": "sums"},
    }  # fmt: skip
    root = f"file://{tmp_path}/store/"
    run = run_config(spec, StoreTarget(uri=f"{root}team/job/{UID}"))
    with Pod(run.model_copy(update={"publish": f"{root}{run.spec.output.dir}"}), tmp_path / "pod") as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    output = pod.termination_message().output
    assert output is not None and output.published_uri is not None and output.uri is not None
    assert re.fullmatch(r"results/sums/tiny/\d{8}_\d{6}", output.published_uri.removeprefix(root))
    copy_folder, model_folder = (Path(uri.removeprefix("file://")) for uri in (output.published_uri, output.uri))
    for path in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (copy_folder / "model" / path).read_bytes() == (model_folder / path).read_bytes()
    names = {path.name for path in copy_folder.iterdir() if path.is_file()}
    metric_files = {"step_metrics.json", "epoch_metrics.json", "final_metrics.json", "training_metrics.json", "performance_summary.json", "log.jsonl"}
    assert metric_files | {"report.html", "test_split.jsonl", "evaluation_results.json", "evaluation_summary.json"} <= names
    assert json.loads((copy_folder / "evaluation_results.json").read_text())["perplexity"] > 1
