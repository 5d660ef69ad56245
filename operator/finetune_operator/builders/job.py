"""Builds the Indexed Job of one attempt and its Service. `isolation.py` builds the attempt's Secret and NetworkPolicy.

The Job contains the run configuration, so one write creates an attempt. The pods meet Pod Security `restricted`. The FineTuneJob's
labels and annotations are not copied to the Job. Otherwise a tool such as Argo CD would treat the Job as its own object and prune it.
"""

from __future__ import annotations

from typing import Any

from finetune_api import names
from finetune_api.exits import list_exit_codes_that_fail_the_job
from finetune_api.names import Annotation, Env, Label
from finetune_api.pod import RunConfig
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import EnvVar, PrepareResources
from finetune_api.spec.common import SecretKeyRef, SecretRef, StorageConnection
from finetune_api.tenancy import find_user_code_in_preparation

from finetune_operator.builders.generation import add_generation_server
from finetune_operator.builders.model_cache import add_claim_cache_to_preparation, add_model_cache, uses_claim_cache
from finetune_operator.builders.mounts import build_mounts
from finetune_operator.builders.run_config import get_customer_key_variable
from finetune_operator.objects import DEFAULT_CONTAINER_ANNOTATION, Object
from finetune_operator.settings import NodePool, OperatorConfig
from finetune_operator.views import INDEX_ANNOTATION, JOB_NAME_LABEL, FineTuneJobView, JobView

ZONE_LABEL = "topology.kubernetes.io/zone"
HOST_LABEL = "kubernetes.io/hostname"
MAX_PREPARATION_SECONDS = 6 * 3600
"""Maximum running time of a preparation. The Job controller ends a preparation that takes longer, because its pod probably hangs."""
PREPARATION_GRACE_SECONDS = 30
"""Grace period of a preparation pod. This grace period is short, because a preparation pod has nothing to save."""


def build_job(
    job: FineTuneJobView, run: RunConfig, pool: NodePool | None, config: OperatorConfig, secret_name: str = "", *, model_cache: str | None = None
) -> Object:
    """Return the Job of the attempt that `run` describes.

    `secret_name`: name of the attempt's Secret, or an empty string if it has none. `model_cache`: the resolved value of `model.cache`, which
    `run` does not contain.
    """
    name, queue, run_json = names.attempt_job_name(job.name, run.attempt), run.spec.placement.queue_name, run.to_bytes()
    pod = _build_pod_spec(name, run, run.sha256(run_json), pool, config, secret_name)
    add_model_cache(pod, model_cache, job.namespace, config)
    add_generation_server(pod, run.spec, config.trainer.image_pull_policy.value)
    body = _build_indexed_job(job, run.spec, config, run_json, name=name, attempt=run.attempt, pod_count=run.world.nodes, pod=pod)
    if secret_name:
        body["metadata"]["annotations"][Annotation.ATTEMPT_SECRET.value] = secret_name
    if queue:
        body["metadata"]["labels"][Label.QUEUE.value] = queue
        body["spec"]["suspend"] = True
    return body


def build_preparation_job(
    job: FineTuneJobView, run: RunConfig, preparation_number: int, resources: PrepareResources, pool: NodePool | None, config: OperatorConfig,
    secret_name: str = "", *, model_cache: str | None = None,
) -> Object:
    """Return the Job of a preparation: one pod without GPUs. `run` and `pool` are those of the first attempt.

    `secret_name`: name of the preparation's Secret, or an empty string if it has none. `model_cache`: the resolved value of `model.cache`. If
    it names a volume claim, the pod fills the cache in this claim.
    """
    name, run_json = names.make_preparation_job_name(job.name, preparation_number), run.to_bytes()
    pod = _build_preparation_pod(run, run.sha256(run_json), resources, pool, config, secret_name, model_cache)
    body = _build_indexed_job(job, run.spec, config, run_json, name=name, attempt=names.PREPARATION_ATTEMPT, pod_count=1, pod=pod)
    if secret_name:
        body["metadata"]["annotations"][Annotation.ATTEMPT_SECRET.value] = secret_name
    body["spec"]["activeDeadlineSeconds"] = MAX_PREPARATION_SECONDS
    return body


def _build_indexed_job(
    job: FineTuneJobView, spec: FineTuneJobSpec, config: OperatorConfig, run_json: bytes, *, name: str, attempt: int, pod_count: int, pod: Object
) -> Object:
    """Return a Job of `pod_count` pods with the spec `pod`. `run_json`: content of the pods' file `run.json`."""
    labels = build_attempt_labels(job, attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            "labels": {**_select_job_labels(spec), **labels},
            "annotations": {
                **(spec.placement.annotations or {}),
                Annotation.RUN_CONFIG_SHA256.value: RunConfig.sha256(run_json),
                **({Annotation.NETWORK_POLICY.value: name} if config.isolation.network_policy else {}),
            },
            "ownerReferences": [_build_owner_reference(names.API_VERSION, names.KIND, job.name, job.uid)],
        },
        "spec": {
            "completions": pod_count,
            "parallelism": pod_count,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _build_failure_rules()},
            "template": {"metadata": _build_template_metadata(labels, spec, config, run_json), "spec": pod},
        },
    }


def _build_preparation_pod(
    run: RunConfig, run_sha256: str, resources: PrepareResources, pool: NodePool | None, config: OperatorConfig, secret_name: str, model_cache: str | None
) -> Object:
    """Return the spec of a preparation pod: a training pod with the command `prepare`, without GPUs and without the placement of training pods.

    A preparation pod that mounts a volume claim keeps the placement of the training pods, because the first pod that mounts a claim can determine the
    zone or node of the claim's volume.
    """
    settings = config.prepare
    replaced_values: dict[str, Any] = {
        "resources.gpusPerNode": 0, "resources.cpu": resources.cpu, "resources.memory": resources.memory,
        "resources.ephemeralStorage": resources.ephemeral_storage,
    }  # fmt: skip
    mounts_claim = uses_claim_cache(model_cache) or any("persistentVolumeClaim" in volume for volume in build_mounts(run.spec).volumes)
    if not mounts_claim:
        replaced_values |= {"placement.nodeSelector": {}, "placement.tolerations": [], "placement.nodeAffinity": []}
    preparation_run = run.model_copy(update={
        "world": run.world.model_copy(update={"nodes": 1, "gpus_per_node": 0}), "grace_seconds": PREPARATION_GRACE_SECONDS,
        "spec": run.spec.with_values(replaced_values),
    })  # fmt: skip
    pod = _build_pod_spec("", preparation_run, run_sha256, pool if mounts_claim else None, config, secret_name)
    if find_user_code_in_preparation(run.spec):
        # The pod does not get the key that signs prepared rows: with the key, the user's code could sign rows for all jobs of the namespace.
        pod["volumes"][0] = _build_run_volume(secret_name, (names.ATTEMPT_SECRET_KEY,))
    container = pod["containers"][0]
    container["args"] = ["prepare"]
    # With a CPU limit, the trainer starts one process for each CPU of the pod instead of one for each CPU of the node.
    container["resources"]["limits"]["cpu"] = str(resources.cpu)
    if model_cache is not None and uses_claim_cache(model_cache):
        add_claim_cache_to_preparation(pod, model_cache)
    if not mounts_claim and settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if not mounts_claim and settings.tolerations:
        pod["tolerations"] = [toleration.to_wire() for toleration in settings.tolerations]
    return pod


def build_service(job: JobView) -> Object:
    """Return the headless Service of an attempt with several pods. With this Service, DNS resolves rank 0's pod before the pod is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": job.name,
            "namespace": job.namespace,
            "labels": build_labels_of_job(job),
            "ownerReferences": [build_owner_reference_to_job(job)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_NAME_LABEL: job.name},
            "ports": [
                {"name": names.PROGRESS_PORT_NAME, "port": names.PROGRESS_PORT},
                {"name": "rendezvous", "port": names.RENDEZVOUS_PORT},
            ],
        },
    }


def _select_job_labels(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return the user's labels for the Job, without the queue label.

    On a Job, the queue label makes Kueue queue the Job. The user's queue label stays only on the pods, as in release 0.1.0.
    """
    return {key: value for key, value in (spec.placement.labels or {}).items() if key != Label.QUEUE}


def build_attempt_labels(job: FineTuneJobView, attempt: int) -> dict[str, str]:
    """Return the labels of the Job and the pods of an attempt."""
    return _build_labels(job.name, job.uid, attempt)


def build_labels_of_job(job: JobView) -> dict[str, str]:
    """Return the labels of the objects that belong to a Job."""
    return _build_labels(job.finetunejob_name, job.owner_uid, job.attempt)


def _build_labels(name: str, uid: str, attempt: int) -> dict[str, str]:
    """Return the labels of all objects of an attempt. `name`, `uid`: name and uid of the FineTuneJob."""
    return {
        Label.MANAGED_BY.value: names.MANAGER_NAME,
        Label.JOB_NAME.value: name,
        Label.JOB_UID.value: uid,
        Label.ATTEMPT.value: str(attempt),
    }


def build_owner_reference_to_job(job: JobView) -> Object:
    """Return the owner reference of an object that the Job owns.

    `blockOwnerDeletion` is false, because true would need permission to update the finalizers of Jobs.
    """
    return _build_owner_reference("batch/v1", "Job", job.name, job.uid) | {"blockOwnerDeletion": False}


def _build_owner_reference(api_version: str, kind: str, name: str, uid: str) -> Object:
    return {
        "apiVersion": api_version, "kind": kind, "name": name, "uid": uid, "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def _build_failure_rules() -> list[Object]:
    """Return the rules that fail the Job at once after a disruption or certain exit codes. `backoffLimit: 0` covers all other failures.

    The rules list single exit codes, because the pods of a suspended Job exit with code 75: a rule for all nonzero codes would fail that Job.
    """
    return [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": names.TRAINER_CONTAINER, "operator": "In", "values": list_exit_codes_that_fail_the_job(),
            },
        },
    ]  # fmt: skip


def _build_template_metadata(labels: dict[str, str], spec: FineTuneJobSpec, config: OperatorConfig, run_json: bytes) -> Object:
    annotations = {**config.trainer.annotations, **(spec.placement.annotations or {})}
    return {
        "labels": {**config.trainer.labels, **(spec.placement.labels or {}), **labels},
        "annotations": {
            **annotations,
            DEFAULT_CONTAINER_ANNOTATION: names.TRAINER_CONTAINER,
            Annotation.RUN_CONFIG.value: run_json.decode(),
        },
    }


def _build_pod_spec(
    name: str, run: RunConfig, run_sha256: str, pool: NodePool | None, config: OperatorConfig, secret_name: str
) -> Object:
    spec, placement = run.spec, run.spec.placement
    spec_volumes = build_mounts(spec)
    pod: Object = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": run.grace_seconds,
        "securityContext": _build_pod_security(config.trainer.fixed_user),
        "containers": [_build_container(run, run_sha256, config, list(spec_volumes.mounts))],
        "volumes": [*_build_operator_volumes(spec, secret_name), *spec_volumes.volumes],
    }
    if run.world.nodes > 1:
        pod["subdomain"] = name
    pod |= _build_scheduling_fields(spec, pool, config, name if run.world.nodes > 1 else None)
    pull_secrets = placement.image_pull_secrets or list(config.trainer.image_pull_secrets)
    if pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in pull_secrets]
    service_account_name = placement.service_account_name or config.trainer.service_account_name
    return pod | ({"serviceAccountName": service_account_name} if service_account_name else {})


def _build_pod_security(has_fixed_user: bool) -> Object:
    """Return the pod's security context. `has_fixed_user`: whether the pod sets user and group ids. OpenShift rejects ids that it has not assigned."""
    ids: Object = {"runAsUser": names.TRAINER_UID, "runAsGroup": names.TRAINER_UID, "fsGroup": names.TRAINER_UID} if has_fixed_user else {}
    return {"runAsNonRoot": True, **ids, "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}}


def _build_container(run: RunConfig, run_sha256: str, config: OperatorConfig, extra_mounts: list[Object]) -> Object:
    spec = run.spec
    return {
        "name": names.TRAINER_CONTAINER,
        "image": spec.placement.image or config.trainer.image,
        "imagePullPolicy": config.trainer.image_pull_policy.value,
        "args": ["supervise"],
        "env": _build_env(run, run_sha256, config),
        "ports": [{"name": names.PROGRESS_PORT_NAME, "containerPort": names.PROGRESS_PORT}],
        "readinessProbe": {
            "httpGet": {"path": names.HttpPath.HEALTH.value, "port": names.PROGRESS_PORT_NAME},
            "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 3,
        },
        "resources": _build_resources(spec),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "run", "mountPath": names.RUN_MOUNT, "readOnly": True},
            {"name": "work", "mountPath": names.WORK_MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 -- shared memory on Linux
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 -- an emptyDir: the root file system is read-only
            *extra_mounts,
        ],
    }  # fmt: skip


def _build_operator_volumes(spec: FineTuneJobSpec, secret_name: str) -> list[Object]:
    resources = spec.resources
    return [
        _build_run_volume(secret_name),
        {"name": "work", "emptyDir": _add_size_limit({}, resources.ephemeral_storage)},
        {"name": "shm", "emptyDir": _add_size_limit({"medium": "Memory"}, resources.shared_memory)},
        # The pod's disk limit applies to the sum of all volumes.
        {"name": "tmp", "emptyDir": _add_size_limit({}, resources.ephemeral_storage)},
    ]


def _build_run_volume(secret_name: str, keys: tuple[str, ...] = (names.ATTEMPT_SECRET_KEY, names.CHECKPOINT_KEY)) -> Object:
    """Return the volume with `run.json` and, if the attempt has a Secret, one file for each of the Secret's keys in `keys`."""
    run_file_item = {"path": names.RUN_FILE_NAME, "fieldRef": {"fieldPath": f"metadata.annotations['{Annotation.RUN_CONFIG}']"}}
    run_config_source = {"downwardAPI": {"items": [run_file_item]}}
    if not secret_name:
        return {"name": "run", **run_config_source}
    key_items = [{"key": key, "path": key} for key in keys]
    return {"name": "run", "projected": {"sources": [run_config_source, {"secret": {"name": secret_name, "items": key_items}}]}}


def _add_size_limit(volume: Object, size: str | int | None) -> Object:
    return volume | ({"sizeLimit": str(size)} if size is not None else {})


def _build_resources(spec: FineTuneJobSpec) -> Object:
    """Return the requests and limits. CPU has no limit, because a CPU limit would throttle data loading.

    Memory and disk requests equal their limits.
    """
    resources = spec.resources
    requests: Object = {} if resources.cpu is None else {"cpu": str(resources.cpu)}
    limits: Object = {}
    for name, amount in (("memory", resources.memory), ("ephemeral-storage", resources.ephemeral_storage)):
        if amount is not None:
            requests[name] = limits[name] = str(amount)
    if resources.gpus_per_node:
        gpu_resource_name = resources.gpu_resource or "nvidia.com/gpu"
        requests[gpu_resource_name] = limits[gpu_resource_name] = str(resources.gpus_per_node)
    return {"requests": requests, "limits": limits}


def _build_env(run: RunConfig, run_sha256: str, config: OperatorConfig) -> list[Object]:
    """Return the trainer's environment variables. The user's variables come last, but the user cannot set variables that the operator reserves."""
    spec = run.spec
    operator_variables: list[Object] = [
        {"name": Env.RUN_SHA256.value, "value": run_sha256},
        {"name": Env.NODE_RANK.value, "valueFrom": _build_field_ref(f"metadata.annotations['{INDEX_ANNOTATION}']")},
        {"name": Env.POD_NAME.value, "valueFrom": _build_field_ref("metadata.name")},
        {"name": Env.POD_UID.value, "valueFrom": _build_field_ref("metadata.uid")},
        {"name": Env.NODE_NAME.value, "valueFrom": _build_field_ref("spec.nodeName")},
        {"name": Env.DISK_LIMIT.value, "valueFrom": {"resourceFieldRef": {"resource": "limits.ephemeral-storage"}}},
        *_build_credential_variables(spec.storage.credentials_secret_ref, ""),
        *_build_credential_variables(_get_credentials_ref(spec.model.storage), names.MODEL_CREDENTIALS_PREFIX),
        *_build_credential_variables(_get_credentials_ref(spec.dataset.storage), names.DATASET_CREDENTIALS_PREFIX),
        *_build_customer_key_variables("storage", spec.storage),
        *_build_customer_key_variables("model", spec.model.storage),
        *_build_customer_key_variables("dataset", spec.dataset.storage),
    ]
    if spec.model.token_secret_ref:
        operator_variables.append({"name": Env.HF_TOKEN.value, "valueFrom": _build_secret_key_source(spec.model.token_secret_ref)})
    overridable_variables = _build_client_credentials(spec)
    if run.world.nodes > 1 and run.world.gpus_per_node:
        overridable_variables.append({"name": "NCCL_SOCKET_IFNAME", "value": "^lo,docker"})
    reserved_names = {variable["name"] for variable in operator_variables}
    user_variables = [_build_user_variable(variable) for variable in spec.placement.env or [] if variable.name not in reserved_names]
    user_variable_names = {variable["name"] for variable in user_variables}
    taken_names = reserved_names | user_variable_names | {variable["name"] for variable in overridable_variables}
    platform_variables: list[Object] = [
        {"name": name, "value": value} for name, value in sorted(config.trainer.env.items()) if name not in taken_names
    ]
    used_overridable_variables = [variable for variable in overridable_variables if variable["name"] not in user_variable_names]
    return [*operator_variables, *used_overridable_variables, *platform_variables, *user_variables]


def _build_client_credentials(spec: FineTuneJobSpec) -> list[Object]:
    """Return the environment variables with the credentials for experiment trackers, the model hub and the judge.

    The client libraries of these services read the variables.
    """
    wandb, mongodb, hub, judge = spec.tracking.wandb, spec.tracking.mongodb, spec.output.hub, spec.evaluation.judge
    secret_references = (
        (names.WANDB_KEY, wandb.api_key_secret_ref if wandb else None),
        (names.MONGODB_URI, mongodb.uri_secret_ref if mongodb else None),
        (names.HUB_TOKEN, hub.token_secret_ref if hub else None),
        (names.JUDGE_KEY, judge.api_key_secret_ref if judge else None),
    )
    return [{"name": name, "valueFrom": _build_secret_key_source(reference)} for name, reference in secret_references if reference is not None]


def _get_credentials_ref(connection: Any) -> SecretRef | None:
    return connection.credentials_secret_ref if connection else None


def _build_credential_variables(secret: SecretRef | None, variable_prefix: str) -> list[Object]:
    if secret is None:
        return []
    variables: list[Object] = []
    for key in (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN):
        key_reference: Object = {"name": secret.name, "key": key.value}
        if key is Env.STORAGE_SESSION_TOKEN:
            key_reference["optional"] = True
        variables.append({"name": f"{variable_prefix}{key.value}", "valueFrom": {"secretKeyRef": key_reference}})
    return variables


def _build_customer_key_variables(connection_name: str, connection: StorageConnection | None) -> list[Object]:
    """Return a list with the environment variable of the customer's key for server-side encryption (SSE-C), or an empty list if no key is used."""
    key_reference = connection.encryption.customer_key_secret_ref if connection and connection.encryption else None
    if key_reference is None:
        return []
    return [{"name": get_customer_key_variable(connection_name), "valueFrom": _build_secret_key_source(key_reference)}]


def _build_user_variable(variable: EnvVar) -> Object:
    if variable.secret_key_ref:
        return {"name": variable.name, "valueFrom": _build_secret_key_source(variable.secret_key_ref)}
    return {"name": variable.name, "value": variable.value or ""}


def _build_secret_key_source(key_reference: SecretKeyRef) -> Object:
    return {"secretKeyRef": {"name": key_reference.name, "key": key_reference.key}}


def _build_field_ref(path: str) -> Object:
    return {"fieldRef": {"fieldPath": path}}


def _build_scheduling_fields(spec: FineTuneJobSpec, pool: NodePool | None, config: OperatorConfig, gang_name: str | None) -> Object:
    """Return the scheduling fields of the pod.

    If the Job has several pods, `gang_name` is the Job's name, and the pods prefer one zone but different hosts.
    """
    placement = spec.placement
    scheduling_fields: Object = {}
    node_selector = {**(pool.node_selector if pool else {}), **(placement.node_selector or {})}
    if node_selector:
        scheduling_fields["nodeSelector"] = node_selector
    tolerations = [*(pool.tolerations if pool else ()), *(placement.tolerations or [])]
    if tolerations:
        scheduling_fields["tolerations"] = [toleration.to_wire() for toleration in tolerations]
    affinity: Object = {}
    if placement.node_affinity:
        node_terms = [term.to_wire() for term in placement.node_affinity]
        required_terms = {"nodeSelectorTerms": [{"matchExpressions": node_terms}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": required_terms}
    if gang_name:
        gang_selector = {"labelSelector": {"matchLabels": {JOB_NAME_LABEL: gang_name}}}
        same_zone_preference = {"weight": 100, "podAffinityTerm": {**gang_selector, "topologyKey": ZONE_LABEL}}
        affinity["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": [same_zone_preference]}
        spread_constraint = {"maxSkew": 1, "topologyKey": HOST_LABEL, "whenUnsatisfiable": "ScheduleAnyway", **gang_selector}
        scheduling_fields["topologySpreadConstraints"] = [spread_constraint]
    if affinity:
        scheduling_fields["affinity"] = affinity
    priority_class_name = placement.priority_class_name or config.trainer.priority_class_name
    if priority_class_name:
        scheduling_fields["priorityClassName"] = priority_class_name
    if placement.scheduler_name:
        scheduling_fields["schedulerName"] = placement.scheduler_name
    return scheduling_fields
