"""The interface of a data format: detection, required columns, and conversion of a row to an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import ColumnRole, find_column
from finetune_trainer.data.rows import Example, RawRow, RowError

Value = TypeVar("Value")


@dataclass(frozen=True)
class ReadOptions:
    """The options of `spec.dataset` for reading a row."""

    columns: Columns = field(default_factory=Columns)
    system_prompt: str | None = None
    template: str | None = None
    include_options: bool = True
    needs_answer: bool = True
    """Whether a conversation without an answer is a bad row. False if all tokens are trained on."""


class Format(ABC):
    """Recognises and reads the rows of one `dataset.format`. Instances have no state."""

    name: ClassVar[DatasetFormat]
    required: ClassVar[tuple[ColumnRole, ...]] = ()
    """Columns that every row must have."""

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        """Whether detection chooses this format for the row. By default, a row matches if it has all required columns."""
        return all(find_column(role, row.keys(), columns) is not None for role in self.required)

    def required_columns(self, sample: Sequence[RawRow], columns: Columns) -> tuple[ColumnRole, ...]:
        """Return the columns that the sampled rows must have."""
        return self.required

    @abstractmethod
    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Example:
        """Convert one row to an example. Errors: RowError."""

    def read_all(self, rows: Iterable[RawRow], options: ReadOptions) -> Iterator[tuple[RawRow, Example | RowError]]:
        """Yield every row with its example or its error. A format overrides this method if one example spans several rows."""
        for row in rows:
            yield row, try_to_read(self.read, row.value, options)


def try_to_read(read: Callable[[Value, ReadOptions], Example], value: Value, options: ReadOptions) -> Example | RowError:
    """Return the example from `read`, or the RowError that `read` raises."""
    try:
        return read(value, options)
    except RowError as error:
        return error


def require_text(text: str, text_label: str) -> str:
    """Return the text if it is not blank. Errors: RowError RowEmpty."""
    if not text.strip():
        raise RowError("RowEmpty", f"the {text_label} is empty", "write a text, or remove the row")
    return text
