"""Fixtures for tests that train in this process: the libraries as a job needs them, and the tiny models, each made once.

A conftest takes them by importing their names.
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
    """bitsandbytes before anything hides it: jobs with and without it run in this one process."""
    import bitsandbytes  # noqa: F401  imported so that it counts as in use
    import torch

    torch.set_num_threads(1)
    yield
    gc.unfreeze()  # at its end a process cleans up after the libraries


@pytest.fixture(scope="session")
def raw_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights."""
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "raw")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other random weights under the same vocabulary."""
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=7)


@pytest.fixture(scope="session")
def taught_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know the words of the ten rows, with other answers: adapters have something to build on."""
    from tests.support.learning import TEN
    from tests.support.tiny import make_tiny_model, teach

    path = make_tiny_model(tmp_path_factory.mktemp("models") / "taught")
    answers = [row["messages"][1]["content"] for row in TEN]
    others = [
        [row["messages"][0], {"role": "assistant", "content": answers[(place + shift) % len(answers)]}]
        for shift in (3, 5, 7)
        for place, row in enumerate(TEN)
    ]
    return teach(path, others, steps=120)
