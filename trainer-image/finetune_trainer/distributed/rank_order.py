"""Lets local rank 0 of each node do long work, such as tokenising, before the other ranks. The work has no time limit.

The other ranks cannot wait in a collective, because a collective fails after the timeout of the process group (30 minutes), and large data sets
take longer. Instead, the other ranks poll keys in the TCPStore that all ranks share. The working ranks write heartbeats to this store, and report
that they are done or have failed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from finetune_api.errors import PeerError

from finetune_trainer.background import repeat_in_background
from finetune_trainer.checkpoint.stop import GangStore, TcpGangStore

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 30.0
"""Seconds between two heartbeats of a working rank, and between two checks by the other ranks."""
HEARTBEAT_TIMEOUT_SECONDS = 600.0
"""A working rank counts as lost after this time without a heartbeat."""
FAILED_KEY = "failed"
_use_numbers = itertools.count()
"""Counts the uses of `local_rank_0_first` in this process. All ranks use this context manager in the same order, so a use has the same number in all
ranks."""


@dataclass(frozen=True)
class RankPosition:
    """The numbers that torchrun gives a rank. All nodes have the same number of ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @staticmethod
    def from_env() -> RankPosition:
        """Return the position of this process. Without torchrun's environment variables, the process is a single rank."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        return RankPosition(rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))

    @property
    def working_ranks(self) -> range:
        """The global ranks of the processes that are local rank 0 of their node."""
        return range(0, self.world_size, self.local_world_size)


@contextmanager
def local_rank_0_first(pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Run the block in local rank 0 of each node, then in the other ranks. All ranks of all nodes must enter the context.

    In every rank, the context ends after the block has ended in local rank 0 of all nodes, so collectives may follow. `pause` sleeps for a
    number of seconds. Errors: PeerError PeerLost.
    """
    position, use_number = RankPosition.from_env(), next(_use_numbers)
    if position.world_size == 1:
        yield
        return
    with order_ranks(TcpGangStore(f"rank-order-{use_number}"), position, pause):
        yield


@contextmanager
def order_ranks(
    store: GangStore, position: RankPosition, pause: Callable[[float], None] = time.sleep, now: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Do the same as `local_rank_0_first`, for ranks that share `store`. `now` returns the monotonic time in seconds."""
    if position.local_rank != 0:
        _wait_for_working_ranks(store, position.working_ranks, pause, now)
        yield
        return
    try:
        with _send_heartbeats(store, position.rank):
            yield
    except BaseException:
        with contextlib.suppress(Exception):  # The error of the block is raised, even if the store fails too.
            store.set(FAILED_KEY, str(position.rank))
        raise
    store.set(_done_key(position.rank), "1")
    _wait_for_working_ranks(store, position.working_ranks, pause, now)


def _wait_for_working_ranks(store: GangStore, ranks: range, pause: Callable[[float], None], now: Callable[[], float]) -> None:
    """Wait until all working ranks are done. Errors: PeerError PeerLost if a rank has failed, or has sent no heartbeat for `HEARTBEAT_TIMEOUT_SECONDS`."""
    last_check_time, last_heartbeats = now(), dict.fromkeys(ranks, ("", now()))
    while not store.has(*map(_done_key, ranks)):
        if store.has(FAILED_KEY):
            failed_rank = store.get_all([FAILED_KEY], HEARTBEAT_SECONDS)[0]
            raise PeerError("PeerLost", f"rank {failed_rank} failed while this rank waited for it", hint="see the log of that rank")
        pause(POLL_SECONDS)
        if now() - last_check_time < HEARTBEAT_SECONDS:
            continue
        last_check_time = now()
        for rank in ranks:
            heartbeat_value = store.get_all([_heartbeat_key(rank)], HEARTBEAT_SECONDS)[0] if store.has(_heartbeat_key(rank)) else ""
            if heartbeat_value != last_heartbeats[rank][0]:
                last_heartbeats[rank] = (heartbeat_value, last_check_time)
            elif last_check_time - last_heartbeats[rank][1] > HEARTBEAT_TIMEOUT_SECONDS and not store.has(_done_key(rank)):
                raise PeerError(
                    "PeerLost", f"rank {rank}, which prepares data for other ranks, has sent no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:g} s",
                    hint="see the log of that rank",
                )


def _send_heartbeats(store: GangStore, rank: int) -> AbstractContextManager[None]:
    heartbeat_numbers = itertools.count(1)

    def write_heartbeat() -> None:
        with contextlib.suppress(Exception):  # If the store is gone, the pod of rank 0 has ended, and this rank will end too.
            store.set(_heartbeat_key(rank), str(next(heartbeat_numbers)))

    return repeat_in_background(write_heartbeat, HEARTBEAT_SECONDS, "rank-order")


def _done_key(rank: int) -> str:
    return f"done-{rank}"


def _heartbeat_key(rank: int) -> str:
    return f"alive-{rank}"
