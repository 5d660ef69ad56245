"""A rank for tests of the supervisor. It does not train: it counts steps, writes checkpoints and fails at the steps that TOY_SCRIPT names.

The state of a rank is a hash of its previous state and the step. So a run that resumes from a wrong state ends with a different hash.
TOY_SCRIPT is a JSON object; all fields are optional. `steps` is the last step, and `further` is the number of steps after the resume.
`every` is the number of steps between checkpoints, `pause` the seconds per step, and `bytes` the size of a checkpoint file.
`at` maps `<rank>:<step>` to an event of `run_scripted_event`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from finetune_api.errors import DataError, DivergedError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Metrics, Progress, Stage
from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import SingleRankStore, StopAgreement, TcpGangStore, TrainingStopped
from finetune_trainer.inputs import Inputs

CHAIN_FILE = "chain-{}"
"""The file with the state of a rank, by rank number."""
CHILD_ARGUMENT = "child-of-a-rank"
"""An argument by which tests find the child process that the event `process` starts."""
SCRIPT: dict[str, Any] = json.loads(os.environ.get("TOY_SCRIPT", "{}"))


def preload(run: RunConfig) -> None:
    run_scripted_event("import", 0)


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    last_step, checkpoint_interval, pause_seconds = SCRIPT.get("steps", 20), SCRIPT.get("every", 5), SCRIPT.get("pause", 0.01)
    agreement = StopAgreement(channel, TcpGangStore("toy") if channel.world_size > 1 else SingleRankStore(), poll_seconds=0.02)
    step = inputs.restore.step if inputs.restore else 0
    last_step = step + SCRIPT["further"] if "further" in SCRIPT else last_step
    chain_state = (inputs.restore.path / CHAIN_FILE.format(channel.rank)).read_text() if inputs.restore else ""
    channel.report_stage(Stage.TRAINING)
    channel.report_progress(Progress(step=step, total_steps=last_step, epoch=0.0))
    agreement.start(step)
    while step < last_step:
        time.sleep(pause_seconds)
        step += 1
        run_scripted_event(channel.rank, step)
        chain_state = next_chain(chain_state, channel.rank, step)
        channel.report_step(step)
        channel.report_metrics(Metrics(train_loss=1.0 / step))
        channel.report_log_line(step, {"loss": 1.0 / step, "chain": chain_state})
        must_stop = agreement.must_stop(step)
        if step % checkpoint_interval == 0 or must_stop:
            save_checkpoint(channel, inputs, step, chain_state, must_stop)
    if channel.rank == 0:
        final_folder = inputs.output_dir / "final"
        final_folder.mkdir()
        (final_folder / "adapter_model.safetensors").write_text(f"final {step}")
        (final_folder / CHAIN_FILE.format(channel.rank)).write_text(chain_state)
        channel.report_output(final_folder, OutputKind.ADAPTER, {})


def next_chain(chain: str, rank: int, step: int) -> str:
    """Return the state after this step: the hash of the previous state, the rank and the step."""
    return hashlib.sha256(f"{chain}/{rank}:{step}".encode()).hexdigest()


def save_checkpoint(channel: Channel, inputs: Inputs, step: int, chain: str, is_stopping: bool) -> None:
    folder = inputs.output_dir / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    (folder / f"state-{channel.rank}").write_bytes(bytes([step % 256]) * SCRIPT.get("bytes", 1000))
    (folder / CHAIN_FILE.format(channel.rank)).write_text(chain)
    channel.report_staged_files(step, folder, incarnation=os.environ["FINETUNE_INCARNATION"], graceful=is_stopping, stallSeconds=0.0)
    if is_stopping:
        raise TrainingStopped(step)


def run_scripted_event(rank: int | str, step: int) -> None:
    """Run the event that TOY_SCRIPT has for this rank and step, if any. During the imports, the rank is `import` and the step is 0."""
    match SCRIPT.get("at", {}).get(f"{rank}:{step}"):
        case None:
            return
        case "hang":
            time.sleep(3600)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "bad-data":
            raise DataError("NoTrainableToken", f"step {step} has no trainable token")
        case "diverge":
            raise DivergedError("LossNotFinite", f"loss is nan at step {step}")
        case "lose-peer":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        case "crash":
            raise ValueError("a long message: " + '\N{SNOWMAN}\0"\\' * 3000)
        case "shout":
            sys.stdout.buffer.write((b"x" * 1023 + b"\xff\n") * 100 * 1024)
            sys.stdout.flush()
            raise ValueError("\udcff not even text")
        case "exit":
            os._exit(3)
        case "out-of-memory":
            raise MemoryError("cannot allocate 7 GiB")
        case "process":  # the child can outlive the rank, like a data loader worker
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", CHILD_ARGUMENT], start_new_session=True)
            print(f"started the child {child.pid}", flush=True)
        case "thread":
            threading.Thread(target=time.sleep, args=(3600,)).start()
