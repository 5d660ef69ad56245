"""`spec.trainer`: the training objective."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.patterns import IDENTIFIER, NO_SPACE
from finetune_api.spec.cluster import CpuQuantity, SizeQuantity
from finetune_api.spec.common import ConfigMapKeyRef, ShortText, Source, StringMap
from finetune_api.spec.enums import BuiltinReward, DpoLoss, GenerationBackend, GrpoLoss, TrainerBackend, TrainerType


class Dpo(Group):
    """`trainer.dpo`: options of dpo. Of these options, kto uses only beta and referenceModel, and orpo uses only beta."""

    beta: Annotated[float, Field(gt=0, le=100)] | None = spec_field(
        "Strength of the regularisation towards the reference model.", default=0.1, example=0.3
    )
    loss_types: Annotated[list[DpoLoss], Field(min_length=1, max_length=8)] | None = spec_field(
        "Loss functions. The training loss is the sum of these functions.", default=["sigmoid"], example=["sigmoid", "sft"]
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = spec_field(
        "Assumed probability (below 0.5) that the labels of a pair are swapped.", default=0.0, example=0.1
    )
    reference_model: Source | None = spec_field(
        "Location of the reference model. Accepts the same forms as `model.source`.",
        default_text="the untrained model",
        example="s3://models/sft",
    )


class Generation(Group):
    """`trainer.grpo.generation`: the program that generates the completions. All fields except `backend` have an effect only with `backend: vllm`."""

    backend: GenerationBackend | None = spec_field(
        "The program that generates the completions.", default="transformers", example="vllm", since="0.2.0"
    )
    image: Annotated[str, StringConstraints(pattern=NO_SPACE, max_length=512)] | None = spec_field(
        "Image of the vLLM server.", default_text="`trainer.generationImage` of the operator's configuration",
        example="registry.example.com/finetune-vllm:0.2.0", since="0.2.0",
    )  # fmt: skip
    gpus: Annotated[int, Field(ge=0, le=64)] | None = spec_field(
        "Number of GPUs of the server, in addition to `resources.gpusPerNode`. The server divides the model among these GPUs. 0 only for a job on CPUs.",
        default=1, example=2, since="0.2.0",
    )  # fmt: skip
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = spec_field(
        "Share of each GPU's memory that the server uses for weights and cache.", default=0.9, example=0.8, since="0.2.0"
    )
    cpu: CpuQuantity | None = spec_field("CPU request of the server.", default="2", example="8", since="0.2.0")
    memory: SizeQuantity | None = spec_field(
        "Memory request and limit of the server, including its /dev/shm.", default="16Gi", example="64Gi", since="0.2.0"
    )
    start_timeout_seconds: Annotated[int, Field(ge=1, le=86400)] | None = spec_field(
        "If the server does not answer after this many seconds, the attempt fails.", default=1800, example=3600, since="0.2.0"
    )
    request_timeout_seconds: Annotated[int, Field(ge=1, le=86400)] | None = spec_field(
        "If the server does not answer a request within this many seconds, the attempt fails. One request generates all completions of an optimizer step.",
        default=1800, example=600, since="0.2.0",
    )  # fmt: skip


class Grpo(Group):
    """`trainer.grpo`: group relative policy optimisation."""

    num_generations: Annotated[int, Field(ge=2, le=1024)] | None = spec_field(
        "Number of completions that are generated for each prompt.", default=8, example=16
    )
    temperature: Annotated[float, Field(gt=0, le=10)] | None = spec_field("Sampling temperature.", default=1.0, example=0.9)
    top_p: Annotated[float, Field(gt=0, le=1)] | None = spec_field(
        "Nucleus sampling: sample only among the most likely tokens with this total probability.",
        default=1.0,
        example=0.95,
    )
    beta: Annotated[float, Field(ge=0, le=100)] | None = spec_field(
        "Weight of the KL divergence in the loss. With 0, no reference model is loaded.", default=0.0, example=0.04
    )
    loss_type: GrpoLoss | None = spec_field("How the losses of the tokens are averaged.", default="dapo", example="drGrpo")
    generation: Generation | None = spec_field(
        "The program that generates the completions.", default_text="the trainer itself", example={"backend": "vllm", "gpus": 1}, since="0.2.0"
    )


class Reward(Group):
    """One reward function: either a built-in reward, or a Python function in a ConfigMap."""

    cel = (
        CelRule(
            "has(self.builtin) != has(self.configMapRef)",
            "a reward needs exactly one of `builtin` and `configMapRef`",
            "RewardIncomplete",
        ),
    )

    name: ShortText | None = spec_field(
        "Name of the reward in metrics.", default_text="the name of the built-in reward or function", example="format"
    )
    builtin: BuiltinReward | None = spec_field("Name of a built-in reward.", default_text="none", example="regex")
    config_map_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains a Python file with the function.", default_text="none", example={"name": "rewards", "key": "rewards.py"}
    )
    function: Annotated[str, StringConstraints(pattern=IDENTIFIER, max_length=128)] | None = spec_field(
        "Name of the function in the file of configMapRef. The function has the keyword arguments prompts, completions and the columns of the "
        "data, and returns a list of numbers.",
        default_text="reward",
        example="score_answer",
    )
    weight: Annotated[float, Field(ge=-1000, le=1000)] | None = spec_field(
        "Factor of this reward in the sum of all rewards.", default=1.0, example=0.5
    )
    timeout_seconds: Annotated[int, Field(ge=1, le=86400)] | None = spec_field(
        "Maximum duration in seconds of one call of the function. One call scores all completions of one step on one rank. If this field is set, the "
        "function runs in its own process, and a failure message names the completion for which the function hangs or ends its process.",
        default_text="no limit; the function runs in the process of the rank",
        example=60,
        since="0.2.0",
    )
    parameters: StringMap | None = spec_field(
        "Parameters of a built-in reward. All values are strings.", default_text="none", example={"pattern": "^Answer: "}
    )


class Trainer(Group):
    """`spec.trainer`: the training objective and its options."""

    type: TrainerType | None = spec_field("Training objective.", default="sft", example="dpo")
    backend: TrainerBackend | None = spec_field("Implementation of the training loop.", default="transformers", example="unsloth")
    max_completion_length: Annotated[int, Field(ge=1, le=1048576)] | None = spec_field(
        "Maximum length of a completion in tokens. dpo, kto and orpo truncate longer completions; grpo stops generating a completion at this length.",
        default=512,
        example=1024,
    )
    dpo: Dpo | None = spec_field(
        "Options of dpo, kto and orpo.", default_text="the defaults of the fields", example={"beta": 0.3}
    )
    grpo: Grpo | None = spec_field(
        "Options of grpo.", default_text="the defaults of the fields", example={"numGenerations": 16}
    )
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=32)] | None = spec_field(
        "Reward functions of grpo. Required with grpo.",
        default_text="none",
        example=[{"builtin": "regex", "parameters": {"pattern": "^Answer: "}}],
    )
