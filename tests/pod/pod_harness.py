"""Run a pod without Kubernetes: the supervisor is a local process that reads run.json and writes a termination message."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.attempt_secret import (
    derive_attempt_secret,
    derive_checkpoint_key,
    derive_prepared_rows_key,
    derive_progress_token,
)
from finetune_api.defaults import PlatformDefaults, resolve_defaults
from finetune_api.names import PROGRESS_TOKEN_HEADER
from finetune_api.pod import ProgressReport, ResumeConfig, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot

from tests.support.merge import merge

REPOSITORY = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(str(REPOSITORY / part) for part in ("crds", "trainer-image", "."))
UID = "11111111-2222-3333-4444-555555555555"
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
    }
    for a in range(6)
    for b in range(6)
]


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write the rows (default: `ROWS`) to a JSONL file, and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return path


def run_config(
    spec: dict[str, Any], storage: StoreTarget, *, attempt: int = 1, nodes: int = 1, processes: int = 1,
    gpus: int = 0, resume: ResumeConfig | None = None, master_port: int = 0, grace: int = 60,
) -> RunConfig:  # fmt: skip
    """Build the run configuration that the operator would write for this spec. `processes` and `gpus` are numbers per node.

    Unlike in a real job, the stored model is verified only if the spec requests it, because the verification would double the duration of a test.
    """
    spec = merge({"output": {"verify": False}}, spec)
    root = storage.uri.rsplit("/", 3)[0]
    parsed_spec = FineTuneJobSpec.model_validate(
        merge(spec, {"resources": {"nodes": nodes, "gpusPerNode": gpus, "processesPerNode": processes}})
    )
    resolution = resolve_defaults(parsed_spec, platform_defaults=PlatformDefaults(storage=StorageRoot(uri=root)))
    return RunConfig(
        name="job", namespace="team", uid=UID, attempt=attempt, spec=resolution.spec, defaults=sorted(resolution.defaults),
        world=World(
            nodes=nodes, processes_per_node=processes, gpus_per_node=gpus, master_address="127.0.0.1", master_port=master_port,
            rendezvous_id=f"{UID}-{attempt}",
        ),
        storage=storage, resume=resume or ResumeConfig(mode="auto"), grace_seconds=grace,
    )  # fmt: skip


@dataclass
class Pod:
    """One supervisor process. `end()` waits until the process exits by itself. A process that still runs at the end of the `with` block is killed."""

    run: RunConfig
    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    node_rank: int = 0
    command: str = "supervise"
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    has_secret: bool = True
    """Whether the pod gets the files with the attempt's secret and the checkpoint key. Operator 0.1.0 creates pods with neither of these files."""

    @property
    def secret(self) -> str:
        """The secret of the attempt. All pods of a gang have the same secret."""
        return derive_attempt_secret(b"key of the test", self.run.uid, self.run.attempt)

    def start(self) -> Pod:
        """Write run.json and the secret files, and start the supervisor process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = self.run.to_bytes()
        (self.folder / "run.json").write_bytes(data)
        if self.has_secret:
            (self.folder / "attempt-secret").write_text(self.secret)
            operator_key, run = b"key of the test", self.run
            is_preparation = self.command == "prepare"
            key = derive_prepared_rows_key(operator_key, run.namespace) if is_preparation else derive_checkpoint_key(operator_key, run.uid)
            (self.folder / "checkpoint-key").write_text(key)
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FINETUNE_"))},
            "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "FINETUNE_RUN_FILE": str(self.folder / "run.json"),
            "FINETUNE_RUN_SHA256": RunConfig.sha256(data), "FINETUNE_WORK_DIR": str(self.folder / "work"),
            "FINETUNE_TERMINATION_LOG": str(self.folder / "termination-message"), "FINETUNE_PORT": "0",
            "FINETUNE_ATTEMPT_SECRET_FILE": str(self.folder / "attempt-secret"),
            "FINETUNE_NODE_RANK": str(self.node_rank), "FINETUNE_NODE_NAME": f"node-{self.node_rank}",
            "FINETUNE_POD_UID": os.urandom(8).hex(), **self.env,
        }  # fmt: skip
        self.log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer", self.command, *self.arguments], env=env, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        return self

    def __enter__(self) -> Pod:
        return self.start()

    def __exit__(self, *exception_info: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()

    # ---- reading ----

    @property
    def text(self) -> str:
        """The text that the pod has logged so far."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def port(self) -> int | None:
        """The port of the pod's HTTP server. None until the server listens."""
        with (self.folder / "log").open("rb") as stream:
            log_head = stream.read(20_000).decode(errors="replace")
        for line in log_head.splitlines():
            if "listening on port " in line:
                return int(line.rpartition(" ")[2])
        return None

    def get(self, path: str = "/progress") -> bytes | None:
        """Send a GET request for `path` to the pod's HTTP server. Returns the response body, or None if the request fails."""
        if self.port is None:
            return None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={PROGRESS_TOKEN_HEADER: derive_progress_token(self.secret)})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bytes(answer.read())
        except (OSError, http.client.HTTPException):  # the pod does not listen yet, or ends in the middle of its response
            return None

    def report(self) -> ProgressReport | None:
        """Read the pod's progress report. None if the pod does not answer."""
        data = self.get()
        return ProgressReport.model_validate_json(data) if data else None

    def step(self) -> int:
        """Return the newest optimizer step that the pod reports. 0 if it has not reported any step."""
        report = self.report()
        return (report.progress.step or 0) if report else 0

    def termination_message(self) -> TerminationMessage:
        return TerminationMessage.model_validate_json((self.folder / "termination-message").read_text())

    def wait_until(self, is_true: Callable[[], bool], timeout: float = 300) -> None:
        """Wait until `is_true()` is true. Fail with the pod's log if the pod ends first or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not is_true():
            assert self.process is not None
            if self.process.poll() is not None and not is_true():
                raise AssertionError(f"the pod ended early with exit code {self.process.returncode}:\n{self.text[-6000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the condition is still false after {timeout} s:\n{self.text[-6000:]}")
            time.sleep(0.02)

    def wait_step(self, step: int, timeout: float = 300) -> None:
        """Wait until the pod reports at least this step."""
        self.wait_until(lambda: self.step() >= step, timeout)

    def wait_committed(self, step: int, timeout: float = 300) -> None:
        """Wait until the pod reports a committed checkpoint of this step or a later one."""

        def is_committed() -> bool:
            report = self.report()
            return bool(report and report.checkpoints and report.checkpoints[0].step >= step)

        self.wait_until(is_committed, timeout)

    def end(self, timeout: float = 400) -> int:
        """Wait until the process ends, for at most `timeout` seconds. Returns the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the pod is still running after {timeout} s:\n{self.text[-6000:]}") from None

    # ---- signals ----

    def pids(self, argument: str) -> list[int]:
        """Return the process ids of the pod's descendants that were started with this argument, for example `train` or `agent`."""
        assert self.process is not None
        from finetune_trainer.processes import descendants

        matching_pids = []
        for pid in descendants(self.process.pid):
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argument.encode() in arguments:
                matching_pids.append(pid)
        return matching_pids

    def terminate(self) -> None:
        """Send SIGTERM to the supervisor, as a kubelet does when it stops a pod."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the supervisor and all its descendants. To the other pods, this looks like a lost node."""
        assert self.process is not None
        from finetune_trainer.processes import descendants

        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
