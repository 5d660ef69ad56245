"""Adds the container with the vLLM server to a training pod, for jobs with `trainer.grpo.generation.backend: vllm`.

The container is a native sidecar: the kubelet starts it before the trainer and stops it after the trainer, so the pod ends when the trainer ends.
The trainer writes the model to a volume that both containers mount, and reaches the server over the loopback address. The server has no secrets and
no other volume of the job.
"""

from __future__ import annotations

from finetune_api import names
from finetune_api.rules import generation_server, value_or_default
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.trainer import Generation

from finetune_operator.objects import Object

SHARED_VOLUME, TMP_VOLUME, SHM_VOLUME = "generation", "generation-tmp", "generation-shm"


def add_generation_server(pod: Object, spec: FineTuneJobSpec, image_pull_policy: str) -> None:
    """Add the server and its volumes to the pod spec `pod`, if the job requests a server."""
    server = generation_server(spec)
    if server is None:
        return
    trainer = pod["containers"][0]
    trainer["volumeMounts"].append({"name": SHARED_VOLUME, "mountPath": names.GENERATION_MOUNT})
    # The server is the last init container, because Kubernetes adds a sidecar's requests to those of all init containers that follow it.
    pod.setdefault("initContainers", []).append(_build_container(server, spec, trainer["securityContext"], image_pull_policy))
    pod["volumes"] += [
        {"name": SHARED_VOLUME, "emptyDir": {}},
        {"name": TMP_VOLUME, "emptyDir": {}},
        {"name": SHM_VOLUME, "emptyDir": {"medium": "Memory"}},
    ]


def _build_container(server: Generation, spec: FineTuneJobSpec, security_context: Object, image_pull_policy: str) -> Object:
    return {
        "name": names.GENERATION_CONTAINER,
        "image": server.image,
        "imagePullPolicy": image_pull_policy,
        "restartPolicy": "Always",
        "resources": _build_resources(server, spec),
        "securityContext": security_context,
        "volumeMounts": [
            {"name": SHARED_VOLUME, "mountPath": names.GENERATION_MOUNT},
            {"name": TMP_VOLUME, "mountPath": "/tmp"},  # noqa: S108 -- an emptyDir: the root file system is read-only
            {"name": SHM_VOLUME, "mountPath": "/dev/shm"},  # noqa: S108 -- shared memory on Linux
        ],
    }


def _build_resources(server: Generation, spec: FineTuneJobSpec) -> Object:
    memory, gpus = str(value_or_default(server, "memory")), int(value_or_default(server, "gpus"))
    requests, limits = {"cpu": str(value_or_default(server, "cpu")), "memory": memory}, {"memory": memory}
    if gpus:
        gpu_resource_name = spec.resources.gpu_resource or "nvidia.com/gpu"
        requests[gpu_resource_name] = limits[gpu_resource_name] = str(gpus)
    return {"requests": requests, "limits": limits}
