"""Adds new tokens (`model.newTokens`) to the tokenizer and to the model's embeddings.

In the embeddings and in the head, the row of a new token starts as the mean of all older rows, so that the token has an average
probability. With a random row, the probability of a new token would be far too high or too low. The method decides whether the new rows are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source


def add_tokens(tokenizer: Any, new_tokens: Sequence[str] | None) -> list[int]:
    """Add tokens that the tokenizer never splits. Returns their ids. Errors: ConfigError TokenKnown."""
    if not new_tokens:
        return []
    from transformers import AddedToken

    known_tokens = [token for token in new_tokens if token in tokenizer.get_vocab()]
    if known_tokens:
        raise ConfigError(
            "TokenKnown", f"model.newTokens names {', '.join(known_tokens)}, which the tokenizer already has",
            hint="remove it from model.newTokens: a token of the vocabulary is trained like any other",
        )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    return new_token_ids(tokenizer, new_tokens)


def new_token_ids(tokenizer: Any, new_tokens: Sequence[str] | None) -> list[int]:
    """Return the ids of the new tokens, in the order of `new_tokens`."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in new_tokens or ()]


def fit_embeddings(model: Any, tokenizer: Any, run: RunConfig, datasets: Sequence[Any] = ()) -> None:
    """Add embedding rows for the new tokens. If there are no new tokens, check that the model has a row for every token in the data.

    A tokenizer with more tokens than the model has rows is accepted if the additional tokens (for example image tokens) do not occur in
    `datasets` and are not the pad token. Errors: ConfigError VocabularyDiffers, NewTokensSharded.
    """
    new_ids = new_token_ids(tokenizer, run.spec.model.new_tokens)
    embedding_weight = model.get_input_embeddings().weight
    row_count = int((getattr(embedding_weight, "ds_shape", None) or embedding_weight.shape)[0])
    if not new_ids:
        highest_id = max([tokenizer.pad_token_id, *map(_find_highest_id, datasets)]) if row_count < len(tokenizer) else 0
        if highest_id >= row_count:
            raise ConfigError(
                "VocabularyDiffers", f"{redact_source(run.spec.model.source or '')} has {row_count} embedding rows, and "
                f"{tokenizer.convert_ids_to_tokens(highest_id)!r} has id {highest_id}",
                hint="give the model's own tokenizer, and name additional tokens in model.newTokens",
            )  # fmt: skip
        return
    if hasattr(embedding_weight, "ds_id"):
        raise ConfigError(
            "NewTokensSharded", "model.newTokens enlarges the embeddings, and with ZeRO stage 3 no rank holds all of their rows",
            hint="write zeroStage 2, or fsdp with method full",
        )  # fmt: skip
    if row_count < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _set_rows_to_mean(model, new_ids)


def _find_highest_id(dataset: Any) -> int:
    """Return the highest token id in the token columns of a data set, or -1 if the data set has no token columns."""
    import pyarrow.compute

    columns = [name for name in getattr(dataset, "column_names", ()) if name.endswith("_ids")]
    highest_ids = [pyarrow.compute.max(pyarrow.compute.list_flatten(dataset.data.column(name))).as_py() for name in columns]
    return max((highest for highest in highest_ids if highest is not None), default=-1)


@torch.no_grad()
def _set_rows_to_mean(model: Any, new_ids: list[int]) -> None:
    """Set the rows of the new tokens to the mean of all older rows."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(module.weight): module.weight for module in modules if module is not None}.values():
        weight[new_ids] = weight[: min(new_ids)].float().mean(0).to(weight.dtype)


def embedding_names(model: Any) -> list[str]:
    """Return the short module names of the embeddings and the head. If the head's weight is tied to the embeddings, the head is left out."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    short_names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    name_by_weight_id = {id(module.weight): short_names[id(module)] for module in reversed(modules) if module is not None}
    return list(dict.fromkeys(reversed(name_by_weight_id.values())))
