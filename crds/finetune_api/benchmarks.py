"""Names of benchmarks and of their tasks. Operator, command line and trainer use these tables."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BenchmarkKind(StrEnum):
    """What a benchmark of `evaluation.benchmarks` does."""

    HARNESS = "harness"
    """Runs tasks of the lm-evaluation-harness."""
    DOMAINS = "domains"
    """Asks the questions of domain files and compares the answers with the expected ones."""
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

`human-eval` means rating sheets, because two of the five imported tools use the name in this way.
"""

CURRENT_TASK_NAMES = {"truthfulqa_mc": ("truthfulqa_mc1", "truthfulqa_mc2")}
"""Old names of harness tasks and the tasks that replace them. All other names are those of the harness."""


@dataclass(frozen=True)
class BundledTask:
    """A task whose definition the harness contains. Its data set must be in the benchmark's folder."""

    definition: str
    """Folder of the definition, below the task folder of the harness."""
    dataset: str
    """Hub repository of the data set. A copy must be at this path below the benchmark's folder."""


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
"""Tasks that need no definition in the benchmark's folder. For all other tasks, the folder must also contain the definition."""

DEFAULT_RATING_QUESTIONS = 50
"""Number of questions of a rating sheet if the benchmark has no `limit`."""


def current_task_names(tasks: list[str]) -> list[str]:
    """Replace old task names. Each name is returned once, in the order of the list."""
    return list(dict.fromkeys(name for task in tasks for name in CURRENT_TASK_NAMES.get(task, (task,))))
