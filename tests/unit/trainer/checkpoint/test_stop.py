"""All ranks stop at the same step. Any rank may receive the stop request, and the ranks may have different speeds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from finetune_trainer.channel import STOP_FILE, Channel
from finetune_trainer.checkpoint.stop import StopAgreement


class ThreadStore:
    """A gang store in memory. The ranks are threads of this process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()
        self.is_broken = False

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def has(self, key: str) -> bool:
        return key in self._values

    def get_all(self, keys: Iterable[str], timeout_seconds: float) -> list[str]:
        key_list = list(keys)
        with self._changed:
            is_complete = self._changed.wait_for(
                lambda: self.is_broken or all(key in self._values for key in key_list), timeout_seconds
            )
            if self.is_broken or not is_complete:
                raise ConnectionError("the store is gone")
            return [self._values[key] for key in key_list]


@pytest.mark.parametrize("seed", range(60))
def test_all_ranks_stop_at_the_same_step(tmp_path: Path, seed: int) -> None:
    """The seed selects the number and speed of the ranks, and whether they synchronise at every step."""
    random_generator = random.Random(seed)
    rank_count, signalled_rank, is_synchronised = random_generator.choice([1, 2, 3, 5]), random_generator.randrange(5), random_generator.random() < 0.5
    barrier = threading.Barrier(rank_count)
    shared_store, stop_steps = ThreadStore(), [0] * rank_count
    pause_seconds = [random_generator.uniform(0, 0.002) for _ in range(rank_count)]

    def train(rank: int) -> None:
        work_folder = tmp_path / str(rank)
        work_folder.mkdir()
        agreement = StopAgreement(Channel.create_recording(work_folder, rank=rank, world_size=rank_count), shared_store, poll_seconds=0.003)
        agreement.start(0)
        step = 0
        while True:
            if is_synchronised:
                barrier.wait(20)
            time.sleep(pause_seconds[rank])
            step += 1
            if agreement.must_stop(step):
                break
            if rank == signalled_rank % rank_count and step == 1 + seed % 7:
                (work_folder / STOP_FILE).write_text("")
        stop_steps[rank] = step

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(rank_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(stop_steps)) == 1 and stop_steps[0] > 1 + seed % 7


def test_a_lost_store_ends_the_wait_for_the_agreed_step(tmp_path: Path) -> None:
    shared_store = ThreadStore()
    agreement = StopAgreement(Channel.create_recording(tmp_path, rank=0, world_size=2), shared_store, poll_seconds=0.003)
    agreement.start(0)
    (tmp_path / STOP_FILE).write_text("")

    def break_store() -> None:
        with shared_store._changed:
            shared_store._changed.wait_for(lambda: shared_store.has("at-0"), 20)
            shared_store.is_broken = True
            shared_store._changed.notify_all()

    breaking_thread = threading.Thread(target=break_store)
    breaking_thread.start()
    with pytest.raises(ConnectionError):
        for step in range(1, 10**9):
            assert not agreement.must_stop(step)
    breaking_thread.join()
