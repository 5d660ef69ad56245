"""Loss, perplexity, accuracy, precision, recall and F1 over the tokens that a model predicts.

The metrics are computed from sums. The sums of several batches and ranks can be added up, and their size depends only on the
vocabulary. Logits are computed for a few positions at a time, because the logits of a whole evaluation set would not fit into memory.
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

Numbers = NDArray[Any]
IGNORED_LABEL = -100
"""Label of a position that does not count: a prompt token or padding."""
LOGITS_PER_CHUNK = 1 << 25
"""Maximum number of logits that are in memory at the same time: 128 MiB in float32."""
NO_TOKENS = "no token of the evaluation set counts: all labels are masked"


@dataclass(frozen=True)
class OutputHead:
    """The last layer of a causal language model: from hidden states to logits.

    The model multiplies the layer's output by `scale` and then limits it to ±`softcap` by `softcap * tanh(logits / softcap)`.
    """

    project: Callable[[Tensor], Tensor]
    """The output layer, including its bias: shape (positions, hidden size) -> (positions, vocabulary size)."""
    vocabulary_size: int
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> OutputHead:
        """Return the head of a transformers model. The weights of the head must be complete on this rank, not sharded."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        size = getattr(layer, "out_features", None) or layer.weight.shape[0]
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer, int(size), _logit_scale(config), None if softcap is None else float(softcap))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits, shape (positions, vocabulary size)."""
        logits = self.project(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _logit_scale(config: Any) -> float:
    """Return the factor of the logits. Its name depends on the architecture.

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
    """The counted positions of a batch, as three tensors of equal length."""

    predicted: Tensor
    """Most likely token of each position."""
    labels: Tensor
    """Correct token of each position."""
    negative_log_likelihoods: Tensor
    """-log p(label) in nats, float32."""


@torch.no_grad()
def shifted_predictions(
    hidden: Tensor, labels: Tensor, head: OutputHead, *, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> TokenPredictions:
    """Return prediction, label and negative log-likelihood of each position whose next token counts.

    `hidden` has shape (batch, length, hidden size) and is the output of the last layer before the head. `labels` has shape
    (batch, length) and is not shifted: the hidden state at position i predicts the label at position i + 1. Positions with the
    label -100 do not count.
    """
    targets = labels[:, 1:]
    is_counted = targets != IGNORED_LABEL
    states, targets = hidden[:, :-1][is_counted.to(hidden.device)], targets[is_counted].to(hidden.device)
    predicted = torch.empty_like(targets)
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    chunk = max(1, logits_per_chunk // head.vocabulary_size)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logits = head.logits(states[part])
        predicted[part] = logits.argmax(dim=-1)
        losses[part] = logits.logsumexp(dim=-1) - logits.gather(-1, targets[part, None]).squeeze(-1)
    return TokenPredictions(predicted, targets, losses)


class TokenCounts:
    """Sums over the counted tokens of an evaluation set, and the metrics that follow from them.

    The sums are three vectors with one count per token of the vocabulary and the sum of the negative log-likelihoods. They stay on
    `device`; adding a batch does not wait for a GPU.
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
        one = torch.ones_like(labels)
        self.label_counts.index_add_(0, labels, one)
        self.predicted_counts.index_add_(0, predicted, one)
        self.correct_counts.index_add_(0, labels, (labels == predicted).long())
        self.loss_sum += batch.negative_log_likelihoods.to(device, torch.float64).sum()

    def merge(self, other: TokenCounts) -> None:
        """Add the sums of another part of the evaluation set."""
        for own, others in zip(self._sums(), other._sums(), strict=True):
            own += others.to(own.device)

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replace each sum by `add_up(sum)`, for example the sum over all ranks. All ranks must call it."""
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
            return MetricValue.missing(NO_TOKENS)
        loss = float(self.loss_sum) / self.tokens
        if not math.isfinite(loss):
            return MetricValue.missing(f"the loss is not finite ({loss}): the model assigns probability 0 to a token, or its output is NaN")
        return MetricValue(loss)

    @property
    def perplexity(self) -> MetricValue:
        """exp(loss): the exponential of the mean over tokens, not a mean of the perplexities of batches."""
        loss = self.loss
        if loss.value is None:
            return loss
        try:
            return MetricValue(math.exp(loss.value))
        except OverflowError:
            return MetricValue.missing(f"the perplexity is too large for a floating-point number: the loss is {loss.value:.1f} nats per token")

    @property
    def accuracy(self) -> MetricValue:
        """Share of counted tokens that the model predicts."""
        return self._share(lambda: float(self.correct_counts.sum()))

    @property
    def precision(self) -> MetricValue:
        """Weighted precision: the mean of the tokens' precisions, each weighted with its number of labels.

        The definition is scikit-learn's `precision_score(average="weighted", zero_division=0)`: a token that the model never
        predicts has precision 0.
        """
        return self._share(lambda: self._weighted_sum(self.correct_counts, self.predicted_counts))

    @property
    def recall(self) -> MetricValue:
        """Weighted recall, as scikit-learn's `recall_score(average="weighted")`. It always equals the accuracy."""
        return self._share(lambda: self._weighted_sum(self.correct_counts, self.label_counts))

    @property
    def f1(self) -> MetricValue:
        """Weighted F1, as scikit-learn's `f1_score(average="weighted", zero_division=0)`: per token 2 TP / (labels + predictions)."""
        return self._share(lambda: self._weighted_sum(2 * self.correct_counts, self.label_counts + self.predicted_counts))

    def _weighted_sum(self, numerators: Tensor, denominators: Tensor) -> float:
        """Return the sum of numerator / denominator over all token ids. Each id is weighted with the number of labels that have it.

        0/0 counts as 0.
        """
        ratios = numerators.double() / denominators.clamp(min=1).double()
        return float((ratios * self.label_counts).sum())

    def _share(self, weighted_sum: Callable[[], float]) -> MetricValue:
        """Return a sum over tokens divided by the number of tokens."""
        return MetricValue(weighted_sum() / self.tokens) if self.tokens else MetricValue.missing(NO_TOKENS)


class RowCounts:
    """The same sums for each row of an evaluation set, for the comparison of two models on the same rows.

    The tokens of all rows stay in memory, 8 bytes for each counted token, because the shares of precision and F1 follow from the totals.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[float, int, int]] = []
        self._labels: list[Numbers] = []
        self._predicted: list[Numbers] = []

    def add(self, batch: TokenPredictions, labels: Sequence[Sequence[int]]) -> None:
        """Add the predictions for a batch. `labels` are the labels of its rows, not shifted and without padding."""
        sizes = [sum(label != IGNORED_LABEL for label in row[1:]) for row in labels]
        parts = (tensor.cpu().split(sizes) for tensor in (batch.predicted, batch.labels, batch.negative_log_likelihoods.double()))
        for predicted, correct, losses in zip(*parts, strict=True):
            self._sums.append((float(losses.sum()), len(correct), int((predicted == correct).sum())))
            self._labels.append(correct.int().numpy())
            self._predicted.append(predicted.int().numpy())

    def sums(self) -> list[list[float]]:
        """Return for each row the sums of `TOKEN_SUMS`. Empty if no token counts."""
        if not any(tokens for _, tokens, _ in self._sums):
            return []
        sizes = [len(row) for row in self._labels]
        shares = zip(*row_shares(np.concatenate(self._labels), np.concatenate(self._predicted), sizes), strict=True)
        return [[*map(float, sums), *share] for sums, share in zip(self._sums, shares, strict=True)]


TOKEN_SUMS = ("negative log-likelihood", "tokens", "correct tokens", "share of the precision", "share of the F1")
"""What a row of `RowCounts.sums` contains. The means of the two shares over all rows are the weighted precision and F1."""


def row_shares(labels: Numbers, predicted: Numbers, sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return each row's share of the weighted precision and of the weighted F1. Row i has the next `sizes[i]` tokens.

    Both metrics are sums over the vocabulary, which are too many sums for a bootstrap. A share is the metric plus the number of rows
    times the linear contribution of the row: the pseudo-value of the infinitesimal jackknife (Jaeckel 1972). The mean of the shares is
    the metric itself, because the metrics do not change if all counts are multiplied by the same number.
    """
    size = int(max(labels.max(), predicted.max())) + 1
    total, is_correct = len(labels), labels == predicted
    wanted, chosen, hits = (np.bincount(tokens, minlength=size).astype(np.float64) for tokens in (labels, predicted, labels[is_correct]))
    shares = []
    for divisor, factor, divisor_has_labels in ((chosen, 1.0, False), (wanted + chosen, 2.0, True)):
        scores = np.divide(factor * hits, divisor, out=np.zeros(size), where=divisor > 0)
        slopes = np.divide(wanted, divisor, out=np.zeros(size), where=divisor > 0)
        value = float((wanted * scores).sum()) / total
        by_choice = -slopes * scores
        by_label = scores - value + (by_choice if divisor_has_labels else 0.0)
        of_tokens = by_label[labels] + by_choice[predicted] + np.where(is_correct, factor * slopes[labels], 0.0)
        ends = np.cumsum([0, *sizes])
        sums = np.concatenate([[0.0], np.cumsum(of_tokens)])[ends]
        shares.append((value + len(sizes) * np.diff(sums) / total).tolist())
    return shares[0], shares[1]
