"""Stages 6 and 7, tokenise and pack: texts become token ids and labels, and what happened to them is counted.

A text that a template rendered is tokenised without adding special tokens (they stand in it already), so that no beginning
token comes twice. A label is the token's id where the token overlaps a learned span and -100 elsewhere, by position in the
text: never by id, so a pad token that equals the end token hides nothing.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune_api.errors import ConfigError, DataError
from finetune_api.spec.enums import Overflow

from finetune_trainer.data.pack import pack, padding_share
from finetune_trainer.data.template import Rendered

IGNORED = -100
BATCH = 1000


@dataclass(frozen=True)
class Rules:
    """How texts become sequences."""

    max_length: int
    overflow: Overflow
    add_eos: bool
    add_bos: bool | None
    """None: as the tokenizer does by itself."""


@dataclass
class Tokens:
    """Sequences of one part. `lengths` holds the documents of each packed sequence; None: not packed."""

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    lengths: list[list[int]] | None = None
    report: TokenReport = field(default_factory=lambda: TokenReport())


@dataclass
class TokenReport:
    """Counts of one part."""

    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    """Rows longer than the limit that were left out (`overflow: drop`)."""
    answerless: int = 0
    """Rows whose whole answer was cut off; they teach nothing and are left out."""
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    median: int = 0
    percentile95: int = 0
    sequences: int = 0
    padding_share: float | None = None
    """With packing: empty places in full-length sequences."""

    def notes(self, rules: Rules) -> list[str]:
        """What a user should hear of it."""
        said = [
            f"{self.rows} rows of {self.median} tokens (median; 95%: {self.percentile95}, longest: {self.longest}), "
            f"{self.learned_tokens} of {self.tokens} tokens learned"
        ]
        if self.truncated:
            said.append(f"{self.truncated} rows were cut to dataset.maxSequenceLength {rules.max_length}")
        if self.dropped:
            said.append(f"{self.dropped} rows longer than dataset.maxSequenceLength {rules.max_length} were left out")
        if self.answerless:
            said.append(
                f"{self.answerless} rows lost their whole answer to the cut and were left out: raise dataset.maxSequenceLength"
            )
        if self.tokens and self.learned_tokens < 0.05 * self.tokens:
            said.append(f"only {self.learned_tokens / self.tokens:.1%} of the tokens are learned")
        if self.padding_share is not None:
            said.append(f"packed into {self.sequences} sequences, {self.padding_share:.1%} of the places empty")
        return said


def tokenise(
    rows: Iterable[tuple[str, list[int], list[int]]], rules: Rules, *, on_bad_row: Callable[[str, str, str, str], None]
) -> Tokens:
    """Sequences within the limits; `rows` gives place (`train.jsonl, row 17`), token ids and labels of each.

    `on_bad_row(place, code, found, write)` is told of a row in which nothing can be learned; it raises or returns.
    Errors: DataError RowTooLong (`overflow: fail`), NoTrainableToken (nothing left at all).
    """
    result, lengths = Tokens(), []
    report = result.report
    for place, ids, labels in rows:
        if _learned(labels) == 0:
            on_bad_row(
                place, "NoTrainableToken", "no token of the row is learned", "give it an answer, or remove the row"
            )
            continue
        if len(ids) > rules.max_length:
            if rules.overflow is Overflow.FAIL:
                raise DataError(
                    "RowTooLong", f"{place}: {len(ids)} tokens, more than dataset.maxSequenceLength {rules.max_length}",
                    hint="raise maxSequenceLength, or set dataset.overflow to truncate or drop",
                )  # fmt: skip
            if rules.overflow is Overflow.DROP:
                report.dropped += 1
                continue
            ids, labels = ids[: rules.max_length], labels[: rules.max_length]
            if _learned(labels) == 0:
                report.answerless += 1
                continue
            report.truncated += 1
        result.input_ids.append(ids)
        result.labels.append(labels)
        lengths.append(len(ids))
        report.tokens += len(ids)
        report.learned_tokens += len(labels) - labels.count(IGNORED)
    _measure(report, lengths, rules)
    return result


def _learned(labels: list[int]) -> int:
    """Labels that are predicted from something: the first has nothing before it."""
    return len(labels) - labels.count(IGNORED) - (labels[:1] != [IGNORED] and bool(labels))


def _measure(report: TokenReport, lengths: list[int], rules: Rules) -> None:
    report.rows = report.sequences = len(lengths)
    if not lengths:
        raise DataError(
            "NoTrainableToken", f"no row is left to learn from: {report.dropped} too long, {report.answerless} without an answer after the cut",
            hint=f"raise dataset.maxSequenceLength (now {rules.max_length}), or shorten the rows",
        )  # fmt: skip
    ordered = sorted(lengths)
    report.longest, report.median = ordered[-1], int(statistics.median_low(ordered))
    report.percentile95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def packed(tokens: Tokens, capacity: int) -> Tokens:
    """The same documents, put together into sequences of at most `capacity` tokens.

    The first label of each document is masked: nothing precedes it that it could be predicted from.
    """
    sizes = [len(ids) for ids in tokens.input_ids]
    result = Tokens(lengths=[], report=tokens.report)
    assert result.lengths is not None
    for rows in pack(sizes, capacity):
        result.input_ids.append([token for row in rows for token in tokens.input_ids[row]])
        result.labels.append([label for row in rows for label in (IGNORED, *tokens.labels[row][1:])])
        result.lengths.append([sizes[row] for row in rows])
    result.report.sequences = len(result.input_ids)
    result.report.padding_share = padding_share(sizes, len(result.input_ids), capacity)
    return result


def encoded(
    texts: Iterable[tuple[str, Rendered]], tokenizer: Any, rules: Rules
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Place, token ids and labels of every text, in batches: a fast tokenizer uses all cores for one.

    Errors: ConfigError BosMissing, EosMissing.
    """
    ends = _Ends.of(tokenizer, rules)
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        encoded = tokenizer(
            [item.text for _, item in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for (place, item), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield place, *ends.close(list(ids), labels_of(ids, offsets, item.spans), item.templated)


def labels_of(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Ids where a token overlaps a span, -100 elsewhere. Both offsets and spans ascend."""
    labels = [IGNORED] * len(ids)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for begin, end in spans:
        first, last = bisect_right(ends, begin), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return labels


@dataclass(frozen=True)
class _Ends:
    """Beginning and end tokens: each once, whatever template and tokenizer do by themselves."""

    bos: int | None
    eos: int | None
    specials: frozenset[int]
    spaces: frozenset[int]
    add_bos: bool
    """For texts that no template rendered."""
    add_bos_templated: bool | None

    @staticmethod
    def of(tokenizer: Any, rules: Rules) -> _Ends:
        """What the tokenizer has, and what the rules want of it. Errors: ConfigError BosMissing, EosMissing."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if rules.add_bos and bos is None:
            raise ConfigError(
                "BosMissing",
                "dataset.addBosToken is true, but the tokenizer has no beginning token",
                hint="leave it out",
            )
        if rules.add_eos and eos is None:
            raise ConfigError(
                "EosMissing",
                "the tokenizer has no end token",
                hint="set dataset.addEosToken: false, or give another model.tokenizer",
            )
        own = tokenizer("a")["input_ids"]
        by_itself = bos is not None and own[:1] == [bos]
        blanks = frozenset(one for text in ("\n", " ", "\n\n") for one in _single(tokenizer, text))
        return _Ends(
            bos, eos if rules.add_eos else None, frozenset(tokenizer.all_special_ids) | _added_specials(tokenizer), blanks,
            by_itself if rules.add_bos is None else rules.add_bos, rules.add_bos,
        )  # fmt: skip

    def close(self, ids: list[int], labels: list[int], templated: bool) -> tuple[list[int], list[int]]:
        """Ids and labels with exactly the ends that were asked for."""
        wanted = self.add_bos_templated if templated else self.add_bos
        leading = 0
        while self.bos is not None and leading < len(ids) and ids[leading] == self.bos:
            leading += 1
        keep = (1 if leading else 0) if wanted is None else int(wanted)
        if self.bos is not None and leading != keep:
            ids, labels = [self.bos] * keep + ids[leading:], [IGNORED] * keep + labels[leading:]
        if self.eos is not None and not self._ended(ids, templated):
            last = self._last(ids)
            learned = last < 0 or labels[last] != IGNORED  # the end of what is not learned is not learned either
            ids, labels = [*ids, self.eos], [*labels, self.eos if learned else IGNORED]
        return ids, labels

    def _ended(self, ids: list[int], templated: bool) -> bool:
        """Whether the row ends itself: a text with the end token, a template with any special token before blanks."""
        if not templated:
            return bool(ids) and ids[-1] == self.eos
        last = self._last(ids)
        return last >= 0 and ids[last] in self.specials

    def _last(self, ids: list[int]) -> int:
        """Place of the last token that is no blank; -1: there is none."""
        return next((place for place in range(len(ids) - 1, -1, -1) if ids[place] not in self.spaces), -1)


def _single(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids) if len(ids) == 1 else []


def _added_specials(tokenizer: Any) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
