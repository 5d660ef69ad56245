"""Fixtures for tests that train in their own process: imported libraries, and tiny models that are created once per session.

A conftest imports the fixtures that its tests use.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def libraries() -> Iterator[None]:
    """Import bitsandbytes before any test runs, because some tests hide it from later imports, and other tests in the same process need this package."""
    import bitsandbytes  # noqa: F401  an imported package cannot be hidden
    import torch

    torch.set_num_threads(1)
    yield
    gc.unfreeze()  # at its exit, Python would not clean up objects that are still frozen


@pytest.fixture(scope="session")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with random weights."""
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "raw")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that differs from `raw_model` only in its random weights."""
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=7)


@pytest.fixture(scope="session")
def taught_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that was trained on the questions of TEN_ROWS with wrong answers."""
    from tests.support.learning import TEN_ROWS
    from tests.support.tiny import make_tiny_model, train_model

    path = make_tiny_model(tmp_path_factory.mktemp("models") / "taught")
    answers = [row["messages"][1]["content"] for row in TEN_ROWS]
    wrong_conversations = [
        [row["messages"][0], {"role": "assistant", "content": answers[(index + shift) % len(answers)]}]
        for shift in (3, 5, 7)
        for index, row in enumerate(TEN_ROWS)
    ]
    return train_model(path, wrong_conversations, steps=120)
