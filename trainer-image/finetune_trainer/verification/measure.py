"""Computes the log-probabilities or scores of rows with a model.

The trainer and the stage `verifying` use this same code for models that they have loaded in different ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from finetune_trainer.data.vision import VisionProcessor
from finetune_trainer.verification.reference import ReferenceRow, select_counted_values

POSITIONS_PER_CHUNK = 64
"""Number of positions whose log-probabilities are computed at once. A float32 copy of the logits of all positions would not fit into memory."""


def compute_row_values(
    model: Any, rows: Sequence[ReferenceRow], *, head: str, pad_token_id: int, device: Any, autocast: str | None = None,
    vision: VisionProcessor | None = None,
) -> list[list[float]]:  # fmt: skip
    """Return the values of each row: the log-probabilities (nats) of its counted tokens, or its score. Each row is a batch of its own.

    `vision`: the processor of a vision-language model.
    """
    options: Any = {"head": head, "pad_token_id": pad_token_id, "device": device, "autocast": autocast, "vision": vision}
    return [compute_batch_values(model, [row], **options)[0] for row in rows]


@torch.no_grad()
def compute_batch_values(
    model: Any, rows: Sequence[ReferenceRow], *, head: str, pad_token_id: int, device: Any, autocast: str | None = None,
    vision: VisionProcessor | None = None,
) -> list[list[float]]:  # fmt: skip
    """Return the same values as `compute_row_values`, computed in one batch of all rows with padding on the right."""
    max_row_length = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[pad_token_id] * (max_row_length - len(row.ids))] for row in rows], device=device)
    attention_mask = torch.tensor([[1] * len(row.ids) + [0] * (max_row_length - len(row.ids)) for row in rows], device=device)
    inputs = {} if vision is None else vision.make_image_inputs([row.decode_images() for row in rows], ids.tolist())
    with _create_autocast_context(device, autocast):
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **{name: value.to(device) for name, value in inputs.items()}).logits
    if head == "reward":
        return [[float(score)] for score in logits[:, 0].float()]
    logits = logits[:, -max_row_length:]  # Remove the virtual tokens of prompt tuning.
    values = [_compute_log_probabilities(logits[index, : len(row.ids) - 1], ids[index, 1 : len(row.ids)]) for index, row in enumerate(rows)]
    return select_counted_values(values, rows)


def _compute_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Return the log-probability of each token. `logits`: shape (positions, vocabulary size)."""
    values: list[float] = []
    for start in range(0, len(tokens), POSITIONS_PER_CHUNK):
        chunk = slice(start, start + POSITIONS_PER_CHUNK)
        scores, chunk_tokens = logits[chunk].float(), tokens[chunk].to(logits.device)
        values += (scores.gather(-1, chunk_tokens[:, None]).squeeze(-1) - scores.logsumexp(-1)).tolist()
    return values


def _create_autocast_context(device: Any, dtype: str | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))
