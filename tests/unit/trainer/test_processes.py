"""Ended and killed child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_trainer import processes


@pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
def test_a_thread_that_ends_while_children_are_reaped_is_skipped(monkeypatch: pytest.MonkeyPatch, error: type[OSError]) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    original, failed_reads = Path.read_text, []

    def read_text(path: Path) -> str:
        if path.name == "children" and not failed_reads:
            failed_reads.append(path)
            raise error(str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    processes.reap_children()
    assert len(failed_reads) == 1
    processes.reap_children()
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
