"""Tables of the benchmarks and their tasks, for operator, command line and trainer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BenchmarkKind(StrEnum):
    """What a benchmark of `evaluation.benchmarks` does."""

    HARNESS = "harness"
    """Runs tasks of the lm-evaluation-harness."""
    DOMAINS = "domains"
    """Asks the questions in domain files and compares the answers with the expected answers."""
    RATING_SHEETS = "ratingSheets"
    """Writes sheets in which people rate the answers."""
    CODE = "code"
    """Runs generated code against unit tests (the HumanEval data set)."""


BENCHMARK_KINDS = {
    "lm-eval": BenchmarkKind.HARNESS,
    "lm-evaluation-harness": BenchmarkKind.HARNESS,
    "domain-specific-eval": BenchmarkKind.DOMAINS,
    "human-eval": BenchmarkKind.RATING_SHEETS,
    "openai-humaneval": BenchmarkKind.CODE,
}
"""The kind of each benchmark, by its name in the spec.

`human-eval` means rating sheets that people fill in, not the HumanEval data set. Two of the five tools whose configuration files `finetune import` reads also
use the name `human-eval` for rating sheets.
"""

REPLACEMENTS_OF_OLD_TASKS = {"truthfulqa_mc": ("truthfulqa_mc1", "truthfulqa_mc2")}
"""Maps each old name of a harness task to the tasks that replace it. A task name that is not in this table is kept unchanged."""


@dataclass(frozen=True)
class BundledTask:
    """A task whose definition the harness contains. The data set of the task must be in the benchmark's folder."""

    definition_folder: str
    """Folder of the task's definition, relative to the task folder of the harness."""
    dataset_repository: str
    """Hub repository of the data set. The benchmark's folder must contain a copy at this path."""


BUNDLED_TASKS = {
    "hellaswag": BundledTask("hellaswag", "Rowan/hellaswag"),
    "mmlu": BundledTask("mmlu/default", "cais/mmlu"),
    "truthfulqa_mc1": BundledTask("truthfulqa", "truthfulqa/truthful_qa"),
    "truthfulqa_mc2": BundledTask("truthfulqa", "truthfulqa/truthful_qa"),
    "winogrande": BundledTask("winogrande", "allenai/winogrande"),
    "gsm8k": BundledTask("gsm8k", "openai/gsm8k"),
    "arc_challenge": BundledTask("arc", "allenai/ai2_arc"),
    "arc_easy": BundledTask("arc", "allenai/ai2_arc"),
}
"""Tasks whose definitions the harness contains, so the benchmark's folder needs only their data.

For all other tasks, the folder must contain the data and the definition.
"""

DEFAULT_RATING_QUESTION_COUNT = 50
"""Number of questions in a rating sheet if the benchmark sets no `limit`."""


def replace_old_task_names(tasks: list[str]) -> list[str]:
    """Return the task names in the same order and without duplicates. Old names are replaced by current names."""
    return list(dict.fromkeys(name for task in tasks for name in REPLACEMENTS_OF_OLD_TASKS.get(task, (task,))))
