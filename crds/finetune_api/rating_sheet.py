"""File names, columns and scale of the sheets in which people rate answers. The trainer writes these sheets, and the command line reads them."""

from __future__ import annotations

JSON_FILE, CSV_FILE = "human_rating.json", "human_rating.csv"
KEY_FILE = "human_rating_key.json"
"""File that says which model wrote the answer in each row. The raters must not see this file."""
INSTRUCTIONS_FILE = "human_rating_instructions.txt"
SCORE_COLUMNS = ("relevance", "accuracy", "coherence", "overall")
"""Columns in which raters write a score."""
COLUMNS = ("id", "promptID", "model", "prompt", "response", *SCORE_COLUMNS, "rater", "comments")
LOWEST_SCORE, HIGHEST_SCORE = 1, 5
TRAINED_MODEL, BASE_MODEL = "trained", "base"
"""Names of the two models in KEY_FILE."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet executes a cell as a formula if it begins with one of these characters (https://owasp.org/www-community/attacks/CSV_Injection)."""


def to_plain_cell(text: str) -> str:
    """Return the text for a cell that spreadsheets never execute. Text that would be a formula gets an apostrophe in front."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA_STARTS) else text


INSTRUCTIONS = f"""How to rate the answers

Each row has a question (prompt) and an answer (response). Rate every answer on its own, \
with whole numbers from {LOWEST_SCORE} (worst) to {HIGHEST_SCORE} (best):

relevance   Does the answer address the question?
accuracy    Are its statements correct?
coherence   Is it clear, and is its language correct?
overall     How good is the answer as a whole?

Write your name or initials into the column rater. Comments are optional. Leave a score empty if you cannot judge it.
If a question occurs twice, its two answers are by different models, in a random order. Please do not try to find out which is which.

Save one file per rater. Then run: finetune ratings FILE... --key {KEY_FILE}
"""
