"""What users do that nobody planned: two spellings of one option, the source as the target, lists, long files, odd terminals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[int, bytes], str]]:
    """A kubeconfig of a server that gives one answer to everything."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, body: bytes) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        user = {"name": "u", "user": {"token": "t"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [user],
            "contexts": [context],
            "current-context": "x",
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config), encoding="utf-8")
        return str(path)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (
            404,
            b"404 page not found\n",
            "knows no FineTuneJobs of finetune-operator.io/v1alpha1: install the operator's chart",
        ),
        (200, b"<html>please log in</html>", "does not answer as an API server does"),
        (302, b"", "does not answer as an API server does"),
        (401, b'{"message": "Unauthorized"}', "does not accept the credentials of the kubeconfig: log in again"),
        (502, b"<html>\n<body>\nBad Gateway</body></html>", "answered HTTP 502: <html> <body> Bad Gateway"),
    ],
)
def test_what_a_server_says_is_told_in_one_line(
    call: Call, answering: Callable[[int, bytes], str], status: int, body: bytes, told: str
) -> None:
    code, out, err = call("get", "--kubeconfig", answering(status, body))
    assert (code, out, err.count("\n"), err.startswith("error: ")) == (1, "", 1, True)
    assert told in err


def test_a_cluster_without_the_kind_is_no_reason_to_purge(
    call: Call, answering: Callable[[int, bytes], str], tmp_path: Path
) -> None:
    kept = tmp_path / "store/default/bot/u1/checkpoints/step-00000001/_COMMITTED"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}", encoding="utf-8")
    words = ("purge", "bot", "--uid", "u1", "--storage", f"file://{tmp_path}/store", "--yes-purge", "bot")
    code, out, err = call(*words, "--kubeconfig", answering(404, b"404 page not found\n"))
    assert (code, out, kept.exists()) == (1, "", True)
    assert "knows no FineTuneJobs" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--kubeconfig", "/no/such/file"), "--kubeconfig /no/such/file: there is no such file"),
        (("-n", "a/b"), "--namespace a/b: it cannot be the name of a namespace"),
    ],
)
def test_places_that_cannot_be_are_named(call: Call, words: tuple[str, ...], told: str) -> None:
    code, _, err = call("get", *words)
    assert (code, told in err) == (1, True)


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


def test_an_interrupt_while_modules_load_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, "-m", "finetune_cli", "--help"]
    path = os.pathsep.join([str(tmp_path), *(one for one in sys.path if one)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
