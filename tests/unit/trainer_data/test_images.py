"""Images of rows: the forms in which a row can give an image, the folders that files may be in, and errors that name row, cause and correction."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import DataError
from finetune_trainer.data import check_files, load
from finetune_trainer.data.images import load_image
from finetune_trainer.data.rows import ImageFile, Text

from tests.support.data import make_data_run
from tests.support.vision import make_png, to_data_uri

RED = make_png((255, 0, 0), (4, 3))
BLUE = make_png((0, 0, 255), (4, 3))
TEXT_PART = {"type": "text", "text": "What is this?"}
ANSWER = {"role": "assistant", "content": "red"}
SPEC: dict[str, Any] = {"model": {"modality": "visionLanguage"}}


def make_messages(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts, TEXT_PART]}, ANSWER]


def make_image_part(**values: Any) -> dict[str, Any]:
    return {"type": "image", **values}


def make_row_with_image(**values: Any) -> dict[str, Any]:
    """Return a row with one image."""
    return {"messages": make_messages(make_image_part(**values))}


def write_images(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)


def make_vision_run(folder: Path, row: dict[str, Any], images: dict[str, Any] | None = None, **dataset: Any) -> Any:
    """Return a run on one row, and its inputs. `images`: `dataset.images`; if it has a root, images are read from `<folder>/root`."""
    folder.mkdir(exist_ok=True)
    write_images(folder)
    image_options = {"images": images} if images else {}
    run, inputs = make_data_run(folder, {**SPEC, "dataset": {**image_options, **dataset}}, [row])
    if images and "root" in images:
        write_images(folder / "root")
        inputs = inputs.model_copy(update={"images": folder / "root"})
    return run, inputs


def load_images(folder: Path, row: dict[str, Any], images: dict[str, Any] | None = None, **dataset: Any) -> list[ImageFile]:
    ((_, example),) = load(*make_vision_run(folder, row, images, **dataset)).train
    return [image for turn in example.turns for image in turn.images]  # type: ignore[union-attr]


PATH_FORMS: dict[str, dict[str, Any]] = {
    "path": {"messages": make_messages(make_image_part(path="pictures/red.png"))},
    "image": {"messages": make_messages(make_image_part(image="pictures/red.png"))},
    "url": {"messages": make_messages(make_image_part(url="pictures/red.png"))},
    "openai": {"messages": make_messages({"type": "image_url", "image_url": {"url": "pictures/red.png"}})},
    "null columns": {"messages": make_messages(make_image_part(image="pictures/red.png", text=None, path=None))},
    "object": {"messages": make_messages(make_image_part(image={"path": "pictures/red.png", "bytes": None}))},
    "column and part": {"messages": make_messages({"type": "image"}), "images": ["pictures/red.png"]},
    "column and placeholder": {"messages": [{"role": "user", "content": "See <image> here"}, ANSWER], "images": ["pictures/red.png"]},
    "column alone": {"messages": [{"role": "user", "content": "What is this?"}, ANSWER], "image": "pictures/red.png"},
    "prompt and completion": {"prompt": "What is this?", "completion": "red", "images": ["pictures/red.png"]},
    "sharegpt": {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}], "images": ["pictures/red.png"]},
}  # fmt: skip


@pytest.mark.parametrize("name", PATH_FORMS)
def test_an_image_may_be_given_as_a_path(name: str, tmp_path: Path) -> None:
    assert load_images(tmp_path, PATH_FORMS[name]) == [ImageFile(path=tmp_path.resolve() / "pictures" / "red.png")]


@pytest.mark.parametrize(
    "image_fields",
    [{"image": to_data_uri(RED)}, {"base64": base64.b64encode(RED).decode()}, {"image_url": {"url": to_data_uri(RED)}, "type": "image_url"}],
)
def test_an_image_may_be_in_the_row_itself(image_fields: dict[str, Any], tmp_path: Path) -> None:
    assert load_images(tmp_path, {"messages": make_messages(make_image_part(**image_fields))}) == [ImageFile(content=RED)]


@pytest.mark.parametrize("is_object", [False, True])
def test_a_parquet_column_may_hold_the_bytes_of_images(is_object: bool, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    run, inputs = make_data_run(tmp_path, SPEC)
    value: Any = {"bytes": RED, "path": None} if is_object else RED
    parquet_file = tmp_path / "rows.parquet"
    row = {"messages": [{"role": "user", "content": "What?"}, ANSWER], "images": [value, value]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet_file)
    ((_, example),) = load(run, inputs.model_copy(update={"train": [parquet_file]})).train
    assert example.turns[0].parts == (ImageFile(content=RED), ImageFile(content=RED), "What?")  # type: ignore[union-attr]


def test_the_order_of_texts_and_images_is_kept(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a<image>b<image>"}, ANSWER], "images": ["pictures/red.png", "blue.png"]}
    ((_, example),) = load(*make_vision_run(tmp_path, row)).train
    folder = tmp_path.resolve()
    turn = example.turns[0]  # type: ignore[union-attr]
    assert turn.parts == ("a", ImageFile(folder / "pictures/red.png"), "b", ImageFile(folder / "blue.png"))
    assert turn.content == "ab"
    content = turn.to_message(has_content_parts=True)["content"]
    assert content == [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]


@pytest.mark.parametrize("image_address", ["s3://data/images/pictures/red.png", "pictures/red.png"])
def test_images_are_read_from_the_root_instead_of_the_folder_of_the_data(image_address: str, tmp_path: Path) -> None:
    image_files = load_images(tmp_path, {"messages": make_messages(make_image_part(url=image_address))}, {"root": "s3://data/images"})
    assert image_files == [ImageFile(tmp_path.resolve() / "root" / "pictures" / "red.png")]


def test_the_image_column_may_have_another_name(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "What?"}, ANSWER], "picture": "blue.png"}
    assert load_images(tmp_path, row, columns={"images": "picture"}) == [ImageFile(tmp_path.resolve() / "blue.png")]


def test_rows_without_images_stay_as_they_are(tmp_path: Path) -> None:
    assert load_images(tmp_path, {"messages": [{"role": "user", "content": "hi"}, ANSWER]}) == []
    ((_, example),) = load(*make_vision_run(tmp_path / "text", {"text": "some text"})).train
    assert example == Text("some text")


BAD_ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str, str]] = {
    # test id: (code, row, dataset.images, part of the message, part of the hint)
    "missing": (
        "ImageMissing", make_row_with_image(path="no.png"), None, "image 1: 'no.png' does not exist in the folder of the data file", "dataset.images.root",
    ),
    "missing in root": ("ImageMissing", make_row_with_image(path="no.png"), {"root": "s3://d/i"}, "does not exist in dataset.images.root", "upload"),
    "second": (
        "ImageMissing", {"messages": make_messages(make_image_part(path="blue.png"), make_image_part(path="no.png"))}, None, "image 2: 'no.png'", "upload",
    ),
    "parent": ("ImageOutsideRoot", make_row_with_image(path="../x.png"), None, "is not in the image folder", "below this folder"),
    "absolute": ("ImageOutsideRoot", make_row_with_image(path="/etc/hostname"), None, "is not in the image folder", "below this folder"),
    "web": ("ImageOutsideRoot", make_row_with_image(url="https://example.com/a.png"), None, "dataset.images.root is not set", "only from dataset.images.root"),
    "file address": ("ImageOutsideRoot", make_row_with_image(url="file:///etc/hostname"), None, "dataset.images.root is not set", "copy them there"),
    "other bucket": (
        "ImageOutsideRoot", make_row_with_image(url="s3://other/a.png"), {"root": "s3://d/i"}, "does not begin with dataset.images.root s3://d/i/", "only from",
    ),
    "prefix of the root": ("ImageOutsideRoot", make_row_with_image(url="s3://d/images2/a.png"), {"root": "s3://d/images"}, "does not begin", "only from"),
    "not an image": ("ImageUnreadable", make_row_with_image(image=to_data_uri(b"hello")), None, "it is none of PNG, JPEG", "write the image again"),
    "svg": ("ImageUnreadable", make_row_with_image(image=to_data_uri(b"<svg/>")), None, "it is none of PNG", "remove the row"),
    "empty": ("ImageUnreadable", make_row_with_image(image=to_data_uri(b"")), None, "it is none of PNG", "remove the row"),
    "bad base64": ("ImageUnreadable", make_row_with_image(image="data:image/png;base64,%%%"), None, "not valid base64", "encode the image again"),
    "not base64": ("ImageUnreadable", make_row_with_image(image="data:image/png,abc"), None, "the data URI begins with", "base64"),
    "a number": ("ImageUnreadable", make_row_with_image(image=7), None, "the image is int", "data URI"),
    "pixels": ("ImageTooLarge", make_row_with_image(image=to_data_uri(RED)), {"maxPixels": 11}, "4 x 3 = 12 pixels, more than 11", "dataset.images.maxPixels"),
    "bytes": (
        "ImageTooLarge", make_row_with_image(path="blue.png"), {"maxBytes": 10}, f"the file has {len(BLUE)} bytes, more than 10", "dataset.images.maxBytes",
    ),
    "too many": (
        "TooManyImages", {"messages": make_messages(*[make_image_part(path="blue.png")] * 3)},
        {"maxPerRow": 2}, "3 images, more than 2", "dataset.images.maxPerRow",
    ),
    "no source": (
        "ImageCountDiffers", {"messages": make_messages({"type": "image"})}, None,
        "placeholders in the messages: 1; number of images in the image column: 0", "one image for each",
    ),
    "column too long": (
        "ImageCountDiffers", {"messages": make_messages({"type": "image"}), "images": ["blue.png"] * 2}, None,
        "placeholders in the messages: 1; number of images in the image column: 2", "one image",
    ),
    "both": (
        "ImageCountDiffers", {"messages": make_messages(make_image_part(path="blue.png")), "images": ["blue.png"]},
        None, "placeholders in the messages: 0; number of images in the image column: 1", "one image",
    ),
    "in the answer": (
        "ImageInAnswer",
        {"messages": [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": [make_image_part(path="blue.png"), TEXT_PART]}]}, None,
        "an assistant message has an image", "move the image to a user message",
    ),
    "text row": ("ImageWithoutMessage", {"text": "hello", "images": ["blue.png"]}, None, "it is plain text without messages", "write `messages`"),
    "video": ("DatasetRowInvalid", {"messages": make_messages({"type": "video", "video": "a.mp4"})}, None, "a part of type 'video'", "image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_image_names_row_cause_and_correction(name: str, tmp_path: Path) -> None:
    code, row, images, message, hint = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        check_files(*make_vision_run(tmp_path, row, images))
    assert caught.value.code == code and caught.value.exit_code == 65
    assert caught.value.message.startswith("train.jsonl, row 1: ") and message in caught.value.message
    assert hint in (caught.value.hint or "") and "badRows: skip" in (caught.value.hint or "")


def test_rows_with_bad_images_can_be_skipped(tmp_path: Path) -> None:
    write_images(tmp_path)
    good_row, bad_row = {"messages": make_messages(make_image_part(path="blue.png"))}, {"messages": make_messages(make_image_part(path="no.png"))}
    run, inputs = make_data_run(tmp_path, {**SPEC, "dataset": {"badRows": "skip", "maxBadRowRatio": 0.5}}, [good_row, bad_row, good_row])
    summary = check_files(run, inputs)
    assert summary.rows["train"] == 2
    assert summary.notes == ["1 of 3 rows were left out; the first: train.jsonl, row 2: image 1: 'no.png' does not exist in the folder of the data file"]


def test_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(RED)
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError) as caught:
        check_files(*make_vision_run(tmp_path / "data", {"messages": make_messages(make_image_part(path="link.png"))}))
    assert caught.value.code == "ImageOutsideRoot"


def test_a_text_job_refuses_rows_with_images(tmp_path: Path) -> None:
    run, inputs = make_data_run(tmp_path, {}, [{"messages": make_messages(make_image_part(path="blue.png"))}])
    with pytest.raises(DataError) as caught:
        check_files(run, inputs)
    assert caught.value.code == "ImageInTextJob" and "`model.modality: visionLanguage`" in (caught.value.hint or "")


def test_an_image_whose_pixels_are_cut_off_is_found_when_it_is_decoded(tmp_path: Path) -> None:
    from finetune_trainer.data.rows import RowError

    cut_image = RED[:50]
    assert load_images(tmp_path, {"messages": make_messages(make_image_part(image=to_data_uri(cut_image)))}) == [ImageFile(content=cut_image)]
    with pytest.raises(RowError) as caught:
        load_image(ImageFile(content=cut_image))
    assert caught.value.code == "ImageUnreadable"


def test_images_are_decoded_as_rgb_and_rotated_according_to_exif(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("L", (4, 2), 7)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    loaded_image = load_image(ImageFile(path=tmp_path / "turned.jpg"))
    assert (loaded_image.mode, loaded_image.size) == ("RGB", (2, 4)) and loaded_image.getpixel((0, 0)) == (7, 7, 7)


def test_equal_rows_with_different_images_are_no_duplicates(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [{"messages": make_messages(make_image_part(path=path))} for path in ("blue.png", "pictures/red.png", "blue.png")]
    run, inputs = make_data_run(tmp_path, {**SPEC, "dataset": {"checks": {"deduplicate": True}}}, rows)
    assert check_files(run, inputs).findings.duplicate_count == 1


def test_checking_images_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    make_vision_run(tmp_path, {"messages": make_messages(make_image_part(path="blue.png"))})
    code = (
        "import sys; from pathlib import Path; from finetune_trainer.data.images import ImageReader; from finetune_trainer.data.rows import ImageFile;"
        f"from finetune_api.spec.dataset import Images; ImageReader(Images()).check(ImageFile(Path({str(tmp_path / 'blue.png')!r})));"
        "assert 'PIL' in sys.modules and not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode == 0
