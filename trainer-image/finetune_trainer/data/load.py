"""Reads data files into typed examples, and normalises, checks, splits and counts them. This module does not need torch.

The supervisor checks all rows before the ranks start (`check_files`), so that a bad row ends a job within seconds. Later, one rank of each
node reads the rows again to get the examples. Rows are read one by one (`RowReader`), so that the data may be larger than the memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetune_api.errors import ConfigError, DataError
from finetune_api.objectives import FORMATS_WITHOUT_TURNS, OBJECTIVES
from finetune_api.pod import RunConfig
from finetune_api.rules import is_vision_language
from finetune_api.sources import redact_source
from finetune_api.spec.dataset import Columns, Dataset, Images
from finetune_api.spec.enums import BadRows, DatasetFormat, FileFormat, TrainerType

from finetune_trainer.data import checks
from finetune_trainer.data.detect import SAMPLE_ROWS, detect_format, is_alpaca_despite_spec, require_columns
from finetune_trainer.data.formats import Format, ReadOptions, find_format
from finetune_trainer.data.images import ImageReader, require_no_images
from finetune_trainer.data.read import SkippedRows, data_files, read_rows, row_error_as_data_error
from finetune_trainer.data.rows import Completion, Conversation, Example, Prompt, RawRow, RowError
from finetune_trainer.data.split import cut_into_splits, mix

if TYPE_CHECKING:
    from finetune_trainer.inputs import Inputs

RESPONSE_ONLY = "dataset.responseOnly.enabled"
DEFAULT_MAX_BAD_ROW_RATIO = 0.05
Row = tuple[RawRow, Example]
Rows = list[Row]
Item = TypeVar("Item")


@dataclass
class DataSummary:
    """Formats, row counts and check results of the data."""

    format: DatasetFormat
    """Format of the first source."""
    formats: list[DatasetFormat] = field(default_factory=list)
    """Formats of all sources, in the order in which the sources are read, without duplicates."""
    rows: dict[str, int] = field(default_factory=dict)
    """Number of usable rows of each split: train, validation, test."""
    bad_rows: int = 0
    findings: checks.CheckFindings = field(default_factory=checks.CheckFindings)
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    training_images: dict[Path, str] = field(default_factory=dict)
    """The image files of the training rows, each with its path relative to the image folder. Images whose bytes are in the data files
    are left out."""
    held_out_images: dict[Path, str] = field(default_factory=dict)
    """The image files of the validation and test rows, in the same form as `training_images`."""

    @property
    def format_with_turns(self) -> DatasetFormat:
        """The first format with turns, or the first format if none has turns. This format decides which tokens of a row are trained on.

        In text without turns, all tokens are trained on. A format with turns is preferred, so that one source of plain text does not cause a mixture
        to train on all tokens of its other sources.
        """
        return next((candidate for candidate in self.formats if candidate not in FORMATS_WITHOUT_TURNS), self.format)


@dataclass
class LoadedData:
    """The examples of every split, each with its raw row."""

    train: Rows
    validation: Rows
    test: Rows
    summary: DataSummary

    def splits(self) -> list[tuple[str, Rows]]:
        """Return the name and the rows of each split that has rows."""
        named_splits = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, rows) for name, rows in named_splits if rows]


def check_files(run: RunConfig, inputs: Inputs) -> DataSummary:
    """Read and check every row of every file, without keeping the rows in memory. Imports neither torch nor transformers.

    Errors: DataError (65) with file and row: DatasetEmpty, DatasetNotUtf8, DatasetRowInvalid, ColumnMissing, UnknownRole,
    ConversationEmpty, NoTrainableToken, FormatUnknown, SplitEmpty, TooManyBadRows; ConfigError (64): FormatMismatch.
    """
    reader = RowReader(run, inputs)
    for _ in reader.rows():
        pass
    reader.splits()
    return reader.summary


def load(run: RunConfig, inputs: Inputs, *, training_rows: int | None = None) -> LoadedData:
    """Read the examples of a run into memory. Errors: see `check_files`.

    `training_rows`: number of training rows to return; None for all. If `training_rows` is a number, the files are read twice, so that the
    remaining training rows are never in memory.
    """
    reader = RowReader(run, inputs)
    if training_rows is None:
        rows: Sequence[Row] | Mapping[int, Row] = list(reader.rows())
        splits = reader.splits()
    else:
        for _ in reader.rows():
            pass
        splits = {name: row_numbers[:training_rows] if name == "train" else row_numbers for name, row_numbers in reader.splits().items()}
        wanted_row_numbers = {number for row_numbers in splits.values() for number in row_numbers}
        rows = {number: row for number, row in enumerate(RowReader(run, inputs).rows()) if number in wanted_row_numbers}
    train, validation, test = ([rows[number] for number in splits[name]] for name in ("train", "validation", "test"))
    return LoadedData(train, validation, test, reader.summary)


def trains_on_answers_only(run: RunConfig, dataset_format: DatasetFormat) -> bool:
    """Whether only answers are trained on. Text without turns has no answers, unless the user gives markers that show the answers.

    Errors: ConfigError ResponseOnlyWithoutTurns.
    """
    response_only = run.spec.dataset.response_only
    is_enabled = response_only is None or response_only.enabled is not False
    if not is_enabled or dataset_format not in FORMATS_WITHOUT_TURNS:
        return is_enabled
    has_markers = response_only is not None and bool(response_only.question_marker or response_only.answer_marker)
    if has_markers or RESPONSE_ONLY in run.defaults or response_only is None:
        return has_markers
    raise ConfigError(
        "ResponseOnlyWithoutTurns", f"dataset.responseOnly.enabled is true, but rows of format {dataset_format} have no turns and therefore no answers",
        hint="set dataset.responseOnly.questionMarker and answerMarker, or leave responseOnly out",
    )  # fmt: skip


class RowReader:
    """Reads the usable rows of a run one by one, and then assigns their numbers to the splits.

    Rows are numbered from 0 in reading order: the training rows of each source, then the rows of the validation files, then the rows of the
    test files. Rows are assigned to splits before sources are mixed, because a mixture repeats the rows of a small source. If sources were mixed
    first, copies of one row could be in both the training and the validation rows.
    """

    def __init__(self, run: RunConfig, inputs: Inputs):
        self.run = run
        self.summary = DataSummary(run.spec.dataset.format or DatasetFormat.MESSAGES)
        self._checks = checks.RowChecks(run.spec.dataset.checks)
        self._source_reader = SourceReader(run, self.summary, inputs.images)
        self._sources = self._list_sources(inputs)
        self._held_out_sources = [self._create_source(paths) if paths else None for paths in (inputs.validation, inputs.test)]
        self._row_counts: list[int] = []
        """Number of usable rows of each training source, then of the validation files, then of the test files."""

    def _list_sources(self, inputs: Inputs) -> list[Source]:
        """Return the sources of training rows. A job that does not train may have no training rows."""
        spec = self.run.spec.dataset
        if inputs.mixture:
            paths_and_items = zip(inputs.mixture, spec.mixture or [], strict=True)
            return [Source(self._source_reader, paths, item.format or spec.format, item.columns or spec.columns) for paths, item in paths_and_items]
        if not inputs.train and self.run.spec.phases.train is False:
            return []
        return [self._create_source(inputs.train)]

    def _create_source(self, paths: list[Path]) -> Source:
        spec = self.run.spec.dataset
        return Source(self._source_reader, paths, spec.format, spec.columns)

    def detect_formats(self) -> None:
        """Add formats to the summary until one of them has turns, because `summary.format_with_turns` is needed before the first row is rendered."""
        for source in self._sources:
            source.open()
            if self.summary.format_with_turns not in FORMATS_WITHOUT_TURNS:
                return
        for held_out_source in self._held_out_sources:
            if held_out_source is not None:
                held_out_source.open()

    def rows(self) -> Iterator[Row]:
        """Yield every usable row. May be called only once. Errors: see `check_files`."""
        for source in self._sources:
            row_count = 0
            for row, example in source.rows():
                if self._checks.accept(example):
                    row_count += 1
                    yield row, example
            self._row_counts.append(row_count)
        self.summary.findings = self._checks.findings()
        self.summary.notes += self.summary.findings.notes()
        self._source_reader.image_names = self.summary.held_out_images
        for held_out_source in self._held_out_sources:
            row_count = 0
            for row_and_example in held_out_source.rows() if held_out_source is not None else ():
                row_count += 1
                yield row_and_example
            self._row_counts.append(row_count)

    def splits(self) -> dict[str, array[int]]:
        """Return the row numbers of train, validation and test, in the order of use. Call this method after all rows have been read.

        Errors: DataError SplitEmpty, DatasetEmpty.
        """
        ends = list(accumulate(self._row_counts))
        *rows_of_sources, validation, test = (range(end - count, end) for end, count in zip(ends, self._row_counts, strict=True))
        held_out_splits: dict[str, Sequence[int]] = {"validation": validation, "test": test}
        if self.run.spec.dataset.split is not None:
            training, *cut_splits = cut_into_splits(range(sum(map(len, rows_of_sources))), self.run.spec.dataset.split)
            rows_of_sources = [training[bisect_left(training, source_rows.start) : bisect_left(training, source_rows.stop)] for source_rows in rows_of_sources]
            held_out_splits = {name: rows_of_files or cut_rows for (name, rows_of_files), cut_rows in zip(held_out_splits.items(), cut_splits, strict=True)}
        is_mixture = bool(self.run.spec.dataset.mixture)
        train: Sequence[int] = _mix_sources(self.summary, self.run, rows_of_sources) if is_mixture else rows_of_sources[0] if rows_of_sources else ()
        self.summary.rows = {"train": len(train), **{name: len(row_numbers) for name, row_numbers in held_out_splits.items()}}
        return {"train": array("q", train), **{name: array("q", row_numbers) for name, row_numbers in held_out_splits.items()}}


def _mix_sources(summary: DataSummary, run: RunConfig, sources: Sequence[Sequence[Item]]) -> list[Item]:
    """Mix the sources of `dataset.mixture` by their weights and the seed. Errors: DataError DatasetEmpty."""
    mixture_items = run.spec.dataset.mixture or []
    weights = [1.0 if mixture_item.weight is None else mixture_item.weight for mixture_item in mixture_items]
    for mixture_item, rows, weight in zip(mixture_items, sources, weights, strict=True):
        if weight and not rows:
            raise DataError(
                "DatasetEmpty", f"{redact_source(mixture_item.source)}: no row is left to train on after duplicates and held-out rows were removed",
                hint="add rows to this source, or remove the source from dataset.mixture",
            )  # fmt: skip
    seed = 42 if run.spec.training.seed is None else run.spec.training.seed
    mixed_rows = mix(sources, weights, seed)
    shares = ", ".join(
        f"{redact_source(mixture_item.source)} {len(rows)} rows, weight {weight:g}"
        for mixture_item, rows, weight in zip(mixture_items, sources, weights, strict=True)
    )
    summary.notes.append(f"mixture of {len(mixed_rows)} rows: {shares}")
    return mixed_rows


def convert_to_prompt(example: Example, row: RawRow) -> Example | RowError:
    """Convert an example to a prompt. The prompt keeps the answer and the other columns of the row, because rewards may read them."""
    match example:
        case Conversation(turns):
            last_answer_index = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
            if last_answer_index == 0:
                return RowError("PromptMissing", "the conversation begins with the answer", "put a question before the answer")
            answer = {"answer": turns[last_answer_index].content} if last_answer_index < len(turns) else {}
            scalar_columns = {key: value for key, value in row.value.items() if isinstance(value, str | int | float | bool)}
            return Prompt(turns[:last_answer_index], {**scalar_columns, **answer})
        case Completion(prompt, completion):
            return Prompt(prompt, {"answer": completion})
        case _:
            return example


class Source:
    """The rows of one source."""

    def __init__(self, reader: SourceReader, paths: list[Path], spec_format: DatasetFormat | None, columns: Columns | None):
        self._reader, self._paths = reader, paths
        self._spec_format, self._columns = spec_format, columns or Columns()
        self._bad_rows = SkippedRows()
        self._row_stream: Iterator[RawRow] | None = None

    def open(self) -> None:
        """Read the first rows and choose the format from them. Errors: ConfigError, DataError."""
        if self._row_stream is not None:
            return
        reader, files = self._reader, data_files(self._paths)
        stream = read_rows(
            files, reader.spec.file_format or FileFormat.AUTO, bad_rows=self._bad_rows if reader.skips_bad_rows else None
        )
        sample = list(islice(stream, SAMPLE_ROWS))
        self._file_names = ", ".join(file.name for file in files)
        if not sample and not self._bad_rows.count:
            raise DataError("DatasetEmpty", f"{self._file_names}: no rows", hint="give a file with at least one row")
        self._format, self._columns = reader.choose_format(sample, self._spec_format, self._columns)
        self._row_stream = chain(sample, stream)

    def rows(self) -> Iterator[Row]:
        """Yield the usable rows. May be called only once. Errors: ConfigError, DataError."""
        self.open()
        assert self._row_stream is not None, "`open` has opened it"
        row_count = 0
        for row in self._reader.read_examples(self._row_stream, self._format, self._columns, self._bad_rows):
            row_count += 1
            yield row
        self._reader.require_few_bad_rows(self._bad_rows, row_count + self._bad_rows.count)
        if not row_count:
            raise DataError("DatasetEmpty", f"{self._file_names}: no usable rows", hint="fix the rows")


class SourceReader:
    """Converts the rows of all sources to examples, with one policy for bad rows and one summary."""

    def __init__(self, run: RunConfig, summary: DataSummary, image_root: Path | None = None):
        self.run = run
        self.summary = summary
        self.spec: Dataset = run.spec.dataset
        self.images = ImageReader(self.spec.images or Images(), image_root) if is_vision_language(run.spec) else None
        """None for a text model."""
        self.image_names = summary.training_images
        """The dictionary to which `read_examples` adds the image files of its rows: file to name."""
        self.trainer_type = run.spec.trainer.type or TrainerType.SFT
        self.skips_bad_rows = self.spec.bad_rows is BadRows.SKIP

    def choose_format(
        self, sample: list[RawRow], spec_format: DatasetFormat | None, columns: Columns
    ) -> tuple[Format, Columns]:
        """Return the format of the rows and the column names to use. Errors: ConfigError FormatMismatch; DataError."""
        if spec_format is not None and is_alpaca_despite_spec(sample, spec_format, columns):
            row_format = find_format(DatasetFormat.ALPACA)
            named_columns = " or ".join(f"`{name}`" for name in (columns.question, columns.answer) if name)
            self.summary.notes.append(
                f"no row has {named_columns} of dataset.columns, and all rows have `instruction` and `output`: the rows are read as alpaca"
            )
            columns = columns.model_copy(update={"question": None, "answer": None})
        elif spec_format is not None:
            row_format = find_format(spec_format)
        elif self.trainer_type is TrainerType.GRPO and all(isinstance(row.value.get("prompt"), list) for row in sample):
            row_format = find_format(DatasetFormat.PROMPT_ONLY)
        else:
            row_format = detect_format(sample, columns)
        self._require_format_of_objective(row_format.name)
        require_columns(sample, row_format, columns)
        if not self.summary.formats:
            self.summary.format = row_format.name
        if row_format.name not in self.summary.formats:
            self.summary.formats.append(row_format.name)
        return row_format, columns

    def _require_format_of_objective(self, dataset_format: DatasetFormat) -> None:
        """Check that the run's `trainer.type` supports the format. Errors: ConfigError FormatMismatch."""
        formats = OBJECTIVES[self.trainer_type].dataset_formats
        if dataset_format not in formats:
            requirement = (
                f"needs {formats[0]} data; the rows are {dataset_format}"
                if len(formats) == 1
                else f"cannot learn from {dataset_format} data"
            )
            raise ConfigError(
                "FormatMismatch", f"trainer {self.trainer_type} {requirement}",
                hint=f"give data in a format of this trainer, or choose a trainer that learns from {dataset_format} data",
            )  # fmt: skip

    def _build_read_options(self, row_format: Format, columns: Columns) -> ReadOptions:
        multiple_choice = self.spec.mcq
        return ReadOptions(
            columns=columns, system_prompt=self.spec.system_prompt, template=self.spec.template,
            include_options=multiple_choice is None or multiple_choice.include_options is not False,
            needs_answer=self.trainer_type is TrainerType.SFT and trains_on_answers_only(self.run, row_format.name),
        )  # fmt: skip

    def read_examples(self, rows: Iterable[RawRow], row_format: Format, columns: Columns, bad_rows: SkippedRows) -> Iterator[Row]:
        """Yield the usable rows with their examples, and add bad rows to `bad_rows`. Errors: DataError for a bad row if bad rows are not skipped."""
        needs_json = self.spec.checks is not None and self.spec.checks.validate_json is True
        options = self._build_read_options(row_format, columns)
        for row, example_or_error in row_format.read_all(rows, options):
            if not isinstance(example_or_error, RowError):
                example_or_error = self._attach_images(example_or_error, row, options.columns)
            if self.trainer_type is TrainerType.GRPO and not isinstance(example_or_error, RowError):
                example_or_error = convert_to_prompt(example_or_error, row)
            if needs_json and not isinstance(example_or_error, RowError):
                example_or_error = checks.find_json_error(example_or_error) or example_or_error
            if not isinstance(example_or_error, RowError):
                yield row, example_or_error
            elif self.skips_bad_rows:
                bad_rows.add(row, example_or_error)
            else:
                raise row_error_as_data_error(row, example_or_error)

    def _attach_images(self, example: Example, row: RawRow, columns: Columns) -> Example | RowError:
        """Return the example with its image files, or the error of the row. Rows of a text job must not have images."""
        if self.images is None:
            return require_no_images(example) or example
        try:
            example_with_images = self.images.attach(example, row, columns)
        except RowError as error:
            return error
        self.image_names |= self.images.image_names(example_with_images, row)
        return example_with_images

    def require_few_bad_rows(self, bad_rows: SkippedRows, row_count: int) -> None:
        """Add a note about the bad rows of a source with `row_count` rows.

        Errors: TooManyBadRows if the share of bad rows is above `dataset.maxBadRowRatio`.
        """
        self.summary.bad_rows += bad_rows.count
        if bad_rows.first is None:
            return
        max_ratio = DEFAULT_MAX_BAD_ROW_RATIO if self.spec.max_bad_row_ratio is None else self.spec.max_bad_row_ratio
        first_row, error = bad_rows.first
        if bad_rows.count > max_ratio * row_count:
            raise DataError(
                "TooManyBadRows",
                f"{bad_rows.count} of {row_count} rows cannot be used, more than {max_ratio:.1%}; the first: {first_row.location}: {error.message}",
                hint=f"{error.hint}; or raise dataset.maxBadRowRatio",
            )  # fmt: skip
        self.summary.notes.append(
            f"{bad_rows.count} of {row_count} rows were left out; the first: {first_row.location}: {error.message}"
        )


__all__ = ["DataSummary", "LoadedData", "check_files", "load", "trains_on_answers_only"]
