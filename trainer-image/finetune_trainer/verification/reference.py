"""The file of reference values: log-probabilities of some rows, which the trained model computed in memory."""

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
"""Key of the file's sha256 in the additional values of the model's manifest."""
STORED_KEY = "run/reference-values-{digest}.json"
"""Key in storage. The file is not part of the model's folder, because it contains rows of the user's data."""


class ReferenceRow(LenientModel):
    """One row and its values."""

    ids: list[int] = Field(description="Token ids.")
    images: list[str] = Field(default_factory=list, description="The files of the row's images, in base64.")
    is_counted: list[bool] = Field(description="Whether the token's probability counts. Empty for models with a score head.")
    values: list[float] = Field(default_factory=list, description="Log-probability (nats) of each counted token, or one score. The row was computed alone.")
    batched_values: list[float] = Field(default_factory=list, description="The same values, computed in one padded batch with the other rows.")


    def decoded_images(self) -> list[Any]:
        """The images of the row. Errors: RowError ImageUnreadable."""
        return [load_image(ImageFile(content=base64.b64decode(image))) for image in self.images]


class TrainedAdapter(LenientModel):
    """Settings of the adapter that was trained. None: the setting does not exist for this kind of adapter."""

    peft_type: str = Field(description="PEFT's name of the method, such as LORA.")
    scaling: dict[str, float] = Field(default_factory=dict, description="Factor of the product B A of each adapted module, by the module's name.")
    changes_output: bool | None = Field(default=None, description="Whether the values with and without the adapter differed. None: not measured.")


class ReferenceValues(LenientModel):
    """`reference-values.json`: the data that the stage `verifying` needs besides the stored model and the base model."""

    version: int = 1
    reason: str | None = Field(default=None, description="Why there are no values. None if there are values.")
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
        """The values of all rows."""
        return [value for row in self.rows for value in row.values]

    def batched_values(self) -> list[float]:
        """The values of all rows in the second batch layout."""
        return [value for row in self.rows for value in row.batched_values]

    def to_bytes(self) -> bytes:
        """Return the content of the file. Its sha256 is the file's name in storage."""
        return json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":")).encode()


def text_sha256(text: str | None) -> str | None:
    """Return the sha256 (hex) of a text after removing white space at both ends. None if there is no text."""
    return None if not text else hashlib.sha256(text.strip().encode()).hexdigest()


def stored_key(digest: str) -> str:
    """Return the key in storage of the file with the sha256 `digest`."""
    return STORED_KEY.format(digest=digest[:16])


def counted_values(values: Sequence[Sequence[float]], rows: Sequence[ReferenceRow]) -> list[list[float]]:
    """Return only the values of counted tokens. `values`: one value for each token after the first, for each row."""
    return [[value for value, is_counted in zip(of_row, row.is_counted[1:], strict=True) if is_counted] for of_row, row in zip(values, rows, strict=True)]
