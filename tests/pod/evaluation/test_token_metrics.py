"""Token metrics equal those of scikit-learn, and the loss equals the cross entropy of the model's complete logits."""

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

VOCABULARY_SIZE = 97
SIZES = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=3.0)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.25)),
    "bias": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=2)
    ),
}


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and labels of three rows. The labels mask a prompt, some tokens within a row, and the padding."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY_SIZE, (3, 12), generator=generator)
    labels = tokens.clone()
    labels[0, :4] = labels[1, 6:8] = labels[2, 9:] = -100
    return tokens, labels


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("logits_per_chunk", [1, 5 * VOCABULARY_SIZE, 1 << 25])
def test_predictions_equal_those_of_the_complete_logits(model_name: str, logits_per_chunk: int) -> None:
    torch.manual_seed(0)
    model = MODELS[model_name]().eval()
    head_layer = model.get_output_embeddings()
    with torch.no_grad():
        head_layer.weight.mul_(20)  # larger logits, so that the scale, the soft cap and the bias change the result
        if model_name == "bias":
            head_layer.bias.normal_()
    tokens, labels = make_batch()
    with torch.no_grad():
        hidden_states = model.base_model(input_ids=tokens).last_hidden_state
        logits = model(input_ids=tokens).logits[:, :-1].float()
    is_counted = labels[:, 1:] != -100
    expected_losses = torch.nn.functional.cross_entropy(logits[is_counted], labels[:, 1:][is_counted], reduction="none")

    predictions = shifted_predictions(hidden_states, labels, OutputHead.of(model), logits_per_chunk=logits_per_chunk)

    assert predictions.labels.tolist() == labels[:, 1:][is_counted].tolist() and len(predictions.labels) == 8 + 9 + 8
    assert predictions.predicted.tolist() == logits[is_counted].argmax(-1).tolist()
    torch.testing.assert_close(predictions.negative_log_likelihoods, expected_losses, rtol=1e-5, atol=1e-5)
    counts = TokenCounts(VOCABULARY_SIZE)
    counts.add(predictions)
    assert counts.loss.value == pytest.approx(expected_losses.mean().item(), rel=1e-6)
    assert counts.perplexity.value == pytest.approx(math.exp(expected_losses.mean().item()), rel=1e-5)


def test_at_most_one_chunk_of_logits_exists_at_a_time() -> None:
    chunk_sizes = []

    def project(hidden_states: torch.Tensor) -> torch.Tensor:
        chunk_sizes.append(len(hidden_states))
        return torch.zeros(len(hidden_states), VOCABULARY_SIZE)

    tokens, labels = make_batch()
    shifted_predictions(torch.zeros(*tokens.shape, 4), labels, OutputHead(project, VOCABULARY_SIZE), logits_per_chunk=10 * VOCABULARY_SIZE)
    assert chunk_sizes == [10, 10, 5]


def make_counts(labels: list[int], predicted: list[int], losses: list[float] | None = None) -> TokenCounts:
    counts = TokenCounts(20)
    losses_tensor = torch.tensor([1.0] * len(labels) if losses is None else losses)
    counts.add(TokenPredictions(torch.tensor(predicted, dtype=torch.long), torch.tensor(labels, dtype=torch.long), losses_tensor))
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_of_scikit_learn(seed: int) -> None:
    """Some token ids occur only as labels, and some only as predictions."""
    random_generator = random.Random(seed)
    labels = [random_generator.randrange(0, 12) for _ in range(200)]
    predicted = [label if random_generator.random() < 0.4 else random_generator.randrange(6, 20) for label in labels]
    counts = make_counts(labels, predicted)
    options: Any = {"average": "weighted", "zero_division": 0}
    assert counts.accuracy.value == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted), abs=1e-12)
    assert counts.precision.value == pytest.approx(sklearn_metrics.precision_score(labels, predicted, **options), abs=1e-12)
    assert counts.recall.value == pytest.approx(sklearn_metrics.recall_score(labels, predicted, **options), abs=1e-12)
    assert counts.f1.value == pytest.approx(sklearn_metrics.f1_score(labels, predicted, **options), abs=1e-12)
    assert counts.recall.value == pytest.approx(counts.accuracy.value, abs=1e-12)


def test_merged_counts_have_the_metrics_of_all_tokens() -> None:
    """The perplexity of merged counts is the perplexity of all tokens, not the mean of two perplexities."""
    all_counts = make_counts([1, 2, 3, 4], [1, 2, 0, 0], [0.5, 0.5, 2.0, 3.0])
    first_counts, second_counts = make_counts([1], [1], [0.5]), make_counts([2, 3, 4], [2, 0, 0], [0.5, 2.0, 3.0])
    first_counts.merge(second_counts)
    for name in ("tokens", "loss", "perplexity", "accuracy", "precision", "recall", "f1"):
        assert getattr(first_counts, name) == getattr(all_counts, name)
    assert first_counts.perplexity.value == pytest.approx(math.exp(6 / 4))


def test_counts_can_be_summed_over_ranks() -> None:
    counts = make_counts([1, 2], [1, 0], [1.0, 3.0])
    seen_dtypes = []

    def sum_of_two_equal_ranks(total: torch.Tensor) -> torch.Tensor:
        seen_dtypes.append(total.dtype)
        return total * 2

    counts.reduce(sum_of_two_equal_ranks)
    assert (counts.tokens, counts.loss.value, counts.accuracy.value) == (4, 2.0, 0.5)
    assert seen_dtypes == [torch.int64] * 3 + [torch.float64]


def test_metrics_have_no_value_if_all_labels_are_masked() -> None:
    counts = TokenCounts(VOCABULARY_SIZE)
    head = OutputHead(torch.nn.Linear(4, VOCABULARY_SIZE), VOCABULARY_SIZE)
    counts.add(shifted_predictions(torch.zeros(2, 3, 4), torch.full((2, 3), -100), head))
    for metric in (counts.loss, counts.perplexity, counts.accuracy, counts.precision, counts.recall, counts.f1):
        assert metric.value is None and metric.reason == "no token of the evaluation set counts: all labels are masked"


def test_a_perplexity_that_is_too_large_for_a_float_has_no_value() -> None:
    counts = make_counts([1], [1], [800.0])
    assert counts.loss.value == 800.0
    assert counts.perplexity.value is None and "too large" in str(counts.perplexity.reason)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_value(loss: float) -> None:
    counts = make_counts([1, 2], [1, 2], [1.0, loss])
    for metric in (counts.loss, counts.perplexity):
        assert metric.value is None and "not finite" in str(metric.reason)
    assert counts.accuracy.value == 1.0
