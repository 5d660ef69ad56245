"""Writes tiny benchmarks into folders: tasks of the lm-evaluation-harness with local data, and domain files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUMS = [{"question": f"What is {a} + 2?", "choices": [str(a + 2), str(a + 7)], "answer": 0} for a in range(6)]
CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
LIKELIHOOD_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


def write_task(folder: Path, name: str, definition: str = CHOICE_TASK, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write a benchmark task and its data into `folder`. Returns the path of the task's definition."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (SUMS if rows is None else rows)))
    path = folder / f"{name}.yaml"
    path.write_text(definition.format(name=name))
    return path


def write_hellaswag(folder: Path) -> None:
    """Write a dataset with two rows in the layout that the harness's built-in task `hellaswag` reads."""
    data = folder / "Rowan" / "hellaswag"
    data.mkdir(parents=True)
    rows = [
        {
            "ind": number, "activity_label": "Cooking", "ctx_a": "A man cuts", "ctx_b": "an onion. he", "ctx": "A man cuts an onion. he",
            "endings": ["fries it.", "flies away.", "is a fish.", "sings a stone."], "label": "0", "split": "val", "split_type": "indomain", "source_id": "x",
        }
        for number in range(2)
    ]  # fmt: skip
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_domain(folder: Path, name: str, questions: Any) -> None:
    """Write `questions` as a domain file: the JSON file of a domain benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(questions))
