"""The stage `evaluating`: metrics of the final model on held-out rows, and its answers to their questions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import metrics_after_training, value_or_default, writes_predictions
from finetune_api.spec.enums import EvaluationMetric, OverflowPolicy
from finetune_api.status import EvaluationResult, MetricResult, Stage

from finetune_trainer import train
from finetune_trainer.channel import Channel
from finetune_trainer.data.load import load
from finetune_trainer.data.prepare import max_sequence_length, render_options, use_chat_template
from finetune_trainer.data.tokenise import TokenisedSplit, TokeniseOptions
from finetune_trainer.evaluation.predictions import Prediction, write_predictions
from finetune_trainer.evaluation.summary_files import write_results, write_summary, write_workbook
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.files import OUTPUT_FOLDER, StageResult, StageTask
from finetune_trainer.stages.questions import Question

PREDICTIONS_FILE, RESULTS_FILE = "predictions.jsonl", "evaluation_results.json"
SUMMARY_FILE, WORKBOOK_FILE = "evaluation_summary.json", "evaluation_detailed.xlsx"
CLASSIFICATION_METRICS = (EvaluationMetric.ACCURACY, EvaluationMetric.PRECISION, EvaluationMetric.RECALL, EvaluationMetric.F1)
TOKEN_METRICS = (EvaluationMetric.PERPLEXITY, *CLASSIFICATION_METRICS)
"""Metrics that need no generated answers."""


@dataclass
class HeldOut:
    """The model, and the rows on which it is evaluated."""

    model: Any
    tokenizer: Any
    tokens: TokenisedSplit
    """All held-out rows with their answers."""
    questions: list[Question]
    """The questions that the model answers: all, or `evaluation.maxRows` of them."""
    batch_size: int


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Evaluate the model, and write the files of the stage."""
    train.preload(run)
    metrics, files = metrics_after_training(run.spec), folder / OUTPUT_FOLDER
    held_out = _load_held_out(run, channel, inputs, task)
    values: dict[str, MetricValue] = {}
    if any(metric in TOKEN_METRICS for metric in metrics):
        values |= _measure_tokens(held_out, metrics, channel)
    if any(metric in CLASSIFICATION_METRICS for metric in metrics) and any(question.letters for question in held_out.questions):
        values |= _measure_letters(held_out, channel)
    predictions: list[Prediction] = []
    if writes_predictions(run.spec) or any(metric not in TOKEN_METRICS for metric in metrics):
        predictions = _answer_questions(run, held_out, channel)
        write_predictions(files / PREDICTIONS_FILE, predictions)
    if predictions and metrics:
        from finetune_trainer.stages.answer_metrics import measure_answers

        values |= measure_answers(run, channel, inputs, metrics, predictions)
    if metrics:
        write_results(files / RESULTS_FILE, values)
        write_summary(files / SUMMARY_FILE, values)
        if predictions:
            write_workbook(files / WORKBOOK_FILE, predictions, {name: value for name, value in values.items() if _has_row_of_each(value, predictions)})
    return StageResult(evaluation=_summarise(values, len(held_out.tokens.input_ids)))


def _has_row_of_each(value: MetricValue, predictions: Sequence[Prediction]) -> bool:
    return value.rows is not None and len(value.rows) == len(predictions)


def _summarise(values: Mapping[str, MetricValue], rows: int) -> EvaluationResult:
    return EvaluationResult(rows=rows, metrics={name: MetricResult(value=value.value, reason=value.reason) for name, value in values.items()} or None)


def _load_held_out(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask) -> HeldOut:
    from finetune_trainer import hardware
    from finetune_trainer import model as models
    from finetune_trainer.stages.final_model import load_final_model, load_tokenizer
    from finetune_trainer.stages.questions import held_out_rows, read_questions, tokenise_answered

    channel.report_stage(Stage.EVALUATING, "loading the model")
    tokenizer = load_tokenizer(run, inputs, task)
    model = load_final_model(run, inputs, task, hardware.detect_hardware(run, 0), tokenizer)
    loaded, dataset = load(run, inputs), run.spec.dataset
    rows = held_out_rows(loaded)
    rendering = render_options(run, tokenizer, use_chat_template(run, inputs, tokenizer), loaded.summary.format_with_turns)
    length = max_sequence_length(run, tokenizer, models.max_positions(models.load_config(run, inputs)))
    options = TokeniseOptions(length, OverflowPolicy.TRUNCATE, dataset.add_eos_token is not False, dataset.add_bos_token)
    questions = _sample(read_questions(rows, rendering, options), run)
    batch_size = run.spec.evaluation.batch_size_per_device or run.spec.training.batch_size_per_device or 1
    return HeldOut(model, tokenizer, tokenise_answered(run, rows, rendering, options), questions, batch_size)


def _sample(questions: list[Question], run: RunConfig) -> list[Question]:
    """At most `evaluation.maxRows` questions, chosen at random with the run's seed, in the order of their rows."""
    limit = run.spec.evaluation.max_rows
    if limit is None or limit >= len(questions):
        return questions
    chosen = random.Random(value_or_default(run.spec.training, "seed")).sample(range(len(questions)), limit)  # noqa: S311  no secret
    return [questions[number] for number in sorted(chosen)]


# ---- metrics that need no generated answers


def _measure_tokens(held_out: HeldOut, metrics: Sequence[EvaluationMetric], channel: Channel) -> dict[str, MetricValue]:
    """Loss, perplexity, and accuracy, precision, recall and F1 over the tokens of the answers."""
    from finetune_trainer.evaluation.token_metrics import OutputHead, TokenCounts

    head = OutputHead.of(held_out.model)
    counts = TokenCounts(head.vocabulary_size, held_out.model.get_input_embeddings().weight.device)
    total, done = len(held_out.tokens.input_ids), 0
    for batch in _batches(held_out.tokens, held_out.batch_size):
        _add_batch(held_out, head, batch, counts)
        done += len(batch)
        channel.report_stage(Stage.EVALUATING, f"{done} of {total} rows")
    values = {"loss": counts.loss, "perplexity": counts.perplexity} if EvaluationMetric.PERPLEXITY in metrics else {}
    return values | {metric.value: getattr(counts, metric.value) for metric in CLASSIFICATION_METRICS if metric in metrics}


TokenRow = tuple[list[int], list[int]]
"""Token ids and labels of one row."""


def _batches(tokens: TokenisedSplit, size: int) -> Iterator[list[TokenRow]]:
    rows = list(zip(tokens.input_ids, tokens.labels, strict=True))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _add_batch(held_out: HeldOut, head: Any, batch: Sequence[TokenRow], counts: Any) -> None:
    """Add a batch of rows to the counts. A batch that does not fit into memory is split."""
    import torch

    try:
        counts.add(_predict(held_out, head, batch))
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        _add_batch(held_out, head, batch[:half], counts)
        _add_batch(held_out, head, batch[half:], counts)


def _predict(held_out: HeldOut, head: Any, batch: Sequence[TokenRow]) -> Any:
    """Return the predictions of the labelled positions. The head itself computes only the last position, to save memory."""
    import torch

    from finetune_trainer.evaluation.token_metrics import IGNORED_LABEL, shifted_predictions

    model, longest = held_out.model, max(len(ids) for ids, _ in batch)

    def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=model.get_input_embeddings().weight.device)

    hidden: list[torch.Tensor] = []

    def keep_hidden(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(arguments[0])
        return (arguments[0][:, -1:],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_hidden)
    try:
        with torch.inference_mode():
            ids, mask = padded([ids for ids, _ in batch], held_out.tokenizer.pad_token_id), padded([[1] * len(ids) for ids, _ in batch], 0)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    states = hidden[0][:, -longest:]  # without the virtual tokens of prompt tuning
    with torch.inference_mode():
        return shifted_predictions(states, padded([labels for _, labels in batch], IGNORED_LABEL), head)


def _measure_letters(held_out: HeldOut, channel: Channel) -> dict[str, MetricValue]:
    """Metrics of multiple-choice questions: the model chooses the option whose letter it finds most likely."""
    from finetune_trainer.evaluation.choices import letter_log_probabilities, letter_metrics

    asked = [question for question in held_out.questions if question.letters and question.ground_truth]
    scores = []
    for number, question in enumerate(asked, 1):
        scores.append(
            letter_log_probabilities(
                held_out.model, held_out.tokenizer, question.text, question.letters, add_special_tokens=not question.is_templated
            )
        )
        channel.report_stage(Stage.EVALUATING, f"options of {number} of {len(asked)} questions")
    values = letter_metrics(scores, [str(question.ground_truth) for question in asked])
    return {f"letter{name[0].upper()}{name[1:]}": value for name, value in values.items()}


# ---- generated answers


def _answer_questions(run: RunConfig, held_out: HeldOut, channel: Channel) -> list[Prediction]:
    """Answer the questions with the options of `evaluation.comparison.generation`."""
    from finetune_trainer.stages.generate import generate_answers, generation_options
    from finetune_trainer.stages.questions import end_token_ids

    comparison, questions = run.spec.evaluation.comparison, held_out.questions
    answers = generate_answers(
        held_out.model, held_out.tokenizer, [question.token_ids for question in questions],
        options=generation_options(comparison.generation if comparison else None),
        end_ids=end_token_ids(held_out.tokenizer, held_out.model, held_out.tokens.labels), batch_size=held_out.batch_size,
        seed=int(value_or_default(run.spec.training, "seed")),
        on_progress=lambda count: channel.report_stage(Stage.EVALUATING, f"{count} of {len(questions)} answers"),
    )  # fmt: skip
    return [
        Prediction(question.system_prompt, question.user_prompt, answer, question.ground_truth)
        for question, answer in zip(questions, answers, strict=True)
    ]
