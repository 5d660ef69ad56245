"""Generates answers to questions in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune_api.rules import value_or_default
from finetune_api.spec.results import Generation

GENERATION_FIELDS = {
    "max_new_tokens": "max_new_tokens", "do_sample": "do_sample", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
    "min_p": "min_p", "repetition_penalty": "repetition_penalty",
}  # fmt: skip
"""The fields of `Generation` in the spec, with the corresponding options of transformers."""
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")
"""Options that have an effect only if tokens are sampled."""


def build_generation_options(spec: Generation | None) -> dict[str, Any]:
    """Return the options of transformers' `generate`. Fields that the spec does not set have the defaults of the API."""
    generation = spec or Generation()
    options = {name: value_or_default(generation, field) for field, name in GENERATION_FIELDS.items()}
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING_FIELDS}
    return options


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, options: dict[str, Any], end_ids: Sequence[int], batch_size: int, seed: int,
    on_progress: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Return the answer to each prompt, without special tokens. `prompts`: token ids of each prompt. `end_ids`: tokens that end an answer.

    Prompts of similar length share a batch. If a batch does not fit into memory, the batch size is halved. `on_progress` receives the number of
    answers generated so far.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    answer_by_index: dict[int, str] = {}
    remaining_indices = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    while remaining_indices:
        batch_indices = remaining_indices[:batch_size]
        try:
            batch_answers = _generate_batch(model, tokenizer, [prompts[index] for index in batch_indices], options, end_ids)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = (batch_size + 1) // 2
            torch.cuda.empty_cache()
            continue
        answer_by_index |= dict(zip(batch_indices, batch_answers, strict=True))
        remaining_indices = remaining_indices[len(batch_indices) :]
        on_progress(len(answer_by_index))
    return [answer_by_index[index] for index in range(len(prompts))]


def _generate_batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], options: dict[str, Any], end_ids: Sequence[int]) -> list[str]:
    import torch

    max_prompt_length = max(map(len, prompts))
    padded_ids = [[tokenizer.pad_token_id] * (max_prompt_length - len(prompt)) + list(prompt) for prompt in prompts]
    attention_mask = [[0] * (max_prompt_length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(padded_ids, device=device), attention_mask=torch.tensor(attention_mask, device=device),
            eos_token_id=list(end_ids) or None, pad_token_id=tokenizer.pad_token_id, **options,
        )  # fmt: skip
    new_tokens = output[:, max_prompt_length:].tolist()
    return [tokenizer.decode(_cut_at_end_token(tokens, end_ids), skip_special_tokens=True).strip() for tokens in new_tokens]


def _cut_at_end_token(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Return the tokens before the first end token."""
    end_index = next((index for index, token in enumerate(tokens) if token in end_ids), len(tokens))
    return list(tokens[:end_index])
