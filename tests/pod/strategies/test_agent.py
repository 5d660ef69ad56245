"""The agent starts a single rank directly and several ranks with torchelastic. In both cases, the supervisor learns how each rank ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import StoreTarget
from pod_harness import PYTHONPATH, UID, Pod, run_config

from tests.support.slices import quick_slice

POD_TESTS_FOLDER = Path(__file__).parents[1]


def make_toy_pod(folder: Path, model: Path, rows: Path, script: dict[str, Any], ranks: int) -> Pod:
    """Create a pod whose ranks follow a script of `toy_rank`."""
    spec = {
        "model": {"source": f"file://{model}"},
        "dataset": {"train": f"file://{rows}", "format": "messages"},
        "checkpoint": {"steps": 5},
    }
    run = run_config(spec, StoreTarget(uri=f"file://{folder}/root/team/job/{UID}"), processes=ranks)
    python_path = os.pathsep.join([PYTHONPATH, str(POD_TESTS_FOLDER)])
    return Pod(
        run,
        folder / "pod",
        {"PYTHONPATH": python_path, "FINETUNE_TRAINER_MODULE": "toy_rank", "TOY_SCRIPT": json.dumps(script)},
    )


@pytest.mark.parametrize(("ranks", "loads_torch"), [(1, False), (2, True)])
def test_the_agent_loads_torch_only_for_several_ranks(
    ranks: int, loads_torch: bool, model: Path, rows: Path, tmp_path: Path
) -> None:
    with make_toy_pod(tmp_path, model, rows, {"steps": 100_000}, ranks) as pod:
        pod.wait_step(1)
        (agent_pid,) = pod.pids("agent")
        assert len(pod.pids("train")) == ranks
        assert ("libtorch" in Path(f"/proc/{agent_pid}/maps").read_text()) is loads_torch
        pod.kill()


RANK_FAILURES = [(ranks, event, code, name) for ranks in (1, 2) for event, code, name in (("exit", 70, "RankCrashed"), ("die", 74, "RankKilled"))]
QUICK_RANK_FAILURES = [(1, "die", 74, "RankKilled"), (2, "exit", 70, "RankCrashed")]


@pytest.mark.parametrize(("ranks", "event", "code", "name"), quick_slice(RANK_FAILURES, QUICK_RANK_FAILURES))
def test_a_rank_that_ends_without_a_report_is_named_in_the_termination_message(
    ranks: int, event: str, code: int, name: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    # Toy ranks do not wait for each other. With 100,000 steps, the healthy rank is still running when the other rank fails.
    with make_toy_pod(tmp_path, model, rows, {"steps": 100_000, "at": {f"{ranks - 1}:7": event}}, ranks) as pod:
        assert pod.end() == code, pod.text[-3000:]
        message = pod.termination_message()
    assert (message.exit_code, message.code, message.rank) == (code, name, ranks - 1)


def test_fsdp_trains_with_a_single_rank(model: Path, rows: Path, tmp_path: Path) -> None:
    spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"}, "distributed": {"strategy": "fsdp"},
        "training": {"maxSteps": 2, "batchSizePerDevice": 2}, "checkpoint": {"strategy": "no"},
    }  # fmt: skip
    run = run_config(spec, StoreTarget(uri=f"file://{tmp_path}/store/team/job/{UID}"))
    with Pod(run, tmp_path / "pod") as pod:
        assert pod.end() == 0, pod.text[-3000:]
        resolved_config = pod.termination_message().resolved
    assert resolved_config is not None and resolved_config.strategy == "fsdp"
