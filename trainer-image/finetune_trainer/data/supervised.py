"""Converts rows of supervised training to token ids and labels, within the length limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_trainer.data.batches import BatchBuilder, EncodedBatch, RejectedRow, RowOutcome
from finetune_trainer.data.rows import IGNORED_LABEL, Example, RowError, TokenSequence
from finetune_trainer.data.shards import ColumnType
from finetune_trainer.data.template import Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import EncodedRow, TokeniseOptions, encode, fit_row
from finetune_trainer.data.vision import IMAGE_SOURCES_COLUMN, to_image_column

TOKEN_COLUMNS = {"input_ids": ColumnType.TOKENS, "labels": ColumnType.TOKENS}
RowEncoder = Callable[[Sequence[tuple[str, Example]]], list[EncodedRow | RejectedRow]]
"""A function that renders and tokenises rows (location, example) without a length limit."""


@dataclass(frozen=True)
class SupervisedEncoder:
    """Renders and tokenises rows of supervised training."""

    rendering_options: RenderOptions
    options: TokeniseOptions

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[EncodedRow | RejectedRow]:
        """Render and tokenise the rows. Errors: ConfigError of `render` and `encode`."""
        finished_rows: list[tuple[int, EncodedRow | RejectedRow]] = []

        def render_rows() -> Iterator[tuple[str, Rendered]]:
            for number, (location, example) in enumerate(rows):
                if isinstance(example, TokenSequence):
                    finished_rows.append((number, self._check_tokens(location, example)))
                    continue
                try:
                    yield location, render(example, self.rendering_options)
                except RowError as error:
                    finished_rows.append((number, RejectedRow.of(location, error)))

        results: list[EncodedRow | RejectedRow] = list(encode(render_rows(), self.rendering_options.tokenizer, self.options))
        for number, row in finished_rows:
            results.insert(number, row)
        return results

    @cached_property
    def _vocabulary_size(self) -> int:
        tokenizer: Any = self.rendering_options.tokenizer
        return len(tokenizer)

    def _check_tokens(self, location: str, row: TokenSequence) -> EncodedRow | RejectedRow:
        """Return an already tokenised row. The row is rejected if one of its token ids is not in the vocabulary."""
        highest_id, vocabulary_size = max(row.ids), self._vocabulary_size
        if highest_id >= vocabulary_size:
            message = f"token {highest_id} is not in the model's vocabulary of {vocabulary_size} tokens"
            return RejectedRow.of(location, RowError("TokenUnknown", message, "tokenise the row with the model's tokenizer"))
        return EncodedRow(location, list(row.ids), list(row.labels))


@dataclass(frozen=True)
class FittingEncoder:
    """Encodes rows and applies the length limit. `has_images`: whether the stored rows have a column with their images."""

    encoder: RowEncoder
    options: TokeniseOptions
    has_images: bool = False

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> EncodedBatch:
        """Encode the rows. Errors: DataError RowTooLong; errors of the encoder."""
        columns = TOKEN_COLUMNS | ({IMAGE_SOURCES_COLUMN: ColumnType.IMAGES} if self.has_images else {})
        batch = BatchBuilder(columns)
        for row in self.encoder(rows):
            fitted_row = row if isinstance(row, RejectedRow) else fit_row(row, self.options)
            if isinstance(fitted_row, RejectedRow):
                batch.reject(fitted_row)
            elif fitted_row.outcome not in (RowOutcome.KEPT, RowOutcome.CUT):
                batch.leave_out(fitted_row.outcome)
            else:
                images = {IMAGE_SOURCES_COLUMN: to_image_column(row.images)} if isinstance(row, EncodedRow) else {}
                trained_token_count = len(fitted_row.labels) - fitted_row.labels.count(IGNORED_LABEL)
                batch.keep(fitted_row.outcome, len(fitted_row.ids), trained_token_count, input_ids=fitted_row.ids, labels=fitted_row.labels, **images)
        return batch.build()
