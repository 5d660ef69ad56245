"""Generated answers of benchmarks end at the end tokens that the model learned in training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.benchmarks.harness import LoadedModel
from finetune_trainer.stages.benchmark import _TaskRunner

from tests.support.learning import make_run
from tests.support.tiny import make_tokenizer

ROW_BY_KIND = {"chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "prompts": {"prompt": "a"}}


@pytest.mark.parametrize(("row_kind", "end_tokens"), [("chat", ["<|endoftext|>", "<|im_end|>"]), ("prompts", ["<|endoftext|>"])])
def test_end_tokens_of_trained_answers_end_answers(row_kind: str, end_tokens: list[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "model")
    tokenizer.eos_token = "<|endoftext|>"
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    spec: dict[str, Any] = {"dataset": {"split": {"test": 0.5}}}
    if row_kind == "prompts":
        spec |= {"trainer": {"type": "grpo", "rewards": [{"builtin": "length"}]}}
    run, inputs = make_run(tmp_path, tmp_path / "model", spec, rows=[ROW_BY_KIND[row_kind]] * 4)
    runner = _TaskRunner(run, None, inputs, None)  # type: ignore[arg-type]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert tokenizer.convert_ids_to_tokens(runner._find_end_token_ids(LoadedModel(model, tokenizer, 1, 0))) == end_tokens
