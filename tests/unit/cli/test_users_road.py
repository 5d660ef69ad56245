"""What users do that nobody planned: two spellings of one option, the source as the target, lists, long files, odd terminals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_cli.cluster import ClusterError, bare
from finetune_cli.commands.report import clean
from finetune_cli.files import MAX_BYTES

from tests.unit.cli.conftest import JOB, Call, Write
from tests.unit.cli.imports import import_

TOML = '[fine_tuner]\nbase_model_id = "org/m"\ntraining_data_id = "org/d"\nreport_to = "none"\n'
OPENAI = {"model": "org/m", "training_file": "s3://data/t.jsonl"}


def test_two_spellings_of_one_option_with_two_values_are_refused(write: Write) -> None:
    found = import_(write("a.toml", TOML + "device_train_batch_size = 4\ndevice_batch_size = 8\n"))
    assert found.mistakes == [
        "a.toml:5, a.toml:6: fine_tuner.device_train_batch_size, fine_tuner.device_batch_size: 4 and 8 are given for one thing; keep one of them"
    ]


def test_two_spellings_with_one_value_are_one(write: Write) -> None:
    found = import_(write("a.toml", TOML + "device_train_batch_size = 4\ndevice_batch_size = 4\n"))
    assert (found.mistakes, found.at("training.batchSizePerDevice")) == ([], 4)


def test_a_number_beside_auto_wins_wherever_it_stands(write: Write) -> None:
    inner = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}
    found = import_(write("a.json", json.dumps(OPENAI | {"hyperparameters": {"n_epochs": 5}, "method": inner})))
    assert found.at("training.epochs") == 5
    inner["supervised"] = {"hyperparameters": {"n_epochs": 7}}
    (mistake,) = import_(
        write("a.json", json.dumps(OPENAI | {"hyperparameters": {"n_epochs": 5}, "method": inner}))
    ).mistakes
    assert "5 and 7 are given for one thing" in mistake


def test_the_batch_of_an_api_job_counts_the_rows_of_all_ranks(write: Write) -> None:
    file = write("a.json", json.dumps(OPENAI | {"hyperparameters": {"batch_size": 16}}))
    found = import_(file, own={"resources.gpusPerNode": 2, "resources.nodes": 2})
    assert (found.at("training.batchSizePerDevice"), found.at("training.gradientAccumulationSteps")) == (4, 1)
    assert import_(file, own={"resources.gpusPerNode": 3}).mistakes == [
        "a.json:1: hyperparameters.batch_size: 16 rows of a step cannot be shared by 3 ranks; write 15 or 18, or other --gpus and --nodes"
    ]


def test_what_a_silent_env_file_means_by_four_bits(write: Write) -> None:
    text = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/d.jsonl\nDATASET_TYPE=qa\nTECHNIQUE=qlora\n"
    found = import_(write("a.env", text))
    assert found.at("model.quantization") == {"bits": 4, "type": "nf4", "doubleQuant": False}
    found = import_(write("a.env", text + "DEVICE=cuda\nBNB_4BIT_USE_DOUBLE_QUANT=true\n"))
    assert found.at("model.quantization") == {"bits": 4, "type": "nf4", "doubleQuant": True, "computeDtype": "float16"}


def test_a_system_column_that_is_none_is_told_of(write: Write) -> None:
    found = import_(write("a.toml", TOML + 'system_prompt_column = "null"\n'))
    assert found.at("dataset.columns") == {"question": "question", "answer": "answer"}
    assert any(note.startswith("system_prompt_column is none") for note in found.notes)


HYDRA = """\
dataset: {path: org/data, format: standard}
training_config: {model: org/m, trainer: SFT, distributed_training: FSDP, max_seq_length: 512}
"""


@pytest.mark.parametrize(
    ("text", "at", "value"),
    [
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}\n",
         "distributed.fsdp.sharding", "shardGradOp"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n", "distributed.fsdp.sharding", "fullShard"),
    ],
)  # fmt: skip
def test_sharding_of_an_accelerate_file(write: Write, text: str, at: str, value: Any) -> None:
    found = import_(write("job.yaml", HYDRA), write("acc.yaml", text), source="hydra")
    assert (found.mistakes, found.at(at)) == ([], value)


def test_nothing_of_an_accelerate_file_is_dropped_without_a_word(write: Write) -> None:
    text = (
        "distributed_type: FSDP\nnum_processes: 2\ndynamo_config: {dynamo_backend: INDUCTOR}\n"
        "fsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD, fsdp_offload_params: true}\n"
    )
    told = "\n".join(import_(write("job.yaml", HYDRA), write("acc.yaml", text), source="hydra").warnings)
    assert [one for one in ("dynamo_config", "HYBRID_SHARD", "fsdp_offload_params") if one not in told] == []


def test_deepspeed_options_of_an_accelerate_file_are_compared(write: Write) -> None:
    job = HYDRA.replace("distributed_training: FSDP", "gradient_acc_steps: 4")
    text = "distributed_type: DEEPSPEED\nnum_processes: 2\nmixed_precision: fp8\n"
    text += "deepspeed_config: {gradient_accumulation_steps: 8, deepspeed_config_file: ds.json}\n"
    mistakes = "\n".join(import_(write("job.yaml", job), write("acc.yaml", text), source="hydra").mistakes)
    assert "fp8 is not offered" in mistakes
    assert "4 and 8 are given for one thing" in mistakes
    assert "ds.json is a file beside this one" in mistakes


def test_an_import_does_not_write_over_what_it_reads(write: Write, call: Call) -> None:
    text = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=s3://data/d.jsonl\nDATASET_TYPE=qa\n"
    file = write("a.env", text)
    code, out, err = call("import", file, "-o", file)
    assert (code, out, file.read_text(encoding="utf-8")) == (1, "", text)
    assert "it is one of the files that are read" in err


def test_a_job_is_not_imported(write: Write, call: Call) -> None:
    code, _, err = call("import", write("job.yaml", JOB))
    assert (code, "it is a FineTuneJob already" in err) == (1, True)


def test_a_list_is_read_item_by_item(write: Write, call: Call) -> None:
    items = "\n".join(f"    {line}" for line in JOB.splitlines()).replace("    apiVersion", "  - apiVersion", 1)
    file = write("list.yaml", f"apiVersion: v1\nkind: List\nitems:\n{items}\n")
    assert call("validate", file) == (0, f"{file}: bot: ok\n", "")
    file = write("list.yaml", file.read_text(encoding="utf-8").replace("source:", "sorce:"))
    code, _, err = call("validate", file)
    assert code == 1
    assert f"{file}:8: spec.model.sorce: unknown field" in err


def test_a_file_that_is_too_long_is_not_read(write: Write, call: Call) -> None:
    code, _, err = call("validate", write("big.yaml", "a: b\n" * (MAX_BYTES // 5 + 1)))
    assert (code, "longer than 4 MiB" in err) == (1, True)


@pytest.mark.parametrize(
    "spec", ["[a]", "{model: {source: org/m}, resources: {nodes: two}}", "{model: {source: ~nobody-here/m}}"]
)
@pytest.mark.parametrize("words", [("run", "--local"), ("diff",)])
def test_a_spec_that_is_none_is_told_without_a_fault(
    write: Write, call: Call, spec: str, words: tuple[str, ...]
) -> None:
    file = write("job.yaml", JOB[: JOB.index("spec:")] + f"spec: {spec}\n")
    code, _, err = call(words[0], file, *words[1:], *([file] if words[0] == "diff" else []))
    assert "fault" not in err
    assert code == 1 or "~nobody" in spec


@pytest.mark.parametrize("name", ["bot", "finetunejobs.finetune-operator.io/bot", "ftj/bot", "FineTuneJob/bot"])
def test_a_name_may_be_written_as_it_is_printed(name: str) -> None:
    assert bare(name) == "bot"


@pytest.mark.parametrize("name", ["", "pod/bot", "ftj/"])
def test_names_of_other_things_are_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="is not the name of a FineTuneJob"):
        bare(name)


@pytest.mark.parametrize(
    "secret", ["ghp_" + "a1" * 12, "glpat-" + "b2" * 10, "https://onlytoken@git.example", "https://x/y?token=abc123"]
)
def test_a_report_shows_no_token_that_other_messages_hide(secret: str) -> None:
    hidden = clean(f"cloning {secret} now")
    assert (secret in hidden, hidden.startswith("cloning ")) == (False, True)


def test_output_is_utf8_whatever_the_locale_says(write: Write, tmp_path: Path) -> None:
    other = write("b.yaml", JOB.replace('t.jsonl"', 't.jsonl", systemPrompt: ü'))
    done = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "diff", str(write("a.yaml", JOB)), str(other)],
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, '"ü"' in done.stdout.decode()) == (0, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux")
def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "finetune_cli", "explain", "training"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")
