"""New tokens (`model.newTokens`): into the tokenizer, and as rows of the embeddings that are trained.

A new row starts as the mean of all rows, in the embeddings and in the head: it then gets an average share of the
probability, where random rows would take far more or far less. What trains the rows is the method's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source


def extend(tokenizer: Any, asked: Sequence[str] | None) -> list[int]:
    """Add the tokens, each always one token in any text; their ids. Errors: ConfigError TokenKnown."""
    if not asked:
        return []
    from transformers import AddedToken

    known = [token for token in asked if token in tokenizer.get_vocab()]
    if known:
        raise ConfigError(
            "TokenKnown", f"model.newTokens names {', '.join(known)}, which the tokenizer has already",
            hint="remove it: it is trained like any other token",
        )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in asked])
    return new_ids(tokenizer, asked)


def new_ids(tokenizer: Any, asked: Sequence[str] | None) -> list[int]:
    """Ids of the new tokens, in their order."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in asked or ()]


def fit(model: Any, tokenizer: Any, run: RunConfig, parts: Sequence[Any] = ()) -> None:
    """Give the model rows for the new tokens; without any, see that it has a row for every token that is used.

    Tokenizers may hold more tokens than the model has rows (for images, say): that is fine as long as none of them is in the data,
    `parts`, or fills short rows. Errors: ConfigError VocabularyDiffers, NewTokensSharded.
    """
    ids = new_ids(tokenizer, run.spec.model.new_tokens)
    words = model.get_input_embeddings().weight
    rows = int((getattr(words, "ds_shape", None) or words.shape)[0])
    if not ids:
        used = max([tokenizer.pad_token_id, *map(_highest, parts)]) if rows < len(tokenizer) else 0
        if used >= rows:
            raise ConfigError(
                "VocabularyDiffers", f"{redact_source(run.spec.model.source or '')} knows {rows} tokens, and "
                f"{tokenizer.convert_ids_to_tokens(used)!r} has id {used}",
                hint="give the model's own tokenizer, and name tokens that are to be added in model.newTokens",
            )  # fmt: skip
        return
    if hasattr(words, "ds_id"):
        raise ConfigError(
            "NewTokensSharded", "model.newTokens makes the embeddings grow, and with ZeRO stage 3 no rank has them whole",
            hint="write zeroStage 2, or fsdp with method full",
        )  # fmt: skip
    if rows < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _start(model, ids)


def _highest(part: Any) -> int:
    """Highest token id in a data set's columns of ids; -1: it has none."""
    import pyarrow.compute

    columns = [name for name in getattr(part, "column_names", ()) if name.endswith("_ids")]
    found = [pyarrow.compute.max(pyarrow.compute.list_flatten(part.data.column(name))).as_py() for name in columns]
    return max((one for one in found if one is not None), default=-1)


@torch.no_grad()
def _start(model: Any, ids: list[int]) -> None:
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
        weight[ids] = weight[: min(ids)].float().mean(0).to(weight.dtype)


def names(model: Any) -> list[str]:
    """Last parts of the names of the embeddings and, where it is a weight of its own, of the head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    apart = {id(end.weight): found[id(end)] for end in reversed(ends) if end is not None}
    return list(dict.fromkeys(reversed(apart.values())))
