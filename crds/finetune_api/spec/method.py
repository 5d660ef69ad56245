"""`spec.method`: the fine-tuning method and its options."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, spec_field
from finetune_api.spec.common import ShortText, Source, make_one_of_validator
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, SpectrumMetric, TaskType


class Adapter(Group):
    """`method.adapter`: an existing adapter for further training."""

    source: Source | None = spec_field(
        "Location of the existing adapter. Accepts the same forms as `model.source`. Required with `method.type: adapter`.",
        default_text="none",
        example="s3://models/my-adapter",
    )


class Loftq(Group):
    """`method.lora.loftq`: parameters of the LoftQ initialisation. If this group is set, `init` is loftq."""

    bits: Annotated[int, Field(json_schema_extra={"enum": [2, 4, 8]}), make_one_of_validator(2, 4, 8)] | None = spec_field(
        "Bits per weight of the quantised base model: 2, 4 or 8. The initial adapter approximates the quantisation error.", default=4, example=4
    )
    iterations: Annotated[int, Field(ge=1, le=64)] | None = spec_field(
        "Number of iterations. Each iteration quantises the base model and approximates the quantisation error.", default=1, example=1
    )


class Lora(Group):
    """`method.lora`: options of low-rank adapters, for methods lora, qlora, dora and adapter."""

    rank: Annotated[int, Field(ge=1, le=4096)] | None = spec_field("Rank of the weight update.", default=16, example=64)
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = spec_field(
        "Scale of the weight update, which is multiplied by alpha / rank.", default=32, example=128
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = spec_field(
        "Dropout probability at the adapter's input.", default=0, example=0.1
    )
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=256)] | None = spec_field(
        "Names of modules with an adapter. `all-linear`: all linear layers except the output head and the routers of mixture-of-experts models.",
        default_text="`all-linear`",
        example=["q_proj", "v_proj"],
    )
    target_parameters: Annotated[list[ShortText], Field(min_length=1, max_length=64)] | None = spec_field(
        "Names of parameters with an adapter, in addition to targetModules. `all-experts`: the weights of all routed experts of a mixture-of-experts model, which are not linear layers.",
        default_text="none",
        example=["all-experts"],
        since="0.2.0",
    )
    modules_to_save: Annotated[list[ShortText], Field(max_length=64)] | None = spec_field(
        "Modules whose weights are fully trained and saved with the adapter. To train the output head, name the head in this field and not in targetModules.",
        default_text="none",
        example=["lm_head"],
    )
    bias: LoraBias | None = spec_field("Which biases of the model are trained.", default="none", example="loraOnly")
    task_type: TaskType | None = spec_field("Task of the model.", default="causalLM", example="causalLM")
    rank_stabilized: bool | None = spec_field(
        "Scale the weight update by alpha / sqrt(rank) (rsLoRA).", default=False, example=True
    )
    use_dora: bool | None = spec_field(
        "Train magnitude and direction of each weight separately (DoRA), as with `method.type: dora`.",
        default_text="true with method dora, otherwise false",
        example=True,
    )
    plus_ratio: Annotated[float, Field(ge=1, le=1024)] | None = spec_field(
        "LoRA+: ratio of the learning rate of the B matrices to the learning rate of the A matrices. 1 turns LoRA+ off.", default=1, example=16
    )
    init: LoraInit | None = spec_field("Initialisation of the adapter.", default="default", example="pissa")
    loftq: Loftq | None = spec_field(
        "Parameters of the LoftQ initialisation. If this group is set, `init` is loftq.",
        default_text="none",
        example={"bits": 4},
    )


class Vision(Group):
    """`method.vision`: which layers and modules of a vision-language model are trained."""

    vision_layers: bool | None = spec_field("Train the vision layers, and the layers that connect them to the language model.", default=False, example=True)
    language_layers: bool | None = spec_field("Train the language layers.", default=True, example=False)
    attention_modules: bool | None = spec_field("Train the attention modules of the trained layers.", default=True, example=False)
    mlp_modules: bool | None = spec_field("Train the MLP modules of the trained layers.", default=True, example=False)


class Spectrum(Group):
    """`method.spectrum`: options of method spectrum."""

    snr_threshold: Annotated[float, Field(ge=0, le=1)] | None = spec_field(
        "Fraction of the modules of each kind that is frozen. With 0.25, the 75 % of the modules with the highest signal-to-noise ratio are trained.", default=0.5, example=0.25
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1024)] | None = spec_field(
        "Numbers of the trained layers; the first layer is 0. If layers is set, the trainer does not measure the signal-to-noise ratio.", default_text="all layers are measured", example=[0, 1, 10]
    )
    metric: SpectrumMetric | None = spec_field(
        "How the signal-to-noise ratio is computed.", default="marchenkoPastur", example="meanOverStd"
    )


class Method(Group):
    """`spec.method`: the fine-tuning method and its options."""

    type: MethodType | None = spec_field("Fine-tuning method.", default="lora", example="qlora")
    lora: Lora | None = spec_field(
        "Options of low-rank adapters, for methods lora, qlora, dora and adapter.",
        default_text="the defaults of the fields",
        example={"rank": 64, "alpha": 128},
    )
    adapter: Adapter | None = spec_field(
        "Existing adapter for further training. Required with `method.type: adapter`.",
        default_text="none",
        example={"source": "s3://models/my-adapter"},
    )
    spectrum: Spectrum | None = spec_field(
        "Options of method spectrum.", default_text="the defaults of the fields", example={"snrThreshold": 0.25}
    )
    vision: Vision | None = spec_field(
        "Which layers and modules of a vision-language model are trained.", default_text="the defaults of the fields", example={"visionLayers": True}
    )
    prompt_length: Annotated[int, Field(ge=1, le=4096)] | None = spec_field(
        "Number of virtual tokens, for methods prefixTuning and promptTuning.", default=20, example=50
    )
