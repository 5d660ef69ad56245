"""`spec.trainer`: the objective that is minimised."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import Group, option
from finetune_api.spec.common import ConfigMapKeyRef, Source, StringMap, Word
from finetune_api.spec.enums import Backend, BuiltinReward, DpoLoss, GrpoLoss, TrainerType


class Dpo(Group):
    """`trainer.dpo`: direct preference optimisation (also beta of kto and orpo)."""

    beta: Annotated[float, Field(gt=0, le=100)] | None = option(
        "Strength of the pull towards the reference model.", default=0.1, example=0.1
    )
    loss_types: Annotated[list[DpoLoss], Field(min_length=1, max_length=8)] | None = option(
        "Loss functions; several are summed.", default=["sigmoid"], example=["sigmoid"]
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = option(
        "Assumed probability that a pair is labelled the wrong way round.", default=0.0, example=0.1
    )
    reference_model: Source | None = option(
        "Reference model, in the notations of model.source.",
        default_text="the base model itself",
        example="s3://models/sft",
    )


class Grpo(Group):
    """`trainer.grpo`: group relative policy optimisation."""

    num_generations: Annotated[int, Field(ge=2, le=1024)] | None = option(
        "Completions sampled per prompt.", default=8, example=8
    )
    temperature: Annotated[float, Field(gt=0, le=10)] | None = option("Sampling temperature.", default=1.0, example=0.9)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = option(
        "Nucleus sampling: smallest set of tokens with this total probability.", default=1.0, example=0.95
    )
    beta: Annotated[float, Field(ge=0, le=100)] | None = option(
        "Weight of the KL term; 0 loads no reference model.", default=0.0, example=0.04
    )
    loss_type: GrpoLoss | None = option("How the token losses are averaged.", default="dapo", example="drGrpo")


class Reward(Group):
    """One reward function: built in, or a Python function from a ConfigMap."""

    cel = (
        (
            "has(self.builtin) != has(self.configMapRef)",
            "a reward is either `builtin` or `configMapRef` with `function`: write exactly one of the two",
        ),
    )

    name: Word | None = option(
        "Name in metrics.", default_text="the built-in's or the function's name", example="format"
    )
    builtin: BuiltinReward | None = option("A built-in reward. Default: none.", example="regex")
    config_map_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with a Python file. Default: none.", example={"name": "rewards", "key": "rewards.py"}
    )
    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] | None = option(
        "Function in that file: takes prompts, completions and the row's columns as keyword arguments, returns a list of numbers.",
        default_text="reward",
        example="reward",
    )
    weight: Annotated[float, Field(ge=-1000, le=1000)] | None = option("Weight in the sum.", default=1.0, example=0.5)
    parameters: StringMap | None = option(
        "Parameters of a built-in, as strings. Default: none.", example={"pattern": "^Answer: "}
    )


class Trainer(Group):
    """`spec.trainer`."""

    type: TrainerType | None = option("Objective.", default="sft", example="dpo")
    backend: Backend | None = option(
        "`unsloth` selects the tuned single-GPU path.", default="transformers", example="transformers"
    )
    max_completion_length: Annotated[int, Field(ge=1, le=1048576)] | None = option(
        "Longest completion in tokens (dpo: truncation, grpo: generation).", default=512, example=512
    )
    dpo: Dpo | None = option("Options of dpo, kto and orpo. Default: the values of its fields.", example={"beta": 0.1})
    grpo: Grpo | None = option("Options of grpo. Default: the values of its fields.", example={"numGenerations": 8})
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=32)] | None = option(
        "Reward functions of grpo. Required with grpo.",
        example=[{"builtin": "regex", "parameters": {"pattern": "^Answer: "}}],
    )
