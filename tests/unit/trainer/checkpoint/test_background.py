"""Checkpoints that are written in the background: their files contain the state of the saved step, and a failure ends the run."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_api.errors import StorageError  # noqa: E402 - torch first: without it there is nothing to test
from finetune_trainer.checkpoint.background import BackgroundWriter  # noqa: E402 - likewise
from finetune_trainer.failure import classify_error  # noqa: E402 - likewise
from finetune_trainer.library_internals import deferred_saves  # noqa: E402 - likewise


@pytest.fixture
def writer() -> BackgroundWriter:
    writer = BackgroundWriter()
    writer.writes_in_background = True
    return writer


def save_state(writer: BackgroundWriter, file: Path, weight: Any) -> None:
    """Begin a checkpoint and save one of its files. The caller finishes the checkpoint."""
    with writer.begin_checkpoint():
        torch.save({"weight": weight, "step": [1]}, file)


def test_a_file_contains_the_values_at_the_time_of_the_save(writer: BackgroundWriter, tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    save_state(writer, tmp_path / "a.pt", weight)
    weight.zero_()
    assert not (tmp_path / "a.pt").exists()
    writer.finish_checkpoint()
    writer.wait()
    loaded_state = torch.load(tmp_path / "a.pt")
    assert loaded_state["weight"].tolist() == [0.0, 1.0, 2.0, 3.0] and loaded_state["step"] == [1]


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_weights_of_models_and_adapters_are_written_later(writer: BackgroundWriter, tmp_path: Path, library: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model_settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    model: Any = LlamaForCausalLM(LlamaConfig(**model_settings))
    if library == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    weights_name = "adapter_model.safetensors" if library == "peft" else "model.safetensors"
    model.save_pretrained(tmp_path / "at-once")
    with writer.begin_checkpoint():
        model.save_pretrained(tmp_path / "later")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not (tmp_path / "later" / weights_name).exists()
    writer.finish_checkpoint()
    writer.wait()
    assert (tmp_path / "later" / weights_name).read_bytes() == (tmp_path / "at-once" / weights_name).read_bytes()


def test_objects_that_are_not_state_dictionaries_are_written_at_once(writer: BackgroundWriter, tmp_path: Path) -> None:
    with writer.begin_checkpoint():
        torch.save((1, 2), tmp_path / "arguments.bin")
        assert torch.load(tmp_path / "arguments.bin") == (1, 2)


def test_tasks_run_in_order_after_the_files(writer: BackgroundWriter, tmp_path: Path) -> None:
    task_values: list[Any] = []
    save_state(writer, tmp_path / "a.pt", torch.ones(1))
    writer.run_after_files(lambda: task_values.append((tmp_path / "a.pt").exists()))
    writer.run_after_files(lambda: task_values.append(threading.current_thread().name))
    assert task_values == []
    writer.finish_checkpoint()
    writer.wait()
    assert task_values == [True, "checkpoint-writer"]


def test_without_a_checkpoint_a_task_runs_at_once(writer: BackgroundWriter, tmp_path: Path) -> None:
    """For example, the final model is saved after training, when no checkpoint is being written."""
    finished_tasks: list[str] = []
    writer.run_after_files(lambda: finished_tasks.append("before"))
    save_state(writer, tmp_path / "a.pt", torch.ones(1))
    writer.finish_checkpoint()
    writer.wait()
    writer.run_after_files(lambda: finished_tasks.append("after"))
    assert finished_tasks == ["before", "after"]


def test_without_background_writing_files_are_written_at_once(writer: BackgroundWriter, tmp_path: Path) -> None:
    thread_names: list[str] = []
    writer.writes_in_background = False
    save_state(writer, tmp_path / "a.pt", torch.ones(1))
    assert (tmp_path / "a.pt").exists()
    writer.run_after_files(lambda: thread_names.append(threading.current_thread().name))
    writer.finish_checkpoint()
    assert thread_names == ["MainThread"]


def test_the_next_checkpoint_reuses_the_memory_of_the_copies(writer: BackgroundWriter) -> None:
    weight, addresses = torch.ones(8), []
    for _ in range(2):
        writer._defer(lambda copies: addresses.append(copies["weight"].data_ptr()), {"weight": weight}, is_collective=False)
        writer.finish_checkpoint()
        writer.wait()
    assert addresses[0] == addresses[1] != weight.data_ptr()


def test_the_memory_of_the_copies_is_freed_on_request(writer: BackgroundWriter) -> None:
    writer.release_copies()
    writer._defer(lambda copies: None, {"weight": torch.ones(8)}, is_collective=False)
    writer.finish_checkpoint()
    writer.wait()
    assert writer._stager is not None
    writer.release_copies()
    assert writer._stager is None


def test_a_failure_in_the_background_is_raised_in_the_training_thread(writer: BackgroundWriter) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tasks_after_failure: list[str] = []
    with writer.begin_checkpoint():
        writer.run_after_files(fail)
        writer.run_after_files(lambda: tasks_after_failure.append("reported"))
    writer.finish_checkpoint()
    with pytest.raises(OSError, match="No space left") as raised:
        writer.wait()
    failure, is_origin = classify_error(raised.value)
    assert isinstance(failure, StorageError) and failure.code == "LocalDiskFull" and is_origin
    assert tasks_after_failure == [], "an incomplete checkpoint is not reported"
    with pytest.raises(OSError, match="No space left"):
        writer.raise_failure()


def test_the_save_functions_of_the_libraries_are_restored_after_a_checkpoint() -> None:
    import peft.peft_model
    import torch.distributed.checkpoint as sharded
    import transformers.modeling_utils

    def list_save_functions() -> tuple[Any, ...]:
        return torch.save, transformers.modeling_utils.safe_save_file, peft.peft_model.safe_save_file, sharded.save

    functions_before = list_save_functions()
    with pytest.raises(RuntimeError), deferred_saves(lambda save, values, is_collective: None):
        assert [now is old for now, old in zip(list_save_functions(), functions_before, strict=True)] == [False] * 4
        raise RuntimeError
    assert list_save_functions() == functions_before
