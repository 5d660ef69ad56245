"""Computes the metrics of generated answers. Some metrics compare only the texts; others need a local model or a judge model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune_api.names import JUDGE_KEY
from finetune_api.pod import RunConfig
from finetune_api.rules import JUDGE_METRICS, value_or_default
from finetune_api.spec.enums import EvaluationMetric
from finetune_api.spec.results import Judge as JudgeSpec
from finetune_api.status import Stage

from finetune_trainer.channel import Channel
from finetune_trainer.evaluation import judge as judges
from finetune_trainer.evaluation import text_metrics
from finetune_trainer.evaluation.judge import Judge, JudgeSettings
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.inputs import Inputs

BERTSCORE_FIELD, SIMILARITY_FIELD = "evaluation.metricModels.bertscore", "evaluation.metricModels.semanticSimilarity"


def measure_answers(
    run: RunConfig, channel: Channel, stage: Stage, inputs: Inputs, metrics: Sequence[EvaluationMetric], predictions: Sequence[Prediction]
) -> dict[str, MetricValue]:
    """Return the metrics of generated answers, by name. The exact match is always included. Errors: those of the judge's endpoint."""

    def report(metric: str) -> None:
        channel.report_stage(stage, f"computing {metric}")

    values = {"exactMatch": text_metrics.exact_match(predictions)}
    if EvaluationMetric.BLEU in metrics:
        values["bleu"] = text_metrics.bleu(predictions)
    if EvaluationMetric.ROUGE in metrics:
        values |= text_metrics.rouge(predictions)
    if EvaluationMetric.BERTSCORE in metrics:
        report("bertscore")
        values |= _measure_bertscore(run, inputs.bertscore_model, predictions)
    if any(metric in (*JUDGE_METRICS, EvaluationMetric.SEMANTIC_SIMILARITY) for metric in metrics):
        values |= _measure_with_judge(run, channel, inputs, metrics, predictions, report)
    return values


def _measure_bertscore(run: RunConfig, folder: Path | None, predictions: Sequence[Prediction]) -> dict[str, MetricValue]:
    """Measure BERTScore. Returns the F1 score as `bertscore`, and also precision and recall."""
    metric_models = run.spec.evaluation.metric_models
    model_name = (metric_models.bertscore if metric_models else None) or ""
    values = text_metrics.bertscore(predictions, folder, field=BERTSCORE_FIELD, model_name=model_name.rpartition("/")[2] or None)
    return {"bertscore": values["f1"], "bertscorePrecision": values["precision"], "bertscoreRecall": values["recall"]}


def _measure_with_judge(
    run: RunConfig, channel: Channel, inputs: Inputs, metrics: Sequence[EvaluationMetric], predictions: Sequence[Prediction],
    report: Callable[[str], None],
) -> dict[str, MetricValue]:  # fmt: skip
    """Measure the semantic similarity and the metrics that need the judge. Report a note with the number and the cost of the requests to the judge."""
    judge = _connect_judge(run.spec.evaluation.judge)
    values: dict[str, MetricValue] = {}
    for metric in metrics:
        match metric:
            case EvaluationMetric.FACTUAL_CORRECTNESS if judge is not None:
                report(metric)
                values[metric] = judges.factual_correctness(judge, predictions)
            case EvaluationMetric.ANSWER_ACCURACY if judge is not None:
                report(metric)
                values[metric] = judges.answer_accuracy(judge, predictions)
            case EvaluationMetric.ANSWER_RELEVANCY if judge is not None:
                report(metric)
                values[metric] = judges.answer_relevancy(judge, predictions)
            case EvaluationMetric.SEMANTIC_SIMILARITY:
                report(metric)
                values[metric] = _measure_similarity(inputs.similarity_model, judge, predictions)
    if EvaluationMetric.ANSWER_CORRECTNESS in metrics and judge is not None:
        report(EvaluationMetric.ANSWER_CORRECTNESS)
        factual_correctness = values.get(EvaluationMetric.FACTUAL_CORRECTNESS) or judges.factual_correctness(judge, predictions)
        similarity = text_metrics.semantic_similarity(predictions, judge.embed, field="evaluation.judge.embedding")
        values[EvaluationMetric.ANSWER_CORRECTNESS] = judges.answer_correctness(factual_correctness, similarity)
    if judge is not None:
        channel.report_note(_describe_usage(judge))
        judge.close()
    return {str(name): value for name, value in values.items()}


def _measure_similarity(folder: Path | None, judge: Judge | None, predictions: Sequence[Prediction]) -> MetricValue:
    """Measure the semantic similarity with the local model if there is one, else with the judge's embedding model."""
    embed = text_metrics.sentence_embedder(folder) if folder is not None else None
    if embed is None and judge is not None and judge.settings.embedding_model is not None:
        embed = judge.embed
    return text_metrics.semantic_similarity(predictions, embed, field=SIMILARITY_FIELD)


def _connect_judge(spec: JudgeSpec | None) -> Judge | None:
    """Return a client of the judge that the spec names, or None if the spec names no judge.

    The API key comes from the environment, and no message contains the key.
    """
    if spec is None or (spec.model is None and spec.embedding is None):
        return None
    settings = JudgeSettings(
        base_url=value_or_default(spec, "endpoint"), model=spec.model or "", api_key=os.environ.get(JUDGE_KEY) or None,
        embedding_model=spec.embedding, input_price=spec.input_price, output_price=spec.output_price,
    )  # fmt: skip
    return Judge(settings)


def _describe_usage(judge: Judge) -> str:
    usage, cost = judge.usage, judge.cost
    usage_text = f"judge: {usage.requests} requests, {usage.input_tokens} input tokens, {usage.output_tokens} output tokens"
    return f"{usage_text}, cost {cost.value:.4f}" if cost.value is not None else f"{usage_text}, cost unknown: {cost.reason}"
