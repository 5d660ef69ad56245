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
    trainer_type_of,
    without_defaults,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, StrategyType, TrainerBackend
from finetune_api.status import Choice
from finetune_api.time_plan import DataSize, expected_gpu_seconds, plan_work

PROCESSES_PATH = "resources.processesPerNode"
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
    values: dict[str, Any]
    spec: FineTuneJobSpec
    plan: JobPlan
    gpu_seconds: float = 0.0

    @property
    def memory_bytes(self) -> int:
        return self.pool.memory_bytes or 0

    @property
    def fits(self) -> bool:
        return self.plan.fits(self.memory_bytes)

    @property
    def may_fit(self) -> bool:
        return self.plan.memory.expected_bytes <= self.memory_bytes

    @property
    def cost(self) -> float | None:
        price = self.pool.price_per_gpu_hour
        return None if price is None else price * self.gpu_seconds / 3600


def choose_values(
    resolved: ResolvedSpec, shape: ModelShape, pools: Sequence[GpuPool], facts: RunFacts | None = None, data_size: DataSize | None = None,
    trained_parameters: int = 0,
) -> Decision:  # fmt: skip
    """Choose the values that a resolved spec leaves out.

    `pools`: the pools that the job may use. `data_size`: None if the number of rows is not known. `trained_parameters`: number of parameters of
    the adapters. Errors: those of `describe_step`, ChoicesNotPlanned, GpuMemoryUnknown. Each of these errors means that there is no plan. The
    job can still run without a plan.
    """
    _require_choosable(resolved)
    search = _Search(resolved, shape, facts or RunFacts(), data_size, trained_parameters)
    allowed = [pool for pool in pools if pool.is_current or search.is_open(POOL_PATH)]
    known_pools = [pool for pool in allowed if pool.memory_bytes is not None]
    unknown = [pool for pool in allowed if pool.memory_bytes is None]
    if not known_pools or any(pool.is_current for pool in unknown):
        raise _make_unknown_memory_error(unknown)
    fitting: list[_Arrangement] = []
    too_large: list[_Arrangement] = []
    for pool in known_pools:
        best_on_pool = search.find_best(pool)
        (fitting if best_on_pool.fits else too_large).append(best_on_pool)
    if fitting:
        best = _find_cheapest(fitting)
        return _build_decision(search, best, _explain_choices(search, best, fitting, known_pools))
    if unknown:
        raise _make_unknown_memory_error(unknown)
    best = max(too_large, key=lambda one: (one.may_fit, one.may_fit and one.pool.is_current, one.memory_bytes / one.plan.memory.expected_bytes))
    decision = replace(
        _build_decision(search, best, _explain_exceeded_upper_bound(search, best)), changes=_find_changes(search, best, known_pools, pools)
    )
    if best.may_fit or _has_reference_of_unknown_size(search.spec):
        return decision
    return replace(decision, choices=(), refusal=_build_refusal(best, known_pools, decision.changes))


def _has_reference_of_unknown_size(spec: FineTuneJobSpec) -> bool:
    """Whether the plan has to assume the size of the reference model.

    If so, the reference model can be smaller, and the job can fit even if its expected peak exceeds the GPU memory.
    """
    return spec.trainer.dpo is not None and spec.trainer.dpo.reference_model is not None


def _make_unknown_memory_error(pools: Sequence[GpuPool]) -> ConfigError:
    named = f" of pool {', '.join(pool.name for pool in pools)}" if pools else ""
    return ConfigError("GpuMemoryUnknown", f"the memory of the GPUs{named} is not known", hint="set gpuType or gpuMemory of the node pool")


def _require_choosable(resolved: ResolvedSpec) -> None:
    """Raise ConfigError ChoicesNotPlanned if the job has no GPU, or if a configuration file or the checkpoint of another job decides the values."""
    spec = resolved.spec
    if gpus_per_node(spec) == 0:
        raise ConfigError("ChoicesNotPlanned", "the job uses no GPU", hint="raise resources.gpusPerNode")
    files = {"distributed.fsdp.configRef": spec.distributed.fsdp, "distributed.deepspeed.configRef": spec.distributed.deepspeed}
    deciding_paths = [path for path, settings in files.items() if settings is not None and settings.config_ref is not None]
    if spec.checkpoint.resume not in (None, "auto", "never"):
        deciding_paths.append("checkpoint.resume")
    if deciding_paths:
        path = deciding_paths[0]
        raise ConfigError("ChoicesNotPlanned", f"{path} decides the values that the plan would choose", hint=f"remove {path}")


@dataclass
class _Search:
    """Finds the best arrangement for each pool. Each memory plan is kept, so that the same values are planned only once."""

    resolved: ResolvedSpec
    shape: ModelShape
    facts: RunFacts
    data_size: DataSize | None
    trained_parameters: int
    plans: dict[tuple[Any, ...], JobPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.rows_per_step = self.resolved.spec, effective_batch(self.resolved.spec)
        self.user_spec = without_defaults(self.spec, self.resolved.defaults)
        kernels = describe_step(self.spec, self.shape, self.facts).step.kernels
        self.has_padding = not (kernels.attention == "varlen" or self.spec.dataset.packing is True)

    def pads_rows(self, pool: GpuPool) -> bool:
        """Whether the trainer pads the rows of a micro-batch on GPUs of this pool. The kernel without padding needs Ampere or newer."""
        return self.has_padding or (pool.gpu_type in GPU_TYPES_WITH_PADDING and self.spec.dataset.packing is not True)

    def is_open(self, path: str) -> bool:
        """Whether the user has not set the field, so that the plan may choose its value."""
        return path in self.resolved.defaults or self.spec.value(path) is None

    def find_best(self, pool: GpuPool) -> _Arrangement:
        """Return the arrangement that fits and has the fewest GPUs. If several have equally few GPUs, return the one with the least GPU time.

        If no arrangement fits, return the one that needs the least memory.
        """
        least_memory: list[_Arrangement] = []
        for gpus in self._list_possible_gpu_counts(pool):
            fitting = []
            for strategy in self._list_possible_strategies(gpus):
                base = {GPUS_PATH: gpus, STRATEGY_PATH: strategy}
                micro_batches = self._list_possible_micro_batches(gpus, pool)
                if not micro_batches or not self._keeps_rules(base):
                    continue
                smallest = self._plan_arrangement(pool, base, micro_batches[0], self._list_possible_checkpointing_modes(base)[-1])
                least_memory.append(smallest)
                if smallest.fits:
                    fitting += [self._find_largest_batch(pool, base, micro_batches, mode) for mode in self._list_possible_checkpointing_modes(base)]
            fitting = [one for one in fitting if one.fits]
            if fitting:
                return min(fitting, key=lambda one: one.gpu_seconds)
        return min(least_memory, key=lambda one: one.plan.memory.expected_bytes)

    def _list_possible_gpu_counts(self, pool: GpuPool) -> list[int]:
        """Return the possible numbers of GPUs on each node. The effective batch must be divisible by the number of ranks."""
        current, nodes = gpus_per_node(self.spec), self.spec.resources.nodes or 1
        if not (self.is_open(GPUS_PATH) and PROCESSES_PATH in self.resolved.defaults):
            return [current]
        return [count for count in range(current, max(current, pool.gpus_per_node) + 1) if self.rows_per_step % (count * nodes) == 0]

    def _list_possible_strategies(self, gpus: int) -> list[StrategyType]:
        current = self.spec.distributed.strategy or StrategyType.NONE
        if not self.is_open(STRATEGY_PATH):
            return [current]
        return [StrategyType.NONE] if gpus * (self.spec.resources.nodes or 1) == 1 else [StrategyType.DDP, StrategyType.FSDP]

    def _list_possible_checkpointing_modes(self, base: dict[str, Any]) -> list[GradientCheckpointing]:
        """Return the values of `training.gradientCheckpointing` to compare. The value that needs the least memory is the last one."""
        current = self.spec.training.gradient_checkpointing or GradientCheckpointing.ENABLED
        is_fixed = not self.is_open(CHECKPOINTING_PATH) or self.spec.trainer.backend is TrainerBackend.UNSLOTH or current is GradientCheckpointing.DISABLED
        if is_fixed or not self._keeps_rules(base | {CHECKPOINTING_PATH: GradientCheckpointing.DISABLED}):
            return [current]
        return [GradientCheckpointing.DISABLED, current]

    def _keeps_rules(self, values: dict[str, Any]) -> bool:
        changed = {path: value for path, value in values.items() if self.is_open(path) and value != self.spec.value(path)}
        return not new_problems(self.user_spec, self.user_spec.with_values(changed))

    def _list_possible_micro_batches(self, gpus: int, pool: GpuPool) -> list[int]:
        """Return the sizes of the micro-batch that keep the effective batch, in ascending order."""
        training, rows = self.spec.training, self.rows_per_step // (gpus * (self.spec.resources.nodes or 1))
        current, accumulation = training.batch_size_per_device or 1, training.gradient_accumulation_steps or 1
        smallest = min_batch_size_per_device(self.spec)
        possible = [size for size in divisors(rows) if size >= smallest and rows // size <= MAX_ACCUMULATION]
        if not self.is_open(MICRO_BATCH_PATH):
            possible = [size for size in possible if size == current]
        if not self.is_open(ACCUMULATION_PATH):
            possible = [size for size in possible if rows // size == accumulation]
        if self.pads_rows(pool) and self.is_open(MICRO_BATCH_PATH):  # the plan does not know how much padding a larger micro-batch has
            possible = [size for size in possible if size <= current] or possible[:1]
        return possible

    def _find_largest_batch(self, pool: GpuPool, base: dict[str, Any], micro_batches: list[int], mode: GradientCheckpointing) -> _Arrangement:
        """Return the arrangement with the largest micro-batch that fits. If no arrangement fits, return the one with the smallest micro-batch."""
        count = bisect_right(micro_batches, False, key=lambda rows: not self._plan_arrangement(pool, base, rows, mode).fits)
        best = self._plan_arrangement(pool, base, micro_batches[max(0, count - 1)], mode)
        return replace(best, gpu_seconds=self._estimate_gpu_seconds(best))

    def _plan_arrangement(self, pool: GpuPool, base: dict[str, Any], micro_batch: int, mode: GradientCheckpointing) -> _Arrangement:
        ranks = base[GPUS_PATH] * (self.spec.resources.nodes or 1)
        values = base | {MICRO_BATCH_PATH: micro_batch, ACCUMULATION_PATH: self.rows_per_step // ranks // micro_batch, CHECKPOINTING_PATH: mode}
        processes = {PROCESSES_PATH: base[GPUS_PATH]} if base[GPUS_PATH] != gpus_per_node(self.spec) else {}
        spec = self.spec.with_values(values | processes)
        # With ddp and at least two ranks, the memory of a rank does not depend on the number of ranks.
        key = (min(ranks, 2) if base[STRATEGY_PATH] is StrategyType.DDP else ranks, *list(values.values())[1:])
        if key not in self.plans:
            self.plans[key] = plan_memory(spec, self.shape, self.facts)
        return _Arrangement(pool, values, spec, self.plans[key])

    def _estimate_gpu_seconds(self, arrangement: _Arrangement) -> float:
        longest = self.facts.longest_tokens or self.spec.dataset.max_sequence_length or 2048
        rows, sequences = ASSUMED_STEP_COUNT * self.rows_per_step, OBJECTIVES[trainer_type_of(self.spec)].sequences_per_row
        data_size = self.data_size or DataSize(rows, rows * sequences * longest)
        plan = arrangement.plan
        work = plan_work(arrangement.spec, self.shape, data_size, plan.recomputed_layer_count / max(plan.layer_count, 1), self.trained_parameters)
        gpu = GPU_TYPES.get(arrangement.pool.gpu_type or ASSUMED_GPU_TYPE, GPU_TYPES[ASSUMED_GPU_TYPE])
        return expected_gpu_seconds(work, gpu, world_size(arrangement.spec)) if work is not None else 0.0


def _find_cheapest(fitting: list[_Arrangement]) -> _Arrangement:
    """Return the arrangement with the lowest cost.

    If a pool has no price, return the arrangement on the job's current pool, because the fastest GPU could be the most expensive one. If the job does not
    fit on its current pool, return the arrangement with the least GPU time.
    """
    if all(one.cost is not None for one in fitting):
        return min(fitting, key=lambda one: (one.cost, not one.pool.is_current))
    current = [one for one in fitting if one.pool.is_current]
    comparable = [one for one in fitting if one.pool.gpu_type is not None]
    return (current or [min(comparable or fitting, key=lambda one: one.gpu_seconds)])[0]


def _build_decision(search: _Search, best: _Arrangement, reasons: dict[str, str]) -> Decision:
    values = {path: value for path, value in (best.values | {POOL_PATH: best.pool.name}).items() if path in reasons}
    choices = tuple(Choice(field=path, value=_to_status_value(values[path]), reason=reasons[path]) for path in CHOSEN_FIELDS if path in values)
    chosen = {choice.field: choice.value for choice in choices}
    return Decision(choices, replace(search.resolved, spec=best.spec, defaults=search.resolved.defaults | chosen), best.plan, best.pool)


def _to_status_value(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def _chosen_paths(search: _Search, best: _Arrangement) -> Iterator[str]:
    """Yield the spec paths whose values the plan chose. For a job with one rank, the plan chooses no strategy."""
    for path in CHOSEN_FIELDS:
        is_single = path == STRATEGY_PATH and world_size(best.spec) == 1
        if search.is_open(path) and not is_single and not (path == GPUS_PATH and PROCESSES_PATH not in search.resolved.defaults):
            yield path


def _explain_choices(search: _Search, best: _Arrangement, fitting: list[_Arrangement], known_pools: list[GpuPool]) -> dict[str, str]:
    """Return the reason for each chosen value, by spec path."""
    need = f"at most {format_gigabytes(best.plan.memory.upper_bytes)} of {format_gigabytes(best.memory_bytes)} on each GPU"
    is_sharded = best.values[STRATEGY_PATH] is StrategyType.FSDP
    recomputes = best.values[CHECKPOINTING_PATH] is not GradientCheckpointing.DISABLED
    texts = {
        POOL_PATH: _explain_pool(best, fitting, known_pools),
        GPUS_PATH: f"the smallest number of GPUs on which the job fits: {need}",
        STRATEGY_PATH: f"{'the least expected time, with sharded weights' if is_sharded else 'the job fits without sharding'}: {need}",
        MICRO_BATCH_PATH: f"{_explain_micro_batch(search, best)}: {need}",
        ACCUMULATION_PATH: f"keeps the effective batch of {search.rows_per_step} rows",
        CHECKPOINTING_PATH: (
            f"of all values that fit, those with recomputation have the least expected time: {need}" if recomputes else f"the activations fit: {need}"
        ),
    }
    return {path: texts[path] for path in _chosen_paths(search, best)}


def _explain_micro_batch(search: _Search, best: _Arrangement) -> str:
    if search.pads_rows(best.pool):
        return "the largest micro-batch that fits and needs no more padding than the default micro-batch"
    return "the micro-batch that fits with the least expected time"


def _explain_pool(best: _Arrangement, fitting: list[_Arrangement], known_pools: list[GpuPool]) -> str:
    if len(known_pools) == 1:
        return "the only pool with a known GPU memory that the job may use"
    if len(fitting) == 1:
        return f"the only one of {len(known_pools)} pools on which the job fits"
    if best.cost is not None and all(one.cost is not None for one in fitting):
        return f"the lowest expected cost of {len(fitting)} pools on which the job fits"
    if best.pool.is_current:
        return "the default pool of the platform, and the job fits"
    return f"the least expected GPU time of {len(fitting)} pools on which the job fits"


def _explain_exceeded_upper_bound(search: _Search, best: _Arrangement) -> dict[str, str]:
    """Return one reason for all chosen values: the expected peak fits, but the upper bound does not."""
    memory = best.plan.memory
    text = (
        f"needs the least memory: the expected {format_gigabytes(memory.expected_bytes)} fit into the {format_gigabytes(best.memory_bytes)} of each GPU, "
        f"but the upper bound of {format_gigabytes(memory.upper_bytes)} does not"
    )
    return dict.fromkeys(_chosen_paths(search, best), text)


def _find_changes(search: _Search, best: _Arrangement, known_pools: list[GpuPool], pools: Sequence[GpuPool]) -> tuple[Change, ...]:
    """Return up to three changes that let the job fit. If the user named a pool, and the job fits on another pool, the first change is that other pool."""
    others = [pool for pool in pools if pool not in known_pools and best.plan.fits(pool.memory_bytes or 0)]
    changes = [Change({POOL_PATH: pool.name}, best.plan) for pool in others[:1]]
    return tuple([*changes, *find_fitting_changes(best.spec, search.shape, best.memory_bytes, search.facts)][:MAX_CHANGES])


def _build_refusal(best: _Arrangement, known_pools: list[GpuPool], changes: Sequence[Change]) -> ConfigError:
    names = ", ".join(f"{pool.name} ({format_gigabytes(pool.memory_bytes or 0)})" for pool in known_pools)
    need = format_gigabytes(best.plan.memory.expected_bytes)
    message = f"the job is expected to need at least {need} on each GPU, but no pool that it may use has so much GPU memory: {names}"
    return ConfigError("DoesNotFit", message, hint=format_changes_hint(changes))
