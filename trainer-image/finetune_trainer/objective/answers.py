"""Prompts with answers that are compared or judged, as token ids: what dpo, orpo, reward and kto learn from.

Each answer is rendered behind its prompt with the same stages as supervised rows, so that templates, end tokens and beginning
tokens are handled once and alike; the answer is what the stages call learned. Answers are cut to `trainer.maxCompletionLength`,
rows to `dataset.maxSequenceLength`, and everything cut or left out is counted and told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import DatasetFormat, Overflow, TrainerType

from finetune_trainer.data.load import Rows, load
from finetune_trainer.data.parallel import Refused, cores, encoded_rows
from finetune_trainer.data.prepare import (
    SUMMARY,
    RowPolicy,
    keep,
    kept,
    key,
    max_length,
    style_of,
    use_template,
)
from finetune_trainer.data.rows import Conversation, Example, Judged, Preference, RowError, Turn
from finetune_trainer.data.template import Rendered, Style, render
from finetune_trainer.data.tokenise import IGNORED, Rules, encoded
from finetune_trainer.objective.base import Facts, Setting

UNBOUNDED = 1 << 30
COMPLETION = "trainer.maxCompletionLength"
Text = tuple[Turn, ...] | str


@dataclass
class Parts:
    """Token ids of the parts of the data."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None = None

    def mapped(self, change: Callable[[Dataset], Dataset]) -> Parts:
        """The same change made to every part."""
        return Parts(*(None if part is None else change(part) for part in (self.train, self.validation, self.test)))  # type: ignore[arg-type]  # train is never None


@dataclass(frozen=True)
class Limits:
    """How long a row and an answer may be, in tokens; and what happens to longer rows."""

    whole: int
    answer: int | None
    overflow: Overflow


@dataclass
class Counts:
    """What happened to the rows of one part."""

    rows: int = 0
    cut: int = 0
    """Rows with an answer cut off at its end."""
    left_out: int = 0
    """Rows without room for any answer, or (overflow drop) longer than allowed."""
    same: int = 0
    """Pairs whose answers are equal once they are cut, which teach nothing."""
    longest: int = 0

    def notes(self, part: str, limits: Limits) -> list[str]:
        """What a user should hear of it."""
        said = [f"{part}: {self.rows} rows, the longest of {self.longest} tokens"]
        if self.cut:
            bounds = f"{COMPLETION} {limits.answer}" if limits.answer else f"dataset.maxSequenceLength {limits.whole}"
            said.append(f"{part}: answers of {self.cut} rows were cut to {bounds}")
        if self.left_out:
            said.append(
                f"{part}: {self.left_out} rows longer than dataset.maxSequenceLength {limits.whole} were left out"
            )
        if self.same:
            said.append(
                f"{part}: {self.same} rows whose two answers are the same as far as they are read were left out"
            )
        return said


@dataclass
class Answered:
    """One prompt with one (judged) or two (better, worse) answers, as token ids."""

    prompt: list[int]
    answers: list[list[int]]
    label: bool | None = None

    @property
    def size(self) -> int:
        """Tokens of the longer row."""
        return len(self.prompt) + max(map(len, self.answers))


@dataclass
class _Part:
    rows: list[Answered] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def limits(setting: Setting) -> Limits:
    """Of this run; a default for answers gives way to the sequence. Errors: ConfigError CompletionTooLong, SequenceTooLong."""
    whole = max_length(setting.run, setting.tokenizer, setting.limit)
    spec = setting.run.spec
    return Limits(whole, answer_length(setting, whole), spec.dataset.overflow or Overflow.TRUNCATE)


def answer_length(setting: Setting, whole: int) -> int | None:
    """Longest answer in tokens; a default leaves at least half of the sequence to the prompt. Errors: ConfigError CompletionTooLong."""
    asked = setting.run.spec.trainer.max_completion_length
    if asked is None:
        return None
    if COMPLETION in setting.run.defaults:
        return min(asked, max(1, whole // 2))
    if asked < whole:
        return asked
    raise ConfigError(
        "CompletionTooLong", f"{COMPLETION} is {asked}, which leaves no token of dataset.maxSequenceLength {whole} to the prompt",
        hint="write a smaller number, or raise dataset.maxSequenceLength",
    )  # fmt: skip


def pairs(setting: Setting) -> tuple[Parts, Facts]:
    """Columns prompt_ids, chosen_ids, rejected_ids. Errors: DataError of the data room, RowTooLong, NoTrainableToken."""
    return _data(
        setting, lambda row: {"prompt_ids": row.prompt, "chosen_ids": row.answers[0], "rejected_ids": row.answers[1]}
    )


def judged(setting: Setting) -> tuple[Parts, Facts]:
    """Columns prompt_ids, completion_ids, label. Errors: as `pairs`."""
    return _data(setting, lambda row: {"prompt_ids": row.prompt, "completion_ids": row.answers[0], "label": row.label})


def _data(setting: Setting, columns: Any) -> tuple[Parts, Facts]:
    """Made by one rank of a node, on all its cores, and kept by content hash, as rows of supervised training are."""
    template = use_template(setting.run, setting.inputs, setting.tokenizer)
    bounds = limits(setting)
    folder = setting.cache / key(setting.run, setting.inputs, setting.tokenizer, bounds.whole)
    with PartialState().local_main_process_first():
        if not (folder / SUMMARY).exists():
            keep(folder, *_made(setting, columns, template, bounds))
    train, validation, test, summary = kept(folder)
    report = {"rows": summary["rows"], "tokens": summary["tokens"]}
    return Parts(train, validation, test), Facts(len(train), DatasetFormat(summary["format"]), summary["notes"], report)


def _made(setting: Setting, columns: Any, template: bool, bounds: Limits) -> tuple[dict[str, Dataset], dict[str, Any]]:
    loaded = load(setting.run, setting.inputs)
    notes = list(loaded.summary.notes)
    made: dict[str, Dataset] = {}
    reports: dict[str, Any] = {}
    for name, rows in loaded.parts():
        style = replace(
            style_of(setting.run, setting.tokenizer, template, loaded.summary.format), response_only=True, markers=None
        )
        part = _part(setting, rows, style, bounds, notes, name)
        made[name] = Dataset.from_list([columns(row) for row in part.rows])
        joined = any(
            isinstance(example, Preference | Judged) and isinstance(example.prompt, str) for _, example in rows
        )
        if joined and template and setting.run.spec.dataset.use_chat_template is None:
            notes.append("prompts and answers are joined as they are; dataset.useChatTemplate: true makes them turns")
        notes += part.counts.notes(name, bounds)
        reports[name] = vars(part.counts)
    notes = list(dict.fromkeys(notes))
    return made, {"format": loaded.summary.format, "rows": loaded.summary.rows, "notes": notes, "tokens": reports}


def _part(setting: Setting, rows: Rows, style: Style, bounds: Limits, notes: list[str], name: str) -> _Part:
    policy = RowPolicy(setting.run, len(rows))
    part = _Part()
    spec = setting.run.spec.dataset
    work = Work(style, Rules(UNBOUNDED, Overflow.TRUNCATE, spec.add_eos_token is not False, spec.add_bos_token))
    for place, row in encoded_rows(rows, work, processes=spec.num_proc or cores(), on_bad_row=policy):
        part.counts.longest = max(part.counts.longest, row.size)
        kept = _within(place, row, bounds, part.counts, setting.run.spec.trainer.type)
        if kept is not None:
            part.rows.append(kept)
    notes += policy.notes(name)
    part.counts.rows = len(part.rows)
    if not part.rows:
        raise DataError(
            "NoTrainableToken", f"no row of the {name} data is left: {part.counts.left_out} too long, {part.counts.same} with two equal answers",
            hint=f"raise dataset.maxSequenceLength (now {bounds.whole}), or mend the rows",
        )  # fmt: skip
    return part


def _within(place: str, row: Answered, bounds: Limits, counts: Counts, kind: TrainerType | None) -> Answered | None:
    """The row within the limits, or None if it is left out. Errors: DataError RowTooLong."""
    answers = [one[: bounds.answer] for one in row.answers]
    room = bounds.whole - len(row.prompt)
    if max(map(len, answers)) > room:
        if bounds.overflow is Overflow.FAIL:
            raise DataError(
                "RowTooLong", f"{place}: {row.size} tokens, more than dataset.maxSequenceLength {bounds.whole}",
                hint="raise maxSequenceLength, or set dataset.overflow to truncate or drop",
            )  # fmt: skip
        # A reward is read at the end of an answer: a cut answer has none.
        if bounds.overflow is Overflow.DROP or room < 1 or kind is TrainerType.REWARD:
            counts.left_out += 1
            return None
        answers = [one[:room] for one in answers]
    if len(answers) == 2 and answers[0] == answers[1]:
        counts.same += 1
        return None
    counts.cut += answers != row.answers
    return Answered(row.prompt, answers, row.label)


@dataclass(frozen=True)
class Work:
    """Prompts with their answers: rendered and tokenised."""

    style: Style
    rules: Rules

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[tuple[str, Answered] | Refused]:
        """Every row of a batch with its place, or why it cannot be used; whole rows, whichever of their answers is at fault."""
        refused: dict[int, Refused] = {}
        parts: dict[int, list[tuple[list[int], list[int]]]] = {}
        of: list[int] = []

        def texts() -> Iterator[tuple[str, Rendered]]:
            for number, (place, example) in enumerate(rows):
                try:
                    answers = self._rendered(example)
                except RowError as error:
                    refused[number] = Refused(place, error.code, error.found, error.write)
                    continue
                of.extend([number] * len(answers))
                yield from ((place, text) for text in answers)

        for at, (_, ids, learned) in enumerate(encoded(texts(), self.style.tokenizer, self.rules)):
            start = next((place for place, label in enumerate(learned) if label != IGNORED), len(ids))
            parts.setdefault(of[at], []).append((ids[:start], ids[start:]))
        return [
            refused[number] if number in refused else (place, _together(parts[number], getattr(example, "label", None)))
            for number, (place, example) in enumerate(rows)
        ]

    def _rendered(self, example: Example) -> list[Rendered]:
        """The text of each answer behind the prompt; text is joined as it is, unless the user asks for turns."""
        assert isinstance(example, Preference | Judged), "the data room has checked the format"
        sides = (example.chosen, example.rejected) if isinstance(example, Preference) else (example.completion,)
        joined = isinstance(example.prompt, str) and not self.style.text_as_turns
        style = replace(self.style, use_chat_template=False) if joined else self.style
        return [behind(example.prompt, side, style) for side in sides]


def _together(waiting: Sequence[tuple[list[int], list[int]]], label: bool | None) -> Answered:
    """One prompt for all answers: where a token reaches over the border, it belongs to the answers."""
    prompts = [prompt for prompt, _ in waiting]
    shared = 0
    while all(len(one) > shared for one in prompts) and len({one[shared] for one in prompts}) == 1:
        shared += 1
    return Answered(prompts[0][:shared], [prompt[shared:] + answer for prompt, answer in waiting], label)


def behind(prompt: Text, answer: Text, style: Style) -> Rendered:
    """The text of prompt and answer, cut after the answer's end; its one span is the answer. Errors: RowError AnswerEmpty."""
    if isinstance(prompt, str) != isinstance(answer, str):
        raise RowError(
            "RowInvalid",
            "prompt and answer are of two kinds: one is text, the other messages",
            "write both as text, or both as messages",
        )
    if isinstance(prompt, str) and isinstance(answer, str) and not style.use_chat_template:
        if not answer:
            raise RowError("AnswerEmpty", "an answer is empty", "give it a text, or remove the row")
        return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), False)
    turns = tuple(replace(turn, weight=0) for turn in _turns(prompt, "user"))
    turns += tuple(replace(turn, weight=int(turn.role == "assistant")) for turn in _turns(answer, "assistant"))
    rendered = render(Conversation(turns), style)
    if not rendered.spans:
        raise RowError("AnswerEmpty", "an answer holds no turn of the assistant", "give it one, or remove the row")
    start, end = rendered.spans[0][0], rendered.spans[-1][1]
    return Rendered(rendered.text[:end], ((start, end),), rendered.templated)


def _turns(text: Text, role: str) -> tuple[Turn, ...]:
    return (Turn(role, text),) if isinstance(text, str) else text
