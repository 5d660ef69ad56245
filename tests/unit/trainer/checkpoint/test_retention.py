"""The retention of checkpoints: examples, and rules that hold for every list of checkpoints."""

from __future__ import annotations

import pytest
from finetune_trainer.checkpoint.retention import RetentionCandidate, best_step, steps_to_remove
from hypothesis import given
from hypothesis import strategies as st


def kept_checkpoints(*steps: int, healthy: bool = True, losses: dict[int, float] | None = None) -> list[RetentionCandidate]:
    return [RetentionCandidate(step, healthy, (losses or {}).get(step)) for step in steps]


@pytest.mark.parametrize(
    ("checkpoints", "keep", "options", "removed"),
    [
        (kept_checkpoints(1, 2, 3, 4, 5), 0, {}, []),
        (kept_checkpoints(1, 2, 3, 4, 5), 3, {}, [1, 2]),
        (kept_checkpoints(1, 2, 3, 4, 5), 1, {}, [1, 2, 3]),
        (kept_checkpoints(1, 2, 3, 4, 5), 1, {"is_run_finished": True}, [1, 2, 3, 4]),
        (kept_checkpoints(1, 2, 3, 4, 5), 2, {"pinned_steps": (1, 9)}, [2, 3]),
        (kept_checkpoints(1, 2, 3, 4, losses={1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}), 1, {"is_run_finished": True}, [1, 3]),
        ([*kept_checkpoints(1, 2), *kept_checkpoints(3, 4, 5, healthy=False)], 1, {}, [3, 4]),
        ([], 3, {}, []),
    ],
)
def test_steps_to_remove_of_examples_are_as_expected(checkpoints: list[RetentionCandidate], keep: int, options: dict[str, object], removed: list[int]) -> None:
    assert steps_to_remove(checkpoints, keep, **options) == removed  # type: ignore[arg-type] # options of the examples


CHECKPOINT_LISTS = st.lists(
    st.tuples(st.integers(1, 1000), st.booleans(), st.none() | st.floats(0, 10)),
    unique_by=lambda one: one[0],
    max_size=12,
).map(lambda found: [RetentionCandidate(*one) for one in found])


@given(CHECKPOINT_LISTS, st.integers(1, 5), st.sets(st.integers(1, 1000)), st.booleans())
def test_kept_steps_are_never_removed(checkpoints: list[RetentionCandidate], keep: int, pinned: set[int], finished: bool) -> None:
    removed = set(steps_to_remove(checkpoints, keep, pinned_steps=pinned, is_run_finished=finished))
    newest = sorted((one.step for one in checkpoints), reverse=True)
    healthy = sorted((one.step for one in checkpoints if one.healthy), reverse=True)
    assert not removed & set(newest[:keep])
    assert not removed & pinned
    assert best_step(checkpoints) not in removed
    if not finished:
        assert not removed & set(healthy[:2])
    assert removed <= set(newest)
