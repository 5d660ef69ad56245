"""Pods that run benchmarks after training: tasks of lm-evaluation-harness with local data, question files for a domain, and sheets for human ratings."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from finetune_api.rating_sheet import BASE_MODEL, COLUMNS, TRAINED_MODEL
from finetune_api.status import Stage
from pod_harness import UID, Pod, merge, run_config, write_rows

from tests.support.benchmark_folders import (
    CHOICE_TASK,
    GENERATION_TASK,
    LIKELIHOOD_TASK,
    SUMS,
    write_domain,
    write_hellaswag,
    write_task,
)
from tests.support.tiny import make_tiny_model

RATING_SHEETS = {"name": "human-eval", "limit": 3, "compareWithBase": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_benchmark_pod(folder: Path, model: Path, benchmarks: list[dict[str, Any]], spec: dict[str, Any] | None = None, *, attempt: int = 1) -> Pod:
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 2, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "evaluation": {"benchmarks": benchmarks, "comparison": {"generation": {"maxNewTokens": 8}}},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{UID}")
    # With this HOME, a library that writes into the home folder fails. The benchmark stage must set HF_HUB_OFFLINE itself.
    env = {"HOME": "/proc/nowhere", "HF_HUB_OFFLINE": "0"}
    return Pod(run_config(merge(base_spec, spec or {}), target, attempt=attempt), folder / f"pod-{attempt}", env=env)


def stored_path(folder: Path, key: str) -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / UID / key


def compute_perplexity_of_answers(model: Path) -> float:
    """Compute the perplexity of the first four answers of `SUMS` without the harness: exp(mean negative log-likelihood of an answer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, base_model = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    likelihoods = []
    for row in SUMS[:4]:
        question, ids = tokenizer(row["question"]).input_ids, tokenizer(f"{row['question']} {row['choices'][0]}").input_ids
        scores = base_model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        likelihoods.append(sum(float(scores[position - 1, ids[position]]) for position in range(len(question), len(ids))))
    return math.exp(-sum(likelihoods) / len(likelihoods))


def test_a_pod_runs_benchmarks_of_its_model_and_of_the_base_model(model: Path, tmp_path: Path) -> None:
    tasks, domains = tmp_path / "tasks", tmp_path / "domains"
    write_task(tasks, "sums")
    write_task(tasks, "likelihood", LIKELIHOOD_TASK)
    write_task(tasks, "written_sums", GENERATION_TASK)
    write_hellaswag(tasks)
    write_domain(domains, "domain_sums.json", [
        {"prompt": "What is 1 + 2?", "reference": "It is 3.", "keywords": ["3"]}, {"question": "2 + 2?", "choices": ["4", "9"], "correct_answer": 0},
    ])  # fmt: skip
    benchmarks = [
        {"name": "lm-eval", "folder": f"file://{tasks}", "compareWithBase": True, "limit": 4},
        {"name": "domain-specific-eval", "folder": f"file://{domains}"},
        RATING_SHEETS,
    ]
    with make_benchmark_pod(tmp_path, model, benchmarks) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
    entries = json.loads(stored_path(tmp_path, "evaluation/benchmark_results.json").read_text())["benchmarks"]
    entries_by_task_and_metric = {(entry["task"], entry["metric"]): entry for entry in entries}
    assert [name for name, _ in entries_by_task_and_metric] == ["likelihood", "sums", "written_sums", "hellaswag", "hellaswag", *["sums"] * 7]
    likelihood_entry = entries_by_task_and_metric["likelihood", "perplexity"]
    assert likelihood_entry["base"] == pytest.approx(compute_perplexity_of_answers(model), rel=1e-4)
    assert likelihood_entry["value"] < likelihood_entry["base"]  # the training rows contain sums like those of the task
    sums_entry = entries_by_task_and_metric["sums", "acc"]
    assert sums_entry["samples"] == 4 and sums_entry["value"] in (0, 0.25, 0.5, 0.75, 1) and sums_entry["base"] in (0, 0.25, 0.5, 0.75, 1)
    assert sums_entry["difference"] == sums_entry["value"] - sums_entry["base"]
    # The harness reports the standard error of the mean of four zeros and ones, with the sample variance.
    assert sums_entry["stderr"] == pytest.approx(math.sqrt(sums_entry["value"] * (1 - sums_entry["value"]) / 3))
    assert entries_by_task_and_metric["hellaswag", "acc_norm"]["samples"] == 2 and entries_by_task_and_metric["written_sums", "exact_match"]["base"] is not None
    assert entries_by_task_and_metric["sums", "accuracy"]["value"] in (0, 1) and entries_by_task_and_metric["sums", "accuracy"]["base"] is None
    assert message.evaluation is not None and message.evaluation.benchmarks is not None
    assert [(result.task, result.metric) for result in message.evaluation.benchmarks] == [(entry["task"], entry["metric"]) for entry in entries]
    assert json.loads(stored_path(tmp_path, "evaluation/domain_sums_results.json").read_text()).keys() >= {"bleu", "rouge1_f", "rouge2_f", "rougeL_f"}
    assert json.loads(stored_path(tmp_path, "evaluation/lm_eval_results.json").read_text())["sums"] == {"acc": sums_entry["value"]}
    with stored_path(tmp_path, "evaluation/human_rating.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    models = json.loads(stored_path(tmp_path, "evaluation/human_rating_key.json").read_text())["models"]
    assert tuple(rows[0]) == COLUMNS and [row["promptID"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [row["model"] for row in rows] == ["A", "B"] * 3 and sorted(models.values()) == [BASE_MODEL] * 3 + [TRAINED_MODEL] * 3
    assert all(row["prompt"].startswith("What is ") and row["overall"] == "" for row in rows)
    assert stored_path(tmp_path, "run/stages/benchmarking.json").exists()


def test_a_task_without_data_is_refused_before_training(model: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "sums")
    benchmark = {"name": "lm-eval", "folder": f"file://{tmp_path / 'tasks'}", "tasks": ["sums", "hellaswag"]}
    with make_benchmark_pod(tmp_path, model, [benchmark]) as pod:
        assert pod.end() == ExitCode.CONFIG_INVALID, pod.text[-6000:]
    message = pod.termination_message()
    assert message.code == "TaskNotInFolder" and message.output is None and "evaluation.benchmarks[0].folder" in (message.message or "")
    assert not stored_path(tmp_path, "model").exists()


@pytest.mark.slow
def test_a_benchmark_runs_code_only_if_its_spec_allows_it(model: Path, tmp_path: Path) -> None:
    tasks, code = tmp_path / "tasks", tmp_path / "code"
    write_task(tasks, "coded", CHOICE_TASK + "process_docs: !function utils.first_row\nfewshot_split: test\n")
    (tasks / "utils.py").write_text("def first_row(rows):\n    return rows.select([0, 1, 2])\n")
    code.mkdir()
    problem = {"prompt": "def one():\n    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1", "entry_point": "one"}
    # The first prompt is already a correct function. Its completion passes the test unless the model adds a syntax error before a stop text.
    (code / "rows.jsonl").write_text(json.dumps(problem) + "\n" + json.dumps(problem | {"test": "def check(candidate):\n    assert False"}))
    benchmarks = [
        {"name": "lm-eval", "folder": f"file://{tasks}", "tasks": ["coded"], "fewShot": 1, "applyChatTemplate": True},
        {"name": "openai-humaneval", "folder": f"file://{code}", "compareWithBase": True},
    ]
    with make_benchmark_pod(tmp_path / "refused", model, benchmarks[:1]) as refused_pod:
        assert refused_pod.end() == ExitCode.CONFIG_INVALID, refused_pod.text[-6000:]
    assert refused_pod.termination_message().code == "CodeExecutionNotAllowed"
    allowed_benchmarks = [benchmark | {"allowCodeExecution": True} for benchmark in benchmarks]
    with make_benchmark_pod(tmp_path / "allowed", model, allowed_benchmarks, {"method": {"type": "full"}}) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    entries = json.loads(stored_path(tmp_path / "allowed", "evaluation/benchmark_results.json").read_text())["benchmarks"]
    assert [(entry["task"], entry["metric"], entry["samples"]) for entry in entries] == [("coded", "acc", 3), ("humaneval", "pass@1", 2)]
    assert entries[1]["value"] in (0, 0.5) and entries[1]["base"] in (0, 0.5)


@pytest.mark.slow
def test_the_next_attempt_keeps_the_finished_tasks_of_a_killed_pod(model: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    for name in ("first", "second"):
        write_task(tasks, name)
    long_rows = [{"question": f"count to {number}", "choices": ["1"], "answer": 0} for number in range(60)]
    write_task(tasks, "third", GENERATION_TASK.replace("max_gen_toks: 4", "max_gen_toks: 100"), long_rows)
    benchmarks = [{"name": "lm-eval", "folder": f"file://{tasks}", "tasks": ["first", "second", "third"]}]
    parts = stored_path(tmp_path, "run/stages/benchmarking-parts")
    with make_benchmark_pod(tmp_path, model, benchmarks) as killed_pod:
        killed_pod.wait_until(lambda: len(list(parts.rglob("*.json"))) == 2 and killed_pod.report() is not None)
        report = killed_pod.report()
        assert report is not None and report.stage is Stage.BENCHMARKING and report.detail == "task 3 of 3: third"
        killed_pod.kill()
    for part in parts.rglob("*.json"):  # an impossible value, which a task that ran again would overwrite
        part.write_text(part.read_text().replace('"value":', '"value":7,"was":'))
    with make_benchmark_pod(tmp_path, model, benchmarks, attempt=2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    entries = json.loads(stored_path(tmp_path, "evaluation/benchmark_results.json").read_text())["benchmarks"]
    assert [(entry["task"], entry["value"]) for entry in entries[:2]] == [("first", 7), ("second", 7)]
    assert entries[2]["task"] == "third" and entries[2]["samples"] == 60 and entries[2]["value"] != 7


@pytest.mark.slow
def test_a_failing_task_is_named_and_does_not_stop_the_other_tasks(model: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    write_task(tasks, "broken", CHOICE_TASK.replace("doc_to_target: answer", 'doc_to_target: "{{{{missing_column_error}}}}"'))
    write_task(tasks, "escaping", CHOICE_TASK.replace("{{{{question}}}}", "{{{{question.__class__.__mro__[1].__subclasses__()}}}}"))
    write_task(tasks, "sums")
    with make_benchmark_pod(tmp_path, model, [{"name": "lm-eval", "folder": f"file://{tasks}"}]) as pod:
        assert pod.end() == ExitCode.CONFIG_INVALID, pod.text[-6000:]
    message = pod.termination_message()
    assert message.code == "BenchmarkTaskFailed" and "the task broken failed" in (message.message or "")
    assert message.output is not None and message.stage is Stage.BENCHMARKING
    assert len(list(stored_path(tmp_path, "run/stages/benchmarking-parts").rglob("*.json"))) == 1
    assert "1 other task failed, too" in (message.message or "")
    assert "the task escaping failed: SecurityError" in pod.text
