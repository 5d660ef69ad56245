"""An event loop whose clock jumps to the next timer, so that minutes of virtual time pass without sleeping."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _VirtualSelector(selectors.SelectSelector):
    """A selector that does not wait for its timeout, but adds the timeout to the virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.virtual_seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("deadlock: no timer is set and no file is ready")
        if not ready:
            self.virtual_seconds += timeout or 0.0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with virtual time."""

    def __init__(self) -> None:
        self._selector = _VirtualSelector()
        super().__init__(self._selector)

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._selector.virtual_seconds


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run the coroutine in virtual time and return its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
