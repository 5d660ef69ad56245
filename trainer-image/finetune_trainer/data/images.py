"""Finds the images of a row, in its messages or in its image column, and checks their sizes.

An image may be given as a path, an address below `dataset.images.root`, a base64 data URI, bytes (Parquet), or an object with `path` or
`bytes`. This module downloads nothing: it finds addresses in the folder that the supervisor has downloaded. This module reads only the header of an image;
the pixels are decoded when the row is tokenised. Pillow is imported when the first image is checked.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.rules import value_or_default
from finetune_api.spec.dataset import Columns, Images

from finetune_trainer.data.columns import ColumnRole, column_value
from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    GivenImage,
    ImageFile,
    Preference,
    RawRow,
    RowError,
    Text,
    Turn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

IMAGES_COLUMN = ColumnRole("images", ("images", "image"))
TEXT_PLACEHOLDER = "<image>"
"""Text in a message that marks the place of an image from the image column."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The accepted image formats. Pillow supports more formats, but a manipulated image could attack each additional decoder."""
HINT_FOR_TEXT_JOBS = "write `model.modality: visionLanguage` to train on images, or remove the image"


@dataclass(frozen=True)
class ImageReader:
    """Finds and checks the images of rows. `root`: local copy of `dataset.images.root`; None if the spec has no root."""

    options: Images
    root: Path | None = None

    def attach(self, example: Example, row: RawRow, columns: Columns) -> Example:
        """Return the example with an `ImageFile` in place of each image of the row. Errors: RowError."""
        column_images = _as_list(column_value(IMAGES_COLUMN, row.value, columns))
        if column_images:
            example = _convert_texts_to_turns(example)
        if isinstance(example, Conversation):
            return replace(example, turns=self._find_images(example.turns, column_images, row))
        if isinstance(example, Preference) and not isinstance(example.prompt, str):
            for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
                if any(turn.parts for turn in answer if isinstance(turn, Turn)):
                    raise RowError("ImageInAnswer", f"the {name} answer has an image", "move the image to the prompt, which both answers share")
            return replace(example, prompt=self._find_images(example.prompt, column_images, row))
        if column_images:
            row_type = "plain text" if isinstance(example, Text) else type(example).__name__
            raise RowError("ImageWithoutMessage", f"the row has images, but it is {row_type} without messages", "write `messages` with the images")
        return example

    def _find_images(self, turns: tuple[Turn, ...], column_images: Sequence[Any], row: RawRow) -> tuple[Turn, ...]:
        """Return the turns with an `ImageFile` in place of each image. `column_images`: the images of the image column. Errors: RowError."""
        turns = _insert_column_images(turns, column_images)
        placeholder_count = sum(not isinstance(part, str) for turn in turns for part in turn.parts)
        max_images = value_or_default(self.options, "max_per_row")
        if placeholder_count > max_images:
            raise RowError("TooManyImages", f"the row has {placeholder_count} images, more than {max_images}",
                           "remove images, or raise dataset.images.maxPerRow")
        image_finder = _ImageFinder(self, row)
        return tuple(replace(turn, parts=tuple(map(image_finder.find, turn.parts))) if turn.parts else turn for turn in turns)

    def locate(self, value: Any, row: RawRow) -> ImageFile:
        """Find the image that `value` of a row describes. Errors: RowError ImageMissing, ImageUnreadable, ImageOutsideRoot."""
        if isinstance(value, Mapping):
            value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if isinstance(value, bytes | bytearray):
            return ImageFile(content=bytes(value))
        if not isinstance(value, str) or not value:
            raise RowError("ImageUnreadable", f"the image is {type(value).__name__}, not a path, a data URI or bytes", "write a path or a data URI")
        if value.startswith("data:"):
            return ImageFile(content=_decode_data_uri(value))
        return ImageFile(path=self._resolve_path(value, row))

    def image_names(self, example: Example, row: RawRow) -> dict[Path, str]:
        """Return the image files of the example, each with its path relative to the image folder."""
        paths = (image.path for image in images_of(example) if image.path is not None)
        return {path: path.relative_to(self._find_image_folder(row)).as_posix() for path in paths}

    def _find_image_folder(self, row: RawRow) -> Path:
        """Return the image folder: the local copy of `dataset.images.root`, else the folder of the data file."""
        return (self.root or row.file.parent).resolve()

    def _resolve_path(self, path_or_address: str, row: RawRow) -> Path:
        """Return the file for a path or address. The file must be in the image folder. Errors: RowError ImageOutsideRoot, ImageMissing."""
        root_address = (self.options.root or "").rstrip("/")
        root = self._find_image_folder(row)
        relative_path = path_or_address.removeprefix(f"{root_address}/") if root_address else path_or_address
        if "://" in relative_path:
            problem = f"does not begin with dataset.images.root {root_address}/" if root_address else "is an address, but dataset.images.root is not set"
            hint = "the trainer reads images only from dataset.images.root: copy them there"
            raise RowError("ImageOutsideRoot", f"{path_or_address[:200]!r} {problem}", hint)
        path = (root / relative_path).resolve()
        if not path.is_relative_to(root):
            raise RowError("ImageOutsideRoot", f"{path_or_address[:200]!r} is not in the image folder", "write a path below this folder")
        if not path.is_file():
            folder_name = "dataset.images.root" if self.root else "the folder of the data file"
            problem = f"{path_or_address[:200]!r} does not exist in {folder_name}"
            raise RowError("ImageMissing", problem, "upload the image, or set dataset.images.root to its folder")
        return path

    def check(self, image: ImageFile) -> None:
        """Check the size of the file, and the number of pixels that its header gives. Errors: RowError ImageTooLarge, ImageUnreadable."""
        file_bytes, max_bytes = len(image.content) if image.content is not None else _get_file_size(image), value_or_default(self.options, "max_bytes")
        if file_bytes > max_bytes:
            problem = f"the file has {file_bytes} bytes, more than {max_bytes}"
            raise RowError("ImageTooLarge", problem, "write a smaller image, or raise dataset.images.maxBytes")
        max_pixels = value_or_default(self.options, "max_pixels")
        with _open_image(image) as opened_image:
            width, height = opened_image.size
        if width * height > max_pixels:
            raise RowError(
                "ImageTooLarge", f"the image has {width} x {height} = {width * height} pixels, more than {max_pixels}",
                "write a smaller image, or raise dataset.images.maxPixels",
            )  # fmt: skip


class _ImageFinder:
    """Finds and checks the images of one row, and numbers the images, so that an error can say which image of the row is wrong."""

    def __init__(self, reader: ImageReader, row: RawRow) -> None:
        self._reader, self._row, self._number = reader, row, 0

    def find(self, part: str | GivenImage | ImageFile) -> str | ImageFile:
        """If `part` describes an image, return the image's file; if it is a text, return it unchanged. Errors: RowError."""
        if not isinstance(part, GivenImage):
            return part
        self._number += 1
        try:
            located_image = self._reader.locate(part.value, self._row)
            self._reader.check(located_image)
        except RowError as error:
            raise RowError(error.code, f"image {self._number}: {error.message}", error.hint) from None
        return located_image


def require_no_images(example: Example) -> RowError | None:
    """Return an error if the row of a text job has an image in a message, else None."""
    if any(turn.parts for turn in _list_turns(example)):
        return RowError("ImageInTextJob", "a message has an image, but model.modality is text", HINT_FOR_TEXT_JOBS)
    return None


def _list_turns(example: Example) -> list[Turn]:
    """Return all turns of an example."""
    fields = [getattr(example, name, ()) for name in ("turns", "prompt", "chosen", "rejected", "completion")]
    return [turn for field_value in fields if isinstance(field_value, tuple) for turn in field_value]


def _convert_texts_to_turns(example: Example) -> Example:
    """Convert a prompt and its answers to messages if they are text, because only messages can have images."""
    if isinstance(example, Completion):
        return Conversation((Turn("user", example.prompt), Turn("assistant", example.completion)))
    if isinstance(example, Preference) and isinstance(example.prompt, str):
        answers = [(Turn("assistant", answer),) for answer in (example.chosen, example.rejected) if isinstance(answer, str)]
        return Preference((Turn("user", example.prompt),), *answers)
    return example


def images_of(example: Example) -> list[ImageFile]:
    """Return the found images (`ImageFile`) of an example, in order."""
    return [image for turn in _list_turns(example) for image in turn.images]


def load_image(image: ImageFile) -> Image:
    """Decode an image as RGB, rotated according to its EXIF data. Errors: RowError ImageUnreadable."""
    from PIL import ImageOps

    with _open_image(image) as opened_image:
        return ImageOps.exif_transpose(opened_image).convert("RGB")


@contextmanager
def _open_image(image: ImageFile) -> Iterator[Image]:
    """Open an image without decoding its pixels. Errors: RowError ImageUnreadable, also if code in the `with` block fails to read the image."""
    from PIL import Image as images

    stream: Any = io.BytesIO(image.content) if image.content is not None else image.path
    try:
        with images.open(stream, formats=IMAGE_FORMATS) as opened_image:
            yield opened_image
    except images.DecompressionBombError:
        raise RowError("ImageTooLarge", "the image has more than 178 million pixels", "write a smaller image") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # Pillow's decoders raise any of these errors for damaged files.
        reason = "it is none of " + ", ".join(IMAGE_FORMATS) if isinstance(error, images.UnidentifiedImageError) else str(error).split("\n")[0][:200]
        raise RowError("ImageUnreadable", f"the image cannot be read: {reason}", "write the image again, or remove the row") from None


def read_content(image: ImageFile) -> bytes:
    """Return the encoded bytes of an image, as in its file."""
    if image.content is not None:
        return image.content
    assert image.path is not None, "an image without content has a path"
    return image.path.read_bytes()


def _get_file_size(image: ImageFile) -> int:
    assert image.path is not None, "an image without content has a path"
    return image.path.stat().st_size


def _decode_data_uri(text: str) -> bytes:
    header, comma, encoded = text.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RowError("ImageUnreadable", f"the data URI begins with {header[:40]!r}", "write data:image/png;base64,...")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RowError("ImageUnreadable", "the data URI is not valid base64", "encode the image again") from None


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


# ---- putting the images of the image column into messages


def _insert_column_images(turns: tuple[Turn, ...], column_images: Sequence[Any]) -> tuple[Turn, ...]:
    """Put the images of the image column into the messages, and check the number of placeholders. Errors: RowError.

    The images replace image parts without a value. If no message has an image part, the images replace the texts `<image>`. If no message has an
    image part or this text, the images are put at the beginning of the first user message.
    """
    if column_images and not any(turn.parts for turn in turns):
        turns = tuple(_split_at_placeholders(turn) for turn in turns)
    if column_images and not any(turn.parts for turn in turns):
        turns = _put_before_first_question(turns, len(column_images))
    placeholder_count = sum(part == GivenImage() for turn in turns for part in turn.parts)
    if placeholder_count != len(column_images):
        raise RowError(
            "ImageCountDiffers",
            f"number of image placeholders in the messages: {placeholder_count}; number of images in the image column: {len(column_images)}",
            "give one image for each part `{\"type\": \"image\"}` or text `<image>`",
        )  # fmt: skip
    images = iter(column_images)
    filled_turns = tuple(
        replace(turn, parts=tuple(GivenImage(next(images)) if part == GivenImage() else part for part in turn.parts)) if turn.parts else turn for turn in turns
    )
    for turn in filled_turns:
        if turn.role == "assistant" and any(isinstance(part, GivenImage) for part in turn.parts):
            raise RowError("ImageInAnswer", "an assistant message has an image, but the model generates only text", "move the image to a user message")
    return filled_turns


def _split_at_placeholders(turn: Turn) -> Turn:
    """Replace each text `<image>` with an image part without a value."""
    texts = turn.content.split(TEXT_PLACEHOLDER)
    if len(texts) == 1 or turn.role == "assistant":
        return turn
    parts: list[str | GivenImage | ImageFile] = []
    for number, text in enumerate(texts):
        parts += [GivenImage()] * (number > 0) + [text] * bool(text)
    return replace(turn, content="".join(texts), parts=tuple(parts))


def _put_before_first_question(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    question_index = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if question_index is None:
        return turns
    text_parts = (turns[question_index].content,) if turns[question_index].content else ()
    question_with_images = replace(turns[question_index], parts=(*[GivenImage()] * count, *text_parts))
    return (*turns[:question_index], question_with_images, *turns[question_index + 1 :])
