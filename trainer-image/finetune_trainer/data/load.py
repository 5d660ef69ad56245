"""The torch-free half of the data room: files to typed examples, split, checked and counted.

The supervisor runs it before the ranks get their inputs (`check_files`), so that a bad row ends a job in seconds; the ranks
run it again to get the examples themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.errors import ConfigError, DataError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source
from finetune_api.spec.dataset import Columns, Dataset, Split
from finetune_api.spec.enums import BadRows, DatasetFormat, FileFormat, TrainerType

from finetune_trainer.data import checks
from finetune_trainer.data.detect import SAMPLE, alpaca_instead, detect, require_columns
from finetune_trainer.data.normalise import Recipe, normalise
from finetune_trainer.data.read import data_files, read_rows, row_failure
from finetune_trainer.data.rows import Completion, Conversation, Example, Prompt, Raw, RowError
from finetune_trainer.data.split import cut, mix

if TYPE_CHECKING:
    from finetune_trainer.inputs import Inputs

FORMATS_OF_TRAINER = {
    TrainerType.DPO: (DatasetFormat.PREFERENCE,),
    TrainerType.ORPO: (DatasetFormat.PREFERENCE,),
    TrainerType.REWARD: (DatasetFormat.PREFERENCE,),
    TrainerType.KTO: (DatasetFormat.UNPAIRED_PREFERENCE,),
}
NOT_FOR_GRPO = (
    DatasetFormat.PREFERENCE,
    DatasetFormat.UNPAIRED_PREFERENCE,
    DatasetFormat.PLAIN_TEXT,
    DatasetFormat.CUSTOM,
)
NOT_FOR_SFT = (DatasetFormat.PREFERENCE, DatasetFormat.UNPAIRED_PREFERENCE, DatasetFormat.PROMPT_ONLY)
WITHOUT_TURNS = (DatasetFormat.PLAIN_TEXT, DatasetFormat.CUSTOM)
RESPONSE_ONLY = "dataset.responseOnly.enabled"

Rows = list[tuple[Raw, Example]]


@dataclass
class DataSummary:
    """What the rows are, counted."""

    format: DatasetFormat
    """Of the first training rows."""
    formats: list[DatasetFormat] = field(default_factory=list)
    """Of every source that was read, in that order, each once."""
    rows: dict[str, int] = field(default_factory=dict)
    """Usable rows by part: train, validation, test."""
    bad_rows: int = 0
    findings: checks.Findings = field(default_factory=checks.Findings)
    notes: list[str] = field(default_factory=list)

    @property
    def with_turns(self) -> DatasetFormat:
        """The first format that has turns, if one has, else the format: it decides how much of a row is learned.

        Text without turns is learned whole either way, and must not decide for the rest of a mixture.
        """
        return next((one for one in self.formats if one not in WITHOUT_TURNS), self.format)


@dataclass
class Loaded:
    """The examples of every part, with the rows they come from."""

    train: Rows
    validation: Rows
    test: Rows
    summary: DataSummary

    def parts(self) -> list[tuple[str, Rows]]:
        """The parts that have rows, by name."""
        named = (("train", self.train), ("validation", self.validation), ("test", self.test))
        return [(name, rows) for name, rows in named if rows]


def check_files(run: RunConfig, inputs: Inputs) -> DataSummary:
    """Read and check every row of every file. Imports neither torch nor transformers.

    Errors: DataError (65) with file and row: DatasetEmpty, DatasetNotUtf8, DatasetRowInvalid, ColumnMissing, UnknownRole,
    ConversationEmpty, NoTrainableToken, FormatUnknown, SplitEmpty, TooManyBadRows; ConfigError (64): FormatMismatch.
    """
    return load(run, inputs).summary


def load(run: RunConfig, inputs: Inputs) -> Loaded:
    """All examples of a run. Errors: see `check_files`."""
    spec = run.spec.dataset
    reader = _Reader(run)
    sources = reader.look(_sources(reader, run, inputs))
    validation = reader.rows(inputs.validation, spec.format, spec.columns) if inputs.validation else []
    test = reader.rows(inputs.test, spec.format, spec.columns) if inputs.test else []
    if spec.split is not None:
        sources, cut_validation, cut_test = _cut(sources, spec.split)
        validation, test = validation or cut_validation, test or cut_test
    train = _mixture(reader, run, sources) if inputs.mixture else sources[0]
    summary = reader.summary
    summary.rows = {"train": len(train), "validation": len(validation), "test": len(test)}
    return Loaded(train, validation, test, summary)


def response_only(run: RunConfig, kind: DatasetFormat) -> bool:
    """Whether the loss covers answers only. Text without turns has none; asking for it there needs markers.

    Errors: ConfigError ResponseOnlyWithoutTurns.
    """
    chosen = run.spec.dataset.response_only
    enabled = chosen is None or chosen.enabled is not False
    if not enabled or kind not in WITHOUT_TURNS:
        return enabled
    markers = chosen is not None and bool(chosen.question_marker or chosen.answer_marker)
    if markers or RESPONSE_ONLY in run.defaults or chosen is None:
        return markers
    raise ConfigError(
        "ResponseOnlyWithoutTurns", f"dataset.responseOnly.enabled is true, but format {kind} has no turns to tell an answer by",
        hint="set dataset.responseOnly.questionMarker and answerMarker, or leave responseOnly out",
    )  # fmt: skip


def _sources(reader: _Reader, run: RunConfig, inputs: Inputs) -> list[Rows]:
    """Training rows, source by source."""
    spec = run.spec.dataset
    if not inputs.mixture:
        return [reader.rows(inputs.train, spec.format, spec.columns)]
    return [
        reader.rows(paths, item.format or spec.format, item.columns or spec.columns)
        for paths, item in zip(inputs.mixture, spec.mixture or [], strict=True)
    ]


def _cut(sources: Sequence[Rows], split: Split) -> tuple[list[Rows], Rows, Rows]:
    """Training rows source by source, validation and test rows.

    Before a mixture is made: it goes through a small source several times, and a row that is learned must not be held out too.
    """
    train, validation, test = cut([(number, row) for number, rows in enumerate(sources) for row in rows], split)
    left: list[Rows] = [[row for of, row in train if of == number] for number in range(len(sources))]
    return left, [row for _, row in validation], [row for _, row in test]


def _mixture(reader: _Reader, run: RunConfig, parts: Sequence[Rows]) -> Rows:
    items = run.spec.dataset.mixture or []
    weights = [1.0 if item.weight is None else item.weight for item in items]
    for item, part, weight in zip(items, parts, weights, strict=True):
        if weight and not part:
            raise DataError(
                "DatasetEmpty", f"{redact_source(item.source)}: no row is left to train on once duplicates and held-out rows are taken out",
                hint="give it more rows, or remove it from dataset.mixture",
            )  # fmt: skip
    seed = 42 if run.spec.training.seed is None else run.spec.training.seed
    mixed = mix(parts, weights, seed)
    shares = ", ".join(
        f"{redact_source(item.source)} {len(part)} rows, weight {weight:g}"
        for item, part, weight in zip(items, parts, weights, strict=True)
    )
    reader.summary.notes.append(f"mixture of {len(mixed)} rows: {shares}")
    return mixed


def asked(example: Example, raw: Raw) -> Example | RowError:
    """The question of an example, with its answer and the row's columns for the rewards."""
    match example:
        case Conversation(turns):
            last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=len(turns))
            if last == 0:
                return RowError("PromptMissing", "the conversation begins with the answer", "put a question before it")
            answer = {"answer": turns[last].content} if last < len(turns) else {}
            plain = {key: value for key, value in raw.value.items() if isinstance(value, str | int | float | bool)}
            return Prompt(turns[:last], {**plain, **answer})
        case Completion(prompt, completion):
            return Prompt(prompt, {"answer": completion})
        case _:
            return example


class _Reader:
    """Reads sources one after the other under one policy for bad rows, and keeps the counts."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.spec: Dataset = run.spec.dataset
        self.trainer = run.spec.trainer.type or TrainerType.SFT
        self.summary = DataSummary(self.spec.format or DatasetFormat.MESSAGES)

    def rows(self, paths: list[Path], given: DatasetFormat | None, columns: Columns | None) -> Rows:
        """Examples of one source."""
        columns = columns or Columns()
        broken: list[tuple[Raw, RowError]] = []
        skip = self.spec.bad_rows is BadRows.SKIP
        files = data_files(paths)
        stream = read_rows(files, self.spec.file_format or FileFormat.AUTO, bad_rows=broken if skip else None)
        sample = list(islice(stream, SAMPLE))
        if not sample and not broken:
            raise DataError(
                "DatasetEmpty", f"{', '.join(f.name for f in files)}: no rows", hint="give a file with at least one row"
            )
        kind, columns = self._format(sample, given, columns)
        good = self._examples(chain(sample, stream), self._recipe(kind, columns), broken, skip)
        self._tolerate(broken, len(good) + len(broken))
        if not good:
            raise DataError("DatasetEmpty", f"{', '.join(f.name for f in files)}: no usable rows", hint="mend the rows")
        self.summary.bad_rows += len(broken)
        return good

    def _format(
        self, sample: list[Raw], given: DatasetFormat | None, columns: Columns
    ) -> tuple[DatasetFormat, Columns]:
        """The format of the rows, and the columns that go with it."""
        if given is not None and alpaca_instead(sample, given, columns):
            kind = DatasetFormat.ALPACA
            self.summary.notes.append(
                f"no row has {' or '.join(f'`{n}`' for n in (columns.question, columns.answer) if n)} of dataset.columns; all have "
                "`instruction` and `output`: they are read as alpaca"
            )
            columns = columns.model_copy(update={"question": None, "answer": None})
        elif given is not None:
            kind = given
        elif self.trainer is TrainerType.GRPO and all(isinstance(raw.value.get("prompt"), list) for raw in sample):
            kind = DatasetFormat.PROMPT_ONLY
        else:
            kind = detect(sample, columns)
        wanted = FORMATS_OF_TRAINER.get(self.trainer)
        refused = NOT_FOR_GRPO if self.trainer is TrainerType.GRPO else NOT_FOR_SFT
        if (wanted and kind not in wanted) or (not wanted and kind in refused):
            needs = (
                f"trainer {self.trainer} needs {wanted[0]} data"
                if wanted
                else f"trainer {self.trainer} cannot learn from {kind} data"
            )
            raise ConfigError(
                "FormatMismatch", f"{needs}; the rows are {kind}" if wanted else needs,
                hint="give data of that format, or choose the trainer that reads it",
            )  # fmt: skip
        require_columns(sample, kind, columns)
        if not self.summary.formats:
            self.summary.format = kind
        if kind not in self.summary.formats:
            self.summary.formats.append(kind)
        return kind, columns

    def _recipe(self, kind: DatasetFormat, columns: Columns) -> Recipe:
        mcq = self.spec.mcq
        return Recipe(
            format=kind, columns=columns, system_prompt=self.spec.system_prompt, template=self.spec.template,
            include_options=mcq is None or mcq.include_options is not False,
            answers_needed=self.trainer is TrainerType.SFT and response_only(self.run, kind),
        )  # fmt: skip

    def _examples(self, stream: Iterable[Raw], recipe: Recipe, broken: list[tuple[Raw, RowError]], skip: bool) -> Rows:
        json_answers = self.spec.checks is not None and self.spec.checks.validate_json is True
        good: Rows = []
        for raw, found in normalise(stream, recipe):
            if self.trainer is TrainerType.GRPO and not isinstance(found, RowError):
                found = asked(found, raw)
            error = found if isinstance(found, RowError) else checks.answer_error(found) if json_answers else None
            if error is None and not isinstance(found, RowError):
                good.append((raw, found))
            elif error is not None and skip:
                broken.append((raw, error))
            elif error is not None:
                raise row_failure(raw, error)
        return good

    def _tolerate(self, broken: list[tuple[Raw, RowError]], rows: int) -> None:
        """Refuse more bad rows than allowed. Errors: TooManyBadRows."""
        if not broken:
            return
        limit = 0.05 if self.spec.max_bad_row_ratio is None else self.spec.max_bad_row_ratio
        first, error = broken[0]
        if len(broken) > limit * rows:
            raise DataError(
                "TooManyBadRows", f"{len(broken)} of {rows} rows cannot be used, more than {limit:.1%}; the first: {first.place}: {error.found}",
                hint=f"{error.write}; or raise dataset.maxBadRowRatio",
            )  # fmt: skip
        self.summary.notes.append(
            f"{len(broken)} of {rows} rows were left out; the first: {first.place}: {error.found}"
        )

    def look(self, sources: list[Rows]) -> list[Rows]:
        """The looks of `dataset.checks` that concern all training rows, which come source by source."""
        asked, findings, notes = self.spec.checks, self.summary.findings, self.summary.notes
        if asked is None:
            return sources
        if asked.deduplicate:
            sources, findings.duplicates = checks.deduplicate(sources)
            notes.append(f"{findings.duplicates} duplicate rows were left out")
        rows = list(chain.from_iterable(sources))
        if asked.pii_scan:
            findings.personal = checks.scan_personal(rows)
            hits = ", ".join(f"{kind} in {count}" for kind, count in findings.personal.items() if count)
            notes.append(f"rows that may hold personal data: {hits or 'none'}")
        if asked.balance:
            findings.answers, findings.share_of_top_answer = checks.balance(rows)
            if findings.answers:
                top = next(iter(findings.answers))
                notes.append(f"most frequent answer: {top!r}, {findings.share_of_top_answer:.1%} of all")
        return sources


__all__ = ["DataSummary", "Loaded", "check_files", "load", "response_only"]
