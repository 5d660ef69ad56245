"""Simulate nodes and pods with KWOK: a pod that is bound to a node runs and succeeds at once.

Pods in the namespace `STEADY_NAMESPACE` keep running instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Self

from localcluster import Endpoint

from .load import Client

KWOK_PACKAGE, KWOK_VERSION = "sigs.k8s.io/kwok/cmd/kwok", "v0.8.0"
STEADY_NAMESPACE = "steady"
ROOT = Path(__file__).resolve().parents[2]
RUN_STAGES = """\
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: node}}
spec:
  resourceRef: {{apiGroup: v1, kind: Node}}
  selector:
    matchExpressions:
      - {{key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}}
  next:
    statusTemplate: |
      {{{{ $now := Now }}}}
      conditions:
        - {{type: Ready, status: "True", reason: Simulated, lastHeartbeatTime: {{{{ $now | Quote }}}},
           lastTransitionTime: {{{{ $now | Quote }}}}}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: run}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
      - {{key: .metadata.deletionTimestamp, operator: DoesNotExist}}
      - {{key: .status.phase, operator: In, values: [Pending]}}
  next:
    statusTemplate: |
      {{{{ $now := Now }}}}
      phase: Running
      startTime: {{{{ $now | Quote }}}}
      podIP: 127.0.0.1
      hostIP: 127.0.0.1
      conditions:
        - {{type: PodScheduled, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
        - {{type: Initialized, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
        - {{type: ContainersReady, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
        - {{type: Ready, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
      containerStatuses:
        - name: trainer
          image: example.org/trainer:1
          imageID: simulated
          ready: true
          started: true
          restartCount: 0
          state: {{running: {{startedAt: {{{{ $now | Quote }}}}}}}}
"""
END_STAGE = """\
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: end}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
      - {{key: .metadata.deletionTimestamp, operator: DoesNotExist}}
      - {{key: .status.phase, operator: In, values: [Running]}}
      - {{key: .metadata.namespace, operator: NotIn, values: [{steady}]}}
  next:
    statusTemplate: |
      {{{{ $now := Now }}}}
      phase: Succeeded
      containerStatuses:
        - name: trainer
          image: example.org/trainer:1
          imageID: simulated
          ready: false
          started: false
          restartCount: 0
          state:
            terminated:
              exitCode: 0
              reason: Completed
              message: '{{"output":{{"uri":"s3://bucket/model","sha256":"0","kind":"adapter"}},"step":10}}'
              startedAt: {{{{ $now | Quote }}}}
              finishedAt: {{{{ $now | Quote }}}}
"""
DELETE_STAGE = """\
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {{name: delete}}
spec:
  resourceRef: {{apiGroup: v1, kind: Pod}}
  selector:
    matchExpressions:
      - {{key: .metadata.deletionTimestamp, operator: Exists}}
  next:
    finalizers: {{empty: true}}
    delete: true
"""


def build_program() -> Path:
    """Build KWOK unless it is in the cache. Returns the path of the program."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    program_file = cache_folder / "finetune-operator" / "tools" / f"kwok-{KWOK_VERSION}" / "kwok"
    if not program_file.exists():
        subprocess.run([ROOT / "scripts" / "build-tool.sh", KWOK_PACKAGE, KWOK_VERSION, program_file], check=True, stdout=sys.stderr)
    return program_file


async def create_nodes(client: Client, node_count: int) -> None:
    """Create nodes that are ready, have large capacity and no taints."""
    capacity = {"cpu": "10000", "memory": "100Ti", "ephemeral-storage": "1000Ti", "pods": "10000"}
    for number in range(node_count):
        node_name = f"simulated-{number}"
        await client.send("POST", "/api/v1/nodes", {"metadata": {"name": node_name, "labels": {"kubernetes.io/hostname": node_name}}})
        ready_condition = {"type": "Ready", "status": "True", "reason": "Simulated"}
        node_status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready_condition]}
        merge_patch_type = "application/merge-patch+json"
        await client.send("PATCH", f"/api/v1/nodes/{node_name}/status", {"status": node_status}, merge_patch_type)
        await client.send("PATCH", f"/api/v1/nodes/{node_name}", {"spec": {"taints": None}}, merge_patch_type)


class Kwok:
    """Runs the KWOK process while its context is active."""

    def __init__(self, endpoint: Endpoint, folder: Path) -> None:
        self._endpoint, self._folder = endpoint, folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        config_file = self._folder / "kwok.yaml"
        config_file.write_text((RUN_STAGES + END_STAGE + DELETE_STAGE).format(steady=STEADY_NAMESPACE))
        command = [
            build_program(), "--kubeconfig", self._endpoint.kubeconfig, "--config", config_file, "--manage-all-nodes",
            "--node-lease-duration-seconds", "40",
        ]  # fmt: skip
        with (self._folder / "kwok.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=self._folder, env={**os.environ, "HOME": str(self._folder)},
            )  # fmt: skip
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
