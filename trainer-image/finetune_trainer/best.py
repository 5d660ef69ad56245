"""The best checkpoint, kept at hand: its weights are linked when it is saved, and travel with every later checkpoint.

transformers loads the best checkpoint from its folder at the end of training, and only warns if that is gone: uploaded and
removed, or written by an attempt whose pod no longer exists. So the weights of the best are kept beside the scratch folder's
checkpoints, and put into each later one under a name of their own, where a resumed attempt finds them.
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

PREFIX = "best--"
"""Before the names of the best one's files inside another checkpoint."""
WEIGHTS = re.compile(r"^(adapter_model|adapter_config|model|pytorch_model).*\.(safetensors|bin|json)$")
FOLDER = "best"
CHUNK = 64 << 20
"""Bytes that are sent to the other nodes at once."""


class KeepBest(TrainerCallback):
    """One rank of each node links the files; every rank reads them at the end."""

    def __init__(self, resumed: Path | None) -> None:
        self._resumed = resumed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the best weights out of the checkpoint that this attempt resumed from.

        transformers forgets a best checkpoint whose folder is not on this disk; its step stays known, and is gone by here.
        """
        if self._resumed is None or not state.best_global_step:
            return
        kept = Path(str(args.output_dir)) / FOLDER
        own = state.best_global_step == state.global_step
        files = list(_weights(self._resumed) if own else _carried(self._resumed))
        if not files:  # the best so far was measured between two checkpoints: there is none to load, then as now
            return
        if args.local_process_index == 0:
            _fill(kept, iter(files))
        state.best_model_checkpoint = str(kept)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep this checkpoint if it is the best, else give it the best one's weights to carry."""
        if args.local_process_index > 0 or not state.best_global_step:
            return
        root = Path(str(args.output_dir))
        folder, kept = root / f"checkpoint-{state.global_step}", root / FOLDER
        if state.best_global_step == state.global_step:
            _fill(kept, _weights(folder))
        elif folder.is_dir():
            for name, file in _weights(kept):
                _link(file, folder / (PREFIX + name))


def share(args: TrainingArguments) -> None:
    """Bring the best weights from rank 0's disk to the other nodes: only its node has written whole weights. All ranks call this."""
    if args.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
        return
    kept = Path(str(args.output_dir)) / FOLDER
    received = kept.with_name(FOLDER + ".received")
    writes = args.local_process_index == 0 and args.process_index > 0
    if writes:
        shutil.rmtree(received, ignore_errors=True)
        received.mkdir(parents=True)
    pieces = _pieces(kept) if args.process_index == 0 else iter(())
    while True:
        told = [next(pieces, None)]
        distributed.broadcast_object_list(told, src=0, device=args.device)
        if told[0] is None:
            break
        name, data = told[0]
        if writes:
            with (received / name).open("ab") as file:
                file.write(data)
    if writes:
        _fill(kept, _weights(received))
        shutil.rmtree(received)
    distributed.barrier()


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Contents of the weights, at most `CHUNK` bytes at a time."""
    for name, file in _weights(folder):
        with file.open("rb") as source:
            while data := source.read(CHUNK):
                yield name, data


def best_folder(trainer: Any) -> Path:
    """Folder with the best weights. Errors: NoCheckpointError BestCheckpointMissing."""
    kept = Path(str(trainer.args.output_dir)) / FOLDER
    for folder in (kept, Path(str(trainer.state.best_model_checkpoint))):
        if any(True for _ in _weights(folder)):
            return folder
    raise NoCheckpointError(
        "BestCheckpointMissing", f"the best checkpoint, of step {trainer.state.best_global_step}, is not on this disk any more",
        hint="resume again, or set checkpoint.loadBestAtEnd: false to keep the last weights",
    )  # fmt: skip


def _fill(folder: Path, files: Iterator[tuple[str, Path]]) -> None:
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, file in files:
        _link(file, beside / name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _weights(folder: Path) -> Iterator[tuple[str, Path]]:
    if folder.is_dir():
        yield from ((file.name, file) for file in sorted(folder.iterdir()) if WEIGHTS.match(file.name))


def _carried(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.iterdir()):
        if file.name.startswith(PREFIX):
            yield file.name.removeprefix(PREFIX), file


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
