"""`spec.method`: which parameters are trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, option
from finetune_api.spec.common import Source, Word, one_of
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, SpectrumMetric, TaskType


class Adapter(Group):
    """`method.adapter`: the adapter that is trained further."""

    source: Source | None = option(
        "Existing adapter, in the notations of model.source. Required with `method.type: adapter`.",
        default_text="none",
        example="s3://models/my-adapter",
    )


class Loftq(Group):
    """`method.lora.loftq`: parameters of the LoftQ initialisation. They imply `init: loftq`."""

    bits: Annotated[int, Field(json_schema_extra={"enum": [2, 4, 8]}), one_of(2, 4, 8)] | None = option(
        "Bits per weight of the quantised base whose error the adapter approximates: 2, 4 or 8.", default=4, example=4
    )
    iterations: Annotated[int, Field(ge=1, le=64)] | None = option(
        "Number of alternating quantisation and approximation steps.", default=1, example=1
    )


class Lora(Group):
    """`method.lora`: low-rank adapters, also for qlora and dora."""

    rank: Annotated[int, Field(ge=1, le=4096)] | None = option("Rank of the weight update.", default=16, example=64)
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = option(
        "The weight update is multiplied by alpha / rank.", default=32, example=128
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Dropout probability at the adapter's input.", default=0.05, example=0.1
    )
    target_modules: Annotated[list[Word], Field(min_length=1, max_length=256)] | None = option(
        "Names of the modules that get an adapter. `all-linear`: all linear layers except the output head.",
        default_text="`all-linear`",
        example=["q_proj", "v_proj"],
    )
    modules_to_save: Annotated[list[Word], Field(max_length=64)] | None = option(
        "Modules that are trained in full and saved with the adapter. The output head belongs here, not in targetModules.",
        default_text="none",
        example=["lm_head"],
    )
    bias: LoraBias | None = option("Which biases are trained.", default="none", example="loraOnly")
    task_type: TaskType | None = option("Task of the model.", default="causalLM", example="causalLM")
    rank_stabilized: bool | None = option(
        "Scale the weight update by alpha / sqrt(rank) (rsLoRA).", default=False, example=True
    )
    use_dora: bool | None = option(
        "Train magnitude and direction of each weight separately (DoRA); the same as `method.type: dora`.",
        default_text="true with method dora, else false",
        example=True,
    )
    plus_ratio: Annotated[float, Field(ge=1, le=1024)] | None = option(
        "LoRA+: learning rate of the B matrices divided by that of the A matrices; 1 turns LoRA+ off.", default=1, example=16
    )
    init: LoraInit | None = option("Initial values of the adapter.", default="default", example="pissa")
    loftq: Loftq | None = option(
        "Parameters of the LoftQ initialisation. They imply `init: loftq`.",
        default_text="none",
        example={"bits": 4},
    )


class Vision(Group):
    """`method.vision`: the parts of a vision-language model that are trained."""

    vision_layers: bool | None = option("Train the vision layers.", default=True, example=False)
    language_layers: bool | None = option("Train the language layers.", default=True, example=False)
    attention_modules: bool | None = option("Train the attention modules.", default=True, example=False)
    mlp_modules: bool | None = option("Train the MLP modules.", default=True, example=False)


class Spectrum(Group):
    """`method.spectrum`: train the modules with the highest signal-to-noise ratio in full and freeze the others."""

    snr_threshold: Annotated[float, Field(ge=0, le=1)] | None = option(
        "Fraction of the modules of each kind that stay frozen; 0.25 trains the best 75 %.", default=0.5, example=0.25
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1024)] | None = option(
        "Numbers of the layers to train, counted from 0, instead of a scan.", default_text="scan", example=[0, 1, 10]
    )
    metric: SpectrumMetric | None = option(
        "How the signal-to-noise ratio is measured.", default="marchenkoPastur", example="meanOverStd"
    )


class Method(Group):
    """`spec.method`."""

    type: MethodType | None = option("Fine-tuning method.", default="lora", example="qlora")
    lora: Lora | None = option(
        "Low-rank adapters (lora, qlora, dora, adapter).",
        default_text="the values of its fields",
        example={"rank": 64, "alpha": 128},
    )
    adapter: Adapter | None = option(
        "Existing adapter to train further. Required with `method.type: adapter`.",
        default_text="none",
        example={"source": "s3://models/my-adapter"},
    )
    spectrum: Spectrum | None = option(
        "Module selection of method spectrum.", default_text="the values of its fields", example={"snrThreshold": 0.25}
    )
    vision: Vision | None = option(
        "Parts of a vision-language model to train.", default_text="none", example={"visionLayers": False}
    )
    prompt_length: Annotated[int, Field(ge=1, le=4096)] | None = option(
        "Number of virtual tokens of prefix and prompt tuning.", default=20, example=50
    )
