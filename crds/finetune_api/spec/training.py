"""`spec.training`, `spec.distributed` and `spec.checkpoint`: how the optimiser runs, on how many ranks, and what is kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import Group, option
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
    """`training.earlyStopping`: end when the validation loss no longer falls."""

    patience: Annotated[int, Field(ge=1, le=10000)] | None = option(
        "Evaluations without improvement before the run ends.", default=3, example=3
    )
    threshold: Annotated[float, Field(ge=0, le=1000)] | None = option(
        "Smallest improvement of the loss that counts.", default=0.0, example=0.001
    )


class Training(Group):
    """`spec.training`."""

    cel = (
        (
            "!(has(self.warmupSteps) && has(self.warmupRatio))",
            "training.warmupSteps and training.warmupRatio exclude each other: remove one",
        ),
    )

    epochs: Annotated[float, Field(gt=0, le=100000)] | None = option(
        "Passes over the training data.", default=3, example=3
    )
    max_steps: Annotated[int, Field(ge=1, le=1000000000)] | None = option(
        "Optimizer steps; wins over epochs. Default: none, epochs decide.", example=500
    )
    batch_size_per_device: Annotated[int, Field(ge=1, le=65536)] | None = option(
        "Micro-batch: rows per rank and forward pass.", default=4, example=4
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = option(
        "Micro-batches per optimizer step.", default=4, example=4
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = option(
        "Peak learning rate.",
        default_text="2e-4 (adapters), 2e-5 (full, spectrum), 5e-6 (dpo, kto, orpo), 1e-6 (grpo)",
        example=2e-4,
    )
    scheduler: Scheduler | None = option("Course of the learning rate.", default="cosine", example="linear")
    scheduler_parameters: StringMap | None = option(
        "Parameters of the scheduler, as strings. Default: none.", example={"min_lr_rate": "0.1"}
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1000000000)] | None = option(
        "Optimizer steps in which the rate rises. Default: warmupRatio decides.", example=10
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Fraction of all steps in which the rate rises.", default_text="0.03, unless warmupSteps is given", example=0.03
    )
    max_grad_norm: Annotated[float, Field(ge=0, le=1000000)] | None = option(
        "Gradients are clipped to this norm; 0: no clipping.", default=1.0, example=1.0
    )
    optimizer: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=64)] | None = option(
        "Optimizer, by its transformers name.", default="adamw_torch_fused", example="paged_adamw_8bit"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = option("First moment's decay.", default=0.9, example=0.9)
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Second moment's decay.", default=0.999, example=0.95
    )
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] | None = option(
        "Added to the denominator.", default=1e-8, example=1e-8
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = option("Weight decay.", default=0.0, example=0.01)
    mixed_precision: MixedPrecision | None = option(
        "Type of the forward pass; auto: bf16 where the GPU can, fp16 on older ones, none on CPU.",
        default="auto",
        example="bf16",
    )
    gradient_checkpointing: GradientCheckpointing | None = option(
        "Recompute activations instead of keeping them; `unsloth` moves them to host memory.",
        default_text="enabled on GPU, disabled on CPU and for prefixTuning",
        example="enabled",
    )
    checkpoint_every_n_layers: Annotated[int, Field(ge=1, le=1024)] | None = option(
        "Recompute only every n-th layer, with gradientCheckpointing enabled.", default=1, example=2
    )
    group_by_length: bool | None = option("Put rows of similar length into one batch.", default=False, example=True)
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000)] | None = option(
        "NEFTune: noise on the embeddings. Default: none.", example=5
    )
    seed: Annotated[int, Field(ge=0, le=4294967295)] | None = option(
        "Seed of everything random.", default=42, example=42
    )
    device: Device | None = option("Device; mps is for local runs only.", default="auto", example="auto")
    early_stopping: EarlyStopping | None = option(
        "End when the validation loss no longer falls. Default: none.", example={"patience": 3}
    )


class Deepspeed(Group):
    """`distributed.deepspeed`."""

    config_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with a DeepSpeed JSON; `auto` values are filled in. Default: none.",
        example={"name": "ds", "key": "zero2.json"},
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = option(
        "What is sharded: 1 optimizer, 2 and gradients, 3 and parameters.", default_text="the JSON's, else 2", example=2
    )
    offload_optimizer: bool | None = option("Keep optimizer state in host memory.", default=False, example=True)
    offload_parameters: bool | None = option("Keep parameters in host memory (stage 3).", default=False, example=True)


class Fsdp(Group):
    """`distributed.fsdp`: fully sharded data parallel, version 2."""

    sharding: FsdpSharding | None = option("What is sharded.", default="fullShard", example="fullShard")
    state_dict: FsdpStateDict | None = option(
        "Shape of the optimizer state in checkpoints.", default="sharded", example="sharded"
    )
    config_ref: ConfigMapKeyRef | None = option(
        "ConfigMap key with an accelerate configuration. Default: none.",
        example={"name": "accelerate", "key": "fsdp.yaml"},
    )


class Distributed(Group):
    """`spec.distributed`. How many nodes and GPUs stands in `resources`."""

    strategy: Strategy | None = option(
        "How ranks work together.", default_text="ddp with several ranks, else none", example="fsdp"
    )
    deepspeed: Deepspeed | None = option(
        "Options of DeepSpeed. Default: the values of its fields.", example={"zeroStage": 2}
    )
    fsdp: Fsdp | None = option("Options of FSDP. Default: the values of its fields.", example={"sharding": "fullShard"})


class Checkpoint(Group):
    """`spec.checkpoint`."""

    strategy: When | None = option("When checkpoints are made.", default="steps", example="steps")
    steps: Annotated[int, Field(ge=1, le=1000000000)] | None = option(
        "Optimizer steps between checkpoints.", default=100, example=100
    )
    keep: Annotated[int, Field(ge=0, le=100000)] | None = option(
        "Checkpoints kept in storage; 0 keeps all. The best and the pinned come on top.", default=3, example=3
    )
    resume: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = option(
        "Where the first attempt starts: `auto` (newest healthy checkpoint of this job), `never`, or the URI of a checkpoint (`<root>/checkpoints/step-00000100`; the root may be `s3://`, `pvc://`, `file://` or `https://`).",
        default="auto",
        example="auto",
    )
    load_best_at_end: bool | None = option(
        "The final model is the checkpoint with the lowest validation loss.", default=False, example=True
    )
    pinned: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=64)] | None = option(
        "Steps whose checkpoints are never removed. Default: none.", example=[1000]
    )
