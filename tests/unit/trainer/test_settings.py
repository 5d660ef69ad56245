"""A pod checks its run configuration, and reads files and variables of earlier and later releases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, FineTuneError, InternalError, TooOldError
from finetune_api.pod import RunConfig
from finetune_trainer.settings import Settings, load_run

RUN: dict[str, Any] = {
    "name": "j", "namespace": "n", "uid": "u", "attempt": 1, "graceSeconds": 30,
    "spec": {
        "model": {"source": "org/name"}, "method": {"type": "lora"}, "trainer": {"type": "sft"}, "dataset": {"train": "file:///rows.jsonl"},
        "storage": {"uri": "file:///root"},
    },
    "world": {"nodes": 1, "processesPerNode": 1, "gpusPerNode": 0, "masterAddress": "127.0.0.1", "masterPort": 0, "rendezvousId": "u-1"},
    "storage": {"uri": "file:///root/n/j/u"}, "resume": {"mode": "auto"},
}  # fmt: skip


def load_run_file(folder: Path, run: dict[str, Any] | bytes, sha256: str | None = None) -> RunConfig:
    file = folder / "run.json"
    file.write_bytes(run if isinstance(run, bytes) else json.dumps(run).encode())
    settings = replace(Settings.from_env(run_file=str(file), work_folder=str(folder)), run_sha256=sha256)
    return load_run(settings)[0]


def test_a_run_file_with_its_checksum_is_read(tmp_path: Path) -> None:
    data = json.dumps(RUN).encode()
    assert load_run_file(tmp_path, data, RunConfig.sha256(data)).name == "j"


@pytest.mark.parametrize(
    ("run", "sha256", "error_class", "code"),
    [
        (RUN, "0" * 64, InternalError, "RunFileDamaged"),
        (b"{", None, ConfigError, "RunFileInvalid"),
        (RUN | {"attempt": "many"}, None, ConfigError, "RunFileInvalid"),
        (RUN | {"spec": RUN["spec"] | {"training": {"ofALaterRelease": 1}}}, None, TooOldError, "TrainerTooOld"),
    ],
    ids=["wrong-checksum", "no-json", "wrong-type", "field-of-a-later-release"],
)
def test_an_unusable_run_file_is_refused_with_its_code(
    tmp_path: Path, run: dict[str, Any] | bytes, sha256: str | None, error_class: type[FineTuneError], code: str
) -> None:
    with pytest.raises(error_class) as caught:
        load_run_file(tmp_path, run, sha256)
    assert caught.value.code == code


def test_an_unknown_field_with_its_default_is_ignored(tmp_path: Path) -> None:
    run_of_later_release = RUN | {
        "spec": RUN["spec"] | {"training": {"ofALaterRelease": 1}}, "defaults": ["training.ofALaterRelease"],
        "origins": {"training.ofALaterRelease": "default"},
    }  # fmt: skip
    assert load_run_file(tmp_path, run_of_later_release).attempt == 1


def test_the_error_of_a_missing_run_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"nothing\.json cannot be read"):
        load_run(Settings.from_env(run_file=str(tmp_path / "nothing.json"), work_folder=str(tmp_path)))


@pytest.mark.parametrize("name", ["FINETUNE_FINAL_UPLOAD_TIMEOUT_SECONDS", "FINETUNE_FINAL_PATIENCE_SECONDS"])
def test_the_final_upload_timeout_is_also_read_under_its_old_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0.1.0 documented the old name of the variable, so existing jobs may set it in `placement.env`."""
    monkeypatch.setenv(name, "7")
    assert Settings.from_env().final_upload_timeout_seconds == 7.0
