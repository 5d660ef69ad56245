"""`finetune purge`, and what `finetune delete` prints about the files that stay in storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.cluster import StorageRoot
from finetune_cli.commands import delete, purge
from finetune_cli.job_storage import JobStorage
from finetune_cli.prepared_rows import find_unused_rows

from tests.unit.cli.conftest import RunCommand


def test_cluster_without_the_crd_keeps_the_data(
    run_command: RunCommand, kubeconfig_of_server: Callable[[int, bytes], str], tmp_path: Path
) -> None:
    marker = tmp_path / "store/default/bot/u1/checkpoints/step-00000001/_COMMITTED"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}", encoding="utf-8")
    words = ("purge", "bot", "--uid", "u1", "--storage", f"file://{tmp_path}/store", "--yes-purge", "bot")
    code, out, err = run_command(*words, "--kubeconfig", kubeconfig_of_server(404, b"404 page not found\n"))
    assert (code, out, marker.exists()) == (1, "", True)
    assert "has no CRD for FineTuneJob" in err


def store_rows(folder: Path, digest: str, until: str | None) -> None:
    """Store prepared rows. If `until` is given, also store the marker `_USED`, which contains this time."""
    for name in ("_COMMITTED", "a1-12345678/manifest.json", "a1-12345678/train/00000.arrow"):
        (folder / digest / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / digest / name).write_text("{}", encoding="utf-8")
    if until is not None:
        (folder / digest / "_USED").write_text(json.dumps({"until": until}), encoding="utf-8")


def test_unused_prepared_rows_of_the_namespace_are_deleted_too(
    run_command: RunCommand, kubeconfig_of_server: Callable[[int, bytes], str], tmp_path: Path
) -> None:
    checkpoint_marker, rows_folder = tmp_path / "store/default/bot/u1/checkpoints/step-00000001/_COMMITTED", tmp_path / "store/default/_prepared"
    checkpoint_marker.parent.mkdir(parents=True)
    checkpoint_marker.write_text("{}", encoding="utf-8")
    for folder, digest, until in (
        (rows_folder, "old", "2020-01-01T00:00:00Z"), (rows_folder, "used", "2999-01-01T00:00:00Z"), (rows_folder, "unmarked", None),
        (rows_folder, "damaged", "soon"),
        (tmp_path / "store/other/_prepared", "old", "2020-01-01T00:00:00Z"),
    ):  # fmt: skip
        store_rows(folder, digest, until)
    not_found = b'{"kind": "Status", "details": {"name": "bot", "kind": "finetunejobs"}, "reason": "NotFound", "message": "not found", "code": 404}'
    server = kubeconfig_of_server(404, not_found)
    words = ("purge", "bot", "--uid", "u1", "--storage", f"file://{tmp_path}/store", "--kubeconfig", server)
    code, out, err = run_command(*words)
    assert (code, out) == (1, ""), err
    assert f"1 objects, 2 B, below file://{tmp_path}/store/default/bot/u1 and 4 objects, 39 B, of unused prepared rows below file://{rows_folder}" in err
    code, out, err = run_command(*words, "--yes-purge", "bot")
    assert (code, out) == (0, "bot: 1 objects, 2 B, deleted\nunused prepared rows: 4 objects, 39 B, deleted\n"), err
    kept_names = sorted({path.relative_to(tmp_path / "store").as_posix().split("/")[2] for path in tmp_path.rglob("_COMMITTED")})
    assert (kept_names, checkpoint_marker.exists()) == (["damaged", "old", "unmarked", "used"], False)
    assert not [path for path in (rows_folder / "old").rglob("*") if path.is_file()]


def test_rows_that_a_job_uses_after_they_were_found_are_kept(tmp_path: Path) -> None:
    rows_folder, now = tmp_path / "default/_prepared", datetime(2026, 1, 1, tzinfo=UTC)
    for digest in ("old", "older"):
        store_rows(rows_folder, digest, "2020-01-01T00:00:00Z")
    unused_rows = find_unused_rows(JobStorage(f"file://{tmp_path}/default/bot/u1", StorageRoot()), now)
    assert sorted(unused_rows.groups_by_digest) == ["old", "older"]
    (rows_folder / "old/_USED").write_text(json.dumps({"until": "2026-02-01T00:00:00Z"}), encoding="utf-8")
    deleted_rows = unused_rows.delete(now)
    assert list(deleted_rows.groups_by_digest) == ["older"]
    assert sorted(path.relative_to(rows_folder).as_posix() for path in rows_folder.rglob("*") if path.is_file()) == [
        "old/_COMMITTED", "old/_USED", "old/a1-12345678/manifest.json", "old/a1-12345678/train/00000.arrow",
    ]  # fmt: skip


def test_the_marker_of_the_commit_is_deleted_in_a_request_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_rows(tmp_path / "default/_prepared", "old", "2020-01-01T00:00:00Z")
    requests: list[list[str]] = []
    monkeypatch.setattr(JobStorage, "delete_objects", lambda self, objects: requests.append([stored.key for stored in objects]))
    now = datetime(2026, 1, 1, tzinfo=UTC)
    find_unused_rows(JobStorage(f"file://{tmp_path}/default/bot/u1", StorageRoot()), now).delete(now)
    assert requests == [["old/_COMMITTED"], ["old/a1-12345678/manifest.json"], ["old/a1-12345678/train/00000.arrow"], ["old/_USED"]]


def make_adopting_job() -> dict[str, Any]:
    """Return a finished job that adopted the result of the earlier job u0."""
    output = {"uri": "s3://models/x/team/bot/u0/model/a1-12345678", "kind": "adapter", "adoptedUid": "u0"}
    status = {"conditions": [{"type": "Finished", "status": "True"}], "output": output}
    return {"metadata": {"name": "bot", "namespace": "team", "uid": "u1"}, "spec": {"storage": {"uri": "s3://models/x"}}, "status": status}


class FakeCluster:
    namespace = "team"

    def get_job(self, name: str) -> dict[str, Any]:
        return make_adopting_job()


@pytest.mark.parametrize(("uid", "root"), [(None, "s3://models/x/team/bot/u0"), ("u7", "s3://models/x/team/bot/u7"), ("u1", "s3://models/x/team/bot/u1")])
def test_a_uid_selects_its_own_folder_also_if_the_job_adopted_a_result(uid: str | None, root: str) -> None:
    from finetune_cli.job_storage import locate_job_folder

    job = purge._get_finished_job(FakeCluster(), "bot", uid)  # type: ignore[arg-type]
    assert locate_job_folder(job)[0] == root


def test_delete_names_the_folder_of_an_adopted_result() -> None:
    assert delete.describe_remaining_files(make_adopting_job()) == [
        "still stored in s3://models/x/team/bot/u0: the adapter; to remove them, run `finetune purge bot -n team --uid u0 --storage s3://models/x`"
    ]
