"""BERTScore and sentence embeddings with tiny local models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.text_metrics import bertscore, semantic_similarity, sentence_embedder
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

VOCABULARY_WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]",
    "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "old", "man", "paris", "is", "capital", "of", "france",
]  # fmt: skip
PAIRS = [
    ("the cat sat on the mat", "a dog sat on the mat"),
    ("paris", "paris is the capital of france"),
    ("the old man", "the old man"),
    ("", "paris"),
    ("the", None),
    ("the cat " * 40, "the cat " * 50),  # more tokens than the model has positions
]
PREDICTIONS = [Prediction(None, "question", answer, reference) for answer, reference in PAIRS]
POSITION_COUNT = 24


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights and three layers. From `t5` in the folder's name, bert-score would conclude that the model is a T5."""
    folder = tmp_path_factory.mktemp("models") / "not-t5"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY_WORDS))
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY_WORDS)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY_WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=POSITION_COUNT,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def compute_token_embeddings(folder: Path, text: str, layer: int) -> torch.Tensor:
    """Return one unit vector for each token of a text, without padding. The first vector is that of [CLS], the last is that of [SEP]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    tokens = torch.tensor([tokenizer.encode(text, truncation=True, max_length=POSITION_COUNT)])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states[layer][0]
    return torch.nn.functional.normalize(states.double(), dim=-1)


@pytest.mark.parametrize(("layer", "batch_size"), [(None, 32), (2, 32), (2, 1)])
def test_bertscore_is_the_mean_of_greedy_matches(encoder: Path, layer: int | None, batch_size: int) -> None:
    found_scores = bertscore(PREDICTIONS, encoder, field="x", layer=layer, batch_size=batch_size)
    expected_scores: list[tuple[float, float, float]] = []
    for answer, reference in ((answer, reference) for answer, reference in PAIRS if answer and reference):
        cosines = compute_token_embeddings(encoder, answer, layer or 3) @ compute_token_embeddings(encoder, reference, layer or 3).T
        precision, recall = cosines.amax(1)[1:-1].mean().item(), cosines.amax(0)[1:-1].mean().item()
        expected_scores.append((precision, recall, 2 * precision * recall / (precision + recall)))
    expected_scores.insert(3, (0.0, 0.0, 0.0))
    for column_index, name in enumerate(("precision", "recall", "f1")):
        column = [scores[column_index] for scores in expected_scores]
        assert found_scores[name].scores == pytest.approx(column, abs=1e-4)
        assert found_scores[name].value == pytest.approx(sum(column) / 5, abs=1e-4)
        assert found_scores[name].rows is not None and found_scores[name].rows[4] is None and found_scores[name].rows[2] == pytest.approx(1.0, abs=1e-5)
    assert 0 < expected_scores[0][0] < 0.99 and expected_scores[1][0] != pytest.approx(expected_scores[1][1], abs=1e-3)


def test_a_tokenizer_without_a_length_limit_is_supported(encoder: Path) -> None:
    """Without a length limit, bert-score alone fails with an integer overflow. One text has more tokens than the model has positions."""
    assert AutoTokenizer.from_pretrained(encoder).model_max_length > 10**18


def test_a_recommended_layer_that_the_model_lacks_is_replaced_by_its_last_layer(encoder: Path, tmp_path: Path) -> None:
    """bert-score recommends layer 9 of bert-base-uncased.

    For a model that has this name but only three layers, layer 3 is used. Layer 2 would give another result.
    """
    renamed_encoder = tmp_path / "bert-base-uncased"
    shutil.copytree(encoder, renamed_encoder)
    last_layer_f1, second_layer_f1 = (bertscore(PREDICTIONS[:1], encoder, field="x", layer=layer)["f1"].value for layer in (3, 2))
    assert bertscore(PREDICTIONS[:1], renamed_encoder, field="x")["f1"].value == last_layer_f1 != second_layer_f1
    assert bertscore(PREDICTIONS[:1], encoder, field="x", model_name="roberta-base-openai-detector")["f1"].value == last_layer_f1


def test_embeddings_that_are_not_finite_leave_no_value(encoder: Path, tmp_path: Path) -> None:
    broken_encoder = tmp_path / "broken"
    shutil.copytree(encoder, broken_encoder)
    model = AutoModel.from_pretrained(broken_encoder)
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.fill_(math.nan)
    model.save_pretrained(broken_encoder)
    scores = bertscore(PREDICTIONS[:2], broken_encoder, field="evaluation.b")
    assert scores["f1"].value is None and "evaluation.b" in str(scores["f1"].reason)


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_sentence_embeddings_are_pooled_token_embeddings(encoder: Path, tmp_path: Path, pooling: str | None) -> None:
    """Without a sentence-transformers configuration, the mean of the token embeddings is used.

    If the model has a sentence-transformers configuration, this configuration sets the pooling.
    """
    folder = encoder
    if pooling is not None:
        folder = tmp_path / "sentences"
        shutil.copytree(encoder, folder)
        (folder / "modules.json").write_text(json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]))  # fmt: skip
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
        )
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()

    def pool_by_hand(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text, truncation=True, max_length=POSITION_COUNT)])).last_hidden_state[0].double()
        return states[0] if pooling == "cls" else states.mean(0)

    similarity = semantic_similarity(PREDICTIONS, sentence_embedder(folder), field="x")
    expected_scores = [
        torch.cosine_similarity(pool_by_hand(answer), pool_by_hand(reference), dim=0).item() if answer else 0.0
        for answer, reference in PAIRS if reference is not None
    ]  # fmt: skip
    assert similarity.scores == pytest.approx(expected_scores, abs=1e-5) and similarity.rows is not None and similarity.rows[4] is None
