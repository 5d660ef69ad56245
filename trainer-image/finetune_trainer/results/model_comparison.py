"""Defines `model_comparison.json`, the answers of the base model and of the trained model to the same prompts, and reads the prompts.

The file has the keys of ATMECS-IT/finetuning. It may also have `response_length_diff`, `label` and further generation options.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.errors import DataError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.spec.common import ConfigMapKeyRef
from pydantic import BaseModel, ConfigDict, Field

PREVIEW_LENGTH = 100
"""Number of characters of a prompt in `prompt_preview`."""
_LINE_END = re.compile(r"\r\n|\n|\r")


class _ComparisonModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class GenerationParams(_ComparisonModel):
    """`metadata.generation_params`: the options with which both models generated their answers."""

    max_new_tokens: int = Field(ge=1, description="Maximum length of an answer in tokens.")
    temperature: float = Field(ge=0, description="Sampling temperature.")
    top_p: float = Field(gt=0, le=1, description="Each token of an answer is sampled from the most likely tokens that together have this probability.")
    do_sample: bool = Field(description="Whether the tokens of an answer were sampled. If false, each token is the most likely token.")
    top_k: int | None = Field(default=None, ge=0, description="Each token of an answer is sampled from this number of most likely tokens.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Minimum probability of a sampled token, as a fraction of the most likely token's probability."
    )
    repetition_penalty: float | None = Field(default=None, gt=0, description="Penalty on repeated tokens.")


class ComparisonMetadata(_ComparisonModel):
    """`metadata` of `model_comparison.json`."""

    base_model: str = Field(description="Base model, as the user wrote it, without secrets.")
    finetuned_model_path: str = Field(description="URI of the trained model.")
    prompts_file: str = Field(description="File of the prompts.")
    num_prompts: int = Field(ge=0, description="Number of prompts.")
    generation_params: GenerationParams
    device: str = Field(description="Device that generated the answers.")
    comparison_date: str = Field(description="Time of the comparison, ISO 8601, UTC.")


class ComparedAnswers(_ComparisonModel):
    """One entry of `comparisons`: one prompt and the two answers."""

    prompt_id: int = Field(ge=1, description="Number of the prompt; the first is 1.")
    prompt: str
    prompt_preview: str = Field(description="The first 100 characters of the prompt.")
    base_model_response: str = Field(description="Answer of the base model.")
    finetuned_model_response: str = Field(description="Answer of the trained model.")
    timestamp: str = Field(description="Time at which the second of the two answers was complete, ISO 8601, UTC.")
    response_length_diff: int | None = Field(
        default=None, description="Number of characters in the trained model's answer minus number of characters in the base model's answer."
    )
    label: str | None = Field(default=None, description="Expected answer or other label of the prompt.")

    @classmethod
    def of(
        cls, number: int, prompt: str, *, base_answer: str, trained_answer: str, time: datetime, label: str | None = None
    ) -> ComparedAnswers:
        """Create an entry, and compute the preview of the prompt and the difference of the answers' lengths."""
        return cls(
            prompt_id=number, prompt=prompt, prompt_preview=prompt[:PREVIEW_LENGTH], base_model_response=base_answer,
            finetuned_model_response=trained_answer, timestamp=format_iso_time(time), response_length_diff=len(trained_answer) - len(base_answer),
            label=label,
        )  # fmt: skip


class ModelComparison(_ComparisonModel):
    """The contents of `model_comparison.json`."""

    metadata: ComparisonMetadata
    comparisons: list[ComparedAnswers]

    def to_json(self) -> str:
        """Return the contents of the file. Keys whose value is None are left out."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def format_iso_time(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with milliseconds."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds")


def read_prompts(ref: ConfigMapKeyRef | None, config_maps: Path) -> list[str]:
    """Return the prompts of `evaluation.comparison.promptsRef`, or an empty list if `ref` is None. `config_maps`: folder of the mounted ConfigMaps.

    Errors: NotFoundError ConfigMapMissing (class Data); DataError PromptsNotUtf8, PromptsEmpty.
    """
    if ref is None:
        return []
    name = f"evaluation.comparison.promptsRef: ConfigMap {ref.name}, key {ref.key}"
    try:
        content = (config_maps / ref.name / ref.key).read_bytes()
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{name}: the pod has no such file", hint="create the ConfigMap with this key", failure_class=FailureClass.DATA
        ) from None
    return parse_prompts(content, name=name)


def parse_prompts(content: bytes, *, name: str) -> list[str]:
    """Return the prompts in a UTF-8 text file, without leading and trailing white space. `name`: name of the file in error messages.

    If the file has blank lines between lines with text, the blank lines separate the prompts, and a prompt may have several lines. Otherwise, each
    line is a prompt. Errors: DataError PromptsNotUtf8, PromptsEmpty.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "PromptsNotUtf8", f"{name}: byte {error.start + 1} is not valid UTF-8", hint="save the file as UTF-8"
        ) from None
    lines = [line.rstrip() for line in _LINE_END.split(text.strip())]
    if lines == [""]:
        raise DataError("PromptsEmpty", f"{name}: no prompts", hint="write one prompt per line, or separate prompts by blank lines")
    if "" not in lines:
        return [line.lstrip() for line in lines]
    blocks = re.split(r"\n{2,}", "\n".join(lines))
    return [block.strip() for block in blocks]
