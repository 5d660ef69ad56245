"""The estimated size of a checkpoint, and whether its copies fit into the pod's memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer import host_memory  # noqa: E402 - torch first: without it there is nothing to test
from finetune_trainer.checkpoint import space  # noqa: E402 - likewise


def make_trainer_after_a_step(*, writes_weights: bool = True, **flags: bool) -> Any:
    """Return a trainer with 6 parameters of 4 bytes in two tensors.

    Its optimizer holds two moments of each parameter, and a 4-byte step count of each tensor.
    """
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    args = SimpleNamespace(should_save=writes_weights, device=torch.device("cpu"))
    return SimpleNamespace(args=args, model=model, optimizer=optimizer, **({"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | flags))


def test_the_size_of_the_first_checkpoint_is_estimated() -> None:
    """A checkpoint contains each trained weight and two moments of the optimizer for this weight."""
    model = torch.nn.Linear(2, 2)
    assert space.estimate_first_checkpoint_bytes(model) == 6 * (4 + 8)
    model.bias.requires_grad = False
    assert space.estimate_first_checkpoint_bytes(model) == 6 * 4 + 4 * 8, "without an adapter, all weights are written"
    model.peft_config = {}
    assert space.estimate_first_checkpoint_bytes(model) == 4 * (4 + 8)


@pytest.mark.parametrize(
    ("trainer_options", "expected_bytes"),
    [
        ({}, 24 + 48 + 8), ({"writes_weights": False}, 0), ({"is_fsdp_enabled": True}, 2 * (24 + 48 + 8)),
        ({"is_fsdp_enabled": True, "writes_weights": False}, 2 * (48 + 8)), ({"is_deepspeed_enabled": True}, 2 * (24 + 48 + 8)),
    ],
)  # fmt: skip
def test_copies_contain_the_optimizer_state_and_on_one_rank_the_weights(trainer_options: dict[str, bool], expected_bytes: int) -> None:
    assert space.count_copied_bytes(make_trainer_after_a_step(**trainer_options)) == expected_bytes


@pytest.mark.parametrize(("free_bytes", "fits"), [(80, True), (79, False)])
def test_copies_must_leave_a_reserve_of_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: int, fits: bool) -> None:
    monkeypatch.setattr(space, "available_bytes", lambda: free_bytes + space.MEMORY_RESERVE_BYTES)
    copy_space = space.measure_copy_space(make_trainer_after_a_step(), 1)
    assert (copy_space.needed_bytes, copy_space.available_bytes, copy_space.fits) == (80, free_bytes + space.MEMORY_RESERVE_BYTES, fits)


@pytest.mark.parametrize(
    ("needed_bytes", "available_bytes", "expected_space"),
    [([1, 2, 3, 4], [50, 40, 30, 20], (7, 20)), ([30, 2, 3, 4], [50, 40, 60, 70], (32, 40))],
)  # fmt: skip
def test_the_pod_with_the_least_free_memory_decides(
    monkeypatch: pytest.MonkeyPatch, needed_bytes: list[int], available_bytes: list[int], expected_space: tuple[int, int]
) -> None:
    """Four ranks in two pods. The ranks of a pod share its memory."""
    gathered_numbers = iter([needed_bytes, available_bytes])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(space, "_gather_from_ranks", lambda *_: next(gathered_numbers))
    copy_space = space.measure_copy_space(make_trainer_after_a_step(), 4)
    assert (copy_space.needed_bytes, copy_space.available_bytes) == expected_space


@pytest.mark.parametrize(
    ("text_by_file", "expected_bytes"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 600\ninactive_file 50"}, 350),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 50"}, None),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "900", "memory/memory.stat": "total_inactive_file 10"}, 110),
        ({}, None),
    ],
)  # fmt: skip
def test_available_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_by_file: dict[str, str], expected_bytes: int | None
) -> None:
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    for name, text in text_by_file.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert host_memory.available_bytes(tmp_path) == (10**6 if expected_bytes is None else expected_bytes)
