"""Run a job of 200 steps that writes a report. The job's first attempt is killed; the second attempt resumes and evaluates the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode
from finetune_api.pod import ProgressReport, StoreTarget, TerminationMessage
from pod_harness import UID, Pod, merge, run_config, write_rows

STEPS = 200
KILLED_AFTER_STEP = 60
"""The first attempt is killed after the checkpoint of this step is committed."""
SECRET = "a-token-that-must-stay-secret"
"""The pods' HF_TOKEN, which the report must not show."""


def make_number_rows() -> list[dict[str, Any]]:
    """Make rows with questions about sums and products and their answers. One row has an e-mail address, and one row occurs twice."""
    questions = [(f"What is {a} + {b}?", f"It is {a + b}.") for a in range(12) for b in range(12)]
    questions += [(f"Multiply {a} by {b}.", f"The product is {a * b}.") for a in range(12) for b in range(6)]
    questions += [questions[0], ("Whom do I ask about sums?", "Write to sums@example.org.")]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in questions]


@dataclass(frozen=True)
class TwoAttempts:
    """What a test knows about the two attempts of the run. Each attempt is one local process, so it needs no time to get a node."""

    first_times: tuple[datetime, datetime]
    """The start and the end of the first attempt."""
    first_report: ProgressReport
    """The progress report that was read just before the first attempt was killed."""
    second_times: tuple[datetime, datetime]
    """The start and the end of the second attempt."""
    message: TerminationMessage
    """The termination message of the second attempt."""


def run_with_report(folder: Path, model: Path, spec: dict[str, Any] | None = None) -> TwoAttempts:
    """Run both attempts with their files below `folder`. `stored_run_folder(folder)` then contains the report."""
    rows = write_rows(folder / "sums-and-products.jsonl", make_number_rows())
    base_spec = {
        "model": {"source": f"file://{model}"}, "method": {"type": "full"},
        "dataset": {"train": f"file://{rows}", "split": {"train": 0.8, "validation": 0.1, "test": 0.1}, "checks": {"deduplicate": True, "piiScan": True}},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 8, "gradientAccumulationSteps": 1, "learningRate": 0.003},
        "checkpoint": {"steps": 20}, "tracking": {"loggingSteps": 1},
        "evaluation": {
            "steps": 10, "metrics": ["perplexity", "accuracy", "f1", "bleu", "rouge"], "comparison": {"generation": {"maxNewTokens": 16}}, "maxRows": 12,
        },
    }  # fmt: skip
    merged_spec = merge(base_spec, spec or {})
    target = StoreTarget(uri=f"file://{folder}/store/team-a/sums-bot/{UID}")
    first_start = datetime.now(UTC)
    with _make_pod(merged_spec, target, folder, 1) as killed_pod:
        killed_pod.wait_committed(KILLED_AFTER_STEP)
        killed_pod.wait_until(lambda: _has_uncommitted_steps(killed_pod))
        report = killed_pod.report()
        assert report is not None
        killed_pod.kill()
        first_end = datetime.now(UTC)
    second_start = datetime.now(UTC)
    with _make_pod(merged_spec, target, folder, 2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
        second_end = datetime.now(UTC)
    return TwoAttempts((first_start, first_end), report, (second_start, second_end), resumed_pod.termination_message())


def _has_uncommitted_steps(pod: Pod) -> bool:
    report = pod.report()
    return report is not None and bool(report.checkpoints) and report.checkpoints[0].step < (report.progress.step or 0)


def _make_pod(spec: dict[str, Any], target: StoreTarget, folder: Path, attempt: int) -> Pod:
    run = run_config(spec, target, attempt=attempt).model_copy(update={"name": "sums-bot", "namespace": "team-a"})
    return Pod(run, folder / f"pod-{attempt}", {"HF_TOKEN": SECRET})


def stored_run_folder(folder: Path) -> Path:
    """Return the folder in storage with the files of the run."""
    return folder / "store" / "team-a" / "sums-bot" / UID


def read_json(path: Path) -> Any:
    """Return the value that a JSON file contains."""
    return json.loads(path.read_text())
