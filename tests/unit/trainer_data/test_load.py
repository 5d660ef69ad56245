"""Loading the rows of all sources: bad rows, mixtures, splits, and formats that the objective cannot learn from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, DataError
from finetune_trainer.data import DataSummary, check_files, load
from finetune_trainer.data.rows import Text, Turn

from tests.support.data import catch_check_error, load_examples, make_data_run
from tests.support.learning import make_run, write_rows

HI, HO = Turn("user", "hi"), Turn("assistant", "ho")
GOOD_ROW = {"question": "hi", "answer": "ho"}
BAD_ROWS: dict[str, tuple[str, Any, str, str]] = {
    # test id: (error code, row 17, part of the message, part of the hint)
    "not JSON": ("DatasetRowInvalid", '{"question": "hi", ', "not valid JSON at column 19", "one JSON object per line"),
    "an array": ("DatasetRowInvalid", "[1]", "found an array", "one object per row"),
    "column gone": (
        "ColumnMissing",
        '{"question": "hi", "reply": "ho"}',
        "`question`, `reply`",
        "dataset.columns.answer",
    ),
    "null": ("DatasetRowInvalid", '{"question": "hi", "answer": null}', "`answer` is null", "remove the row"),
    "empty answer": (
        "NoTrainableToken",
        '{"question": "hi", "answer": " "}',
        "no answer to learn from",
        "add an answer",
    ),
    "empty question": ("RowEmpty", '{"question": "", "answer": "ho"}', "question is empty", "remove the row"),
    "a list": ("DatasetRowInvalid", '{"question": ["hi"], "answer": "ho"}', "holds list", "write a string"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_the_error_names_the_bad_row(name: str, tmp_path: Path) -> None:
    code, line, message, hint = BAD_ROWS[name]
    lines = [json.dumps(GOOD_ROW)] * 200
    lines[16] = line
    error = catch_check_error(tmp_path, text="\n".join(lines))
    assert isinstance(error, DataError)
    assert error.code == code and error.exit_code == 65
    assert error.message.startswith("train.jsonl, row 17: ")
    assert message in error.message
    assert hint in (error.hint or "") and "badRows: skip" in (error.hint or "")


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD_ROW)] * 60
    lines[4], lines[9] = "{", '{"question": "hi", "answer": ""}'
    run, inputs = make_data_run(tmp_path, {"dataset": {"badRows": "skip"}}, text="\n".join(lines))
    summary: DataSummary = check_files(run, inputs)
    assert (summary.rows["train"], summary.bad_rows) == (58, 2)
    assert summary.notes == [
        "2 of 60 rows were left out; the first: train.jsonl, row 5: not valid JSON at column 2: Expecting property name enclosed in double quotes"
    ]


def test_too_many_bad_rows_are_refused(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD_ROW)] * 10 + ["{"]
    error = catch_check_error(tmp_path, {"badRows": "skip"}, text="\n".join(lines))
    assert error.code == "TooManyBadRows" and "1 of 11 rows" in error.message and "row 11" in error.message
    assert len(load_examples(tmp_path, {"badRows": "skip", "maxBadRowRatio": 0.1}, text="\n".join(lines))) == 10


def load_mixture(folder: Path, dataset: dict[str, Any], *sources: Any) -> Any:
    """Load a mixture of sources. The first source has weight 9, all others have weight 1."""
    items = [{"source": f"s3://data/{i}.jsonl", "weight": 1 if i else 9} for i in range(len(sources))]
    run, inputs = make_data_run(folder, {"dataset": {"train": None, "mixture": items, **dataset}})
    files = [[write_rows(folder / f"{i}.jsonl", rows)] for i, rows in enumerate(sources)]
    return load(run, inputs.model_copy(update={"train": [], "mixture": files}))


def make_text_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"text": f"text {number}"} for number in range(first, first + count)]


def test_all_copies_of_a_row_in_a_mixture_are_in_the_same_split(tmp_path: Path) -> None:
    """A mixture repeats the rows of a small source."""
    loaded_data = load_mixture(tmp_path, {"split": {"validation": 0.2, "test": 0.2}}, make_text_rows(4), make_text_rows(16, 100))
    train, validation, test = ({row.text for _, row in split_rows} for split_rows in (loaded_data.train, loaded_data.validation, loaded_data.test))
    assert (len(loaded_data.train), len(validation), len(test)) == (12, 4, 4)
    assert not train & validation and not train & test and not validation & test
    assert (
        sum(row.text in {repeated["text"] for repeated in make_text_rows(4)} for _, row in loaded_data.train) == 11
    )  # this source has 9/10 of the total weight


def test_deduplication_does_not_change_the_shares_of_a_mixture(tmp_path: Path) -> None:
    loaded_data = load_mixture(
        tmp_path, {"checks": {"deduplicate": True}}, make_text_rows(2) * 2, [*make_text_rows(1), *make_text_rows(8, 100)]
    )
    assert loaded_data.summary.findings.duplicate_count == 3
    assert [row.text.startswith("text 10") for _, row in loaded_data.train].count(False) == 9
    assert len(loaded_data.train) == 10


def test_a_source_with_only_duplicates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_mixture(tmp_path, {"checks": {"deduplicate": True}}, make_text_rows(2), make_text_rows(2))
    assert caught.value.code == "DatasetEmpty" and "s3://data/1.jsonl: no row is left" in caught.value.message


def test_a_column_that_no_row_has_is_an_error_even_if_bad_rows_are_skipped(tmp_path: Path) -> None:
    error = catch_check_error(tmp_path, {"format": "qa", "columns": {"answer": "reply"}, "badRows": "skip"}, [GOOD_ROW])
    assert error.code == "ColumnMissing"
    assert "column `reply` (dataset.columns.answer)" in error.message and "`question`, `answer`" in error.message


def test_rows_in_a_format_of_another_objective_are_refused(tmp_path: Path) -> None:
    error = catch_check_error(tmp_path / "a", rows=[{"prompt": "hi", "chosen": "ho", "rejected": "no"}])
    assert isinstance(error, ConfigError) and error.code == "FormatMismatch" and "preference" in error.message
    error = catch_check_error(tmp_path / "b", rows=[GOOD_ROW], spec={"trainer": {"type": "dpo"}})
    assert error.code == "FormatMismatch" and "dpo needs preference data; the rows are qa" in error.message


def test_response_only_needs_markers_for_plain_text(tmp_path: Path) -> None:
    rows = [{"text": "x"}]
    error = catch_check_error(tmp_path, {"responseOnly": {"enabled": True}}, rows)
    assert isinstance(error, ConfigError) or error.code == "ResponseOnlyWithoutTurns"
    assert "questionMarker" in (error.hint or "")
    assert load_examples(tmp_path, {"responseOnly": {"questionMarker": "Q:", "answerMarker": "A:"}}, rows) == [
        Text("x")
    ]
    assert load_examples(tmp_path, {}, rows) == [Text("x")]


def test_checking_files_does_not_import_torch() -> None:
    code = "import sys, finetune_trainer.data as d; d.check_files; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mixture_repeats_rows_according_to_the_weights(tmp_path: Path) -> None:
    from finetune_trainer.data import load

    from tests.support.learning import write_rows

    other_file = write_rows(tmp_path / "other.jsonl", [{"q": "one", "a": "red"}] * 5)
    mixture = [
        {"source": "s3://data/a.jsonl", "weight": 1},
        {"source": "s3://data/b.jsonl", "weight": 2, "format": "qa", "columns": {"question": "q", "answer": "a"}},
    ]
    run, inputs = make_run(tmp_path, Path("/models/tiny"), {"dataset": {"train": None, "mixture": mixture}})
    loaded_data = load(run, inputs.model_copy(update={"train": [], "mixture": [inputs.train, [other_file]]}))
    assert len(loaded_data.train) == 15
    assert sum(example.role_names == ("Question", "Answer") for _, example in loaded_data.train) == 10  # type: ignore[union-attr]
    assert "s3://data/b.jsonl 5 rows, weight 2" in loaded_data.summary.notes[0]


@pytest.mark.parametrize("dataset", [{}, {"split": {"validation": 0.2, "test": 0.2}}])
def test_a_limit_on_training_rows_keeps_all_other_rows(dataset: dict[str, object], tmp_path: Path) -> None:
    from finetune_trainer.data import load

    mixture = [{"source": "s3://data/0.jsonl", "weight": 1}, {"source": "s3://data/1.jsonl", "weight": 2}]
    run, inputs = make_data_run(tmp_path, {"dataset": {"train": None, "mixture": mixture, **dataset}})
    files = [[write_rows(tmp_path / f"{i}.jsonl", make_text_rows(10, 100 * i))] for i in range(2)]
    inputs = inputs.model_copy(update={"train": [], "mixture": files})
    whole_data, limited_data = load(run, inputs), load(run, inputs, training_rows=3)
    assert limited_data.train == whole_data.train[:3] and len(whole_data.train) > 3
    assert (limited_data.validation, limited_data.test) == (whole_data.validation, whole_data.test)
    assert limited_data.summary == whole_data.summary
