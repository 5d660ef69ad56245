"""Turns examples into token sequences once per node, and caches them.

One rank of each node writes the token sequences below the work folder. All ranks map these files into memory. The cache key is a
hash of all inputs that affect the tokens. A second attempt on the same disk, or a repeated local run, reuses the cached files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import ConfigError, DataError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_type_of, value_or_default
from finetune_api.spec.enums import BadRows, DatasetFormat, OverflowPolicy

from finetune_trainer.data.load import DEFAULT_MAX_BAD_ROW_RATIO, LoadedData, load, trains_on_answers_only
from finetune_trainer.data.parallel import BatchEncoder, SupervisedEncoder, encode_rows, usable_cpus
from finetune_trainer.data.rows import Completion
from finetune_trainer.data.template import RenderOptions
from finetune_trainer.data.tokenise import (
    EncodedRow,
    TokenisedSplit,
    TokeniseOptions,
    TokenReport,
    pack_split,
    tokenise,
)
from finetune_trainer.data.vision import (
    IMAGE_SOURCES,
    ROWS_PER_WORKER,
    VisionEncoder,
    VisionProcessor,
    column_of_images,
)
from finetune_trainer.inputs import Inputs

if TYPE_CHECKING:
    from datasets import Dataset

CACHE_VERSION = 5
"""Part of the cache key. Increase the version if a code change affects the tokens or the layout of the cached files."""
SUMMARY_FILE = "summary.json"
MAX_SEQUENCE_LENGTH = "dataset.maxSequenceLength"
DEFAULT_MAX_SEQUENCE_LENGTH = 2048
SHORTEST_SEQUENCE = 2
"""Minimum number of tokens in a row: the model predicts the second token from the first."""
NO_TOKENIZER_LIMIT = 1 << 24
"""A tokenizer without a limit has a huge `model_max_length`. Values of at least this number mean "no limit"."""


@dataclass
class Splits:
    """The data sets of a run."""

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None

    def map(self, change: Callable[[Dataset], Dataset]) -> Splits:
        """Apply the same change to each split."""
        return Splits(change(self.train), self.validation and change(self.validation), self.test and change(self.test))


@dataclass
class PreparedData(Splits):
    """The data sets as token sequences, with token and row counts."""

    format: DatasetFormat = DatasetFormat.MESSAGES
    max_sequence_length: int = 0
    reports: dict[str, TokenReport] = field(default_factory=dict)
    """Token counts per split."""
    rows: dict[str, int] = field(default_factory=dict)
    """Usable rows per split."""
    notes: list[str] = field(default_factory=list)
    multiple_choice: bool = False
    """Whether every row is a question with one letter as its answer."""
    is_from_cache: bool = False


def prepare(
    run: RunConfig, inputs: Inputs, tokenizer: Any, *, max_positions: int | None, cache: Path,
    one_rank_first: AbstractContextManager[Any] | None = None, vision: VisionProcessor | None = None,
) -> PreparedData:  # fmt: skip
    """Return the token sequences for supervised training.

    `max_positions`: the longest sequence that the model can read. `one_rank_first`: a context manager that lets one rank of the
    node run the block before the other ranks. `vision`: the processor of a vision-language model.
    Errors: the errors of `load`; DataError NoTrainableToken, RowTooLong, TemplateRefusedRow, MarkerAbsent (with file and row), those of
    `VisionProcessor.encode`, ImageUnreadable, ImageCut; ConfigError SequenceTooLong, ChatTemplateMissing, TemplateSpansUnknown.
    """
    max_length = max_sequence_length(run, tokenizer, max_positions)
    is_templated = use_chat_template(run, inputs, tokenizer)
    if vision is not None and not is_templated:
        raise ConfigError(
            "ChatTemplateMissing", "the model's processor and tokenizer have no chat template, which writes the placeholders of the images",
            hint="give a template in dataset.chatTemplate",
        )  # fmt: skip
    folder = cache / cache_key(run, inputs, tokenizer, max_length, vision)
    with one_rank_first or nullcontext():
        is_cached = (folder / SUMMARY_FILE).exists()
        if not is_cached:
            _write_tokens(folder, *_tokenise_splits(run, inputs, tokenizer, max_length, is_templated, vision), has_images=vision is not None)
    return _load_prepared(folder, max_length, is_cached)


def max_sequence_length(run: RunConfig, tokenizer: Any, max_positions: int | None) -> int:
    """Return the maximum number of tokens in a row: the value of the spec. If it is a default value and the model has fewer positions, it
    is lowered.

    Virtual tokens of prefix and prompt tuning also occupy positions of the model. Errors: ConfigError SequenceTooLong.
    """
    requested = run.spec.dataset.max_sequence_length
    tokenizer_limit = getattr(tokenizer, "model_max_length", None)
    limit = max_positions or (tokenizer_limit if tokenizer_limit and tokenizer_limit < NO_TOKENIZER_LIMIT else None)
    if limit is None:
        return requested or DEFAULT_MAX_SEQUENCE_LENGTH
    virtual_count = virtual_tokens(run)
    available = limit - virtual_count
    taken_by_prompt = f" and method.promptLength takes {virtual_count} of them" if virtual_count else ""
    if virtual_count and available < SHORTEST_SEQUENCE:
        raise ConfigError(
            "SequenceTooLong", f"the model has {limit} positions{taken_by_prompt}, so no row fits",
            hint=f"write method.promptLength {limit // 2} or less, or choose a model with a longer context",
        )  # fmt: skip
    if requested is None or MAX_SEQUENCE_LENGTH in run.defaults:
        return min(DEFAULT_MAX_SEQUENCE_LENGTH, available)
    if requested <= available:
        return requested
    raise ConfigError(
        "SequenceTooLong", f"{MAX_SEQUENCE_LENGTH} is {requested}, but the model has {limit} positions{taken_by_prompt}",
        hint=f"write {available} or less, or choose a model with a longer context",
    )  # fmt: skip


def virtual_tokens(run: RunConfig) -> int:
    """Return the number of positions that prefix and prompt tuning occupy before every row."""
    return int(value_or_default(run.spec.method, "prompt_length")) if method_type_of(run.spec) in PROMPT_METHODS else 0


def use_chat_template(run: RunConfig, inputs: Inputs, tokenizer: Any) -> bool:
    """If the spec has a chat template, set it on the tokenizer. Returns whether turns are rendered with a chat template.

    Errors: ConfigError ChatTemplateMissing; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.dataset
    if spec.chat_template is not None:
        tokenizer.chat_template = _chat_template_text(spec.chat_template, inputs.config_maps)
    has_template = bool(tokenizer.chat_template)
    if spec.use_chat_template and not has_template:
        raise ConfigError(
            "ChatTemplateMissing", "dataset.useChatTemplate is true, but the tokenizer has no chat template",
            hint="give a template in dataset.chatTemplate, or leave useChatTemplate out",
        )  # fmt: skip
    return has_template if spec.use_chat_template is None else spec.use_chat_template


def _chat_template_text(option: Any, config_maps: Path) -> str:
    if option.text is not None:
        return str(option.text)
    ref = option.config_map_ref
    try:
        return (config_maps / ref.name / ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"dataset.chatTemplate: ConfigMap {ref.name} has no key {ref.key}", hint="create the ConfigMap with this key",
            failure_class=FailureClass.USER,
        ) from None  # fmt: skip


def render_options(run: RunConfig, tokenizer: Any, is_templated: bool, form: DatasetFormat) -> RenderOptions:
    """Return the options for rendering the rows of this run. `is_templated`: whether the tokenizer's chat template is used."""
    option = run.spec.dataset.response_only
    markers = (option.question_marker or "", option.answer_marker or "") if option else ("", "")
    special_tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return RenderOptions(
        tokenizer, is_templated, trains_on_answers_only(run, form), markers if markers[1] else None, tuple(special_tokens),
        text_as_turns=run.spec.dataset.use_chat_template is True,
    )  # fmt: skip


def _tokenise_splits(
    run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, is_templated: bool, vision: VisionProcessor | None
) -> tuple[LoadedData, dict[str, TokenisedSplit], list[str]]:
    """Load, render, tokenise and pack all splits. Returns the splits and the notes for the status."""
    spec = run.spec.dataset
    loaded = load(run, inputs)
    options = TokeniseOptions(
        max_length, spec.overflow or OverflowPolicy.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token
    )
    render_with = render_options(run, tokenizer, is_templated, loaded.summary.format_with_turns)
    encoder: BatchEncoder[EncodedRow] = SupervisedEncoder(render_with, options)
    if vision is not None:
        encoder = VisionEncoder(replace(render_with, has_parts=True), options, vision)
    notes = list(loaded.summary.notes)
    splits: dict[str, TokenisedSplit] = {}
    for name, rows in loaded.splits():
        if is_templated and spec.use_chat_template is None and any(isinstance(example, Completion) for _, example in rows):
            notes.append(
                "prompt and completion are joined without a chat template; dataset.useChatTemplate: true renders them as turns"
            )
        bad_rows = BadRowPolicy(run, len(rows))
        stream = encode_rows(
            rows, encoder, processes=spec.num_proc or usable_cpus(), on_bad_row=bad_rows,
            rows_per_worker=None if vision is None else ROWS_PER_WORKER,
        )  # fmt: skip
        splits[name] = tokenise(stream, options, on_bad_row=bad_rows)
        notes += bad_rows.notes(name) + [f"{name}: {note}" for note in splits[name].report.notes(options)]
    if spec.packing:
        splits["train"] = pack_split(splits["train"], max_length)
        notes.append(f"train: {splits['train'].report.notes(options)[-1]}")
    return loaded, splits, list(dict.fromkeys(notes))


class BadRowPolicy:
    """Applies `dataset.badRows` to rows that can be read, but not rendered or tokenised."""

    def __init__(self, run: RunConfig, rows: int):
        self.spec, self.rows = run.spec.dataset, rows
        self.first: tuple[str, str] | None = None
        """Location and message of the first bad row."""
        self.count = 0

    def __call__(self, location: str, code: str, message: str, hint: str) -> None:
        """Count a bad row. Errors: DataError with `code` if bad rows are not skipped, else TooManyBadRows above the allowed share."""
        if self.spec.bad_rows is not BadRows.SKIP:
            raise DataError(
                code, f"{location}: {message}", hint=f"{hint}; or `dataset.badRows: skip` to leave such rows out"
            )
        self.count += 1
        self.first = self.first or (location, message)
        limit = DEFAULT_MAX_BAD_ROW_RATIO if self.spec.max_bad_row_ratio is None else self.spec.max_bad_row_ratio
        if self.count > limit * self.rows:
            raise DataError(
                "TooManyBadRows", f"more than {limit:.1%} of {self.rows} rows cannot be used; the first: {self.first[0]}: {self.first[1]}",
                hint=f"{hint}; or raise dataset.maxBadRowRatio",
            )  # fmt: skip

    def notes(self, split: str) -> list[str]:
        """Return a sentence for the status if rows were left out, else an empty list."""
        if self.first is None:
            return []
        return [f"{split}: {self.count} rows were left out; the first: {self.first[0]}: {self.first[1]}"]


# ---- cache


def cache_key(run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, vision: VisionProcessor | None = None) -> str:
    """Return a hash of all inputs that affect the tokens: the contents of all files, the options, the tokenizer, the cache version."""
    digest = hashlib.sha256(inputs.dataset_digest.encode())
    mixture = (path for source in inputs.mixture for path in source)
    for path in [*inputs.train, *mixture, *inputs.validation, *inputs.test]:
        digest.update(f"{path.name}\0".encode())
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    seed = run.spec.training.seed if run.spec.dataset.mixture else None
    facts = [
        CACHE_VERSION,
        {name: value for name, value in run.spec.dataset.to_wire().items() if name != "numProc"},
        run.spec.trainer.type,
        run.spec.trainer.max_completion_length,
        _defaulted_options(run),
        max_length,
        seed,
        tokenizer.chat_template,
    ]
    if vision is not None:
        facts += [vision.identity, inputs.image_digests]  # the number of an image's tokens depends on its size
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    digest.update(
        tokenizer.backend_tokenizer.to_str().encode()
        if hasattr(tokenizer, "backend_tokenizer")
        else repr(tokenizer).encode()
    )
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def _defaulted_options(run: RunConfig) -> list[str]:
    """Return the options that the user did not set.

    They are part of the hash: an unsuitable default is adapted, but an unsuitable value of the user is refused.
    """
    return sorted(path for path in run.defaults if path.startswith(("dataset.", "trainer.maxCompletionLength")))


def _write_tokens(folder: Path, loaded: LoadedData, splits: dict[str, TokenisedSplit], notes: list[str], *, has_images: bool) -> None:
    """Write the token files of all splits. `has_images`: the files get a column with the images of each row."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    datasets = {}
    for name, tokens in splits.items():
        columns: dict[str, Any] = {"input_ids": tokens.input_ids, "labels": tokens.labels}
        if tokens.lengths is not None:
            columns["seq_lengths"] = tokens.lengths
        datasets[name] = Dataset.from_dict(columns)
        if has_images:
            images = Features({IMAGE_SOURCES: List({"path": Value("string"), "bytes": Value("binary")})})
            column = Dataset.from_dict({IMAGE_SOURCES: column_of_images(tokens.images)}, features=images)
            datasets[name] = concatenate_datasets([datasets[name], column], axis=1)
    summary = {
        "format": loaded.summary.format, "rows": loaded.summary.rows, "notes": notes,
        "multipleChoice": set(loaded.summary.formats) == {DatasetFormat.MCQ},
        "reports": {name: asdict(tokens.report) for name, tokens in splits.items()},
    }  # fmt: skip
    write_cached(folder, datasets, summary)


def write_cached(folder: Path, datasets: Mapping[str, Dataset], summary: Mapping[str, Any]) -> None:
    """Write data sets and summary to a temporary folder, then rename the folder, so that no reader sees incomplete files."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, dataset in datasets.items():
        dataset.save_to_disk(str(partial / name), num_shards=1)
    (partial / SUMMARY_FILE).write_text(json.dumps(summary))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_cached(folder: Path) -> tuple[Splits, Any]:
    """Load the splits and the summary. The splits are memory-mapped, so that all ranks of a node share the memory."""
    from datasets import Dataset

    train, validation, test = (
        Dataset.load_from_disk(str(folder / name)) if (folder / name).exists() else None
        for name in ("train", "validation", "test")
    )
    assert train is not None, "The training rows are written before the summary, so they exist."
    return Splits(train, validation, test), json.loads((folder / SUMMARY_FILE).read_text())


def _load_prepared(folder: Path, max_length: int, is_cached: bool) -> PreparedData:
    splits, summary = load_cached(folder)
    return PreparedData(
        **vars(splits),
        format=DatasetFormat(summary["format"]),
        max_sequence_length=max_length,
        reports={name: TokenReport(**report) for name, report in summary["reports"].items()},
        rows=summary["rows"],
        notes=summary["notes"],
        multiple_choice=summary["multipleChoice"],
        is_from_cache=is_cached,
    )
