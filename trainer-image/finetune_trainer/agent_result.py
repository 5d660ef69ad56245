"""`<work>/agent.json`: the exit codes of failed ranks. The agent writes this file, and the supervisor reads it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from finetune_trainer.files import replace_file

RESULT_FILE = "agent.json"
FailuresByRank = dict[str, dict[str, int]]
"""Exit code, pid and time (seconds since 1970) of each failed rank, by rank."""


def write_failures(work_folder: Path, failures: FailuresByRank) -> None:
    """Write `agent.json` atomically. Empty `failures` mean that all ranks ended with exit code 0."""
    with replace_file(work_folder / RESULT_FILE) as partial_file:
        partial_file.write_text(json.dumps({"failures": failures, "time": time.time()}))


def read_exit_codes(work_folder: Path) -> dict[int, int] | None:
    """Return the exit codes of the ranks that failed, by rank; None if the agent ended before it wrote the file."""
    try:
        agent_result = json.loads((work_folder / RESULT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return {int(rank): int(failure["exitCode"]) for rank, failure in agent_result["failures"].items()}
