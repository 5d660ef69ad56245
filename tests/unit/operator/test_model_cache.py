"""`model.cache`: the init container and the volumes of a pod, the platform's default cache, and which namespaces may use the cache on the nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Annotation, Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ModelOrigin, ResolvedConfig
from finetune_operator.builders.job import build_job, build_preparation_job
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.metrics import Metrics
from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.settings import OperatorConfig, SettingsError, parse_config
from finetune_operator.views import read_pod

from tests.unit.operator.samples import finetunejob, spec

NODE_CACHE = {"path": "/var/lib/finetune-models", "sizeLimit": "1Ki", "namespaces": ["team", "ml-*"]}


def make_config(cache: Object | None = None, **fields: Any) -> OperatorConfig:
    trainer = {"image": "registry.example.com/trainer:1", "env": {"HF_HUB_ETAG_TIMEOUT": "30", "HF_ENDPOINT": "https://mirror.example.com"}}
    trainer |= fields.pop("trainer", {})
    return parse_config({"trainer": trainer, **({"modelCache": cache} if cache is not None else {}), **fields}, "test")


CONFIG = make_config({"node": NODE_CACHE})


def build_job_body(raw_spec: Object, config: OperatorConfig = CONFIG, namespace: str = "team") -> tuple[AcceptedSpec, Object]:
    acceptance = accept(raw_spec, config, namespace=namespace)
    assert isinstance(acceptance, AcceptedSpec), acceptance
    job = finetunejob(raw_spec)
    run = build_run_config(job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    body = build_job(job, run, acceptance.pool, config, model_cache=acceptance.spec.model.cache)
    return acceptance, body


def get_pod_spec(body: Object) -> Object:
    pod_spec: Object = body["spec"]["template"]["spec"]
    return pod_spec


def get_mounts(container: Object) -> list[Object]:
    return [mount for mount in container["volumeMounts"] if mount["name"] == "model-cache"]


def get_volumes(pod_spec: Object) -> list[Object]:
    return [volume for volume in pod_spec["volumes"] if volume["name"] == "model-cache"]


def test_a_claim_is_mounted_only_in_the_init_container() -> None:
    pod = get_pod_spec(build_job_body(spec(model={"cache": "pvc://models/hub/base"}))[1])
    (init,) = pod["initContainers"]
    assert get_volumes(pod) == [{"name": "model-cache", "persistentVolumeClaim": {"claimName": "models"}}]
    assert get_mounts(init) == [{"name": "model-cache", "mountPath": "/mnt/model-cache"}] and get_mounts(pod["containers"][0]) == []
    assert init["args"] == ["fill-cache", "--folder", "/mnt/model-cache/hub/base/finetune-models", "--tenant", "models", "--copy"]


def test_cache_in_the_root_of_a_claim_has_its_own_folder() -> None:
    (init,) = get_pod_spec(build_job_body(spec(model={"cache": "pvc://models"}))[1])["initContainers"]
    assert init["args"][2] == "/mnt/model-cache/finetune-models"


def test_variables_in_the_path_of_a_claim_are_not_replaced() -> None:
    """If `$` were not doubled, the kubelet would replace $(HF_TOKEN) in the arguments, and the token would appear in a folder's name and in messages."""
    (init,) = get_pod_spec(build_job_body(spec(model={"cache": "pvc://models/$(HF_TOKEN)/$x"}))[1])["initContainers"]
    assert init["args"][2] == "/mnt/model-cache/$$(HF_TOKEN)/$$x/finetune-models"


def test_platform_image_can_be_pulled_in_a_pod_with_a_user_image() -> None:
    config = make_config({"node": NODE_CACHE}, trainer={"imagePullSecrets": ["platform", "shared"]})
    placement = {"image": "registry.example.com/own:2", "imagePullSecrets": ["own", "shared"]}
    pod = get_pod_spec(build_job_body(spec(model={"cache": "node"}, placement=placement), config)[1])
    assert pod["imagePullSecrets"] == [{"name": "own"}, {"name": "shared"}, {"name": "platform"}]
    pod_without_cache = get_pod_spec(build_job_body(spec(placement=placement), config)[1])
    assert pod_without_cache["imagePullSecrets"] == [{"name": "own"}, {"name": "shared"}]


def test_the_cache_is_filled_before_the_generation_server_starts() -> None:
    generation = {"backend": "vllm", "image": "registry.example.com/vllm:1"}
    trainer = {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}], "grpo": {"generation": generation, "numGenerations": 2}}
    pod = get_pod_spec(build_job_body(spec(model={"cache": "node"}, trainer=trainer, resources={"gpusPerNode": 1}))[1])
    assert [container["name"] for container in pod["initContainers"]] == ["model-cache", names.GENERATION_CONTAINER]


def test_the_trainer_container_can_only_read_the_models_of_its_namespace_on_the_node() -> None:
    pod = get_pod_spec(build_job_body(spec(model={"cache": "node"}))[1])
    (init,) = pod["initContainers"]
    assert get_volumes(pod) == [{"name": "model-cache", "hostPath": {"path": "/var/lib/finetune-models", "type": "DirectoryOrCreate"}}]
    assert get_mounts(init) == [{"name": "model-cache", "mountPath": "/mnt/model-cache"}]
    assert get_mounts(pod["containers"][0]) == [{"name": "model-cache", "mountPath": "/mnt/model-cache/team", "subPath": "team", "readOnly": True}]
    assert init["args"] == ["fill-cache", "--folder", "/mnt/model-cache", "--tenant", "team", "--size-limit", "1024", "--free-share", "0.15"]


def test_no_code_of_the_user_runs_in_the_init_container() -> None:
    """The init container does not use the user's image, the user's mounts or variables that load code. It keeps credentials and variables that name servers."""
    raw_spec = spec(
        model={"cache": "node", "tokenSecretRef": {"name": "hub", "key": "token"}},
        placement={
            "image": "registry.example.com/own:2",
            "env": [{"name": name, "value": "x"} for name in ("MY_PRELOAD", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HOME", "SSL_CERT_FILE", "AWS_CONFIG_FILE")],
            "volumes": [{"name": "code", "persistentVolumeClaim": "code"}], "volumeMounts": [{"name": "code", "mountPath": "/code"}],
        },
        storage={"credentialsSecretRef": {"name": "s3"}},
        resources={"gpusPerNode": 1, "memory": "8Gi"},
    )  # fmt: skip
    pod = get_pod_spec(build_job_body(raw_spec)[1])
    (init,), (trainer,) = pod["initContainers"], pod["containers"]
    assert (init["name"], init["image"], trainer["image"]) == ("model-cache", "registry.example.com/trainer:1", "registry.example.com/own:2")
    variables = {variable["name"]: variable.get("value", "from elsewhere") for variable in init["env"]}
    assert variables.keys() - {"FINETUNE_RUN_SHA256"} == {
        "FINETUNE_NODE_RANK", "FINETUNE_POD_NAME", "FINETUNE_POD_UID", "FINETUNE_NODE_NAME", "FINETUNE_DISK_LIMIT_BYTES", "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT",
    }  # fmt: skip
    assert (variables["HF_ENDPOINT"], variables["HF_HUB_ETAG_TIMEOUT"]) == ("x", "30")
    assert [mount["name"] for mount in init["volumeMounts"]] == ["run", "work", "tmp", "model-cache"]
    assert init["securityContext"] == trainer["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert "nvidia.com/gpu" in trainer["resources"]["limits"] and "nvidia.com/gpu" not in init["resources"]["limits"]
    assert init["resources"]["limits"]["memory"] == "8Gi"


def test_older_trainer_images_get_a_run_configuration_without_the_cache() -> None:
    acceptance, body = build_job_body(spec(model={"cache": "node"}))
    run = json.loads(body["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG])
    assert acceptance.spec.model.cache == "node" and "cache" not in run["spec"]["model"]
    _, body_with_default = build_job_body(spec(), make_config({"default": "node", "node": NODE_CACHE}))
    run = json.loads(body_with_default["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG])
    assert "model.cache" not in run["defaults"] and "cache" not in run["spec"]["model"]


@pytest.mark.parametrize("raw_spec", [spec(), spec(model={"cache": "none"})])
def test_pod_of_a_job_without_a_cache_has_no_init_container_and_no_volume(raw_spec: Object) -> None:
    pod = get_pod_spec(build_job_body(raw_spec)[1])
    assert "initContainers" not in pod and get_volumes(pod) == []


def build_preparation_pod(cache: str, **groups: Any) -> Object:
    acceptance, _ = build_job_body(spec(model={"cache": cache}, **groups))
    job = finetunejob(spec())
    run = build_run_config(job, acceptance.spec, 1, defaults=acceptance.defaults, committed_step=0, max_step=None)
    body = build_preparation_job(job, run, 1, acceptance.spec.prepare.resources, None, CONFIG, model_cache=acceptance.spec.model.cache)
    return get_pod_spec(body)


@pytest.mark.parametrize("cache", ["node", "none"])
def test_a_preparation_pod_does_not_mount_the_cache_of_a_node(cache: str) -> None:
    """A preparation pod may run on another node than the training pods. So the preparation pod does not fill the cache of its node, and downloads no weights.
    """
    pod = build_preparation_pod(cache, placement={"nodeSelector": {"zone": "a"}})
    assert "initContainers" not in pod and get_volumes(pod) == [] and "nodeSelector" not in pod
    assert "FINETUNE_CLAIM_CACHE" not in {variable["name"] for variable in pod["containers"][0]["env"]}


def test_a_preparation_fills_the_cache_in_a_claim() -> None:
    """The preparation pod may be the first pod that mounts the claim, so it must run on nodes on which the training pods can run."""
    pod = build_preparation_pod("pvc://models/$(HF_TOKEN)", placement={"nodeSelector": {"zone": "a"}})
    (container,) = pod["containers"]
    assert "initContainers" not in pod and pod["nodeSelector"] == {"zone": "a"}
    assert get_volumes(pod) == [{"name": "model-cache", "persistentVolumeClaim": {"claimName": "models"}}]
    assert get_mounts(container) == [{"name": "model-cache", "mountPath": "/mnt/model-cache"}]
    assert {"name": "FINETUNE_CLAIM_CACHE", "value": "/mnt/model-cache/$$(HF_TOKEN)/finetune-models"} in container["env"]


# ---- default and permission ----


@pytest.mark.parametrize(
    ("cache", "namespace", "source", "expected"),
    [
        ({"default": "pvc://models"}, "team", "org/m", "pvc://models"), ({"default": "node", "node": NODE_CACHE}, "ml-1", "s3://bucket/m", "node"),
        ({"default": "node", "node": NODE_CACHE}, "other", "org/m", None), ({"default": "pvc://models"}, "team", "pvc://claim/m", None),
        ({"default": "pvc://models"}, "team", "file:///m", None), ({"node": NODE_CACHE}, "team", "org/m", None), (None, "team", "org/m", None),
    ],
)  # fmt: skip
def test_default_cache_depends_on_configuration_namespace_and_model_source(cache: Object | None, namespace: str, source: str, expected: str | None) -> None:
    acceptance, _ = build_job_body(spec(model={"source": source}), make_config(cache), namespace)
    assert acceptance.spec.model.cache == expected and acceptance.defaults.get("model.cache") == expected


@pytest.mark.parametrize(("cache", "expected"), [({"default": "pvc://new"}, "pvc://new"), ({"default": "node", "node": NODE_CACHE}, "node"), (None, None)])
def test_next_attempt_uses_the_current_default_cache(cache: Object | None, expected: str | None) -> None:
    """The next attempt does not keep the cache of the first attempt, because the claim of that cache may no longer exist."""
    first_acceptance, _ = build_job_body(spec(), make_config({"default": "pvc://old"}))
    later_acceptance = accept(spec(), make_config(cache), FirstAttempt(first_acceptance.defaults, first_acceptance.spec_sha256), namespace="team")
    assert isinstance(later_acceptance, AcceptedSpec)
    assert later_acceptance.spec.model.cache == expected and later_acceptance.defaults.get("model.cache") == expected


def test_job_can_turn_off_the_default_cache() -> None:
    acceptance, body = build_job_body(spec(model={"cache": "none"}), make_config({"default": "pvc://models"}))
    assert acceptance.spec.model.cache == "none" and "initContainers" not in get_pod_spec(body)


@pytest.mark.parametrize(
    ("config", "namespace", "message"),
    [
        (make_config(), "team", "spec.model.cache is node, but the operator's configuration has no such cache: write pvc://claim/path, or remove model.cache"),
        (CONFIG, "other",
         "spec.model.cache is node, but the operator's configuration has no such cache for namespace other: write pvc://claim/path, or remove model.cache"),
    ],
)  # fmt: skip
def test_cache_on_the_nodes_must_be_configured_for_the_namespace(config: OperatorConfig, namespace: str, message: str) -> None:
    refusal = accept(spec(model={"cache": "node"}), config, namespace=namespace)
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.message, refusal.is_final) == (Reason.REJECTED, message, True)


@pytest.mark.parametrize(
    ("cache", "text"),
    [
        ({"default": "node"}, "default is node, but node.path and node.namespaces are empty"),
        ({"node": {"path": "/var/lib/x"}}, "node.path and node.namespaces only have an effect together"),
        ({"node": {"namespaces": ["*"]}}, "node.path and node.namespaces only have an effect together"),
        ({"default": "s3://bucket/x"}, "modelCache.default"), ({"node": {**NODE_CACHE, "path": "/var"}}, "modelCache.node.path"),
        ({"node": {**NODE_CACHE, "path": "/var/../etc"}}, "modelCache.node.path"), ({"default": "pvc://claim/../x"}, "modelCache.default"),
        ({"node": {**NODE_CACHE, "path": "relative/x"}}, "modelCache.node.path"), ({"node": {**NODE_CACHE, "sizeLimit": "much"}}, "modelCache.node.sizeLimit"),
    ],
)  # fmt: skip
def test_invalid_cache_configuration_is_refused(cache: Object, text: str) -> None:
    with pytest.raises(SettingsError, match=text.replace(".", r"\.")):
        make_config(cache)


# ---- status and metrics ----


def test_waiting_message_names_the_container_that_fills_the_cache() -> None:
    labels = {"app.kubernetes.io/managed-by": "finetune-operator", "finetune-operator.io/name": "run", "finetune-operator.io/attempt": "1"}
    container_statuses = {
        "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}],
        "initContainerStatuses": [{"name": "model-cache", "state": {"running": {"startedAt": "2026-11-21T12:00:00Z"}}}],
    }
    pod = read_pod({"metadata": {"namespace": "team", "name": "run-1-0", "uid": "u", "labels": labels}, "status": {"phase": "Pending", **container_statuses}})
    assert pod is not None
    assert (pod.waiting_reason, pod.waiting_message) == ("PodInitializing", "the init container model-cache provides the model from model.cache")


def test_metrics_count_models_by_their_source() -> None:
    metrics = Metrics()
    for resolved in (
        ResolvedConfig(model_source=ModelOrigin.CACHE, model_bytes_saved=7), ResolvedConfig(model_source=ModelOrigin.CACHE, model_bytes_saved=5),
        ResolvedConfig(model_source=ModelOrigin.DOWNLOAD, model_bytes_saved=0), ResolvedConfig(),
    ):  # fmt: skip
        metrics.record_model_fetch(resolved)
    get_value = metrics.registry.get_sample_value
    assert get_value("finetune_operator_model_fetches_total", {"source": "cache"}) == 2
    assert get_value("finetune_operator_model_fetches_total", {"source": "download"}) == 1
    assert get_value("finetune_operator_model_bytes_saved_total") == 12


def test_spec_accepts_a_claim_as_model_cache() -> None:
    assert FineTuneJobSpec.model_validate(spec(model={"cache": "pvc://models/hub"})).model.cache == "pvc://models/hub"
