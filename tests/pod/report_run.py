"""A run with a report: 200 steps, the first attempt is killed, the second one continues and evaluates the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget, TerminationMessage
from pod_harness import UID, Pod, merge, run_config, write_rows

STEPS = 200
KILLED_AFTER = 60
SECRET = "a-token-that-must-stay-secret"


def number_rows() -> list[dict[str, Any]]:
    """Questions about sums and products with their answers. One row has an e-mail address, and one row occurs twice."""
    questions = [(f"What is {a} + {b}?", f"It is {a + b}.") for a in range(12) for b in range(12)]
    questions += [(f"Multiply {a} by {b}.", f"The product is {a * b}.") for a in range(12) for b in range(6)]
    questions += [questions[0], ("Whom do I ask about sums?", "Write to sums@example.org.")]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} for question, answer in questions]


def run_with_report(folder: Path, model: Path, spec: dict[str, Any] | None = None) -> TerminationMessage:
    """Run both attempts, and return the termination message of the second one. The report is in `store_of(folder)`."""
    rows = write_rows(folder / "sums-and-products.jsonl", number_rows())
    base = {
        "model": {"source": f"file://{model}"}, "method": {"type": "full"},
        "dataset": {"train": f"file://{rows}", "split": {"train": 0.8, "validation": 0.1, "test": 0.1}, "checks": {"deduplicate": True, "piiScan": True}},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 8, "gradientAccumulationSteps": 1, "learningRate": 0.003},
        "checkpoint": {"steps": 20}, "tracking": {"loggingSteps": 1},
        "evaluation": {
            "steps": 10, "metrics": ["perplexity", "accuracy", "f1", "bleu", "rouge"], "comparison": {"generation": {"maxNewTokens": 16}}, "maxRows": 12,
        },
    }  # fmt: skip
    merged = merge(base, spec or {})
    target = StoreTarget(uri=f"file://{folder}/store/team-a/sums-bot/{UID}")
    with _pod(merged, target, folder, 1) as killed:
        killed.wait_committed(KILLED_AFTER)
        killed.kill()
    with _pod(merged, target, folder, 2) as resumed:
        assert resumed.end() == ExitCode.OK, resumed.text[-6000:]
    return resumed.termination_message()


def _pod(spec: dict[str, Any], target: StoreTarget, folder: Path, attempt: int) -> Pod:
    run = run_config(spec, target, attempt=attempt).model_copy(update={"name": "sums-bot", "namespace": "team-a"})
    return Pod(run, folder / f"pod-{attempt}", {"HF_TOKEN": SECRET})


def store_of(folder: Path) -> Path:
    """The run's folder in storage."""
    return folder / "store" / "team-a" / "sums-bot" / UID


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())
