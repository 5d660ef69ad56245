"""`finetune purge`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
