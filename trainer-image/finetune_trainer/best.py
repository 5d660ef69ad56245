"""Keeps the weights of the best checkpoint until the end of training, even if training ends in a later attempt.

At the end of training, transformers loads the best checkpoint from its folder. If the folder is missing, transformers only logs a
warning. The folder is missing if it was deleted after its upload, or if an earlier attempt wrote it on another pod. This module therefore
keeps the best weights in a folder next to the checkpoints. Each later checkpoint also contains the best weights, because an
attempt may resume from it on another pod.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.errors import NoCheckpointError
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

BEST_PREFIX = "best--"
"""Prefix of the names of the files that hold the best weights inside later checkpoints."""
WEIGHT_FILE = re.compile(r"^(adapter_model|adapter_config|model|pytorch_model).*\.(safetensors|bin|json)$")
BEST_FOLDER = "best"
"""Name of the folder with the best weights, in the Trainer's output folder."""
CHUNK_BYTES = 64 << 20
"""Size of one chunk in a broadcast to the other nodes."""


class KeepBest(TrainerCallback):
    """Hard-links the best weights whenever a checkpoint is saved. One rank per node creates the links; every rank reads the files at the end."""

    def __init__(self, resumed_checkpoint: Path | None) -> None:
        self._resumed_checkpoint = resumed_checkpoint
        self._trainer: Any = None

    def on_trainer_created(self, trainer: Any) -> None:
        """Keep a reference to the Trainer.

        Its `run_after_files` runs a task after a checkpoint is written, even if the checkpoint is written in the background.
        """
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the best weights from the checkpoint that this attempt resumed from.

        transformers drops `best_model_checkpoint` if its folder is not on this disk, but keeps `best_global_step`.
        """
        if self._resumed_checkpoint is None or not state.best_global_step:
            return
        best_folder = Path(str(args.output_dir)) / BEST_FOLDER
        is_resumed_best = state.best_global_step == state.global_step
        files = list(_list_weight_files(self._resumed_checkpoint) if is_resumed_best else _list_included_best_files(self._resumed_checkpoint))
        if not files:  # If the best loss was measured between two checkpoints, no checkpoint contains the best weights.
            return
        if args.local_process_index == 0:
            _replace_files(best_folder, iter(files))
        state.best_model_checkpoint = str(best_folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep this checkpoint's weights as the best weights, or store the best weights of an earlier checkpoint in this checkpoint."""
        if args.local_process_index > 0 or not state.best_global_step:
            return
        step, is_best, output_folder = state.global_step, state.best_global_step == state.global_step, Path(str(args.output_dir))
        self._trainer.run_after_files(lambda: _link_best_weights(output_folder, step, is_best))


def _link_best_weights(output_folder: Path, step: int, is_best: bool) -> None:
    """If the checkpoint of `step` is the best, link its weights into the folder of the best weights.

    If it is not the best, link the best weights into this checkpoint.
    """
    checkpoint_folder, best_folder = output_folder / f"checkpoint-{step}", output_folder / BEST_FOLDER
    if is_best:
        _replace_files(best_folder, _list_weight_files(checkpoint_folder))
    elif checkpoint_folder.is_dir():
        for name, file in _list_weight_files(best_folder):
            _link_or_copy(file, checkpoint_folder / (BEST_PREFIX + name))


def copy_to_all_nodes(args: TrainingArguments) -> None:
    """Copy the best weights from rank 0's disk to the disks of the other nodes. All ranks must call this function, because it is a collective."""
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return
    best_folder = Path(str(args.output_dir)) / BEST_FOLDER
    received_folder = best_folder.with_name(BEST_FOLDER + ".received")
    is_writer = args.local_process_index == 0 and args.process_index > 0
    if is_writer:
        shutil.rmtree(received_folder, ignore_errors=True)
        received_folder.mkdir(parents=True)
    chunks = _read_chunks(best_folder) if args.process_index == 0 else iter(())
    while True:
        broadcast_values = [next(chunks, None)]
        distributed.broadcast_object_list(broadcast_values, src=0, device=args.device)
        if broadcast_values[0] is None:
            break
        name, chunk = broadcast_values[0]
        if is_writer:
            with (received_folder / name).open("ab") as file:
                file.write(chunk)
    if is_writer:
        _replace_files(best_folder, _list_weight_files(received_folder))
        shutil.rmtree(received_folder)
    distributed.barrier()


def _read_chunks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the weight files in chunks: file name and at most `CHUNK_BYTES` of its contents."""
    for name, file in _list_weight_files(folder):
        with file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                yield name, chunk


def find_best_folder(trainer: Any) -> Path:
    """Return the folder with the best weights. Errors: NoCheckpointError BestCheckpointMissing."""
    best_folder = Path(str(trainer.args.output_dir)) / BEST_FOLDER
    for folder in (best_folder, Path(str(trainer.state.best_model_checkpoint))):
        if any(True for _ in _list_weight_files(folder)):
            return folder
    raise NoCheckpointError(
        "BestCheckpointMissing", f"the best checkpoint (step {trainer.state.best_global_step}) is no longer on this disk",
        hint="resume the job again, or set checkpoint.loadBestAtEnd: false to keep the last weights",
    )  # fmt: skip


def _replace_files(folder: Path, files: Iterator[tuple[str, Path]]) -> None:
    """Replace the contents of `folder` with `files`. The last step is a rename, so that no reader sees only some of the files."""
    temporary_folder = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary_folder, ignore_errors=True)
    temporary_folder.mkdir(parents=True)
    for name, file in files:
        _link_or_copy(file, temporary_folder / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary_folder.rename(folder)


def _list_weight_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of each weight file of a checkpoint."""
    if folder.is_dir():
        yield from ((file.name, file) for file in sorted(folder.iterdir()) if WEIGHT_FILE.match(file.name))


def _list_included_best_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the original name and the path of each file in a checkpoint that holds the best weights of an earlier checkpoint."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith(BEST_PREFIX):
            yield file.name.removeprefix(BEST_PREFIX), file


def _link_or_copy(existing_file: Path, new_file: Path) -> None:
    """Create a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(existing_file, new_file)
    except OSError:
        shutil.copyfile(existing_file, new_file)
