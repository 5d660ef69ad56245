"""Builds the manifests of servers that serve the final model: an InferenceService of KServe, and a Deployment of vLLM.

The manifests contain no credentials. Instead, they name the Secret `<job>-model-storage`, which the user creates in the namespace of the server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import choose_max_lora_rank
from finetune_api.sources import HubSource, parse_source, redact_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OutputKind, ServingTarget

STORAGE_INITIALIZER = "kserve/storage-initializer:v0.15.2"
"""Image that downloads folders from storage. The arguments of its command are pairs of a URI and a local folder."""
VLLM_IMAGE = "vllm/vllm-openai:v0.11.0"
MODEL_FOLDER, ADAPTER_FOLDER = "/mnt/models", "/mnt/adapter"
PORT = 8000
GPU_RESOURCE = "nvidia.com/gpu"


@dataclass(frozen=True)
class ServedModel:
    """The facts about the final model that a server's manifest contains."""

    name: str
    namespace: str
    base: str
    """Source of the base model, without credentials."""
    uri: str
    """Address of the adapter or of the complete model."""
    lora_rank: int | None
    """Rank of the adapter; None for a complete model."""

    @staticmethod
    def of(run: RunConfig, uri: str, kind: OutputKind, folder: Path, merged_uri: str | None) -> ServedModel:
        """Return the facts about a run's model. If the run has a merged model, the merged model is served instead of the adapter."""
        lora_rank = None
        config_file = folder / "adapter_config.json"
        if kind is OutputKind.ADAPTER and merged_uri is None and config_file.exists():
            adapter_config = json.loads(config_file.read_text())
            lora_rank = max([int(adapter_config.get("r") or 0), *map(int, (adapter_config.get("rank_pattern") or {}).values())])
        return ServedModel(run.name, run.namespace, redact_source(run.spec.model.source or ""), merged_uri or uri, lora_rank)

    @property
    def hub_repository(self) -> str | None:
        """Repository of the base model; None if the model is not on a hub."""
        source = parse_source(self.base)
        return source.repo if isinstance(source, HubSource) else None

    @property
    def hub_revision(self) -> str | None:
        """Revision of the base model in its repository."""
        source = parse_source(self.base)
        return source.revision if isinstance(source, HubSource) else None

    @property
    def vllm_arguments(self) -> list[str]:
        """Options of vLLM for the adapter. Empty for a complete model."""
        if self.lora_rank is None:
            return []
        return ["--enable-lora", f"--max-lora-rank={choose_max_lora_rank(self.lora_rank)}"]


def build_serving_files(spec: FineTuneJobSpec, model: ServedModel) -> dict[str, str]:
    """Return the manifests for the servers in `output.serving`, by file name."""
    builders = {ServingTarget.VLLM: _build_vllm_manifests, ServingTarget.KSERVE: _build_kserve_manifests}
    return {f"{server}.yaml": _to_yaml(builders[server](model)) for server in spec.output.serving or []}


def _build_kserve_manifests(model: ServedModel) -> list[dict[str, Any]]:
    """Return a ServiceAccount with the credentials and an InferenceService.

    KServe downloads `storageUri` to /mnt/models. For an adapter, the server also downloads the base model from the hub.
    """
    arguments = [f"--model_name={model.name}"]
    if model.lora_rank is not None:
        revision_arguments = [f"--model_revision={model.hub_revision}"] if model.hub_revision else []
        arguments += [f"--model_id={model.hub_repository}", *revision_arguments, *model.vllm_arguments, f"--lora-modules={model.name}-adapter={MODEL_FOLDER}"]
    predictor = {
        "serviceAccountName": _build_account_name(model),
        "model": {
            "modelFormat": {"name": "huggingface"}, "storageUri": model.uri, "args": arguments,
            "resources": {"limits": {GPU_RESOURCE: "1"}, "requests": {GPU_RESOURCE: "1"}},
        },
    }  # fmt: skip
    service = {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": _build_object_metadata(model),
        "spec": {"predictor": predictor},
    }  # fmt: skip
    account = {
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": _build_object_metadata(model, _build_account_name(model)),
        "secrets": [{"name": _build_secret_name(model)}],
    }  # fmt: skip
    return [account, service]


def _build_vllm_manifests(model: ServedModel) -> list[dict[str, Any]]:
    """Return a Deployment of vLLM and its Service. An init container downloads the adapter, and the base or complete model if it is not on a hub."""
    folder_by_uri: dict[str, str] = {}
    if model.lora_rank is None:
        folder_by_uri[model.uri], served_source = MODEL_FOLDER, MODEL_FOLDER
    else:
        folder_by_uri[model.uri] = ADAPTER_FOLDER
        served_source = model.hub_repository or MODEL_FOLDER
        if model.hub_repository is None:
            folder_by_uri[model.base] = MODEL_FOLDER
    revision_arguments = [f"--revision={model.hub_revision}"] if model.lora_rank is not None and model.hub_revision else []
    adapter_arguments = [f"--lora-modules={model.name}={ADAPTER_FOLDER}"] if model.lora_rank is not None else []
    served_name = f"{model.name}-base" if model.lora_rank is not None else model.name
    arguments = [f"--model={served_source}", *revision_arguments, f"--served-model-name={served_name}", *model.vllm_arguments, *adapter_arguments]
    volumes = [("model", MODEL_FOLDER), ("adapter", ADAPTER_FOLDER)]
    used_volumes = [(volume, folder) for volume, folder in volumes if folder in folder_by_uri.values()]
    mounts = [{"name": volume, "mountPath": folder} for volume, folder in used_volumes]
    server_container = {
        "name": "vllm", "image": VLLM_IMAGE, "args": arguments, "ports": [{"containerPort": PORT}], "volumeMounts": mounts,
        "readinessProbe": {"httpGet": {"path": "/health", "port": PORT}}, "resources": {"limits": {GPU_RESOURCE: "1"}},
    }  # fmt: skip
    download_container = {
        "name": "download", "image": STORAGE_INITIALIZER, "args": [part for pair in folder_by_uri.items() for part in pair], "volumeMounts": mounts,
        "envFrom": [{"secretRef": {"name": _build_secret_name(model)}}],
    }  # fmt: skip
    labels = {"app.kubernetes.io/name": model.name}
    pod_spec = {
        "initContainers": [download_container], "containers": [server_container],
        "volumes": [{"name": volume, "emptyDir": {}} for volume, _ in used_volumes],
    }
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": _build_object_metadata(model),
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod_spec}},
    }  # fmt: skip
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": _build_object_metadata(model),
        "spec": {"selector": labels, "ports": [{"port": PORT, "targetPort": PORT}]},
    }  # fmt: skip
    return [deployment, service]


def _build_object_metadata(model: ServedModel, name: str | None = None) -> dict[str, str]:
    return {"name": name or model.name, "namespace": model.namespace}


def _build_account_name(model: ServedModel) -> str:
    return f"{model.name}-model-storage"


def _build_secret_name(model: ServedModel) -> str:
    return f"{model.name}-model-storage"


def _to_yaml(objects: list[dict[str, Any]]) -> str:
    import yaml

    return str(yaml.safe_dump_all(objects, sort_keys=False))
