"""DPO on preference pairs whose questions have images."""

from __future__ import annotations

import base64
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import VerificationOutcome
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs
from finetune_trainer.library_internals import build_processor, connect_backbone, image_text_processor_class
from finetune_trainer.stages.verify import Artefact, Verifier
from finetune_trainer.verification.reference import FILE_NAME, ReferenceValues
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from tests.support.learning import RunOutcome, make_run, merge_mappings, train_here
from tests.support.preferences import assistant_message, user_message
from tests.support.slices import quick_slice
from tests.support.vision import (
    CHAT_TEMPLATE,
    COLOURS,
    FAMILIES,
    make_image_pairs,
    make_png,
    make_vision_model,
    to_data_uri,
)

pytestmark = pytest.mark.pod
BASE_SPEC: dict[str, Any] = {
    "model": {"modality": "visionLanguage"}, "trainer": {"type": "dpo"}, "method": {"type": "lora", "lora": {"dropout": 0}},
    "training": {"learningRate": 1e-2, "maxSteps": 3}, "evaluation": {"strategy": "steps", "steps": 3},
}  # fmt: skip
TEXT_PAIR = {"prompt": [user_message("question")], "chosen": [assistant_message("Paris")], "rejected": [assistant_message("Berlin")]}


def train(
    folder: Path, name: str, spec: dict[str, Any], rows: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None
) -> tuple[RunOutcome, RunConfig, Inputs]:
    run, inputs = make_run(folder, make_vision_model(folder / "model", name), merge_mappings(BASE_SPEC, spec), rows, validation=validation or rows)
    return train_here(run, inputs), run, inputs


def convert_pixels(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the pixels in the arguments of a forward pass to the type of the weights."""
    pixels = options.get("pixel_values")
    return arguments, options if pixels is None else {**options, "pixel_values": pixels.float()}


def compute_trl_loss(base: Path, artefact: Path, rows: list[dict[str, Any]], folder: Path) -> float:
    """Compute the mean DPO loss with TRL's own trainer, which renders, tokenises and masks the rows itself. The base model is the reference model."""
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    processor_class = image_text_processor_class(AutoConfig.from_pretrained(base))
    assert processor_class is not None
    processor = build_processor(processor_class, base, tokenizer)
    processor.chat_template = tokenizer.chat_template
    model, reference = (AutoModelForImageTextToText.from_pretrained(path, dtype="float32") for path in (_set_base_model(artefact, base), base))
    for loaded_model in (model, reference):  # TRL cannot train Llama 4 without these two corrections.
        loaded_model.register_forward_pre_hook(convert_pixels, with_kwargs=True)
        connect_backbone(loaded_model)

    def to_trl_row(row: dict[str, Any]) -> dict[str, Any]:
        """Return the row in TRL's form, in which the images are a separate column."""
        (question,) = row["prompt"]
        if isinstance(question["content"], str):
            return {**row, "images": []}
        content = base64.b64decode(question["content"][0]["image"].partition(",")[2])
        return {**row, "prompt": [user_message(question["content"][1]["text"])], "images": [Image.open(io.BytesIO(content)).convert("RGB")]}

    data = Dataset.from_list([to_trl_row(row) for row in rows])
    args = DPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, per_device_eval_batch_size=len(rows), max_length=None, bf16=False, disable_tqdm=True)
    trainer = DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, eval_dataset=data, processing_class=processor)
    return float(trainer.evaluate()["eval_loss"])


def _set_base_model(artefact: Path, base: Path) -> Path:
    """Write the path of the base model into the configuration of the adapter `trained`. Returns `trained`."""
    import json

    config = artefact / "adapter_config.json"
    if config.exists():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    return artefact


@pytest.mark.parametrize(
    ("name", "method"), quick_slice(itertools.product(FAMILIES, ("lora", "full")), [("qwen2_vl", "lora"), ("gemma3", "full")])
)
def test_the_loss_is_that_of_trls_trainer_for_rows_with_images(name: str, method: str, tmp_path: Path) -> None:
    # The images of a batch have different sizes, and one row has no image. TRL would train on a line break after an answer, so the template adds none.
    rows = [*make_image_pairs(("red", "no", "blue"), sizes=((40, 32), (80, 30))), TEXT_PAIR]
    template = (CHAT_TEMPLATE % FAMILIES[name].placeholder).replace("<|im_end|>\\n", "<|im_end|>")
    spec = {
        "method": {"type": method, "lora": {"dropout": 0} if method == "lora" else None}, "dataset": {"chatTemplate": {"text": template}},
        "evaluation": {"batchSizePerDevice": 4}, "output": {"verify": True},
    }  # fmt: skip
    outcome, run, inputs = train(tmp_path, name, spec, rows)
    assert outcome.losses[0] == pytest.approx(math.log(2), abs=1e-6) and outcome.eval_losses[0] < 0.6
    assert outcome.folder is not None and outcome.kind is not None
    assert outcome.eval_losses == [pytest.approx(compute_trl_loss(inputs.model, outcome.folder, rows, tmp_path / "trl"), abs=2e-5)]
    reference = ReferenceValues.model_validate_json((inputs.output_dir / FILE_NAME).read_text())
    assert [len(row.images) for row in reference.rows] == [1, 1, 1, 1, 1, 1, 0, 0], "the reference values must contain both answers of each row"
    verifier = Verifier(run, Channel.create_recording(tmp_path / "work"), inputs, reference)
    (result,) = verifier.verify([Artefact(outcome.kind, outcome.folder, OutputKind(outcome.kind))])
    assert (result.result, result.reason) == (VerificationOutcome.VERIFIED, None)


def test_the_images_change_the_loss(tmp_path: Path) -> None:
    """A model that ignored the images could not lower the loss.

    The two rows have the same question and different images, and the chosen answer of each row is the rejected answer of the other row.
    """
    first_pair, second_pair = make_image_pairs(("red", "no"))
    second_pair = {**second_pair, "chosen": first_pair["rejected"], "rejected": first_pair["chosen"]}
    spec = {
        "method": {"type": "full", "lora": None, "vision": {"visionLayers": True}}, "evaluation": {"strategy": "no"},
        "training": {"maxSteps": 40, "learningRate": 5e-3, "scheduler": "constant"},
    }  # fmt: skip
    outcome, *_ = train(tmp_path, "qwen2_vl", spec, [first_pair, second_pair])
    assert outcome.losses[-1] < 0.3


def train_on_column_row(folder: Path, **columns: Any) -> RunOutcome:
    """Train on one row with these columns. The row's image is a file in the folder of the data file."""
    folder.mkdir(exist_ok=True)
    (folder / "red.png").write_bytes(make_png(COLOURS["red"]))
    row = {"prompt": "question", "chosen": "red", "rejected": "is it no", **columns}
    return train(folder, "gemma3", {"training": {"maxSteps": 2}, "evaluation": {"strategy": "no"}}, [row])[0]


def test_images_may_be_a_separate_column_of_text_rows(tmp_path: Path) -> None:
    spec = {"training": {"maxSteps": 2}, "evaluation": {"strategy": "no"}}
    message_outcome = train(tmp_path / "message", "gemma3", spec, make_image_pairs(("red", "no"))[:1])[0]
    column_outcome = train_on_column_row(tmp_path / "column", image="red.png")
    assert column_outcome.losses == message_outcome.losses and column_outcome.losses[1] < column_outcome.losses[0]


@pytest.mark.parametrize(
    ("columns", "code", "message"),
    [
        ({"image": "missing.png"}, "ImageMissing", "row 1: image 1: 'missing.png' does not exist"),
        (
            {
                "prompt": [user_message("question")], "chosen": [assistant_message("red")],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}, {"type": "image", "image": "red.png"}]}],
            },
            "ImageInAnswer", "row 1: the rejected answer has an image",
        ),
        ({"image": to_data_uri(make_png(COLOURS["red"])[:50])}, "ImageUnreadable", "row 1: "),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used_are_errors_of_their_rows(columns: dict[str, Any], code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_on_column_row(tmp_path, **columns)
    assert caught.value.code == code and message in caught.value.message


def test_long_answers_are_cut_but_prompts_with_images_are_not(tmp_path: Path) -> None:
    rows = make_image_pairs(("red", "no"))
    spec = {"training": {"maxSteps": 1}, "evaluation": {"strategy": "no"}, "output": {"verify": False}}
    outcome, *_ = train(tmp_path / "cut", "gemma3", spec | {"dataset": {"maxSequenceLength": 24}}, rows)
    assert len(outcome.losses) == 1 and "train: answers of 2 rows were cut to trainer.maxCompletionLength 12" in outcome.notes
    with pytest.raises(DataError) as caught:
        train(tmp_path / "short", "gemma3", spec | {"dataset": {"maxSequenceLength": 8}}, rows)
    assert caught.value.code == "NoTrainableToken" and "2 rows are too long" in caught.value.message


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = make_vision_model(tmp_path / "model", "gemma3")
    (model / "chat_template.jinja").unlink()
    run, inputs = make_run(tmp_path, model, merge_mappings(BASE_SPEC, {"evaluation": {"strategy": "no"}}), make_image_pairs(("red", "no")))
    with pytest.raises(ConfigError) as caught:
        train_here(run, inputs)
    assert caught.value.code == "ChatTemplateMissing" and "placeholders of the images" in caught.value.message
