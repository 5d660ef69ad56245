"""Makes all ranks of a gang stop at the same step, even if only one pod receives the signal.

A thread in each rank watches the local stop file and a key in the gang's TCPStore. When a stop is requested, each rank
publishes its current step; all ranks stop one step after the highest published step. A rank that has published its step waits at the end of this step
until the agreed step is known, so that no rank runs past the agreed step. Until a stop is requested, the training loop only compares two variables per step.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Iterable
from typing import Protocol

from finetune_trainer.channel import Channel

POLL_SECONDS = 0.1
PEER_STEPS_TIMEOUT_SECONDS = 60.0
"""Maximum wait for the steps of the other ranks, after a rank has published its own step."""
STOP_REQUEST_KEY = "request"


class TrainingStopped(BaseException):  # noqa: N818 - not an error: `except Exception` in a library must not swallow it
    """Raised to end training at this step because of a stop request."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class GangStore(Protocol):
    """A key-value store that all ranks of a gang share."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""

    def has(self, *keys: str) -> bool:
        """Whether all keys exist, without waiting."""

    def get_all(self, keys: Iterable[str], timeout_seconds: float) -> list[str]:
        """Return the values of all keys. If a key is missing, wait for it, and raise an error after `timeout_seconds`."""


class SingleRankStore:
    """The gang store of a run with a single rank."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def has(self, *keys: str) -> bool:
        return self._values.keys() >= set(keys)

    def get_all(self, keys: Iterable[str], timeout_seconds: float) -> list[str]:
        return [self._values[key] for key in keys]


class TcpGangStore:
    """The gang store of several ranks: a separate client of the TCPStore that torchelastic's agent hosts."""

    def __init__(self, name: str) -> None:
        from torch.distributed import PrefixStore, TCPStore

        timeout = datetime.timedelta(seconds=PEER_STEPS_TIMEOUT_SECONDS)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = PrefixStore(f"finetune/{name}", TCPStore(address, port, None, False, timeout))

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def has(self, *keys: str) -> bool:
        return bool(self._store.check(list(keys)))

    def get_all(self, keys: Iterable[str], timeout_seconds: float) -> list[str]:
        key_list = list(keys)
        self._store.wait(key_list, datetime.timedelta(seconds=timeout_seconds))
        return [self._store.get(key).decode() for key in key_list]


class StopAgreement:
    """Agrees with the other ranks on the step at which all stop. The Trainer calls `must_stop(step)` after every optimizer step."""

    def __init__(self, channel: Channel, gang_store: GangStore, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._channel, self._gang_store, self._poll_seconds = channel, gang_store, poll_seconds
        self._agreement_changed = threading.Condition()
        self._current_step = 0
        self._has_published_step = False
        self._stop_step: int | None = None
        self._failure: Exception | None = None
        self._must_end_watch = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)

    def start(self, step: int) -> None:
        """Start watching for stop requests. `step`: number of steps done so far."""
        self._current_step = step
        self._thread.start()

    def stop_watching(self) -> None:
        """Stop watching for stop requests."""
        self._must_end_watch.set()

    def must_stop(self, step: int) -> bool:
        """Whether to save and stop after this step.

        If this rank has published its step, wait until the agreed step is known. Raises the store's error if the other
        ranks do not publish their steps.
        """
        if not self._has_published_step and self._stop_step is None:
            self._current_step = step
            if not self._has_published_step:  # Check again, so that this thread sees the flag or the watching thread sees the new step.
                return False
        with self._agreement_changed:
            self._agreement_changed.wait_for(lambda: self._stop_step is not None or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            return self._stop_step is not None and step >= self._stop_step

    @property
    def stop_step(self) -> int | None:
        """The step at which all ranks stop; None until it is known."""
        return self._stop_step

    def _watch(self) -> None:
        try:
            while not self._must_end_watch.wait(self._poll_seconds):
                if self._channel.stop_deadline() is not None:
                    self._gang_store.set(STOP_REQUEST_KEY, str(self._channel.rank))
                elif not self._gang_store.has(STOP_REQUEST_KEY):
                    continue
                self._agree_on_step()
                return
        except Exception as error:  # The store cannot be reached, for example because rank 0's pod is lost. Wake the training thread.
            with self._agreement_changed:
                self._failure = error if self._has_published_step else None
                self._agreement_changed.notify_all()

    def _agree_on_step(self) -> None:
        # Set the flag before reading the step. If a step ends in between, this thread publishes that step, or the training thread waits in `must_stop`.
        self._has_published_step = True
        self._gang_store.set(f"at-{self._channel.rank}", str(self._current_step))
        keys = [f"at-{rank}" for rank in range(self._channel.world_size)]
        steps = [int(value) for value in self._gang_store.get_all(keys, PEER_STEPS_TIMEOUT_SECONDS)]
        with self._agreement_changed:
            self._stop_step = max(steps) + 1
            self._agreement_changed.notify_all()
        self._channel.send_message("stopping", step=self._stop_step)
