"""Handles the images of rows: reads them from parts of messages or from a column, finds their files, and checks their sizes.

An image may be given as a path, an address below `dataset.images.root`, a base64 data URI, bytes (Parquet), or an object with `path` or
`bytes`. Nothing is downloaded here: addresses are read from the folder that the supervisor has downloaded. Only the header of an image is read;
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
"""Placeholder for an image of the column, in rows whose messages are plain text."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Image formats that are accepted. Pillow supports more formats, but each additional decoder could be attacked with a manipulated image."""
HINT_FOR_TEXT_JOBS = "write `model.modality: visionLanguage` to train on images, or remove the image"


@dataclass(frozen=True)
class ImageReader:
    """Finds and checks the images of rows. `root`: local copy of `dataset.images.root`; None if the spec has no root."""

    options: Images
    root: Path | None = None

    def attach(self, example: Example, row: RawRow, columns: Columns) -> Example:
        """Return the example with the files of its images. Errors: RowError."""
        given = _as_list(column_value(IMAGES_COLUMN, row.value, columns))
        if given:
            example = _texts_as_turns(example)
        if isinstance(example, Conversation):
            return replace(example, turns=self._find_images(example.turns, given, row))
        if isinstance(example, Preference) and not isinstance(example.prompt, str):
            for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
                if any(turn.parts for turn in answer if isinstance(turn, Turn)):
                    raise RowError("ImageInAnswer", f"the {name} answer has an image", "move the image to the prompt, which both answers share")
            return replace(example, prompt=self._find_images(example.prompt, given, row))
        if given:
            kind = "plain text" if isinstance(example, Text) else type(example).__name__
            raise RowError("ImageWithoutMessage", f"the row has images, but it is {kind} without messages", "write `messages` with the images")
        return example

    def _find_images(self, turns: tuple[Turn, ...], given: Sequence[Any], row: RawRow) -> tuple[Turn, ...]:
        """Return the turns with the files of their images. `given`: the images of the column. Errors: RowError."""
        turns = _insert_column(turns, given)
        count = sum(not isinstance(part, str) for turn in turns for part in turn.parts)
        limit = value_or_default(self.options, "max_per_row")
        if count > limit:
            raise RowError("TooManyImages", f"the row has {count} images, more than {limit}", "remove images, or raise dataset.images.maxPerRow")
        found = _Numbered(self, row)
        return tuple(replace(turn, parts=tuple(map(found.find, turn.parts))) if turn.parts else turn for turn in turns)

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

    def names_of(self, example: Example, row: RawRow) -> dict[Path, str]:
        """The files of the example's images, with their names below the folder of the images."""
        paths = (image.path for image in images_of(example) if image.path is not None)
        return {path: path.relative_to(self._folder(row)).as_posix() for path in paths}

    def _folder(self, row: RawRow) -> Path:
        """The folder of the images: the local copy of `dataset.images.root`, else the folder of the data file."""
        return (self.root or row.file.parent).resolve()

    def _resolve_path(self, text: str, row: RawRow) -> Path:
        """Return the file that a path or address names. The file must be below the root. Errors: RowError ImageOutsideRoot, ImageMissing."""
        address = (self.options.root or "").rstrip("/")
        root = self._folder(row)
        relative = text.removeprefix(f"{address}/") if address else text
        if "://" in relative:
            where = f"does not begin with dataset.images.root {address}/" if address else "is an address, but dataset.images.root is not set"
            raise RowError("ImageOutsideRoot", f"{text[:200]!r} {where}", "the trainer reads images only from dataset.images.root: copy them there")
        path = (root / relative).resolve()
        if not path.is_relative_to(root):
            raise RowError("ImageOutsideRoot", f"{text[:200]!r} leads out of the folder of the images", "write a path below this folder")
        if not path.is_file():
            folder = "dataset.images.root" if self.root else "the folder of the data file"
            raise RowError("ImageMissing", f"{text[:200]!r} does not exist in {folder}", "upload the image, or set dataset.images.root to its folder")
        return path

    def check(self, image: ImageFile) -> None:
        """Check the size of the file, and the number of pixels in its header. Errors: RowError ImageTooLarge, ImageUnreadable."""
        size, limit = len(image.content) if image.content is not None else _file_size(image), value_or_default(self.options, "max_bytes")
        if size > limit:
            raise RowError("ImageTooLarge", f"the file has {size} bytes, more than {limit}", "write a smaller image, or raise dataset.images.maxBytes")
        limit = value_or_default(self.options, "max_pixels")
        with _open_image(image) as opened:
            width, height = opened.size
        if width * height > limit:
            raise RowError(
                "ImageTooLarge", f"{width} x {height} are {width * height} pixels, more than {limit}",
                "write a smaller image, or raise dataset.images.maxPixels",
            )  # fmt: skip


class _Numbered:
    """Finds and checks the images of one row. Errors name the number of the image in the row."""

    def __init__(self, reader: ImageReader, row: RawRow) -> None:
        self._reader, self._row, self._number = reader, row, 0

    def find(self, part: str | GivenImage | ImageFile) -> str | ImageFile:
        """Return the file of an image; texts are returned unchanged. Errors: RowError."""
        if not isinstance(part, GivenImage):
            return part
        self._number += 1
        try:
            found = self._reader.locate(part.value, self._row)
            self._reader.check(found)
        except RowError as error:
            raise RowError(error.code, f"image {self._number}: {error.message}", error.hint) from None
        return found


def require_no_images(example: Example) -> RowError | None:
    """Return an error if the row of a text job has an image in a message, else None."""
    if any(turn.parts for turn in _turns_of(example)):
        return RowError("ImageInTextJob", "a message has an image, but model.modality is text", HINT_FOR_TEXT_JOBS)
    return None


def _turns_of(example: Example) -> list[Turn]:
    """Return all turns of an example."""
    values = [getattr(example, name, ()) for name in ("turns", "prompt", "chosen", "rejected", "completion")]
    return [turn for value in values if isinstance(value, tuple) for turn in value]


def _texts_as_turns(example: Example) -> Example:
    """Convert a prompt and its answers to messages if they are text, because only messages can have images."""
    if isinstance(example, Completion):
        return Conversation((Turn("user", example.prompt), Turn("assistant", example.completion)))
    if isinstance(example, Preference) and isinstance(example.prompt, str):
        answers = [(Turn("assistant", answer),) for answer in (example.chosen, example.rejected) if isinstance(answer, str)]
        return Preference((Turn("user", example.prompt),), *answers)
    return example


def images_of(example: Example) -> list[ImageFile]:
    """The images of an example whose files were found, in order."""
    return [image for turn in _turns_of(example) for image in turn.images]


def load_image(image: ImageFile) -> Image:
    """Decode an image as RGB, rotated according to its EXIF data. Errors: RowError ImageUnreadable."""
    from PIL import ImageOps

    with _open_image(image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


@contextmanager
def _open_image(image: ImageFile) -> Iterator[Image]:
    """Open an image without decoding its pixels. Errors: RowError ImageUnreadable, including failures to read the image in the `with` block."""
    from PIL import Image as images

    stream: Any = io.BytesIO(image.content) if image.content is not None else image.path
    try:
        with images.open(stream, formats=FORMATS) as opened:
            yield opened
    except images.DecompressionBombError:
        raise RowError("ImageTooLarge", "the image has more than 178 million pixels", "write a smaller image") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # Pillow's decoders raise any of these errors for damaged files.
        reason = "it is none of " + ", ".join(FORMATS) if isinstance(error, images.UnidentifiedImageError) else str(error).split("\n")[0][:200]
        raise RowError("ImageUnreadable", f"the image cannot be read: {reason}", "write the image again, or remove the row") from None


def content_of(image: ImageFile) -> bytes:
    """Return the content of an image's file."""
    if image.content is not None:
        return image.content
    assert image.path is not None, "an image without content has a path"
    return image.path.read_bytes()


def _file_size(image: ImageFile) -> int:
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


# ---- placing the images of a column


def _insert_column(turns: tuple[Turn, ...], given: Sequence[Any]) -> tuple[Turn, ...]:
    """Put the images of the column into the messages, and check the number of placeholders. Errors: RowError.

    The images replace image parts without a value. If there are none, they replace the texts `<image>`. If there are also no such texts,
    the images are put before the first user message.
    """
    if given and not any(turn.parts for turn in turns):
        turns = tuple(_split_at_placeholders(turn) for turn in turns)
    if given and not any(turn.parts for turn in turns):
        turns = _put_before_first_question(turns, len(given))
    empty = sum(part == GivenImage() for turn in turns for part in turn.parts)
    if empty != len(given):
        raise RowError(
            "ImageCountDiffers", f"the messages have {empty} places for images of the column, but the column has {len(given)} images",
            "give one image for each part `{\"type\": \"image\"}` or text `<image>`",
        )  # fmt: skip
    images = iter(given)
    filled = tuple(
        replace(turn, parts=tuple(GivenImage(next(images)) if part == GivenImage() else part for part in turn.parts)) if turn.parts else turn for turn in turns
    )
    for turn in filled:
        if turn.role == "assistant" and any(isinstance(part, GivenImage) for part in turn.parts):
            raise RowError("ImageInAnswer", "an assistant message has an image, but the model generates only text", "move the image to a user message")
    return filled


def _split_at_placeholders(turn: Turn) -> Turn:
    """Replace each text `<image>` by a placeholder part for an image."""
    texts = turn.content.split(TEXT_PLACEHOLDER)
    if len(texts) == 1 or turn.role == "assistant":
        return turn
    parts: list[str | GivenImage | ImageFile] = []
    for number, text in enumerate(texts):
        parts += [GivenImage()] * (number > 0) + [text] * bool(text)
    return replace(turn, content="".join(texts), parts=tuple(parts))


def _put_before_first_question(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    text = (turns[first].content,) if turns[first].content else ()
    changed = replace(turns[first], parts=(*[GivenImage()] * count, *text))
    return (*turns[:first], changed, *turns[first + 1 :])
