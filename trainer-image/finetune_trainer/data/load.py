"""Reads data files into typed examples, and normalises, checks, splits and counts them. These stages need no torch.

The supervisor runs these stages before the ranks start (`check_files`), so that a bad row ends a job within seconds. The ranks run
the stages again to get the examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.errors import ConfigError, DataError
from finetune_api.objectives import FORMATS_WITHOUT_TURNS, OBJECTIVES
from finetune_api.pod import RunConfig
from finetune_api.rules import is_vision_language
from finetune_api.sources import redact_source
from finetune_api.spec.dataset import Columns, Dataset, Images, Split
from finetune_api.spec.enums import BadRows, DatasetFormat, FileFormat, TrainerType

from finetune_trainer.data import checks
from finetune_trainer.data.detect import SAMPLE_ROWS, detect_format, is_alpaca_instead, require_columns
from finetune_trainer.data.formats import Format, ReadOptions, format_named
from finetune_trainer.data.images import ImageReader, require_no_images
from finetune_trainer.data.read import data_files, read_rows, row_error_as_data_error
from finetune_trainer.data.rows import Completion, Conversation, Example, Prompt, RawRow, RowError
from finetune_trainer.data.split import cut, mix

if TYPE_CHECKING:
    from finetune_trainer.inputs import Inputs

RESPONSE_ONLY = "dataset.responseOnly.enabled"
DEFAULT_MAX_BAD_ROW_RATIO = 0.05
Rows = list[tuple[RawRow, Example]]


@dataclass
class DataSummary:
    """Formats, row counts and check results of the data."""

    format: DatasetFormat
    """Format of the first source."""
    formats: list[DatasetFormat] = field(default_factory=list)
    """Formats of all sources, in the order in which the sources are read, without duplicates."""
    rows: dict[str, int] = field(default_factory=dict)
    """Usable rows per split: train, validation, test."""
    bad_rows: int = 0
    findings: checks.CheckFindings = field(default_factory=checks.CheckFindings)
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    training_images: dict[Path, str] = field(default_factory=dict)
    """Files of the images in the training data, with their names below the folder of the images. Images inside the data files are left out."""
    held_out_images: dict[Path, str] = field(default_factory=dict)
    """The same for the validation and test data."""

    @property
    def format_with_turns(self) -> DatasetFormat:
        """Return the first format with turns, or the first format if none has turns. The result decides which part of a row is trained on.

        In text without turns, all tokens are trained on. A source of such text must not have this effect on the other sources of a mixture.
        """
        return next((form for form in self.formats if form not in FORMATS_WITHOUT_TURNS), self.format)


@dataclass
class LoadedData:
    """The examples of every split, each with its raw row."""

    train: Rows
    validation: Rows
    test: Rows
    summary: DataSummary

    def splits(self) -> list[tuple[str, Rows]]:
        """Return the splits that have rows, by name."""
        named_splits = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, rows) for name, rows in named_splits if rows]


def check_files(run: RunConfig, inputs: Inputs) -> DataSummary:
    """Read and check every row of every file. Imports neither torch nor transformers.

    Errors: DataError (65) with file and row: DatasetEmpty, DatasetNotUtf8, DatasetRowInvalid, ColumnMissing, UnknownRole,
    ConversationEmpty, NoTrainableToken, FormatUnknown, SplitEmpty, TooManyBadRows; ConfigError (64): FormatMismatch.
    """
    return load(run, inputs).summary


def load(run: RunConfig, inputs: Inputs) -> LoadedData:
    """Return all examples of a run. Errors: see `check_files`."""
    spec = run.spec.dataset
    reader = _SourceReader(run, inputs.images)
    sources = reader.apply_checks(_read_sources(reader, run, inputs))
    reader.image_names = reader.summary.held_out_images
    validation = reader.read(inputs.validation, spec.format, spec.columns) if inputs.validation else []
    test = reader.read(inputs.test, spec.format, spec.columns) if inputs.test else []
    if spec.split is not None:
        sources, cut_validation, cut_test = _split_sources(sources, spec.split)
        validation, test = validation or cut_validation, test or cut_test
    train = _mix_sources(reader.summary, run, sources) if inputs.mixture else sources[0]
    reader.summary.rows = {"train": len(train), "validation": len(validation), "test": len(test)}
    return LoadedData(train, validation, test, reader.summary)


def trains_on_answers_only(run: RunConfig, form: DatasetFormat) -> bool:
    """Whether the loss covers answers only. Text without turns has no answers unless the user gives markers.

    Errors: ConfigError ResponseOnlyWithoutTurns.
    """
    option = run.spec.dataset.response_only
    is_enabled = option is None or option.enabled is not False
    if not is_enabled or form not in FORMATS_WITHOUT_TURNS:
        return is_enabled
    has_markers = option is not None and bool(option.question_marker or option.answer_marker)
    if has_markers or RESPONSE_ONLY in run.defaults or option is None:
        return has_markers
    raise ConfigError(
        "ResponseOnlyWithoutTurns", f"dataset.responseOnly.enabled is true, but rows of format {form} have no turns and therefore no answers",
        hint="set dataset.responseOnly.questionMarker and answerMarker, or leave responseOnly out",
    )  # fmt: skip


def _read_sources(reader: _SourceReader, run: RunConfig, inputs: Inputs) -> list[Rows]:
    """Return the training rows of each source. A job that does not train may have no rows."""
    spec = run.spec.dataset
    if not inputs.mixture and not inputs.train and run.spec.phases.train is False:
        return [[]]
    if not inputs.mixture:
        return [reader.read(inputs.train, spec.format, spec.columns)]
    return [
        reader.read(paths, item.format or spec.format, item.columns or spec.columns)
        for paths, item in zip(inputs.mixture, spec.mixture or [], strict=True)
    ]


def _split_sources(sources: Sequence[Rows], split: Split) -> tuple[list[Rows], Rows, Rows]:
    """Return the training rows of each source, the validation rows and the test rows.

    The rows are split before the sources are mixed, because a mixture repeats the rows of a small source. If the mixture were split,
    copies of one row could be in both training and validation data.
    """
    train, validation, test = cut([(number, row) for number, rows in enumerate(sources) for row in rows], split)
    train_by_source: list[Rows] = [[row for source, row in train if source == number] for number in range(len(sources))]
    return train_by_source, [row for _, row in validation], [row for _, row in test]


def _mix_sources(summary: DataSummary, run: RunConfig, sources: Sequence[Rows]) -> Rows:
    """Mix the sources of `dataset.mixture` by their weights and the seed. Errors: DataError DatasetEmpty."""
    items = run.spec.dataset.mixture or []
    weights = [1.0 if item.weight is None else item.weight for item in items]
    for item, rows, weight in zip(items, sources, weights, strict=True):
        if weight and not rows:
            raise DataError(
                "DatasetEmpty", f"{redact_source(item.source)}: no row is left to train on after duplicates and held-out rows were removed",
                hint="add rows to this source, or remove the source from dataset.mixture",
            )  # fmt: skip
    seed = 42 if run.spec.training.seed is None else run.spec.training.seed
    mixed = mix(sources, weights, seed)
    shares = ", ".join(
        f"{redact_source(item.source)} {len(rows)} rows, weight {weight:g}"
        for item, rows, weight in zip(items, sources, weights, strict=True)
    )
    summary.notes.append(f"mixture of {len(mixed)} rows: {shares}")
    return mixed


def convert_to_prompt(example: Example, row: RawRow) -> Example | RowError:
    """Convert an example to a prompt. The answer and the other columns of the row are kept, because rewards may read them."""
    match example:
        case Conversation(turns):
            last_answer_index = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
            if last_answer_index == 0:
                return RowError("PromptMissing", "the conversation begins with the answer", "put a question before the answer")
            answer = {"answer": turns[last_answer_index].content} if last_answer_index < len(turns) else {}
            scalars = {key: value for key, value in row.value.items() if isinstance(value, str | int | float | bool)}
            return Prompt(turns[:last_answer_index], {**scalars, **answer})
        case Completion(prompt, completion):
            return Prompt(prompt, {"answer": completion})
        case _:
            return example


class _SourceReader:
    """Reads the sources one after the other, with one policy for bad rows and one summary."""

    def __init__(self, run: RunConfig, image_root: Path | None = None):
        self.run = run
        self.spec: Dataset = run.spec.dataset
        self.images = ImageReader(self.spec.images or Images(), image_root) if is_vision_language(run.spec) else None
        """None for a text model."""
        self.trainer = run.spec.trainer.type or TrainerType.SFT
        self.skips_bad_rows = self.spec.bad_rows is BadRows.SKIP
        self.summary = DataSummary(self.spec.format or DatasetFormat.MESSAGES)
        self.image_names = self.summary.training_images
        """Receives the images of the rows that are read."""

    def read(self, paths: list[Path], spec_format: DatasetFormat | None, columns: Columns | None) -> Rows:
        """Return the examples of one source. Errors: ConfigError, DataError."""
        bad_rows: list[tuple[RawRow, RowError]] = []
        files = data_files(paths)
        stream = read_rows(
            files, self.spec.file_format or FileFormat.AUTO, bad_rows=bad_rows if self.skips_bad_rows else None
        )
        sample = list(islice(stream, SAMPLE_ROWS))
        names = ", ".join(file.name for file in files)
        if not sample and not bad_rows:
            raise DataError("DatasetEmpty", f"{names}: no rows", hint="give a file with at least one row")
        row_format, columns = self._choose_format(sample, spec_format, columns or Columns())
        examples = self._read_examples(chain(sample, stream), row_format, columns, bad_rows)
        self._limit_bad_rows(bad_rows, len(examples) + len(bad_rows))
        if not examples:
            raise DataError("DatasetEmpty", f"{names}: no usable rows", hint="fix the rows")
        self.summary.bad_rows += len(bad_rows)
        return examples

    def _choose_format(
        self, sample: list[RawRow], spec_format: DatasetFormat | None, columns: Columns
    ) -> tuple[Format, Columns]:
        """Return the format of the rows and the column names to use. Errors: ConfigError FormatMismatch; DataError."""
        if spec_format is not None and is_alpaca_instead(sample, spec_format, columns):
            row_format = format_named(DatasetFormat.ALPACA)
            named_columns = " or ".join(f"`{name}`" for name in (columns.question, columns.answer) if name)
            self.summary.notes.append(
                f"no row has {named_columns} of dataset.columns, and all rows have `instruction` and `output`: the rows are read as alpaca"
            )
            columns = columns.model_copy(update={"question": None, "answer": None})
        elif spec_format is not None:
            row_format = format_named(spec_format)
        elif self.trainer is TrainerType.GRPO and all(isinstance(row.value.get("prompt"), list) for row in sample):
            row_format = format_named(DatasetFormat.PROMPT_ONLY)
        else:
            row_format = detect_format(sample, columns)
        self._require_format_of_objective(row_format.name)
        require_columns(sample, row_format, columns)
        if not self.summary.formats:
            self.summary.format = row_format.name
        if row_format.name not in self.summary.formats:
            self.summary.formats.append(row_format.name)
        return row_format, columns

    def _require_format_of_objective(self, form: DatasetFormat) -> None:
        """Check that the run's `trainer.type` supports the format. Errors: ConfigError FormatMismatch."""
        formats = OBJECTIVES[self.trainer].dataset_formats
        if form not in formats:
            needs = (
                f"needs {formats[0]} data; the rows are {form}"
                if len(formats) == 1
                else f"cannot learn from {form} data"
            )
            raise ConfigError(
                "FormatMismatch", f"trainer {self.trainer} {needs}",
                hint=f"give data in a format of this trainer, or choose a trainer that learns from {form} data",
            )  # fmt: skip

    def _read_options(self, form: Format, columns: Columns) -> ReadOptions:
        multiple_choice = self.spec.mcq
        return ReadOptions(
            columns=columns, system_prompt=self.spec.system_prompt, template=self.spec.template,
            include_options=multiple_choice is None or multiple_choice.include_options is not False,
            needs_answer=self.trainer is TrainerType.SFT and trains_on_answers_only(self.run, form.name),
        )  # fmt: skip

    def _read_examples(
        self, rows: Iterable[RawRow], form: Format, columns: Columns, bad_rows: list[tuple[RawRow, RowError]]
    ) -> Rows:
        """Return the usable rows, and add the bad rows to `bad_rows`. Errors: DataError for the first bad row if bad rows are not skipped."""
        needs_json = self.spec.checks is not None and self.spec.checks.validate_json is True
        usable: Rows = []
        options = self._read_options(form, columns)
        for row, result in form.read_all(rows, options):
            if not isinstance(result, RowError):
                result = self._with_images(result, row, options.columns)
            if self.trainer is TrainerType.GRPO and not isinstance(result, RowError):
                result = convert_to_prompt(result, row)
            if needs_json and not isinstance(result, RowError):
                result = checks.find_json_error(result) or result
            if not isinstance(result, RowError):
                usable.append((row, result))
            elif self.skips_bad_rows:
                bad_rows.append((row, result))
            else:
                raise row_error_as_data_error(row, result)
        return usable

    def _with_images(self, example: Example, row: RawRow, columns: Columns) -> Example | RowError:
        """Return the example with the files of its images, or the error of the row. Rows of a text job must have no images."""
        if self.images is None:
            return require_no_images(example) or example
        try:
            found = self.images.attach(example, row, columns)
        except RowError as error:
            return error
        self.image_names |= self.images.names_of(found, row)
        return found

    def _limit_bad_rows(self, bad_rows: list[tuple[RawRow, RowError]], rows: int) -> None:
        """Add a note about the skipped rows. Errors: TooManyBadRows if there are more bad rows than allowed."""
        if not bad_rows:
            return
        limit = DEFAULT_MAX_BAD_ROW_RATIO if self.spec.max_bad_row_ratio is None else self.spec.max_bad_row_ratio
        first_row, error = bad_rows[0]
        if len(bad_rows) > limit * rows:
            raise DataError(
                "TooManyBadRows", f"{len(bad_rows)} of {rows} rows cannot be used, more than {limit:.1%}; the first: {first_row.location}: {error.message}",
                hint=f"{error.hint}; or raise dataset.maxBadRowRatio",
            )  # fmt: skip
        self.summary.notes.append(
            f"{len(bad_rows)} of {rows} rows were left out; the first: {first_row.location}: {error.message}"
        )

    def apply_checks(self, sources: list[Rows]) -> list[Rows]:
        """Run the checks of `dataset.checks` that need all training rows. Returns the rows without duplicates."""
        options, findings, notes = self.spec.checks, self.summary.findings, self.summary.notes
        if options is None:
            return sources
        if options.deduplicate:
            sources, findings.duplicate_count = checks.deduplicate(sources)
            notes.append(f"{findings.duplicate_count} duplicate rows were left out")
        rows = list(chain.from_iterable(sources))
        if options.pii_scan:
            findings.personal_data_counts = checks.scan_personal(rows)
            hits = ", ".join(f"{kind} in {count}" for kind, count in findings.personal_data_counts.items() if count)
            notes.append(f"rows that may hold personal data: {hits or 'none'}")
        if options.balance:
            findings.top_answer_counts, findings.share_of_top_answer = checks.count_top_answers(rows)
            if findings.top_answer_counts:
                top = next(iter(findings.top_answer_counts))
                notes.append(f"most frequent answer: {top!r}, {findings.share_of_top_answer:.1%} of all")
        return sources


__all__ = ["DataSummary", "LoadedData", "check_files", "load", "trains_on_answers_only"]
