"""Loss, perplexity, accuracy, precision, recall and F1 over the tokens that a model predicts.

The metrics are computed from sums over tokens. The sums of several batches and ranks can be added up, and their size depends only on the
size of the vocabulary. Logits are computed for a few positions at a time, because the logits of a whole evaluation set would not fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainer.evaluation.values import MetricValue

TokenArray = NDArray[Any]
IGNORED_LABEL = -100
"""Label of a position that does not count, such as a prompt token or padding."""
LOGITS_PER_CHUNK = 1 << 25
"""Maximum number of logits in memory at a time: 128 MiB in float32."""
NO_TOKENS_REASON = "no token of the evaluation set counts: all labels are masked"


@dataclass(frozen=True)
class OutputHead:
    """The head of a causal language model, which computes logits from hidden states.

    The output of its layer is multiplied by `scale`. With a `softcap`, the product is then limited to ±`softcap`: `softcap * tanh(logits / softcap)`.
    """

    project: Callable[[Tensor], Tensor]
    """The output layer of the model as a function, including its bias. It maps the shape (positions, hidden size) to (positions, vocabulary size)."""
    vocabulary_size: int
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> OutputHead:
        """Return the head of a transformers model. This rank must hold the complete weights of the head, not a shard."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        vocabulary_size = getattr(layer, "out_features", None) or layer.weight.shape[0]
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer, int(vocabulary_size), _read_logit_scale(config), None if softcap is None else float(softcap))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return float32 logits, shape (positions, vocabulary size)."""
        logits = self.project(hidden_states).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _read_logit_scale(config: Any) -> float:
    """Return the factor by which the model multiplies the logits. The name of this factor in the configuration depends on the architecture.

    Cohere: `logit_scale`. Muse Glimmer: `output_multiplier`. Falcon-H1: `lm_head_multiplier`. Granite and MiniCPM3 divide by
    `logits_scaling`; HyperCLOVA X multiplies by it.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)


@dataclass(frozen=True)
class TokenPredictions:
    """The predictions at the counted positions of a batch, as three tensors of equal length."""

    predicted: Tensor
    """The most likely token at each position."""
    labels: Tensor
    """The correct token at each position."""
    negative_log_likelihoods: Tensor
    """-log p(label) in nats, float32."""


@torch.no_grad()
def shifted_predictions(
    hidden_states: Tensor, labels: Tensor, head: OutputHead, *, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> TokenPredictions:
    """Return prediction, label and negative log-likelihood for each token that counts.

    `hidden_states`: the output of the last layer before the head, shape (batch, length, hidden size). `labels`: shape (batch, length), not
    shifted: the hidden state at position i predicts the label at position i + 1. Tokens with the label -100 do not count.
    """
    targets = labels[:, 1:]
    is_counted = targets != IGNORED_LABEL
    counted_states, targets = hidden_states[:, :-1][is_counted.to(hidden_states.device)], targets[is_counted].to(hidden_states.device)
    predicted = torch.empty_like(targets)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden_states.device)
    chunk_size = max(1, logits_per_chunk // head.vocabulary_size)
    for start in range(0, len(targets), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = head.logits(counted_states[chunk])
        predicted[chunk] = logits.argmax(dim=-1)
        losses[chunk] = logits.logsumexp(dim=-1) - logits.gather(-1, targets[chunk, None]).squeeze(-1)
    return TokenPredictions(predicted, targets, losses)


class TokenCounts:
    """Sums over the counted tokens of an evaluation set, and the metrics that follow from the sums.

    The sums are three vectors with one count for each token of the vocabulary, and the sum of the negative log-likelihoods. The sums stay on
    `device`, so that adding a batch does not wait for a GPU.
    """

    def __init__(self, vocabulary_size: int, device: torch.device | str = "cpu") -> None:
        self.label_counts, self.predicted_counts, self.correct_counts = (
            torch.zeros(vocabulary_size, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, batch: TokenPredictions) -> None:
        """Add the counted positions of one batch."""
        device = self.loss_sum.device
        labels, predicted = batch.labels.to(device).long(), batch.predicted.to(device).long()
        ones = torch.ones_like(labels)
        self.label_counts.index_add_(0, labels, ones)
        self.predicted_counts.index_add_(0, predicted, ones)
        self.correct_counts.index_add_(0, labels, (labels == predicted).long())
        self.loss_sum += batch.negative_log_likelihoods.to(device, torch.float64).sum()

    def merge(self, other: TokenCounts) -> None:
        """Add the sums of another part of the evaluation set."""
        for own_sum, other_sum in zip(self._sums(), other._sums(), strict=True):
            own_sum += other_sum.to(own_sum.device)

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replace each sum with `add_up(sum)`, for example the sum over all ranks. If `add_up` is a collective, all ranks must call this method."""
        self.label_counts, self.predicted_counts, self.correct_counts, self.loss_sum = map(add_up, self._sums())

    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.label_counts, self.predicted_counts, self.correct_counts, self.loss_sum

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return int(self.label_counts.sum())

    @property
    def loss(self) -> MetricValue:
        """Mean negative log-likelihood per counted token in nats."""
        if not self.tokens:
            return MetricValue.missing(NO_TOKENS_REASON)
        loss = float(self.loss_sum) / self.tokens
        if not math.isfinite(loss):
            return MetricValue.missing(f"the loss is not finite ({loss}): the model assigns probability 0 to a token, or its output is NaN")
        return MetricValue(loss)

    @property
    def perplexity(self) -> MetricValue:
        """The exponential of the loss, which is a mean over all tokens. The perplexity is not a mean of the perplexities of batches."""
        loss = self.loss
        if loss.value is None:
            return loss
        try:
            return MetricValue(math.exp(loss.value))
        except OverflowError:
            return MetricValue.missing(f"the perplexity is too large for a floating-point number: the loss is {loss.value:.1f} nats per token")

    @property
    def accuracy(self) -> MetricValue:
        """Share of counted tokens that the model predicts correctly."""
        return self._share(lambda: float(self.correct_counts.sum()))

    @property
    def precision(self) -> MetricValue:
        """Weighted precision: the mean precision of the vocabulary's tokens. The weight of a token is its number of labels.

        The definition is scikit-learn's `precision_score(average="weighted", zero_division=0)`, so a token that the model never
        predicts has precision 0.
        """
        return self._share(lambda: self._weighted_sum(self.correct_counts, self.predicted_counts))

    @property
    def recall(self) -> MetricValue:
        """Weighted recall, defined as scikit-learn's `recall_score(average="weighted")`. The weighted recall always equals the accuracy."""
        return self._share(lambda: self._weighted_sum(self.correct_counts, self.label_counts))

    @property
    def f1(self) -> MetricValue:
        """Weighted F1, defined as scikit-learn's `f1_score(average="weighted", zero_division=0)`.

        The F1 of a token is 2 * correct predictions / (labels + predictions).
        """
        return self._share(lambda: self._weighted_sum(2 * self.correct_counts, self.label_counts + self.predicted_counts))

    def _weighted_sum(self, numerators: Tensor, denominators: Tensor) -> float:
        """Return the sum over all token ids of numerator / denominator, weighted with the number of labels of the id. 0/0 counts as 0."""
        ratios = numerators.double() / denominators.clamp(min=1).double()
        return float((ratios * self.label_counts).sum())

    def _share(self, weighted_sum: Callable[[], float]) -> MetricValue:
        """Return `weighted_sum()` divided by the number of counted tokens. `weighted_sum` is not called if no tokens are counted."""
        return MetricValue(weighted_sum() / self.tokens) if self.tokens else MetricValue.missing(NO_TOKENS_REASON)


class RowCounts:
    """The sums `TOKEN_SUMS` of each row of an evaluation set, for the comparison of two models on the same rows.

    The counted tokens of all rows stay in memory (8 bytes each), because a row's shares of precision and F1 depend on all rows.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[float, int, int]] = []
        self._labels: list[TokenArray] = []
        self._predicted: list[TokenArray] = []

    def add(self, batch: TokenPredictions, labels: Sequence[Sequence[int]]) -> None:
        """Add the predictions for a batch. `labels`: the labels of the batch's rows, not shifted and without padding."""
        row_lengths = [sum(label != IGNORED_LABEL for label in row[1:]) for row in labels]
        split_tensors = (tensor.cpu().split(row_lengths) for tensor in (batch.predicted, batch.labels, batch.negative_log_likelihoods.double()))
        for predicted, correct, losses in zip(*split_tensors, strict=True):
            self._sums.append((float(losses.sum()), len(correct), int((predicted == correct).sum())))
            self._labels.append(correct.int().numpy())
            self._predicted.append(predicted.int().numpy())

    def sums(self) -> list[list[float]]:
        """Return the sums `TOKEN_SUMS` of each row; an empty list if no tokens are counted."""
        if not any(tokens for _, tokens, _ in self._sums):
            return []
        row_lengths = [len(row) for row in self._labels]
        shares = zip(*row_shares(np.concatenate(self._labels), np.concatenate(self._predicted), row_lengths), strict=True)
        return [[*map(float, sums), *share] for sums, share in zip(self._sums, shares, strict=True)]


TOKEN_SUMS = ("negative log-likelihood", "tokens", "correct tokens", "share of the precision", "share of the F1")
"""The values of each row in `RowCounts.sums`. The mean of the rows' shares of the precision is the weighted precision. The same holds for the F1."""


def row_shares(labels: TokenArray, predicted: TokenArray, row_lengths: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return each row's share of the weighted precision, and of the weighted F1.

    `labels`, `predicted`: the tokens of all rows, one row after the other. `row_lengths`: the number of tokens of each row.
    A bootstrap of these metrics would need several sums for each token of the vocabulary. These would be too many sums, so the bootstrap uses the
    shares instead. A share is the metric plus the number of rows times the linear contribution of the row: the pseudo-value of the infinitesimal
    jackknife (Jaeckel 1972). The mean of the shares is the metric itself, because the metric does not change if all counts are multiplied by the same
    number.
    """
    vocabulary_size = int(max(labels.max(), predicted.max())) + 1
    token_count, is_correct = len(labels), labels == predicted
    label_counts, predicted_counts, correct_counts = (
        np.bincount(tokens, minlength=vocabulary_size).astype(np.float64) for tokens in (labels, predicted, labels[is_correct])
    )
    shares = []
    for divisor, factor, divisor_has_labels in ((predicted_counts, 1.0, False), (label_counts + predicted_counts, 2.0, True)):
        scores = np.divide(factor * correct_counts, divisor, out=np.zeros(vocabulary_size), where=divisor > 0)
        slopes = np.divide(label_counts, divisor, out=np.zeros(vocabulary_size), where=divisor > 0)
        metric_value = float((label_counts * scores).sum()) / token_count
        contribution_by_choice = -slopes * scores
        contribution_by_label = scores - metric_value + (contribution_by_choice if divisor_has_labels else 0.0)
        token_contributions = contribution_by_label[labels] + contribution_by_choice[predicted] + np.where(is_correct, factor * slopes[labels], 0.0)
        row_ends = np.cumsum([0, *row_lengths])
        cumulative_contributions = np.concatenate([[0.0], np.cumsum(token_contributions)])[row_ends]
        shares.append((metric_value + len(row_lengths) * np.diff(cumulative_contributions) / token_count).tolist())
    return shares[0], shares[1]
