"""Runs the stage `benchmarking`: all benchmarks with the final model and, if the spec requests it, with the base model."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_api.benchmarks import DEFAULT_RATING_QUESTION_COUNT, BenchmarkKind
from finetune_api.errors import ConfigError, DataError
from finetune_api.pod import RunConfig
from finetune_api.rules import value_or_default
from finetune_api.spec.enums import OverflowPolicy
from finetune_api.spec.results import Generation
from finetune_api.status import EvaluationResult, Stage

from finetune_trainer.benchmarks import generated_code, harness
from finetune_trainer.benchmarks.domain_files import (
    DomainQuestion,
    compute_keyword_recall,
    find_domain_files,
    read_domain,
)
from finetune_trainer.benchmarks.harness import LoadedModel
from finetune_trainer.benchmarks.plan import BenchmarkTask, plan_tasks
from finetune_trainer.benchmarks.rating_sheets import build_sheet_rows, write_sheets
from finetune_trainer.benchmarks.records import (
    FinishedTasks,
    Measurement,
    TaskRecord,
    combine_results,
    to_status_results,
    write_results,
)
from finetune_trainer.channel import Channel
from finetune_trainer.data.load import LoadedData, load
from finetune_trainer.data.prepare import choose_chat_template, max_sequence_length, render_options
from finetune_trainer.data.rows import Conversation, Example, Prompt, RawRow, Turn
from finetune_trainer.data.template import RenderOptions
from finetune_trainer.data.tokenise import TokeniseOptions
from finetune_trainer.evaluation import text_metrics
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.values import MetricValue, mean_of_rows
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.files import OUTPUT_FOLDER, PARTS_FOLDER, StageResult, StageTask
from finetune_trainer.stages.questions import Question

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 5.0
ROWS_WITH_END_TOKENS = 20
"""Number of data rows that are read to find the tokens with which the model learned to end its answers."""


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Run all tasks that are not finished yet, and write the results. Errors: if tasks failed, the error of the first failed task."""
    tasks, finished_tasks = plan_tasks(run, inputs.benchmarks), FinishedTasks(folder / PARTS_FOLDER)
    runner = _TaskRunner(run, channel, inputs, task)
    failures: list[ConfigError] = []
    records: list[TaskRecord] = []
    for number, benchmark_task in enumerate(tasks, 1):
        channel.report_stage(Stage.BENCHMARKING, f"task {number} of {len(tasks)}: {benchmark_task.label}")
        record = finished_tasks.read(benchmark_task)
        if record is None:
            try:
                record = runner.run_task(benchmark_task)
            except ConfigError as error:  # Raised after all other tasks have run, so that a repeated stage repeats only failed tasks.
                log.error("%s: %s", error.code, error.message)
                failures.append(error)
                continue
            finished_tasks.write(benchmark_task, record)
        records.append(record)
    if failures:
        if other_count := len(failures) - 1:
            failures[0].message += f"; {other_count} other {'task' if other_count == 1 else 'tasks'} failed, too: see the pod's log"
        raise failures[0]
    output_folder, result_entries = folder / OUTPUT_FOLDER, combine_results(tasks, records)
    write_results(output_folder, tasks, result_entries)
    _write_sheets(output_folder, run, tasks, records)
    return StageResult(evaluation=EvaluationResult(benchmarks=to_status_results(result_entries) or None))


def _write_sheets(output_folder: Path, run: RunConfig, tasks: Sequence[BenchmarkTask], records: Sequence[TaskRecord]) -> None:
    record_by_uses_base = {task.uses_base: record for task, record in zip(tasks, records, strict=True) if task.kind is BenchmarkKind.RATING_SHEETS}
    if record_by_uses_base:
        base_answers = record_by_uses_base[True].answers if True in record_by_uses_base else None
        trained_record = record_by_uses_base[False]
        write_sheets(output_folder, *build_sheet_rows(trained_record.prompts, trained_record.answers, base_answers, seed=_get_seed(run)))


def _get_seed(run: RunConfig) -> int:
    return int(value_or_default(run.spec.training, "seed"))


@dataclass
class _TaskRunner:
    """Runs single tasks. Only one model is on the device at a time: the trained model or the base model."""

    run: RunConfig
    channel: Channel
    inputs: Inputs
    task: StageTask
    _loaded_model: LoadedModel | None = field(default=None, init=False)
    _is_base_loaded: bool = field(default=False, init=False)
    _last_heartbeat_time: float = field(default=0.0, init=False)

    def run_task(self, task: BenchmarkTask) -> TaskRecord:
        loaded_model = self._get_model(uses_base=task.uses_base)
        match task.kind:
            case BenchmarkKind.HARNESS:
                return harness.run_task(loaded_model, task)
            case BenchmarkKind.DOMAINS:
                return self._run_domain(loaded_model, task)
            case BenchmarkKind.CODE:
                return self._run_code(loaded_model, task)
            case BenchmarkKind.RATING_SHEETS:
                return self._answer_held_out_questions(loaded_model, task)

    # ---- models ----

    def _get_model(self, *, uses_base: bool) -> LoadedModel:
        if self._loaded_model is None or self._is_base_loaded != uses_base:
            self._loaded_model = None
            _free_memory()
            self._loaded_model, self._is_base_loaded = self._load_model(uses_base=uses_base), uses_base
        return self._loaded_model

    def _load_model(self, *, uses_base: bool) -> LoadedModel:
        from finetune_trainer import hardware
        from finetune_trainer.stages.final_model import load_base_model, load_final_model, load_tokenizer

        detected_hardware = hardware.detect_hardware(self.run, 0)
        tokenizer = load_tokenizer(self.run, self.inputs, self.task)
        if uses_base:
            model = load_base_model(self.run, self.inputs, detected_hardware)
        else:
            model = load_final_model(self.run, self.inputs, self.task, detected_hardware, tokenizer)
        if uses_base and model.get_input_embeddings().weight.shape[0] < len(tokenizer):  # The training added tokens to the vocabulary.
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.register_forward_pre_hook(self._send_heartbeat)
        spec = self.run.spec
        return LoadedModel(model, tokenizer, spec.evaluation.batch_size_per_device or spec.training.batch_size_per_device or 1, _get_seed(self.run))

    def _send_heartbeat(self, *_: Any) -> None:
        """Send a heartbeat, at most every `HEARTBEAT_SECONDS`. Called before each forward pass, so that a long task does not count as stalled."""
        if time.monotonic() - self._last_heartbeat_time > HEARTBEAT_SECONDS:
            self._last_heartbeat_time = time.monotonic()
            self.channel.send_heartbeat()

    # ---- questions ----

    def _render_questions(self, loaded_model: LoadedModel, rows: Sequence[tuple[RawRow, Example]]) -> list[Question]:
        """Convert examples to questions, and render the questions as in training."""
        from finetune_trainer.stages.questions import read_questions

        return read_questions(rows, *self._build_text_options(loaded_model.tokenizer))

    def _build_text_options(self, tokenizer: Any) -> tuple[RenderOptions, TokeniseOptions]:
        from finetune_trainer import model as models

        run, dataset = self.run, self.run.spec.dataset
        rendering_options = render_options(run, tokenizer, choose_chat_template(run, self.inputs, tokenizer), self._held_out_data.summary.format_with_turns)
        max_length = max_sequence_length(run, tokenizer, models.max_positions(models.load_config(run, self.inputs)))
        return rendering_options, TokeniseOptions(max_length, OverflowPolicy.TRUNCATE, dataset.add_eos_token is not False, dataset.add_bos_token)

    @cached_property
    def _held_out_data(self) -> LoadedData:
        """The held-out rows of the run, and the first `ROWS_WITH_END_TOKENS` training rows."""
        return load(self.run, self.inputs, training_rows=ROWS_WITH_END_TOKENS)

    def _find_end_token_ids(self, loaded_model: LoadedModel) -> list[int]:
        """Return the ids of all tokens that end an answer, including those that the model learned in training."""
        from finetune_trainer.stages.questions import end_token_ids, select_held_out_rows, tokenise_answered

        rows = (select_held_out_rows(self._held_out_data) or self._held_out_data.train)[:ROWS_WITH_END_TOKENS]
        try:
            labels = tokenise_answered(self.run, rows, *self._build_text_options(loaded_model.tokenizer)).labels
        except DataError:  # These rows contain no answer.
            labels = []
        return end_token_ids(loaded_model.tokenizer, loaded_model.model, labels)

    def _generate_answers(self, loaded_model: LoadedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int | None = None) -> list[str]:
        """Generate an answer to each prompt.

        If `max_new_tokens` is set, the answers are generated greedily. If `max_new_tokens` is None, the options of `evaluation.comparison.generation` apply.
        """
        from finetune_trainer.stages.generate import build_generation_options, generate_answers

        comparison = self.run.spec.evaluation.comparison
        generation = Generation(max_new_tokens=max_new_tokens) if max_new_tokens else comparison.generation if comparison else None
        return generate_answers(
            loaded_model.model, loaded_model.tokenizer, prompts, options=build_generation_options(generation),
            end_ids=self._find_end_token_ids(loaded_model), batch_size=loaded_model.batch_size, seed=loaded_model.seed, on_progress=lambda _: None,
        )  # fmt: skip

    # ---- kinds of tasks ----

    def _answer_held_out_questions(self, loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
        """Generate answers to a random sample of the held-out rows, for a sheet on which people rate the answers."""
        from finetune_trainer.stages.questions import select_held_out_rows

        questions = self._render_questions(loaded_model, select_held_out_rows(self._held_out_data))
        if not questions:
            raise ConfigError(
                "NoQuestions", f"{task.field}: no row of the test or validation set asks a question",
                hint=f"add rows with questions and answers to dataset.test, or remove {task.benchmark.name}",
            )  # fmt: skip
        question_count = min(len(questions), task.benchmark.limit or DEFAULT_RATING_QUESTION_COUNT)
        chosen_indices = sorted(random.Random(loaded_model.seed).sample(range(len(questions)), question_count))  # noqa: S311  no secret
        asked_questions = [questions[index] for index in chosen_indices]
        return TaskRecord(
            prompts=[question.user_prompt for question in asked_questions],
            answers=self._generate_answers(loaded_model, [question.token_ids for question in asked_questions])
        )

    def _run_domain(self, loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
        """Let the model answer the questions of a domain, and compare its answers with the expected texts.

        For a multiple-choice question, no answer is generated: the model's choice is the letter with the highest probability.
        """
        assert task.folder is not None
        domain_questions = read_domain(find_domain_files(task.folder)[task.name])[: task.benchmark.limit]
        rows_and_examples = [(RawRow(task.folder, number, {}), self._to_example(question)) for number, question in enumerate(domain_questions, 1)]
        questions = self._render_questions(loaded_model, rows_and_examples)
        question_pairs = list(zip(domain_questions, questions, strict=True))
        values = self._compare_answers(loaded_model, [pair for pair in question_pairs if not pair[0].choices])
        values |= _measure_choice_accuracy(loaded_model, [pair for pair in question_pairs if pair[0].choices])
        return TaskRecord(
            measurements=[
                Measurement(task=task.name, metric=name, value=value.value, samples=len(value.scores) or len(domain_questions), reason=value.reason)
                for name, value in values.items()
            ]
        )

    def _to_example(self, domain_question: DomainQuestion) -> Example:
        system = self.run.spec.dataset.system_prompt
        turns = (*([Turn("system", system)] if system else []), Turn("user", domain_question.text))
        answer = domain_question.reference if domain_question.correct is None else domain_question.letters[domain_question.correct]
        return Prompt(turns, {"answer": answer}) if answer is None else Conversation((*turns, Turn("assistant", answer)), role_names=("Question", "Answer"))

    def _compare_answers(self, loaded_model: LoadedModel, pairs: Sequence[tuple[DomainQuestion, Question]]) -> dict[str, MetricValue]:
        if not pairs:
            return {}
        answers = self._generate_answers(loaded_model, [question.token_ids for _, question in pairs])
        predictions = [
            Prediction(None, domain_question.question, answer, domain_question.reference)
            for (domain_question, _), answer in zip(pairs, answers, strict=True)
        ]
        values = {"bleu": text_metrics.bleu(predictions), **text_metrics.rouge(predictions), "exactMatch": text_metrics.exact_match(predictions)}
        keyword_recalls = [
            compute_keyword_recall(answer, domain_question.keywords)
            for (domain_question, _), answer in zip(pairs, answers, strict=True) if domain_question.keywords
        ]
        return values | ({"keywordRecall": mean_of_rows(keyword_recalls, {})} if keyword_recalls else {})

    def _run_code(self, loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
        """Let the model complete each function greedily, and run the function's tests. The metric `pass@1` is the share of functions that pass their tests."""
        assert task.folder is not None
        problems = generated_code.read_problems(task.folder, f"{task.field}.folder")[: task.benchmark.limit]
        prompts = [loaded_model.tokenizer(problem.prompt)["input_ids"] for problem in problems]
        completions = self._generate_answers(loaded_model, prompts, max_new_tokens=generated_code.MAX_NEW_TOKENS)
        passed_flags = []
        for problem, completion in zip(problems, completions, strict=True):
            passed_flags.append(float(generated_code.completion_passes_tests(problem, completion)))
            self.channel.send_heartbeat()
        passed_share = sum(passed_flags) / len(passed_flags)
        stderr = (passed_share * (1 - passed_share) / (len(passed_flags) - 1)) ** 0.5 if len(passed_flags) > 1 else None
        return TaskRecord(measurements=[Measurement(task=task.name, metric="pass@1", value=passed_share, stderr=stderr, samples=len(passed_flags))])


def _measure_choice_accuracy(loaded_model: LoadedModel, pairs: Sequence[tuple[DomainQuestion, Question]]) -> dict[str, MetricValue]:
    """Return the accuracy of multiple-choice questions. The model's choice is the letter with the highest probability."""
    if not pairs:
        return {}
    from finetune_trainer.evaluation.choices import letter_log_probabilities, letter_metrics

    scores = [
        letter_log_probabilities(
            loaded_model.model, loaded_model.tokenizer, question.text, domain_question.letters, add_special_tokens=not question.is_templated
        )
        for domain_question, question in pairs
    ]
    return {"accuracy": letter_metrics(scores, [domain_question.letters[domain_question.correct or 0] for domain_question, _ in pairs])["accuracy"]}


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
