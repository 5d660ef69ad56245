"""Adds the cache of base models to a pod: an init container that fills the cache, and the volume.

Only the init container can write to the cache. The init container runs the platform's trainer image without the user's mounts and variables, so no code of the
job can change the models of other jobs. The trainer container reads a node's cache through a read-only mount. If the cache is in a volume claim, the init
container copies the model to the pod's disk instead. In a preparation pod, the trainer container itself fills the cache in a claim, because every pod of the
namespace can change a claim anyway.
"""

from __future__ import annotations

from typing import Any

from finetune_api import names
from finetune_api.names import Env
from finetune_api.rules import NO_CACHE, NODE_CACHE
from finetune_api.sources import PvcSource, parse_source

from finetune_operator.objects import Object
from finetune_operator.settings import OperatorConfig

VOLUME_NAME = "model-cache"
CLAIM_FOLDER = "finetune-models"
"""Folder of the cache on a volume claim. The cache has a folder of its own, so that it touches no other files of the volume."""
NODE_FREE_DISK_SHARE = "0.15"
"""Fraction of a node's disk that the cache leaves free. With less free space, the kubelet usually evicts pods."""
COPIED_MOUNT_NAMES = ("run", "work", "tmp", "ca")
"""Volumes of the trainer container that the init container also mounts."""
COPIED_VARIABLE_NAMES = frozenset({
    *(name.value for name in (Env.RUN_SHA256, Env.NODE_RANK, Env.POD_NAME, Env.POD_UID, Env.NODE_NAME, Env.DISK_LIMIT, Env.HF_TOKEN)),
    *(prefix + name.value for prefix in ("", names.MODEL_CREDENTIALS_PREFIX)
      for name in (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN, Env.STORAGE_CUSTOMER_KEY)),
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
})  # fmt: skip
"""Environment variables that the init container copies from the trainer container. These variables decide what is downloaded and how.

Other variables of the user are not copied, because they could load code into the init container."""


def add_model_cache(pod: Object, cache: str | None, namespace: str, config: OperatorConfig) -> None:
    """Add the model cache to the pod spec `pod`. `cache`: the resolved value of `model.cache`."""
    if cache in (None, NO_CACHE) or (cache == NODE_CACHE and not config.model_cache.node.is_enabled_in(namespace)):
        return
    trainer = pod["containers"][0]
    if cache == NODE_CACHE:
        volume: Object = {"hostPath": {"path": config.model_cache.node.path, "type": "DirectoryOrCreate"}}
        size_limit = str(config.model_cache.node.size_limit_bytes)
        arguments = ["--folder", names.MODEL_CACHE_MOUNT, "--tenant", namespace, "--size-limit", size_limit, "--free-share", NODE_FREE_DISK_SHARE]
        trainer["volumeMounts"].append(
            {"name": VOLUME_NAME, "mountPath": f"{names.MODEL_CACHE_MOUNT}/{namespace}", "subPath": namespace, "readOnly": True}
        )
    else:
        volume, folder = _build_claim_volume_and_folder(cache or "")
        arguments = ["--folder", folder, "--tenant", names.CLAIM_CACHE_TENANT, "--copy"]
    pod["volumes"].append({"name": VOLUME_NAME, **volume})
    pod["initContainers"] = [_build_init_container(trainer, ["fill-cache", *arguments], config)]
    _add_pull_secrets(pod, config)


def uses_claim_cache(cache: str | None) -> bool:
    """Whether the cache is in a PersistentVolumeClaim. `cache`: the resolved value of `model.cache`."""
    return cache not in (None, NO_CACHE, NODE_CACHE)


def add_claim_cache_to_preparation(pod: Object, cache: str) -> None:
    """Mount the claim of the cache into the container of a preparation, and name the folder that the container fills."""
    volume, folder = _build_claim_volume_and_folder(cache)
    container = pod["containers"][0]
    pod["volumes"].append({"name": VOLUME_NAME, **volume})
    container["volumeMounts"].append({"name": VOLUME_NAME, "mountPath": names.MODEL_CACHE_MOUNT})
    container["env"].append({"name": Env.CLAIM_CACHE.value, "value": folder})


def _build_claim_volume_and_folder(cache: str) -> tuple[Object, str]:
    """Return the volume of a cache in a claim, and the path of the cache in a container that mounts the volume."""
    source = parse_source(cache, spec_path="model.cache")
    assert isinstance(source, PvcSource)
    folder = "/".join(part for part in (names.MODEL_CACHE_MOUNT, source.path, CLAIM_FOLDER) if part)
    # In arguments and variables, Kubernetes replaces $(NAME) with the value of the variable NAME, so a token could become part of the
    # folder's name. Kubernetes writes `$$` as $ and does not replace the text after it.
    return {"persistentVolumeClaim": {"claimName": source.claim}}, folder.replace("$", "$$")


def _add_pull_secrets(pod: Object, config: OperatorConfig) -> None:
    """Add the pull Secrets of the platform's trainer image. Without this call, a pod whose job sets `placement.imagePullSecrets` lacks these Secrets."""
    secrets = pod.get("imagePullSecrets", [])
    missing_secrets = [{"name": name} for name in config.trainer.image_pull_secrets if {"name": name} not in secrets]
    if missing_secrets:
        pod["imagePullSecrets"] = [*secrets, *missing_secrets]


def _build_init_container(trainer: Object, arguments: list[str], config: OperatorConfig) -> Object:
    """Return the init container. The requests of the init container are at most those of the trainer container, so the pod's requests do not grow."""
    mounts = [mount for mount in trainer["volumeMounts"] if mount["name"] in COPIED_MOUNT_NAMES]
    return {
        "name": names.MODEL_CACHE_CONTAINER,
        "image": config.trainer.image,
        "imagePullPolicy": config.trainer.image_pull_policy.value,
        "args": arguments,
        "env": _build_env(trainer["env"], config.trainer.env),
        "resources": {kind: _remove_device_resources(amounts) for kind, amounts in trainer["resources"].items()},
        "securityContext": trainer["securityContext"],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*mounts, {"name": VOLUME_NAME, "mountPath": names.MODEL_CACHE_MOUNT}],
    }


def _build_env(variables: list[Object], platform_variables: dict[str, str]) -> list[Object]:
    copied_variables = [variable for variable in variables if variable["name"] in COPIED_VARIABLE_NAMES]
    copied_names = {variable["name"] for variable in copied_variables}
    return [*copied_variables, *({"name": name, "value": value} for name, value in sorted(platform_variables.items()) if name not in copied_names)]


def _remove_device_resources(amounts: dict[str, Any]) -> dict[str, Any]:
    return {name: amount for name, amount in amounts.items() if name in ("cpu", "memory", "ephemeral-storage")}
