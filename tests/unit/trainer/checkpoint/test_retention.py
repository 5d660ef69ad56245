"""Which checkpoints are removed: examples, and rules that hold for every list of checkpoints."""

from __future__ import annotations

import pytest
from finetune_trainer.checkpoint.retention import RetentionCandidate, choose_steps_to_remove, find_best_step
from hypothesis import given
from hypothesis import strategies as st


def make_candidates(*steps: int, is_healthy: bool = True, losses: dict[int, float] | None = None) -> list[RetentionCandidate]:
    return [RetentionCandidate(step, is_healthy, (losses or {}).get(step)) for step in steps]


@pytest.mark.parametrize(
    ("checkpoints", "keep_count", "options", "removed_steps"),
    [
        (make_candidates(1, 2, 3, 4, 5), 0, {}, []),
        (make_candidates(1, 2, 3, 4, 5), 3, {}, [1, 2]),
        (make_candidates(1, 2, 3, 4, 5), 1, {}, [1, 2, 3]),
        (make_candidates(1, 2, 3, 4, 5), 1, {"is_run_finished": True}, [1, 2, 3, 4]),
        (make_candidates(1, 2, 3, 4, 5), 2, {"pinned_steps": (1, 9)}, [2, 3]),
        (make_candidates(1, 2, 3, 4, losses={1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0}), 1, {"is_run_finished": True}, [1, 3]),
        ([*make_candidates(1, 2), *make_candidates(3, 4, 5, is_healthy=False)], 1, {}, [3, 4]),
        ([], 3, {}, []),
    ],
)
def test_the_expected_steps_of_each_example_are_removed(
    checkpoints: list[RetentionCandidate], keep_count: int, options: dict[str, object], removed_steps: list[int]
) -> None:
    assert choose_steps_to_remove(checkpoints, keep_count, **options) == removed_steps  # type: ignore[arg-type] # options of the examples


CHECKPOINT_LISTS = st.lists(
    st.tuples(st.integers(1, 1000), st.booleans(), st.none() | st.floats(0, 10)),
    unique_by=lambda fields: fields[0],
    max_size=12,
).map(lambda field_tuples: [RetentionCandidate(*fields) for fields in field_tuples])


@given(CHECKPOINT_LISTS, st.integers(1, 5), st.sets(st.integers(1, 1000)), st.booleans())
def test_kept_steps_are_never_removed(checkpoints: list[RetentionCandidate], keep_count: int, pinned_steps: set[int], is_run_finished: bool) -> None:
    removed_steps = set(choose_steps_to_remove(checkpoints, keep_count, pinned_steps=pinned_steps, is_run_finished=is_run_finished))
    newest_steps = sorted((checkpoint.step for checkpoint in checkpoints), reverse=True)
    healthy_steps = sorted((checkpoint.step for checkpoint in checkpoints if checkpoint.is_healthy), reverse=True)
    assert not removed_steps & set(newest_steps[:keep_count])
    assert not removed_steps & pinned_steps
    assert find_best_step(checkpoints) not in removed_steps
    if not is_run_finished:
        assert not removed_steps & set(healthy_steps[:2])
    assert removed_steps <= set(newest_steps)
