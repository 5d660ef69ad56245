"""Encodes prompts and their answers as token ids: the data of dpo, orpo, reward and kto.

The code for supervised rows renders and tokenises each prompt with its answer, and marks the answer as the trained part. So only that code
handles chat templates, beginning tokens and end tokens. Answers are cut to `trainer.maxCompletionLength`, and rows to
`dataset.maxSequenceLength`. The notes for the status contain the numbers of cut and dropped rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import DatasetFormat, OverflowPolicy, TrainerType

from finetune_trainer.data.load import Rows, load
from finetune_trainer.data.parallel import RejectedRow, encode_rows, usable_cpus
from finetune_trainer.data.prepare import (
    SUMMARY_FILE,
    BadRowPolicy,
    Splits,
    cache_key,
    load_cached,
    max_sequence_length,
    render_options,
    use_chat_template,
    write_cached,
)
from finetune_trainer.data.rows import Conversation, Example, LabelledAnswer, Preference, RowError, Turn
from finetune_trainer.data.template import Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import IGNORED_LABEL, TokeniseOptions, encode
from finetune_trainer.objective.base import DataFacts, TrainingContext

NO_LIMIT = 1 << 30
MAX_COMPLETION_LENGTH = "trainer.maxCompletionLength"
TurnsOrText = tuple[Turn, ...] | str


@dataclass(frozen=True)
class LengthLimits:
    """Maximum lengths of a row and of an answer in tokens, and the policy for longer rows."""

    max_row_length: int
    max_answer_length: int | None
    overflow: OverflowPolicy


@dataclass
class RowCounts:
    """Counts of the rows of one split."""

    rows: int = 0
    cut: int = 0
    """Rows with a truncated answer."""
    left_out: int = 0
    """Rows dropped because they are too long: the prompt leaves no token for an answer, or the answer must not be cut."""
    same: int = 0
    """Pairs dropped because both answers are equal after truncation."""
    longest: int = 0

    def notes(self, split: str, limits: LengthLimits) -> list[str]:
        """Sentences for the status."""
        notes = [f"{split}: {self.rows} rows, the longest has {self.longest} tokens"]
        if self.cut:
            limit = (
                f"{MAX_COMPLETION_LENGTH} {limits.max_answer_length}"
                if limits.max_answer_length
                else f"dataset.maxSequenceLength {limits.max_row_length}"
            )
            notes.append(f"{split}: answers of {self.cut} rows were cut to {limit}")
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
    """One prompt with one labelled answer, or with two answers (the better one first), as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    label: bool | None = None

    @property
    def longest_row(self) -> int:
        """Number of tokens of the prompt and the longer answer."""
        return len(self.prompt) + max(map(len, self.answers))


@dataclass
class _Split:
    rows: list[EncodedAnswers] = field(default_factory=list)
    counts: RowCounts = field(default_factory=RowCounts)


def length_limits(context: TrainingContext) -> LengthLimits:
    """The limits of this run. Errors: ConfigError CompletionTooLong, SequenceTooLong."""
    max_row_length = max_sequence_length(context.run, context.tokenizer, context.max_positions)
    overflow = context.run.spec.dataset.overflow or OverflowPolicy.TRUNCATE
    return LengthLimits(max_row_length, max_answer_length(context, max_row_length), overflow)


def max_answer_length(context: TrainingContext, max_row_length: int) -> int | None:
    """Maximum length of an answer in tokens. A default is lowered to half of the sequence, to leave the other half for the prompt.
    Errors: ConfigError CompletionTooLong.
    """
    requested = context.run.spec.trainer.max_completion_length
    if requested is None:
        return None
    if MAX_COMPLETION_LENGTH in context.run.defaults:
        return min(requested, max(1, max_row_length // 2))
    if requested < max_row_length:
        return requested
    raise ConfigError(
        "CompletionTooLong", f"{MAX_COMPLETION_LENGTH} {requested} leaves no token of dataset.maxSequenceLength {max_row_length} for the prompt",
        hint="write a smaller number, or raise dataset.maxSequenceLength",
    )  # fmt: skip


def load_pairs(context: TrainingContext) -> tuple[Splits, DataFacts]:
    """Load pairs as columns prompt_ids, chosen_ids, rejected_ids. Errors: DataError of the data stages, RowTooLong, NoTrainableToken."""
    return _load_columns(
        context, lambda row: {"prompt_ids": row.prompt, "chosen_ids": row.answers[0], "rejected_ids": row.answers[1]}
    )


def load_labelled_answers(context: TrainingContext) -> tuple[Splits, DataFacts]:
    """Load answers as columns prompt_ids, completion_ids, label. Errors: see `load_pairs`."""
    return _load_columns(context, lambda row: {"prompt_ids": row.prompt, "completion_ids": row.answers[0], "label": row.label})


def _load_columns(context: TrainingContext, columns_of: Callable[[EncodedAnswers], dict[str, Any]]) -> tuple[Splits, DataFacts]:
    """Load the encoded rows. One rank per node encodes the rows and writes them to the token cache; all ranks read the cache."""
    is_templated = use_chat_template(context.run, context.inputs, context.tokenizer)
    limits = length_limits(context)
    folder = context.token_cache / cache_key(context.run, context.inputs, context.tokenizer, limits.max_row_length)
    with PartialState().local_main_process_first():
        if not (folder / SUMMARY_FILE).exists():
            write_cached(folder, *_encode_splits(context, columns_of, is_templated, limits))
    splits, summary = load_cached(folder)
    report = {"rows": summary["rows"], "tokens": summary["tokens"]}
    return splits, DataFacts(len(splits.train), DatasetFormat(summary["format"]), summary["notes"], report)


def _encode_splits(
    context: TrainingContext, columns_of: Callable[[EncodedAnswers], dict[str, Any]], is_templated: bool, limits: LengthLimits
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    loaded = load(context.run, context.inputs)
    notes = list(loaded.summary.notes)
    datasets: dict[str, Dataset] = {}
    reports: dict[str, Any] = {}
    for name, rows in loaded.splits():
        options = replace(
            render_options(context.run, context.tokenizer, is_templated, loaded.summary.format),
            response_only=True, turn_markers=None,
        )  # fmt: skip
        split = _encode_split(context, rows, options, limits, notes, name)
        datasets[name] = Dataset.from_list([columns_of(row) for row in split.rows])
        is_joined = any(
            isinstance(example, Preference | LabelledAnswer) and isinstance(example.prompt, str) for _, example in rows
        )
        if is_joined and is_templated and context.run.spec.dataset.use_chat_template is None:
            notes.append(
                "prompts and answers are joined without a chat template; dataset.useChatTemplate: true renders them as turns"
            )
        notes += split.counts.notes(name, limits)
        reports[name] = vars(split.counts)
    notes = list(dict.fromkeys(notes))
    summary = {"format": loaded.summary.format, "rows": loaded.summary.rows, "notes": notes, "tokens": reports}
    return datasets, summary


def _encode_split(
    context: TrainingContext, rows: Rows, render_with: RenderOptions, limits: LengthLimits, notes: list[str], name: str
) -> _Split:
    bad_rows = BadRowPolicy(context.run, len(rows))
    split = _Split()
    spec = context.run.spec.dataset
    options = TokeniseOptions(NO_LIMIT, OverflowPolicy.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token)
    encoder = AnswerEncoder(render_with, options)
    for location, row in encode_rows(rows, encoder, processes=spec.num_proc or usable_cpus(), on_bad_row=bad_rows):
        split.counts.longest = max(split.counts.longest, row.longest_row)
        fitted = fit_to_limits(location, row, limits, split.counts, context.run.spec.trainer.type)
        if fitted is not None:
            split.rows.append(fitted)
    notes += bad_rows.notes(name)
    split.counts.rows = len(split.rows)
    if not split.rows:
        raise DataError(
            "NoTrainableToken", f"no row of the {name} data is left: {split.counts.left_out} rows are too long, {split.counts.same} have two equal answers",
            hint=f"raise dataset.maxSequenceLength (now {limits.max_row_length}), or fix the rows",
        )  # fmt: skip
    return split


def fit_to_limits(
    location: str, row: EncodedAnswers, limits: LengthLimits, counts: RowCounts, kind: TrainerType | None
) -> EncodedAnswers | None:
    """Cut the answers of the row to the limits. Returns None if the row is dropped. Errors: DataError RowTooLong."""
    answers = [answer[: limits.max_answer_length] for answer in row.answers]
    available = limits.max_row_length - len(row.prompt)
    if max(map(len, answers)) > available:
        if limits.overflow is OverflowPolicy.FAIL:
            raise DataError(
                "RowTooLong", f"{location}: {row.longest_row} tokens, more than dataset.maxSequenceLength {limits.max_row_length}",
                hint="raise maxSequenceLength, or set dataset.overflow to truncate or drop",
            )  # fmt: skip
        # A reward model reads the score at the end of the answer, so the answer must not be cut.
        if limits.overflow is OverflowPolicy.DROP or available < 1 or kind is TrainerType.REWARD:
            counts.left_out += 1
            return None
        answers = [answer[:available] for answer in answers]
    if len(answers) == 2 and answers[0] == answers[1]:
        counts.same += 1
        return None
    counts.cut += answers != row.answers
    return EncodedAnswers(row.prompt, answers, row.label)


@dataclass(frozen=True)
class AnswerEncoder:
    """Renders and tokenises prompts with their answers. Instances are pickled and sent to worker processes."""

    render_with: RenderOptions
    options: TokeniseOptions

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[tuple[str, EncodedAnswers] | RejectedRow]:
        """Encode or reject each row of a batch. A row is rejected if one of its answers cannot be rendered."""
        rejected: dict[int, RejectedRow] = {}
        encoded: dict[int, list[tuple[list[int], list[int]]]] = {}
        row_of_text: list[int] = []

        def render_rows() -> Iterator[tuple[str, Rendered]]:
            for number, (location, example) in enumerate(rows):
                try:
                    answers = self._render_answers(example)
                except RowError as error:
                    rejected[number] = RejectedRow(location, error.code, error.message, error.hint)
                    continue
                row_of_text.extend([number] * len(answers))
                yield from ((location, text) for text in answers)

        for position, (_, ids, labels, *_) in enumerate(encode(render_rows(), self.render_with.tokenizer, self.options)):
            start = next((index for index, label in enumerate(labels) if label != IGNORED_LABEL), len(ids))
            encoded.setdefault(row_of_text[position], []).append((ids[:start], ids[start:]))
        return [
            rejected[number]
            if number in rejected
            else (location, with_shared_prompt(encoded[number], getattr(example, "label", None)))
            for number, (location, example) in enumerate(rows)
        ]

    def _render_answers(self, example: Example) -> list[Rendered]:
        """Render the prompt with each answer. Text is joined without a template, unless `dataset.useChatTemplate` is true."""
        assert isinstance(example, Preference | LabelledAnswer), "`load` has checked the format"
        answers = (example.chosen, example.rejected) if isinstance(example, Preference) else (example.completion,)
        is_joined = isinstance(example.prompt, str) and not self.render_with.text_as_turns
        options = replace(self.render_with, use_chat_template=False) if is_joined else self.render_with
        return [render_answer(example.prompt, answer, options) for answer in answers]


def with_shared_prompt(encoded: Sequence[tuple[list[int], list[int]]], label: bool | None) -> EncodedAnswers:
    """Return the answers with one common prompt: the longest beginning that all encoded prompts share.

    A tokenizer may merge the end of the prompt and the beginning of an answer into one token. If this token differs between the
    answers, it becomes part of each answer.
    """
    prompts = [prompt for prompt, _ in encoded]
    shared = 0
    while all(len(prompt) > shared for prompt in prompts) and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    return EncodedAnswers(prompts[0][:shared], [prompt[shared:] + answer for prompt, answer in encoded], label)


def render_answer(prompt: TurnsOrText, answer: TurnsOrText, options: RenderOptions) -> Rendered:
    """Render prompt and answer as one text. The text ends after the answer, and only the answer is a trained span.
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
    rendered = render(Conversation(turns), options)
    if not rendered.spans:
        raise RowError("AnswerEmpty", "an answer has no assistant turn", "add an assistant turn, or remove the row")
    start, end = rendered.spans[0][0], rendered.spans[-1][1]
    return Rendered(rendered.text[:end], ((start, end),), rendered.is_templated)


def _to_turns(part: TurnsOrText, role: str) -> tuple[Turn, ...]:
    return (Turn(role, part),) if isinstance(part, str) else part
