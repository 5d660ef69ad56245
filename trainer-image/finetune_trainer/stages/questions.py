"""Converts held-out examples to questions for the model, and to labelled token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OverflowPolicy

from finetune_trainer.artefact.end_tokens import find_trained_end_tokens, split_into_answers
from finetune_trainer.data.batches import RejectedRow, RowOutcome
from finetune_trainer.data.encode import require_few_bad_rows
from finetune_trainer.data.load import LoadedData
from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    Preference,
    Prompt,
    RawRow,
    RowError,
    Text,
    TokenSequence,
    Turn,
)
from finetune_trainer.data.supervised import SupervisedEncoder
from finetune_trainer.data.template import Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import TokeniseOptions, encode, fit_row, no_row_left_error

ANSWER_PLACEHOLDER = "?"
"""The text that replaces a missing answer while a question is rendered, because some chat templates require an answer."""


@dataclass(frozen=True)
class Question:
    """The question in an example, and the answer that the example contains."""

    system_prompt: str | None
    user_prompt: str
    ground_truth: str | None
    """None if the example contains no answer."""
    text: str
    """The rendered text before the answer."""
    is_templated: bool
    """Whether a chat template rendered the text. A rendered text already contains its special tokens."""
    token_ids: list[int]
    letters: tuple[str, ...] = ()
    """Letters of the options of a multiple-choice question."""


def select_held_out_rows(loaded_data: LoadedData) -> list[tuple[RawRow, Example]]:
    """Return the rows of the test set, or of the validation set if the run has no test set."""
    return loaded_data.test or loaded_data.validation


def to_answered_example(example: Example) -> Conversation | Completion | Text | TokenSequence | None:
    """Convert an example to a text or conversation that ends with its answer. None if the example contains no answer.

    The answer of a preference pair is the preferred answer.
    """
    match example:
        case Conversation() | Completion() | Text() | TokenSequence():
            return example
        case Preference(str() as prompt, str() as chosen, _):
            return Completion(prompt, chosen)
        case Preference(tuple() as prompt, tuple() as chosen, _):
            return Conversation((*prompt, *chosen))
        case Prompt(prompt, columns) if isinstance(columns.get("answer"), str):
            answer = str(columns["answer"])
            return Completion(prompt, answer) if isinstance(prompt, str) else Conversation((*prompt, Turn("assistant", answer)))
        case _:
            return None


def read_questions(rows: Iterable[tuple[RawRow, Example]], render_options: RenderOptions, options: TokeniseOptions) -> list[Question]:
    """Return the question of each example that contains one. Plain text contains no question.

    If a question has more than `options.max_length` tokens, only the last `options.max_length` tokens are kept.
    """
    examples_and_renderings = [pair for _, example in rows if (pair := _render_question(example, render_options)) is not None]
    texts = ((str(number), rendered) for number, (_, rendered) in enumerate(examples_and_renderings))
    encoded_rows = encode(texts, render_options.tokenizer, replace(options, add_eos=False))
    return [
        _to_question(example, rendered, ids[-options.max_length :])
        for (example, rendered), (_, ids, *_) in zip(examples_and_renderings, encoded_rows, strict=True)
    ]


def prompts_to_examples(prompts: Iterable[str], sample: Example, system_prompt: str | None) -> list[tuple[RawRow, Example]]:
    """Convert prompts to examples. `sample`: an example of the job's data. If the sample has messages, the prompts become messages, otherwise plain text."""
    is_chat = isinstance(sample, Conversation) or isinstance(getattr(sample, "prompt", None), tuple)
    role_names = sample.role_names if isinstance(sample, Conversation) else Conversation(()).role_names
    rows_and_examples: list[tuple[RawRow, Example]] = []
    for number, text in enumerate(prompts, 1):
        system = (Turn("system", system_prompt),) if system_prompt else ()
        turns = (*system, Turn("user", text), Turn("assistant", ANSWER_PLACEHOLDER))
        example: Example = Conversation(turns, role_names=role_names) if is_chat else Completion(text, ANSWER_PLACEHOLDER)
        rows_and_examples.append((RawRow(Path("prompts"), number, {}), example))
    return rows_and_examples


@dataclass
class TokenRows:
    """The token ids and the labels of several rows."""

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)


def tokenise_answered(run: RunConfig, rows: Sequence[tuple[RawRow, Example]], render_options: RenderOptions, options: TokeniseOptions) -> TokenRows:
    """Tokenise the examples that contain an answer, as in training. Rows that are too long are truncated. Errors: DataError."""
    located_examples = [(row.location, answered_example) for row, example in rows if (answered_example := to_answered_example(example)) is not None]
    rejected_rows, token_rows, answerless_count = list[RejectedRow](), TokenRows(), 0
    for row in SupervisedEncoder(render_options, options)(located_examples):
        fitted_row = row if isinstance(row, RejectedRow) else fit_row(row, replace(options, overflow=OverflowPolicy.TRUNCATE))
        if isinstance(fitted_row, RejectedRow):
            rejected_rows.append(fitted_row)
        elif fitted_row.outcome is RowOutcome.ANSWERLESS:
            answerless_count += 1
        else:
            token_rows.input_ids.append(fitted_row.ids)
            token_rows.labels.append(fitted_row.labels)
    require_few_bad_rows(run, rejected_rows, len(located_examples), "test")
    if not token_rows.input_ids:
        raise no_row_left_error(0, answerless_count, options.max_length)
    return token_rows


def _render_question(example: Example, options: RenderOptions) -> tuple[Conversation | Completion, Rendered] | None:
    """Convert an example to a conversation or completion, and render its text before the last answer. None if it contains no question.

    The returned conversation or completion has an empty answer if the example has no answer.
    """
    answered_example = to_answered_example(example)
    if answered_example is None and isinstance(example, Prompt):
        rendered_question = _render_question(Prompt(example.prompt, {"answer": ANSWER_PLACEHOLDER}), options)
        return None if rendered_question is None else (_remove_answer(rendered_question[0]), rendered_question[1])
    if not isinstance(answered_example, Conversation | Completion):
        return None
    if isinstance(answered_example, Conversation):
        last_answer_index = max((index for index, turn in enumerate(answered_example.turns) if turn.role == "assistant"), default=None)
        if last_answer_index is None:
            return None
        turns = answered_example.turns
        answered_example = replace(answered_example, turns=(*turns[:last_answer_index], replace(turns[last_answer_index], weight=1)))
    try:
        rendering = render(answered_example, replace(options, response_only=True, turn_markers=None))
    except RowError:
        return None
    return answered_example, Rendered(rendering.text[: rendering.spans[-1][0]], (), rendering.is_templated)


def _remove_answer(example: Conversation | Completion) -> Conversation | Completion:
    if isinstance(example, Completion):
        return replace(example, completion="")
    return replace(example, turns=(*example.turns[:-1], replace(example.turns[-1], content="")))


def _to_question(example: Conversation | Completion, rendering: Rendered, token_ids: list[int]) -> Question:
    if isinstance(example, Completion):
        return Question(None, example.prompt, example.completion or None, rendering.text, rendering.is_templated, token_ids)
    content_by_role = {turn.role: turn.content for turn in example.turns[:-1]}
    letters = tuple(map(str, example.columns.get("options", ())))
    return Question(
        content_by_role.get("system"), content_by_role.get("user", ""), example.turns[-1].content or None,
        rendering.text, rendering.is_templated, token_ids, letters
    )


def end_token_ids(tokenizer: Any, model: Any, labels: Iterable[Sequence[int]]) -> list[int]:
    """Return the ids of the tokens that end an answer: the end tokens of tokenizer and model, and the tokens that end trained answers."""
    configured_ids = getattr(model.generation_config, "eos_token_id", None)
    trained_ids = find_trained_end_tokens(tokenizer, (answer for row in labels for answer in split_into_answers(row)))
    ids = {tokenizer.eos_token_id, *(configured_ids if isinstance(configured_ids, list) else [configured_ids]), *trained_ids}
    return sorted(index for index in ids if index is not None)
