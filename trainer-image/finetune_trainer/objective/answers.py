"""Encodes prompts and their answers as token ids, for the objectives dpo, orpo, reward and kto.

Each prompt is rendered and tokenised together with its answer by the code for supervised rows, with the answer as the trained span. So chat
templates, beginning tokens and end tokens are handled in one place. Answers are cut to `trainer.maxCompletionLength`, and rows to
`dataset.maxSequenceLength`. The notes for the status contain the numbers of cut and dropped rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import DatasetFormat, OverflowPolicy, TrainerType

from finetune_trainer.data.batches import BatchBuilder, EncodedBatch, RejectedRow, RowOutcome
from finetune_trainer.data.encode import EncodedRows, EncodedSplit, encode_sources, require_few_bad_rows
from finetune_trainer.data.images import images_of
from finetune_trainer.data.load import DataSummary
from finetune_trainer.data.prepare import (
    Splits,
    choose_chat_template,
    find_prepared,
    inputs_digest,
    max_sequence_length,
    notes_on_stored_rows,
    open_splits,
    render_options,
    rows_folder,
    template_writes_date,
)
from finetune_trainer.data.prepared import PreparedFolder, prepared_folder, write_prepared
from finetune_trainer.data.rows import (
    IGNORED_LABEL,
    Conversation,
    Example,
    ImageFile,
    LabelledAnswer,
    Preference,
    RowError,
    Turn,
)
from finetune_trainer.data.shards import ColumnType
from finetune_trainer.data.template import Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import BoundaryTokens, TokeniseOptions, encode
from finetune_trainer.data.vision import IMAGE_SOURCES_COLUMN, ROWS_WITHOUT_WORKERS, VisionProcessor, to_image_column
from finetune_trainer.distributed import local_rank_0_first
from finetune_trainer.objective.base import DataFacts, TrainingContext

UNLIMITED_LENGTH = 1 << 30
PROMPT_COLUMN = "prompt_ids"
MAX_COMPLETION_LENGTH_FIELD = "trainer.maxCompletionLength"
TurnsOrText = tuple[Turn, ...] | str


@dataclass(frozen=True)
class LengthLimits:
    """Maximum lengths of a row and of an answer in tokens, and the policy for longer rows."""

    max_row_length: int
    max_answer_length: int | None
    overflow: OverflowPolicy


@dataclass
class SplitCounts:
    """The row counts of one split."""

    rows: int = 0
    """Stored rows."""
    cut: int = 0
    """Rows with a truncated answer."""
    left_out: int = 0
    """Number of rows that were dropped because they are too long: the prompt leaves no token for an answer, or the answer must not be cut."""
    same: int = 0
    """Number of pairs that were dropped because both answers are equal after truncation."""
    longest: int = 0
    """Number of tokens of the longest row, before rows are cut or left out."""

    def notes(self, split: str, limits: LengthLimits) -> list[str]:
        """Return sentences about the counts for the status. `split`: the split's name."""
        notes = [f"{split}: {self.rows} rows, the longest has {self.longest} tokens"]
        if self.cut:
            limit_text = (
                f"{MAX_COMPLETION_LENGTH_FIELD} {limits.max_answer_length}"
                if limits.max_answer_length
                else f"dataset.maxSequenceLength {limits.max_row_length}"
            )
            notes.append(f"{split}: answers of {self.cut} rows were cut to {limit_text}")
        if self.left_out:
            notes.append(
                f"{split}: {self.left_out} rows longer than dataset.maxSequenceLength {limits.max_row_length} were left out"
            )
        if self.same:
            notes.append(
                f"{split}: {self.same} rows were left out because their two answers are equal after truncation"
            )
        return notes


@dataclass
class EncodedAnswers:
    """The token ids of a prompt and of its answers: one labelled answer, or two answers with the better one first."""

    prompt: list[int]
    answers: list[list[int]]
    label: bool | None = None
    images: tuple[ImageFile, ...] = ()
    """The images of the prompt."""

    @property
    def longest_row(self) -> int:
        """The number of tokens of the prompt and the longer answer together."""
        return len(self.prompt) + max(map(len, self.answers))


class RowLayout(Enum):
    """The columns of stored rows."""

    PAIRS = ("prompt_ids", "chosen_ids", "rejected_ids")
    PAIRS_WITH_IMAGES = (*PAIRS, IMAGE_SOURCES_COLUMN)
    """The images belong to the prompt."""
    PAIRS_WITH_TEXTS = (*PAIRS, "prompt", "chosen", "rejected")
    """The texts are empty. TRL's trainer for orpo requires these columns, although it reads only the token ids."""
    WHOLE_PAIRS = ("chosen_ids", "rejected_ids")
    """The prompt is put before each answer, because a reward model scores prompt and answer together."""
    LABELLED = ("prompt_ids", "completion_ids", "label")

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that hold the tokens of the answers."""
        return [name for name in self.value if name.endswith("_ids") and name != PROMPT_COLUMN]

    @property
    def columns(self) -> dict[str, ColumnType]:
        """Names and types of the columns."""
        types = {"label": ColumnType.FLAG, IMAGE_SOURCES_COLUMN: ColumnType.IMAGES}
        return {name: ColumnType.TOKENS if name.endswith("_ids") else types.get(name, ColumnType.TEXT) for name in self.value}

    def column_values(self, row: EncodedAnswers) -> dict[str, Any]:
        """Return the row's value for each column."""
        answers = row.answers if self is not RowLayout.WHOLE_PAIRS else [row.prompt + answer for answer in row.answers]
        tokens = {"prompt_ids": row.prompt, "completion_ids": answers[0], "chosen_ids": answers[0], "rejected_ids": answers[-1]}
        value_by_column = {"label": row.label, IMAGE_SOURCES_COLUMN: to_image_column(row.images), **tokens}
        return {name: value_by_column.get(name, "") for name in self.value}


def length_limits(context: TrainingContext) -> LengthLimits:
    """Return the length limits of this run. Errors: ConfigError CompletionTooLong, SequenceTooLong."""
    max_row_length = max_sequence_length(context.run, context.tokenizer, context.max_positions)
    overflow = context.run.spec.dataset.overflow or OverflowPolicy.TRUNCATE
    return LengthLimits(max_row_length, max_answer_length(context, max_row_length), overflow)


def max_answer_length(context: TrainingContext, max_row_length: int) -> int | None:
    """Return the maximum number of tokens of an answer; None if the spec has no limit.

    If the user did not set the limit, its default is lowered to at most half of `max_row_length`. Errors: ConfigError CompletionTooLong.
    """
    requested_length = context.run.spec.trainer.max_completion_length
    if requested_length is None:
        return None
    if MAX_COMPLETION_LENGTH_FIELD in context.run.defaults:
        return min(requested_length, max(1, max_row_length // 2))
    if requested_length < max_row_length:
        return requested_length
    raise ConfigError(
        "CompletionTooLong", f"{MAX_COMPLETION_LENGTH_FIELD} {requested_length} leaves no token of dataset.maxSequenceLength {max_row_length} for the prompt",
        hint="write a smaller number, or raise dataset.maxSequenceLength",
    )  # fmt: skip


def load_rows(context: TrainingContext, layout: RowLayout) -> tuple[Splits, DataFacts]:
    """Load the encoded rows. One rank of each node encodes and stores the rows; all ranks map the files into memory.

    Errors: the DataErrors of the data stages; DataError RowTooLong, NoTrainableToken.
    """
    is_templated = choose_chat_template(context.run, context.inputs, context.tokenizer, needs_template=context.vision is not None)
    limits = length_limits(context)
    digest = inputs_digest(context.run, context.inputs, context.tokenizer, limits.max_row_length, context.vision)
    if context.vision is None and not template_writes_date(context.tokenizer):
        context.preparation.provide_rows(digest)
    with local_rank_0_first():
        prepared_folder = find_prepared(context.token_cache, digest) or _prepare_splits(context, layout, is_templated, limits, digest)
    splits, summary = open_splits(prepared_folder), prepared_folder.manifest.summary
    token_count, longest_sequence = count_sequence_tokens(splits.train, layout)
    train_counts = {**summary["tokens"]["train"], "tokens": token_count}
    report = {"rows": summary["rows"], "tokens": {**summary["tokens"], "train": train_counts}}
    notes = [*summary["notes"], *notes_on_stored_rows(context.inputs, digest)]
    return splits, DataFacts(len(splits.train), DatasetFormat(summary["format"]), notes, report, longest_sequence=longest_sequence)


def count_sequence_tokens(rows: Dataset, layout: RowLayout) -> tuple[int, int]:
    """Return the number of tokens in all sequences that the model reads, and in the longest sequence. A sequence is an answer together with its prompt."""
    from pyarrow import compute

    lengths = {name: compute.list_value_length(rows.data.column(name)) for name in layout.columns if name.endswith("_ids")}
    sequences = [compute.add(lengths[name], lengths.get(PROMPT_COLUMN, 0)) for name in layout.answer_columns]
    return sum(compute.sum(counts).as_py() for counts in sequences), max(compute.max(counts).as_py() for counts in sequences)


def _prepare_splits(context: TrainingContext, layout: RowLayout, is_templated: bool, limits: LengthLimits, digest: str) -> PreparedFolder:
    """Load, encode and store the rows of all splits."""
    run, spec = context.run, context.run.spec.dataset
    folder = prepared_folder(context.token_cache, digest)
    options = TokeniseOptions(UNLIMITED_LENGTH, OverflowPolicy.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token)

    def make_encoder(summary: DataSummary) -> AnswerEncoder:
        rendering_options = render_options(run, context.tokenizer, is_templated, summary.format)
        rendering_options = replace(rendering_options, response_only=True, turn_markers=None, has_content_parts=context.vision is not None)
        return AnswerEncoder(rendering_options, options, limits, run.spec.trainer.type, layout, context.vision)

    def joins_answer(example: Example) -> bool:
        is_text = isinstance(example, Preference | LabelledAnswer) and isinstance(example.prompt, str)
        return is_text and is_templated and spec.use_chat_template is None

    with encode_sources(
        run, context.inputs, make_encoder, rows_folder(folder), joins_answer=joins_answer, count_rows=context.preparation.count_rows,
        rows_without_workers=None if context.vision is None else ROWS_WITHOUT_WORKERS,
    ) as encoded_rows:  # fmt: skip
        counts_by_split, notes = _count_splits(context, encoded_rows, limits)
        summary = {
            "format": encoded_rows.summary.format, "rows": encoded_rows.summary.rows, "notes": notes,
            "tokens": {name: vars(split_counts) for name, split_counts in counts_by_split.items()},
        }  # fmt: skip
        splits = {split.name: encoded_rows.shards.read(split.positions[split.kept_mask], split.lengths[split.kept_mask]) for split in encoded_rows.splits}
        return write_prepared(folder, splits, inputs_digest=digest, summary=summary)


def _count_splits(context: TrainingContext, encoded_rows: EncodedRows, limits: LengthLimits) -> tuple[dict[str, SplitCounts], list[str]]:
    """Return the counts of each split by its name, and the notes for the status. Errors: DataError TooManyBadRows, NoTrainableToken."""
    notes = list(encoded_rows.summary.notes)
    counts_by_split: dict[str, SplitCounts] = {}
    for split in encoded_rows.splits:
        notes += require_few_bad_rows(context.run, split.rejected, len(split), split.name)
        counts_by_split[split.name] = _count_split(split, limits)
        if split.has_joined_rows:
            notes.append(
                "prompts and answers are joined without a chat template; dataset.useChatTemplate: true renders them as turns"
            )
        notes += counts_by_split[split.name].notes(split.name, limits)
    return counts_by_split, list(dict.fromkeys(notes))


def _count_split(split: EncodedSplit, limits: LengthLimits) -> SplitCounts:
    """Return the row counts of a split. Errors: DataError NoTrainableToken."""
    counts = SplitCounts(
        rows=int(split.kept_mask.sum()), cut=split.count(RowOutcome.CUT), left_out=split.count(RowOutcome.TOO_LONG), same=split.count(RowOutcome.EQUAL_ANSWERS),
        longest=int(split.lengths.max()),
    )  # fmt: skip
    if not counts.rows:
        raise DataError(
            "NoTrainableToken", f"no row of the {split.name} data is left: {counts.left_out} rows are too long, {counts.same} have two equal answers",
            hint=f"raise dataset.maxSequenceLength (now {limits.max_row_length}), or fix the rows",
        )  # fmt: skip
    return counts


def fit_to_limits(location: str, row: EncodedAnswers, limits: LengthLimits, trainer_type: TrainerType | None) -> tuple[RowOutcome, EncodedAnswers]:
    """Cut the answers of a row to the limits. Return the outcome and the row. Errors: DataError RowTooLong."""
    answers = [answer[: limits.max_answer_length] for answer in row.answers]
    available_length = limits.max_row_length - len(row.prompt)
    if max(map(len, answers)) > available_length:
        if limits.overflow is OverflowPolicy.FAIL:
            raise DataError(
                "RowTooLong", f"{location}: {row.longest_row} tokens, more than dataset.maxSequenceLength {limits.max_row_length}",
                hint="raise maxSequenceLength, or set dataset.overflow to truncate or drop",
            )  # fmt: skip
        # A reward model reads the score at the end of the answer, so the answer must not be cut.
        if limits.overflow is OverflowPolicy.DROP or available_length < 1 or trainer_type is TrainerType.REWARD:
            return RowOutcome.TOO_LONG, row
        answers = [answer[:available_length] for answer in answers]
    if len(answers) == 2 and answers[0] == answers[1]:
        return RowOutcome.EQUAL_ANSWERS, row
    return RowOutcome.KEPT if answers == row.answers else RowOutcome.CUT, replace(row, answers=answers)


@dataclass(frozen=True)
class AnswerEncoder:
    """Renders and tokenises prompts with their answers, and applies the length limits. Worker processes receive pickled copies of this object."""

    rendering_options: RenderOptions
    options: TokeniseOptions
    limits: LengthLimits
    trainer_type: TrainerType | None
    layout: RowLayout
    vision: VisionProcessor | None = None

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> EncodedBatch:
        """Encode the rows. A row is rejected if one of its answers cannot be rendered. Errors: DataError RowTooLong."""
        batch = BatchBuilder(self.layout.columns)
        for location, row in self._encode(rows):
            if isinstance(row, RejectedRow):
                batch.reject(row)
                continue
            outcome, fitted_row = fit_to_limits(location, row, self.limits, self.trainer_type)
            if outcome in (RowOutcome.KEPT, RowOutcome.CUT):
                batch.keep(outcome, row.longest_row, **self.layout.column_values(fitted_row))
            else:
                batch.leave_out(outcome, row.longest_row)
        return batch.build()

    def _encode(self, rows: Sequence[tuple[str, Example]]) -> Iterator[tuple[str, EncodedAnswers | RejectedRow]]:
        """Yield the location of each row with its encoded prompt and answers. The length limits are not applied here."""
        if self.vision is not None:
            boundary = BoundaryTokens.of(self.rendering_options.tokenizer, self.options)
            yield from ((location, self._encode_with_images(location, example, self.vision, boundary)) for location, example in rows)
            return
        rejected_rows: dict[int, RejectedRow] = {}
        encoded_answers: dict[int, list[tuple[list[int], list[int]]]] = {}
        row_numbers_of_texts: list[int] = []

        def render_rows() -> Iterator[tuple[str, Rendered]]:
            for number, (location, example) in enumerate(rows):
                try:
                    answers = self._render_answers(example)
                except RowError as error:
                    rejected_rows[number] = RejectedRow.of(location, error)
                    continue
                row_numbers_of_texts.extend([number] * len(answers))
                yield from ((location, text) for text in answers)

        for text_index, (_, ids, labels, *_) in enumerate(encode(render_rows(), self.rendering_options.tokenizer, self.options)):
            encoded_answers.setdefault(row_numbers_of_texts[text_index], []).append(_split_at_answer(ids, labels))
        for number, (location, example) in enumerate(rows):
            is_rejected = number in rejected_rows
            yield location, rejected_rows[number] if is_rejected else with_shared_prompt(encoded_answers[number], getattr(example, "label", None))

    def _encode_with_images(
        self, location: str, example: Example, vision: VisionProcessor, boundary: BoundaryTokens
    ) -> EncodedAnswers | RejectedRow:
        """Encode the prompt, which may have images, with its answers."""
        images = images_of(example)
        try:
            rows = [vision.encode_row(location, rendered, images, boundary) for rendered in self._render_answers(example)]
        except RowError as error:
            return RejectedRow.of(location, error)
        encoded_row = with_shared_prompt([_split_at_answer(row.ids, row.labels) for row in rows], getattr(example, "label", None))
        return replace(encoded_row, images=tuple(images))

    def _render_answers(self, example: Example) -> list[Rendered]:
        """Render the prompt with each answer. Texts are joined without a chat template, unless `dataset.useChatTemplate` is true."""
        assert isinstance(example, Preference | LabelledAnswer), "`load` has checked the format"
        answers = (example.chosen, example.rejected) if isinstance(example, Preference) else (example.completion,)
        is_joined = isinstance(example.prompt, str) and not self.rendering_options.renders_text_as_turns
        options = replace(self.rendering_options, use_chat_template=False) if is_joined else self.rendering_options
        return [render_answer(example.prompt, answer, options) for answer in answers]


def _split_at_answer(ids: list[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split the tokens of a row into the prompt and the answer, which begins at the first trained token."""
    answer_start = next((index for index, label in enumerate(labels) if label != IGNORED_LABEL), len(ids))
    return ids[:answer_start], ids[answer_start:]


def with_shared_prompt(prompt_answer_pairs: Sequence[tuple[list[int], list[int]]], label: bool | None) -> EncodedAnswers:
    """Return the answers with one common prompt: the longest beginning that all encoded prompts share.

    `prompt_answer_pairs`: the tokens of the prompt and of the answer, for each answer. A tokenizer may merge the end of the prompt and the
    beginning of an answer into one token. If this token differs between the answers, it becomes part of each answer.
    """
    prompts = [prompt for prompt, _ in prompt_answer_pairs]
    shared_length = 0
    while all(len(prompt) > shared_length for prompt in prompts) and len({prompt[shared_length] for prompt in prompts}) == 1:
        shared_length += 1
    return EncodedAnswers(prompts[0][:shared_length], [prompt[shared_length:] + answer for prompt, answer in prompt_answer_pairs], label)


def render_answer(prompt: TurnsOrText, answer: TurnsOrText, options: RenderOptions) -> Rendered:
    """Render prompt and answer as one text, which ends after the answer. Only the answer is a trained span.

    Errors: RowError RowInvalid, AnswerEmpty.
    """
    if isinstance(prompt, str) != isinstance(answer, str):
        raise RowError(
            "RowInvalid",
            "prompt and answer must both be text or both be messages",
            "write both as text, or both as messages",
        )
    if isinstance(prompt, str) and isinstance(answer, str) and not options.use_chat_template:
        if not answer:
            raise RowError("AnswerEmpty", "an answer is empty", "write a text, or remove the row")
        return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), False)
    turns = tuple(replace(turn, weight=0) for turn in _to_turns(prompt, "user"))
    turns += tuple(replace(turn, weight=int(turn.role == "assistant")) for turn in _to_turns(answer, "assistant"))
    rendering = render(Conversation(turns), options)
    if not rendering.spans:
        raise RowError("AnswerEmpty", "an answer has no assistant turn", "add an assistant turn, or remove the row")
    start, end = rendering.spans[0][0], rendering.spans[-1][1]
    return Rendered(rendering.text[:end], ((start, end),), rendering.is_templated)


def _to_turns(turns_or_text: TurnsOrText, role: str) -> tuple[Turn, ...]:
    return (Turn(role, turns_or_text),) if isinstance(turns_or_text, str) else turns_or_text
