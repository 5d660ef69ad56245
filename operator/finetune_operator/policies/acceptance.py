"""Decides whether the operator can run a spec. All mistakes in the spec are listed at once, each with its field.

If only a different spec can solve a problem, the job fails. If the platform team can solve it (a missing node pool or default storage, an
outdated operator), the job waits.

Defaults are filled in once per job, because a new configuration or version of the operator can have other defaults. If a default batch or
learning rate changed between two attempts, the next attempt would train differently. If the default storage changed, the next attempt
would find no checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.compatibility import read_spec
from finetune_api.defaults import PlatformDefaults, ResolvedSpec, keep_recorded_defaults, resolve_defaults
from finetune_api.errors import FineTuneError
from finetune_api.names import MAX_RUN_BYTES, Reason
from finetune_api.rules import check_spec, generation_server
from finetune_api.sources import parse_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import FineTuneJobStatus
from finetune_api.support import find_unsupported_fields
from finetune_api.tenancy import PolicyProblem, check_policy
from pydantic import ValidationError

from finetune_operator.objects import Object
from finetune_operator.policies.placement import choose_pool, find_model_cache_problems, find_placement_problems
from finetune_operator.policies.pod_resources import compute_default_resources
from finetune_operator.policies.spec_hash import compute_spec_sha256
from finetune_operator.policies.verdict import AcceptedSpec, RefusedSpec
from finetune_operator.settings import NodePool, OperatorConfig
from finetune_operator.text import clean

__all__ = ["AcceptedSpec", "FirstAttempt", "RefusedSpec", "accept", "read_first_attempt"]

logger = logging.getLogger(__name__)

MAX_SPEC_BYTES = MAX_RUN_BYTES - 8 * 1024
"""Maximum size of the resolved spec in bytes. The annotation also needs space for the other fields of the run configuration."""
STORE_IDENTITY_FIELDS = ("storage.uri", "storage.endpoint")
"""Fields that identify the store with the checkpoints. The other fields of `storage` only configure the connection to the store."""


@dataclass(frozen=True)
class FirstAttempt:
    """The defaults and the spec of a job's first attempt, as recorded in the status."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    spec_sha256: str | None = None


def read_first_attempt(status: FineTuneJobStatus) -> FirstAttempt | None:
    """Return what the status records about the first attempt, or None before the first attempt."""
    if not status.attempts:
        return None
    resolved_config = status.resolved
    return FirstAttempt(resolved_config.defaults or {}, resolved_config.spec_sha256) if resolved_config else FirstAttempt()


def accept(
    raw_spec: Object, config: OperatorConfig, first_attempt: FirstAttempt | None = None, *, namespace: str = "default", was_accepted: bool = False,
    choices: Mapping[str, Any] | None = None,
) -> AcceptedSpec | RefusedSpec:  # fmt: skip
    """Check a FineTuneJob's spec and fill in its defaults. `first_attempt` is None before the first attempt.

    `choices`: the values that the job's plan has chosen, by spec path. The configuration's `policy` applies only to a job that has not started
    and was not accepted before (`was_accepted`).
    """
    try:
        spec, unknown_fields = read_spec(raw_spec)
    except ValidationError as error:
        return _refuse_unknown_parts([_describe_field_error(field_error) for field_error in error.errors()])
    problems, unsupported_problems = ([], []) if unknown_fields else (check_spec(spec), find_unsupported_fields(spec))
    rule_problems = [*map(str, problems), *map(str, unsupported_problems)]
    if rule_problems and first_attempt is None:
        reason = Reason.REJECTED if problems else Reason.NOT_SUPPORTED_YET
        return RefusedSpec(reason, clean("; ".join(rule_problems)), hint=[*problems, *unsupported_problems][0].hint, spec=spec)
    spec_digest, first_attempt_or_empty = compute_spec_sha256(raw_spec), first_attempt or FirstAttempt()
    choices, chosen_spec = _apply_choices(spec, choices or {})
    pool = choose_pool(chosen_spec, config)
    platform_defaults = _build_platform_defaults(chosen_spec, config, None if isinstance(pool, RefusedSpec) else pool, first_attempt_or_empty, namespace)
    resolved_spec = _resolve_spec(spec, platform_defaults, first_attempt_or_empty, choices)
    version_refusal = _refuse_other_version(unknown_fields, spec_digest, first_attempt)
    if version_refusal is not None:
        return replace(version_refusal, spec=resolved_spec.spec)
    platform_rules = config.policy.rules_for(namespace)
    policy_problems = check_policy(spec, platform_rules, config.build_platform(namespace))
    is_new = first_attempt is None and not was_accepted
    if policy_problems and is_new:
        return replace(_refuse_forbidden(policy_problems), spec=resolved_spec.spec)
    if isinstance(pool, RefusedSpec):
        return replace(pool, spec=resolved_spec.spec)
    placement_conflicts = [*find_placement_problems(chosen_spec, pool, config), *find_model_cache_problems(spec, namespace, config)]
    refusal = (
        _refuse_conflicts(placement_conflicts, first_attempt)
        or (_refuse_unknown_price(spec, pool) if first_attempt is None else None)
        or _refuse_storage(resolved_spec, first_attempt)
        or _refuse_missing_image(resolved_spec)
        or _refuse_size(resolved_spec, first_attempt)
    )
    if refusal is not None:
        return replace(refusal, spec=resolved_spec.spec)
    # If an older operator started the job, new rules of this operator must not end the job, because the user cannot change the spec.
    new_job_problems = [*rule_problems, *policy_problems, *placement_conflicts]
    if price_refusal := _refuse_unknown_price(spec, pool):  # for a started job, this is only a note: its GPUs may have had a price when it started
        new_job_problems.append(price_refusal.message)
    new_job_notes = [clean(f"a new job would be refused: {problem}") for problem in new_job_problems]
    notes, max_duration_seconds = (*resolved_spec.notes, *new_job_notes), platform_rules.max_duration_seconds if is_new else None
    return AcceptedSpec(resolved_spec.spec, resolved_spec.defaults, choices, notes, pool, spec_digest, max_duration_seconds)


def _apply_choices(spec: FineTuneJobSpec, choices: Mapping[str, Any]) -> tuple[dict[str, Any], FineTuneJobSpec]:
    """Return the choices for fields that the user left out, and the spec with these choices filled in."""
    applied_choices = {path: value for path, value in choices.items() if spec.value(path) is None}
    try:
        return applied_choices, spec.with_values(applied_choices)
    except ValidationError as error:
        # Only a manual edit of the status can cause this error. The job continues with the defaults.
        logger.warning("the choices in status cannot be applied and are ignored: %s", error)
        return {}, spec


def _refuse_forbidden(policy_problems: list[PolicyProblem]) -> RefusedSpec:
    return RefusedSpec(Reason.FORBIDDEN_BY_POLICY, clean("; ".join(map(str, policy_problems))), "change the values, or ask the platform team")


def _refuse_unknown_parts(unknown_parts: Iterable[str]) -> RefusedSpec:
    """Make the job wait for a newer operator. The spec meets the installed CRD's schema, so the CRD must be newer than this operator."""
    message = f"this version of the operator does not know parts of the spec: {'; '.join(unknown_parts)}"
    return RefusedSpec(Reason.OPERATOR_TOO_OLD, clean(message), "upgrade the operator to the version of the CRD", is_final=False)


def _describe_field_error(error: Any) -> str:
    return f"spec.{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"


def _refuse_other_version(unknown_fields: tuple[str, ...], spec_digest: str, first_attempt: FirstAttempt | None) -> RefusedSpec | None:
    """Make the job wait if the operator does not know some fields of the spec, or if an older CRD has removed fields of the spec."""
    if unknown_fields:
        return _refuse_unknown_parts(f"spec.{path}" for path in unknown_fields)
    if first_attempt is not None and first_attempt.spec_sha256 not in (None, spec_digest):
        message = (
            "the immutable spec has changed since the first attempt: "
            "an older version of the CRD was installed, which removed unknown fields from the spec"
        )
        hint = "create a new FineTuneJob whose checkpoint.resume names the newest checkpoint"
        return RefusedSpec(Reason.SPEC_CHANGED, message, hint, is_final=False)
    return None


def _refuse_conflicts(placement_conflicts: list[str], first_attempt: FirstAttempt | None) -> RefusedSpec | None:
    if not placement_conflicts or first_attempt is not None:
        return None
    return RefusedSpec(Reason.REJECTED, clean("; ".join(placement_conflicts)), "remove the value, or choose another pool")


def _refuse_unknown_price(spec: FineTuneJobSpec, pool: NodePool | None) -> RefusedSpec | None:
    """Make a job with `policy.maxCost` wait if its GPUs have no price. Without a price, the cost cannot be limited."""
    if spec.policy.max_cost is None or (pool is not None and pool.price_per_gpu_hour is not None):
        return None
    pool_problem = f"node pool {pool.name} has no pricePerGpuHour" if pool is not None else "the job uses no node pool, so its GPUs have no price"
    hint = "remove policy.maxCost, or name a pool with a price in resources.nodePool"
    return RefusedSpec(Reason.PRICE_UNKNOWN, f"spec.policy.maxCost is {spec.policy.max_cost:g}, but {pool_problem}", hint, is_final=False)


def _refuse_storage(resolved_spec: ResolvedSpec, first_attempt: FirstAttempt | None) -> RefusedSpec | None:
    """Refuse a storage URI that is missing or cannot be parsed. If the operator's configuration must be corrected, the job waits."""
    uri, is_default = resolved_spec.spec.storage.uri, "storage.uri" in resolved_spec.defaults
    if uri is None:
        message = "spec.storage.uri is absent, and the operator's configuration has no default storage"
        return RefusedSpec(Reason.STORAGE_NOT_CONFIGURED, message, "write spec.storage.uri: s3://bucket/prefix", is_final=False)
    try:
        parse_source(uri, spec_path="storage.uri")
    except FineTuneError as error:
        if is_default:
            message = f"the default storage of the operator's configuration cannot be used: {error.message}"
            return RefusedSpec(Reason.STORAGE_NOT_CONFIGURED, clean(message), error.hint or "", is_final=False)
        return RefusedSpec(Reason.REJECTED, clean(f"spec.storage.uri: {error.message}"), error.hint or "", is_final=first_attempt is None)
    return None


def _refuse_missing_image(resolved_spec: ResolvedSpec) -> RefusedSpec | None:
    """Make a job with a vLLM server wait if neither the spec nor the operator's configuration names the server's image."""
    server = generation_server(resolved_spec.spec)
    if server is None or server.image is not None:
        return None
    message = "spec.trainer.grpo.generation.image is absent, and the operator's configuration has no trainer.generationImage"
    hint = "write the image of a vLLM server, or `backend: transformers`"
    return RefusedSpec(Reason.GENERATION_IMAGE_NOT_CONFIGURED, message, hint, is_final=False)


def _refuse_size(resolved_spec: ResolvedSpec, first_attempt: FirstAttempt | None) -> RefusedSpec | None:
    size_bytes = len(resolved_spec.spec.model_dump_json(by_alias=True, exclude_none=True).encode())
    if size_bytes <= MAX_SPEC_BYTES:
        return None
    message = f"the spec with its defaults has {size_bytes} bytes, but at most {MAX_SPEC_BYTES} bytes fit into a pod's annotation"
    hint = "put templates and long lists into ConfigMaps, and refer to the ConfigMaps in the spec"
    return RefusedSpec(Reason.REJECTED, message, hint, is_final=first_attempt is None)


def _resolve_spec(
    spec: FineTuneJobSpec, platform_defaults: PlatformDefaults, first_attempt: FirstAttempt, choices: Mapping[str, Any]
) -> ResolvedSpec:
    """Return the spec with the choices and the defaults. The recorded defaults of the first attempt take precedence over the current ones."""
    resolved_spec, recorded_defaults = resolve_defaults(spec, platform_defaults=platform_defaults, choices=choices), first_attempt.defaults
    store_differs = any(resolved_spec.defaults.get(path) != recorded_defaults.get(path) for path in STORE_IDENTITY_FIELDS)
    if store_differs and any(path in recorded_defaults for path in STORE_IDENTITY_FIELDS):
        recorded_storage = {path.partition(".")[2]: value for path, value in recorded_defaults.items() if path.startswith("storage.")}
        try:
            platform_defaults = replace(platform_defaults, storage=StorageRoot.model_validate(recorded_storage))
            resolved_spec = resolve_defaults(spec, platform_defaults=platform_defaults, choices=choices)
        except ValidationError as error:
            logger.warning("the default storage of the job's first attempt cannot be parsed; using the current default: %s", error)
    try:
        return keep_recorded_defaults(resolved_spec, recorded_defaults)
    except ValidationError as error:
        logger.warning("the defaults of the job's first attempt cannot be used; using the current defaults: %s", error)
        return resolved_spec


def _build_platform_defaults(
    spec: FineTuneJobSpec, config: OperatorConfig, pool: NodePool | None, first_attempt: FirstAttempt, namespace: str
) -> PlatformDefaults:
    """Return the defaults from the operator's configuration. The pool's values take precedence over general values."""
    return PlatformDefaults(
        storage=config.storage if config.storage.uri else None,
        gpu_resource=pool.gpu_resource if pool else "nvidia.com/gpu",
        node_pool=pool.name if pool else None,
        generation_image=config.trainer.generation_image or None,
        prepare_strategy=config.prepare.strategy,
        prepare_cpu=str(config.prepare.cpu),
        prepare_memory=str(config.prepare.memory),
        prepare_ephemeral_storage=str(config.prepare.ephemeral_storage),
        model_cache=config.model_cache.default_for(namespace),
        **compute_default_resources(spec, config, pool, first_attempt.defaults),
    )
