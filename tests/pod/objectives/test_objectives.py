"""Every objective changes the model in the intended direction, its options have an effect, and invalid input is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, DataError, FineTuneError, NotFoundError

from tests.support.learning import RunOutcome, merge_mappings, run_training
from tests.support.preferences import LABELLED_ANSWERS, PREFERENCE_PAIRS, PROMPTS, assistant_message, user_message
from tests.support.slices import quick_slice

pytestmark = pytest.mark.pod
Spec = dict[str, Any]
LORA_SPEC: Spec = {"method": {"type": "lora", "lora": {"dropout": 0}}}
FIFTY_STEPS: Spec = {"training": {"maxSteps": 50, "batchSizePerDevice": 10, "scheduler": "constant", "learningRate": 3e-3}}
FULL_SPEC: Spec = {"method": {"type": "full", "lora": None}}
LETTER_E_REWARD: Spec = {"builtin": "regex", "parameters": {"pattern": "e"}}
LENGTH_REWARD: Spec = {"builtin": "length", "parameters": {"unit": "tokens", "minimum": "8"}}


def make_objective_spec(objective: str, spec: Spec | None = None, **trainer: Any) -> Spec:
    return merge_mappings(merge_mappings(LORA_SPEC, {"trainer": {"type": objective, **trainer}}), spec or {})


def make_grpo_spec(spec: Spec | None = None, rewards: list[Spec] | None = None, **options: Any) -> Spec:
    group = {"numGenerations": 2, **options}
    return make_objective_spec("grpo", spec, maxCompletionLength=8, grpo=group, rewards=rewards or [LENGTH_REWARD])


def list_logged_values(outcome: RunOutcome, key: str) -> list[float]:
    return [line[key] for line in outcome.logs if key in line]


def compute_log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Return the log-probability of an answer to a prompt."""
    head = tokenizer.apply_chat_template([user_message(prompt)], add_generation_prompt=True, tokenize=False)
    start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(head + answer + "<|im_end|>", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(-1)
    return float(sum(scores[position - 1, ids[0, position]] for position in range(start, ids.shape[1])))


def load_models(outcome: RunOutcome, model: Path) -> tuple[Any, Any, Any]:
    """Load the artefact as a user does. Returns the tuned model, the base model and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert outcome.folder is not None
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    model_after = AutoModelForCausalLM.from_pretrained(outcome.folder, dtype=torch.float32)
    return model_after.eval(), base.eval(), AutoTokenizer.from_pretrained(outcome.folder)


# ---- the intended direction


@pytest.mark.parametrize(
    ("objective", "rows", "loss_bound"),
    [
        ("dpo", PREFERENCE_PAIRS, 0.1),
        pytest.param("orpo", PREFERENCE_PAIRS, 0.5, marks=pytest.mark.slow),
        pytest.param("kto", LABELLED_ANSWERS, 0.3, marks=pytest.mark.slow),
    ],
)
def test_better_answers_become_more_likely(objective: str, rows: list[Any], loss_bound: float, model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, make_objective_spec(objective, merge_mappings(FIFTY_STEPS, FULL_SPEC)), rows)
    assert outcome.losses[-1] < loss_bound < outcome.losses[0]
    trained_model, base_model, tokenizer = load_models(outcome, model)
    for row in PREFERENCE_PAIRS:
        question, good, bad = row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]
        gaps = [
            compute_log_probability(net, tokenizer, question, good) - compute_log_probability(net, tokenizer, question, bad)
            for net in (base_model, trained_model)
        ]
        assert gaps[1] > gaps[0] + 1, question


def test_reward_model_scores_better_answers_higher(model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    outcome = run_training(tmp_path, model, make_objective_spec("reward", FIFTY_STEPS), PREFERENCE_PAIRS)
    assert outcome.losses[-1] < 0.1
    assert outcome.folder is not None and outcome.kind == "adapter"
    assert json.loads((outcome.folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    scorer = PeftModel.from_pretrained(base, outcome.folder).eval()
    for row in PREFERENCE_PAIRS:
        scores = []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False).rstrip("\n")
            scores.append(float(scorer(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]))
        assert scores[0] > scores[1]


def test_full_reward_model_is_a_model_with_its_head(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    outcome = run_training(tmp_path, model, merge_mappings(make_objective_spec("reward"), {"method": {"type": "full", "lora": None}}), PREFERENCE_PAIRS)
    assert outcome.folder is not None and outcome.kind == "model"
    loaded_model, loading_info = AutoModelForSequenceClassification.from_pretrained(outcome.folder, output_loading_info=True)
    assert (loaded_model.config.num_labels, list(loading_info["missing_keys"])) == (1, [])


@pytest.mark.parametrize("bits", [None, 4])
def test_spectrum_trains_the_head_of_a_reward_model(bits: int | None, model: Path, tmp_path: Path) -> None:
    quantization = {"model": {"quantization": {"bits": bits}}} if bits else {}
    training_spec = {"training": {"batchSizePerDevice": 10, "learningRate": 1e-3, "maxSteps": 8}}
    outcome = run_training(
        tmp_path, model, {"trainer": {"type": "reward"}, "method": {"type": "spectrum"}, **quantization, **training_spec}, PREFERENCE_PAIRS
    )
    assert outcome.model.score.weight.requires_grad
    assert outcome.losses[-1] < outcome.losses[0]


def test_grpo_raises_the_reward(model: Path, tmp_path: Path) -> None:
    # Before the training, 40 % of the answers contain an "e".
    steps = {"training": {"maxSteps": 30, "batchSizePerDevice": 16, "scheduler": "constant", "learningRate": 1e-2}}
    outcome = run_training(tmp_path, model, make_grpo_spec(merge_mappings(steps, FULL_SPEC), [LETTER_E_REWARD], numGenerations=8), PROMPTS)
    rewards = list_logged_values(outcome, "rewards/regex/mean")
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.9
    assert outcome.resolved["strategy"] == "single"


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_reference_adapter_is_not_saved(objective: str, model: Path, tmp_path: Path) -> None:
    rows = {"dpo": PREFERENCE_PAIRS, "kto": LABELLED_ANSWERS, "grpo": PROMPTS}[objective]
    spec = make_grpo_spec(beta=0.1) if objective == "grpo" else make_objective_spec(objective)
    outcome = run_training(tmp_path, model, merge_mappings(spec, {"checkpoint": {"strategy": "steps", "steps": 2}}), rows)
    assert outcome.folder is not None
    for folder in (outcome.folder, outcome.folder.parent / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").exists()
        assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert "ref" in outcome.model.peft_config
    assert not any(p.requires_grad for name, p in outcome.model.named_parameters() if ".ref." in name)


SPECS_AND_ROWS: dict[str, tuple[Spec, list[Any]]] = {
    "dpo": (make_objective_spec("dpo"), PREFERENCE_PAIRS),
    "kto": (make_objective_spec("kto"), LABELLED_ANSWERS),
    "orpo": (make_objective_spec("orpo"), PREFERENCE_PAIRS),
    "reward": (make_objective_spec("reward"), PREFERENCE_PAIRS),
    "grpo": (make_grpo_spec(rewards=[LETTER_E_REWARD], beta=0.1), PROMPTS),
}


@pytest.mark.parametrize("objective", quick_slice(SPECS_AND_ROWS, ["dpo", "grpo"]))
def test_a_resumed_run_equals_an_uninterrupted_run(objective: str, model: Path, tmp_path: Path) -> None:
    from finetune_trainer.inputs import RestoredCheckpoint

    spec, rows = SPECS_AND_ROWS[objective]
    spec = merge_mappings(spec, {"checkpoint": {"strategy": "steps", "steps": 2}, "method": {"lora": {"dropout": 0.1}}})
    whole_outcome = run_training(tmp_path / "a", model, spec, rows)
    restore = RestoredCheckpoint(path=tmp_path / "a" / "out" / "checkpoint-2", step=2, uri="s3://x")
    resumed_outcome = run_training(tmp_path / "b", model, spec, rows, restore=restore)
    assert (resumed_outcome.losses, resumed_outcome.grad_norms) == (whole_outcome.losses[2:], whole_outcome.grad_norms[2:])
    assert whole_outcome.folder is not None and resumed_outcome.folder is not None
    whole_weights, resumed_weights = ((outcome.folder / "adapter_model.safetensors").read_bytes() for outcome in (whole_outcome, resumed_outcome))
    assert whole_weights == resumed_weights


@pytest.mark.parametrize("objective", quick_slice(["dpo", "kto", "orpo", "reward"], ["kto", "reward"]))
def test_validation_loss_is_measured(objective: str, model: Path, tmp_path: Path) -> None:
    spec, rows = SPECS_AND_ROWS[objective]
    outcome = run_training(
        tmp_path, model, merge_mappings(spec, {"evaluation": {"strategy": "steps", "steps": 2}}), rows, validation=rows[:6]
    )
    assert len(outcome.eval_losses) == 2
    assert all(math.isfinite(loss) for loss in outcome.eval_losses)
    assert outcome.eval_losses[1] != outcome.eval_losses[0]


# ---- options of dpo


@pytest.mark.parametrize(
    "loss",
    quick_slice(["sigmoid", "hinge", "ipo", "ncaPair", "bcoPair", "apoZero", "apoDown", "sft", "robust", "exoPair"], ["ipo", "apoZero", "robust"]),
)
def test_every_dpo_loss_trains(loss: str, model: Path, tmp_path: Path) -> None:
    smoothing = {"labelSmoothing": 0.1} if loss in ("robust", "exoPair") else {}
    outcome = run_training(tmp_path, model, make_objective_spec("dpo", dpo={"lossTypes": [loss], **smoothing}), PREFERENCE_PAIRS)
    # The first loss is known: before the first step, the model equals the reference model, so every log ratio is 0.
    half = math.log(2)
    first_losses = {
        "sigmoid": half, "hinge": 1.0, "ipo": 25.0, "ncaPair": 2 * half, "bcoPair": 2 * half, "apoZero": 1.0, "apoDown": 1.0, "robust": half,
        "exoPair": math.log(0.5) - 0.5 * (math.log(0.9) + math.log(0.1)),
    }  # fmt: skip
    if loss in first_losses:
        assert outcome.losses[0] == pytest.approx(first_losses[loss], abs=1e-5)
    assert outcome.losses[1] != outcome.losses[0]


def test_dpo_losses_are_summed(model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, make_objective_spec("dpo", dpo={"lossTypes": ["sigmoid", "hinge"]}), PREFERENCE_PAIRS)
    assert outcome.losses[0] == pytest.approx(math.log(2) + 1.0, abs=1e-5)


def test_beta_scales_the_gradient(model: Path, tmp_path: Path) -> None:
    mild_outcome = run_training(tmp_path / "a", model, make_objective_spec("dpo", dpo={"beta": 0.1}), PREFERENCE_PAIRS)
    strong_outcome = run_training(tmp_path / "b", model, make_objective_spec("dpo", dpo={"beta": 0.5}), PREFERENCE_PAIRS)
    assert strong_outcome.grad_norms[0] == pytest.approx(5 * mild_outcome.grad_norms[0], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_model_of_the_spec_is_used(method: str, model: Path, other_model: Path, tmp_path: Path) -> None:
    from tests.support.learning import make_run, train_here

    spec = merge_mappings(
        make_objective_spec("dpo", dpo={"referenceModel": "s3://models/other"}), {"method": {"type": method, "lora": None}}
    )
    run, inputs = make_run(tmp_path, model, spec, PREFERENCE_PAIRS)
    outcome = train_here(run, inputs.model_copy(update={"reference": other_model}))
    assert abs(outcome.losses[0] - math.log(2)) > 1e-3
    outcome_without_other_reference = train_here(run, inputs)
    assert outcome_without_other_reference.losses[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(("objective", "sequences"), quick_slice([("dpo", 2), ("orpo", 2), ("reward", 2), ("kto", 1)], [("dpo", 2), ("kto", 1)]))
def test_a_run_reports_its_plan_of_memory_and_work(objective: str, sequences: int, model: Path, tmp_path: Path) -> None:
    rows = LABELLED_ANSWERS if objective == "kto" else PREFERENCE_PAIRS
    spec = {"training": {"maxSteps": 2, "batchSizePerDevice": len(rows)}}
    outcome = run_training(tmp_path, model, make_objective_spec(objective, spec), rows)
    plan = outcome.messages("plan")[0]["value"]
    token_counts = outcome.extra["data"]["tokens"]["train"]
    assert (plan["work"]["steps"], plan["work"]["tokens"]) == (2, 2 * token_counts["tokens"])
    assert token_counts["longest"] < token_counts["tokens"] <= len(rows) * sequences * token_counts["longest"]
    assert plan["memory"]["expectedBytes"] > plan["memory"]["parts"]["weights"] > 0


def test_long_answers_are_cut_and_reported(model: Path, tmp_path: Path) -> None:
    long_rows = [{**PREFERENCE_PAIRS[0], "chosen": [assistant_message("red " * 30)]}, *PREFERENCE_PAIRS[1:]]
    outcome = run_training(tmp_path, model, make_objective_spec("dpo", maxCompletionLength=10), long_rows)
    assert "train: answers of 1 rows were cut to trainer.maxCompletionLength 10" in outcome.notes
    short_spec = {"dataset": {"maxSequenceLength": 16, "overflow": "drop"}}
    outcome = run_training(tmp_path / "drop", model, make_objective_spec("dpo", short_spec, maxCompletionLength=12), long_rows)
    assert any("left out" in note for note in outcome.notes)
    with pytest.raises(DataError) as caught:
        run_training(
            tmp_path / "fail",
            model,
            make_objective_spec("dpo", merge_mappings(short_spec, {"dataset": {"overflow": "fail"}}), maxCompletionLength=12),
            long_rows,
        )
    assert caught.value.code == "RowTooLong"
    assert "train.jsonl, row 1" in caught.value.message


def test_pairs_that_are_equal_after_cutting_are_dropped(model: Path, tmp_path: Path) -> None:
    equal_pairs = [
        {**PREFERENCE_PAIRS[0], "chosen": [assistant_message("red " * 9 + "yes")], "rejected": [assistant_message("red " * 9 + "no")]},
        *PREFERENCE_PAIRS[1:],
    ]
    outcome = run_training(tmp_path, model, make_objective_spec("dpo", maxCompletionLength=4), equal_pairs)
    assert "train: 1 rows were left out because their two answers are equal after truncation" in outcome.notes
    assert outcome.resolved["datasetRows"] == 9


def test_text_is_joined_without_a_template_and_gets_an_end_token(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text_rows = [{"prompt": "What is 1 + 1?", "chosen": " two", "rejected": " yes no"}] * 4
    one_step_spec = {"training": {"maxSteps": 1, "batchSizePerDevice": 4}}
    outcome = run_training(tmp_path / "a", model, make_objective_spec("dpo", one_step_spec), text_rows)
    ids = AutoTokenizer.from_pretrained(model)("What is 1 + 1? yes no<|im_end|>", add_special_tokens=False)["input_ids"]
    assert outcome.extra["data"]["tokens"]["train"]["longest"] == len(ids)
    assert any(note.startswith("prompts and answers are joined without a chat template") for note in outcome.notes)
    template_outcome = run_training(tmp_path / "b", model, make_objective_spec("dpo", {**one_step_spec, "dataset": {"useChatTemplate": True}}), text_rows)
    assert template_outcome.extra["data"]["tokens"]["train"]["longest"] > len(ids) + 4


# ---- options of grpo


@pytest.mark.parametrize("options", [{}, {"timeoutSeconds": 120}])
def test_reward_functions_of_users_get_the_columns_and_are_weighted(options: Spec, model: Path, tmp_path: Path) -> None:
    source = "def near(completions, answer, **_):\n    return [float(len(text)) for text in answer]\n"
    own_reward = {"configMapRef": {"name": "mine", "key": "r.py"}, "function": "near", "weight": 0.5, **options}
    spec = make_grpo_spec({"training": {"maxSteps": 1, "batchSizePerDevice": 20}}, [own_reward, {"builtin": "exactMatch", "weight": 2}])
    outcome = run_training(tmp_path, model, spec, PROMPTS, config_maps={"mine": {"r.py": source}})
    mean = sum(len(row["answer"]) for row in PROMPTS) / len(PROMPTS)
    assert list_logged_values(outcome, "rewards/near/mean") == [pytest.approx(mean)]
    assert list_logged_values(outcome, "reward") == [pytest.approx(0.5 * mean + 2 * list_logged_values(outcome, "rewards/exactMatch/mean")[0])]


def test_beta_adds_a_kl_penalty_to_the_grpo_loss(model: Path, tmp_path: Path) -> None:
    assert list_logged_values(run_training(tmp_path / "a", model, make_grpo_spec(), PROMPTS), "kl") == []
    assert len(list_logged_values(run_training(tmp_path / "b", model, make_grpo_spec(beta=0.1), PROMPTS), "kl")) == 4


@pytest.mark.parametrize("loss", quick_slice(["grpo", "bnpo", "drGrpo", "dapo"], ["drGrpo"]))
def test_every_grpo_loss_trains(loss: str, model: Path, tmp_path: Path) -> None:
    outcome = run_training(tmp_path, model, make_grpo_spec({"training": {"batchSizePerDevice": 8}}, [LETTER_E_REWARD], lossType=loss), PROMPTS)
    assert all(math.isfinite(value) for value in outcome.losses)
    assert outcome.grad_norms[0] > 0


def test_grpo_is_evaluated_by_its_reward(model: Path, tmp_path: Path) -> None:
    spec = make_grpo_spec(
        {
            "evaluation": {"strategy": "steps", "steps": 2},
            "checkpoint": {"strategy": "steps", "steps": 2, "loadBestAtEnd": True},
        }
    )
    outcome = run_training(tmp_path, model, spec, PROMPTS, validation=PROMPTS[:4])
    assert len(list_logged_values(outcome, "eval_rewards/length/mean")) == 2


def test_prompts_that_leave_no_tokens_for_an_answer_are_dropped(model: Path, tmp_path: Path) -> None:
    long_rows = [{"prompt": [user_message("one " * 60)], "answer": "red"}, *PROMPTS]
    outcome = run_training(tmp_path, model, make_grpo_spec({"dataset": {"maxSequenceLength": 40}}), long_rows)
    assert any("1 of 11 prompts have more than 32 tokens" in note and "left out" in note for note in outcome.notes)


def test_grpo_trains_on_text_prompts_and_without_a_chat_template(model: Path, tmp_path: Path) -> None:
    text_rows = [{"prompt": "1 + 1 =", "answer": "two"}] * 4
    spec_without_template = {"dataset": {"format": "promptOnly", "useChatTemplate": False}}
    assert len(run_training(tmp_path / "a", model, make_grpo_spec(spec_without_template), text_rows).losses) == 4
    assert len(run_training(tmp_path / "b", model, make_grpo_spec(spec_without_template), PROMPTS).losses) == 4


def test_rewards_receive_prompts_and_columns_unchanged(model: Path, tmp_path: Path) -> None:
    """The values of a column may have different types or be absent. A key that one message has is not added to the other messages."""
    record_file = tmp_path / "seen"
    code = f"""
def reward(completions, prompts, note, **columns):
    with open({str(record_file)!r}, "a") as file:
        file.write(repr((prompts[0], note[0])) + "\\n")
    return [0.0] * len(completions)
"""
    named_message = {"role": "user", "content": "two", "name": "bob"}
    rows: list[dict[str, Any]] = [
        {"prompt": [user_message("one")]},
        {"prompt": [named_message], "note": 2**70},
        {"prompt": [user_message("three")], "note": ["x", {"a": 1}]},
    ]
    own_reward = {"configMapRef": {"name": "mine", "key": "r.py"}}
    run_training(
        tmp_path / "run",
        model,
        make_grpo_spec({"training": {"maxSteps": 3}}, rewards=[own_reward]),
        rows,
        config_maps={"mine": {"r.py": code}},
    )
    assert sorted(record_file.read_text().splitlines()) == sorted(repr((row["prompt"], row.get("note"))) for row in rows)


# ---- rows of kto


def test_the_mismatched_answer_of_a_row_comes_from_the_preceding_row() -> None:
    from finetune_trainer.objective.kto import _add_mismatched_answers

    assert _add_mismatched_answers({"completion_ids": [[1], [2], [3]]}) == {"KL_completion_ids": [[3], [1], [2]]}


# ---- refused specs and inputs

CUSTOM_REWARD = {"configMapRef": {"name": "mine", "key": "r.py"}}
REFUSED_SPECS: dict[str, tuple[Spec, list[Any], str, str]] = {
    "exoPair without smoothing": (make_objective_spec("dpo", dpo={"lossTypes": ["exoPair"]}), PREFERENCE_PAIRS, "DpoLosses", "logarithm"),
    "smoothing without effect": (make_objective_spec("dpo", dpo={"labelSmoothing": 0.1}), PREFERENCE_PAIRS, "DpoLosses", "has no effect on sigmoid"),
    "the same loss type twice": (make_objective_spec("dpo", dpo={"lossTypes": ["ipo", "ipo"]}), PREFERENCE_PAIRS, "DpoLosses", "ipo twice"),
    "grouping by length": (make_objective_spec("dpo", {"training": {"groupByLength": True}}), PREFERENCE_PAIRS, "OptionOfAnotherObjective", "groupByLength"),
    "maximum answer as long as the row": (
        make_objective_spec("dpo", {"dataset": {"maxSequenceLength": 32}}, maxCompletionLength=32), PREFERENCE_PAIRS, "CompletionTooLong", "no token",
    ),
    "kto with one row per batch": (make_objective_spec("kto", {"training": {"batchSizePerDevice": 1}}), LABELLED_ANSWERS, "BatchTooSmall", "rows of one batch"),
    "kto with only good answers": (make_objective_spec("kto"), LABELLED_ANSWERS[::2], "OneSidedJudgement", "labelled good"),
    "kto with a dpo option": (make_objective_spec("kto", dpo={"lossTypes": ["ipo"]}), LABELLED_ANSWERS, "OptionOfAnotherObjective", "lossTypes"),
    "orpo with a reference": (make_objective_spec("orpo", dpo={"referenceModel": "org/x"}), PREFERENCE_PAIRS, "OptionOfAnotherObjective", "referenceModel"),
    "orpo with prompt tuning": (
        {"method": {"type": "promptTuning"}, "trainer": {"type": "orpo"}}, PREFERENCE_PAIRS, "ObjectiveAndMethod", "virtual tokens",
    ),
    "groups that do not divide the batch": (make_grpo_spec(numGenerations=3), PROMPTS, "GenerationsDoNotDivide", "2 is not divisible by 3"),
    "a missing column": (
        make_grpo_spec(rewards=[{"builtin": "exactMatch", "parameters": {"column": "gold"}}]), PROMPTS, "RewardColumnMissing", "reads column 'gold'",
    ),
    "a reward that fails": (make_grpo_spec(rewards=[CUSTOM_REWARD]), PROMPTS, "RewardFailed", "ZeroDivisionError"),
    "data of another objective": (make_objective_spec("dpo"), LABELLED_ANSWERS, "FormatMismatch", "dpo needs preference"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_SPECS)
def test_invalid_input_is_refused_with_its_code(name: str, model: Path, tmp_path: Path) -> None:
    spec, rows, code, message = REFUSED_SPECS[name]
    files = {"mine": {"r.py": "def reward(completions, **_):\n    return [1 / 0 for _ in completions]\n"}}
    with pytest.raises(FineTuneError) as caught:
        run_training(tmp_path, model, spec, rows, config_maps=files)
    assert isinstance(caught.value, ConfigError | DataError)
    assert caught.value.code == code
    assert message in caught.value.message
    assert caught.value.hint


def test_an_adapter_for_text_generation_is_refused_for_a_reward_model(model: Path, tmp_path: Path) -> None:
    generator_outcome = run_training(tmp_path / "a", model, make_objective_spec("dpo"), PREFERENCE_PAIRS)
    spec = {"method": {"type": "adapter", "adapter": {"source": "s3://models/a"}}, "trainer": {"type": "reward"}}
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path / "b", model, spec, PREFERENCE_PAIRS, adapter=generator_outcome.folder)
    assert caught.value.code == "AdapterWithoutHead"
    scorer_outcome = run_training(tmp_path / "c", model, make_objective_spec("reward"), PREFERENCE_PAIRS)
    repeated_outcome = run_training(tmp_path / "d", model, spec, PREFERENCE_PAIRS, adapter=scorer_outcome.folder)
    assert repeated_outcome.losses[0] < scorer_outcome.losses[0]


def test_a_base_model_with_missing_weights_is_refused_for_a_reward_model(model: Path, tmp_path: Path) -> None:
    """All weights except those of the head must exist in the base model, because transformers would initialise missing weights at random."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "part"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFoundError) as caught:
        run_training(tmp_path, folder, make_objective_spec("reward"), PREFERENCE_PAIRS)
    assert caught.value.code == "ModelIncomplete" and "layers.1.mlp.up_proj" in caught.value.message


def test_missing_reward_file_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        run_training(tmp_path, model, make_grpo_spec(rewards=[CUSTOM_REWARD]), PROMPTS)
    assert caught.value.code == "ConfigMapMissing"
