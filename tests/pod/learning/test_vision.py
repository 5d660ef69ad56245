"""Vision-language models learn from rows with images. Plain transformers computes the same losses from the stored artefact as the trainer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import OutputKind
from finetune_api.status import VerificationOutcome
from finetune_trainer.channel import Channel
from finetune_trainer.data.vision import IMAGE_SOURCES_COLUMN
from finetune_trainer.stages.verify import Artefact, Verifier
from finetune_trainer.verification.reference import FILE_NAME, ReferenceValues
from PIL import Image

from tests.support.learning import RunOutcome, make_run, merge_mappings, train_here
from tests.support.tiny import make_tiny_model
from tests.support.vision import (
    COLOURS,
    FAMILIES,
    SIMILAR_FAMILIES,
    make_image_rows,
    make_png,
    make_vision_model,
    to_data_uri,
)

pytestmark = pytest.mark.pod
BASE_SPEC: dict[str, Any] = {"model": {"modality": "visionLanguage"}, "output": {"verify": True}, "training": {"learningRate": 1e-2, "maxSteps": 4}}


def list_family_cases() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.faults] if name in SIMILAR_FAMILIES else []) for name in FAMILIES]


def slow_case(*values: Any) -> Any:
    """Return test parameters that run only with `make test-faults`."""
    return pytest.param(*values, marks=pytest.mark.faults)


def train(folder: Path, name: str, spec: dict[str, Any], rows: list[dict[str, Any]] | None = None, **options: Any) -> tuple[RunOutcome, Any, Any]:
    run, inputs = make_run(folder, make_vision_model(folder / "model", name), merge_mappings(BASE_SPEC, spec), rows or make_image_rows(), **options)
    return train_here(run, inputs), run, inputs


def verify(outcome: RunOutcome, run: Any, inputs: Any) -> Any:
    reference = ReferenceValues.model_validate_json((inputs.output_dir / FILE_NAME).read_text())
    assert reference.reason is None and outcome.folder is not None and outcome.kind is not None
    verifier = Verifier(run, Channel.create_recording(inputs.output_dir.parent / "work"), inputs, reference)
    (result,) = verifier.verify([Artefact(outcome.kind, outcome.folder, OutputKind(outcome.kind))])
    return result


def list_trained_names(outcome: RunOutcome) -> set[str]:
    return {name for name, value in outcome.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", list_family_cases())
def test_every_family_learns_from_images_and_can_be_loaded_again(name: str, method: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    outcome, run, inputs = train(tmp_path, name, {"method": {"type": method}}, validation=make_image_rows(("red", "no")))
    assert len(outcome.losses) == 4 and 5.5 < outcome.losses[0] < 7 and outcome.losses[-1] < outcome.losses[0] - 0.3
    assert len(outcome.eval_losses) == 1 and 0 < outcome.logs[0]["mean_token_accuracy"] + 1 <= 2
    frozen_layers = [f"{family.parent}{part}" for part in dict.fromkeys((family.tower, family.projector)) if not part.startswith(f"{family.tower}.")]
    assert f"the vision layers ({', '.join(frozen_layers)}) are frozen; to train them, write `vision: {{visionLayers: true}}` in method" in outcome.notes
    assert "batches are padded, because padding-free batches support only text" in outcome.notes
    assert list_trained_names(outcome) and not [name for name in list_trained_names(outcome) if any(f"{part}." in name for part in frozen_layers)]
    assert outcome.folder is not None and (outcome.folder / "preprocessor_config.json").read_text() == (inputs.model / "preprocessor_config.json").read_text()
    result = verify(outcome, run, inputs)
    assert (result.result, result.reason) == (VerificationOutcome.VERIFIED, None) and result.change_from_base > 1e-3


def compute_reference_loss(folder: Path, name: str, rows: list[dict[str, Any]]) -> float:
    """Compute the mean loss of the answers row by row, with the processor and the loss of transformers but none of this project's data code."""
    import io
    import json

    from finetune_trainer.library_internals import build_processor, image_text_processor_class
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor_class = image_text_processor_class(AutoConfig.from_pretrained(folder))
    assert processor_class is not None
    processor = build_processor(processor_class, folder, tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        question, answer = row["messages"]
        content = base64.b64decode(question["content"][0]["image"].partition(",")[2])
        image = Image.open(io.BytesIO(content)).convert("RGB")
        turns = json.loads(json.dumps([question, {**answer, "content": [{"type": "text", "text": answer["content"]}]}]))
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
        inputs["pixel_values"] = inputs["pixel_values"].float()
        answer_ids = tokenizer(f"{answer['content']}<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = inputs["input_ids"][0].tolist()
        start = max(position for position in range(len(ids)) if ids[position : position + len(answer_ids)] == answer_ids)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, start : start + len(answer_ids)] = torch.tensor(answer_ids)
        with torch.no_grad():
            total += float(model(**inputs, labels=labels).loss) * len(answer_ids)
        count += len(answer_ids)
    return total / count


@pytest.mark.parametrize("name", list_family_cases())
def test_the_loss_is_that_of_the_answers_given_the_images(name: str, tmp_path: Path) -> None:
    # The images of a batch have different sizes, so the rows and the image tiles are padded.
    rows = make_image_rows(("red", "no"), sizes=((40, 32), (80, 30)))
    outcome, _, inputs = train(tmp_path, name, {"training": {"maxSteps": 1, "batchSizePerDevice": 2}, "output": {"verify": False}}, rows)
    assert outcome.losses == [pytest.approx(compute_reference_loss(inputs.model, name, rows), abs=2e-5)]
    text_rows = [{**row, "messages": [{"role": "user", "content": "question"}, row["messages"][1]]} for row in rows]
    text_outcome, *_ = train(tmp_path / "text", name, {"training": {"maxSteps": 1, "batchSizePerDevice": 2}, "output": {"verify": False}}, text_rows)
    assert abs(text_outcome.losses[0] - outcome.losses[0]) > 1e-4, "the loss does not depend on the images"


def test_image_tokens_are_never_trained_on(tmp_path: Path) -> None:
    outcome, _, inputs = train(tmp_path, "gemma3", {"dataset": {"responseOnly": {"enabled": False}}, "training": {"maxSteps": 1}, "output": {"verify": False}})
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    row = read_trained_rows(outcome)[0]
    assert len(row[IMAGE_SOURCES_COLUMN]) == 1
    untrained_text = tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
    assert untrained_text == "\n\n<start_of_image>" + 4 * "<image_soft_token>" + "<end_of_image>\n\n"
    trained_text = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert trained_text == "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"


def read_trained_rows(outcome: RunOutcome) -> list[dict[str, Any]]:
    from finetune_trainer.data.prepare import open_split
    from finetune_trainer.data.prepared import open_prepared

    (folder,) = (outcome.channel.work_folder / "tokens").iterdir()  # type: ignore[union-attr]
    return list(open_split(open_prepared(folder), "train"))


@pytest.mark.parametrize(
    ("name", "method", "trained_parts", "frozen_parts"),
    [
        slow_case("gemma3", {"type": "lora", "vision": {"visionLayers": True}}, ("vision_tower.", "language_model."), ()),
        ("gemma3", {"type": "lora", "vision": {"visionLayers": True, "languageLayers": False}}, ("vision_tower.",), ("language_model.",)),
        slow_case("qwen2_vl", {"type": "lora", "vision": {"mlpModules": False}}, ("language_model.layers.0.self_attn.",), ("mlp.", "visual.")),
        slow_case("gemma3", {"type": "lora", "lora": {"targetModules": ["q_proj", "fc1"]}}, ("language_model.layers.0.self_attn.q_proj.",), ("vision_tower.",)),
        slow_case("gemma3", {"type": "full", "vision": {"visionLayers": True, "attentionModules": False}}, ("multi_modal_projector.", "mlp."), ("self_attn.",)),
        slow_case("idefics3", {"type": "full", "vision": {"languageLayers": False, "visionLayers": True}}, ("vision_model.", "connector."), ("text_model.",)),
        ("idefics3", {"type": "qlora"}, ("text_model.",), ("vision_model.", "connector.")),
        slow_case("idefics3", {"type": "lora", "lora": {"useDora": True}}, ("text_model.",), ("vision_model.", "connector.")),
    ],
)  # fmt: skip
def test_only_the_requested_parts_are_trained(
    name: str, method: dict[str, Any], trained_parts: tuple[str, ...], frozen_parts: tuple[str, ...], tmp_path: Path
) -> None:
    outcome, run, inputs = train(tmp_path, name, {"method": method, "training": {"maxSteps": 2}})
    trained_names = list_trained_names(outcome)
    assert all(any(part in trained_name for trained_name in trained_names) for part in trained_parts), trained_names
    assert not [trained_name for trained_name in trained_names if any(part in trained_name for part in frozen_parts)]
    result = verify(outcome, run, inputs)
    assert (result.result, result.code) == (VerificationOutcome.VERIFIED, None), result


@pytest.mark.parametrize(
    ("overflow", "code"), [("truncate", "ImageCut"), slow_case("fail", "RowTooLong"), slow_case("drop", "NoTrainableToken")]
)  # fmt: skip
def test_a_row_is_not_cut_within_an_image(overflow: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train(tmp_path, "gemma3", {"dataset": {"maxSequenceLength": 8, "overflow": overflow}})
    assert caught.value.code == code
    assert overflow != "truncate" or "train.jsonl, row 1: dataset.maxSequenceLength 8 would cut an image" in str(caught.value)


def test_an_image_whose_pixels_are_cut_off_is_an_error_of_its_row(tmp_path: Path) -> None:
    rows = make_image_rows(("red", "blue"))
    rows[1]["messages"][0]["content"][0]["image"] = to_data_uri(make_png(COLOURS["blue"])[:50])
    with pytest.raises(DataError) as caught:
        train(tmp_path, "gemma3", {}, rows)
    assert caught.value.code == "ImageUnreadable" and caught.value.message.startswith("train.jsonl, row 2: the image cannot be read: ")


def test_a_text_that_contains_the_image_placeholder_is_an_error_of_its_row(tmp_path: Path) -> None:
    rows = make_image_rows(("red", "blue"))
    rows[1]["messages"][1]["content"] = "see <start_of_image>"
    with pytest.raises(DataError) as caught:
        train(tmp_path, "gemma3", {}, rows)
    assert caught.value.code == "ImagePlaceholders" and "row 2: the rendered row has 2 placeholders <start_of_image> for 1 images" in caught.value.message


def test_a_model_that_cannot_read_images_is_refused(tmp_path: Path) -> None:
    run, inputs = make_run(tmp_path, make_tiny_model(tmp_path / "text"), BASE_SPEC, make_image_rows())
    with pytest.raises(ConfigError) as caught:
        train_here(run, inputs)
    assert caught.value.code == "ModelWithoutVision" and "type llama" in str(caught.value)


def test_a_model_whose_processor_needs_a_missing_package_is_refused_by_name(tmp_path: Path) -> None:
    model = make_vision_model(tmp_path / "model", "idefics3")
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    run, inputs = make_run(tmp_path, model, BASE_SPEC, make_image_rows())
    with pytest.raises(ConfigError) as caught:
        train_here(run, inputs)
    assert caught.value.code == "ImageProcessorUnavailable"
    assert "needs the packages of TimmWrapperImageProcessor, which this image does not have" in caught.value.message


def test_a_template_for_texts_is_an_error_of_the_rows_with_images(tmp_path: Path) -> None:
    rows, template = make_image_rows(("red",)), "{% for message in messages %}{{ '<image>' + message['content'] }}{% endfor %}"
    with pytest.raises(DataError) as caught:
        train(tmp_path, "idefics3", {"dataset": {"chatTemplate": {"text": template}}}, rows)
    assert caught.value.code == "TemplateRefusedRow"
    assert 'train.jsonl, row 1: the chat template fails for the conversation: TypeError: can only concatenate str (not "list") to str' in caught.value.message
    assert "the content of each turn is a list of parts of the types `image` and `text`" in str(caught.value)


def test_a_model_without_its_processor_is_refused(tmp_path: Path) -> None:
    from finetune_api.errors import NotFoundError

    model = make_vision_model(tmp_path / "model", "gemma3")
    (model / "preprocessor_config.json").unlink()
    run, inputs = make_run(tmp_path, model, BASE_SPEC, make_image_rows())
    with pytest.raises(NotFoundError) as caught:
        train_here(run, inputs)
    assert caught.value.code == "ProcessorUnreadable" and "config.json" in (caught.value.hint or "")


@pytest.mark.faults
def test_colours_are_learned_from_the_images_alone(tmp_path: Path) -> None:
    """All rows have the same question, so only the image determines the answer."""
    method, training = {"type": "full", "vision": {"visionLayers": True}}, {"maxSteps": 40, "batchSizePerDevice": 5}
    outcome, *_ = train(tmp_path, "qwen2_vl", {"method": method, "training": training, "output": {"verify": False}})
    assert outcome.losses[-1] < 0.4 and len(COLOURS) == 5, "without the images, the model could only guess one of five colours, and the loss would stay higher"


@pytest.mark.faults
def test_transformers_loads_the_adapter_as_the_model_card_says(tmp_path: Path) -> None:
    import json

    from transformers import AutoModelForImageTextToText

    outcome, _, inputs = train(tmp_path, "gemma3", {})
    assert outcome.folder is not None
    config = json.loads((outcome.folder / "adapter_config.json").read_text())
    (outcome.folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(inputs.model)}))
    loaded_weights = dict(AutoModelForImageTextToText.from_pretrained(outcome.folder).named_parameters())
    trained_weights = {name: value for name, value in outcome.model.named_parameters() if value.requires_grad}
    assert trained_weights and all(torch.equal(loaded_weights[name.removeprefix("base_model.model.")], value) for name, value in trained_weights.items())


@pytest.mark.faults
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("vision_layers", [False, True])
def test_recomputed_activations_do_not_change_the_losses(name: str, vision_layers: bool, tmp_path: Path) -> None:
    losses = []
    for mode in ("disabled", "enabled"):
        spec = {"method": {"vision": {"visionLayers": vision_layers}}, "training": {"gradientCheckpointing": mode}, "output": {"verify": False}}
        losses.append(train(tmp_path / mode, name, spec)[0].losses)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.faults
def test_the_chat_template_may_be_in_the_processor_file(tmp_path: Path) -> None:
    import json

    model = make_vision_model(tmp_path / "model", "qwen2_vl")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    run, inputs = make_run(tmp_path, model, BASE_SPEC, make_image_rows())
    outcome = train_here(run, inputs)
    assert outcome.folder is not None and (outcome.folder / "chat_template.jinja").read_text() == template
    assert verify(outcome, run, inputs).result is VerificationOutcome.VERIFIED


@pytest.mark.faults
def test_a_model_trained_on_large_images_is_not_verified_and_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.verification.record.MAX_IMAGE_BYTES", 10)
    outcome, run, inputs = train(tmp_path, "gemma3", {"training": {"maxSteps": 1}})
    reference = ReferenceValues.model_validate_json((inputs.output_dir / FILE_NAME).read_text())
    assert outcome.folder is not None and reference.rows == []
    (result,) = Verifier(run, Channel.create_recording(tmp_path / "work"), inputs, reference).verify([Artefact("adapter", outcome.folder, OutputKind.ADAPTER)])
    assert (result.result, result.code) == (VerificationOutcome.NOT_VERIFIED, "NoReferenceValues")
    assert result.reason == "none of the first 32 rows has at most 2048 tokens and images of 0 MiB"
