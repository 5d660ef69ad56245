"""What the command line does with storage, with a spec that is to run here, and with texts it shows."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.cluster import StorageRoot
from finetune_cli.commands.changing import free_name
from finetune_cli.commands.report import redact
from finetune_cli.importers.convert import nearest
from finetune_cli.local import LocalError, begun, fit, last_report
from finetune_cli.stores import Store, StoreError, committed, fetch, root_of
from finetune_cli.view import ago, bar, size, sparkline, stages

# --- storage --------------------------------------------------------------------------------------------------------


def commit(root: Path, folder: str, files: dict[str, bytes], life: str = "a1-00000000") -> Path:
    """Write a committed folder as the trainer does."""
    home = root / folder / life
    home.mkdir(parents=True)
    for name, data in files.items():
        (home / name).write_bytes(data)
    entries = [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    manifest = json.dumps({"files": entries}).encode()
    (home / "manifest.json").write_bytes(manifest)
    marker = {"attempt": 1, "path": life, "manifestSha256": hashlib.sha256(manifest).hexdigest()}
    (root / folder / "_COMMITTED").write_text(json.dumps(marker), encoding="utf-8")
    return home


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A job's tree in a folder: two checkpoints, one of them healthy, one that was never committed, and the model."""
    root = tmp_path / "tree"
    commit(root, "checkpoints/step-00000010", {"a.bin": b"one"})
    (root / "checkpoints/step-00000010/_HEALTHY").write_text("")
    commit(root, "checkpoints/step-00000020", {"a.bin": b"two", "b.bin": b"x" * 100})
    (root / "checkpoints/step-00000030/a1-1").mkdir(parents=True)
    (root / "checkpoints/step-00000030/a1-1/a.bin").write_bytes(b"half")
    commit(root, "model", {"w.bin": b"weights"})
    return Store(f"file://{root}", StorageRoot())


def test_only_what_has_its_marker_is_seen(store: Store) -> None:
    assert [(one.folder, one.healthy) for one in committed(store)] == [
        ("checkpoints/step-00000010", True), ("checkpoints/step-00000020", False), ("model", False),
    ]  # fmt: skip


def test_a_download_is_complete_and_compared(store: Store, tmp_path: Path) -> None:
    assert fetch(store, committed(store)[1], tmp_path / "out") == 103
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"two"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bin", "b.bin"]


def test_a_flipped_byte_is_found(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree/checkpoints/step-00000020/a1-00000000/b.bin").write_bytes(b"y" + b"x" * 99)
    with pytest.raises(StoreError, match=r"b\.bin is damaged: 100 bytes"):
        fetch(store, committed(store)[1], tmp_path / "out")
    assert not (tmp_path / "out" / "b.bin").exists()


def test_a_changed_manifest_is_found(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "tree/model/a1-00000000/manifest.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        fetch(store, committed(store)[2], None)


def test_a_manifest_cannot_write_elsewhere(tmp_path: Path) -> None:
    home = commit(tmp_path / "t", "model", {"a": b"x"})
    manifest = json.dumps({"files": [{"path": "../../evil", "size": 1, "sha256": "0"}]}).encode()
    (home / "manifest.json").write_bytes(manifest)
    marker = {"path": home.name, "manifestSha256": hashlib.sha256(manifest).hexdigest()}
    (tmp_path / "t/model/_COMMITTED").write_text(json.dumps(marker))
    store = Store(f"file://{tmp_path / 't'}", StorageRoot())
    with pytest.raises(StoreError, match="outside its folder"):
        fetch(store, committed(store)[0], tmp_path / "out")


def test_removing_everything(store: Store) -> None:
    store.remove(list(store.objects()))
    assert list(store.objects()) == []


def test_the_root_of_a_job() -> None:
    metadata = {"name": "bot", "namespace": "team", "uid": "u1"}
    job: dict[str, Any] = {"metadata": metadata, "spec": {"storage": {"uri": "s3://models/x/"}}}
    assert root_of(job)[0] == "s3://models/x/team/bot/u1"
    found = {
        "metadata": metadata,
        "spec": {},
        "status": {"checkpoints": [{"uri": "s3://b/y/team/bot/u1/checkpoints/step-1/a"}]},
    }
    assert root_of(found)[0] == "s3://b/y/team/bot/u1"
    with pytest.raises(StoreError, match="give --storage URI"):
        root_of({"metadata": metadata, "spec": {}})


# --- a spec that is to run here -------------------------------------------------------------------------------------


def here(spec: dict[str, Any], tmp_path: Path, gpus: int = 0, **folders: Path) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    maps = {"data": folders["maps"]} if "maps" in folders else {}
    claims = {"models": folders["claims"]} if "claims" in folders else {}
    return fit(spec, tmp_path / "out", tmp_path, maps, claims, notes, gpus=gpus), notes


def test_sources_become_files_of_this_machine(tmp_path: Path) -> None:
    for name in ("m", "maps", "claims/x"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "maps/t.jsonl").write_text("{}")
    spec = {
        "model": {"source": "file://m", "tokenizer": "pvc://models/x"},
        "dataset": {"train": "configmap://data/t.jsonl", "validation": "org/v"},
    }
    found, _ = here(spec, tmp_path, maps=tmp_path / "maps", claims=tmp_path / "claims")
    assert found["model"] == {"source": f"file://{tmp_path}/m", "tokenizer": f"file://{tmp_path}/claims/x"}
    assert found["dataset"] == {"train": f"file://{tmp_path}/maps/t.jsonl", "validation": "org/v"}
    assert found["storage"] == {"uri": f"file://{tmp_path}/out"}


def test_what_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"spec\.dataset\.train: x\.jsonl is not here; paths count from"):
        here({"dataset": {"train": "file://x.jsonl"}}, tmp_path)
    with pytest.raises(LocalError, match="say which folder stands for it: --config-map cm=FOLDER"):
        here({"dataset": {"train": "configmap://cm/k"}}, tmp_path)


@pytest.mark.parametrize(
    ("resources", "gpus", "result", "said"),
    [
        ({}, 0, {"gpusPerNode": 0}, 0),
        ({}, 2, {"gpusPerNode": 1}, 0),
        ({"gpusPerNode": 8, "nodes": 2, "nodePool": "h100"}, 2, {"gpusPerNode": 2, "nodes": 1}, 2),
        ({"gpusPerNode": 0}, 2, {"gpusPerNode": 0}, 0),
    ],
)
def test_sizes_fit_this_machine(
    tmp_path: Path, resources: dict[str, Any], gpus: int, result: dict[str, Any], said: int
) -> None:
    found, notes = here({"resources": resources}, tmp_path, gpus)
    assert (found["resources"], len(notes)) == (result, said)


def test_a_chat_template_is_taken_in(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ x }}")
    found, _ = here(
        {"dataset": {"chatTemplate": {"configMapRef": {"name": "data", "key": "t.jinja"}}}}, tmp_path, maps=tmp_path
    )
    assert found["dataset"]["chatTemplate"] == {"text": "{{ x }}"}


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "taken", "free"),
    [
        ("bot", set(), "bot-2"),
        ("bot", {"bot-2"}, "bot-3"),
        ("bot-2", {"bot-2"}, "bot-3"),
        ("a" * 40, set(), "a" * 38 + "-2"),
    ],
)
def test_free_names(name: str, taken: set[str], free: str) -> None:
    assert free_name(name, taken) == free


def test_pictures() -> None:
    assert bar(50) == "█" * 15 + "░" * 15
    assert (bar(None), bar(100)) == ("░" * 30, "█" * 30)
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert (sparkline([]), sparkline([1.0, 1.0])) == ("", "▁▁")
    assert stages("Running").startswith("● accepted  ● started  ◐ trained  ○ evaluated")
    assert stages("Succeeded").endswith("● done")
    assert (size(None), size(10), size(2048), size(3 * 1024**3)) == ("-", "10 B", "2.0 KiB", "3.0 GiB")
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert [ago(datetime(2026, 1, d, h, m, tzinfo=UTC), now) for d, h, m in ((1, 23, 59), (1, 23, 0), (1, 12, 0))] == [
        "60s",
        "60m",
        "12h",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"name": "HF_TOKEN", "value": "abc"}, {"name": "HF_TOKEN", "value": "REDACTED"}),
        ({"name": "X", "value": "abc"}, {"name": "X", "value": "abc"}),
        ({"password": "abc"}, {"password": "REDACTED"}),
        ({"tokenSecretRef": {"name": "hub", "key": "token"}}, {"tokenSecretRef": {"name": "hub", "key": "token"}}),
        ({"a": ["https://u:p@host/x", "hf_abcdefgh"]}, {"a": ["https://REDACTED@host/x", "REDACTED"]}),
        (
            {"last-applied": '{"env": [{"name": "MY_TOKEN", "value": "x"}], "b": "\u00e9"}'},
            {"last-applied": '{"env": [{"name": "MY_TOKEN", "value": "REDACTED"}], "b": "\u00e9"}'},
        ),
        ({"api_key": '{"a": 1}'}, {"api_key": "REDACTED"}),
        ({"a": "{not json hf_abcdefgh"}, {"a": "{not json REDACTED"}),
    ],
)
def test_redaction(value: Any, shown: Any) -> None:
    assert redact(value) == shown


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("LEARN_RATE", ["LEARNING_RATE", "LORA_R"], "LEARNING_RATE"),
        ("mcq", ["plain_text", "mcq_jsonl"], "mcq_jsonl"),
        ("lora.rank", ["lora.r", "lora.alpha", "training.rank"], "lora.r"),
        ("training.lr", ["training.model", "training.learning_rate"], "training.learning_rate"),
        ("training.seed", ["model.seed"], "model.seed"),
        ("zebra", ["apple", "pear"], ""),
    ],
)
def test_nearest(word: str, known: list[str], found: str) -> None:
    assert nearest(word, known) == found


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        ({"class": "Preempted", "code": "StoppedSaved", "message": "saved at step 12"}, "stopping"),
        ({"class": "Data", "code": "DatasetEmpty", "message": "no rows"}, "failed"),
        ({"output": {"uri": "file:///m/model"}}, "done"),
    ],
)
def test_the_last_line_of_a_local_run_says_how_it_ended(words: dict[str, Any], stage: str, tmp_path: Path) -> None:
    (tmp_path / "words").write_text(json.dumps({"progress": {"step": 12, "totalSteps": 100}, **words}))
    found = last_report(tmp_path / "words")
    assert found is not None and found.stage == stage


def test_attempts_are_counted_by_what_was_written_down(tmp_path: Path) -> None:
    assert begun(tmp_path) == 0
    for name in ("attempt-9", "attempt-10", "attempt-x", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert begun(tmp_path) == 10
