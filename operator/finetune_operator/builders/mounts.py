"""Builds volumes and mounts for the ConfigMaps, volume claims and CA bundles that a spec names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.names import CA_MOUNT, CONFIGMAP_MOUNT, PVC_MOUNT
from finetune_api.sources import ConfigMapSource, PvcSource, parse_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import ConfigMapKeyRef
from pydantic import BaseModel

from finetune_operator.objects import Object

CA_FILE_PATHS = {"storage": "ca.crt", "model": "model/ca.crt", "dataset": "dataset/ca.crt"}
"""Path of each storage connection's CA bundle, relative to CA_MOUNT."""


@dataclass(frozen=True)
class PodVolumes:
    """Volumes of a pod, and their mounts in the trainer container."""

    volumes: tuple[Object, ...]
    mounts: tuple[Object, ...]


def build_mounts(spec: FineTuneJobSpec) -> PodVolumes:
    """Return the volumes and mounts that the spec needs. Errors: ConfigError for a source that cannot be parsed."""
    volumes: list[Object] = []
    mounts: list[Object] = []
    for number, name in enumerate(sorted(_find_config_maps(spec))):
        volumes.append({"name": f"configmap-{number}", "configMap": {"name": name}})
        mounts.append({"name": f"configmap-{number}", "mountPath": f"{CONFIGMAP_MOUNT}/{name}", "readOnly": True})
    for number, (claim, writable) in enumerate(sorted(_find_claims(spec).items())):
        volumes.append({"name": f"pvc-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"pvc-{number}", "mountPath": f"{PVC_MOUNT}/{claim}", "readOnly": not writable})
    bundles = find_ca_bundles(spec)
    if bundles:
        sources = [
            {"configMap": {"name": ref.name, "items": [{"key": ref.key, "path": CA_FILE_PATHS[connection]}]}}
            for connection, ref in bundles.items()
        ]
        volumes.append({"name": "ca", "projected": {"sources": sources}})
        mounts.append({"name": "ca", "mountPath": CA_MOUNT, "readOnly": True})
    user_volumes, user_mounts = _build_user_volumes(spec)
    return PodVolumes((*volumes, *user_volumes), (*mounts, *user_mounts))


def find_ca_bundles(spec: FineTuneJobSpec) -> dict[str, ConfigMapKeyRef]:
    """Return the reference to the CA bundle of each storage connection that has one, by name of the connection."""
    connections = {"storage": spec.storage, "model": spec.model.storage, "dataset": spec.dataset.storage}
    return {name: storage.ca_bundle_ref for name, storage in connections.items() if storage and storage.ca_bundle_ref}


def _find_config_maps(spec: FineTuneJobSpec) -> set[str]:
    source_names = {source.name for source, _ in _yield_sources(spec) if isinstance(source, ConfigMapSource)}
    bundle_ids = [id(ref) for ref in find_ca_bundles(spec).values()]
    return source_names | {ref.name for ref in _yield_config_map_references(spec) if id(ref) not in bundle_ids}


def _find_claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """Return the names of all volume claims in the spec, and for each name whether the job writes to the claim's volume."""
    is_written_by_claim: dict[str, bool] = {}
    for source, writable in _yield_sources(spec):
        if isinstance(source, PvcSource):
            is_written_by_claim[source.claim] = is_written_by_claim.get(source.claim, False) or writable
    return is_written_by_claim


def _yield_sources(spec: FineTuneJobSpec) -> Iterator[tuple[Any, bool]]:
    """Yield each source of the spec and whether the job writes to that source."""
    adapter_source = spec.method.adapter.source if spec.method.adapter else None
    reference_model = spec.trainer.dpo.reference_model if spec.trainer.dpo else None
    metric_models = spec.evaluation.metric_models
    dataset = spec.dataset
    mixture_sources = [entry.source for entry in dataset.mixture or []]
    read_sources = [
        spec.model.source,
        spec.model.tokenizer,
        adapter_source,
        reference_model,
        dataset.train,
        dataset.validation,
        dataset.test,
        *mixture_sources,
        metric_models.bertscore if metric_models else None,
        metric_models.semantic_similarity if metric_models else None,
        *(benchmark.folder for benchmark in spec.evaluation.benchmarks or []),
        *(item.source for item in spec.output.combine_adapters or []),
        spec.phases.from_,
    ]
    resume_source = spec.checkpoint.resume
    if resume_source is not None and "://" in resume_source:
        read_sources.append(resume_source)
    for source_text in read_sources:
        if source_text:
            yield parse_source(source_text), False
    if spec.storage.uri and spec.storage.uri.startswith("pvc://"):
        yield parse_source(spec.storage.uri), True


def _yield_config_map_references(value: Any) -> Iterator[ConfigMapKeyRef]:
    """Yield all references in `value` to a key of a ConfigMap."""
    if isinstance(value, ConfigMapKeyRef):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _yield_config_map_references(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _yield_config_map_references(item)


def _build_user_volumes(spec: FineTuneJobSpec) -> tuple[list[Object], list[Object]]:
    """Return the volumes and mounts of `placement.volumes` and `placement.volumeMounts`."""
    volumes: list[Object] = []
    for volume in spec.placement.volumes or []:
        if volume.persistent_volume_claim:
            volume_source: Object = {"persistentVolumeClaim": {"claimName": volume.persistent_volume_claim}}
        elif volume.config_map:
            volume_source = {"configMap": {"name": volume.config_map}}
        else:
            volume_source = {"secret": {"secretName": volume.secret}}
        volumes.append({"name": f"user-{volume.name}", **volume_source})
    mounts: list[Object] = []
    for mount in spec.placement.volume_mounts or []:
        volume_mount: Object = {"name": f"user-{mount.name}", "mountPath": mount.mount_path}
        if mount.sub_path:
            volume_mount["subPath"] = mount.sub_path
        if mount.read_only:
            volume_mount["readOnly"] = True
        mounts.append(volume_mount)
    return volumes, mounts
