"""Stage 6, tokenise: convert texts to token ids and labels, and count the tokens.

A text from a chat template already contains its special tokens, so the tokenizer adds none. The label of a token that
overlaps a trained span is the token's id; all other labels are -100. Whether a token is trained on does not depend on its id, so the
end token is trained on even if the pad token has the same id.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import OverflowPolicy

from finetune_trainer.data.batches import RejectedRow, RowOutcome
from finetune_trainer.data.rows import IGNORED_LABEL, ImageFile, RowError
from finetune_trainer.data.template import Rendered

BATCH_ROWS = 1000
"""Maximum number of rows that are tokenised together."""


class EncodedRow(NamedTuple):
    """The tokens of one row."""

    location: str
    ids: list[int]
    labels: list[int]
    images: tuple[ImageFile, ...] = ()
    image_end: int = 0
    """Number of tokens up to the end of the last image; 0 without images. A row cannot be cut to fewer tokens than this number."""


@dataclass(frozen=True)
class TokeniseOptions:
    """The length limit, and the boundary tokens to add."""

    max_length: int
    overflow: OverflowPolicy
    add_eos: bool
    add_bos: bool | None
    """Whether rows get a beginning token. If None, the tokenizer's default applies."""


class FittedRow(NamedTuple):
    """The result of applying the length limit to a row."""

    outcome: RowOutcome
    """`KEPT` or `CUT` if the row is stored. If `outcome` has any other value, the row is left out, and `ids` and `labels` are empty."""
    ids: list[int]
    labels: list[int]


@dataclass
class TokenReport:
    """The row and token counts of one split."""

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    """Number of rows that were left out because they were too long (with `overflow: drop`)."""
    answerless: int = 0
    """Number of rows that were left out because their whole answer was cut off."""
    tokens: int = 0
    trained_tokens: int = 0
    """Number of tokens that are trained on."""
    longest: int = 0
    """Number of tokens of the longest row. `median` and `percentile95` are also numbers of tokens per row."""
    median: int = 0
    percentile95: int = 0
    sequences: int = 0
    padding_share: float | None = None
    """Share of unused positions in packed sequences, from 0 to 1; None without packing."""

    def notes(self, options: TokeniseOptions) -> list[str]:
        """Return sentences about the counts for the status."""
        notes = [
            f"{self.rows} rows; tokens per row: median {self.median}, 95th percentile {self.percentile95}, longest {self.longest}; "
            f"{self.trained_tokens} of {self.tokens} tokens are trained on"
        ]
        if self.truncated:
            notes.append(f"{self.truncated} rows were cut to dataset.maxSequenceLength {options.max_length}")
        if self.dropped:
            notes.append(
                f"{self.dropped} rows longer than dataset.maxSequenceLength {options.max_length} were left out"
            )
        if self.answerless:
            notes.append(
                f"{self.answerless} rows were left out because their whole answer was cut off: raise dataset.maxSequenceLength"
            )
        if self.tokens and self.trained_tokens < 0.05 * self.tokens:
            notes.append(f"only {self.trained_tokens / self.tokens:.1%} of the tokens are trained on")
        if self.padding_share is not None:
            notes.append(f"packed into {self.sequences} sequences, {self.padding_share:.1%} padding")
        return notes


def fit_row(row: EncodedRow, options: TokeniseOptions) -> FittedRow | RejectedRow:
    """Apply the length limit to a row. `options.overflow` decides whether a longer row is cut, left out or refused.

    Errors: DataError RowTooLong (`overflow: fail`).
    """
    location, ids, labels, _, image_end = row
    if _count_predicted_tokens(labels) == 0:
        error = RowError("NoTrainableToken", "no token of the row is trained on", "write an answer, or remove the row")
        return RejectedRow.of(location, error)
    if len(ids) <= options.max_length:
        return FittedRow(RowOutcome.KEPT, ids, labels)
    if options.overflow is OverflowPolicy.FAIL:
        raise DataError(
            "RowTooLong", f"{location}: {len(ids)} tokens, more than dataset.maxSequenceLength {options.max_length}",
            hint="raise maxSequenceLength, or set dataset.overflow to truncate or drop",
        )  # fmt: skip
    if options.overflow is OverflowPolicy.DROP:
        return FittedRow(RowOutcome.TOO_LONG, [], [])
    if image_end > options.max_length:
        error = RowError(
            "ImageCut", f"dataset.maxSequenceLength {options.max_length} would cut an image: the images end at token {image_end}",
            "raise maxSequenceLength, use smaller or fewer images, or set dataset.overflow: drop",
        )  # fmt: skip
        return RejectedRow.of(location, error)
    ids, labels = ids[: options.max_length], labels[: options.max_length]
    if _count_predicted_tokens(labels) == 0:
        return FittedRow(RowOutcome.ANSWERLESS, [], [])
    return FittedRow(RowOutcome.CUT, ids, labels)


def no_row_left_error(dropped_row_count: int, answerless_row_count: int, max_length: int) -> DataError:
    """Return the error for a split that has no row left to train on. `dropped_row_count`, `answerless_row_count`: see `TokenReport`."""
    return DataError(
        "NoTrainableToken", f"no row is left to train on: {dropped_row_count} are too long, {answerless_row_count} have no answer after truncation",
        hint=f"raise dataset.maxSequenceLength (now {max_length}), or shorten the rows",
    )  # fmt: skip


def _count_predicted_tokens(labels: list[int]) -> int:
    """Return the number of tokens that the model learns to predict. The first token never counts, because no token precedes it."""
    return len(labels) - 1 - labels.count(IGNORED_LABEL) + (labels[0] == IGNORED_LABEL) if labels else 0


def encode(located_renderings: Iterable[tuple[str, Rendered]], tokenizer: Any, options: TokeniseOptions) -> Iterator[EncodedRow]:
    """Yield the location, token ids and labels of every text. Texts are tokenised in batches, because a fast tokenizer uses all cores for a batch.

    Errors: ConfigError BosMissing, EosMissing.
    """
    boundary = BoundaryTokens.of(tokenizer, options)
    rendering_iterator = iter(located_renderings)
    while batch := list(islice(rendering_iterator, BATCH_ROWS)):
        encodings = tokenizer(
            [rendered.text for _, rendered in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for (location, rendered), ids, offsets in zip(batch, encodings["input_ids"], encodings["offset_mapping"], strict=True):
            labels = make_labels(ids, offsets, rendered.spans)
            yield EncodedRow(location, *boundary.add_boundary_tokens(list(ids), labels, is_templated=rendered.is_templated))


def make_labels(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the label of each token: its id if the token overlaps a span, else -100.

    `offsets`: start and end of each token in the text. `offsets` and `spans` are in ascending order.
    """
    labels = [IGNORED_LABEL] * len(ids)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for begin, end in spans:
        first, last = bisect_right(ends, begin), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return labels


@dataclass(frozen=True)
class BoundaryTokens:
    """The rules for the beginning token and the end token of a row.

    A row gets each of these two tokens at most once, even if both the template and the tokenizer add the token.
    """

    bos_id: int | None
    eos_id: int | None
    """None if rows get no end token."""
    special_ids: frozenset[int]
    """Ids of all special tokens of the tokenizer."""
    blank_ids: frozenset[int]
    """Ids of tokens that consist of white space."""
    add_bos_to_plain: bool
    """Whether a text without chat template gets a beginning token."""
    add_bos_to_templated: bool | None
    """Whether a text from a chat template gets a beginning token. If None, the template decides."""

    @staticmethod
    def of(tokenizer: Any, options: TokeniseOptions) -> BoundaryTokens:
        """Read the boundary tokens from the tokenizer and the options. Errors: ConfigError BosMissing, EosMissing."""
        bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if options.add_bos and bos_id is None:
            raise ConfigError(
                "BosMissing",
                "dataset.addBosToken is true, but the tokenizer has no beginning token",
                hint="leave addBosToken out",
            )
        if options.add_eos and eos_id is None:
            raise ConfigError(
                "EosMissing",
                "the tokenizer has no end token",
                hint="set dataset.addEosToken: false, or give another model.tokenizer",
            )
        tokenizer_adds_bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
        blank_ids = frozenset(token for text in ("\n", " ", "\n\n") for token in _as_single_token(tokenizer, text))
        return BoundaryTokens(
            bos_id, eos_id if options.add_eos else None, frozenset(tokenizer.all_special_ids) | _list_added_special_ids(tokenizer), blank_ids,
            tokenizer_adds_bos if options.add_bos is None else options.add_bos, options.add_bos,
        )  # fmt: skip

    def add_boundary_tokens(self, ids: list[int], labels: list[int], *, is_templated: bool) -> tuple[list[int], list[int]]:
        """Add or remove beginning and end tokens. Returns the new ids and labels."""
        adds_bos = self.add_bos_to_templated if is_templated else self.add_bos_to_plain
        leading_bos_count = 0
        while self.bos_id is not None and leading_bos_count < len(ids) and ids[leading_bos_count] == self.bos_id:
            leading_bos_count += 1
        bos_count = (1 if leading_bos_count else 0) if adds_bos is None else int(adds_bos)
        if self.bos_id is not None and leading_bos_count != bos_count:
            ids, labels = [self.bos_id] * bos_count + ids[leading_bos_count:], [IGNORED_LABEL] * bos_count + labels[leading_bos_count:]
        if self.eos_id is not None and not self._has_end_token(ids, is_templated):
            last_index = self._find_last_nonblank_index(ids)
            is_trained = last_index < 0 or labels[last_index] != IGNORED_LABEL  # If the answer is not trained on, its end token is not trained on either.
            ids, labels = [*ids, self.eos_id], [*labels, self.eos_id if is_trained else IGNORED_LABEL]
        return ids, labels

    def _has_end_token(self, ids: list[int], is_templated: bool) -> bool:
        """Whether the row already has an end token: `eos_id` for plain text, any special token for text from a chat template."""
        if not is_templated:
            return bool(ids) and ids[-1] == self.eos_id
        last_index = self._find_last_nonblank_index(ids)
        return last_index >= 0 and ids[last_index] in self.special_ids

    def _find_last_nonblank_index(self, ids: list[int]) -> int:
        """Return the index of the last token that is not blank, or -1 if all tokens are blank."""
        return next((index for index in range(len(ids) - 1, -1, -1) if ids[index] not in self.blank_ids), -1)


def _as_single_token(tokenizer: Any, text: str) -> list[int]:
    """Return a list with the text's token if the text is exactly one token, else an empty list."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids) if len(ids) == 1 else []


def _list_added_special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
