"""Lists the tasks of all benchmarks of a run, and checks the contents of the benchmarks' folders. Imports no large library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_api.benchmarks import BENCHMARK_KINDS, BenchmarkKind
from finetune_api.pod import RunConfig
from finetune_api.rules import benchmarks_after_training
from finetune_api.spec.results import Benchmark

from finetune_trainer.benchmarks import generated_code
from finetune_trainer.benchmarks.domain_files import select_domains
from finetune_trainer.benchmarks.task_folder import TaskFolder

SHEET_TASK = "rating sheets"


@dataclass(frozen=True)
class BenchmarkTask:
    """One task of a benchmark, to be run with either the trained model or the base model."""

    kind: BenchmarkKind
    benchmark: Benchmark
    field: str
    """Path of the benchmark in the spec, such as `evaluation.benchmarks[0]`. Messages name it."""
    name: str
    """Name of the task or domain."""
    folder: Path | None
    uses_base: bool = False
    """Whether the base model runs the task."""

    @property
    def label(self) -> str:
        """The name of the task, for progress reports."""
        return f"{self.name} with the base model" if self.uses_base else self.name


def plan_tasks(run: RunConfig, folders: Sequence[Path | None]) -> list[BenchmarkTask]:
    """Return all tasks in the order in which they run: first the trained model's tasks, then the base model's tasks.

    `folders`: the local folder of each benchmark of the spec. Errors: ConfigError of the modules that read the folders.
    """
    trained_model_tasks = []
    for number, (benchmark, folder) in enumerate(zip(benchmarks_after_training(run.spec), folders, strict=True)):
        kind, field = BENCHMARK_KINDS[benchmark.name], f"evaluation.benchmarks[{number}]"
        trained_model_tasks += [BenchmarkTask(kind, benchmark, field, name, folder) for name in _list_task_names(kind, benchmark, f"{field}.folder", folder)]
    base_model_tasks = [replace(task, uses_base=True) for task in trained_model_tasks if task.benchmark.compare_with_base]
    return [*trained_model_tasks, *base_model_tasks]


def _list_task_names(kind: BenchmarkKind, benchmark: Benchmark, field: str, folder: Path | None) -> list[str]:
    if kind is BenchmarkKind.RATING_SHEETS:
        return [SHEET_TASK]
    assert folder is not None, "a rule requires the folder"
    match kind:
        case BenchmarkKind.HARNESS:
            return TaskFolder.read(folder, field, allows_code=benchmark.allow_code_execution is True).select(benchmark.tasks)
        case BenchmarkKind.DOMAINS:
            return select_domains(folder, field, benchmark.tasks)
        case BenchmarkKind.CODE:
            generated_code.read_problems(folder, field)
            return [generated_code.HUMANEVAL_TASK]
