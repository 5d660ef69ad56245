"""`spec.model`: what is tuned, and how it is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Group, option
from finetune_api.spec.common import SecretKeyRef, Source, StorageConnection, Word
from finetune_api.spec.enums import Attention, ComputeDtype, Dtype, Modality, QuantizationType


class Quantization(Group):
    """`model.quantization`: load the base in fewer bits (bitsandbytes)."""

    bits: Annotated[int, Field(json_schema_extra={"enum": [4, 8]})] | None = option(
        "Bits per weight of the frozen base: 4 or 8. Absent: not quantised. `method.type: qlora` means 4.",
        default_text="4 with method qlora, else none", example=4,
    )  # fmt: skip
    type: QuantizationType | None = option("4-bit data type.", default="nf4", example="nf4")
    compute_dtype: ComputeDtype | None = option(
        "Type that matrix products are computed in.", default_text="bfloat16 on GPU, float32 on CPU", example="bfloat16"
    )
    double_quant: bool | None = option(
        "Quantise the quantisation constants too (4-bit only; saves about 0.4 bits per weight).",
        default=True,
        example=True,
    )


class Model(Group):
    """`spec.model`."""

    source: Source | None = option(
        "Base model: `org/name[@revision]` or `hf://org/name@revision` (hub), `s3://bucket/prefix`, `pvc://claim/path`, `file:///path` (inside the image), or what a job committed and a web server serves: `https://host/jobs/model`, `https://host/jobs/checkpoints/step-00000100`. Required.",
        default_text="none, required", example="HuggingFaceTB/SmolLM2-135M-Instruct",
    )  # fmt: skip
    tokenizer: Source | None = option(
        "Source of the tokenizer, in the same notations.", default_text="model.source", example="s3://models/tokenizer"
    )
    token_secret_ref: SecretKeyRef | None = option(
        "Secret key with a hub token, for gated models and for pushes. Default: none.",
        example={"name": "hub", "key": "token"},
    )
    storage: StorageConnection | None = option(
        "Connection for an `s3://` model source; of an `https://` one only caBundleRef is used.",
        default_text="spec.storage",
        example={"endpoint": "https://s3.example.com"},
    )
    trust_remote_code: bool | None = option(
        "Run Python code that comes with the model. Only for sources you trust.", default=False, example=False
    )
    dtype: Dtype | None = option("Type the weights are loaded in.", default="auto", example="bfloat16")
    attention: Attention | None = option(
        "Attention implementation; one that is not present falls back to the best present one and status says so.",
        default="auto",
        example="sdpa",
    )
    liger_kernels: bool | None = option("Use Liger's fused kernels (GPU only).", default=False, example=True)
    quantization: Quantization | None = option("Quantisation of the frozen base. Default: none.", example={"bits": 4})
    pad_token: Word | None = option(
        "Token that fills short rows; `<eos>` takes the end-of-sequence token. It is never trained on.",
        default_text="the tokenizer's own, else a reserved one",
        example="<pad>",
    )
    new_tokens: Annotated[list[Word], Field(max_length=1024)] | None = option(
        "Tokens added to the vocabulary; their embeddings are trained. Default: none.", example=["<think>", "</think>"]
    )
    cache: Source | None = option(
        "Volume that downloaded models are kept in, as `pvc://claim/path`. Default: none.",
        example="pvc://model-cache/hub",
    )
    modality: Modality | None = option("Kind of model.", default="text", example="text")
