"""`finetune ratings`: reading the sheets that people filled in, and computing statistics that agree with published figures and with independent computations.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finetune_api.rating_sheet import COLUMNS, SCORE_COLUMNS
from finetune_cli.mistakes import InvalidInput
from finetune_cli.ratings import (
    Rating,
    compute_krippendorff_alpha,
    compute_wilson_interval,
    compute_win_rate,
    describe_values,
    read_ratings,
    summarise,
)

from tests.unit.cli.conftest import RunCommand

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, missing values.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def list_units(observers: list[list[int | None]]) -> list[list[int]]:
    return [[value for value in column if value is not None] for column in zip(*observers, strict=True)]


def test_alpha_equals_the_published_example() -> None:
    assert compute_krippendorff_alpha(list_units(OBSERVERS)) == pytest.approx(0.815, abs=5e-4)


def compute_alpha_by_ranks(units: list[list[int]]) -> float:
    """Compute ordinal alpha by another formula than the program: distances are differences of mid-ranks, and disagreements are means over all pairs of
    values.
    """
    units_with_pairs = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units_with_pairs for value in unit]
    counts = Counter(values)
    mid_ranks = {value: sum(counts[other_value] for other_value in counts if other_value < value) + counts[value] / 2 for value in counts}
    unit_disagreements = [sum((mid_ranks[a] - mid_ranks[b]) ** 2 for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units_with_pairs]
    pair_disagreements = [(mid_ranks[a] - mid_ranks[b]) ** 2 for a, b in itertools.permutations(values, 2)]
    return 1 - (sum(unit_disagreements) / len(values)) / (sum(pair_disagreements) / len(pair_disagreements))


def test_alpha_equals_an_independent_computation() -> None:
    numbers = random.Random(5)
    for _ in range(50):
        units = [[min(5, max(1, base + numbers.randint(-1, 1))) for _ in range(numbers.randint(1, 4))] for base in numbers.choices(range(1, 6), k=12)]
        assert compute_krippendorff_alpha(units) == pytest.approx(compute_alpha_by_ranks(units))


@pytest.mark.parametrize(("units", "alpha"), [([[1, 1], [5, 5]], 1.0), ([[3, 3], [3, 3]], None), ([[1], [2]], None), ([], None)])
def test_alpha_of_extreme_cases(units: list[list[int]], alpha: float | None) -> None:
    assert compute_krippendorff_alpha(units) == alpha


def test_wilson_interval_equals_published_figures() -> None:
    """The expected figures are from Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert compute_wilson_interval(successes / count, count) == pytest.approx((low, high), abs=5e-5)


def test_spread() -> None:
    assert describe_values([1, 2, 5]) == {"count": 3, "mean": pytest.approx(8 / 3), "median": 2, "std": pytest.approx((13 / 3) ** 0.5), "min": 1, "max": 5}
    assert describe_values([4])["std"] is None and describe_values([])["mean"] is None


def make_rating(answer: int, question: int, model: str, rater: str, overall: int) -> Rating:
    return Rating(str(answer), str(question), model, rater, {"overall": overall}, "sheet")


def test_win_rate_counts_ties_half_and_questions_once() -> None:
    ratings = [
        make_rating(1, 1, "trained", "a", 5), make_rating(2, 1, "base", "a", 3), make_rating(1, 1, "trained", "b", 4), make_rating(2, 1, "base", "b", 4),
        make_rating(3, 2, "base", "a", 5), make_rating(4, 2, "trained", "a", 1), make_rating(5, 3, "trained", "a", 5),
    ]  # fmt: skip
    low, high = compute_wilson_interval(0.375, 2)
    assert compute_win_rate(ratings) == {"rate": 0.375, "low": low, "high": high, "questions": 2, "wins": 1, "ties": 1, "losses": 1}
    assert compute_win_rate(ratings[:1])["rate"] is None


# ---- sheets


def write_sheet(path: Path, rows: list[dict[str, Any]], *, delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_row(number: int, question: int, model: str, *scores: int | str, rater: str = "", prompt: str = "Why?") -> dict[str, Any]:
    cells = {"id": number, "promptID": question, "model": model, "prompt": prompt, "response": "Yes,\nno", "rater": rater}
    return cells | dict(zip(SCORE_COLUMNS, scores, strict=False))


@pytest.fixture
def sheets_and_key(tmp_path: Path) -> list[Path]:
    anna = write_sheet(tmp_path / "anna.csv", [make_row(1, 1, "A", 5, 4, 5, 5), make_row(2, 1, "B", 2, 2, 3, 2)])
    ben = write_sheet(tmp_path / "ben.csv", [make_row(1, 1, "A", "4.0", 4, "", 4), make_row(2, 1, "B", 2, 1, 3, 2)], delimiter=";")
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"models": {"1": "trained", "2": "base"}}))
    return [anna, ben, key]


def test_sheets_of_two_raters_are_read_with_the_key(sheets_and_key: list[Path]) -> None:
    ratings = read_ratings(sheets_and_key[:2], sheets_and_key[2])
    assert [(rating.rater, rating.answer, rating.model, rating.scores["overall"]) for rating in ratings] == [
        ("anna", "1", "trained", 5), ("anna", "2", "base", 2), ("ben", "1", "trained", 4), ("ben", "2", "base", 2),
    ]  # fmt: skip
    summary = summarise(ratings)
    assert summary["scores"]["trained"]["overall"]["mean"] == 4.5 and summary["scores"]["base"]["coherence"]["count"] == 2
    assert summary["agreement"]["overall"] == {"alpha": pytest.approx(compute_alpha_by_ranks([[5, 4], [2, 2]]))}
    assert summary["agreement"]["coherence"] == {"alpha": None, "reason": "all scores are equal"}
    assert summary["winRate"]["rate"] == 1 and summary["winRate"]["wins"] == 2


def test_a_json_sheet_is_read_and_empty_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "sheet.json"
    path.write_text(json.dumps({"rows": [make_row(1, 1, "trained", 5, 4, 5, 5, rater="Zoe"), make_row(2, 2, "trained") | dict.fromkeys(SCORE_COLUMNS)]}))
    (rating,) = read_ratings([path], None)
    assert (rating.rater, rating.model, rating.scores) == ("Zoe", "trained", {"relevance": 5, "accuracy": 4, "coherence": 5, "overall": 5})


def list_mistakes(files: list[Path], key: Path | None = None) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_ratings(files, key)
    return [str(mistake) for mistake in caught.value.mistakes]


def test_every_invalid_score_is_named_with_file_line_and_column(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "a.csv", [make_row(1, 1, "A", 6, "good", 2.5, 0), make_row("", 1, "B", 3)])
    messages = [text.partition(": ")[2] for text in list_mistakes([path])]
    hint = "write a whole number from 1 to 5, or leave the cell empty"
    assert messages == [
        f"relevance: '6' is not a score; {hint}", f"accuracy: 'good' is not a score; {hint}", f"coherence: '2.5' is not a score; {hint}",
        f"overall: '0' is not a score; {hint}", "id: the cell is empty; restore the number of the row",
    ]  # fmt: skip
    # The first row takes two lines of the file, because its answer has two lines.
    assert [text.partition(": ")[0] for text in list_mistakes([path])] == [f"{path}:2"] * 4 + [f"{path}:4"]


def test_a_row_that_is_rated_twice_or_missing_in_the_key_is_refused(sheets_and_key: list[Path], tmp_path: Path) -> None:
    second_sheet = write_sheet(tmp_path / "again.csv", [make_row(1, 1, "A", 1, 1, 1, 1, rater="anna"), make_row(9, 3, "A", 1, 1, 1, 1, rater="anna")])
    messages = list_mistakes([sheets_and_key[0], second_sheet], sheets_and_key[2])
    assert "the key" in messages[0] and "does not contain the id '9'" in messages[0]
    assert f"anna has rated the row 1 already, at {sheets_and_key[0]}:2" in messages[1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,overall\n1,2\n", "the columns relevance, accuracy, coherence are missing"),
        ("a.csv", "", "this is not a rating sheet"),
        ("a.json", "{", "this is not valid JSON"),
        ("a.json", "[]", "the list of rows is missing"),
    ],
)
def test_another_file_is_not_a_sheet(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert message in list_mistakes([tmp_path / name])[0]


def test_another_file_is_not_a_key(sheets_and_key: list[Path]) -> None:
    sheets_and_key[2].write_text("{}")
    assert "this file does not name the model behind each answer of the rating sheets" in list_mistakes(sheets_and_key[:1], sheets_and_key[2])[0]


def test_the_command_prints_tables_and_json(run_command: RunCommand, sheets_and_key: list[Path]) -> None:
    files = [str(path) for path in sheets_and_key[:2]]
    code, text, _ = run_command("ratings", *files, "--key", str(sheets_and_key[2]))
    assert code == 0 and "2 answers, 2 raters: anna, ben" in text
    assert "trained  overall        2   4.50   4.50   0.71    4    5" in text
    assert "coherence  - (all scores are equal)" in text
    assert "win rate of the trained model: 1.00, 95 % interval 0.21 to 1.00, on 1 questions (2 wins, 0 ties, 0 losses)" in text
    code, text, _ = run_command("ratings", *files, "-o", "json")
    assert code == 0 and json.loads(text)["winRate"]["rate"] is None and json.loads(text)["scores"].keys() == {"A", "B"}
    empty_sheet = write_sheet(sheets_and_key[0].with_name("empty.csv"), [make_row(1, 1, "A")])
    code, text, errors = run_command("ratings", str(empty_sheet))
    assert code == 1 and "the sheets contain no scores" in errors
