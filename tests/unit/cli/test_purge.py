"""`finetune purge`, and what `finetune delete` says about the files that stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_cli.commands import delete, purge

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


def adopted_job() -> dict[str, Any]:
    """A finished job that adopted the result of the earlier job u0."""
    output = {"uri": "s3://models/x/team/bot/u0/model/a1-12345678", "kind": "adapter", "adoptedUid": "u0"}
    status = {"conditions": [{"type": "Finished", "status": "True"}], "output": output}
    return {"metadata": {"name": "bot", "namespace": "team", "uid": "u1"}, "spec": {"storage": {"uri": "s3://models/x"}}, "status": status}


class FakeCluster:
    namespace = "team"

    def get_job(self, name: str) -> dict[str, Any]:
        return adopted_job()


@pytest.mark.parametrize(("uid", "root"), [(None, "s3://models/x/team/bot/u0"), ("u7", "s3://models/x/team/bot/u7"), ("u1", "s3://models/x/team/bot/u1")])
def test_a_uid_selects_its_own_folder_also_if_the_job_adopted_a_result(uid: str | None, root: str) -> None:
    from finetune_cli.job_storage import root_of

    job = purge._finished_job(FakeCluster(), "bot", uid)  # type: ignore[arg-type]
    assert root_of(job)[0] == root


def test_delete_names_the_folder_of_an_adopted_result() -> None:
    assert delete.remaining_text(adopted_job()) == [
        "the adapter stay in s3://models/x/team/bot/u0; to remove them, run `finetune purge bot -n team --uid u0 --storage s3://models/x`"
    ]
