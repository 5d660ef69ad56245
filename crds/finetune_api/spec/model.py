"""`spec.model`: the base model and its loading options."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, spec_field
from finetune_api.spec.common import SecretKeyRef, ShortText, Source, StorageConnection, make_one_of_validator
from finetune_api.spec.enums import AttentionImplementation, ComputeDtype, Modality, QuantizationType, WeightDtype


class Quantization(Group):
    """`model.quantization`: quantisation of the base model with bitsandbytes."""

    bits: Annotated[int, Field(json_schema_extra={"enum": [4, 8]}), make_one_of_validator(4, 8)] | None = spec_field(
        "Bits per weight of the frozen base model: 4 or 8.",
        default_text="4 with method qlora, otherwise no quantisation",
        example=4,
    )
    type: QuantizationType | None = spec_field("Number format of the 4-bit weights.", default="nf4", example="fp4")
    compute_dtype: ComputeDtype | None = spec_field(
        "Data type in which the quantised layers compute matrix products.", default_text="bfloat16 on GPU, float32 on CPU", example="float16"
    )
    double_quant: bool | None = spec_field(
        "Also quantise the quantisation constants, which saves about 0.4 bits per weight. Only with 4 bits.",
        default=True,
        example=False,
    )


class Model(Group):
    """`spec.model`: the base model and its loading options."""

    source: Source | None = spec_field(
        "Base model: `org/name[@revision]` or `hf://org/name[@revision]` (hub), `s3://bucket/prefix`, `pvc://claim/path`, "
        "`file:///path` (in the image), or a FineTuneJob's result on a web server: `https://host/jobs/model` or "
        "`https://host/jobs/checkpoints/step-00000100`. Required.",
        default_text="none",
        example="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    tokenizer: Source | None = spec_field(
        "Location of the tokenizer. Accepts the same forms as `model.source`.", default_text="model.source", example="s3://models/tokenizer"
    )
    token_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains a hub token. Private and gated models need a token.", default_text="none", example={"name": "hub", "key": "token"}
    )
    storage: StorageConnection | None = spec_field(
        "Connection to the store of an `s3://` model. For an `https://` model, only caBundleRef is used.",
        default_text="spec.storage",
        example={"endpoint": "https://s3.example.com"},
    )
    trust_remote_code: bool | None = spec_field(
        "Run Python code from the model's repository. Write true only for repositories that you trust.", default=False, example=True
    )
    dtype: WeightDtype | None = spec_field("Data type of the loaded weights.", default="auto", example="bfloat16")
    attention: AttentionImplementation | None = spec_field(
        "Attention implementation. If this implementation is not available, the trainer uses the implementation that `auto` selects. status.resolved.attention shows the implementation in use.",
        default="auto",
        example="flashAttention2",
    )
    liger_kernels: bool | None = spec_field(
        "Compute the layers of the model with Liger's fused kernels, which are faster and need less GPU memory. With true, a run that cannot use "
        "the kernels ends with an error. Only on GPUs.",
        default_text="true with trainer.backend unsloth. With other backends, the trainer uses the kernels on an NVIDIA GPU if Liger is installed and "
        "this release has compared the kernels with the layers of the model's type; status.resolved.notes shows the choice",
        example=False,
    )
    quantization: Quantization | None = spec_field(
        "Quantisation of the frozen base model.", default_text="none", example={"bits": 4}
    )
    pad_token: ShortText | None = spec_field(
        "Padding token. `<eos>` means the end-of-sequence token. The loss does not include padding tokens.",
        default_text="the tokenizer's pad token, otherwise a reserved token",
        example="<pad>",
    )
    new_tokens: Annotated[list[ShortText], Field(max_length=1024)] | None = spec_field(
        "Tokens that are added to the vocabulary. The embeddings of the added tokens are trained.",
        default_text="none",
        example=["<think>", "</think>"],
    )
    cache: Source | None = spec_field(
        "Cache of the base model: `pvc://claim/path` (a volume that the jobs of the namespace share), `node` (the platform's cache on each node) or `none`. "
        "The first job that needs a model downloads it into the cache. A cache is possible only for models on the hub and in S3. If the cache fails, each pod downloads the model itself.",
        default_text="the operator's configuration, or none", example="pvc://model-cache/hub",
    )
    modality: Modality | None = spec_field("Kind of model.", default="text", example="text")
