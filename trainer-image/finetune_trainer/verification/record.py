"""Computes the reference values with the trained model in memory, after the final model has been saved.

The computation cannot change the run: all weights are already saved, and random states and the mode of the model are restored. If the computation
fails, the run continues, and the file contains the reason instead of values.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_type_of

from finetune_trainer.data.images import read_content
from finetune_trainer.data.rows import IGNORED_LABEL
from finetune_trainer.data.vision import IMAGE_SOURCES_COLUMN, VisionProcessor, read_image_column
from finetune_trainer.hardware import Hardware
from finetune_trainer.verification.measure import compute_batch_values, compute_row_values
from finetune_trainer.verification.reference import ReferenceRow, ReferenceValues, TrainedAdapter, hash_text

log = logging.getLogger(__name__)
MAX_ROWS = 8
MAX_ROW_TOKENS = 256
"""Maximum number of tokens of a text row. The logits of eight such rows, for a vocabulary of 150 000 tokens in 16 bits, need 0.6 GB."""
MIN_ROW_TOKENS = 2
MAX_IMAGE_BYTES = 4 * 2**20
"""Largest total size of the images of all rows, because they are stored with the reference values."""


def choose_rows(datasets: Sequence[Any], tokenizer: Any) -> list[ReferenceRow]:
    """Return the first rows of the first data set that has rows. Of long rows, the last tokens are kept, because they contain the answer."""
    dataset = next((dataset for dataset in datasets if dataset is not None and len(dataset)), None)
    if dataset is None:
        return []
    if IMAGE_SOURCES_COLUMN in dataset.column_names:
        return _choose_rows_with_images(dataset)
    rows: list[ReferenceRow] = []
    for number in range(min(len(dataset), 4 * MAX_ROWS)):
        rows += _to_reference_rows(dataset[number], tokenizer)
        if len(rows) >= MAX_ROWS:
            break
    return rows[:MAX_ROWS]


def _choose_rows_with_images(dataset: Any) -> list[ReferenceRow]:
    """Return the first rows that are short enough. Long rows are left out instead of cut, because an image needs all of its tokens."""
    rows: list[ReferenceRow] = []
    max_row_length = image_bytes = 0
    for number in range(min(len(dataset), 4 * MAX_ROWS)):
        columns = dataset[number]
        images = [read_content(image) for image in read_image_column(columns)]
        for ids, is_counted in _read_sequences(columns):
            image_bytes_with_row = image_bytes + sum(map(len, images))
            fits = max(max_row_length, len(ids)) * (len(rows) + 1) <= MAX_ROWS * MAX_ROW_TOKENS and image_bytes_with_row <= MAX_IMAGE_BYTES
            if fits and any(is_counted[1:]) and len(rows) < MAX_ROWS:
                rows.append(ReferenceRow(ids=list(map(int, ids)), is_counted=is_counted, images=[base64.b64encode(image).decode() for image in images]))
                max_row_length, image_bytes = max(max_row_length, len(ids)), image_bytes_with_row
    return rows


def _to_reference_rows(columns: Mapping[str, Any], tokenizer: Any) -> list[ReferenceRow]:
    """Return the reference rows of one row of the data set. Rows without a counted token are left out."""
    sequences = _read_sequences(columns)
    if not sequences:
        ids = _tokenise_prompt(columns.get("prompt"), tokenizer)
        sequences = [(ids, [True] * len(ids))]
    rows = [ReferenceRow(ids=list(map(int, ids[-MAX_ROW_TOKENS:])), is_counted=is_counted[-MAX_ROW_TOKENS:]) for ids, is_counted in sequences]
    return [row for row in rows if len(row.ids) >= MIN_ROW_TOKENS and any(row.is_counted[1:])]


def _read_sequences(columns: Mapping[str, Any]) -> list[tuple[list[int], list[bool]]]:
    """Return the token ids of each sequence in a row, and whether each token counts. The result is empty if the row has only a prompt.

    The columns of the row depend on the objective.
    """
    if "input_ids" in columns:
        ids, labels = list(columns["input_ids"]), list(columns.get("labels", columns["input_ids"]))
        return [(ids, [label != IGNORED_LABEL for label in labels])]
    if "prompt_ids" in columns:
        prompt = list(columns["prompt_ids"])
        answers = [list(columns[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns]
        return [([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)) for answer in answers]
    if "chosen_ids" in columns:
        return [(list(columns[name]), [True] * len(columns[name])) for name in ("chosen_ids", "rejected_ids")]
    return []


def _tokenise_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt, which is a text or a list of messages."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not prompt:
        return []
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def record_reference_values(
    trainer: Any, run: RunConfig, hardware: Hardware, rows: list[ReferenceRow], tokenizer: Any, *, head: str, is_sharded: bool,
    vision: VisionProcessor | None = None,
) -> ReferenceValues:  # fmt: skip
    """Return the reference values of the trained model. With sharded weights, every rank must call this function with the same rows."""
    base_model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    reference_values = ReferenceValues(
        head=head, device=hardware.device.type, trusts_code=run.spec.model.trust_remote_code is True, dtype=_read_dtype(base_model),
        autocast="bfloat16" if hardware.computes_in_bf16 else "float16" if hardware.computes_in_fp16 else None,
        attention=hardware.attention, quantization=_read_quantization(base_model), is_tf32=hardware.device.type == "cuda" and _rounds_to_tf32(),
        pad_token_id=int(tokenizer.pad_token_id or 0), tokenizer_length=len(tokenizer), architecture=type(base_model).__name__,
        chat_template_sha256=hash_text(tokenizer.chat_template) if isinstance(tokenizer.chat_template, str) else None,
        adapter=_describe_adapter(trainer.model), rows=rows, reads_images=vision is not None,
    )  # fmt: skip
    if not rows and vision is not None:
        limit_text = f"{MAX_ROWS * MAX_ROW_TOKENS} tokens and images of {MAX_IMAGE_BYTES // 2**20} MiB"
        return reference_values.model_copy(update={"reason": f"none of the first {4 * MAX_ROWS} rows has at most {limit_text}"})
    if not rows:
        return reference_values.model_copy(update={"reason": "the data contains no row of at least two tokens"})
    try:
        return _measure_values(trainer, run, hardware, reference_values, is_sharded=is_sharded, vision=vision)
    except Exception as error:
        log.exception("the reference values of the final model could not be computed")
        return reference_values.model_copy(update={"rows": [], "reason": f"the trainer could not compute reference values: {type(error).__name__}"})


def _measure_values(
    trainer: Any, run: RunConfig, hardware: Hardware, reference: ReferenceValues, *, is_sharded: bool, vision: VisionProcessor | None
) -> ReferenceValues:
    """Return `reference` with the values of its rows in two batch layouts, and with the information whether the adapter changes these values."""
    model = trainer.model_wrapped if is_sharded else trainer.model
    was_training = model.training
    options: dict[str, Any] = {"head": reference.head, "pad_token_id": reference.pad_token_id, "device": hardware.device, "vision": vision}
    autocast = nullcontext() if trainer.is_deepspeed_enabled else trainer.accelerator.autocast()
    adapter = reference.adapter
    model.eval()
    try:
        with autocast, _keep_random_states():
            values = compute_row_values(model, reference.rows, **options)
            batched_values = compute_batch_values(model, reference.rows, **options)
            if adapter is not None and not is_sharded and reference.head == "causal" and method_type_of(run.spec) not in PROMPT_METHODS:
                with trainer.model.disable_adapter():
                    adapter = adapter.model_copy(update={"changes_output": compute_row_values(model, reference.rows, **options) != values})
    finally:
        model.train(was_training)
    rows = [
        row.model_copy(update={"values": row_values, "batched_values": batch_values})
        for row, row_values, batch_values in zip(reference.rows, values, batched_values, strict=True)
    ]
    return reference.model_copy(update={"rows": rows, "adapter": adapter})


def _keep_random_states() -> Any:
    """Restore torch's random states at the end of the context, because a model may draw random numbers in its forward pass."""
    return torch.random.fork_rng()


def _read_dtype(base_model: Any) -> str:
    """Return the number format of the base model's weights, such as `bfloat16`."""
    return str(getattr(base_model, "dtype", torch.float32)).removeprefix("torch.")


def _read_quantization(base_model: Any) -> dict[str, Any] | None:
    config = getattr(base_model.config, "quantization_config", None)
    if config is None:
        return None
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def _rounds_to_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


def _describe_adapter(model: Any) -> TrainedAdapter | None:
    """Return the settings that the adapter's layers use, which may differ from its configuration. None for a model without an adapter."""
    if not hasattr(model, "peft_config"):
        return None
    name = model.active_adapter
    scaling = {
        module_name.removeprefix("base_model.model."): float(module.scaling[name])
        for module_name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling
    }
    peft_type = model.peft_config[name].peft_type
    return TrainedAdapter(peft_type=str(getattr(peft_type, "value", peft_type)), scaling=scaling)
