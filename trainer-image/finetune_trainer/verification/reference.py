"""Defines the file of reference values: log-probabilities of some rows, which the trained model computed in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from finetune_api.base import LenientModel
from pydantic import Field

from finetune_trainer.data.images import load_image
from finetune_trainer.data.rows import ImageFile

FILE_NAME = "reference-values.json"
"""Name of the file in the trainer's output folder."""
MANIFEST_KEY = "referenceValues"
"""Name under which the model's manifest contains the file's sha256."""
STORED_KEY = "run/reference-values-{digest}.json"
"""Key of the file in storage. The file is not stored in the model's folder, because it contains rows of the user's data."""


class ReferenceRow(LenientModel):
    """One row, and the values that the trained model computed for it."""

    ids: list[int] = Field(description="Token ids.")
    images: list[str] = Field(default_factory=list, description="The files of the row's images, in base64.")
    is_counted: list[bool] = Field(description="For each token, whether its probability is a value of the row. Empty for models with a score head.")
    values: list[float] = Field(default_factory=list, description="Log-probability (nats) of each counted token, or one score, if the row is computed alone.")
    batched_values: list[float] = Field(default_factory=list, description="Like `values`, but computed in one padded batch with all rows.")

    def decode_images(self) -> list[Any]:
        """Return the images of the row. Errors: RowError ImageUnreadable."""
        return [load_image(ImageFile(content=base64.b64decode(image))) for image in self.images]


class TrainedAdapter(LenientModel):
    """The settings of the adapter that was trained."""

    peft_type: str = Field(description="PEFT's name of the method, such as LORA.")
    scaling: dict[str, float] = Field(default_factory=dict, description="Factor of the LoRA product B A of each adapted module, by the module's name.")
    changes_output: bool | None = Field(default=None, description="Whether the adapter changed the values of the rows. None if it was not measured.")


class ReferenceValues(LenientModel):
    """The contents of `reference-values.json`: what the stage `verifying` needs in addition to the stored model and the base model."""

    version: int = 1
    reason: str | None = Field(default=None, description="Why there are no reference values. None if there are reference values.")
    head: str = Field(default="causal", description="causal: log-probabilities of tokens. reward: one score for each row.")
    device: str = Field(default="", description="Type of the device that computed the values: cpu or cuda. Empty if the trainer did not record it.")
    trusts_code: bool = Field(default=False, description="Whether the training ran code from the repository of the model.")
    dtype: str = Field(default="float32", description="Number format of the base model's weights.")
    autocast: str | None = Field(default=None, description="Number format of torch's autocast; None without autocast.")
    attention: str = Field(default="sdpa", description="Attention implementation of transformers.")
    quantization: dict[str, Any] | None = Field(default=None, description="Quantisation of the base model, as in its config.json.")
    is_tf32: bool = Field(default=False, description="Whether matrix products in 32 bits rounded their inputs to TF32.")
    pad_token_id: int = 0
    tokenizer_length: int = Field(default=0, description="Number of tokens in the tokenizer, including added tokens.")
    chat_template_sha256: str | None = Field(default=None, description="sha256 of the tokenizer's chat template; None without a template.")
    architecture: str = Field(default="", description="Class of the base model.")
    reads_images: bool = Field(default=False, description="Whether the model is a vision-language model.")
    adapter: TrainedAdapter | None = None
    rows: list[ReferenceRow] = Field(default_factory=list)

    @property
    def is_exact(self) -> bool:
        """Whether the values were computed in 32 bits without rounding to another format."""
        return self.dtype == "float32" and self.autocast is None and not self.is_tf32 and self.quantization is None

    def values(self) -> list[float]:
        """Return the values of all rows, one row after the other."""
        return [value for row in self.rows for value in row.values]

    def batched_values(self) -> list[float]:
        """Return the values of all rows that were computed in one batch, one row after the other."""
        return [value for row in self.rows for value in row.batched_values]

    def to_bytes(self) -> bytes:
        """Return the contents of the file. The name of the file in storage contains the beginning of the sha256 of these contents."""
        return json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":")).encode()


def hash_text(text: str | None) -> str | None:
    """Return the sha256 (hex) of a text without white space at its ends. None if the text is None or empty."""
    return None if not text else hashlib.sha256(text.strip().encode()).hexdigest()


def reference_values_key(digest: str) -> str:
    """Return the key in storage of the reference values whose file has the sha256 `digest`."""
    return STORED_KEY.format(digest=digest[:16])


def select_counted_values(values: Sequence[Sequence[float]], rows: Sequence[ReferenceRow]) -> list[list[float]]:
    """Return the values of the counted tokens of each row. `values`: for each row, one value for each token after the first."""
    return [
        [value for value, is_counted in zip(row_values, row.is_counted[1:], strict=True) if is_counted]
        for row_values, row in zip(values, rows, strict=True)
    ]
