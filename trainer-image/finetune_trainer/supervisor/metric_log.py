"""Stores the values that an incarnation logs as the object `metrics/<incarnation>.jsonl`: one JSON object on each line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from finetune_api.names import Storage

from finetune_trainer.storage.base import Store, join_key
from finetune_trainer.supervisor.run_state import RunState, store_quietly


class MetricLog:
    """Collects the log lines of one incarnation and uploads them."""

    def __init__(self, run_state: RunState, incarnation: str, *, on_line: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        """`on_line` is called with the step and the values of each line."""
        self._state = run_state
        self._key = join_key(Storage.METRICS, f"{incarnation}.jsonl")
        self._on_line = on_line
        self._lines: list[str] = []

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Add the values that were logged at a step."""
        self._lines.append(json.dumps({"step": step, **values}))
        if self._on_line is not None:
            self._on_line(step, values)

    def upload(self, store: Store) -> None:
        """Upload all lines so far, and replace the stored object. A failure only adds a note, because a failed upload of metrics must not end a run."""
        if not self._lines:
            return
        store_quietly(self._state, "log lines", lambda: store.put(self._key, ("\n".join(self._lines) + "\n").encode()))
