"""`spec.method`: which parameters are trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, option
from finetune_api.spec.common import Source, Word
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, SpectrumMetric, TaskType


class Adapter(Group):
    """`method.adapter`: an existing adapter to go on training."""

    source: Source | None = option(
        "Adapter to continue, in the notations of model.source. Required with `method.type: adapter`.",
        example="s3://models/my-adapter",
    )


class Loftq(Group):
    """`method.lora.loftq`: parameters of LoftQ initialisation; giving them implies `init: loftq`."""

    bits: Annotated[int, Field(json_schema_extra={"enum": [2, 4, 8]})] | None = option(
        "Bits that the base is approximated in: 2, 4 or 8.", default=4, example=4
    )
    iterations: Annotated[int, Field(ge=1, le=64)] | None = option("Alternating iterations.", default=1, example=1)


class Lora(Group):
    """`method.lora`: low-rank adapters, also for qlora and dora."""

    rank: Annotated[int, Field(ge=1, le=4096)] | None = option("Rank of the update.", default=16, example=16)
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = option(
        "Scale of the update; it is multiplied by alpha / rank.", default=32, example=32
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = option(
        "Dropout before the adapter, as a fraction.", default=0.05, example=0.05
    )
    target_modules: Annotated[list[Word], Field(min_length=1, max_length=256)] | None = option(
        "Module names that get an adapter; `all-linear` means all linear layers but the head.",
        default_text="all-linear",
        example=["q_proj", "v_proj"],
    )
    modules_to_save: Annotated[list[Word], Field(max_length=64)] | None = option(
        "Modules trained in full beside the adapter (the head belongs here, not among targetModules). Default: none.",
        example=["lm_head"],
    )
    bias: LoraBias | None = option("Which biases are trained.", default="none", example="none")
    task_type: TaskType | None = option("Task of the model.", default="causalLM", example="causalLM")
    rank_stabilized: bool | None = option("Scale by alpha / sqrt(rank) instead (rsLoRA).", default=False, example=True)
    use_dora: bool | None = option(
        "Split weights into size and direction (DoRA); `method.type: dora` says the same.",
        default_text="true with method dora, else false",
        example=True,
    )
    plus_ratio: Annotated[float, Field(ge=1, le=1024)] | None = option(
        "LoRA+: the B matrices learn this many times faster. Default: 1, off.", default=1, example=16
    )
    init: LoraInit | None = option("How adapters start.", default="default", example="pissa")
    loftq: Loftq | None = option(
        "Parameters of LoftQ; giving them implies `init: loftq`. Default: none.", example={"bits": 4}
    )


class Vision(Group):
    """`method.vision`: parts of a vision-language model that are tuned."""

    vision_layers: bool | None = option("Tune the vision layers.", default=True, example=False)
    language_layers: bool | None = option("Tune the language layers.", default=True, example=True)
    attention_modules: bool | None = option("Tune attention modules.", default=True, example=True)
    mlp_modules: bool | None = option("Tune MLP modules.", default=True, example=True)


class Spectrum(Group):
    """`method.spectrum`: train the layers with the best signal-to-noise ratio in full, freeze the rest."""

    snr_threshold: Annotated[float, Field(ge=0, le=1)] | None = option(
        "Threshold t: of the modules of each kind the best 1 - t are trained, so a higher one trains fewer.",
        default=0.5,
        example=0.25,
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1024)] | None = option(
        "Layer numbers to train, from 0, instead of a scan. Default: scan.", example=[0, 1, 10]
    )
    metric: SpectrumMetric | None = option(
        "How signal and noise are told apart.", default="marchenkoPastur", example="meanOverStd"
    )


class Method(Group):
    """`spec.method`."""

    type: MethodType | None = option("Fine-tuning method.", default="lora", example="qlora")
    lora: Lora | None = option(
        "Low-rank adapters (lora, qlora, dora, adapter). Default: the values of its fields.", example={"rank": 16}
    )
    adapter: Adapter | None = option(
        "Existing adapter to continue. Required with `method.type: adapter`.",
        example={"source": "s3://models/my-adapter"},
    )
    spectrum: Spectrum | None = option(
        "Layer selection of method spectrum. Default: the values of its fields.", example={"snrThreshold": 0.25}
    )
    vision: Vision | None = option(
        "Parts of a vision-language model to tune. Default: none.", example={"visionLayers": False}
    )
    prompt_length: Annotated[int, Field(ge=1, le=4096)] | None = option(
        "Virtual tokens of prefix and prompt tuning.", default=20, example=20
    )
