"""Runs many short training runs (cells) in one launch, because the start of the ranks takes several seconds, but a tiny run takes less than one second.

`launch_cells` starts this module once for each rank. Every rank runs the same cells in the same order, and rank 0 writes the results.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

CHECKOUT_FOLDER = Path(__file__).parents[2]
PythonRunner = Callable[[Sequence[str], Mapping[str, str], IO[bytes], float], int]
"""A function that runs Python and returns the exit code. The parameters of the function are the arguments for Python, additional environment variables, a
file for the output and a timeout in seconds.
"""


@dataclass
class Cell:
    """One short training run. Most fields are arguments of `tests.support.learning.make_run`."""

    name: str
    model: str
    spec: Mapping[str, Any]
    rows: Sequence[Any]
    validation: Sequence[Any] | None = None
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    adapter: str | None = None
    reference: str | None = None
    resume: str | None = None
    """The checkpoint folder from which the run resumes."""
    padding_free: bool = False
    """Whether the run concatenates the rows of a batch, as runs on a GPU do. If it does, the CPU computes variable-length attention with sdpa."""
    keep: bool = False
    """Whether to keep the final folder and the checkpoints on disk."""


@dataclass
class Result:
    """The results of one cell, recorded by rank 0."""

    name: str
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    eval: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    resolved: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind: str | None = None
    files: list[str] = field(default_factory=list)
    folder: str = ""
    """Output folder of the Trainer. The final artefact is in its subfolder `final`."""
    error: dict[str, Any] | None = None
    """Class, code, message, hint and exitCode of the failure, or None. If the failure was not classified, the dict also has the `traceback`."""


def build_test_python_call(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments with which `subprocess.run` starts the tests' Python, with the trainer of this checkout."""
    path = os.pathsep.join(str(CHECKOUT_FOLDER / part) for part in ("crds", "trainer-image", "."))
    return {"args": [sys.executable, *arguments], "env": {**os.environ, **environment, "PYTHONPATH": path}, "cwd": CHECKOUT_FOLDER}


def run_test_python(arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes], timeout: float) -> int:
    """Run the tests' Python with `arguments` and the additional environment variables in `environment`. Returns the exit code."""
    return subprocess.run(**build_test_python_call(arguments, environment), stdout=output, stderr=subprocess.STDOUT, timeout=timeout).returncode


def launch_cells(
    cells: Sequence[Cell], folder: Path, *, rank_count: int, timeout: float = 540, run_python: PythonRunner = run_test_python
) -> dict[str, Result]:
    """Run each cell on `rank_count` processes of this machine. Returns the results by cell name.

    `run_python` starts Python; to run the cells in the trainer image, pass `TrainerImage.python_runner`. Errors: AssertionError with the end of the output,
    if Python does not exit with code 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(rank_count)] if rank_count > 1 else []
    environment = {"OMP_NUM_THREADS": "1", "CI": "1", "TMPDIR": str(folder)}
    with (folder / "output.txt").open("wb") as output:
        exit_code = run_python([*launcher, "-m", "tests.support.cells", str(folder)], environment, output, timeout)
    output_text = (folder / "output.txt").read_text(errors="replace")
    assert exit_code == 0, f"the cells exited with {exit_code}:\n{output_text[-6000:]}"
    result_fields = json.loads((folder / "results.json").read_text())
    return {fields["name"]: Result(**fields) for fields in result_fields}


def main(folder: Path) -> None:
    """Run all cells on this rank."""
    import bitsandbytes  # noqa: F401  imported before the cells, because some cells hide this package
    import torch

    rank, rank_count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if rank_count > 1:
        torch.distributed.init_process_group("gloo")
    cells = [Cell(**fields) for fields in json.loads((folder / "cells.json").read_text())]
    if any("deepspeed" in json.dumps(cell.spec) for cell in cells):
        import deepspeed  # noqa: F401  imported before the cells, because some cells hide this package
    results = []
    for number, cell in enumerate(cells):
        _reset_library_state()
        results.append(_run_cell(cell, folder / f"{number:03d}", rank, rank_count))
        if rank == 0:
            (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], default=str))
            print(f"{cell.name}: {results[-1].losses or results[-1].error}", flush=True)
    os._exit(0)  # exit without shutting down communication threads, because the shutdown may hang


def _run_cell(cell: Cell, folder: Path, rank: int, rank_count: int) -> Result:
    from unittest.mock import patch

    from finetune_api.errors import FineTuneError
    from finetune_trainer import attention, train
    from finetune_trainer.channel import Channel
    from finetune_trainer.inputs import RestoredCheckpoint

    from tests.support.heap import freeze_libraries
    from tests.support.learning import RecordingHooks

    result, hooks, start = Result(cell.name), RecordingHooks(), time.monotonic()
    resume = RestoredCheckpoint(path=Path(cell.resume), step=1, uri="file:///x") if cell.resume else None
    if rank == 0:  # rank 0 writes the files that the other ranks need
        _make_cell_run(cell, folder, rank_count, resume)
    _wait_for_all_ranks(rank_count)
    run, inputs = _make_cell_run(cell, folder, rank_count, resume)
    _wait_for_all_ranks(rank_count)
    channel = Channel.create_recording(folder / "work", rank=rank, local_rank=rank, world_size=rank_count)
    train.preload(run)
    freeze_libraries()
    attention_choice = (attention.VARLEN_ATTENTION, []) if cell.padding_free else None
    try:
        with patch.object(attention, "choose_attention", lambda *_: attention_choice) if attention_choice else nullcontext():
            train.main(run, channel, inputs, hooks)
    except FineTuneError as error:
        result.error = {
            "class": type(error).__name__, "code": error.code, "message": error.message, "hint": error.hint, "exitCode": int(error.exit_code),
            "traceback": traceback.format_exc() if error.exit_code == 70 else None,
        }  # fmt: skip
    outcome = hooks.outcome
    result.losses, result.grad_norms = outcome.losses, outcome.grad_norms
    result.eval = next((line for line in reversed(outcome.logs) if "eval_loss" in line or "test_loss" in line), {})
    if outcome.channel is not None:
        result.resolved, result.notes = outcome.resolved, outcome.notes
    result.kind, result.folder = outcome.kind, str(inputs.output_dir)
    _wait_for_all_ranks(rank_count)
    if outcome.folder is not None:
        result.files = sorted(
            str(path.relative_to(outcome.folder)) for path in outcome.folder.rglob("*") if path.is_file()
        )
    result.seconds = time.monotonic() - start
    _wait_for_all_ranks(rank_count)
    return result


def _make_cell_run(cell: Cell, folder: Path, rank_count: int, restored_checkpoint: Any) -> Any:
    from tests.support.learning import make_run

    run, inputs = make_run(
        folder, Path(cell.model), cell.spec, cell.rows, ranks=rank_count, restore=restored_checkpoint, validation=cell.validation,
        config_maps=cell.config_maps, adapter=Path(cell.adapter) if cell.adapter else None,
    )  # fmt: skip
    return run, inputs.model_copy(update={"reference": Path(cell.reference) if cell.reference else None})


def _wait_for_all_ranks(rank_count: int) -> None:
    if rank_count > 1:
        import torch

        torch.distributed.barrier()


def _reset_library_state() -> None:
    """Reset the global variables in which accelerate, transformers and DeepSpeed keep the settings of the previous cell."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    unset_hf_deepspeed_config()
    if groups := sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp"):
        groups._release_sequence_parallel_groups()
    gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
