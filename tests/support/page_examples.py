"""The examples in the documentation of other tools that `finetune import` accepts, and what a test cluster needs to run each imported job.

The examples come from the importers' tests (`tests/unit/cli/cases.py`). Tiny models, tiny data and other stand-ins replace only what a test cluster
lacks: the model, the data, GPUs, Secrets, ConfigMaps and servers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.benchmark_folders import write_domain, write_task
from tests.support.tiny import CHATML_TEMPLATE, make_tokenizer
from tests.unit.cli.cases import list_import_cases
from tests.unit.cli.import_command import import_files

ROW_COUNT = 24
TRACKING_URI = "http://mlflow:5000"
"""Address of the MLflow server in the examples."""
BENCHMARK_TASKS = ("hellaswag", "mmlu", "truthfulqa_mc1", "truthfulqa_mc2", "winogrande", "gsm8k", "arc_challenge")
PROMPTS = "What is 3 + 2?\n\nWhat is 5 + 2?\n"
DEEPSPEED_SETTINGS = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "zero_optimization": {"stage": "auto"}}
"""Content of a DeepSpeed configuration file. Examples name this file, but do not show its content."""


# --- models ---------------------------------------------------------------------------------------------------------

GEMMA_TEMPLATE = (
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    " + message['content'] + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """A model with random weights. It has the same model type as the example's model, and a chat template if the example's model has one."""

    model_type: str
    chat_template: str | None = CHATML_TEMPLATE
    layers: int = 2


MODELS = {
    "gpt2": TinyModel("gpt2", chat_template=None),
    "gpt2-chat": TinyModel("gpt2"),
    "llama": TinyModel("llama", chat_template=None),
    "llama-chat": TinyModel("llama"),
    "mistral": TinyModel("mistral", chat_template=None),
    "mistral-chat": TinyModel("mistral"),
    "qwen2": TinyModel("qwen2"),
    "qwen2-12-layers": TinyModel("qwen2", layers=12),
    "gemma": TinyModel("gemma", GEMMA_TEMPLATE),
}


def write_model(name: str, folder: Path) -> None:
    """Write a model of MODELS and its tokenizer into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_model = MODELS[name]
    tokenizer = make_tokenizer(folder, chat_template=tiny_model.chat_template)
    sizes = {
        "vocab_size": 448, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": tiny_model.layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    if tiny_model.model_type == "gpt2":
        sizes = {name: sizes[name] for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")}
        sizes |= {"n_embd": 64, "n_layer": tiny_model.layers, "n_head": 4, "n_positions": 1024}
    random_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny_model.model_type, **sizes)).save_pretrained(folder)
    torch.random.set_rng_state(random_state)


# --- data -----------------------------------------------------------------------------------------------------------


def _make_instruction(number: int) -> dict[str, Any]:
    return {"instruction": f"What is {number} + 2?", "response": f"It is {number + 2}."}


def _make_choice(number: int) -> dict[str, Any]:
    options = {"A": str(number + 1), "B": str(number + 2), "C": str(number + 3)}
    return {"question": f"What is {number} + 2?", "answer": "B", "options": options, "meta_info": "sums"}


def _make_alpaca(number: int) -> dict[str, Any]:
    return {"instruction": "Add the numbers.", "input": f"{number} and 2", "output": f"It is {number + 2}."}


def _make_sharegpt(number: int) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": f"What is {number} + 2?"}, {"from": "gpt", "value": f"It is {number + 2}."}]}


def _make_question(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} + 2?", "answer": f"It is {number + 2}.", "system": "You add numbers."}


def _make_ticket(number: int) -> dict[str, Any]:
    return {"ticket": f"Order {number} is missing.", "reply": f"Order {number} is on its way."}


def _make_tagged_answer(number: int) -> dict[str, Any]:
    return {"Question": f"What is {number} + 2?", "Response": f"<answer>{number + 2}</answer>"}


def _make_preference(number: int) -> dict[str, Any]:
    return {"Question": f"What is {number} + 2?", "Chosen": f"It is {number + 2}.", "Rejected": "No idea."}


@dataclass(frozen=True)
class Rows:
    """A dataset in the format that an example expects. `extension` is `jsonl`, `json` (an array) or `csv`."""

    make_row: Callable[[int], dict[str, Any]]
    extension: str = "jsonl"
    train_count: int = ROW_COUNT

    def render(self, split: str) -> str:
        """Return the content of the dataset's file for a split: `train`, `validation` or `test`."""
        first_number, count = FIRST_NUMBERS[split], self.train_count if split == "train" else HELD_OUT_COUNT
        rows = [self.make_row(number) for number in range(first_number, first_number + count)]
        if self.extension == "json":
            return json.dumps(rows)
        if self.extension == "csv":
            return "".join(",".join(json.dumps(str(value)) for value in line) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)])
        return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = {
    "instruction": Rows(_make_instruction),
    "choices": Rows(_make_choice),
    "alpaca": Rows(_make_alpaca, "json"),
    "alpaca-csv": Rows(_make_alpaca, "csv"),
    "sharegpt": Rows(_make_sharegpt, "json"),
    "questions": Rows(_make_question),
    "tickets": Rows(_make_ticket),
    "tagged": Rows(_make_tagged_answer),
    "preferences": Rows(_make_preference, "json", 2 * ROW_COUNT),
}
FIRST_NUMBERS = {"train": 0, "validation": 100, "test": 200}
HELD_OUT_COUNT = 6
"""Number of rows in the validation data. The test data has the same number of rows."""


# --- examples -------------------------------------------------------------------------------------------------------

ON_CPU = ("training.device=cpu", "training.mixedPrecision=no")
"""Spec changes for examples with `DEVICE=cuda`. The original tool trains these examples with fp16."""
PLAIN_CHECKPOINTING = ("training.gradientCheckpointing=enabled",)
"""Spec changes for examples that request Unsloth's gradient checkpointing, which runs only on a GPU."""
WITHOUT_UNSLOTH = ("trainer.backend=transformers", *PLAIN_CHECKPOINTING)
"""Spec changes for examples that train with Unsloth, which runs only on a GPU."""
WANDB_FILES = ('placement.env=[{"name": "WANDB_MODE", "value": "offline"}]',)
"""Spec changes for examples that track with Weights & Biases. The tests have no Weights & Biases server, so the tracker writes files."""
TWO_RANKS = ("resources.processesPerNode=2",)
"""Spec changes for examples that shard or replicate the model over GPUs."""
HUB_STAND_IN = (
    "output.hub.tokenSecretRef.name=hub", "output.hub.tokenSecretRef.key=token", 'placement.env=[{"name": "HF_ENDPOINT", "value": "http://hub"}]',
)  # fmt: skip
"""Spec changes for examples that push the model to the hub. The examples' files contain no token, and the tests must not use the real hub."""
MLFLOW_ADDRESS = (f"tracking.mlflow.trackingUri={TRACKING_URI}",)
"""Spec change for the example that has a placeholder instead of the MLflow server's address."""


FEWER_STEPS = ("training.maxSteps=60",)
"""Spec change for the example with 200 steps. A run of 60 steps still includes an evaluation, because the example evaluates every 50 steps."""


@dataclass(frozen=True)
class PageExample:
    """How to run the job of an example on a test cluster."""

    model: str
    """Key of MODELS."""
    rows: str
    """Key of ROWS."""
    steps: int
    """Number of optimizer steps of the whole run."""
    changes: tuple[str, ...] = ()
    """Changed fields of the spec, each an argument of `--set`."""
    splits: tuple[str, ...] = ()
    """Splits, besides `train`, for which the example has a data file."""
    has_benchmarks: bool = False
    tokenizer: str | None = None
    """If the example uses the tokenizer of another model: the key of that model in MODELS."""


def _make_toml_example(steps: int, *changes: str, model: str = "qwen2", rows: str = "questions", splits: tuple[str, ...] = ()) -> PageExample:
    return PageExample(model, rows, steps, changes, splits)


PAGE_EXAMPLES: dict[str, PageExample] = {
    "samples-env-A": PageExample("gpt2", "instruction", 4),
    "samples-env-B": PageExample("llama", "choices", 6, ON_CPU),
    "blocks-env-01": PageExample("gpt2", "choices", 5, ON_CPU),
    "blocks-env-02": PageExample("llama", "instruction", 6, ON_CPU),
    "blocks-env-command-1": PageExample("gpt2", "instruction", 6),
    "blocks-env-command-2": PageExample("gpt2", "choices", 5, ON_CPU),
    "blocks-env-command-3": PageExample("llama", "instruction", 6, ON_CPU),
    "blocks-env-command-4": PageExample("gpt2", "choices", 10, ON_CPU),
    "blocks-env-command-5": PageExample("gpt2", "instruction", 3, ON_CPU, ("validation", "test")),
    "blocks-env-command-6": PageExample("gpt2", "instruction", 5, ON_CPU),
    "env-command-line-over-file": PageExample("gpt2", "instruction", 4),
    "env-page-run": PageExample("gpt2", "choices", 5, ON_CPU),
    "env-page-example-7": PageExample("llama", "instruction", 6, ON_CPU),
    "samples-toml-A": _make_toml_example(4, *PLAIN_CHECKPOINTING, rows="tickets"),
    "samples-toml-B": _make_toml_example(60, model="llama-chat"),
    "samples-toml-C": _make_toml_example(60, model="gemma", splits=("test",)),
    "blocks-toml-01": _make_toml_example(60),
    "blocks-toml-02": _make_toml_example(60),
    "blocks-toml-03": _make_toml_example(60, splits=("validation",)),
    "blocks-toml-04": _make_toml_example(60),
    "blocks-toml-07": _make_toml_example(60),
    "blocks-toml-08": _make_toml_example(60, *PLAIN_CHECKPOINTING),
    "blocks-toml-09": _make_toml_example(60, *MLFLOW_ADDRESS),
    "blocks-toml-10": _make_toml_example(60, *HUB_STAND_IN),
    "blocks-toml-11": _make_toml_example(60),
    "blocks-toml-12": _make_toml_example(60, *PLAIN_CHECKPOINTING),
    "blocks-toml-13": _make_toml_example(60, *PLAIN_CHECKPOINTING),
    "blocks-toml-14": _make_toml_example(60, *PLAIN_CHECKPOINTING, model="llama-chat"),
    "blocks-toml-15": _make_toml_example(30),
    "blocks-toml-16": _make_toml_example(100, splits=("validation",)),
    "blocks-toml-17": _make_toml_example(6),
    "blocks-toml-18": _make_toml_example(30, *HUB_STAND_IN),
    "blocks-toml-19": _make_toml_example(30, *PLAIN_CHECKPOINTING),
    "samples-yaml-A": PageExample("mistral-chat", "sharegpt", 4),
    "samples-yaml-B": PageExample("qwen2-12-layers", "alpaca", 2, (), ("validation",)),
    "blocks-yaml-01": PageExample("llama-chat", "alpaca", 6, (), ("validation",), has_benchmarks=True),
    "blocks-yaml-02": PageExample("llama-chat", "alpaca", 6),
    "blocks-yaml-03": PageExample("llama-chat", "alpaca", 6),
    "blocks-yaml-04": PageExample("llama-chat", "alpaca", 4),
    "yaml-overrides": PageExample("gpt2-chat", "sharegpt", 4),
    "yaml-page-run": PageExample("llama-chat", "alpaca", 6, (), ("validation",), has_benchmarks=True),
    "yaml-page-validate": PageExample("llama-chat", "alpaca", 6, (), ("validation",), has_benchmarks=True),
    "yaml-page-overrides": PageExample("mistral-chat", "alpaca", 6, (), ("validation",), has_benchmarks=True, tokenizer="llama-chat"),
    "yaml-deepspeed-beside": PageExample("llama-chat", "alpaca", 4),
    "samples-hydra-A": PageExample("llama-chat", "tagged", 6, (*WANDB_FILES, *WITHOUT_UNSLOTH)),
    "samples-hydra-B": PageExample("llama-chat", "preferences", 2, TWO_RANKS),
    "hydra-overrides": PageExample("llama-chat", "preferences", 12, (*WANDB_FILES, *WITHOUT_UNSLOTH)),
    "hydra-overrides-alone": PageExample("qwen2", "preferences", 48, WITHOUT_UNSLOTH),
    "hydra-flags": PageExample("qwen2", "alpaca-csv", 2, (*WANDB_FILES, *TWO_RANKS)),
    "hydra-page-flags": PageExample("llama-chat", "tagged", 9, (*WANDB_FILES, *WITHOUT_UNSLOTH)),
    "samples-guide-A": PageExample("qwen2", "alpaca", 2),
    "samples-guide-B": PageExample("mistral", "alpaca", 60, FEWER_STEPS),
    "blocks-guide-13": PageExample("llama", "alpaca", 6),
}

EXAMPLE_WITH_SAME_JOB = {
    "env-page-run": "blocks-env-01", "blocks-toml-02": "blocks-toml-01", "yaml-page-run": "blocks-yaml-01", "yaml-page-validate": "blocks-yaml-01",
}  # fmt: skip
"""Examples whose job has the same spec as the job of another example. They only start the job of that example, or they differ only in options that they set
to the tool's defaults.
"""


def list_accepted_examples() -> list[str]:
    """Return the names of all examples that the importers accept. If an example has no model and no data, the importer must accept it with the options
    `--model` and `--data`.
    """
    model_and_data = {"model.source": "org/model", "dataset.train": "org/rows"}
    return [
        name
        for name, (files, source, words) in list_import_cases().items()
        if any(not import_files(*files, source=source, words=words, overrides=overrides).mistakes for overrides in ({}, model_and_data))
    ]


def make_job_name(name: str) -> str:
    """Return the name of an example's job: the example's name in lower case."""
    return name.lower()


def make_import_arguments(name: str, root: str) -> list[str]:
    """Return the arguments of `finetune import` for an example. `root` is the URI of the folder that `write_stand_ins` has written."""
    files, source, words = list_import_cases()[name]
    example = PAGE_EXAMPLES[name]
    extension = ROWS[example.rows].extension
    options = ["import", *map(str, files), *(["--from", source] if source else []), "--name", make_job_name(name), "--gpus", "0"]
    options += ["--model", f"{root}/models/{example.model}", "--data", f"{root}/data/{example.rows}-train.{extension}"]
    for split in example.splits:
        options += [f"--{split}", f"{root}/data/{example.rows}-{split}.{extension}"]
    if example.has_benchmarks:
        options += ["--benchmarks", f"{root}/benchmarks"]
    if example.tokenizer:
        options += ["--set", f"model.tokenizer={root}/models/{example.tokenizer}"]
    for change in example.changes:
        options += ["--set", change]
    return [*options, *(["--", *shlex.split(words)] if words else [])]


def write_stand_ins(folder: Path) -> None:
    """Write the models, datasets and benchmarks for all examples into `folder`."""
    for name in MODELS:
        write_model(name, folder / "models" / name)
    (folder / "data").mkdir()
    for name, rows in ROWS.items():
        for split in FIRST_NUMBERS:
            (folder / "data" / f"{name}-{split}.{rows.extension}").write_text(rows.render(split))
    for task in BENCHMARK_TASKS:
        write_task(folder / "benchmarks", task)
    write_domain(folder / "benchmarks", "domain_sums.json", [{"question": "What is 1 + 2?", "answer": "It is 3.", "keywords": ["3"]}])


def list_missing_config_maps(name: str, spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name and content of each ConfigMap that an example's job needs but its manifest does not contain."""
    prompts_ref = spec.get("evaluation", {}).get("comparison", {}).get("promptsRef")
    if prompts_ref:
        yield prompts_ref["name"], {prompts_ref["key"]: PROMPTS}
    settings_ref = spec.get("distributed", {}).get("deepspeed", {}).get("configRef")
    if settings_ref and name != "yaml-deepspeed-beside":
        yield settings_ref["name"], {settings_ref["key"]: json.dumps(DEEPSPEED_SETTINGS)}
