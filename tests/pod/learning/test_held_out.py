"""A run does not train on its test set. After the training, the run measures the test metrics once, on the weights that it publishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.data import load

from tests.support.learning import TEN_ROWS, RunOutcome, make_run, run_training, train_here, write_rows
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS, PROMPTS
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
LORA_METHOD: dict[str, Any] = {"type": "lora", "lora": {"dropout": 0}}


def test_a_test_set_that_is_split_off_the_training_data_is_measured_at_the_end(model: Path, tmp_path: Path) -> None:
    split = {"dataset": {"split": {"validation": 0.2, "test": 0.3, "seed": 7}}}
    spec = {"method": LORA_METHOD, "evaluation": {"strategy": "steps", "steps": 2}, **split}
    run, inputs = make_run(tmp_path, model, spec, TEN_ROWS)
    data_sets = load(run, inputs)
    row_numbers = [raw.number for data_set in (data_sets.train, data_sets.validation, data_sets.test) for raw, _ in data_set]
    assert [len(data_sets.train), len(data_sets.validation), len(data_sets.test)] == [5, 2, 3]
    assert sorted(row_numbers) == list(range(1, 11))
    outcome = train_here(run, inputs)
    evaluation = outcome.extra["evaluation"]
    assert (outcome.resolved["datasetRows"], evaluation["testRows"]) == (5, 3)
    assert evaluation["testLoss"] == pytest.approx(
        compute_loss(outcome.folder, model, [TEN_ROWS[r.number - 1] for r, _ in data_sets.test]), abs=1e-4
    )
    assert evaluation["testLoss"] not in outcome.eval_losses
    assert sum("test_loss" in line for line in outcome.logs) == 1
    assert 0 <= evaluation["testTokenAccuracy"] <= 1
    written_rows = [json.loads(line) for line in (tmp_path / "out" / "test_split.jsonl").read_text().splitlines()]
    assert written_rows == [TEN_ROWS[row.number - 1] for row, _ in data_sets.test]
    assert any(
        note.startswith(f"test: 3 rows, loss {evaluation['testLoss']:.4f}, token accuracy") for note in outcome.notes
    )


def compute_loss(folder: Path | None, model: Path, rows: list[Any]) -> float:
    """Compute the mean loss over all answer tokens with plain transformers and PEFT. `folder` contains the adapter of the base model `model`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        text = prompt + row["messages"][1]["content"] + "<|im_end|>"
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = trained_model(ids).logits[0].log_softmax(-1)
        total -= float(sum(scores[position - 1, ids[0, position]] for position in range(start, ids.shape[1])))
        count += ids.shape[1] - start
    return total / count


@pytest.mark.parametrize(
    ("objective", "rows", "metric_names"),
    [
        ("dpo", PREFERENCE_PAIRS, {"testLoss", "testPreferenceAccuracy"}),
        pytest.param("orpo", PREFERENCE_PAIRS, {"testLoss", "testPreferenceAccuracy"}, marks=pytest.mark.slow),
        pytest.param("reward", PREFERENCE_PAIRS, {"testLoss", "testPreferenceAccuracy"}, marks=pytest.mark.slow),
        ("kto", LABELLED_ANSWERS, {"testLoss"}),
        ("grpo", PROMPTS, {"testReward"}),
    ],
)
def test_every_objective_measures_a_test_file(
    objective: str, rows: list[Any], metric_names: set[str], model: Path, tmp_path: Path
) -> None:
    test_file = write_rows(tmp_path / "held.jsonl", rows[:4])
    trainer: dict[str, Any] = {"type": objective}
    if objective == "grpo":
        reward = {"builtin": "length", "parameters": {"unit": "tokens", "minimum": "8"}}
        trainer |= {"maxCompletionLength": 8, "grpo": {"numGenerations": 2}, "rewards": [reward]}
    spec = {"method": LORA_METHOD, "trainer": trainer, "dataset": {"test": f"file://{test_file}"}, "training": {"maxSteps": 1}}
    run, inputs = make_run(tmp_path, model, spec, rows)
    outcome = train_here(run, inputs.model_copy(update={"test": [test_file]}))
    evaluation = outcome.extra["evaluation"]
    assert metric_names <= evaluation.keys()
    written_lines = (tmp_path / "out" / "test_split.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written_lines] == rows[:4]
    assert evaluation["testRows"] == 4
    assert outcome.resolved["datasetRows"] == len(rows)
    assert [message["stage"] for message in outcome.messages("stage")][-2:] == ["evaluating", "saving"]


def test_the_accuracy_of_multiple_choice_answers_is_measured_on_the_test_set(model: Path, tmp_path: Path) -> None:
    rows = [
        {"question": row["messages"][0]["content"], "options": {"A": "x", "B": "y"}, "answer": "AB"[i % 2]}
        for i, row in enumerate(TEN_ROWS)
    ]
    spec = {"training": {"maxSteps": 1}, "dataset": {"split": {"test": 0.4}}}
    assert "testAnswerAccuracy" in run_training(tmp_path, model, spec, rows).extra["evaluation"]


def test_without_a_test_set_nothing_is_measured(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, {"training": {"maxSteps": 1}})
    assert "evaluation" not in outcome.extra
    assert not (tmp_path / "out" / "test_split.jsonl").exists()
    assert "evaluating" not in [message["stage"] for message in outcome.messages("stage")]


@pytest.mark.parametrize("method", quick_slice(["lora", "promptTuning", "full"], ["promptTuning"]))
def test_evaluations_measure_precision_recall_and_f1_of_the_tokens(method: str, model: Path, tmp_path: Path) -> None:
    """The expected values are computed by scikit-learn from the complete logits."""
    from sklearn.metrics import precision_recall_fscore_support

    spec = {
        "method": LORA_METHOD if method == "lora" else {"type": method}, "evaluation": {"strategy": "steps", "steps": 4, "metrics": ["f1"]},
        "training": {"batchSizePerDevice": 2},
    }  # fmt: skip
    outcome = run_training(tmp_path, model, spec, TEN_ROWS, validation=TEN_ROWS[:5])
    evaluation_line = next(line for line in outcome.logs if "eval_f1" in line)
    labels, predicted = compute_predictions(outcome, TEN_ROWS[:5])
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="weighted", zero_division=0)
    assert (evaluation_line["eval_precision"], evaluation_line["eval_recall"], evaluation_line["eval_f1"]) == pytest.approx((precision, recall, f1), abs=1e-9)
    assert evaluation_line["eval_recall"] == pytest.approx(evaluation_line["eval_mean_token_accuracy"], abs=1e-9)


def compute_predictions(outcome: RunOutcome, rows: list[Any]) -> tuple[list[int], list[int]]:
    """Return the labels and the predicted ids of all answer tokens."""
    from transformers import AutoTokenizer

    tokenizer, trained_model = AutoTokenizer.from_pretrained(outcome.folder), outcome.model.eval()
    labels, predicted = [], []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + row["messages"][1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = trained_model(input_ids=ids).logits[0, -ids.shape[1] :]
        labels += ids[0, start:].tolist()
        predicted += logits[start - 1 : -1].argmax(-1).tolist()
    return labels, predicted
