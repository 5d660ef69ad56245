"""Starts vLLM in the container next to the trainer, and reports to the trainer when vLLM has ended.

The trainer writes the model and then `server.json` to the shared volume. This program waits for `server.json`, starts `vllm serve`, and writes
`ended.json` when vLLM has ended. When vLLM has ended, this program does not start it again: the trainer fails when it finds `ended.json`, and the
next attempt of the job gets a new pod. This program imports nothing but the standard library, because vLLM pins the versions of most other packages.
The trainer's part of this protocol is in `finetune_trainer/generation_server.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

CONTRACT_VERSION = 1
"""Version of the format of `server.json` and `ended.json`."""
POLL_SECONDS = 0.2
LOG_TAIL_LINE_COUNT = 3
"""Number of lines that are copied from the end of vLLM's log into `ended.json`."""
KILLED_MESSAGE = "its container was killed, probably because it used more memory than trainer.grpo.generation.memory"
"""The message in `ended.json` if the vLLM container was killed. The restarted container writes `ended.json`."""
FOLDER_VARIABLE, DEFAULT_FOLDER = "FINETUNE_GENERATION_DIR", "/work/generation"


def build_server_command(folder: Path, options: dict[str, Any]) -> list[str]:
    """Return the command that starts vLLM. `options`: the contents of `server.json`."""
    return [
        "vllm", "serve", str(folder / "model"), "--host", "127.0.0.1", "--port", str(options["port"]),
        "--tensor-parallel-size", str(max(1, options["gpus"])), "--gpu-memory-utilization", str(options["gpuMemoryUtilization"]),
        "--dtype", options["dtype"], "--max-model-len", str(options["maxLength"]), "--seed", str(options["seed"]),
        # The trainer sends all sampling options, and corrects for the differences between its own token probabilities and those of vLLM.
        "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip


def build_server_environment() -> dict[str, str]:
    """Return the environment of vLLM. In development mode, vLLM accepts requests to reload weights. Only processes in the same pod can reach vLLM's port."""
    return {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def wait_for_options(options_file: Path) -> dict[str, Any]:
    """Wait until the trainer has written `server.json`, and return its contents."""
    while not options_file.exists():
        time.sleep(POLL_SECONDS)
    options: dict[str, Any] = json.loads(options_file.read_text())
    return options


def run_server(command: list[str]) -> str:
    """Run vLLM until it ends, print its log lines, and return why it ended."""
    last_lines: deque[str] = deque(maxlen=LOG_TAIL_LINE_COUNT)
    try:
        process = subprocess.Popen(command, env=build_server_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"

    def stop(signal_number: int, frame: FrameType | None) -> None:
        process.terminate()

    signal.signal(signal.SIGTERM, stop)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last_lines.append(line.strip())
    return f"exit code {process.wait()}: {' | '.join(last_lines) or 'no log line'}"


def report_end(end_file: Path, failure_message: str) -> None:
    """Write `ended.json` atomically, so that the trainer never reads an incomplete file."""
    unfinished_file = end_file.with_suffix(".tmp")
    unfinished_file.write_text(json.dumps({"message": failure_message}))
    unfinished_file.replace(end_file)


def main() -> int:
    """Wait for `server.json`, run vLLM, and write `ended.json` when vLLM has ended.

    Returns exit code 1, because it is a failure if vLLM ends before the trainer.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
    signal.signal(signal.SIGTERM, lambda signal_number, frame: sys.exit(0))
    end_file, start_file = folder / "ended.json", folder / "started.mark"
    if start_file.exists() and not end_file.exists():
        report_end(end_file, KILLED_MESSAGE)
    if end_file.exists():  # The kubelet has restarted this container. The trainer ends the attempt when it reads `ended.json`.
        print("vLLM has already ended, and is not started again in this attempt", file=sys.stderr, flush=True)
        return 1
    options = wait_for_options(folder / "server.json")
    start_file.touch()
    if options.get("version") != CONTRACT_VERSION:
        failure_message = f"this image reads version {CONTRACT_VERSION} of server.json, but the trainer wrote version {options.get('version')}"
    else:
        failure_message = run_server(build_server_command(folder, options))
    report_end(end_file, failure_message)
    print(failure_message, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
