"""Keeps the weights of the best checkpoint until the end of training, also across attempts.

transformers loads the best checkpoint from its folder at the end of training, and only warns if the folder is gone: deleted after its
upload, or written by an earlier attempt whose pod no longer exists. The weights of the best checkpoint are therefore kept in a
folder next to the checkpoints, and each later checkpoint carries them under a file name prefix, where a resumed attempt finds them.
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
"""Prefix of the best checkpoint's file names inside another checkpoint."""
WEIGHT_FILE = re.compile(r"^(adapter_model|adapter_config|model|pytorch_model).*\.(safetensors|bin|json)$")
BEST_FOLDER = "best"
"""Name of the folder with the best weights, in the Trainer's output folder."""
CHUNK_BYTES = 64 << 20
"""Bytes that are broadcast to the other nodes at once."""


class KeepBest(TrainerCallback):
    """Links the best weights whenever a checkpoint is saved. One rank of each node does so; every rank reads them at the end."""

    def __init__(self, resumed: Path | None) -> None:
        self._resumed = resumed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the best weights from the checkpoint that this attempt resumed from.

        transformers drops `best_model_checkpoint` if that folder is not on this disk, but keeps `best_global_step`.
        """
        if self._resumed is None or not state.best_global_step:
            return
        kept = Path(str(args.output_dir)) / BEST_FOLDER
        is_best_itself = state.best_global_step == state.global_step
        files = list(_weights(self._resumed) if is_best_itself else _carried(self._resumed))
        if not files:  # the best loss was measured between two checkpoints, so no checkpoint holds those weights
            return
        if args.local_process_index == 0:
            _replace_files(kept, iter(files))
        state.best_model_checkpoint = str(kept)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the weights of this checkpoint if it is the best, else add the best weights to it."""
        if args.local_process_index > 0 or not state.best_global_step:
            return
        root = Path(str(args.output_dir))
        folder, kept = root / f"checkpoint-{state.global_step}", root / BEST_FOLDER
        if state.best_global_step == state.global_step:
            _replace_files(kept, _weights(folder))
        elif folder.is_dir():
            for name, file in _weights(kept):
                _link(file, folder / (BEST_PREFIX + name))


def copy_to_all_nodes(args: TrainingArguments) -> None:
    """Copy the best weights from rank 0's disk to the other nodes, which have not written any. All ranks call this together."""
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return
    kept = Path(str(args.output_dir)) / BEST_FOLDER
    received = kept.with_name(BEST_FOLDER + ".received")
    writes = args.local_process_index == 0 and args.process_index > 0
    if writes:
        shutil.rmtree(received, ignore_errors=True)
        received.mkdir(parents=True)
    chunks = _chunks(kept) if args.process_index == 0 else iter(())
    while True:
        message = [next(chunks, None)]
        distributed.broadcast_object_list(message, src=0, device=args.device)
        if message[0] is None:
            break
        name, data = message[0]
        if writes:
            with (received / name).open("ab") as file:
                file.write(data)
    if writes:
        _replace_files(kept, _weights(received))
        shutil.rmtree(received)
    distributed.barrier()


def _chunks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """File names and contents of the weights, at most `CHUNK_BYTES` at a time."""
    for name, file in _weights(folder):
        with file.open("rb") as source:
            while data := source.read(CHUNK_BYTES):
                yield name, data


def best_folder(trainer: Any) -> Path:
    """Folder with the best weights. Errors: NoCheckpointError BestCheckpointMissing."""
    kept = Path(str(trainer.args.output_dir)) / BEST_FOLDER
    for folder in (kept, Path(str(trainer.state.best_model_checkpoint))):
        if any(True for _ in _weights(folder)):
            return folder
    raise NoCheckpointError(
        "BestCheckpointMissing", f"the best checkpoint, of step {trainer.state.best_global_step}, is no longer on this disk",
        hint="resume again, or set checkpoint.loadBestAtEnd: false to keep the last weights",
    )  # fmt: skip


def _replace_files(folder: Path, files: Iterator[tuple[str, Path]]) -> None:
    """Make `folder` hold exactly these files, by one rename, so that no reader sees a part of them."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, file in files:
        _link(file, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _weights(folder: Path) -> Iterator[tuple[str, Path]]:
    """Weight files of a checkpoint, by name."""
    if folder.is_dir():
        yield from ((file.name, file) for file in sorted(folder.iterdir()) if WEIGHT_FILE.match(file.name))


def _carried(folder: Path) -> Iterator[tuple[str, Path]]:
    """The best checkpoint's files inside another checkpoint, by their original name."""
    for file in sorted(folder.iterdir()):
        if file.name.startswith(BEST_PREFIX):
            yield file.name.removeprefix(BEST_PREFIX), file


def _link(source: Path, target: Path) -> None:
    """A hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
