"""A small replacement for `vllm serve` that runs on a CPU: it answers the trainer's requests with completions from transformers.

`start_server` starts the real program of the generation container (`vllm-image/serve.py`), which starts this module in place of vLLM. STUB_*
environment variables choose the reported version and the faults, and name the file that records each generation.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVE_PROGRAM = ROOT / "vllm-image" / "serve.py"
RECORD, VERSION, LOGPROBS_MODE, DIES_AT, HANGS_AT, FAILS_AT = (
    f"STUB_{name}" for name in ("RECORD", "VERSION", "LOGPROBS_MODE", "DIES_AT", "HANGS_AT", "FAILS_AT")
)  # fmt: skip
DEFAULT_VERSION = "0.31.0"


@dataclass
class Server:
    """A running program of the generation container. `url` is the server's address, as in run.json."""

    url: str
    folder: Path
    record: Path
    process: subprocess.Popen[bytes]

    @property
    def generations(self) -> list[dict[str, Any]]:
        """All generations so far, each with its prompts, completions, seed and sampling options."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


@contextmanager
def start_server(folder: Path, record: Path, **faults: str) -> Iterator[Server]:
    """Start the program of the generation container. `folder` replaces the volume that this container shares with the trainer container; `faults` are STUB_*
    variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    programs = record.parent / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    vllm = programs / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.generation_server "$@"\n')
    vllm.chmod(0o755)
    env = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FINETUNE_GENERATION_DIR": str(folder),
        RECORD: str(record), **faults,
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, str(SERVE_PROGRAM)], env=env, start_new_session=True)
    try:
        yield Server(f"http://127.0.0.1:{find_free_port()}", folder, record, process)
    finally:
        process.terminate()
        process.wait(30)


def find_free_port() -> int:
    """Return a currently free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Model:
    """A model that transformers has loaded from `folder`."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.reload()

    def reload(self) -> None:
        """Load the weights from the folder again."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, self.dtype)).eval()


def complete(model: Any, prompt: list[int], body: dict[str, Any], number: int) -> dict[str, Any]:
    """Sample one completion of `prompt` with the options in `body`. `number` is added to the seed, so that the completions of a request differ. Returns an
    item of the response's `choices`.
    """
    import torch

    generator = torch.Generator().manual_seed(body["seed"] + number)
    ids, log_probabilities = list(prompt), []
    while len(ids) - len(prompt) < body["max_tokens"]:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].float() / body["temperature"]
        token = int(torch.multinomial(keep_top_p(scores.softmax(-1), body["top_p"]), 1, generator=generator))
        ids.append(token)
        log_probabilities.append(float(scores.log_softmax(-1)[token]))
        if token in body["stop_token_ids"]:
            break
    completion = ids[len(prompt) :]
    token_names = [f"token_id:{token}" for token in completion]
    logprobs = {"tokens": token_names, "token_logprobs": log_probabilities, "top_logprobs": [{} for _ in token_names]}
    return {"prompt_token_ids": prompt, "token_ids": completion, "logprobs": logprobs}


def keep_top_p(probabilities: Any, top_p: float) -> Any:
    """Keep the smallest set of most likely tokens whose total probability reaches `top_p`, and set the probabilities of all other tokens to 0."""
    if top_p >= 1:
        return probabilities
    sorted_probabilities, token_ids = probabilities.sort(descending=True)
    is_kept = sorted_probabilities.cumsum(-1) - sorted_probabilities < top_p
    return probabilities.new_zeros(probabilities.shape).scatter(0, token_ids[is_kept], sorted_probabilities[is_kept])


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one server."""

    protocol_version = "HTTP/1.1"
    model: Model
    lock = threading.Lock()
    generations = 0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name of the overridden argument
        """Log nothing."""

    def do_GET(self) -> None:  # noqa: N802 -- the name of the overridden method
        """Answer a GET request."""
        bodies_by_path = {
            "/health": None, "/version": {"version": os.environ.get(VERSION, DEFAULT_VERSION)},
            "/server_info?config_format=json": {"model_config": {"logprobs_mode": os.environ.get(LOGPROBS_MODE, "processed_logprobs")}},
        }  # fmt: skip
        self.send_json(200, bodies_by_path[self.path]) if self.path in bodies_by_path else self.send_json(404, {"error": "not found"})

    def do_POST(self) -> None:  # noqa: N802 -- the name of the overridden method
        """Answer a POST request, whose body is a JSON object."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            if self.path == "/v1/completions":
                self.send_completions(body)
            elif self.path == "/collective_rpc" and body == {"method": "reload_weights"}:
                self.model.reload()
                self.send_json(200, {"results": [None]})
            elif self.path == "/reset_prefix_cache":
                self.send_json(200, {"success": True})
            else:
                self.send_json(404, {"error": "not found"})

    def send_completions(self, body: dict[str, Any]) -> None:
        """Answer with sampled completions, or inject the fault that a STUB_* variable sets for this generation. The first generation has number 1."""
        type(self).generations += 1
        number = str(self.generations)
        if os.environ.get(DIES_AT) == number:
            print("CUDA error: device-side assert", flush=True)
            os._exit(9)
        if os.environ.get(HANGS_AT) == number:
            threading.Event().wait()
        if os.environ.get(FAILS_AT) == number or body["model"] != self.model.folder:
            self.send_json(500, {"error": {"message": "the engine is dead"}})
            return
        choices = [complete(self.model.model, prompt, body, completion_number) for prompt in body["prompt"] for completion_number in range(body["n"])]
        record = {**body, "completions": [choice["token_ids"] for choice in choices]}
        with Path(os.environ[RECORD]).open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.send_json(200, {"choices": choices})

    def send_json(self, status: int, value: Any) -> None:
        """Answer with `value` as JSON, or with an empty body if `value` is None."""
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve the model until the process is terminated. If the command line has an option that this parser does not know, the program exits with an error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    for option in ("host", "dtype", "generation-config", "logprobs-mode"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("port", "tensor-parallel-size", "max-model-len", "seed"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--gpu-memory-utilization", type=float, required=True)
    options = parser.parse_args()
    Handler.model = Model(options.model, options.dtype)
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
