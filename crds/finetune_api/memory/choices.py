"""Chooses values that a spec leaves out: micro-batch and accumulation, recomputation, strategy, number of GPUs, and node pool.

An arrangement is one value for each of these fields. An arrangement fits if the upper bound of its planned memory is at most the memory of the GPU. On
each pool, this module finds the arrangements with the fewest GPUs that fit, and takes the one with the least expected GPU time. If the job
fits on several pools, this module chooses the pool with the lowest expected cost or, without prices, the job's current pool. The module never
changes a value that the user has set, nor the effective batch. The preparation of a job and `finetune plan` use this module.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.defaults import ResolvedSpec
from finetune_api.errors import ConfigError
from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.changes import MAX_CHANGES, Change, find_fitting_changes, format_changes_hint
from finetune_api.memory.description import RunFacts, describe_step
from finetune_api.memory.plan import (
    ACCUMULATION_PATH,
    CHECKPOINTING_PATH,
    GPUS_PATH,
    MICRO_BATCH_PATH,
    POOL_PATH,
    STRATEGY_PATH,
    JobPlan,
    format_gigabytes,
    plan_memory,
)
from finetune_api.objectives import OBJECTIVES
from finetune_api.pod import GpuPool
from finetune_api.rules import (
    MAX_ACCUMULATION,
    divisors,
    effective_batch,
    gpus_per_node,
    min_batch_size_per_device,
    new_problems,
    remove_defaults,
    trainer_type_of,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, StrategyType, TrainerBackend
from finetune_api.status import Choice
from finetune_api.time_plan import DataSize, estimate_gpu_seconds, plan_work

PROCESSES_PER_NODE_PATH = "resources.processesPerNode"
CHOSEN_FIELDS = (POOL_PATH, GPUS_PATH, STRATEGY_PATH, MICRO_BATCH_PATH, ACCUMULATION_PATH, CHECKPOINTING_PATH)
"""Spec paths of the fields that the plan can choose, in the order in which users see them."""
GPU_TYPES_WITH_PADDING = ("t4-16gb", "v100-16gb", "v100-32gb")
"""GPU types older than Ampere. On these GPUs the trainer pads rows (`MIN_COMPUTE_CAPABILITY` in `finetune_trainer.attention`)."""
ASSUMED_GPU_TYPE = "a100-80gb"
"""GPU type whose speed is assumed for a pool with an unknown GPU type."""
ASSUMED_STEP_COUNT = 100
"""If the number of rows is not known, arrangements are compared for this number of optimizer steps."""


@dataclass(frozen=True)
class Decision:
    """The result of `choose_values`: the chosen values, and the memory plan with these values."""

    choices: tuple[Choice, ...]
    resolved: ResolvedSpec
    """The resolved spec with the chosen values."""
    plan: JobPlan
    pool: GpuPool
    changes: tuple[Change, ...] = ()
    """Changes of the spec that let the job fit; empty if it fits without them."""
    refusal: ConfigError | None = None
    """The error DoesNotFit if the expected peak exceeds the GPU memory of each pool; None otherwise."""


@dataclass(frozen=True)
class _Arrangement:
    """One value for each field that the plan can choose, and the memory plan with these values on one pool."""

    pool: GpuPool
    values_by_path: dict[str, Any]
    spec: FineTuneJobSpec
    plan: JobPlan
    gpu_seconds: float = 0.0

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of each GPU of the pool, in bytes."""
        return self.pool.memory_bytes or 0

    @property
    def fits(self) -> bool:
        return self.plan.fits(self.gpu_memory_bytes)

    @property
    def may_fit(self) -> bool:
        return self.plan.memory.expected_bytes <= self.gpu_memory_bytes

    @property
    def cost(self) -> float | None:
        price = self.pool.price_per_gpu_hour
        return None if price is None else price * self.gpu_seconds / 3600


def choose_values(
    resolved_spec: ResolvedSpec, shape: ModelShape, pools: Sequence[GpuPool], facts: RunFacts | None = None, data_size: DataSize | None = None,
    trained_parameters: int = 0,
) -> Decision:  # fmt: skip
    """Choose the values that a resolved spec leaves out.

    `pools`: the pools that the job may use. `data_size`: None if the number of rows is not known. `trained_parameters`: number of parameters of
    the adapters. Errors: those of `describe_step`, ChoicesNotPlanned, GpuMemoryUnknown. Each of these errors means that there is no plan. The
    job can still run without a plan.
    """
    _require_choosable(resolved_spec)
    search = _Search(resolved_spec, shape, facts or RunFacts(), data_size, trained_parameters)
    allowed_pools = [pool for pool in pools if pool.is_current or search.may_choose(POOL_PATH)]
    known_pools = [pool for pool in allowed_pools if pool.memory_bytes is not None]
    pools_of_unknown_memory = [pool for pool in allowed_pools if pool.memory_bytes is None]
    if not known_pools or any(pool.is_current for pool in pools_of_unknown_memory):
        raise _make_unknown_memory_error(pools_of_unknown_memory)
    fitting_arrangements: list[_Arrangement] = []
    too_large_arrangements: list[_Arrangement] = []
    for pool in known_pools:
        best_arrangement_on_pool = search.find_best_arrangement(pool)
        (fitting_arrangements if best_arrangement_on_pool.fits else too_large_arrangements).append(best_arrangement_on_pool)
    if fitting_arrangements:
        best_arrangement = _find_cheapest_arrangement(fitting_arrangements)
        return _build_decision(search, best_arrangement, _explain_choices(search, best_arrangement, fitting_arrangements, known_pools))
    if pools_of_unknown_memory:
        raise _make_unknown_memory_error(pools_of_unknown_memory)
    best_arrangement = max(too_large_arrangements, key=_rank_too_large_arrangement)
    changes = _find_changes(search, best_arrangement, known_pools, pools)
    decision = replace(_build_decision(search, best_arrangement, _explain_exceeded_upper_bound(search, best_arrangement)), changes=changes)
    if best_arrangement.may_fit or _has_reference_of_unknown_size(search.spec):
        return decision
    return replace(decision, choices=(), refusal=_build_refusal(best_arrangement, known_pools, decision.changes))


def _rank_too_large_arrangement(arrangement: _Arrangement) -> tuple[bool, bool, float]:
    """Return a sort key for arrangements whose upper bound does not fit. The arrangement with the highest key is the most likely to fit."""
    memory_ratio = arrangement.gpu_memory_bytes / arrangement.plan.memory.expected_bytes
    return arrangement.may_fit, arrangement.may_fit and arrangement.pool.is_current, memory_ratio


def _has_reference_of_unknown_size(spec: FineTuneJobSpec) -> bool:
    """Whether the plan has to assume the size of the reference model.

    If so, the reference model can be smaller, and the job can fit even if its expected peak exceeds the GPU memory.
    """
    return spec.trainer.dpo is not None and spec.trainer.dpo.reference_model is not None


def _make_unknown_memory_error(pools: Sequence[GpuPool]) -> ConfigError:
    pool_names = f" of pool {', '.join(pool.name for pool in pools)}" if pools else ""
    return ConfigError("GpuMemoryUnknown", f"the memory of the GPUs{pool_names} is not known", hint="set gpuType or gpuMemory of the node pool")


def _require_choosable(resolved_spec: ResolvedSpec) -> None:
    """Raise ConfigError ChoicesNotPlanned if the job has no GPU, or if a configuration file or the checkpoint of another job decides the values."""
    spec = resolved_spec.spec
    if gpus_per_node(spec) == 0:
        raise ConfigError("ChoicesNotPlanned", "the job uses no GPU", hint="raise resources.gpusPerNode")
    settings_by_path = {"distributed.fsdp.configRef": spec.distributed.fsdp, "distributed.deepspeed.configRef": spec.distributed.deepspeed}
    deciding_paths = [deciding_path for deciding_path, settings in settings_by_path.items() if settings is not None and settings.config_ref is not None]
    if spec.checkpoint.resume not in (None, "auto", "never"):
        deciding_paths.append("checkpoint.resume")
    if deciding_paths:
        deciding_path = deciding_paths[0]
        raise ConfigError("ChoicesNotPlanned", f"{deciding_path} decides the values that the plan would choose", hint=f"remove {deciding_path}")


@dataclass
class _Search:
    """Finds the best arrangement for each pool. Each memory plan is kept, so that the same values are planned only once."""

    resolved_spec: ResolvedSpec
    shape: ModelShape
    facts: RunFacts
    data_size: DataSize | None
    trained_parameters: int
    plan_by_key: dict[tuple[Any, ...], JobPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.rows_per_step = self.resolved_spec.spec, effective_batch(self.resolved_spec.spec)
        self.user_spec = remove_defaults(self.spec, self.resolved_spec.defaults)
        kernels = describe_step(self.spec, self.shape, self.facts).step.kernels
        self.has_padding = not (kernels.attention == "varlen" or self.spec.dataset.packing is True)

    def pads_rows(self, pool: GpuPool) -> bool:
        """Whether the trainer pads the rows of a micro-batch on GPUs of this pool. The kernel without padding needs Ampere or newer."""
        return self.has_padding or (pool.gpu_type in GPU_TYPES_WITH_PADDING and self.spec.dataset.packing is not True)

    def may_choose(self, path: str) -> bool:
        """Whether the plan may choose the value of the field, because the user has not set the field."""
        return path in self.resolved_spec.defaults or self.spec.value(path) is None

    def find_best_arrangement(self, pool: GpuPool) -> _Arrangement:
        """Return the arrangement that fits and has the fewest GPUs. If several have equally few GPUs, return the one with the least GPU time.

        If no arrangement fits, return the one that needs the least memory.
        """
        least_memory_arrangements: list[_Arrangement] = []
        for gpus in self._list_possible_gpu_counts(pool):
            fitting_arrangements = []
            for strategy in self._list_possible_strategies(gpus):
                fixed_values = {GPUS_PATH: gpus, STRATEGY_PATH: strategy}
                micro_batches = self._list_possible_micro_batches(gpus, pool)
                if not micro_batches or not self._keeps_rules(fixed_values):
                    continue
                checkpointing_modes = self._list_possible_checkpointing_modes(fixed_values)
                least_memory_arrangement = self._plan_arrangement(pool, fixed_values, micro_batches[0], checkpointing_modes[-1])
                least_memory_arrangements.append(least_memory_arrangement)
                if least_memory_arrangement.fits:
                    fitting_arrangements += [
                        self._find_arrangement_with_largest_batch(pool, fixed_values, micro_batches, checkpointing_mode)
                        for checkpointing_mode in checkpointing_modes
                    ]
            fitting_arrangements = [arrangement for arrangement in fitting_arrangements if arrangement.fits]
            if fitting_arrangements:
                return min(fitting_arrangements, key=lambda arrangement: arrangement.gpu_seconds)
        return min(least_memory_arrangements, key=lambda arrangement: arrangement.plan.memory.expected_bytes)

    def _list_possible_gpu_counts(self, pool: GpuPool) -> list[int]:
        """Return the possible numbers of GPUs on each node. The effective batch must be divisible by the number of ranks."""
        current_count, node_count = gpus_per_node(self.spec), self.spec.resources.nodes or 1
        if not (self.may_choose(GPUS_PATH) and PROCESSES_PER_NODE_PATH in self.resolved_spec.defaults):
            return [current_count]
        return [count for count in range(current_count, max(current_count, pool.gpus_per_node) + 1) if self.rows_per_step % (count * node_count) == 0]

    def _list_possible_strategies(self, gpus: int) -> list[StrategyType]:
        current_strategy = self.spec.distributed.strategy or StrategyType.NONE
        if not self.may_choose(STRATEGY_PATH):
            return [current_strategy]
        return [StrategyType.NONE] if gpus * (self.spec.resources.nodes or 1) == 1 else [StrategyType.DDP, StrategyType.FSDP]

    def _list_possible_checkpointing_modes(self, fixed_values: dict[str, Any]) -> list[GradientCheckpointing]:
        """Return the values of `training.gradientCheckpointing` to compare. The value that needs the least memory comes last."""
        current_mode = self.spec.training.gradient_checkpointing or GradientCheckpointing.ENABLED
        is_disabled = current_mode is GradientCheckpointing.DISABLED
        is_fixed = not self.may_choose(CHECKPOINTING_PATH) or self.spec.trainer.backend is TrainerBackend.UNSLOTH or is_disabled
        if is_fixed or not self._keeps_rules(fixed_values | {CHECKPOINTING_PATH: GradientCheckpointing.DISABLED}):
            return [current_mode]
        return [GradientCheckpointing.DISABLED, current_mode]

    def _keeps_rules(self, values_by_path: dict[str, Any]) -> bool:
        changed_values = {path: value for path, value in values_by_path.items() if self.may_choose(path) and value != self.spec.value(path)}
        return not new_problems(self.user_spec, self.user_spec.with_values(changed_values))

    def _list_possible_micro_batches(self, gpus: int, pool: GpuPool) -> list[int]:
        """Return the sizes of the micro-batch that keep the effective batch, in ascending order."""
        training, rows_per_rank = self.spec.training, self.rows_per_step // (gpus * (self.spec.resources.nodes or 1))
        current_micro_batch, accumulation = training.batch_size_per_device or 1, training.gradient_accumulation_steps or 1
        min_micro_batch = min_batch_size_per_device(self.spec)
        possible_micro_batches = [size for size in divisors(rows_per_rank) if size >= min_micro_batch and rows_per_rank // size <= MAX_ACCUMULATION]
        if not self.may_choose(MICRO_BATCH_PATH):
            possible_micro_batches = [size for size in possible_micro_batches if size == current_micro_batch]
        if not self.may_choose(ACCUMULATION_PATH):
            possible_micro_batches = [size for size in possible_micro_batches if rows_per_rank // size == accumulation]
        if self.pads_rows(pool) and self.may_choose(MICRO_BATCH_PATH):  # the plan does not know how much padding a larger micro-batch has
            possible_micro_batches = [size for size in possible_micro_batches if size <= current_micro_batch] or possible_micro_batches[:1]
        return possible_micro_batches

    def _find_arrangement_with_largest_batch(
        self, pool: GpuPool, fixed_values: dict[str, Any], micro_batches: list[int], checkpointing_mode: GradientCheckpointing
    ) -> _Arrangement:
        """Return the arrangement with the largest micro-batch that fits. If no arrangement fits, return the one with the smallest micro-batch."""
        fitting_count = bisect_right(micro_batches, False, key=lambda size: not self._plan_arrangement(pool, fixed_values, size, checkpointing_mode).fits)
        best_arrangement = self._plan_arrangement(pool, fixed_values, micro_batches[max(0, fitting_count - 1)], checkpointing_mode)
        return replace(best_arrangement, gpu_seconds=self._estimate_gpu_seconds(best_arrangement))

    def _plan_arrangement(self, pool: GpuPool, fixed_values: dict[str, Any], micro_batch: int, checkpointing_mode: GradientCheckpointing) -> _Arrangement:
        rank_count = fixed_values[GPUS_PATH] * (self.spec.resources.nodes or 1)
        accumulation = self.rows_per_step // rank_count // micro_batch
        values_by_path = fixed_values | {MICRO_BATCH_PATH: micro_batch, ACCUMULATION_PATH: accumulation, CHECKPOINTING_PATH: checkpointing_mode}
        process_count_values = {PROCESSES_PER_NODE_PATH: fixed_values[GPUS_PATH]} if fixed_values[GPUS_PATH] != gpus_per_node(self.spec) else {}
        spec = self.spec.with_values(values_by_path | process_count_values)
        # With ddp and at least two ranks, the memory of a rank does not depend on the number of ranks.
        plan_key = (min(rank_count, 2) if fixed_values[STRATEGY_PATH] is StrategyType.DDP else rank_count, *list(values_by_path.values())[1:])
        if plan_key not in self.plan_by_key:
            self.plan_by_key[plan_key] = plan_memory(spec, self.shape, self.facts)
        return _Arrangement(pool, values_by_path, spec, self.plan_by_key[plan_key])

    def _estimate_gpu_seconds(self, arrangement: _Arrangement) -> float:
        longest_row_tokens = self.facts.longest_tokens or self.spec.dataset.max_sequence_length or 2048
        row_count, sequences_per_row = ASSUMED_STEP_COUNT * self.rows_per_step, OBJECTIVES[trainer_type_of(self.spec)].sequences_per_row
        data_size = self.data_size or DataSize(row_count, row_count * sequences_per_row * longest_row_tokens)
        plan = arrangement.plan
        work = plan_work(arrangement.spec, self.shape, data_size, plan.recomputed_layer_count / max(plan.layer_count, 1), self.trained_parameters)
        gpu = GPU_TYPES.get(arrangement.pool.gpu_type or ASSUMED_GPU_TYPE, GPU_TYPES[ASSUMED_GPU_TYPE])
        return estimate_gpu_seconds(work, gpu, world_size(arrangement.spec)) if work is not None else 0.0


def _find_cheapest_arrangement(fitting_arrangements: list[_Arrangement]) -> _Arrangement:
    """Return the arrangement with the lowest cost.

    If a pool has no price, return the arrangement on the job's current pool, because the fastest GPU could be the most expensive one. If the job does not
    fit on its current pool, return the arrangement with the least GPU time.
    """
    if all(arrangement.cost is not None for arrangement in fitting_arrangements):
        return min(fitting_arrangements, key=lambda arrangement: (arrangement.cost, not arrangement.pool.is_current))
    arrangements_on_current_pool = [arrangement for arrangement in fitting_arrangements if arrangement.pool.is_current]
    arrangements_of_known_gpu_type = [arrangement for arrangement in fitting_arrangements if arrangement.pool.gpu_type is not None]
    return (arrangements_on_current_pool or [min(arrangements_of_known_gpu_type or fitting_arrangements, key=lambda arrangement: arrangement.gpu_seconds)])[0]


def _build_decision(search: _Search, best_arrangement: _Arrangement, reason_by_path: dict[str, str]) -> Decision:
    value_by_path = best_arrangement.values_by_path | {POOL_PATH: best_arrangement.pool.name}
    choices = tuple(
        Choice(field=path, value=_to_status_value(value_by_path[path]), reason=reason_by_path[path])
        for path in CHOSEN_FIELDS if path in value_by_path and path in reason_by_path
    )  # fmt: skip
    chosen_values = {choice.field: choice.value for choice in choices}
    resolved_spec = replace(search.resolved_spec, spec=best_arrangement.spec, defaults=search.resolved_spec.defaults | chosen_values)
    return Decision(choices, resolved_spec, best_arrangement.plan, best_arrangement.pool)


def _to_status_value(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def _iterate_chosen_paths(search: _Search, best_arrangement: _Arrangement) -> Iterator[str]:
    """Yield the spec paths whose values the plan chose. For a job with one rank, the plan chooses no strategy."""
    for path in CHOSEN_FIELDS:
        is_strategy_of_one_rank = path == STRATEGY_PATH and world_size(best_arrangement.spec) == 1
        if search.may_choose(path) and not is_strategy_of_one_rank and not (path == GPUS_PATH and PROCESSES_PER_NODE_PATH not in search.resolved_spec.defaults):
            yield path


def _explain_choices(search: _Search, best_arrangement: _Arrangement, fitting_arrangements: list[_Arrangement], known_pools: list[GpuPool]) -> dict[str, str]:
    """Return the reason for each chosen value, by spec path."""
    memory_need = f"at most {format_gigabytes(best_arrangement.plan.memory.upper_bytes)} of {format_gigabytes(best_arrangement.gpu_memory_bytes)} on each GPU"
    is_sharded = best_arrangement.values_by_path[STRATEGY_PATH] is StrategyType.FSDP
    recomputes = best_arrangement.values_by_path[CHECKPOINTING_PATH] is not GradientCheckpointing.DISABLED
    reason_by_path = {
        POOL_PATH: _explain_pool(best_arrangement, fitting_arrangements, known_pools),
        GPUS_PATH: f"the smallest number of GPUs on which the job fits: {memory_need}",
        STRATEGY_PATH: f"{'the least expected time, with sharded weights' if is_sharded else 'the job fits without sharding'}: {memory_need}",
        MICRO_BATCH_PATH: f"{_explain_micro_batch(search, best_arrangement)}: {memory_need}",
        ACCUMULATION_PATH: f"keeps the effective batch of {search.rows_per_step} rows",
        CHECKPOINTING_PATH: (
            f"of all values that fit, those with recomputation have the least expected time: {memory_need}"
            if recomputes else f"the activations fit: {memory_need}"
        ),
    }
    return {path: reason_by_path[path] for path in _iterate_chosen_paths(search, best_arrangement)}


def _explain_micro_batch(search: _Search, best_arrangement: _Arrangement) -> str:
    if search.pads_rows(best_arrangement.pool):
        return "the largest micro-batch that fits and needs no more padding than the default micro-batch"
    return "the micro-batch that fits with the least expected time"


def _explain_pool(best_arrangement: _Arrangement, fitting_arrangements: list[_Arrangement], known_pools: list[GpuPool]) -> str:
    if len(known_pools) == 1:
        return "the only pool with a known GPU memory that the job may use"
    if len(fitting_arrangements) == 1:
        return f"the only one of {len(known_pools)} pools on which the job fits"
    if best_arrangement.cost is not None and all(arrangement.cost is not None for arrangement in fitting_arrangements):
        return f"the lowest expected cost of {len(fitting_arrangements)} pools on which the job fits"
    if best_arrangement.pool.is_current:
        return "the default pool of the platform, and the job fits"
    return f"the least expected GPU time of {len(fitting_arrangements)} pools on which the job fits"


def _explain_exceeded_upper_bound(search: _Search, best_arrangement: _Arrangement) -> dict[str, str]:
    """Return one reason for all chosen values: the expected peak fits, but the upper bound does not."""
    memory = best_arrangement.plan.memory
    reason = (
        f"needs the least memory: the expected {format_gigabytes(memory.expected_bytes)} fit into the "
        f"{format_gigabytes(best_arrangement.gpu_memory_bytes)} of each GPU, "
        f"but the upper bound of {format_gigabytes(memory.upper_bytes)} does not"
    )
    return dict.fromkeys(_iterate_chosen_paths(search, best_arrangement), reason)


def _find_changes(search: _Search, best_arrangement: _Arrangement, known_pools: list[GpuPool], pools: Sequence[GpuPool]) -> tuple[Change, ...]:
    """Return up to three changes that let the job fit. If the user named a pool, and the job fits on another pool, the first change is that other pool."""
    other_fitting_pools = [pool for pool in pools if pool not in known_pools and best_arrangement.plan.fits(pool.memory_bytes or 0)]
    changes = [Change({POOL_PATH: pool.name}, best_arrangement.plan) for pool in other_fitting_pools[:1]]
    return tuple([*changes, *find_fitting_changes(best_arrangement.spec, search.shape, best_arrangement.gpu_memory_bytes, search.facts)][:MAX_CHANGES])


def _build_refusal(best_arrangement: _Arrangement, known_pools: list[GpuPool], changes: Sequence[Change]) -> ConfigError:
    pool_list = ", ".join(f"{pool.name} ({format_gigabytes(pool.memory_bytes or 0)})" for pool in known_pools)
    memory_need = format_gigabytes(best_arrangement.plan.memory.expected_bytes)
    message = f"the job is expected to need at least {memory_need} on each GPU, but no pool that it may use has so much GPU memory: {pool_list}"
    return ConfigError("DoesNotFit", message, hint=format_changes_hint(changes))
