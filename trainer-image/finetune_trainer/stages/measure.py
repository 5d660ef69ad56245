"""Measures one model on the held-out rows: the trained model in the stage `evaluating`, the base model in the stage `comparing`.

Both stages use the same rows, questions and options, so that their results can be compared row by row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_api.errors import DataError
from finetune_api.pod import RunConfig
from finetune_api.rules import (
    compares_answers,
    metrics_after_training,
    prompts_to_compare,
    value_or_default,
    writes_predictions,
)
from finetune_api.spec.enums import EvaluationMetric, OverflowPolicy
from finetune_api.status import Stage

from finetune_trainer.channel import Channel
from finetune_trainer.data.load import load
from finetune_trainer.data.prepare import choose_chat_template, max_sequence_length, render_options
from finetune_trainer.data.tokenise import TokeniseOptions
from finetune_trainer.evaluation.measurements import Measurements
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.inputs import Inputs
from finetune_trainer.results.model_comparison import read_prompts
from finetune_trainer.stages.files import StageTask
from finetune_trainer.stages.questions import Question, TokenRows

CLASSIFICATION_METRICS = (EvaluationMetric.ACCURACY, EvaluationMetric.PRECISION, EvaluationMetric.RECALL, EvaluationMetric.F1)
TOKEN_METRICS = (EvaluationMetric.PERPLEXITY, *CLASSIFICATION_METRICS)
"""Metrics that need no generated answers."""
ROWS_FOR_END_TOKENS = 100
"""Number of training rows that are read to find the tokens that end answers, if a job has no held-out rows."""

ModelLoader = Callable[[RunConfig, Inputs, StageTask, Any, Any], Any]
"""A function that loads a model in evaluation mode. Its arguments are the run, inputs, task, hardware and tokenizer."""


@dataclass
class HeldOutEvaluation:
    """A model, with the rows, questions and prompts on which it is evaluated."""

    stage: Stage
    model: Any
    tokenizer: Any
    tokens: TokenRows
    """All held-out rows, each with its answer."""
    questions: list[Question]
    """The questions that the model answers: the questions in all held-out rows, or in `evaluation.maxRows` of these rows."""
    batch_size: int
    end_token_ids: list[int]
    """Ids of the tokens that end an answer."""
    prompts: list[Question] = field(default_factory=list)
    """The prompts of `evaluation.comparison.promptsRef`."""


@dataclass
class ModelResults:
    """The results of one model on the held-out rows."""

    measurements: Measurements
    predictions: list[Prediction]
    """The answers to the held-out questions. Empty if neither a metric nor a result file needs answers."""


def measure_model(run: RunConfig, channel: Channel, inputs: Inputs, held_out: HeldOutEvaluation) -> ModelResults:
    """Compute the metrics in `evaluation.metrics`, and let the model answer the questions and prompts whose answers the job compares or stores."""
    metrics, values = metrics_after_training(run.spec), dict[str, MetricValue]()
    token_sums: list[list[float]] = []
    if any(metric in TOKEN_METRICS for metric in metrics):
        token_values, token_sums = _measure_tokens(held_out, metrics, channel)
        values |= token_values
    if any(metric in CLASSIFICATION_METRICS for metric in metrics) and any(question.letters for question in held_out.questions):
        values |= _measure_letters(held_out, channel)
    predictions = _predict_answers(run, held_out, channel) if _needs_answers(run, held_out.stage) else []
    if predictions and metrics:
        from finetune_trainer.stages.answer_metrics import measure_answers

        values |= measure_answers(run, channel, held_out.stage, inputs, metrics, predictions)
    measurements = Measurements(
        row_count=len(held_out.tokens.input_ids) if metrics or predictions else 0, token_sums=token_sums,
        bleu_sums=_compute_bleu_sums(predictions) if EvaluationMetric.BLEU in metrics else [],
        answers=_collect_compared_answers(run, held_out, predictions, channel), end_token_ids=held_out.end_token_ids,
    )  # fmt: skip
    return ModelResults(measurements.with_values(values), predictions)


def _needs_answers(run: RunConfig, stage: Stage) -> bool:
    """Whether a metric, the comparison or (trained model only) the file of predictions needs the model's answers to the held-out questions."""
    has_text_metric = any(metric not in TOKEN_METRICS for metric in metrics_after_training(run.spec))
    return has_text_metric or _compares_questions(run) or (stage is Stage.EVALUATING and writes_predictions(run.spec))


def _compares_questions(run: RunConfig) -> bool:
    return compares_answers(run.spec) and prompts_to_compare(run.spec) is None


def _collect_compared_answers(run: RunConfig, held_out: HeldOutEvaluation, predictions: Sequence[Prediction], channel: Channel) -> list[str] | None:
    """Return the answers for `model_comparison.json`: those to the prompts, or those to the held-out questions if the spec has no prompts. Return None
    if the job compares no answers.
    """
    if held_out.prompts:
        return answer_questions(run, held_out, held_out.prompts, channel)
    return [prediction.assistant_response for prediction in predictions] if _compares_questions(run) else None


def _compute_bleu_sums(predictions: Sequence[Prediction]) -> list[list[float]]:
    from finetune_trainer.evaluation.text_metrics import bleu_sums

    return bleu_sums(predictions)


def _predict_answers(run: RunConfig, held_out: HeldOutEvaluation, channel: Channel) -> list[Prediction]:
    answers = answer_questions(run, held_out, held_out.questions, channel)
    return [
        Prediction(question.system_prompt, question.user_prompt, answer, question.ground_truth)
        for question, answer in zip(held_out.questions, answers, strict=True)
    ]


def load_held_out(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, load_model: ModelLoader) -> HeldOutEvaluation:
    """Load the model, and tokenise the rows, questions and prompts with the same code as in training."""
    from finetune_trainer import hardware
    from finetune_trainer import model as models
    from finetune_trainer.stages.final_model import load_tokenizer
    from finetune_trainer.stages.questions import (
        end_token_ids,
        prompts_to_examples,
        read_questions,
        select_held_out_rows,
        tokenise_answered,
    )

    channel.report_stage(task.stage, "loading the model")
    tokenizer = load_tokenizer(run, inputs, task)
    model = load_model(run, inputs, task, hardware.detect_hardware(run, 0), tokenizer)
    loaded_data, dataset = load(run, inputs, training_rows=ROWS_FOR_END_TOKENS), run.spec.dataset
    rows = select_held_out_rows(loaded_data)
    rendering_options = render_options(run, tokenizer, choose_chat_template(run, inputs, tokenizer), loaded_data.summary.format_with_turns)
    max_length = max_sequence_length(run, tokenizer, models.max_positions(models.load_config(run, inputs)))
    tokenise_options = TokeniseOptions(max_length, OverflowPolicy.TRUNCATE, dataset.add_eos_token is not False, dataset.add_bos_token)
    examples = rows or loaded_data.train
    tokens = tokenise_answered(run, examples, rendering_options, tokenise_options)
    prompts = read_prompts(prompts_to_compare(run.spec), inputs.config_maps)
    compared_questions = read_questions(prompts_to_examples(prompts, examples[0][1], dataset.system_prompt), rendering_options, tokenise_options)
    if len(compared_questions) < len(prompts):
        refused_count = len(prompts) - len(compared_questions)
        raise DataError("PromptRefused", f"the chat template refuses {refused_count} of {len(prompts)} prompts", hint="remove dataset.systemPrompt")
    return HeldOutEvaluation(
        task.stage, model, tokenizer, tokens if rows else TokenRows(), _sample_questions(read_questions(rows, rendering_options, tokenise_options), run),
        run.spec.evaluation.batch_size_per_device or run.spec.training.batch_size_per_device or 1,
        end_token_ids(tokenizer, model, tokens.labels), compared_questions,
    )  # fmt: skip


def _sample_questions(questions: list[Question], run: RunConfig) -> list[Question]:
    """Return at most `evaluation.maxRows` questions, chosen at random with the run's seed, in the order of their rows."""
    limit = run.spec.evaluation.max_rows
    if limit is None or limit >= len(questions):
        return questions
    chosen_indices = random.Random(value_or_default(run.spec.training, "seed")).sample(range(len(questions)), limit)  # noqa: S311  no secret
    return [questions[index] for index in sorted(chosen_indices)]


# ---- metrics that need no generated answers


def _measure_tokens(held_out: HeldOutEvaluation, metrics: Sequence[EvaluationMetric], channel: Channel) -> tuple[dict[str, MetricValue], list[list[float]]]:
    """Return the requested metrics over the tokens of all answers, and the sums for each row. The comparison with the base model needs these sums."""
    from finetune_trainer.evaluation.token_metrics import OutputHead, RowCounts, TokenCounts

    head, row_counts = OutputHead.of(held_out.model), RowCounts()
    token_counts = TokenCounts(head.vocabulary_size, held_out.model.get_input_embeddings().weight.device)
    row_count, done_count = len(held_out.tokens.input_ids), 0
    for batch in _split_into_batches(held_out.tokens, held_out.batch_size):
        _add_batch(held_out, head, batch, token_counts, row_counts)
        done_count += len(batch)
        channel.report_stage(held_out.stage, f"{done_count} of {row_count} rows")
    values = {"loss": token_counts.loss, "perplexity": token_counts.perplexity} if EvaluationMetric.PERPLEXITY in metrics else {}
    values |= {metric.value: getattr(token_counts, metric.value) for metric in CLASSIFICATION_METRICS if metric in metrics}
    return values, row_counts.sums()


TokenRow = tuple[list[int], list[int]]
"""The token ids and the labels of one row."""


def _split_into_batches(tokens: TokenRows, size: int) -> Iterator[list[TokenRow]]:
    rows = list(zip(tokens.input_ids, tokens.labels, strict=True))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _add_batch(held_out: HeldOutEvaluation, head: Any, batch: Sequence[TokenRow], token_counts: Any, row_counts: Any) -> None:
    """Add the predictions for a batch of rows to the counts. If the batch does not fit into memory, split it."""
    import torch

    try:
        predictions = _predict_labelled_positions(held_out, head, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        half_size = len(batch) // 2
        _add_batch(held_out, head, batch[:half_size], token_counts, row_counts)
        _add_batch(held_out, head, batch[half_size:], token_counts, row_counts)
        return
    token_counts.add(predictions)
    row_counts.add(predictions, [labels for _, labels in batch])


def _predict_labelled_positions(held_out: HeldOutEvaluation, head: Any, batch: Sequence[TokenRow]) -> Any:
    """Return the predictions at the labelled positions.

    To save memory, the output head computes only the last position during the model's forward pass. After the forward pass, this function applies the
    head to the labelled positions.
    """
    import torch

    from finetune_trainer.evaluation.token_metrics import IGNORED_LABEL, shifted_predictions

    model, max_row_length = held_out.model, max(len(ids) for ids, _ in batch)

    def pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (max_row_length - len(row))] for row in rows], device=model.get_input_embeddings().weight.device)

    hidden_states: list[torch.Tensor] = []

    def keep_hidden_states(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states.append(arguments[0])
        return (arguments[0][:, -1:],)

    hook_handle = model.get_output_embeddings().register_forward_pre_hook(keep_hidden_states)
    try:
        with torch.inference_mode():
            ids, mask = pad([ids for ids, _ in batch], held_out.tokenizer.pad_token_id), pad([[1] * len(ids) for ids, _ in batch], 0)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook_handle.remove()
    last_hidden_states = hidden_states[0][:, -max_row_length:]  # Remove the virtual tokens of prompt tuning.
    with torch.inference_mode():
        return shifted_predictions(last_hidden_states, pad([labels for _, labels in batch], IGNORED_LABEL), head)


def _measure_letters(held_out: HeldOutEvaluation, channel: Channel) -> dict[str, MetricValue]:
    """Return the metrics of multiple-choice questions. The model's choice is the option whose letter has the highest probability."""
    from finetune_trainer.evaluation.choices import letter_log_probabilities, letter_metrics

    letter_questions = [question for question in held_out.questions if question.letters and question.ground_truth]
    scores = []
    for number, question in enumerate(letter_questions, 1):
        scores.append(
            letter_log_probabilities(
                held_out.model, held_out.tokenizer, question.text, question.letters, add_special_tokens=not question.is_templated
            )
        )
        channel.report_stage(held_out.stage, f"options of {number} of {len(letter_questions)} questions")
    values = letter_metrics(scores, [str(question.ground_truth) for question in letter_questions])
    return {f"letter{name[0].upper()}{name[1:]}": value for name, value in values.items()}


# ---- generated answers


def answer_questions(run: RunConfig, held_out: HeldOutEvaluation, questions: Sequence[Question], channel: Channel) -> list[str]:
    """Return the model's answers to questions, generated with the options of `evaluation.comparison.generation`."""
    from finetune_trainer.stages.generate import build_generation_options, generate_answers

    comparison = run.spec.evaluation.comparison
    return generate_answers(
        held_out.model, held_out.tokenizer, [question.token_ids for question in questions],
        options=build_generation_options(comparison.generation if comparison else None), end_ids=held_out.end_token_ids, batch_size=held_out.batch_size,
        seed=int(value_or_default(run.spec.training, "seed")),
        on_progress=lambda count: channel.report_stage(held_out.stage, f"{count} of {len(questions)} answers"),
    )  # fmt: skip
