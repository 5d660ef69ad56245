"""The answers of a model to the rows of a test set, and the file that contains them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune_api.errors import DataError

from finetune_trainer.files import replace_file

PREDICTION_KEYS = ("system_prompt", "user_prompt", "assistant_response", "ground_truth")
"""The keys of a row in the predictions file, in this order."""


@dataclass(frozen=True)
class Prediction:
    """One prompt, the model's answer and, if the test set has one, the correct answer."""

    system_prompt: str | None
    user_prompt: str
    assistant_response: str
    ground_truth: str | None


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a JSON Lines file with one prediction per line and the keys of `PREDICTION_KEYS`. An existing file is replaced."""
    with replace_file(path) as partial_file, partial_file.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_format_line(prediction) for prediction in predictions)


def _format_line(prediction: Prediction) -> str:
    """Return one line of JSON. A row with an unpaired surrogate is written with escapes, because UTF-8 cannot encode the surrogate."""
    line = json.dumps(asdict(prediction), ensure_ascii=False) + "\n"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(asdict(prediction)) + "\n"
    return line


def read_predictions(path: Path) -> list[Prediction]:
    """Read the file of `write_predictions`. Blank lines are ignored. Errors: DataError PredictionsInvalid with the line number."""
    predictions = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                predictions.append(_parse_line(line, f"{path.name}, line {number}"))
    return predictions


def _parse_line(line: str, location: str) -> Prediction:
    """Return the prediction of one line of JSON. `location`: file and line for messages. Errors: DataError PredictionsInvalid."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError("PredictionsInvalid", f"{location} is not JSON: {error}") from None
    if not isinstance(row, dict) or set(row) != set(PREDICTION_KEYS):
        raise DataError("PredictionsInvalid", f"{location} must be an object with exactly the keys {', '.join(PREDICTION_KEYS)}")
    nullable_keys = {"system_prompt", "ground_truth"}
    for name in PREDICTION_KEYS:
        if not isinstance(row[name], str) and not (name in nullable_keys and row[name] is None):
            raise DataError("PredictionsInvalid", f"{location}: {name} must be a text{' or null' if name in nullable_keys else ''}")
    return Prediction(**row)


def rows_with_reference(predictions: Sequence[Prediction]) -> list[int]:
    """Return the indices of the rows that have a correct answer."""
    return [index for index, prediction in enumerate(predictions) if prediction.ground_truth is not None]
