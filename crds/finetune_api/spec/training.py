"""`spec.training`, `spec.distributed` and `spec.checkpoint`: the optimizer, the ranks, and the checkpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import CelRule, Group, option
from finetune_api.spec.common import ConfigMapKeyRef, StringMap
from finetune_api.spec.enums import (
    Device,
    FsdpSharding,
    FsdpStateDict,
    GradientCheckpointing,
    MixedPrecision,
    Scheduler,
    Strategy,
    When,
)


class EarlyStopping(Group):
    """`training.earlyStopping`: end training when the validation loss stops falling."""

    patience: Annotated[int, Field(ge=1, le=10000)] | None = option(
        "Evaluations without improvement before training ends.", default=3, example=5
    )
    threshold: Annotated[float, Field(ge=0, le=1000)] | None = option(
        "Smallest decrease of the validation loss that counts as improvement, in nats per token.",
        default=0.0,
        example=0.001,
    )


class Training(Group):
    """`spec.training`."""

    cel = (
        CelRule(
            "!(has(self.warmupSteps) && has(self.warmupRatio))",
            "training.warmupSteps and training.warmupRatio exclude each other: remove one",
            "WarmupTwice",
        ),
    )

    epochs: Annotated[float, Field(gt=0, le=100000)] | None = option(
        "Passes over the training data.", default=3, example=1
    )
    max_steps: Annotated[int, Field(ge=1, le=1000000000)] | None = option(
        "Optimizer steps. Takes precedence over epochs.", default_text="none: epochs decides", example=500
    )
    batch_size_per_device: Annotated[int, Field(ge=1, le=65536)] | None = option(
        "Micro-batch size: rows per rank in one forward pass.", default=4, example=8
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = option(
        "Micro-batches per optimizer step.", default=4, example=8
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = option(
        "Peak learning rate.",
        default_text="2e-4 (adapters), 2e-5 (full, spectrum), 5e-6 (dpo, kto, orpo), 1e-6 (grpo)",
        example=1e-4,
    )
    scheduler: Scheduler | None = option(
        "How the learning rate changes after the warm-up.", default="cosine", example="linear"
    )
    scheduler_parameters: StringMap | None = option(
        "Parameters of the scheduler, as strings.", default_text="none", example={"min_lr_rate": "0.1"}
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1000000000)] | None = option(
        "Optimizer steps in which the learning rate rises to its peak.",
        default_text="none: warmupRatio decides",
        example=10,
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Fraction of all steps in which the learning rate rises to its peak.",
        default_text="0.03, unless warmupSteps is given",
        example=0.1,
    )
    max_grad_norm: Annotated[float, Field(ge=0, le=1000000)] | None = option(
        "Norm that gradients are clipped to; 0 turns clipping off.", default=1.0, example=0.5
    )
    optimizer: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=64)] | None = option(
        "Optimizer, by its name in transformers.", default="adamw_torch_fused", example="paged_adamw_8bit"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Decay rate of Adam's first moment.", default=0.9, example=0.95
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Decay rate of Adam's second moment.", default=0.999, example=0.95
    )
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] | None = option(
        "Constant in Adam's denominator.", default=1e-8, example=1e-6
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = option(
        "Weight decay coefficient.", default=0.0, example=0.01
    )
    mixed_precision: MixedPrecision | None = option("Data type of the forward pass.", default="auto", example="bf16")
    gradient_checkpointing: GradientCheckpointing | None = option(
        "Whether activations are recomputed to save memory.",
        default_text="enabled on GPU, disabled on CPU and for prefixTuning",
        example="disabled",
    )
    checkpoint_every_n_layers: Annotated[int, Field(ge=1, le=1024)] | None = option(
        "Recompute the activations of every n-th layer only. Requires gradientCheckpointing.", default=1, example=2
    )
    group_by_length: bool | None = option("Put rows of similar length into one batch.", default=False, example=True)
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000)] | None = option(
        "Scale of NEFTune noise on the embeddings.", default_text="none: no noise", example=5
    )
    seed: Annotated[int, Field(ge=0, le=4294967295)] | None = option(
        "Seed of all random number generators.", default=42, example=7
    )
    device: Device | None = option("Device to train on.", default="auto", example="cpu")
    early_stopping: EarlyStopping | None = option(
        "End training when the validation loss stops falling.", default_text="none", example={"patience": 3}
    )


class Deepspeed(Group):
    """`distributed.deepspeed`."""

    config_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with a DeepSpeed configuration in JSON. Its `auto` values are filled in.",
        default_text="none",
        example={"name": "deepspeed", "key": "zero2.json"},
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = option(
        "What ZeRO shards. 0: nothing. 1: optimizer state. 2: also gradients. 3: also parameters.",
        default_text="the stage in the JSON, else 2",
        example=3,
    )
    offload_optimizer: bool | None = option("Keep the optimizer state in host memory.", default=False, example=True)
    offload_parameters: bool | None = option(
        "Keep the parameters in host memory. Stage 3 only.", default=False, example=True
    )


class Fsdp(Group):
    """`distributed.fsdp`: fully sharded data parallel, version 2."""

    sharding: FsdpSharding | None = option("What is sharded.", default="fullShard", example="shardGradOp")
    state_dict: FsdpStateDict | None = option(
        "How checkpoints store the optimizer state.", default="sharded", example="full"
    )
    config_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with an accelerate configuration.",
        default_text="none",
        example={"name": "accelerate", "key": "fsdp.yaml"},
    )


class Distributed(Group):
    """`spec.distributed`. `spec.resources` sets the number of nodes and GPUs."""

    strategy: Strategy | None = option(
        "How ranks share the work.", default_text="ddp with several ranks, else none", example="fsdp"
    )
    deepspeed: Deepspeed | None = option(
        "Options of DeepSpeed.", default_text="the values of its fields", example={"zeroStage": 3}
    )
    fsdp: Fsdp | None = option(
        "Options of FSDP.", default_text="the values of its fields", example={"sharding": "shardGradOp"}
    )


class Checkpoint(Group):
    """`spec.checkpoint`."""

    strategy: When | None = option("When checkpoints are saved.", default="steps", example="epoch")
    steps: Annotated[int, Field(ge=1, le=1000000000)] | None = option(
        "Optimizer steps between checkpoints.", default=100, example=500
    )
    keep: Annotated[int, Field(ge=0, le=100000)] | None = option(
        "Number of newest checkpoints kept in storage, in addition to the best and the pinned ones; 0 keeps all.",
        default=3,
        example=5,
    )
    resume: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = option(
        "State that the first attempt starts from: `auto` (the newest healthy checkpoint of this job), `never`, or the URI of a "
        "checkpoint, `<root>/checkpoints/step-00000100`, whose root is `s3://`, `pvc://`, `file://` or `https://`.",
        default="auto",
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000100",
    )
    load_best_at_end: bool | None = option(
        "Use the checkpoint with the lowest validation loss as the final model.", default=False, example=True
    )
    pinned: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=64)] | None = option(
        "Optimizer steps whose checkpoints are never removed.", default_text="none", example=[1000]
    )
