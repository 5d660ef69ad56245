"""Rules for `spec.evaluation.benchmarks`. The trainer checks the contents of the benchmark folders before it trains."""

from __future__ import annotations

import difflib

from finetune_api.benchmarks import BENCHMARK_KINDS, BUNDLED_TASKS, BenchmarkKind, replace_old_task_names
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import has_test_set, has_validation_set
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.results import Benchmark

FIELDS_BY_BENCHMARK_KIND = {
    BenchmarkKind.HARNESS: ("tasks", "folder", "limit", "compare_with_base", "few_shot", "apply_chat_template", "allow_code_execution"),
    BenchmarkKind.DOMAINS: ("tasks", "folder", "limit", "compare_with_base"),
    BenchmarkKind.RATING_SHEETS: ("limit", "compare_with_base"),
    BenchmarkKind.CODE: ("folder", "limit", "compare_with_base", "allow_code_execution"),
}
"""For each kind of benchmark, the fields that have an effect on it. `name` is not listed, because all benchmarks have it."""
FOLDER_EXAMPLE = "folder: s3://bucket/benchmarks"
FOLDER_REASONS = {
    BenchmarkKind.HARNESS: "the tasks of the harness need their data in a folder, because benchmarks have no access to the hub",
    BenchmarkKind.DOMAINS: "it needs the domain files, for example domain_medical.json",
    BenchmarkKind.CODE: "it needs a copy of the data set openai/openai_humaneval",
}
"""For each kind of benchmark that needs a folder, the reason for this need. In the error message, the reason follows the word `but`."""


def to_wire_name(field: str) -> str:
    """Return the name that a field of `Benchmark` has in the spec, such as `fewShot`."""
    return Benchmark.model_fields[field].alias or field


@rule("BenchmarkUnknown")
def check_benchmark_names(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        if benchmark.name in BENCHMARK_KINDS:
            continue
        hint = f"write one of {', '.join(BENCHMARK_KINDS)}"
        if benchmark.name in BUNDLED_TASKS or replace_old_task_names([benchmark.name]) != [benchmark.name]:
            hint = f"this is a task of the harness: write `name: lm-eval, tasks: [{benchmark.name}]`"
        elif similar_names := difflib.get_close_matches(benchmark.name, BENCHMARK_KINDS, n=1):
            hint = f"did you mean {similar_names[0]}?"
        yield f"evaluation.benchmarks[{i}].name", f"{benchmark.name!r} is not a known benchmark", hint


@rule("BenchmarkFolderMissing")
def check_benchmark_folders(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        kind = BENCHMARK_KINDS.get(benchmark.name)
        if kind in FOLDER_REASONS and benchmark.folder is None:
            yield (
                f"evaluation.benchmarks[{i}].folder",
                f"the benchmark {benchmark.name} has no folder, but {FOLDER_REASONS[kind]}",
                f"write for example `{FOLDER_EXAMPLE}`, or remove the benchmark",
            )


@rule("CodeExecutionNotAllowed")
def check_code_execution(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        if BENCHMARK_KINDS.get(benchmark.name) is BenchmarkKind.CODE and not benchmark.allow_code_execution:
            yield (
                f"evaluation.benchmarks[{i}].allowCodeExecution",
                f"the benchmark {benchmark.name} runs code that the model generates, but allowCodeExecution is not true",
                "write `allowCodeExecution: true`, or remove the benchmark; for sheets in which people rate answers write `name: human-eval`",
            )


@rule("BenchmarkOptionWithoutEffect")
def check_options_without_effect(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        kind = BENCHMARK_KINDS.get(benchmark.name)
        if kind is None:
            continue
        for field in Benchmark.model_fields:
            value = getattr(benchmark, field)
            if field != "name" and field not in FIELDS_BY_BENCHMARK_KIND[kind] and value is not None and value is not False:
                path = f"evaluation.benchmarks[{i}].{to_wire_name(field)}"
                yield path, f"{to_wire_name(field)} has no effect on the benchmark {benchmark.name}", f"remove {to_wire_name(field)}"
    if spec.evaluation.benchmarks and spec.phases.evaluate is False:
        yield (
            "evaluation.benchmarks",
            "the benchmarks have no effect, because phases.evaluate is false",
            "remove `evaluate: false`, or remove evaluation.benchmarks",
        )


@rule("BenchmarkRepeated")
def check_repeated_benchmarks(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    earlier_kinds_and_tasks: set[tuple[BenchmarkKind, str]] = set()
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        kind = BENCHMARK_KINDS.get(benchmark.name)
        if kind is None:
            continue
        folder = benchmark.folder or ""
        is_rating_sheet = kind is BenchmarkKind.RATING_SHEETS
        kinds_and_tasks = {(kind, task) for task in replace_old_task_names(benchmark.tasks or [])} or {(kind, "" if is_rating_sheet else f"all of {folder}")}
        if repeated_tasks := sorted(task for _, task in kinds_and_tasks & earlier_kinds_and_tasks):
            repeated_text = f"the task {repeated_tasks[0]}" if benchmark.tasks else "the same tasks" if folder else "the same sheets"
            yield f"evaluation.benchmarks[{i}]", f"another benchmark of the list has {repeated_text}", "remove one of the two benchmarks"
        earlier_kinds_and_tasks |= kinds_and_tasks


@rule("BenchmarkRowsMissing")
def check_rows_for_rating_sheets(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if has_test_set(spec) or has_validation_set(spec):
        return
    for i, benchmark in enumerate(spec.evaluation.benchmarks or []):
        if BENCHMARK_KINDS.get(benchmark.name) is BenchmarkKind.RATING_SHEETS:
            yield (
                f"evaluation.benchmarks[{i}]",
                f"the sheets of {benchmark.name} need questions, but the spec contains neither test data nor validation data",
                "write for example `dataset: {test: s3://bucket/test.jsonl}` or `dataset: {split: {test: 0.1}}`",
            )
