"""The operator process: its health endpoints, metrics and configuration, and its errors at startup."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import yaml

from localcluster import Endpoint
from tests.integration.operator.rig import Operator, Rig


async def fetch(operator: Operator, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{operator.port()}{path}") as answer:
        return answer.status, await answer.text()


async def wait_for_metrics(operator: Operator, pattern: str) -> str:
    """Read the metrics until they match `pattern`, because a test may see a newly written status before the operator has counted this write in its metrics."""
    async with asyncio.timeout(30):
        while not re.search(pattern, text := (await fetch(operator, "/metrics"))[1]):
            continue
    return text


async def test_health_and_metrics_are_served(operator: Operator, world: Rig) -> None:
    await world.create()
    await world.kubelet.succeed(await world.wait_for_pod("run-1", 0, "Running"))
    await world.wait_for_phase("Succeeded")
    assert await fetch(operator, "/healthz") == (200, "ok\n")
    assert await fetch(operator, "/readyz") == (200, "ok\n")
    text = await wait_for_metrics(operator, pattern=r'finetune_operator_jobs_finished_total\{outcome="Succeeded"\} [1-9]')
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['finetune_operator_jobs_finished_total{outcome="Succeeded"}']) >= 1
    assert float(lines['finetune_operator_api_requests_total{code="201",resource="jobs",verb="create"}']) >= 1
    for plural in ("finetunejobs", "jobs", "pods"):
        assert float(lines[f'finetune_operator_api_requests_total{{code="200",resource="{plural}",verb="watch"}}']) >= 1
    assert float(lines['finetune_operator_jobs{phase="Succeeded"}']) >= 1
    assert world.namespace not in text


def run_operator(tmp_path: Path, text: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    command = [sys.executable, "-m", "finetune_operator", "--config", str(path)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)


def test_a_wrong_configuration_is_reported_in_one_line(tmp_path: Path) -> None:
    completed_process = run_operator(tmp_path, "workers: none\nnodePool: []\n", {})
    assert completed_process.returncode == 2
    assert completed_process.stderr.count("\n") == 1
    assert "workers: Input should be a valid integer" in completed_process.stderr
    assert "nodePool: Extra inputs are not permitted" in completed_process.stderr


def test_a_missing_api_server_is_reported_without_a_traceback(tmp_path: Path) -> None:
    completed_process = run_operator(tmp_path, "{}", {"KUBECONFIG": str(tmp_path / "none")})
    assert completed_process.returncode == 2
    assert "cannot find the address of an API server" in completed_process.stderr
    assert "Traceback" not in completed_process.stderr


def test_a_missing_crd_is_reported_without_a_traceback(tmp_path: Path, endpoint_with_crd: Endpoint) -> None:
    config = {"http": {"port": 0}, "api": {"timeoutSeconds": 5}}
    kubeconfig = yaml.safe_load(endpoint_with_crd.kubeconfig.read_text())
    path = tmp_path / "kubeconfig"
    kubeconfig["clusters"][0]["cluster"]["server"] += "/not-here"
    path.write_text(yaml.safe_dump(kubeconfig))
    completed_process = run_operator(tmp_path, yaml.safe_dump(config), {"KUBECONFIG": str(path)})
    assert completed_process.returncode == 1
    assert "install the CRD first" in completed_process.stderr
    assert "Traceback" not in completed_process.stderr
