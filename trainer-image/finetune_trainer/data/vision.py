"""Converts rows with images to token sequences, and batches of these sequences to the inputs of a vision-language model.

The chat template writes one placeholder for each image. The model's processor replaces the placeholder with one token for each patch of
the image, and this module moves the trained spans accordingly. Tokens of images are never trained on. The token sequences are cached. The pixels are
computed again for each batch, because cached pixels would need far more disk space than the image files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.batches import RejectedRow
from finetune_trainer.data.images import images_of, load_image
from finetune_trainer.data.rows import IGNORED_LABEL, Example, ImageFile, RowError
from finetune_trainer.data.template import CharSpan, Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import BoundaryTokens, EncodedRow, TokeniseOptions, make_labels

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SOURCES_COLUMN = "image_sources"
"""Name of the shard column with the images of a row. The column is not called `images`, because TRL would treat rows with a column `images` as not
tokenised yet."""
IMAGE_LABEL = -101
"""Temporary label of image tokens. `encode_row` replaces this label with `IGNORED_LABEL`."""
TEXT_INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Outputs of a processor that describe the text."""
ROWS_WITHOUT_WORKERS = 200
"""Number of rows with images that this process encodes before it starts workers. Decoding images is slow, so workers help earlier than with text."""


@dataclass(frozen=True)
class VisionProcessor:
    """Wraps a transformers processor for images and text, and adds the operations that training needs."""

    processor: Any

    @property
    def identity(self) -> str:
        """A text that identifies the processor: processors with equal texts compute equal results."""
        processor = self.processor
        settings = {name: value for name, value in vars(processor).items() if isinstance(value, str | int | float | bool)}
        image_settings = processor.image_processor.to_dict()
        return json.dumps([type(processor).__name__, settings, image_settings], sort_keys=True, default=str)

    def encode(self, rendering: Rendered, images: Sequence[Image]) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of a text with image placeholders. The tokens of images have the label `IMAGE_LABEL`.

        Errors: RowError ImagePlaceholders, ImageRefused.
        """
        placeholder_count = rendering.text.count(self.processor.image_token)
        if placeholder_count != len(images):
            raise RowError(
                "ImagePlaceholders", f"the rendered row has {placeholder_count} placeholders {self.processor.image_token} for {len(images)} images",
                "use a chat template that writes one placeholder for each image, and do not write the placeholder in texts",
            )  # fmt: skip
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        if not images:
            tokenised = self.processor.tokenizer([rendering.text], **options)
            replacements: list[Mapping[str, Any]] = []
        else:
            try:
                tokenised = self.processor(text=[rendering.text], images=[list(images)], return_text_replacement_offsets=True, **options)
            except ValueError as error:
                message = str(error).split("\n")[0][:200]
                raise RowError("ImageRefused", f"the model's image processor refuses an image: {message}", "write another image, or remove the row") from None
            replacements = tokenised["text_replacement_offsets"][0]
        ids, offsets = list(tokenised["input_ids"][0]), tokenised["offset_mapping"][0]
        labels = make_labels(ids, offsets, move_spans(rendering.spans, replacements))
        image_marks = make_labels([IMAGE_LABEL] * len(ids), offsets, [replacement["new_span"] for replacement in replacements])
        return ids, [IMAGE_LABEL if mark == IMAGE_LABEL else label for label, mark in zip(labels, image_marks, strict=True)]

    def encode_row(self, location: str, rendering: Rendered, images: Sequence[ImageFile], boundary: BoundaryTokens) -> EncodedRow:
        """Tokenise a rendered row. The tokens of images are not trained on. Errors: RowError of `encode`, ImageUnreadable."""
        ids, labels = self.encode(rendering, [load_image(image) for image in images])
        ids, labels = boundary.add_boundary_tokens(ids, labels, is_templated=rendering.is_templated)
        image_end = next((index + 1 for index in range(len(labels) - 1, -1, -1) if labels[index] == IMAGE_LABEL), 0)
        labels = [IGNORED_LABEL if label == IMAGE_LABEL else label for label in labels]
        return EncodedRow(location, ids, labels, tuple(images), image_end)

    def make_image_inputs(self, images: Sequence[Sequence[Image]], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the additional inputs of the model for a batch with images: the pixels, and the type of each token (text or image).

        `images`: the images of each row. `ids`: the token ids of each row; all rows have the same length.
        """
        import torch

        inputs: dict[str, Any] = {}
        if any(images):
            placeholders = [self.processor.image_token * len(row_images) for row_images in images]
            processor_output = self.processor(text=placeholders, images=[list(row_images) for row_images in images], padding=True, return_tensors="pt")
            # Llama 4's processor returns pixels in bfloat16, but the model's vision layers do not convert them to the type of their weights.
            inputs = {
                name: value.float() if torch.is_floating_point(value) else value
                for name, value in processor_output.items()
                if name not in TEXT_INPUT_NAMES
            }
        input_names = set(self.processor.model_input_names)
        token_type_name = next((name for name in ("token_type_ids", "mm_token_type_ids") if name in input_names), None)
        if token_type_name is not None:
            inputs[token_type_name] = torch.tensor(self.processor.create_mm_token_type_ids([list(map(int, row)) for row in ids]))
        return inputs


def move_spans(spans: Sequence[CharSpan], replacements: Sequence[Mapping[str, Any]]) -> list[CharSpan]:
    """Return the spans of a text after its placeholders were replaced. `replacements`: the old and the new span of each placeholder."""

    def move_position(position: int) -> int:
        earlier_spans = [(replacement["span"], replacement["new_span"]) for replacement in replacements if replacement["span"][1] <= position]
        added_lengths = (new_end - new_start - (old_end - old_start) for (old_start, old_end), (new_start, new_end) in earlier_spans)
        return position + sum(added_lengths)

    return [(move_position(start), move_position(end)) for start, end in spans]


@dataclass(frozen=True)
class VisionEncoder:
    """Renders and tokenises rows with images, for supervised training."""

    rendering_options: RenderOptions
    options: TokeniseOptions
    vision: VisionProcessor

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[EncodedRow | RejectedRow]:
        """Render and tokenise the rows. Errors: ConfigError of `render` and `BoundaryTokens.of`."""
        boundary = BoundaryTokens.of(self.rendering_options.tokenizer, self.options)
        return [self._encode(location, example, boundary) for location, example in rows]

    def _encode(self, location: str, example: Example, boundary: BoundaryTokens) -> EncodedRow | RejectedRow:
        try:
            return self.vision.encode_row(location, render(example, self.rendering_options), images_of(example), boundary)
        except RowError as error:
            return RejectedRow.of(location, error)


@dataclass(frozen=True)
class VisionCollator:
    """Pads rows on the right, and computes the pixels of their images."""

    vision: VisionProcessor
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the inputs of the model for a batch, with labels. Padding is not trained on."""
        import torch

        max_row_length = max(len(row["input_ids"]) for row in rows)

        def pad_column(column: str, value: int) -> Any:
            return torch.tensor([[*map(int, row[column]), *[value] * (max_row_length - len(row[column]))] for row in rows])

        ids = pad_column("input_ids", self.pad_token_id)
        attention_mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (max_row_length - len(row["input_ids"])) for row in rows])
        text_inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": pad_column("labels", IGNORED_LABEL)}
        return text_inputs | self.vision.make_image_inputs(_load_images(rows), ids.tolist())


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs of answers as TRL does, and computes the pixels of the images in their prompts."""

    vision: VisionProcessor
    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the inputs of the model for a batch: first the rows with the better answers, then the rows with the worse answers."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        batch: dict[str, Any] = DataCollatorForPreference(self.pad_token_id)([dict(row) for row in rows])
        return batch | self.vision.make_image_inputs(_load_images(rows) * 2, batch["input_ids"].tolist())


def _load_images(rows: Sequence[Mapping[str, Any]]) -> list[list[Image]]:
    """Decode the images of each stored row."""
    return [[load_image(image) for image in read_image_column(row)] for row in rows]


def read_image_column(row: Mapping[str, Any]) -> list[ImageFile]:
    """Return the images of a stored row."""
    return [ImageFile(Path(item["path"]) if item["path"] else None, item["bytes"]) for item in row[IMAGE_SOURCES_COLUMN]]


def to_image_column(images: Sequence[ImageFile]) -> list[dict[str, Any]]:
    """Return the images of a row as a value of the column `IMAGE_SOURCES_COLUMN`."""
    return [{"path": str(image.path) if image.path else None, "bytes": image.content} for image in images]
