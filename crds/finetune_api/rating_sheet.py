"""The sheets in which people rate answers: file names, columns and scale. The trainer writes them, the command line reads them."""

from __future__ import annotations

JSON_FILE, CSV_FILE = "human_rating.json", "human_rating.csv"
KEY_FILE = "human_rating_key.json"
"""File that names the model of each row. People who rate must not see this file."""
INSTRUCTIONS_FILE = "human_rating_instructions.txt"
SCORES = ("relevance", "accuracy", "coherence", "overall")
"""Columns that people fill in."""
COLUMNS = ("id", "promptID", "model", "prompt", "response", *SCORES, "rater", "comments")
LOWEST, HIGHEST = 1, 5
TRAINED, BASE = "trained", "base"
"""Names of the models in the key."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet executes a cell as a formula if it begins with one of these characters (https://owasp.org/www-community/attacks/CSV_Injection)."""


def as_plain_cell(text: str) -> str:
    """Return a text that spreadsheets show unchanged. If the text would be a formula, an apostrophe is put in front."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA_STARTS) else text


INSTRUCTIONS = f"""How to rate the answers

Each row has a question (prompt) and an answer (response). Rate every answer on its own, with whole numbers from {LOWEST} (worst) to {HIGHEST} (best):

relevance   Does the answer address the question?
accuracy    Are its statements correct?
coherence   Is it clear, and is its language correct?
overall     How good is the answer as a whole?

Write your name or initials into the column rater. Comments are optional. Leave a score empty if you cannot judge it.
If a question occurs twice, its two answers are by different models, in a random order. Please do not try to find out which is which.

Save one file per rater. Then run: finetune ratings FILE... --key {KEY_FILE}
"""
