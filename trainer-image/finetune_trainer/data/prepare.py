"""Turns examples into token sequences once per node, and stores them on the node's disk.

One rank of each node writes the token sequences to a folder below the work folder. All ranks map the folder's files into memory. The
folder's name is a hash of all inputs that affect the tokens. So a second attempt on the same disk, or a repeated local run, reuses the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune_api.errors import ConfigError, NotFoundError, StorageError
from finetune_api.names import RELEASE, FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import PROMPT_METHODS, method_type_of, value_or_default
from finetune_api.spec.enums import DatasetFormat, OverflowPolicy

from finetune_trainer.data.batches import RowOutcome
from finetune_trainer.data.encode import EncodedRows, EncodedSplit, encode_sources, require_few_bad_rows
from finetune_trainer.data.load import DataSummary, trains_on_answers_only
from finetune_trainer.data.pack import build_packed_batches, pack, padding_share
from finetune_trainer.data.parallel import count_usable_cpus
from finetune_trainer.data.prepared import (
    LAYOUT_VERSION,
    PreparedFolder,
    open_prepared,
    prepared_folder,
    write_prepared,
)
from finetune_trainer.data.rows import IGNORED_LABEL, Completion, Example
from finetune_trainer.data.supervised import FittingEncoder, RowEncoder, SupervisedEncoder
from finetune_trainer.data.template import RenderOptions
from finetune_trainer.data.tokenise import TokeniseOptions, TokenReport, no_row_left_error
from finetune_trainer.data.vision import ROWS_WITHOUT_WORKERS, VisionEncoder, VisionProcessor
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.inputs import Inputs

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

TOKENISING_VERSION = 7
"""Version of the tokenising code, which is part of the inputs digest. Increase the version when a change of the code changes the tokens."""
LIBRARIES_IN_DIGEST = ("tokenizers", "transformers", "jinja2")
"""Libraries whose versions are part of the inputs digest, because another version may render or tokenise differently."""
OPTIONS_NOT_IN_DIGEST = ("train", "validation", "test", "storage", "numProc", "chatTemplate")
"""Options of `dataset` that the inputs digest leaves out. `numProc` does not change the rows. The other options are addresses. Instead of the
addresses, the digest covers the content of the data files and of the chat template."""
MAX_SEQUENCE_LENGTH_FIELD = "dataset.maxSequenceLength"
DEFAULT_MAX_SEQUENCE_LENGTH = 2048
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_SETTINGS_WITH_ADDRESSES = frozenset({"name_or_path", "cache_dir", "_commit_hash"})
"""Tokenizer settings that the inputs digest leaves out, because they say where the tokenizer comes from. Settings whose names end with `_file` are
also left out, because they are paths of files."""
DATE_FUNCTION = "strftime_now"
"""Function of chat templates that writes the current date."""
MIN_TOKENS_PER_ROW = 2
"""Minimum number of tokens in a row: the model predicts the second token from the first."""
UNLIMITED_TOKENIZER_LENGTH = 1 << 24
"""A tokenizer without a limit has a huge `model_max_length`. Values of at least this number mean "no limit"."""


@dataclass
class Splits:
    """The training, validation and test rows of a run."""

    train: Dataset
    validation: Dataset | None = None
    test: Dataset | None = None


class PreparationCallbacks(Protocol):
    """Functions that `prepare` calls. A preparation pod uses these functions to download stored rows and to report progress."""

    def provide_rows(self, digest: str) -> None:
        """`prepare` calls this function before it searches the cache for the rows with this digest. The function may write the rows to the cache."""

    def count_rows(self, rows: int) -> None:
        """`prepare` calls this function after each batch, with the number of rows in the batch."""


class NoPreparationCallbacks:
    """Callbacks that do nothing, for training pods."""

    def provide_rows(self, digest: str) -> None:
        """Do nothing: the supervisor of a training pod has already downloaded the stored rows."""

    def count_rows(self, rows: int) -> None:
        """Do nothing."""


@dataclass
class PreparedData(Splits):
    """The splits as token sequences, with token and row counts."""

    format: DatasetFormat = DatasetFormat.MESSAGES
    max_sequence_length: int = 0
    reports: dict[str, TokenReport] = field(default_factory=dict)
    """Token counts by split name."""
    rows: dict[str, int] = field(default_factory=dict)
    """Number of usable rows by split name."""
    notes: list[str] = field(default_factory=list)
    is_multiple_choice: bool = False
    """Whether every row is a question with one letter as its answer."""
    is_from_cache: bool = False


def prepare(
    run: RunConfig, inputs: Inputs, tokenizer: Any, *, max_positions: int | None, cache_folder: Path,
    one_rank_first: AbstractContextManager[Any] | None = None, vision: VisionProcessor | None = None,
    preparation: PreparationCallbacks | None = None,
) -> PreparedData:  # fmt: skip
    """Return the token sequences for supervised training.

    `max_positions`: the longest sequence that the model can read, in tokens. `one_rank_first`: a context manager that lets one rank of
    the node run the block before the other ranks. `vision`: the processor of a vision-language model. `preparation`: callbacks while the rows are
    prepared; None if there are no callbacks.
    Errors: the errors of `load`; DataError NoTrainableToken, RowTooLong, TemplateRefusedRow, MarkerAbsent (with file and row), those of
    `VisionProcessor.encode`, ImageUnreadable, ImageCut; ConfigError SequenceTooLong, ChatTemplateMissing, TemplateSpansUnknown.
    """
    max_length = max_sequence_length(run, tokenizer, max_positions)
    is_templated = choose_chat_template(run, inputs, tokenizer, needs_template=vision is not None)
    digest = inputs_digest(run, inputs, tokenizer, max_length, vision)
    preparation = preparation or NoPreparationCallbacks()
    if vision is None and not template_writes_date(tokenizer):  # rows with images contain paths of this pod's disk
        preparation.provide_rows(digest)
    rank_order = one_rank_first or nullcontext()
    with rank_order:
        stored_folder = find_prepared(cache_folder, digest)
        prepared_folder = stored_folder or _prepare_splits(run, inputs, tokenizer, max_length, is_templated, vision, cache_folder, digest, preparation)
    prepared_data = _load_prepared(prepared_folder, max_length, is_from_cache=stored_folder is not None)
    prepared_data.notes = [*prepared_data.notes, *notes_on_stored_rows(inputs, digest)]
    return prepared_data


def max_sequence_length(run: RunConfig, tokenizer: Any, max_positions: int | None) -> int:
    """Return the maximum number of tokens in a row: `dataset.maxSequenceLength`.

    If the user did not set this field and the model has fewer positions than the default value, the default is lowered.

    Virtual tokens of prefix and prompt tuning also occupy positions of the model. Errors: ConfigError SequenceTooLong.
    """
    requested_length = run.spec.dataset.max_sequence_length
    tokenizer_limit = getattr(tokenizer, "model_max_length", None)
    position_limit = max_positions or (tokenizer_limit if tokenizer_limit and tokenizer_limit < UNLIMITED_TOKENIZER_LENGTH else None)
    if position_limit is None:
        return requested_length or DEFAULT_MAX_SEQUENCE_LENGTH
    virtual_token_count = count_virtual_tokens(run)
    available_length = position_limit - virtual_token_count
    prompt_length_note = f" and method.promptLength takes {virtual_token_count} of them" if virtual_token_count else ""
    if virtual_token_count and available_length < MIN_TOKENS_PER_ROW:
        raise ConfigError(
            "SequenceTooLong", f"the model has {position_limit} positions{prompt_length_note}, so no row fits",
            hint=f"write method.promptLength {position_limit // 2} or less, or choose a model with a longer context",
        )  # fmt: skip
    if requested_length is None or MAX_SEQUENCE_LENGTH_FIELD in run.defaults:
        return min(DEFAULT_MAX_SEQUENCE_LENGTH, available_length)
    if requested_length <= available_length:
        return requested_length
    raise ConfigError(
        "SequenceTooLong", f"{MAX_SEQUENCE_LENGTH_FIELD} is {requested_length}, but the model has {position_limit} positions{prompt_length_note}",
        hint=f"write {available_length} or less, or choose a model with a longer context",
    )  # fmt: skip


def count_virtual_tokens(run: RunConfig) -> int:
    """Return the number of positions that prefix and prompt tuning occupy before every row."""
    return int(value_or_default(run.spec.method, "prompt_length")) if method_type_of(run.spec) in PROMPT_METHODS else 0


def late_defaults(run: RunConfig, tokenizer: Any, max_positions: int | None) -> dict[str, Any]:
    """Return the defaults that depend on the model or the pod, by spec path. Call this function after `choose_chat_template`."""
    dataset = run.spec.dataset
    spec_value_and_default_by_path = {
        MAX_SEQUENCE_LENGTH_FIELD: (dataset.max_sequence_length, max_sequence_length(run, tokenizer, max_positions)),
        "dataset.useChatTemplate": (dataset.use_chat_template, bool(tokenizer.chat_template)),
        "dataset.numProc": (dataset.num_proc, count_usable_cpus()),
    }
    return {path: default for path, (spec_value, default) in spec_value_and_default_by_path.items() if spec_value is None}


def choose_chat_template(run: RunConfig, inputs: Inputs, tokenizer: Any, *, needs_template: bool = False) -> bool:
    """Set the chat template of the spec, if there is one, on the tokenizer. Return whether turns are rendered with a chat template.

    `needs_template`: whether rows cannot be rendered without a template, because they may have images.
    Errors: those of `add_template_variables`; ConfigError ChatTemplateMissing; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.dataset
    if spec.chat_template is not None:
        tokenizer.chat_template = _read_chat_template(spec.chat_template, inputs.config_maps)
    if spec.template_variables:
        tokenizer.chat_template = add_template_variables(tokenizer.chat_template, spec.template_variables)
    has_template = bool(tokenizer.chat_template)
    if spec.use_chat_template and not has_template:
        raise ConfigError(
            "ChatTemplateMissing", "dataset.useChatTemplate is true, but the tokenizer has no chat template",
            hint="give a template in dataset.chatTemplate, or leave useChatTemplate out",
        )  # fmt: skip
    is_used = has_template if spec.use_chat_template is None else spec.use_chat_template
    if needs_template and not is_used:
        raise ConfigError(
            "ChatTemplateMissing", "the model's processor and tokenizer have no chat template, which writes the placeholders of the images",
            hint="give a template in dataset.chatTemplate",
        )  # fmt: skip
    return is_used


def add_template_variables(template: Any, variables: Mapping[str, str]) -> str:
    """Return the chat template with `variables` as default values. A value that is passed to the rendering replaces the default value.

    Errors: ConfigError ChatTemplateMissing; TemplateVariableUnknown if the template does not use a variable.
    """
    if not isinstance(template, str):
        raise ConfigError(
            "ChatTemplateMissing", "dataset.templateVariables is set, but the tokenizer has no single chat template",
            hint="give a template in dataset.chatTemplate, or remove templateVariables",
        )  # fmt: skip
    prefix = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_text_to_jinja_literal(value)} %}}{{% endif %}}" for name, value in sorted(variables.items())
    )
    if template.startswith(prefix):
        return template
    unused_names = [name for name in variables if not re.search(rf"\b{name}\b", template)]
    if unused_names:
        raise ConfigError(
            "TemplateVariableUnknown", f"the chat template does not use {', '.join(unused_names)}, but dataset.templateVariables sets a value",
            hint="write only variables that the template uses",
        )  # fmt: skip
    return prefix + template


def _text_to_jinja_literal(text: str) -> str:
    """Return a variable's text as a Jinja literal. A text that is valid JSON becomes the JSON value, any other text a string."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)  # Jinja has no literal for NaN and Infinity.
    except ValueError:
        value = text
    return _to_jinja_literal(value)


def _to_jinja_literal(value: Any) -> str:
    """Return a JSON value as a Jinja literal. Jinja writes `none` instead of `null`, and does not read JSON's `\\u` escapes."""
    match value:
        case None:
            return "none"
        case dict():
            return "{" + ", ".join(f"{_to_jinja_literal(key)}: {_to_jinja_literal(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_to_jinja_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _read_chat_template(template_option: Any, config_maps: Path) -> str:
    if template_option.text is not None:
        return str(template_option.text)
    config_map_ref = template_option.config_map_ref
    try:
        return (config_maps / config_map_ref.name / config_map_ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"dataset.chatTemplate: there is no ConfigMap {config_map_ref.name} with key {config_map_ref.key}",
            hint="create the ConfigMap with this key", failure_class=FailureClass.USER,
        ) from None  # fmt: skip


def render_options(run: RunConfig, tokenizer: Any, is_templated: bool, dataset_format: DatasetFormat) -> RenderOptions:
    """Return the options for rendering the rows of this run. `is_templated`: whether turns are rendered with the tokenizer's chat template."""
    response_only = run.spec.dataset.response_only
    markers = (response_only.question_marker or "", response_only.answer_marker or "") if response_only else ("", "")
    special_tokens = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True)
    return RenderOptions(
        tokenizer, is_templated, trains_on_answers_only(run, dataset_format), markers if markers[1] else None, tuple(special_tokens),
        renders_text_as_turns=run.spec.dataset.use_chat_template is True,
    )  # fmt: skip


def _prepare_splits(
    run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, is_templated: bool, vision: VisionProcessor | None, cache_folder: Path, digest: str,
    preparation: PreparationCallbacks,
) -> PreparedFolder:  # fmt: skip
    """Load, render, tokenise, pack and store all splits."""
    spec = run.spec.dataset
    options = TokeniseOptions(
        max_length, spec.overflow or OverflowPolicy.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token
    )
    folder = prepared_folder(cache_folder, digest)
    joins_by_default = is_templated and spec.use_chat_template is None

    def make_encoder(summary: DataSummary) -> FittingEncoder:
        rendering_options = render_options(run, tokenizer, is_templated, summary.format_with_turns)
        encoder: RowEncoder = SupervisedEncoder(rendering_options, options)
        if vision is not None:
            encoder = VisionEncoder(replace(rendering_options, has_content_parts=True), options, vision)
        return FittingEncoder(encoder, options, has_images=vision is not None)

    def joins_answer(example: Example) -> bool:
        return joins_by_default and isinstance(example, Completion)

    with encode_sources(
        run, inputs, make_encoder, rows_folder(folder), joins_answer=joins_answer, count_rows=preparation.count_rows,
        rows_without_workers=None if vision is None else ROWS_WITHOUT_WORKERS,
    ) as encoded_rows:
        splits, reports, notes = _build_splits(run, encoded_rows, options)
        summary = {
            "format": encoded_rows.summary.format, "rows": encoded_rows.summary.rows, "notes": notes,
            "multipleChoice": set(encoded_rows.summary.formats) == {DatasetFormat.MCQ}, "reports": {name: asdict(report) for name, report in reports.items()},
        }  # fmt: skip
        return write_prepared(folder, splits, inputs_digest=digest, summary=summary)


def _build_splits(
    run: RunConfig, encoded_rows: EncodedRows, options: TokeniseOptions
) -> tuple[dict[str, Iterator[pyarrow.RecordBatch]], dict[str, TokenReport], list[str]]:
    """Return the batches to store and the token counts of each split, by split name, and the notes for the status.

    Errors: DataError TooManyBadRows, NoTrainableToken.
    """
    notes = list(encoded_rows.summary.notes)
    splits: dict[str, Iterator[pyarrow.RecordBatch]] = {}
    reports: dict[str, TokenReport] = {}
    for split in encoded_rows.splits:
        if split.has_joined_rows:
            notes.append(
                "prompt and completion are joined without a chat template; dataset.useChatTemplate: true renders them as turns"
            )
        notes += require_few_bad_rows(run, split.rejected, len(split), split.name)
        token_report = reports[split.name] = _count_tokens(split, options)
        notes += [f"{split.name}: {note}" for note in token_report.notes(options)]
        positions, lengths = split.positions[split.kept_mask], split.lengths[split.kept_mask]
        splits[split.name] = encoded_rows.shards.read(positions, lengths)
        if run.spec.dataset.packing and split.name == "train":
            bins = pack(lengths.tolist(), options.max_length)
            token_report.sequences = len(bins)
            token_report.padding_share = padding_share(token_report.tokens, len(bins), options.max_length)
            splits["train"] = build_packed_batches(encoded_rows.shards, positions, lengths, bins, IGNORED_LABEL)
    if run.spec.dataset.packing:
        notes.append(f"train: {reports['train'].notes(options)[-1]}")
    return splits, reports, list(dict.fromkeys(notes))


def _count_tokens(split: EncodedSplit, options: TokeniseOptions) -> TokenReport:
    """Return the row and token counts of a split. Errors: DataError NoTrainableToken."""
    lengths = split.lengths[split.kept_mask]
    lengths.sort()
    too_long_count, answerless_count = split.count(RowOutcome.TOO_LONG), split.count(RowOutcome.ANSWERLESS)
    row_count = len(lengths)
    if not row_count:
        raise no_row_left_error(too_long_count, answerless_count, options.max_length)
    return TokenReport(
        rows=row_count, truncated=split.count(RowOutcome.CUT), dropped=too_long_count, answerless=answerless_count,
        tokens=int(lengths.sum()), trained_tokens=int(split.trained_counts[split.kept_mask].sum()),
        longest=int(lengths[-1]), median=int(lengths[(row_count - 1) // 2]), percentile95=int(lengths[min(row_count - 1, int(0.95 * row_count))]),
        sequences=row_count,
    )  # fmt: skip


# ---- stored rows


def rows_folder(folder: Path) -> Path:
    """Return the temporary folder for encoded rows, which exists until the splits are written to `folder`."""
    return folder.with_name(folder.name + ".rows")


def find_prepared(cache_folder: Path, digest: str) -> PreparedFolder | None:
    """Return the stored rows for the inputs with this digest; None if they are missing or damaged."""
    try:
        return open_prepared(prepared_folder(cache_folder, digest), digest)
    except StorageError:
        return None


def open_split(prepared_folder: PreparedFolder, name: str) -> Dataset | None:
    """Return the rows of a split, mapped into memory; None if the folder has no such split."""
    from datasets import Dataset, concatenate_datasets

    paths = prepared_folder.shard_paths(name)
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths]) if paths else None


def open_splits(prepared_folder: PreparedFolder) -> Splits:
    """Return the splits of a prepared folder. The files of the splits are mapped into memory, so that all ranks of a node share the memory."""
    train, validation, test = (open_split(prepared_folder, name) for name in ("train", "validation", "test"))
    assert train is not None, "a run without training rows prepares no rows"
    return Splits(train, validation, test)


def inputs_digest(run: RunConfig, inputs: Inputs, tokenizer: Any, max_length: int, vision: VisionProcessor | None = None) -> str:
    """Return a hash of all inputs that affect the tokens: contents and names of the data files, options, tokenizer, chat template, and code versions.

    The addresses of the files are not part of the hash, except those of a mixture, because the mixture's note contains them. The names of the files
    are part of the hash, because they decide the file format and occur in notes.
    """
    digest_inputs = {
        "version": [TOKENISING_VERSION, LAYOUT_VERSION, RELEASE, *(f"{name} {version(name)}" for name in LIBRARIES_IN_DIGEST)],
        "train": _compute_file_hashes(inputs, inputs.train),
        "mixture": [_compute_file_hashes(inputs, files) for files in inputs.mixture],
        "validation": _compute_file_hashes(inputs, inputs.validation),
        "test": _compute_file_hashes(inputs, inputs.test),
        "dataset": _list_options_in_digest(run, vision),
        "trainer": [run.spec.trainer.type, run.spec.trainer.max_completion_length],
        "defaulted": _list_defaulted_options(run),
        "maxLength": max_length,
        "seed": run.spec.training.seed if run.spec.dataset.mixture else None,
        "tokenizer": [tokenizer.chat_template, tokenizer.special_tokens_map, _identify_tokenizer(inputs, tokenizer)],
        "code": _compute_file_hashes(inputs, sorted((inputs.tokenizer or inputs.model).rglob("*.py"))) if run.spec.model.trust_remote_code else [],
        # The number of an image's tokens depends on its size.
        "vision": [vision.identity, inputs.image_digests] if vision is not None else None,
    }
    return hashlib.sha256(json.dumps(digest_inputs, sort_keys=True, default=str).encode()).hexdigest()


def _compute_file_hashes(inputs: Inputs, files: Sequence[Path]) -> list[list[str]]:
    """Return the name and the sha256 of each file."""
    return [[file.name, inputs.file_digests.get(file) or sha256_file(file)] for file in files]


def _list_options_in_digest(run: RunConfig, vision: VisionProcessor | None) -> dict[str, Any]:
    """Return the options of `dataset` that affect the rows. Only rows of a vision-language model depend on `dataset.images`."""
    options = {name: value for name, value in run.spec.dataset.to_wire().items() if name not in OPTIONS_NOT_IN_DIGEST}
    if vision is None:
        options.pop("images", None)
    return options


def _identify_tokenizer(inputs: Inputs, tokenizer: Any) -> Any:
    """Return values that identify what the tokenizer computes. A tokenizer in Python is identified by its class and its files."""
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in TOKENIZER_SETTINGS_WITH_ADDRESSES and not name.endswith("_file")}
    if hasattr(tokenizer, "backend_tokenizer"):
        return [type(tokenizer).__name__, settings, tokenizer.backend_tokenizer.to_str()]
    folder = inputs.tokenizer or inputs.model
    files = [folder / name for name in sorted({*tokenizer.vocab_files_names.values(), *TOKENIZER_FILES})]
    file_hashes = _compute_file_hashes(inputs, [file for file in files if file.is_file()])
    return [type(tokenizer).__name__, settings, sorted(tokenizer.get_added_vocab().items()), file_hashes]


def template_writes_date(tokenizer: Any) -> bool:
    """Whether the chat template can write the current date.

    If it can write the date, pods do not share prepared rows, because the same data gives other rows on another day.
    """
    return DATE_FUNCTION in str(tokenizer.chat_template)


def notes_on_stored_rows(inputs: Inputs, digest: str) -> list[str]:
    """Return a note if the preparation's rows were downloaded but cannot be used, because this pod's inputs differ; else an empty list."""
    if inputs.stored_rows in (None, digest):
        return []
    return ["the prepared rows come from another tokenizer, other options or another version, so this pod tokenised the data again"]


def _list_defaulted_options(run: RunConfig) -> list[str]:
    """Return the paths of the options that the user did not set.

    These paths are part of the digest, because an unsuitable default is adapted, but an unsuitable value from the user is refused.
    """
    return sorted(path for path in run.defaults if path.startswith(("dataset.", "trainer.maxCompletionLength")))


def _load_prepared(prepared_folder: PreparedFolder, max_length: int, *, is_from_cache: bool) -> PreparedData:
    summary = prepared_folder.manifest.summary
    return PreparedData(
        **vars(open_splits(prepared_folder)),
        format=DatasetFormat(summary["format"]),
        max_sequence_length=max_length,
        reports={name: TokenReport(**report) for name, report in summary["reports"].items()},
        rows=summary["rows"],
        notes=summary["notes"],
        is_multiple_choice=summary["multipleChoice"],
        is_from_cache=is_from_cache,
    )
