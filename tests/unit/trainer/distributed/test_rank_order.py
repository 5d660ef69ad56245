"""While local rank 0 of each node works, the other ranks wait for it without a time limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

torch = pytest.importorskip("torch")
from finetune_api.errors import PeerError  # noqa: E402 - torch first: without it there is nothing to test
from finetune_trainer.checkpoint.stop import SingleRankStore, TcpGangStore  # noqa: E402 - likewise
from finetune_trainer.distributed import rank_order  # noqa: E402 - likewise
from finetune_trainer.distributed.rank_order import RankPosition, local_rank_0_first, order_ranks  # noqa: E402 - likewise

RANKS_ON_TWO_NODES = [RankPosition(rank, rank % 2, 4, 2) for rank in range(4)]


class ManualClock:
    """A clock that moves only in `pause`. `pause_count` counts the calls of `pause`."""

    def __init__(self) -> None:
        self.time, self.pause_count = 0.0, 0

    def now(self) -> float:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds
        self.pause_count += 1


class HeartbeatStore(SingleRankStore):
    """A store to which rank 0 writes heartbeats while it works.

    Rank 0 writes its last heartbeat at the time `last_heartbeat`, and its work is done at the time `done_at`.
    """

    def __init__(self, clock: ManualClock, last_heartbeat: float, done_at: float) -> None:
        super().__init__()
        self.clock, self.last_heartbeat, self.done_at = clock, last_heartbeat, done_at

    def has(self, *keys: str) -> bool:
        self.set("alive-0", str(min(self.clock.time, self.last_heartbeat) // 30))
        if self.clock.time >= self.done_at:
            self.set("done-0", "1")
        return super().has(*keys)


def test_no_rank_leaves_the_block_before_the_working_ranks_of_all_nodes_are_done() -> None:
    store, events, entered_events = SingleRankStore(), [], {rank: threading.Event() for rank in range(4)}
    may_end_events = {0: threading.Event(), 2: threading.Event()}
    paused_events = [threading.Event() for _ in range(4)]

    def enter_block(position: RankPosition) -> None:
        def pause(_seconds: float) -> None:
            paused_events[position.rank].set()
            paused_events[position.rank].wait(0.001)

        with order_ranks(store, position, pause):
            events.append(f"{position.rank} begins")
            entered_events[position.rank].set()
            if position.local_rank == 0:
                assert may_end_events[position.rank].wait(30)
        events.append(f"{position.rank} leaves")

    threads = [threading.Thread(target=enter_block, args=(position,)) for position in RANKS_ON_TWO_NODES]
    for thread in threads:
        thread.start()
    assert entered_events[0].wait(30) and entered_events[2].wait(30) and paused_events[1].wait(30) and paused_events[3].wait(30)
    may_end_events[0].set()
    assert paused_events[0].wait(30), "rank 0 waits for the working rank of the other node"
    assert sorted(events) == ["0 begins", "2 begins"]
    may_end_events[2].set()
    for thread in threads:
        thread.join(30)
    assert sorted(events) == sorted(f"{rank} {event}" for rank in range(4) for event in ("begins", "leaves"))


def test_a_rank_waits_as_long_as_the_working_rank_sends_heartbeats() -> None:
    clock = ManualClock()
    with order_ranks(HeartbeatStore(clock, last_heartbeat=1e9, done_at=7200), RankPosition(1, 1, 2, 2), clock.pause, clock.now):
        assert clock.time == 7200


def test_a_working_rank_without_heartbeats_counts_as_lost() -> None:
    clock = ManualClock()
    store = HeartbeatStore(clock, last_heartbeat=300, done_at=1e9)
    with pytest.raises(PeerError) as caught, order_ranks(store, RankPosition(1, 1, 2, 2), clock.pause, clock.now):
        pytest.fail("the block must not run")
    assert caught.value.code == "PeerLost" and "rank 0" in caught.value.message
    assert 300 + rank_order.HEARTBEAT_TIMEOUT_SECONDS < clock.time <= 300 + rank_order.HEARTBEAT_TIMEOUT_SECONDS + 3 * rank_order.HEARTBEAT_SECONDS


def test_a_failure_of_a_working_rank_ends_the_wait_of_all_other_ranks() -> None:
    store, clock = SingleRankStore(), ManualClock()
    with pytest.raises(ValueError, match="bad row"), order_ranks(store, RankPosition(0, 0, 4, 2)):
        raise ValueError("bad row")
    for other_position in (RankPosition(1, 1, 4, 2), RankPosition(2, 0, 4, 2)):
        with pytest.raises(PeerError, match="rank 0 failed") as caught, order_ranks(store, other_position, clock.pause, clock.now):
            assert other_position.local_rank == 0, "rank 2 works itself before it waits"
        assert (caught.value.code, clock.pause_count) == ("PeerLost", 0)


def test_a_single_rank_uses_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with local_rank_0_first():
        pass
    assert RankPosition.from_env() == RankPosition(0, 0, 1, 1)


@contextmanager
def serve_agent_store() -> Iterator[int]:
    """Start the store that torchrun's agent would share with two ranks. Yields its port."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def run_rank(rank: int, port: int) -> None:
    """Run one of two ranks in a process group whose collectives fail after a millisecond. Rank 0 works until rank 1 waits."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    torch.distributed.init_process_group("gloo")
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(milliseconds=1))
    store = TcpGangStore("test")

    def pause(_seconds: float) -> None:
        store.set("rank 1 waits", "1")

    with local_rank_0_first(pause):
        if rank == 0:
            store.get_all(["rank 1 waits"], 120)
            store.set("result", "of rank 0")
        assert store.has("result") and store.get_all(["result"], 120) == ["of rank 0"]
    os._exit(0)  # do not wait for the connections of the process group


def test_a_rank_may_wait_longer_than_the_timeout_of_the_process_group() -> None:
    """If ranks waited in a collective, such as accelerate's `local_main_process_first`, the waiting rank would fail after this timeout."""
    with serve_agent_store() as port:
        torch.multiprocessing.spawn(run_rank, (port,), nprocs=2)
