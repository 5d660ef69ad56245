"""Helpers for tests of the trainer's data package: create a run with a data file, load its examples, and tokenise its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import RunConfig
from finetune_trainer.data import check_files, load
from finetune_trainer.data.prepare import PreparedData, prepare
from finetune_trainer.data.rows import Turn
from finetune_trainer.data.template import RenderOptions, render
from finetune_trainer.inputs import Inputs

from tests.support.learning import TEN_ROWS, make_run
from tests.support.tiny import CHATML_TEMPLATE, make_tokenizer

USER_TURN, ASSISTANT_TURN = Turn("user", "hi"), Turn("assistant", "ho")
SYSTEM_FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}"
    "{% endif %}{{ '[' + m.role + ']' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""A chat template that contains the beginning-of-sequence token and accepts a system prompt only as the first message."""


def make_data_run(
    folder: Path,
    spec: dict[str, Any] | None = None,
    rows: Any = (),
    *,
    text: str | bytes | None = None,
    name: str = "train.jsonl",
) -> tuple[RunConfig, Inputs]:
    """Create a run with one data file. The file contains `rows` as JSONL; if `text` is given, it contains `text` instead."""
    run, inputs = make_run(folder, Path("/models/tiny"), spec, rows)
    if text is not None:
        file = folder / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        inputs = inputs.model_copy(update={"train": [file]})
    return run, inputs


def load_examples(folder: Path, dataset: dict[str, Any] | None = None, rows: Any = (), **run_options: Any) -> list[Any]:
    """Create a run with these rows and return its training examples."""
    run, inputs = make_data_run(folder, {"dataset": dataset or {}, **run_options.pop("spec", {})}, rows, **run_options)
    return [example for _, example in load(run, inputs).train]


def catch_check_error(folder: Path, dataset: dict[str, Any] | None = None, rows: Any = (), **run_options: Any) -> FineTuneError:
    """Create a run with these rows and return the error that `check_files` raises."""
    run, inputs = make_data_run(folder, {"dataset": dataset or {}, **run_options.pop("spec", {})}, rows, **run_options)
    with pytest.raises(FineTuneError) as caught:
        check_files(run, inputs)
    return caught.value


def tokenizer(folder: Path, template: str | None = CHATML_TEMPLATE, **options: Any) -> Any:
    """Create a tiny tokenizer with the chat template `template`."""
    return make_tokenizer(folder / "tokenizer", chat_template=template, **options)


def render_options(
    tok: Any, *, response_only: bool = True, template: bool = True, markers: tuple[str, str] | None = None
) -> RenderOptions:
    """Create the options for rendering examples with the tokenizer."""
    special_tokens = tuple(sorted((token.content for token in tok.added_tokens_decoder.values()), key=len, reverse=True))
    return RenderOptions(tok, template, response_only, markers, special_tokens)


def trained_texts(example: Any, options: RenderOptions) -> list[str]:
    """Return the parts of the rendered text on which the model is trained."""
    rendering = render(example, options)
    return [rendering.text[start:end] for start, end in rendering.spans]


def prepare_rows(
    folder: Path, tok: Any, dataset: dict[str, Any] | None = None, rows: Any = TEN_ROWS, limit: int = 512
) -> PreparedData:
    """Tokenise the rows and return the token sequences."""
    run, inputs = make_run(folder, Path("/models/tiny"), {"dataset": dataset or {}}, rows)
    return prepare(run, inputs, tok, max_positions=limit, cache_folder=folder / "tokens")


def decode_rows(tok: Any, data: PreparedData) -> list[tuple[str, str]]:
    """Return the whole text and the trained text of each training sequence."""
    return [
        (tok.decode(row["input_ids"]), tok.decode([token for token in row["labels"] if token != -100]))
        for row in data.train
    ]
