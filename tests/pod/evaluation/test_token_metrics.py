"""Token metrics against scikit-learn and against the cross entropy of the model's complete logits."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from finetune_trainer.evaluation.token_metrics import OutputHead, TokenCounts, TokenPredictions, shifted_predictions
from sklearn import metrics as sklearn_metrics
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=3.0)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.25)),
    "bias": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    ),
}


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of three rows with a masked prompt, a gap and padding."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    labels = tokens.clone()
    labels[0, :4] = labels[1, 6:8] = labels[2, 9:] = -100
    return tokens, labels


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("logits_per_chunk", [1, 5 * VOCABULARY, 1 << 25])
def test_predictions_equal_those_of_the_complete_logits(kind: str, logits_per_chunk: int) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    head_layer = model.get_output_embeddings()
    with torch.no_grad():
        head_layer.weight.mul_(20)  # larger logits, so that scale, limit and bias change the result
        if kind == "bias":
            head_layer.bias.normal_()
    tokens, labels = make_batch()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        logits = model(input_ids=tokens).logits[:, :-1].float()
    counted = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[counted], labels[:, 1:][counted], reduction="none")

    found = shifted_predictions(hidden, labels, OutputHead.of(model), logits_per_chunk=logits_per_chunk)

    assert found.labels.tolist() == labels[:, 1:][counted].tolist() and len(found.labels) == 8 + 9 + 8
    assert found.predicted.tolist() == logits[counted].argmax(-1).tolist()
    torch.testing.assert_close(found.negative_log_likelihoods, expected, rtol=1e-5, atol=1e-5)
    counts = TokenCounts(VOCABULARY)
    counts.add(found)
    assert counts.loss.value == pytest.approx(expected.mean().item(), rel=1e-6)
    assert counts.perplexity.value == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)


def test_no_more_logits_exist_at_a_time_than_allowed() -> None:
    chunks = []

    def project(hidden: torch.Tensor) -> torch.Tensor:
        chunks.append(len(hidden))
        return torch.zeros(len(hidden), VOCABULARY)

    tokens, labels = make_batch()
    shifted_predictions(torch.zeros(*tokens.shape, 4), labels, OutputHead(project, VOCABULARY), logits_per_chunk=10 * VOCABULARY)
    assert chunks == [10, 10, 5]


def counts_of(labels: list[int], predicted: list[int], losses: list[float] | None = None) -> TokenCounts:
    counts = TokenCounts(20)
    losses_tensor = torch.tensor([1.0] * len(labels) if losses is None else losses)
    counts.add(TokenPredictions(torch.tensor(predicted, dtype=torch.long), torch.tensor(labels, dtype=torch.long), losses_tensor))
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    """Some tokens are labels that are never predicted, and some are predicted but never labels."""
    dice = random.Random(seed)
    labels = [dice.randrange(0, 12) for _ in range(200)]
    predicted = [label if dice.random() < 0.4 else dice.randrange(6, 20) for label in labels]
    counts = counts_of(labels, predicted)
    options: Any = {"average": "weighted", "zero_division": 0}
    assert counts.accuracy.value == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted), abs=1e-12)
    assert counts.precision.value == pytest.approx(sklearn_metrics.precision_score(labels, predicted, **options), abs=1e-12)
    assert counts.recall.value == pytest.approx(sklearn_metrics.recall_score(labels, predicted, **options), abs=1e-12)
    assert counts.f1.value == pytest.approx(sklearn_metrics.f1_score(labels, predicted, **options), abs=1e-12)
    assert counts.recall.value == pytest.approx(counts.accuracy.value, abs=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    """The perplexity of two parts is that of all tokens, not the mean of the parts' perplexities."""
    whole = counts_of([1, 2, 3, 4], [1, 2, 0, 0], [0.5, 0.5, 2.0, 3.0])
    first, second = counts_of([1], [1], [0.5]), counts_of([2, 3, 4], [2, 0, 0], [0.5, 2.0, 3.0])
    first.merge(second)
    for name in ("tokens", "loss", "perplexity", "accuracy", "precision", "recall", "f1"):
        assert getattr(first, name) == getattr(whole, name)
    assert first.perplexity.value == pytest.approx(math.exp(6 / 4))


def test_sums_can_be_reduced_over_ranks() -> None:
    counts = counts_of([1, 2], [1, 0], [1.0, 3.0])
    seen = []

    def two_equal_ranks(total: torch.Tensor) -> torch.Tensor:
        seen.append(total.dtype)
        return total * 2

    counts.reduce(two_equal_ranks)
    assert (counts.tokens, counts.loss.value, counts.accuracy.value) == (4, 2.0, 0.5)
    assert seen == [torch.int64] * 3 + [torch.float64]


def test_masked_labels_leave_no_value() -> None:
    counts = TokenCounts(VOCABULARY)
    head = OutputHead(torch.nn.Linear(4, VOCABULARY), VOCABULARY)
    counts.add(shifted_predictions(torch.zeros(2, 3, 4), torch.full((2, 3), -100), head))
    for metric in (counts.loss, counts.perplexity, counts.accuracy, counts.precision, counts.recall, counts.f1):
        assert metric.value is None and metric.reason == "no token of the evaluation set counts: all labels are masked"


def test_a_perplexity_beyond_the_largest_number_has_no_value() -> None:
    counts = counts_of([1], [1], [800.0])
    assert counts.loss.value == 800.0
    assert counts.perplexity.value is None and "too large" in str(counts.perplexity.reason)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_value(loss: float) -> None:
    counts = counts_of([1, 2], [1, 2], [1.0, loss])
    for metric in (counts.loss, counts.perplexity):
        assert metric.value is None and "not finite" in str(metric.reason)
    assert counts.accuracy.value == 1.0
