"""Writing and reading the predictions file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.errors import DataError
from finetune_trainer.evaluation.predictions import Prediction, read_predictions, write_predictions

ROWS = [
    Prediction("Be brief.", "Capital of France?", "Paris", "Paris"),
    Prediction(None, "Two\nlines\u2028and a separator", 'ä "quoted" 🙂', None),
    Prediction(None, "half a pair: \ud83d", "", ""),
]


def test_predictions_are_json_lines_with_the_four_keys_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    write_predictions(path, ROWS)
    assert read_predictions(path) == ROWS
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines[0] == (
        '{"system_prompt": "Be brief.", "user_prompt": "Capital of France?", "assistant_response": "Paris", "ground_truth": "Paris"}'
    )
    assert "ä" in lines[1] and json.loads(lines[1])["system_prompt"] is None
    assert len(lines) == 4 and lines[3] == ""


def test_writing_again_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ROWS)
    write_predictions(path, ROWS[:1])
    assert read_predictions(path) == ROWS[:1]
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_failure_while_writing_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ROWS[:1])

    def yield_rows_until_a_failure():
        yield ROWS[1]
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        write_predictions(path, yield_rows_until_a_failure())
    assert read_predictions(path) == ROWS[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "predictions.jsonl, line 3 is not JSON"),
        ("[]", "line 3 must be an object with exactly the keys system_prompt, user_prompt, assistant_response, ground_truth"),
        ('{"question": "a"}', "line 3 must be an object with exactly the keys"),
        ('{"system_prompt": null, "user_prompt": null, "assistant_response": "", "ground_truth": null}', "line 3: user_prompt must be a text"),
        ('{"system_prompt": null, "user_prompt": "", "assistant_response": "", "ground_truth": 1}', "ground_truth must be a text or null"),
    ],
)  # fmt: skip
def test_the_error_names_the_invalid_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ROWS[:1])
    path.write_text(path.read_text("utf-8") + "\n" + line + "\n", "utf-8")
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert caught.value.code == "PredictionsInvalid" and message in str(caught.value)
