"""`spec.training`, `spec.distributed` and `spec.checkpoint`: optimizer, distributed strategy, and checkpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.patterns import OPTIMIZER_NAME
from finetune_api.spec.common import ConfigMapKeyRef, StringMap
from finetune_api.spec.enums import (
    Device,
    FsdpSharding,
    FsdpStateDict,
    GradientCheckpointing,
    IntervalStrategy,
    LearningRateSchedule,
    MixedPrecision,
    StrategyType,
)


class EarlyStopping(Group):
    """`training.earlyStopping`: end training if the validation loss no longer falls."""

    patience: Annotated[int, Field(ge=1, le=10000)] | None = spec_field(
        "Number of consecutive evaluations without improvement after which training ends.", default=3, example=5
    )
    threshold: Annotated[float, Field(ge=0, le=1000)] | None = spec_field(
        "Smallest decrease of the validation loss that counts as improvement, in nats per token.",
        default=0.0,
        example=0.001,
    )


class Training(Group):
    """`spec.training`: optimizer, schedule, batch size and precision."""

    cel = (
        CelRule(
            "!(has(self.warmupSteps) && has(self.warmupRatio))",
            "training.warmupSteps and training.warmupRatio exclude each other: remove one of the two",
            "WarmupTwice",
        ),
    )

    epochs: Annotated[float, Field(gt=0, le=100000)] | None = spec_field(
        "Number of passes over the training data.", default=3, example=1
    )
    max_steps: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Number of optimizer steps. If this field is set, epochs has no effect.", default_text="none; epochs sets the number", example=500
    )
    batch_size_per_device: Annotated[int, Field(ge=1, le=65536)] | None = spec_field(
        "Micro-batch size: rows per rank in one forward pass. If this field is not set, the preparation may choose another value than the default.", default=4, example=8
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] | None = spec_field(
        "Micro-batches per optimizer step. If this field is not set, the preparation may choose another value than the default.", default=4, example=8
    )
    effective_batch_size: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Rows per optimizer step on all ranks together. batchSizePerDevice and gradientAccumulationSteps are computed from this number: the preparation chooses "
        "values that fit into GPU memory and are fast; without a preparation, the micro-batch has at most 4 rows. The number must be divisible by the number of ranks (ranks that share each sequence count as one). "
        "If you set batchSizePerDevice or gradientAccumulationSteps, effectiveBatchSize must also be divisible by the value that you set.",
        default_text="batchSizePerDevice x gradientAccumulationSteps x ranks",
        example=64,
        since="0.2.0",
    )
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = spec_field(
        "Peak learning rate.",
        default_text="2e-4 for adapters, 2e-5 for full and spectrum, 5e-6 for dpo, kto and orpo, 1e-6 for grpo",
        example=1e-4,
    )
    scheduler: LearningRateSchedule | None = spec_field(
        "Learning rate schedule after the warm-up.", default="cosine", example="linear"
    )
    scheduler_parameters: StringMap | None = spec_field(
        "Parameters of the scheduler. All values are strings.", default_text="none", example={"min_lr_rate": "0.1"}
    )
    warmup_steps: Annotated[int, Field(ge=0, le=1000000000)] | None = spec_field(
        "Number of optimizer steps of the warm-up.",
        default_text="none; warmupRatio sets the number",
        example=10,
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = spec_field(
        "Optimizer steps of the warm-up, as a fraction of all optimizer steps.",
        default_text="0.03 if warmupSteps is absent",
        example=0.1,
    )
    max_grad_norm: Annotated[float, Field(ge=0, le=1000000)] | None = spec_field(
        "Maximum norm of the gradient. A larger gradient is clipped to this norm. 0 turns clipping off.", default=1.0, example=0.5
    )
    optimizer: Annotated[str, StringConstraints(pattern=OPTIMIZER_NAME, max_length=64)] | None = spec_field(
        "Name of the optimizer, as in transformers.", default="adamw_torch_fused", example="paged_adamw_8bit"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = spec_field(
        "Decay rate of Adam's first moment.", default=0.9, example=0.95
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = spec_field(
        "Decay rate of Adam's second moment.", default=0.999, example=0.95
    )
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] | None = spec_field(
        "Constant in Adam's denominator.", default=1e-8, example=1e-6
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = spec_field(
        "Weight decay coefficient.", default=0.0, example=0.01
    )
    mixed_precision: MixedPrecision | None = spec_field("Data type of the forward pass.", default="auto", example="bf16")
    gradient_checkpointing: GradientCheckpointing | None = spec_field(
        "Whether activations are recomputed in the backward pass to save GPU memory. If this field is not set, the preparation may choose another value than the default.",
        default_text=(
            "on GPU: enabled, except for activations that the trainer expects to fit into GPU memory; on CPU and for prefixTuning: disabled"
        ),
        example="disabled",
    )
    checkpoint_every_n_layers: Annotated[int, Field(ge=1, le=1024)] | None = spec_field(
        "Recompute only the activations of every n-th layer. Requires that gradientCheckpointing is not disabled.", default=1, example=2
    )
    group_by_length: bool | None = spec_field("Put rows of similar length into one batch.", default=False, example=True)
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=1000)] | None = spec_field(
        "Scale of the NEFTune noise that is added to the embeddings.", default_text="no noise", example=5
    )
    seed: Annotated[int, Field(ge=0, le=4294967295)] | None = spec_field(
        "Seed of all random number generators.", default=42, example=7
    )
    device: Device | None = spec_field("Device to train on.", default="auto", example="cpu")
    early_stopping: EarlyStopping | None = spec_field(
        "End training if the validation loss no longer falls.", default_text="none", example={"patience": 3}
    )


class Deepspeed(Group):
    """`distributed.deepspeed`: options of the distributed strategy DeepSpeed."""

    config_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains a DeepSpeed configuration in JSON. The trainer replaces `auto` values in this JSON.",
        default_text="none",
        example={"name": "deepspeed", "key": "zero2.json"},
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = spec_field(
        "ZeRO stage. 1 shards the optimizer state. 2 also shards gradients. 3 also shards parameters. 0 shards nothing.",
        default_text="the stage in the JSON of configRef, otherwise 2",
        example=3,
    )
    offload_optimizer: bool | None = spec_field("Keep the optimizer state in host memory.", default=False, example=True)
    offload_parameters: bool | None = spec_field(
        "Keep the parameters in host memory. Allowed only with zeroStage 3.", default=False, example=True
    )


class Fsdp(Group):
    """`distributed.fsdp`: options of the distributed strategy FSDP, version 2."""

    sharding: FsdpSharding | None = spec_field("Which tensors are sharded over the ranks.", default="fullShard", example="shardGradOp")
    state_dict: FsdpStateDict | None = spec_field(
        "Format of the optimizer state in checkpoints.", default="sharded", example="full"
    )
    config_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains an accelerate configuration.",
        default_text="none",
        example={"name": "accelerate", "key": "fsdp.yaml"},
    )


class Distributed(Group):
    """`spec.distributed`: the distributed strategy and its options. `spec.resources` sets the numbers of nodes and GPUs."""

    strategy: StrategyType | None = spec_field(
        "Distributed strategy.", default_text="ddp with several ranks (or fsdp, if the preparation chooses it), otherwise none", example="fsdp"
    )
    deepspeed: Deepspeed | None = spec_field(
        "Options of DeepSpeed.", default_text="the defaults of the fields", example={"zeroStage": 3}
    )
    fsdp: Fsdp | None = spec_field(
        "Options of FSDP.", default_text="the defaults of the fields", example={"sharding": "shardGradOp"}
    )
    context_parallel_size: Annotated[int, Field(ge=1, le=1024)] | None = spec_field(
        "Number of ranks that share each sequence, for sequences that do not fit on one GPU (Ulysses). Each rank computes a part of the tokens and, in the "
        "attention, a part of the heads. Allowed only with `strategy: deepspeed` and `trainer.type: sft`.",
        default_text="1",
        example=4,
        since="0.2.0",
    )


class Checkpoint(Group):
    """`spec.checkpoint`: when checkpoints are saved, how many are kept, and from which one the job resumes."""

    cel = (
        CelRule(
            "!has(self.resume) || self.resume in ['auto', 'never'] || self.resume.matches('^(s3|pvc|file|https)://')",
            "checkpoint.resume must be auto, never or the address of a checkpoint: write for example s3://bucket/.../checkpoints/step-00000100",
            "SourceInvalid",
        ),
    )

    strategy: IntervalStrategy | None = spec_field("When the trainer saves checkpoints.", default="steps", example="epoch")
    steps: Annotated[int, Field(ge=1, le=1000000000)] | None = spec_field(
        "Optimizer steps between checkpoints.", default=100, example=500
    )
    keep: Annotated[int, Field(ge=0, le=100000)] | None = spec_field(
        "Number of newest checkpoints that are kept in storage. 0: all checkpoints are kept. The best checkpoint and pinned checkpoints are always kept.",
        default=3,
        example=5,
    )
    resume: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = spec_field(
        "Checkpoint from which the first attempt starts: `auto` (the newest healthy checkpoint of this job), `never` (no checkpoint), or the URI "
        "of a checkpoint (`s3://`, `pvc://`, `file://` or `https://`), which ends with `/checkpoints/step-NNNNNNNN`.",
        default="auto",
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000100",
    )
    allow_pickle: bool | None = spec_field(
        "Allow resuming from a checkpoint of another job whose files can contain code. Checkpoints with strategies fsdp and deepspeed contain Python pickles, "
        "which can run code when they are loaded. True is required if resume is a URI and the strategy is fsdp or deepspeed.",
        default_text="false",
        example=True,
        since="0.2.0",
    )
    load_best_at_end: bool | None = spec_field(
        "Use the checkpoint with the lowest validation loss as the final model.", default=False, example=True
    )
    pinned: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=64)] | None = spec_field(
        "Optimizer steps of checkpoints that are never removed.", default_text="none", example=[1000]
    )
