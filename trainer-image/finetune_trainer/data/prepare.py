"""Turns examples into token sequences once per node, and keeps them.

One rank of each node writes the token sequences below the work folder. All ranks map these files into memory. The folder's name is a
hash of all inputs that affect the tokens. A second attempt on the same disk, or a repeated local run, reuses the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import ConfigError, NotFoundError, StorageError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_type_of, value_or_default
from finetune_api.spec.enums import DatasetFormat, OverflowPolicy

from finetune_trainer.data.batches import Outcome
from finetune_trainer.data.encode import EncodedRows, EncodedSplit, encode_sources, require_few_bad_rows
from finetune_trainer.data.load import DataSummary, trains_on_answers_only
from finetune_trainer.data.pack import pack, packed_batches, padding_share
from finetune_trainer.data.parallel import usable_cpus
from finetune_trainer.data.prepared import PreparedFolder, open_prepared, write_prepared
from finetune_trainer.data.rows import IGNORED_LABEL, Completion, Example
from finetune_trainer.data.supervised import FittingEncoder, RowEncoder, SupervisedEncoder
from finetune_trainer.data.template import RenderOptions
from finetune_trainer.data.tokenise import TokeniseOptions, TokenReport, no_row_left
from finetune_trainer.data.vision import ROWS_WITHOUT_WORKERS, VisionEncoder, VisionProcessor
from finetune_trainer.inputs import Inputs

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

TOKENS_VERSION = 6
"""Part of the digest of the inputs. Increase the version when the code changes the tokens."""
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
    digest = inputs_digest(run, inputs, tokenizer, max_length, vision)
    rank_order = one_rank_first or nullcontext()
    with rank_order:
        found = find_prepared(cache, digest)
        prepared = found or _write_splits(run, inputs, tokenizer, max_length, is_templated, vision, cache, digest)
    return _load_prepared(prepared, max_length, is_from_cache=found is not None)


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


def late_defaults(run: RunConfig, tokenizer: Any, max_positions: int | None) -> dict[str, Any]:
    """Return the defaults that depend on the model or the pod, by spec path. Call this function after `use_chat_template`."""
    dataset = run.spec.dataset
    values = {
        MAX_SEQUENCE_LENGTH: (dataset.max_sequence_length, max_sequence_length(run, tokenizer, max_positions)),
        "dataset.useChatTemplate": (dataset.use_chat_template, bool(tokenizer.chat_template)),
        "dataset.numProc": (dataset.num_proc, usable_cpus()),
    }
    return {path: default for path, (given, default) in values.items() if given is None}


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


def _write_splits(
    run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, is_templated: bool, vision: VisionProcessor | None, cache: Path, digest: str
) -> PreparedFolder:  # fmt: skip
    """Load, render, tokenise, pack and store all splits."""
    spec = run.spec.dataset
    options = TokeniseOptions(
        max_length, spec.overflow or OverflowPolicy.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token
    )
    folder = prepared_folder(cache, digest)
    joins_unasked = is_templated and spec.use_chat_template is None

    def make_encoder(summary: DataSummary) -> FittingEncoder:
        render_with = render_options(run, tokenizer, is_templated, summary.format_with_turns)
        encoder: RowEncoder = SupervisedEncoder(render_with, options)
        if vision is not None:
            encoder = VisionEncoder(replace(render_with, has_parts=True), options, vision)
        return FittingEncoder(encoder, options, has_images=vision is not None)

    def is_marked(example: Example) -> bool:
        return joins_unasked and isinstance(example, Completion)

    with encode_sources(
        run, inputs, make_encoder, rows_folder(folder), is_marked=is_marked, rows_without_workers=None if vision is None else ROWS_WITHOUT_WORKERS
    ) as encoded:
        splits, reports, notes = _describe_splits(run, encoded, options)
        summary = {
            "format": encoded.summary.format, "rows": encoded.summary.rows, "notes": notes,
            "multipleChoice": set(encoded.summary.formats) == {DatasetFormat.MCQ}, "reports": {name: asdict(report) for name, report in reports.items()},
        }  # fmt: skip
        return write_prepared(folder, splits, inputs_digest=digest, summary=summary)


def _describe_splits(
    run: RunConfig, encoded: EncodedRows, options: TokeniseOptions
) -> tuple[dict[str, Iterator[pyarrow.RecordBatch]], dict[str, TokenReport], list[str]]:
    """Return the rows to store, the report, and the notes of the splits. Errors: DataError TooManyBadRows, NoTrainableToken."""
    notes = list(encoded.summary.notes)
    splits: dict[str, Iterator[pyarrow.RecordBatch]] = {}
    reports: dict[str, TokenReport] = {}
    for split in encoded.splits:
        if split.is_marked:
            notes.append(
                "prompt and completion are joined without a chat template; dataset.useChatTemplate: true renders them as turns"
            )
        notes += require_few_bad_rows(run, split.rejected, len(split), split.name)
        report = reports[split.name] = _report_on(split, options)
        notes += [f"{split.name}: {note}" for note in report.notes(options)]
        positions, lengths = split.positions[split.is_kept], split.lengths[split.is_kept]
        splits[split.name] = encoded.shards.read(positions, lengths)
        if run.spec.dataset.packing and split.name == "train":
            bins = pack(lengths.tolist(), options.max_length)
            report.sequences = len(bins)
            report.padding_share = padding_share(report.tokens, len(bins), options.max_length)
            splits["train"] = packed_batches(encoded.shards, positions, lengths, bins, IGNORED_LABEL)
    if run.spec.dataset.packing:
        notes.append(f"train: {reports['train'].notes(options)[-1]}")
    return splits, reports, list(dict.fromkeys(notes))


def _report_on(split: EncodedSplit, options: TokeniseOptions) -> TokenReport:
    """The counts of a split. Errors: DataError NoTrainableToken."""
    lengths = split.lengths[split.is_kept]
    lengths.sort()
    dropped, answerless = split.count(Outcome.TOO_LONG), split.count(Outcome.ANSWERLESS)
    rows = len(lengths)
    if not rows:
        raise no_row_left(dropped, answerless, options.max_length)
    return TokenReport(
        rows=rows, truncated=split.count(Outcome.CUT), dropped=dropped, answerless=answerless,
        tokens=int(lengths.sum()), trained_tokens=int(split.trained[split.is_kept].sum()),
        longest=int(lengths[-1]), median=int(lengths[(rows - 1) // 2]), percentile95=int(lengths[min(rows - 1, int(0.95 * rows))]), sequences=rows,
    )  # fmt: skip


# ---- stored rows


def prepared_folder(cache: Path, digest: str) -> Path:
    """Folder of the rows that were prepared from these inputs."""
    return cache / digest[:24]


def rows_folder(folder: Path) -> Path:
    """Folder for the encoded rows until the splits are written to `folder`."""
    return folder.with_name(folder.name + ".rows")


def find_prepared(cache: Path, digest: str) -> PreparedFolder | None:
    """The rows that were prepared from these inputs; None if they are missing or damaged."""
    try:
        return open_prepared(prepared_folder(cache, digest), digest)
    except StorageError:
        return None


def splits_of(prepared: PreparedFolder) -> Splits:
    """The splits, mapped into memory, so that all ranks of a node share the memory."""
    train, validation, test = (prepared.dataset(name) for name in ("train", "validation", "test"))
    assert train is not None, "a run without training rows prepares no rows"
    return Splits(train, validation, test)


def inputs_digest(run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, vision: VisionProcessor | None = None) -> str:
    """Hash of all inputs that affect the tokens: the contents of all files, the options, the tokenizer, the version of the code."""
    digest = hashlib.sha256(inputs.dataset_digest.encode())
    mixture = (path for source in inputs.mixture for path in source)
    for path in [*inputs.train, *mixture, *inputs.validation, *inputs.test]:
        digest.update(f"{path.name}\0".encode())
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    seed = run.spec.training.seed if run.spec.dataset.mixture else None
    facts = [
        TOKENS_VERSION,
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
    return digest.hexdigest()


def _defaulted_options(run: RunConfig) -> list[str]:
    """Return the options that the user did not set.

    They are part of the hash: an unsuitable default is adapted, but an unsuitable value of the user is refused.
    """
    return sorted(path for path in run.defaults if path.startswith(("dataset.", "trainer.maxCompletionLength")))


def _load_prepared(prepared: PreparedFolder, max_length: int, *, is_from_cache: bool) -> PreparedData:
    summary = prepared.manifest.summary
    return PreparedData(
        **vars(splits_of(prepared)),
        format=DatasetFormat(summary["format"]),
        max_sequence_length=max_length,
        reports={name: TokenReport(**report) for name, report in summary["reports"].items()},
        rows=summary["rows"],
        notes=summary["notes"],
        multiple_choice=summary["multipleChoice"],
        is_from_cache=is_from_cache,
    )
