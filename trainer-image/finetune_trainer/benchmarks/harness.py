"""Runs tasks of the lm-evaluation-harness with a model that is already loaded.

By itself, the harness loads data sets from the hub and runs code that task definitions name. The trainer prevents both: the harness runs in the
benchmark's folder without access to the hub, `task_folder` has checked the definitions, and templates of tasks run in jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_api.benchmarks import BUNDLED_TASKS
from finetune_api.errors import ConfigError, FineTuneError

from finetune_trainer.benchmarks.plan import BenchmarkTask
from finetune_trainer.benchmarks.records import Measurement, TaskRecord, finite_number_or_none
from finetune_trainer.benchmarks.task_folder import TaskFolder

BOOTSTRAP_ITERATIONS = 1000
"""Number of bootstrap resamples for the standard error of metrics that have no formula for it, such as BLEU."""
UNFILTERED_NAME = "none"
"""The harness reports this name of a filter for metrics that are computed from unfiltered answers."""


def use_local_caches(work_folder: Path) -> None:
    """Configure the harness's libraries: no network access, and caches in the work folder. Call this function before the libraries are imported."""
    caches_folder = work_folder / "benchmark-caches"
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_DATASETS_CACHE": str(caches_folder / "datasets"), "HF_EVALUATE_CACHE": str(caches_folder / "evaluate"),
        "HF_METRICS_CACHE": str(caches_folder / "metrics"),
        "HF_MODULES_CACHE": str(caches_folder / "modules"), "LM_HARNESS_CACHE_PATH": str(caches_folder / "harness"), "TQDM_DISABLE": "1",
    }  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, with its tokenizer and the options with which tasks run."""

    model: Any
    tokenizer: Any
    batch_size: int
    seed: int


def run_task(loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
    """Run one task or group of tasks. Errors: ConfigError BenchmarkTaskFailed; MemoryError and torch.OutOfMemoryError."""
    assert task.folder is not None
    try:
        with contextlib.chdir(task.folder), _sandboxed_templates(allows_code=task.benchmark.allow_code_execution is True):
            return _measure_with_smaller_batches(loaded_model, task)
    except (FineTuneError, MemoryError):
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:500]
        raise ConfigError(
            "BenchmarkTaskFailed", f"{task.field}: the task {task.label} failed: {type(error).__name__}: {cause}",
            hint=f"correct the definition or the data of {task.name} in the folder, or remove it from tasks",
        ) from error  # fmt: skip


def _measure_with_smaller_batches(loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
    """Run a task. If a batch does not fit into memory, run the task again with half the batch size."""
    import torch

    while True:
        try:
            return _measure_task(loaded_model, task)
        except torch.OutOfMemoryError:
            if loaded_model.batch_size == 1:
                raise
            loaded_model = replace(loaded_model, batch_size=(loaded_model.batch_size + 1) // 2)
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _measure_task(loaded_model: LoadedModel, task: BenchmarkTask) -> TaskRecord:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import set_seed

    benchmark = task.benchmark
    if benchmark.apply_chat_template and not loaded_model.tokenizer.chat_template:
        raise ConfigError(
            "ChatTemplateMissing", f"{task.field}.applyChatTemplate is true, but the tokenizer has no chat template",
            hint="remove applyChatTemplate, or give a template in dataset.chatTemplate",
        )  # fmt: skip
    # Otherwise, the harness would tie the weights again. An adapter may have replaced a tied weight, and this replacement would be lost.
    loaded_model.model.tie_weights = lambda *_, **__: None
    harness_model = HFLM(pretrained=loaded_model.model, tokenizer=loaded_model.tokenizer, backend="causal", batch_size=loaded_model.batch_size)
    tasks = _create_task_manager(task).load([task.name])
    for harness_task in tasks["tasks"].values():
        task_shot_count = harness_task.get_config("num_fewshot")
        harness_task.set_config(key="num_fewshot", value=task_shot_count or 0 if benchmark.few_shot is None or task_shot_count == 0 else benchmark.few_shot)
        harness_task.set_fewshot_seed(seed=loaded_model.seed)
    set_seed(loaded_model.seed)
    # The harness's `simple_evaluate` also calls `evaluate`, but then runs pip, git and compilers to describe the machine.
    harness_results = evaluate(
        lm=harness_model, task_dict=tasks, limit=benchmark.limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False,
        apply_chat_template=benchmark.apply_chat_template is True, fewshot_as_multiturn=True,
        confirm_run_unsafe_code=benchmark.allow_code_execution is True,
    )  # fmt: skip
    return TaskRecord(measurements=_to_measurements(harness_results))


def _create_task_manager(task: BenchmarkTask) -> Any:
    """Return the harness's index of the task definitions in one folder.

    The benchmark's folder is used if it defines the task. Otherwise, the folder of the harness that defines the task is used. An
    index of all 14,000 definitions of the harness would take 10 s.
    """
    import lm_eval.tasks

    assert task.folder is not None
    folder = TaskFolder.read(task.folder, f"{task.field}.folder", allows_code=task.benchmark.allow_code_execution is True)
    if folder.is_defined(task.name):
        return lm_eval.tasks.TaskManager(include_path=str(task.folder), include_defaults=False)
    return lm_eval.tasks.TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / BUNDLED_TASKS[task.name].definition_folder), include_defaults=False)


def _to_measurements(harness_results: Any) -> list[Measurement]:
    """Return the metrics in the harness's results: first the metrics of groups, then the metrics of tasks."""
    groups = harness_results.get("groups") or {}
    metrics_by_task = groups | {name: metric_values for name, metric_values in harness_results["results"].items() if name not in groups}
    sample_counts = harness_results.get("n-samples") or {}
    measurements = []
    for name, metric_values in metrics_by_task.items():
        for key, value in metric_values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            finite_value = finite_number_or_none(value)
            measurements.append(
                Measurement(
                    task=name, metric=metric if filter_name == UNFILTERED_NAME else f"{metric},{filter_name}", value=finite_value,
                    stderr=finite_number_or_none(metric_values.get(f"{metric}_stderr,{filter_name}")), samples=(sample_counts.get(name) or {}).get("effective"),
                    reason=None if finite_value is not None else f"the task reports no number for {metric}",
                    is_part_of_group=bool(groups) and name not in groups,
                )
            )  # fmt: skip
    return measurements


@contextlib.contextmanager
def _sandboxed_templates(*, allows_code: bool) -> Iterator[None]:
    """Within the context, render the templates of tasks in jinja's sandbox, unless `allows_code`.

    Outside the sandbox, a template can access Python's classes, so a task definition could run code.
    """
    if allows_code:
        yield
        return
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    original_environment = utils.env
    sandboxed_environment = ImmutableSandboxedEnvironment(
        undefined=original_environment.undefined, keep_trailing_newline=original_environment.keep_trailing_newline
    )
    sandboxed_environment.filters |= original_environment.filters
    utils.env = sandboxed_environment
    try:
        yield
    finally:
        utils.env = original_environment
