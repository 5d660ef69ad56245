"""Metrics of multiple-choice rows, computed from the option letters that the model chooses.

Token metrics say little about multiple choice, because most tokens of an answer do not affect the choice. In these metrics, the
model's choice is the option letter with the highest log-probability.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from finetune_api.errors import DataError

from finetune_trainer.evaluation.values import MetricValue, mean_of_rows

NO_ROWS_REASON = "the evaluation set has no multiple-choice rows"


@torch.inference_mode()
def letter_log_probabilities(
    model: Any, tokenizer: Any, prompt: str, letters: Sequence[str], *, add_special_tokens: bool = False
) -> dict[str, float]:
    """Return log p(letter | prompt) in nats for each option letter of one row.

    `letters` are the texts that follow the prompt, in the row's order, for example `A` or ` A`. If a letter has several tokens, their
    log-probabilities are added up. A tokenizer may merge the letter with the end of the prompt, for example `: ` and `A` into `:` and
    ` A`. So the function tokenises prompt and letter together. The function scores only the tokens after the longest beginning that the prompt and
    all options share, so that all options are scored after the same tokens.

    `add_special_tokens`: false for prompts from a chat template, because the template already contains the special tokens.
    Errors: DataError ChoicePromptEmpty if no token is left in front of the letters.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    prompt_tokens, option_tokens = encode(prompt), [encode(prompt + letter) for letter in letters]
    shared_length = min(_count_common_tokens(prompt_tokens, tokens_of_option) for tokens_of_option in option_tokens)
    shared_length = min(shared_length, min(map(len, option_tokens)) - 1)  # Leave at least one token of each option to score.
    if shared_length < 1:
        raise DataError("ChoicePromptEmpty", "a multiple-choice row has no token in front of its option letters")
    suffixes = [tokens_of_option[shared_length:] for tokens_of_option in option_tokens]
    longest_suffix_length = max(map(len, suffixes))
    device = model.get_input_embeddings().weight.device
    if longest_suffix_length == 1:  # one forward pass over the prompt is enough to score all options
        log_probabilities = _compute_last_log_probabilities(model, torch.tensor([prompt_tokens[:shared_length]], device=device), 1)[0, 0]
        return {letter: float(log_probabilities[tokens[0]]) for letter, tokens in zip(letters, suffixes, strict=True)}
    # The last token of an option is not an input, because nothing is predicted from it. Padding after an option does not change earlier scores.
    inputs = [prompt_tokens[:shared_length] + (tokens + [0] * (longest_suffix_length - len(tokens)))[:-1] for tokens in suffixes]
    log_probabilities = _compute_last_log_probabilities(model, torch.tensor(inputs, device=device), longest_suffix_length)
    return {
        letter: math.fsum(float(log_probabilities[row, position, token]) for position, token in enumerate(tokens))
        for row, (letter, tokens) in enumerate(zip(letters, suffixes, strict=True))
    }


def _count_common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of two sequences."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(first), len(second)))


def _compute_last_log_probabilities(model: Any, tokens: torch.Tensor, position_count: int) -> torch.Tensor:
    """Return float32 log-probabilities at the last `position_count` positions: shape (rows, positions, vocabulary size)."""
    forward_options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    base_model = getattr(model, "get_base_model", lambda: model)()
    if "logits_to_keep" in inspect.signature(base_model.forward).parameters:  # avoids the computation of the prompt's logits
        forward_options["logits_to_keep"] = position_count
    logits = model(input_ids=tokens, **forward_options).logits[:, -position_count:]
    return logits.float().log_softmax(dim=-1)


def chosen_letter(log_probabilities: Mapping[str, float]) -> str:
    """Return the letter with the highest log-probability; among letters with equal log-probabilities, the first one in the row."""
    return max(log_probabilities, key=log_probabilities.__getitem__)


def letter_metrics(rows: Sequence[Mapping[str, float]], correct_letters: Sequence[str]) -> dict[str, MetricValue]:
    """Return `accuracy`, `precision`, `recall` and `f1` of the chosen letters.

    `rows`: for each row, the log-probability of each option letter, in the row's order. Precision, recall and F1 are scikit-learn's macro
    averages with zero_division=0: the plain mean over all letters that are correct or chosen in at least one row. Only the
    accuracy has scores of single rows: 1 or 0. Errors: DataError ChoiceUnknown if a correct letter is not one of the row's options.
    """
    for number, (row, correct_letter) in enumerate(zip(rows, correct_letters, strict=True), start=1):
        if correct_letter not in row:
            raise DataError("ChoiceUnknown", f"multiple-choice row {number}: the correct letter {correct_letter!r} is not one of {', '.join(row)}")
    metric_names = ("accuracy", "precision", "recall", "f1")
    if not rows:
        return dict.fromkeys(metric_names, MetricValue.missing(NO_ROWS_REASON))
    undecided_row_numbers = [number for number, row in enumerate(rows, start=1) if any(math.isnan(score) for score in row.values())]
    if undecided_row_numbers:
        reason = f"the model's output is NaN in {len(undecided_row_numbers)} of {len(rows)} multiple-choice rows (first: row {undecided_row_numbers[0]})"
        return dict.fromkeys(metric_names, MetricValue.missing(reason))
    pairs = [(chosen_letter(row), correct_letter) for row, correct_letter in zip(rows, correct_letters, strict=True)]
    precisions, recalls, f1_scores = [], [], []
    for letter in sorted({letter for pair in pairs for letter in pair}):
        hit_count = sum(pair == (letter, letter) for pair in pairs)
        chosen_count = sum(letter_choice == letter for letter_choice, _ in pairs)
        correct_count = sum(correct_letter == letter for _, correct_letter in pairs)
        precisions.append(hit_count / chosen_count if chosen_count else 0.0)
        recalls.append(hit_count / correct_count if correct_count else 0.0)
        f1_scores.append(2 * hit_count / (chosen_count + correct_count))
    macro_averages = (MetricValue(math.fsum(scores) / len(scores)) for scores in (precisions, recalls, f1_scores))
    accuracy = mean_of_rows([float(letter_choice == correct_letter) for letter_choice, correct_letter in pairs], {})
    return dict(zip(metric_names, (accuracy, *macro_averages), strict=True))
