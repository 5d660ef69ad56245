"""Reads rating sheets that people have filled in, and computes their statistics."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from finetune_api.rating_sheet import BASE_MODEL, HIGHEST_SCORE, LOWEST_SCORE, SCORE_COLUMNS, TRAINED_MODEL

from finetune_cli.files import display_name, read_text
from finetune_cli.mistakes import InvalidInput, Mistake

SCORE_HINT = f"write a whole number from {LOWEST_SCORE} to {HIGHEST_SCORE}, or leave the cell empty"
Z_95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Rating:
    """The scores that one rater has given to one answer."""

    answer: str
    """ID of the answer: column `id` of the sheet."""
    question: str
    """ID of the question: column `promptID` of the sheet."""
    model: str
    rater: str
    scores: Mapping[str, int]
    location: str


# ---- reading ----


def read_ratings(files: Sequence[Path], key_file: Path | None) -> list[Rating]:
    """Read all sheets. With a key file, each rating names the model that gave the answer. Raises UnreadableFile, or InvalidInput with every mistake."""
    mistakes: list[Mistake] = []
    model_by_answer = _read_key(key_file) if key_file else {}
    ratings = [rating for file in files for rating in _read_sheet(file, mistakes)]
    if key_file:
        for rating in ratings:
            if rating.answer not in model_by_answer:
                problem = f"the key {display_name(key_file)} does not contain the id {rating.answer!r}"
                mistakes.append(Mistake(rating.location, "id", problem, "give the human_rating_key.json that was written with these sheets"))
        ratings = [replace(rating, model=model_by_answer.get(rating.answer, rating.model)) for rating in ratings]
    location_by_rater_and_answer: dict[tuple[str, str], str] = {}
    for rating in ratings:
        if (first_location := location_by_rater_and_answer.setdefault((rating.rater, rating.answer), rating.location)) is not rating.location:
            problem = f"{rating.rater} has rated the row {rating.answer} already, at {first_location}"
            mistakes.append(Mistake(rating.location, "id", problem, "give each sheet once, and write a different name for each rater"))
    if mistakes:
        raise InvalidInput(mistakes)
    return [rating for rating in ratings if rating.scores]


def _read_key(path: Path) -> dict[str, str]:
    content = _parse_json(path)
    model_by_answer = content.get("models") if isinstance(content, dict) else None
    if not isinstance(model_by_answer, dict) or not all(model in (TRAINED_MODEL, BASE_MODEL) for model in model_by_answer.values()):
        problem = "this file does not name the model behind each answer of the rating sheets"
        raise InvalidInput([Mistake(display_name(path), "models", problem, "give the file human_rating_key.json")])
    return model_by_answer


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise InvalidInput([Mistake(display_name(path), "", f"this is not valid JSON: {error}")]) from error


def _read_sheet(path: Path, mistakes: list[Mistake]) -> list[Rating]:
    rows = _read_json_rows(path) if path.suffix.lower() == ".json" else _read_csv_rows(path)
    raters = {str(row.get("rater") or "").strip() for _, row in rows} - {""}
    ratings = []
    for location, row in rows:
        if not str(row.get("id") or "").strip():
            mistakes.append(Mistake(location, "id", "the cell is empty", "restore the number of the row"))
            continue
        rater = str(row.get("rater") or "").strip() or (next(iter(raters)) if len(raters) == 1 else path.stem)
        scores = _read_scores(location, row, mistakes)
        answer, model = str(row["id"]).strip(), str(row.get("model") or "").strip()
        ratings.append(Rating(answer, str(row.get("promptID") or answer).strip(), model, rater, scores, location))
    return ratings


def _read_json_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    content = _parse_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInput([Mistake(display_name(path), "rows", "this is not a rating sheet: the list of rows is missing")])
    return [(f"{display_name(path)}: row {row_number}", row) for row_number, row in enumerate(rows, 1)]


def _read_csv_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each row with its location. Columns are separated by commas, or by semicolons or tabs, which some spreadsheet programs write."""
    text = read_text(path)
    header_line = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header_line.count))
    missing_columns = [name for name in ("id", *SCORE_COLUMNS) if name not in (reader.fieldnames or [])]
    if missing_columns:
        problem = f"this is not a rating sheet: the columns {', '.join(missing_columns)} are missing"
        raise InvalidInput([Mistake(f"{display_name(path)}:1", "", problem, "keep the first line of the sheet")])
    rows_with_location, line_number = [], reader.line_num + 1
    for row in reader:
        rows_with_location.append((f"{display_name(path)}:{line_number}", row))
        line_number = reader.line_num + 1
    return rows_with_location


def _read_scores(location: str, row: Mapping[str, Any], mistakes: list[Mistake]) -> dict[str, int]:
    scores = {}
    for name in SCORE_COLUMNS:
        value = row.get(name)
        if value is None or str(value).strip() == "":
            continue
        try:
            score = float(str(value).strip())
        except ValueError:
            score = math.nan
        if isinstance(value, bool) or not LOWEST_SCORE <= score <= HIGHEST_SCORE or score != int(score):
            mistakes.append(Mistake(location, name, f"{str(value)[:40]!r} is not a score", SCORE_HINT))
        else:
            scores[name] = int(score)
    return scores


# ---- statistics ----


def summarise(ratings: Sequence[Rating]) -> dict[str, Any]:
    """Return the statistics of each score for each model, the agreement of the raters, and the win rate of the trained model."""
    raters = sorted({rating.rater for rating in ratings})
    models = sorted({rating.model for rating in ratings}, key=lambda name: (name != TRAINED_MODEL, name))
    return {
        "raters": raters,
        "answers": len({rating.answer for rating in ratings}),
        "scores": {
            model: {
                name: describe_values([rating.scores[name] for rating in ratings if rating.model == model and name in rating.scores])
                for name in SCORE_COLUMNS
            }
            for model in models
        },
        "agreement": {name: _compute_agreement(ratings, name) for name in SCORE_COLUMNS},
        "winRate": compute_win_rate(ratings),
    }


def describe_values(values: Sequence[int]) -> dict[str, float | int | None]:
    """Return count, mean, median, sample standard deviation, smallest and largest value."""
    if not values:
        return {"count": 0, "mean": None, "median": None, "std": None, "min": None, "max": None}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "count": len(values), "mean": statistics.fmean(values), "median": statistics.median(values), "std": deviation, "min": min(values), "max": max(values),
    }  # fmt: skip


def _compute_agreement(ratings: Iterable[Rating], score_name: str) -> dict[str, Any]:
    scores_by_answer: dict[str, list[int]] = defaultdict(list)
    for rating in ratings:
        if score_name in rating.scores:
            scores_by_answer[rating.answer].append(rating.scores[score_name])
    alpha = compute_krippendorff_alpha(list(scores_by_answer.values()))
    if alpha is not None:
        return {"alpha": alpha}
    has_answer_with_two_scores = any(len(scores) > 1 for scores in scores_by_answer.values())
    return {"alpha": None, "reason": "all scores are equal" if has_answer_with_two_scores else "no answer has scores by two raters"}


def compute_krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
    """Return Krippendorff's alpha for ordinal scores: 1 is perfect agreement, 0 is the agreement expected by chance.

    `units` holds the scores of each answer.

    alpha = 1 - observed / expected disagreement. Answers with one score are left out. The distance of two scores c < k is the
    square of n_c/2 + n_(c+1) + ... + n_(k-1) + n_k/2, where n are the counts of the scores (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability", section D). None if all scores are equal, or if no answer has two scores.
    """
    paired_units = [unit for unit in units if len(unit) > 1]
    count_by_score: dict[int, int] = defaultdict(int)
    for unit in paired_units:
        for score in unit:
            count_by_score[score] += 1
    score_count = sum(count_by_score.values())

    def compute_distance(first_score: int, second_score: int) -> float:
        low, high = min(first_score, second_score), max(first_score, second_score)
        score_count_between = sum(count for score, count in count_by_score.items() if low <= score <= high)
        return (score_count_between - (count_by_score[low] + count_by_score[high]) / 2) ** 2

    expected_disagreement = sum(
        count_by_score[first] * count_by_score[second] * compute_distance(first, second) for first, second in product(list(count_by_score), repeat=2)
    )
    if expected_disagreement == 0:
        return None
    observed_disagreement = sum(
        compute_distance(first, second) / (len(unit) - 1) for unit in paired_units for first, second in product(unit, repeat=2)
    )
    return 1 - (score_count - 1) * observed_disagreement / expected_disagreement


def compute_win_rate(ratings: Iterable[Rating]) -> dict[str, Any]:
    """Return how often raters give the trained model's answer a higher `overall` score than the base model's answer to the same question.

    A tie counts one half. The rate of a question is the mean over its raters, and the win rate is the mean over the questions. The 95 %
    interval is Wilson's score interval (Wilson 1927) with the number of questions, because ratings of the same question are not independent.
    """
    scores_by_question_and_rater: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for rating in ratings:
        if "overall" in rating.scores:
            scores_by_question_and_rater[rating.question, rating.rater][rating.model] = rating.scores["overall"]
    outcomes_by_question: dict[str, list[float]] = defaultdict(list)
    win_count = tie_count = loss_count = 0
    for (question, _), scores in scores_by_question_and_rater.items():
        if TRAINED_MODEL not in scores or BASE_MODEL not in scores:
            continue
        difference = scores[TRAINED_MODEL] - scores[BASE_MODEL]
        win_count, tie_count, loss_count = win_count + (difference > 0), tie_count + (difference == 0), loss_count + (difference < 0)
        outcomes_by_question[question].append(0.5 if difference == 0 else float(difference > 0))
    if not outcomes_by_question:
        return {"rate": None, "reason": "no rater has given both answers to a question an `overall` score, or --key is missing"}
    win_rate = statistics.fmean(statistics.fmean(outcomes) for outcomes in outcomes_by_question.values())
    low, high = compute_wilson_interval(win_rate, len(outcomes_by_question))
    return {"rate": win_rate, "low": low, "high": high, "questions": len(outcomes_by_question), "wins": win_count, "ties": tie_count, "losses": loss_count}


def compute_wilson_interval(rate: float, question_count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a rate."""
    scale = 1 + Z_95**2 / question_count
    center = (rate + Z_95**2 / (2 * question_count)) / scale
    half_width = Z_95 / scale * math.sqrt(rate * (1 - rate) / question_count + Z_95**2 / (4 * question_count**2))
    return max(0.0, center - half_width), min(1.0, center + half_width)
