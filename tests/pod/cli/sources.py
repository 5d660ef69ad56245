"""For every importer: a configuration file that trains a tiny model on a CPU, and rows in the format that this file expects."""

from __future__ import annotations

import json
from dataclasses import dataclass

ROW_COUNT = 24
ROW_TEMPLATES = {
    "instruction": {"instruction": "question {}", "response": "answer {}"},
    "alpaca": {"instruction": "question {}", "input": "", "output": "answer {}"},
    "qa": {"question": "question {}", "answer": "answer {}"},
    "chat": {
        "messages": [
            {"role": "user", "content": "question {}"}, {"role": "assistant", "content": "answer {}", "weight": 1},
        ]
    },
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A configuration file of another tool, the format of the rows that it expects, and the steps and the adapter rank that the imported job must have."""

    file: str
    text: str
    rows: str
    steps: int
    rank: int


SOURCES = {
    "env": Source(
        "train.env",
        "MODEL_NAME=org/base\nTRAIN_DATA_PATH=./rows.jsonl\nDATASET_TYPE=instruction_jsonl\nEPOCHS=1\nDEVICE=cpu\nLORA_R=4\n"
        "MAX_LENGTH=64\nHUGGINGFACE_TOKEN=not-a-real-one\n",
        "instruction", steps=2, rank=4,  # trains on 80 % of 24 rows, 16 rows per step
    ),
    "toml": Source(
        "config.toml",
        '[fine_tuner]\nbase_model_id = "org/base"\ntraining_data_id = "org/rows"\nmax_sequence_length = 64\nload_in_4bit = false\n'
        'epochs = 1\nrank = 4\nreport_to = "none"\n',
        "qa", steps=2, rank=4,
    ),
    "yaml": Source(
        "config.yaml",
        "model: {base_model: org/base, use_flash_attention: false}\nfine_tuning: {method: lora, lora: {r: 4}}\n"
        "training: {epochs: 1, max_seq_length: 64, optimizer: adamw_torch, mixed_precision: no, gradient_accumulation_steps: 2}\n"
        "dataset: {format: alpaca, train_path: data/train.json}\n",
        "alpaca", steps=12, rank=4,
    ),
    "hydra": Source(
        "config.yaml",
        "dataset: {path: org/rows, format: standard}\ntraining_config: {model: org/base, trainer: SFT, distributed_training: DDP, "
        "learning_rate: 1e-4, num_train_epochs: 1, max_seq_length: 64, report_to: none}\n",
        "alpaca", steps=3, rank=128,
    ),
    "guide": Source(
        "config.yaml",
        "model: org/base\nlora_r: 4\nlora_alpha: 8\nbatch_size: 4\ngradient_accumulation: 1\nepochs: 1\nuse_4bit: false\n",
        "alpaca", steps=6, rank=4,
    ),
    "openai": Source(
        "job.json",
        '{"model": "org/base", "training_file": "file-abc", "hyperparameters": {"n_epochs": 1, "batch_size": 8}}',
        "chat", steps=3, rank=16,
    ),
}  # fmt: skip


def make_rows(row_format: str) -> str:
    """Return ROW_COUNT rows of questions and answers as JSONL, in one of the formats of ROW_TEMPLATES."""
    return "".join(json.dumps(ROW_TEMPLATES[row_format]).replace("{}", str(i)) + "\n" for i in range(ROW_COUNT))


def import_options(name: str, model: str, data: str) -> list[str]:
    """Return the options of `finetune import` for a local model, local data and a CPU.

    The options also remove `output` and `tracking.reportTo` from the spec, because these need a server.
    """
    return [
        "--from", name, "--name", name, "--model", model, "--data", data, "--gpus", "0", "--set", "output=null",
        "--set", "tracking.reportTo=null",
    ]  # fmt: skip
