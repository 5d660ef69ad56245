"""Builds the file `run.json` of one attempt: the resolved and adapted spec, the ranks, the stores, and the checkpoint to resume from."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from finetune_api.defaults import find_origins
from finetune_api.names import (
    CA_MOUNT,
    DATASET_CREDENTIALS_PREFIX,
    GENERATION_PORT,
    MODEL_CREDENTIALS_PREFIX,
    RENDEZVOUS_PORT,
    Env,
    attempt_job_name,
    parse_attempt_of_uri,
)
from finetune_api.pod import GpuPool, PreparedRows, ResumeConfig, RunConfig, StoreTarget, World
from finetune_api.rules import generation_server
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import Prepare
from finetune_api.spec.common import StorageConnection
from finetune_api.spec.enums import OnExistingResult, PrepareStrategy

from finetune_operator.builders.mounts import CA_FILE_PATHS
from finetune_operator.views import FineTuneJobView

LOOPBACK_ADDRESS = "127.0.0.1"
DEFAULT_GRACE_SECONDS, MAX_GRACE_SECONDS = 300, 86400
ON_EXISTING_RESULT_FIELD = "policy.onExistingResult"
MODEL_CACHE_FIELD = "model.cache"
SAVES_PER_GRACE_PERIOD = 3
"""The grace period is at least this multiple of the duration of the newest save. When a pod is stopped, it first finishes a running upload, then
saves once more. This can take as long as two saves; the third is a margin in case the store has become slower."""


def build_run_config(
    job: FineTuneJobView, spec: FineTuneJobSpec, attempt: int, *,
    defaults: Mapping[str, Any], committed_step: int, max_step: int | None, rolled_back_attempt: int | None = None, choices: Collection[str] = (),
    before_adaptation: Mapping[str, Any] | None = None,
) -> RunConfig:  # fmt: skip
    """Return the run configuration of an attempt.

    `spec` is the resolved spec with all adaptations. Fields that attempts do not read are omitted, so that an older trainer image, which
    does not know them, can run the job. Only the operator reads `prepare`, `policy.maxCost` and `model.cache`, and only preparation pods read
    `policy.onExistingResult` (`convert_to_preparation_run`).

    `committed_step` is the newest step that is known to be in storage, or 0. `max_step` is the newest step that the attempt may start from;
    None means no limit. `rolled_back_attempt` is the first attempt after a rollback. `max_step` does not limit the checkpoints of this
    and later attempts, because the operator may not know the newest of these checkpoints. `before_adaptation`: the original values of
    adapted fields, by path. `choices`: paths of the values that the plan chose; these values are also in `defaults`.
    """
    prepared_rows = _find_prepared_rows(job, spec)
    policy = spec.policy.model_copy(update={"max_cost": None, "on_existing_result": None})
    model = spec.model.model_copy(update={"cache": None})
    spec = spec.model_copy(update={"prepare": Prepare(), "policy": policy, "model": model})
    omitted_fields = (ON_EXISTING_RESULT_FIELD, MODEL_CACHE_FIELD)
    defaults = {path: value for path, value in defaults.items() if not path.startswith("prepare.") and path not in omitted_fields}
    storage_root_uri = f"{(spec.storage.uri or '').rstrip('/')}"
    publish_uri = f"{storage_root_uri}/{spec.output.dir.strip('/')}" if spec.output.dir else None
    return RunConfig(
        name=job.name,
        namespace=job.namespace,
        uid=job.uid,
        attempt=attempt,
        spec=spec,
        defaults=sorted(defaults),
        origins=find_origins(defaults, choices),
        before_adaptation=dict(before_adaptation) if before_adaptation else None,
        world=_build_world(job, spec, attempt),
        storage=_build_store_target(f"{storage_root_uri}/{job.namespace}/{job.name}/{job.uid}", spec.storage, "storage", ""),
        publish=publish_uri,
        model_store=_build_source_store(spec, spec.model.storage, "model", MODEL_CREDENTIALS_PREFIX),
        dataset_store=_build_source_store(spec, spec.dataset.storage, "dataset", DATASET_CREDENTIALS_PREFIX),
        resume=_build_resume(job, spec, attempt, committed_step, max_step, rolled_back_attempt),
        prepared=prepared_rows,
        generation_url=f"http://{LOOPBACK_ADDRESS}:{GENERATION_PORT}" if generation_server(spec) is not None else None,
        grace_seconds=_compute_grace_seconds(job, spec, defaults),
    )


def _find_prepared_rows(job: FineTuneJobView, spec: FineTuneJobSpec) -> PreparedRows | None:
    """Return the prepared rows that the status names, and how long unused rows are kept, or None if the job is never prepared."""
    if spec.prepare.strategy in (None, PrepareStrategy.NEVER):
        return None
    prepared_rows = PreparedRows() if spec.prepare.ttl_days is None else PreparedRows(ttl_days=spec.prepare.ttl_days)
    data_status = job.status.data
    if data_status is None or not (_is_sha256(data_status.digest) and _is_sha256(data_status.prepared_sha256)):
        return prepared_rows
    return prepared_rows.model_copy(update={"digest": data_status.digest, "manifest_sha256": data_status.prepared_sha256})


def _is_sha256(text: str | None) -> bool:
    return text is not None and re.fullmatch("[0-9a-f]{64}", text) is not None


def _compute_grace_seconds(job: FineTuneJobView, spec: FineTuneJobSpec, defaults: Mapping[str, Any]) -> int:
    """Return the grace period after SIGTERM, in seconds: the user's value, or enough time to save a checkpoint like the newest one."""
    grace_seconds = spec.policy.termination_grace_period_seconds or DEFAULT_GRACE_SECONDS
    if "policy.terminationGracePeriodSeconds" not in defaults:
        return grace_seconds
    measured_checkpoints = [c for c in job.status.checkpoints if c.save_seconds is not None]
    newest_checkpoint = max(measured_checkpoints, key=lambda checkpoint: checkpoint.step, default=None)
    save_seconds = newest_checkpoint.save_seconds if newest_checkpoint is not None and newest_checkpoint.save_seconds is not None else 0.0
    return min(MAX_GRACE_SECONDS, max(grace_seconds, math.ceil(SAVES_PER_GRACE_PERIOD * save_seconds)))


def convert_to_preparation_run(run: RunConfig, on_existing_result: OnExistingResult | None, pools: list[GpuPool]) -> RunConfig:
    """Return the run configuration of a preparation pod. `on_existing_result`: the user's value, or None. `pools`: the pools that the job may use."""
    policy = run.spec.policy.model_copy(update={"on_existing_result": on_existing_result})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"policy": policy}), "pools": pools})


def _build_world(job: FineTuneJobView, spec: FineTuneJobSpec, attempt: int) -> World:
    node_count = spec.resources.nodes or 1
    job_name = attempt_job_name(job.name, attempt)
    gpu_count = spec.resources.gpus_per_node if spec.resources.gpus_per_node is not None else 1
    return World(
        nodes=node_count,
        processes_per_node=spec.resources.processes_per_node or max(gpu_count, 1),
        gpus_per_node=gpu_count,
        master_address=f"{job_name}-0.{job_name}" if node_count > 1 else LOOPBACK_ADDRESS,
        master_port=RENDEZVOUS_PORT if node_count > 1 else 0,
        rendezvous_id=f"{job.uid}-{attempt}",
    )


def _build_resume(
    job: FineTuneJobView, spec: FineTuneJobSpec, attempt: int, committed_step: int, max_step: int | None, rolled_back_attempt: int | None
) -> ResumeConfig:
    """Return from which checkpoint the attempt starts. An attempt after the first continues from the job's own checkpoints.

    If a rollback excludes all of these checkpoints, the attempt starts like the first attempt.
    """
    requested_mode = spec.checkpoint.resume or "auto"
    expected_step = committed_step if max_step is None else min(committed_step, max_step)
    mode = "auto" if attempt > 1 and (expected_step or requested_mode == "never") else requested_mode
    return ResumeConfig(
        mode=mode, expect_step=expected_step, max_step=max_step, rolled_back_attempt=rolled_back_attempt if max_step is not None else None,
        known_checkpoints=_list_known_checkpoints(job),
    )  # fmt: skip


def _list_known_checkpoints(job: FineTuneJobView) -> dict[str, str]:
    """Return the sha256 of each known checkpoint's manifest. The key is the end of the checkpoint's URI: its last two folders."""
    return {
        "/".join(checkpoint.uri.rstrip("/").split("/")[-2:]): checkpoint.sha256
        for checkpoint in job.status.checkpoints
        if checkpoint.sha256 and _is_sha256(checkpoint.sha256) and parse_attempt_of_uri(checkpoint.uri) is not None
    }


def _build_store_target(uri: str, connection: StorageConnection, connection_name: str, credentials_prefix: str) -> StoreTarget:
    encryption = connection.encryption
    return StoreTarget(
        uri=uri,
        endpoint=connection.endpoint,
        region=connection.region,
        addressing_style=connection.addressing_style,
        ca_bundle=f"{CA_MOUNT}/{CA_FILE_PATHS[connection_name]}" if connection.ca_bundle_ref else None,
        credentials_prefix=credentials_prefix,
        encryption=encryption.type if encryption else None,
        kms_key_id=encryption.kms_key_id if encryption else None,
        customer_key_variable=get_customer_key_variable(connection_name)
        if encryption and encryption.customer_key_secret_ref
        else None,
    )


def get_customer_key_variable(connection_name: str) -> str:
    """Return the name of the environment variable with a connection's customer encryption key. Each connection has its own key."""
    prefix = {"storage": "", "model": MODEL_CREDENTIALS_PREFIX, "dataset": DATASET_CREDENTIALS_PREFIX}[connection_name]
    return f"{prefix}{Env.STORAGE_CUSTOMER_KEY.value}"


def _build_source_store(spec: FineTuneJobSpec, connection: StorageConnection | None, connection_name: str, credentials_prefix: str) -> StoreTarget | None:
    """Return the store of the model or the dataset if `connection` is set. The store's URI is the URI of the source."""
    if connection is None:
        return None
    source = spec.model.source if connection_name == "model" else spec.dataset.train
    return _build_store_target(source or "", connection, connection_name, credentials_prefix if connection.credentials_secret_ref else "")
