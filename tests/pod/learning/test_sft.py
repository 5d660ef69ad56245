"""Supervised fine-tuning of a tiny model: packing, gradient accumulation, evaluation loss and token cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError

from tests.support.data import prepare_rows
from tests.support.learning import TEN_ROWS, merge_mappings, run_training

pytestmark = pytest.mark.pod


def test_a_second_attempt_uses_the_cached_tokens(model: Path, tmp_path: Path) -> None:
    """An attempt that finds cached tokens on its disk reads no rows and trains on the same sequences, even with another number of workers."""
    from finetune_trainer.data import encode

    first_outcome = run_training(tmp_path, model, {"training": {"maxSteps": 2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "RowReader", None)
        repeated_outcome = run_training(tmp_path, model, {"training": {"maxSteps": 2}, "dataset": {"numProc": 3}})
    assert repeated_outcome.losses == first_outcome.losses
    assert [note for note in repeated_outcome.notes if note.startswith("train:")] == [
        note for note in first_outcome.notes if note.startswith("train:")
    ]


def test_packed_documents_have_the_same_loss_as_unpacked_documents(model: Path, tmp_path: Path) -> None:
    """The loss of each document is computed with and without packing, with the attention that the trainer chooses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    unpacked_rows = prepare_rows(tmp_path, tokenizer).train
    packed_rows = prepare_rows(tmp_path, tokenizer, {"packing": True, "maxSequenceLength": 64}).train
    assert 1 < len(packed_rows) < len(unpacked_rows) and max(len(row["input_ids"]) for row in packed_rows) <= 64

    def compute_losses(rows: list[dict[str, Any]], padding_free: bool) -> dict[tuple[int, ...], float]:
        loss_of_document = {}
        for row in rows:
            batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)([row])
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = net(**batch, use_cache=False).logits
            token_losses = torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100
            )
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                loss_of_document[tuple(row["input_ids"][start : start + length])] = float(
                    token_losses[max(start - 1, 0) : start + length - 1].sum()
                )
                start += length
        return loss_of_document

    unpacked_losses, packed_losses = compute_losses(list(unpacked_rows), False), compute_losses(list(packed_rows), True)
    assert unpacked_losses.keys() == packed_losses.keys() and len(unpacked_losses) == 10
    for key, value in unpacked_losses.items():
        assert packed_losses[key] == pytest.approx(value, abs=1e-5)


def test_packed_documents_that_attend_to_each_other_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends before its first step."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, {"dataset": {"packing": True}})
    assert (caught.value.code, caught.value.exit_code) == ("PackingLeaks", 64), "the failure is final, because another attempt would end in the same way"


def test_gradient_accumulation_equals_one_large_batch(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + i % 4)}]}
        for i, row in enumerate(TEN_ROWS[:8])
    ]
    lora = {"method": {"lora": {"dropout": 0}}}
    large_batch_outcome = run_training(tmp_path / "a", model, {**lora, "training": {"batchSizePerDevice": 8}}, rows)
    accumulation_outcome = run_training(
        tmp_path / "b", model, {**lora, "training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 4}}, rows
    )
    assert accumulation_outcome.losses == pytest.approx(large_batch_outcome.losses, abs=1e-6)
    assert accumulation_outcome.grad_norms == pytest.approx(large_batch_outcome.grad_norms, abs=1e-5)


def test_a_packed_run_reaches_the_loss_of_an_unpacked_run(model: Path, tmp_path: Path) -> None:
    spec = {"method": {"lora": {"dropout": 0}}, "training": {"batchSizePerDevice": 10, "maxSteps": 3}}
    unpacked_outcome = run_training(tmp_path / "a", model, spec)
    packed_outcome = run_training(tmp_path / "b", model, {**spec, "dataset": {"packing": True}})
    assert packed_outcome.losses == pytest.approx(unpacked_outcome.losses, abs=1e-5)
    assert packed_outcome.extra["data"]["tokens"]["train"]["sequences"] == 1


def test_evaluation_loss_is_the_mean_over_all_tokens(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + 3 * (i % 3))}]}
        for i, row in enumerate(TEN_ROWS)
    ]
    spec = {"training": {"maxSteps": 1}, "evaluation": {"steps": 1, "strategy": "steps"}}
    row_by_row_outcome = run_training(
        tmp_path / "a", model, {**spec, "evaluation": {"batchSizePerDevice": 1, "steps": 1}}, validation=rows
    )
    all_at_once_outcome = run_training(
        tmp_path / "b", model, {**spec, "evaluation": {"batchSizePerDevice": 10, "steps": 1}}, validation=rows
    )
    assert row_by_row_outcome.eval_losses == pytest.approx(all_at_once_outcome.eval_losses, abs=1e-5)
    assert len(row_by_row_outcome.eval_losses) == 1


def test_load_balance_loss_is_trained_on_but_not_part_of_the_validation_loss(model: Path, tmp_path: Path) -> None:
    """The training of a mixture of experts also minimises its load balance loss, but the validation loss does not contain it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path / "experts"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(
        vocab_size=448, num_local_experts=4, max_position_embeddings=512, router_aux_loss_coef=0.5, eos_token_id=2, pad_token_id=3, **sizes
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    rows = [{"text": "red " * (1 + 5 * i)} for i in range(3)]
    spec = {
        "method": {"type": "full"},
        "evaluation": {"strategy": "steps", "steps": 1},
        "training": {"maxSteps": 1, "learningRate": 1e-9},
    }
    outcome = run_training(
        tmp_path / "run", folder, merge_mappings(spec, {"training": {"batchSizePerDevice": 2}}), rows, validation=rows
    )
    (line,) = [line for line in outcome.logs if "loss" in line]
    assert line["num_tokens"] > 0 and line["loss"] > outcome.eval_losses[0] + 0.4
    one_batch_outcome = run_training(
        tmp_path / "one", folder, merge_mappings(spec, {"training": {"batchSizePerDevice": 3}}), rows, validation=rows
    )
    assert outcome.eval_losses == pytest.approx(one_batch_outcome.eval_losses, abs=1e-5)


def test_the_accuracy_of_multiple_choice_answers_is_measured(model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": row["messages"][0]["content"], "options": {"A": "x", "B": "y", "C": "z"}, "answer": "ABC"[i % 3]}
        for i, row in enumerate(TEN_ROWS)
    ]
    spec = {
        # If this learning rate were five times as high, the losses on different types of processors would soon differ.
        "training": {"maxSteps": 80, "batchSizePerDevice": 10, "scheduler": "constant", "learningRate": 1e-3}, "method": {"type": "full"},
        "evaluation": {"strategy": "steps", "steps": 20},
    }  # fmt: skip
    outcome = run_training(tmp_path, model, spec, rows, validation=rows)
    accuracies = [line["eval_answer_accuracy"] for line in outcome.logs if "eval_answer_accuracy" in line]
    assert len(accuracies) == 4 and accuracies[0] < accuracies[-1] == 1.0
    assert outcome.resolved["datasetFormat"] == "mcq"
