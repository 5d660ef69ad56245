"""Metrics that compare the text of an answer with the text of the correct answer.

A row without a correct answer has no score; the metric's reason says how many such rows there are. Libraries are imported when they are
needed. Nothing is downloaded, because models are read from local folders.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_trainer.evaluation.predictions import Prediction, rows_with_reference
from finetune_trainer.evaluation.values import MetricValue, NotComputedError, mean_of_rows
from finetune_trainer.imports import hide_temporarily

NO_REFERENCE_REASON = "no row of the predictions has a ground_truth"
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
BERTSCORE_NAMES = ("precision", "recall", "f1")

Embedder = Callable[[list[str]], Sequence[Sequence[float]]]
"""A function that returns one embedding for each text. Errors: NotComputedError."""

WORD_PATTERN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""A regular expression for a word. A Chinese character or a Japanese kana is a word, because these scripts have no spaces between words."""


def bleu(predictions: Sequence[Prediction]) -> MetricValue:
    """Return corpus BLEU from 0 to 100, by sacrebleu with its default tokenizer `13a` (Papineni et al. 2002, Post 2018).

    The scores of the rows are sentence BLEU with the effective order, also from 0 to 100. The mean of the rows' scores is not the corpus BLEU.
    """
    scored_indices = rows_with_reference(predictions)
    if not scored_indices:
        return MetricValue.missing(NO_REFERENCE_REASON)
    from sacrebleu.metrics import BLEU

    answers = [predictions[index].assistant_response for index in scored_indices]
    references = [_require_reference(predictions[index]) for index in scored_indices]
    sentence_bleu = BLEU(effective_order=True)
    rows: list[float | None] = [None] * len(predictions)
    for index, answer, reference in zip(scored_indices, answers, references, strict=True):
        rows[index] = _limit_score(sentence_bleu.sentence_score(answer, [reference]).score, 100.0)
    value = _limit_score(BLEU().corpus_score(answers, [references]).score, 100.0)
    return MetricValue(value, _describe_unscored_rows(predictions), rows, _list_reasons_without_reference(predictions))


def bleu_sums(predictions: Sequence[Prediction]) -> list[list[float]]:
    """Return the ten summands of each row for `bootstrap.bleu_of_sums`. All ten summands are 0 for a row without a correct answer."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    rows: list[list[float]] = [[0.0] * 10 for _ in predictions]
    for index in rows_with_reference(predictions):
        score = metric.corpus_score([predictions[index].assistant_response], [[_require_reference(predictions[index])]])
        rows[index] = [float(number) for number in (score.sys_len, score.ref_len, *score.counts, *score.totals)]
    return rows


def _limit_score(score: float, maximum: float) -> float:
    """Return the score, but at most `maximum`. A perfect score may have a rounding error, such as 100.00000000000004."""
    return min(float(score), maximum)


class _RougeTokenizer:
    """Splits a text into lower-case words, and stems English words longer than three letters.

    For ASCII text, the tokens are those of rouge-score's own tokenizer with `use_stemmer=True`. rouge-score's tokenizer is not used,
    because it removes all letters outside of ASCII, so that equal answers in Greek or Chinese would score 0.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem  # The stemmer contains its rules, so no nltk data is needed.

    def tokenize(self, text: str) -> list[str]:
        words = WORD_PATTERN.findall(text.lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def rouge(predictions: Sequence[Prediction]) -> dict[str, MetricValue]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L from 0 to 1, by rouge-score (Lin 2004). Each value is the mean over the rows."""
    scored_indices = rows_with_reference(predictions)
    if not scored_indices:
        return dict.fromkeys(ROUGE_TYPES, MetricValue.missing(NO_REFERENCE_REASON))
    # nltk would import scipy and scikit-learn, which takes two seconds, but its stemmer needs neither of them.
    with hide_temporarily("scipy", "sklearn", module_that_needs_it="nltk"):
        from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=_RougeTokenizer())
    scores_by_type: dict[str, list[float | None]] = {name: [None] * len(predictions) for name in ROUGE_TYPES}
    for index in scored_indices:
        scores = scorer.score(_require_reference(predictions[index]), predictions[index].assistant_response)
        for name in ROUGE_TYPES:
            scores_by_type[name][index] = float(scores[name].fmeasure)
    reasons = _list_reasons_without_reference(predictions)
    return {name: mean_of_rows(scores_by_type[name], reasons, reason=_describe_unscored_rows(predictions)) for name in ROUGE_TYPES}


def exact_match(predictions: Sequence[Prediction]) -> MetricValue:
    """Return the share of answers that equal the correct answer, apart from white space at the start and the end."""
    if not rows_with_reference(predictions):
        return MetricValue.missing(NO_REFERENCE_REASON)
    rows = [
        None if row.ground_truth is None else float(row.assistant_response.strip() == row.ground_truth.strip())
        for row in predictions
    ]
    return mean_of_rows(rows, _list_reasons_without_reference(predictions), reason=_describe_unscored_rows(predictions))


def bertscore(
    predictions: Sequence[Prediction],
    folder: Path | None,
    *,
    field: str,
    model_name: str | None = None,
    layer: int | None = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> dict[str, MetricValue]:
    """Return `precision`, `recall` and `f1` of BERTScore without idf weights and without rescaling (Zhang et al. 2020), by bert-score.

    Each token of one text is compared with the most similar token of the other text, by the cosine of their embeddings. The precision is
    the mean over the tokens of the answer; the recall is the mean over the tokens of the correct answer. Special tokens such as [SEP] can
    be the most similar token, but do not count in the means. An empty text scores 0.
    `folder`: folder of an encoder model. `field`: the spec field that sets the model, for messages. `layer`: the layer whose output is the
    embedding. The default is the layer that bert-score recommends for the model `model_name`, such as `roberta-large`, or for the name of the folder.
    If bert-score recommends no layer, the default is the last layer.
    """
    if folder is None:
        return dict.fromkeys(BERTSCORE_NAMES, MetricValue.missing(f"BERTScore needs a local encoder model: set {field}"))
    scored_indices = rows_with_reference(predictions)
    if not scored_indices:
        return dict.fromkeys(BERTSCORE_NAMES, MetricValue.missing(NO_REFERENCE_REASON))
    texts_by_index = {index: (predictions[index].assistant_response.strip(), _require_reference(predictions[index]).strip()) for index in scored_indices}
    filled_indices = [index for index, texts in texts_by_index.items() if all(texts)]  # bert-score fails on empty texts with transformers 5
    scores_by_index: dict[int, Sequence[float]] = dict.fromkeys(scored_indices, (0.0, 0.0, 0.0))
    if filled_indices:
        answers, references = ([texts_by_index[index][side] for index in filled_indices] for side in (0, 1))
        computed_scores = _compute_bertscores(answers, references, folder, layer, model_name, device, batch_size)
        scores_by_index.update(zip(filled_indices, computed_scores, strict=True))
    if not all(math.isfinite(score) for row in scores_by_index.values() for score in row):  # bert-score replaces NaN with 0 only in F1
        return dict.fromkeys(BERTSCORE_NAMES, MetricValue.missing(f"the model in {field} computes embeddings that are not finite"))
    metrics = {}
    for column, name in enumerate(BERTSCORE_NAMES):
        rows = [scores_by_index[index][column] if index in scores_by_index else None for index in range(len(predictions))]
        metrics[name] = mean_of_rows(rows, _list_reasons_without_reference(predictions), reason=_describe_unscored_rows(predictions))
    return metrics


class _BertScoreTokenizer:
    """A tokenizer for bert-score whose `model_max_length` is the number of the model's positions.

    If the files of a tokenizer do not set `model_max_length`, the value is 10^30, and bert-score fails with an integer overflow.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self.model_max_length = tokenizer, max_length
        self.pad_token_id = tokenizer.pad_token_id or 0  # Any token id can be used for padding, because padding is masked.

    def encode(self, text: str, **_: Any) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=True, max_length=self.model_max_length, truncation=True)


def _compute_bertscores(
    answers: Sequence[str], references: Sequence[str], folder: Path, layer: int | None, model_name: str | None, device: str, batch_size: int
) -> list[list[float]]:
    """Return precision, recall and F1 of each pair of answer and reference. The texts must not be empty."""
    import torch
    from bert_score.utils import bert_cos_score_idf
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    layer_count = min(layer or _find_recommended_layer(model_name, folder) or config.num_hidden_layers, config.num_hidden_layers)
    # bert-score would choose the architecture by the name: if the name of the folder contains `t5`, it would load a T5 model.
    with _suppress_warnings():  # transformers warns that the weights of the layers above are unused.
        model = AutoModel.from_pretrained(folder, local_files_only=True, num_hidden_layers=layer_count, dtype=torch.float32)
    if config.is_encoder_decoder:
        model = model.get_encoder()
    model = model.to(device).eval()
    # The tokenizers of RoBERTa and GPT-2 distinguish words with and without a leading space. As in bert-score, each text starts with a space.
    tokenizer_options = {"add_prefix_space": True} if config.model_type in ("roberta", "gpt2") else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **tokenizer_options)
    weight_by_token: dict[int, float] = defaultdict(lambda: 1.0)
    for token in (tokenizer.cls_token_id, tokenizer.sep_token_id):
        if token is not None:
            weight_by_token[token] = 0.0
    max_positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        max_positions -= config.pad_token_id + 1  # In these models, the first position is the padding id plus 1.
    max_length = min(tokenizer.model_max_length, max_positions)
    scores: torch.Tensor = bert_cos_score_idf(
        model, list(references), list(answers), _BertScoreTokenizer(tokenizer, max_length), weight_by_token, batch_size=batch_size, device=device,
    )  # fmt: skip
    return scores.double().tolist()


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress the warnings of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _find_recommended_layer(model_name: str | None, folder: Path) -> int | None:
    """Return the layer that bert-score recommends, because it agrees best with human ratings; None if bert-score does not know the model."""
    from bert_score.utils import model2layers

    candidate_names = (model_name or "", folder.name)
    return next((model2layers[name] for name in candidate_names if name in model2layers), None)


def semantic_similarity(predictions: Sequence[Prediction], embed: Embedder | None, *, field: str) -> MetricValue:
    """Return the mean cosine of the embeddings of answer and correct answer, from -1 to 1. An empty text scores 0.

    `embed`: the result of `sentence_embedder`, or `Judge.embed`; None without an embedding model. `field`: the spec field that sets the
    embedding model, for messages.
    """
    if embed is None:
        return MetricValue.missing(f"semantic similarity needs an embedding model: set {field}")
    scored_indices = rows_with_reference(predictions)
    if not scored_indices:
        return MetricValue.missing(NO_REFERENCE_REASON)
    rows: list[float | None] = [0.0 if index in set(scored_indices) else None for index in range(len(predictions))]
    filled_indices = [index for index in scored_indices if predictions[index].assistant_response.strip() and _require_reference(predictions[index]).strip()]
    answers = [predictions[index].assistant_response for index in filled_indices]
    references = [_require_reference(predictions[index]) for index in filled_indices]
    try:
        embeddings = embed(answers + references) if filled_indices else []
    except NotComputedError as error:
        return MetricValue.missing(str(error))
    reasons = _list_reasons_without_reference(predictions)
    for position, index in enumerate(filled_indices):
        rows[index] = cosine(embeddings[position], embeddings[len(filled_indices) + position])
        if rows[index] is None:
            reasons[index] = "an embedding is zero or not finite"
    if all(score is None for score in rows):
        return MetricValue(None, "all embeddings are zero or not finite", rows, reasons)
    return mean_of_rows(rows, reasons, reason=_describe_unscored_rows(predictions, reasons))


def sentence_embedder(folder: Path, *, device: str = "cpu", batch_size: int = 32) -> Embedder:
    """Return a function that embeds texts with a sentence-transformers model from a local folder. A plain encoder gets mean pooling.

    Importing sentence-transformers takes seconds, because it imports scikit-learn.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False)
    if not 0 < (model.max_seq_length or 0) < 1 << 20:  # The tokenizer's files do not limit the length.
        encoder_config = getattr(getattr(model[0], "auto_model", None), "config", None)
        model.max_seq_length = getattr(encoder_config, "max_position_embeddings", None) or 512

    def embed(texts: list[str]) -> list[list[float]]:
        embeddings = model.encode(texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
        return [[float(number) for number in embedding] for embedding in embeddings]

    return embed


def cosine(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the cosine of the angle between two vectors; None if one of them is zero or not finite."""
    norm_product = math.hypot(*first) * math.hypot(*second)
    dot_product = math.fsum(left * right for left, right in zip(first, second, strict=True)) if math.isfinite(norm_product) else math.nan
    return max(-1.0, min(1.0, dot_product / norm_product)) if norm_product and math.isfinite(dot_product) else None


def _require_reference(prediction: Prediction) -> str:
    """Return the correct answer of a row that has one."""
    assert prediction.ground_truth is not None
    return prediction.ground_truth


def _list_reasons_without_reference(predictions: Sequence[Prediction]) -> dict[int, str]:
    """Return the reason for each row that has no correct answer, by row index."""
    return {index: "the row has no ground_truth" for index, row in enumerate(predictions) if row.ground_truth is None}


def _describe_unscored_rows(predictions: Sequence[Prediction], reasons: Mapping[int, str] | None = None) -> str | None:
    """Return a sentence about the rows without a score; None if all rows have one.

    `reasons`: why rows have no score, by row index. None: only the rows without a correct answer have no score.
    """
    reasons = _list_reasons_without_reference(predictions) if reasons is None else reasons
    return f"{len(reasons)} of {len(predictions)} rows are not scored (first: {next(iter(reasons.values()))})" if reasons else None
