"""GRPO: the model answers every prompt several times, and what the rewards prefer becomes likelier."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.rules import has_test_set
from finetune_api.spec.enums import GrpoLoss, Overflow
from finetune_api.spec.trainer import Grpo as GrpoSpec
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from finetune_trainer.arguments import common
from finetune_trainer.data.load import Rows, load
from finetune_trainer.data.prepare import max_length, style_of, use_template
from finetune_trainer.data.rows import Conversation, Prompt, Turn
from finetune_trainer.data.template import Style, render
from finetune_trainer.distributed import connected
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.library_internals import GenerationUnderAutocast
from finetune_trainer.objective import answers
from finetune_trainer.objective.base import Facts, Setting
from finetune_trainer.objective.reference import Referenced, named_reference
from finetune_trainer.objective.rewards import GIVEN, RewardFunction, require_columns, rewards

MODEL_KIND = "causal"
LOSSES = {GrpoLoss.GRPO: "grpo", GrpoLoss.BNPO: "bnpo", GrpoLoss.DR_GRPO: "dr_grpo", GrpoLoss.DAPO: "dapo"}


class GrpoTrainer(GuardedTrainer, Referenced, GenerationUnderAutocast, GRPOTrainer):
    """TRL's trainer."""


def data(setting: Setting) -> tuple[answers.Parts, Facts]:
    """Prompts with the columns that rewards read. Errors: ConfigError RewardColumnMissing; DataError RowTooLong, NoTrainableToken."""
    template = use_template(setting.run, setting.inputs, setting.tokenizer)
    loaded = load(setting.run, setting.inputs)
    notes = list(loaded.summary.notes)
    functions = reward_functions(setting)
    made: dict[str, Dataset] = {}
    for name, rows in loaded.parts():
        style = replace(style_of(setting.run, setting.tokenizer, template, loaded.summary.format), markers=None)
        prompts = _prompts(rows, style, setting.run.spec.dataset.use_chat_template is True)
        require_columns(functions, [column for column in prompts[0] if column != "prompt"])
        made[name] = _dataset(_fitting(prompts, setting, notes, name))
    facts = Facts(len(made["train"]), loaded.summary.format, notes, {"rows": loaded.summary.rows})
    return answers.Parts(made["train"], made.get("validation"), made.get("test")), facts


def _prompts(rows: Rows, style: Style, text_as_turns: bool) -> list[dict[str, Any]]:
    """Turns as messages where the tokenizer has a chat template, else as text that ends where the answer begins; text as it is.

    Each has all columns that any row has, None where it has none itself.
    """
    taken = ("prompt", *GIVEN)
    made = []
    for _, example in rows:
        assert isinstance(example, Prompt), "the data room has checked the format"
        columns = {name: value for name, value in example.columns.items() if name not in taken}
        made.append({"prompt": _prompt(example.prompt, style, text_as_turns), **columns})
    every = dict.fromkeys(name for row in made for name in row)
    return [{**every, **row} for row in made]


def _dataset(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Rows that come out as they went in: Arrow would want one type a column, and give every message the keys of all others."""
    return Dataset.from_dict({"row": [pickle.dumps(row) for row in rows]}).with_transform(_unpacked)


def _unpacked(batch: dict[str, list[bytes]]) -> dict[str, list[Any]]:
    rows = [pickle.loads(row) for row in batch["row"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _prompt(prompt: tuple[Turn, ...] | str, style: Style, text_as_turns: bool) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        if not text_as_turns:
            return prompt
        prompt = (Turn("user", prompt),)
    if style.use_chat_template:
        return [turn.message() for turn in prompt]
    return render(Conversation((*prompt, Turn("assistant", ""))), style).text


def arguments(setting: Setting, *, evaluates: bool) -> GRPOConfig:
    """TRL's configuration. Errors: ConfigError CompletionTooLong, and those of the rewards."""
    run, spec = setting.run, setting.run.spec.trainer.grpo or GrpoSpec()
    fields = common(run, setting.inputs, setting.hardware, setting.plan, evaluates=evaluates)
    del fields["train_sampling_strategy"]
    generations, ranks = spec.num_generations or 8, setting.plan.world_size
    if fields["metric_for_best_model"] is not None:
        fields |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}
    evaluated = fields["eval_strategy"] != "no" or has_test_set(run.spec)
    return GRPOConfig(
        **fields,
        num_generations=generations,
        num_generations_eval=_eval_group(fields["per_device_eval_batch_size"], generations, ranks)
        if evaluated
        else None,
        max_completion_length=_room(setting)[1],
        temperature=1.0 if spec.temperature is None else spec.temperature,
        top_p=1.0 if spec.top_p is None else spec.top_p,
        beta=0.0 if spec.beta is None else spec.beta,
        loss_type=LOSSES[spec.loss_type or GrpoLoss.DAPO],
        reward_weights=[one.weight for one in reward_functions(setting)],
    )


def build(setting: Setting, args: GRPOConfig, model: Any, parts: answers.Parts) -> GrpoTrainer:
    """The trainer, ready to run."""
    with _own_reference(setting):
        trainer: GrpoTrainer = connected(GrpoTrainer, setting.plan)(
            model=model, reward_funcs=list(reward_functions(setting)), args=args, train_dataset=parts.train, eval_dataset=parts.validation,
            processing_class=setting.tokenizer, callbacks=list(setting.callbacks),
        )  # fmt: skip
    return trainer


@contextmanager
def _own_reference(setting: Setting) -> Iterator[None]:
    """The reference that every other objective has, where TRL would load one by itself.

    TRL (1.16) takes what lies on the disk: without rows for new tokens, and whole where the base is quantised. It can be given
    none, so the function that loads it is another one while the trainer is built.
    """
    before = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: named_reference(setting)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = before


def reward_functions(setting: Setting) -> list[RewardFunction]:
    """Of this run. Errors: ConfigError RewardsMissing and those of `rewards`."""
    specs = setting.run.spec.trainer.rewards
    if not specs:
        raise ConfigError("RewardsMissing", "grpo maximises rewards, and none is given", hint="write trainer.rewards")
    return rewards(specs, setting.inputs.config_maps)


def _eval_group(batch: int, generations: int, ranks: int) -> int:
    """Answers a prompt while evaluating: at most as many as in training, and whole groups in every batch."""
    fitting = [size for size in range(2, generations + 1) if batch * ranks % size == 0]
    assert fitting, "the API's rules refuse a batch without a whole group"
    return fitting[-1]


def _room(setting: Setting) -> tuple[int, int]:
    """Tokens for the prompt, and for the answer."""
    whole = max_length(setting.run, setting.tokenizer, setting.limit)
    answer = answers.answer_length(setting, whole)
    assert answer is not None, "the resolver fills trainer.maxCompletionLength for grpo"
    return whole - answer, answer


def _fitting(side: list[dict[str, Any]], setting: Setting, notes: list[str], part: str) -> list[dict[str, Any]]:
    """Prompts that leave room for an answer. A prompt cannot be cut without changing the question, so longer ones are left out."""
    room, answer = _room(setting)
    fits = [row for row in side if _tokens(row["prompt"], setting.tokenizer) <= room]
    if len(fits) == len(side):
        return side
    limits = f"dataset.maxSequenceLength {room + answer} less {answer} for the answer"
    told = f"{part}: {len(side) - len(fits)} of {len(side)} prompts have more than {room} tokens ({limits})"
    if setting.run.spec.dataset.overflow is Overflow.FAIL:
        raise DataError("RowTooLong", told, hint="raise maxSequenceLength, or set dataset.overflow to drop")
    if not fits:
        raise DataError(
            "NoTrainableToken", f"{told}: no row is left", hint="raise maxSequenceLength, or shorten the prompts"
        )
    notes.append(f"{told} and were left out")
    return fits


def _tokens(prompt: Any, tokenizer: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
