"""Chooses values that a spec leaves out: micro-batch and accumulation, recomputation, strategy, number of GPUs, and node pool.

A choice must fit: the upper bound of the planned memory is at most the memory of the GPU. Of the arrangements that fit, the one with the lowest
expected cost is chosen. Without prices, it is the one with the least expected GPU time. Values of the user never change, and neither does the
effective batch. The preparation of a job and `finetune plan` use this module.
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
from finetune_api.memory.changes import MAX_CHANGES, Change, changes_that_fit, describe_changes
from finetune_api.memory.description import Facts, describe_step
from finetune_api.memory.plan import (
    ACCUMULATION_PATH,
    CHECKPOINTING_PATH,
    GPUS_PATH,
    MICRO_BATCH_PATH,
    POOL_PATH,
    STRATEGY_PATH,
    JobPlan,
    gigabytes,
    plan_memory,
)
from finetune_api.pod import GpuPool
from finetune_api.rules import (
    MAX_ACCUMULATION,
    divisors,
    effective_batch,
    gpus_per_node,
    min_batch_size_per_device,
    new_problems,
    without_defaults,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, StrategyType, TrainerBackend
from finetune_api.status import Choice
from finetune_api.time_plan import DataSize, expected_gpu_seconds, plan_work

PROCESSES_PATH = "resources.processesPerNode"
CHOSEN_FIELDS = (POOL_PATH, GPUS_PATH, STRATEGY_PATH, MICRO_BATCH_PATH, ACCUMULATION_PATH, CHECKPOINTING_PATH)
"""The fields that the plan can choose, in the order in which they are shown."""
TYPES_WITH_PADDING = ("t4-16gb", "v100-16gb", "v100-32gb")
"""Types of GPUs before Ampere, on which the trainer pads rows (`MIN_COMPUTE_CAPABILITY` in `finetune_trainer.attention`)."""
USUAL_GPU = "a100-80gb"
"""Type with which arrangements of one pool are compared if the type of its GPUs is not known."""
ASSUMED_STEPS = 100
"""Optimizer steps for which arrangements are compared if the number of rows is not known."""


@dataclass(frozen=True)
class Decision:
    """The chosen values, and the plan with these values."""

    choices: tuple[Choice, ...]
    resolved: ResolvedSpec
    """The resolved spec with the chosen values."""
    plan: JobPlan
    pool: GpuPool
    changes: tuple[Change, ...] = ()
    """If the upper bound does not fit: changes with which it would."""
    refusal: ConfigError | None = None
    """DoesNotFit if even the expected peak fits on no pool."""


@dataclass(frozen=True)
class _Arrangement:
    """Values for all fields that the plan can choose, with their plan on one pool."""

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
    resolved: ResolvedSpec, shape: ModelShape, pools: Sequence[GpuPool], facts: Facts | None = None, data: DataSize | None = None,
    trained_parameters: int = 0,
) -> Decision:  # fmt: skip
    """Choose the values that a resolved spec leaves out.

    `pools`: the pools that the job may use. `data`: None if the number of rows is not known. `trained_parameters`: those of adapters.
    Errors: those of `describe_step`, ChoicesNotPlanned, GpuMemoryUnknown. They all mean that there is no plan, not that the job cannot run.
    """
    _require_choosable(resolved)
    search = _Search(resolved, shape, facts or Facts(), data, trained_parameters)
    allowed = [pool for pool in pools if pool.is_current or search.is_open(POOL_PATH)]
    known = [pool for pool in allowed if pool.memory_bytes is not None]
    unknown = [pool for pool in allowed if pool.memory_bytes is None]
    if not known or any(pool.is_current for pool in unknown):
        raise _memory_unknown(unknown)
    fitting: list[_Arrangement] = []
    closest: list[_Arrangement] = []
    for pool in known:
        found = search.find(pool)
        (fitting if found.fits else closest).append(found)
    if fitting:
        best = _best(fitting)
        return _decision(search, best, _reasons(search, best, fitting, known))
    if unknown:
        raise _memory_unknown(unknown)
    best = max(closest, key=lambda one: (one.may_fit, one.may_fit and one.pool.is_current, one.memory_bytes / one.plan.memory.expected_bytes))
    decision = replace(_decision(search, best, _reasons_if_upper_bound_does_not_fit(search, best)), changes=_changes(search, best, known, pools))
    return decision if best.may_fit else replace(decision, choices=(), refusal=_refusal(best, known, decision.changes))


def _memory_unknown(pools: Sequence[GpuPool]) -> ConfigError:
    named = f" of pool {', '.join(pool.name for pool in pools)}" if pools else ""
    return ConfigError("GpuMemoryUnknown", f"the memory of the GPUs{named} is not known", hint="set gpuType or gpuMemory of the node pool")


def _require_choosable(resolved: ResolvedSpec) -> None:
    """Errors: ConfigError ChoicesNotPlanned for a job without GPUs, or if a configuration file or the checkpoint of another job sets the values."""
    spec = resolved.spec
    if gpus_per_node(spec) == 0:
        raise ConfigError("ChoicesNotPlanned", "the job uses no GPU", hint="raise resources.gpusPerNode")
    files = {"distributed.fsdp.configRef": spec.distributed.fsdp, "distributed.deepspeed.configRef": spec.distributed.deepspeed}
    deciding = [path for path, group in files.items() if group is not None and group.config_ref is not None]
    if spec.checkpoint.resume not in (None, "auto", "never"):
        deciding.append("checkpoint.resume")
    if deciding:
        raise ConfigError("ChoicesNotPlanned", f"{deciding[0]} decides about values that the plan would choose", hint=f"remove {deciding[0]}")


@dataclass
class _Search:
    """Finds the best arrangement for each pool. Plans are computed once."""

    resolved: ResolvedSpec
    shape: ModelShape
    facts: Facts
    data: DataSize | None
    trained_parameters: int
    plans: dict[tuple[Any, ...], JobPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.rows_per_step = self.resolved.spec, effective_batch(self.resolved.spec)
        self.user_spec = without_defaults(self.spec, self.resolved.defaults)
        kernels = describe_step(self.spec, self.shape, self.facts).step.kernels
        self.has_padding = not (kernels.attention == "varlen" or self.spec.dataset.packing is True)

    def pads_rows(self, pool: GpuPool) -> bool:
        """Whether the rows of a micro-batch are padded. The kernel without padding needs GPUs of Ampere or later."""
        return self.has_padding or (pool.gpu_type in TYPES_WITH_PADDING and self.spec.dataset.packing is not True)

    def is_open(self, path: str) -> bool:
        """Whether the user has left the field out."""
        return path in self.resolved.defaults or self.spec.value(path) is None

    def find(self, pool: GpuPool) -> _Arrangement:
        """Return the cheapest arrangement with the smallest number of GPUs that fits; if none fits, the one that needs the least memory."""
        smallest: list[_Arrangement] = []
        for gpus in self._gpu_counts(pool):
            fitting = []
            for strategy in self._strategies(gpus):
                base = {GPUS_PATH: gpus, STRATEGY_PATH: strategy}
                micro_batches = self._micro_batches(gpus, pool)
                if not micro_batches or not self._keeps_rules(base):
                    continue
                small = self._arrange(pool, base, micro_batches[0], self._checkpointing_modes(base)[-1])
                smallest.append(small)
                if small.fits:
                    fitting += [self._with_largest_batch(pool, base, micro_batches, mode) for mode in self._checkpointing_modes(base)]
            fitting = [one for one in fitting if one.fits]
            if fitting:
                return min(fitting, key=lambda one: one.gpu_seconds)
        return min(smallest, key=lambda one: one.plan.memory.expected_bytes)

    def _gpu_counts(self, pool: GpuPool) -> list[int]:
        """Numbers of GPUs on each node. The effective batch must be divisible by the ranks."""
        current, nodes = gpus_per_node(self.spec), self.spec.resources.nodes or 1
        if not (self.is_open(GPUS_PATH) and PROCESSES_PATH in self.resolved.defaults):
            return [current]
        return [count for count in range(current, max(current, pool.gpus_per_node) + 1) if self.rows_per_step % (count * nodes) == 0]

    def _strategies(self, gpus: int) -> list[StrategyType]:
        current = self.spec.distributed.strategy or StrategyType.NONE
        if not self.is_open(STRATEGY_PATH):
            return [current]
        return [StrategyType.NONE] if gpus * (self.spec.resources.nodes or 1) == 1 else [StrategyType.DDP, StrategyType.FSDP]

    def _checkpointing_modes(self, base: dict[str, Any]) -> list[GradientCheckpointing]:
        """The values of `training.gradientCheckpointing` to compare. The one that needs the least memory is last."""
        current = self.spec.training.gradient_checkpointing or GradientCheckpointing.ENABLED
        is_fixed = not self.is_open(CHECKPOINTING_PATH) or self.spec.trainer.backend is TrainerBackend.UNSLOTH or current is GradientCheckpointing.DISABLED
        if is_fixed or not self._keeps_rules(base | {CHECKPOINTING_PATH: GradientCheckpointing.DISABLED}):
            return [current]
        return [GradientCheckpointing.DISABLED, current]

    def _keeps_rules(self, values: dict[str, Any]) -> bool:
        changed = {path: value for path, value in values.items() if self.is_open(path) and value != self.spec.value(path)}
        return not new_problems(self.user_spec, self.user_spec.with_values(changed))

    def _micro_batches(self, gpus: int, pool: GpuPool) -> list[int]:
        """The micro-batches that keep the effective batch, in ascending order."""
        training, rows = self.spec.training, self.rows_per_step // (gpus * (self.spec.resources.nodes or 1))
        micro, accumulation = training.batch_size_per_device or 1, training.gradient_accumulation_steps or 1
        least = min_batch_size_per_device(self.spec)
        possible = [part for part in divisors(rows) if part >= least and rows // part <= MAX_ACCUMULATION]
        if not self.is_open(MICRO_BATCH_PATH):
            possible = [part for part in possible if part == micro]
        if not self.is_open(ACCUMULATION_PATH):
            possible = [part for part in possible if rows // part == accumulation]
        if self.pads_rows(pool) and self.is_open(MICRO_BATCH_PATH):  # the plan does not know how much padding a larger micro-batch has
            possible = [part for part in possible if part <= micro] or possible[:1]
        return possible

    def _with_largest_batch(self, pool: GpuPool, base: dict[str, Any], micro_batches: list[int], mode: GradientCheckpointing) -> _Arrangement:
        """Return the arrangement with the largest micro-batch that fits. If none fits, return that with the smallest."""
        count = bisect_right(micro_batches, False, key=lambda rows: not self._arrange(pool, base, rows, mode).fits)
        best = self._arrange(pool, base, micro_batches[max(0, count - 1)], mode)
        return replace(best, gpu_seconds=self._gpu_seconds(best))

    def _arrange(self, pool: GpuPool, base: dict[str, Any], micro_batch: int, mode: GradientCheckpointing) -> _Arrangement:
        ranks = base[GPUS_PATH] * (self.spec.resources.nodes or 1)
        values = base | {MICRO_BATCH_PATH: micro_batch, ACCUMULATION_PATH: self.rows_per_step // ranks // micro_batch, CHECKPOINTING_PATH: mode}
        processes = {PROCESSES_PATH: base[GPUS_PATH]} if base[GPUS_PATH] != gpus_per_node(self.spec) else {}
        spec = self.spec.with_values(values | processes)
        # Each rank of ddp needs the same memory, for each number of ranks.
        key = (min(ranks, 2) if base[STRATEGY_PATH] is StrategyType.DDP else ranks, *list(values.values())[1:])
        if key not in self.plans:
            self.plans[key] = plan_memory(spec, self.shape, self.facts)
        return _Arrangement(pool, values, spec, self.plans[key])

    def _gpu_seconds(self, one: _Arrangement) -> float:
        longest = self.facts.longest_tokens or self.spec.dataset.max_sequence_length or 2048
        data = self.data or DataSize(ASSUMED_STEPS * self.rows_per_step, ASSUMED_STEPS * self.rows_per_step * longest)
        work = plan_work(one.spec, self.shape, data, one.plan.recomputed_layers / max(one.plan.layers, 1), self.trained_parameters)
        gpu = GPU_TYPES.get(one.pool.gpu_type or USUAL_GPU, GPU_TYPES[USUAL_GPU])
        return expected_gpu_seconds(work, gpu, world_size(one.spec)) if work is not None else 0.0


def _best(fitting: list[_Arrangement]) -> _Arrangement:
    """Return the cheapest arrangement. If a pool has no price, prefer the platform's default pool: the fastest GPU may be the most expensive one."""
    if all(one.cost is not None for one in fitting):
        return min(fitting, key=lambda one: (one.cost, not one.pool.is_current))
    current = [one for one in fitting if one.pool.is_current]
    comparable = [one for one in fitting if one.pool.gpu_type is not None]
    return (current or [min(comparable or fitting, key=lambda one: one.gpu_seconds)])[0]


def _decision(search: _Search, best: _Arrangement, reasons: dict[str, str]) -> Decision:
    values = {path: value for path, value in (best.values | {POOL_PATH: best.pool.name}).items() if path in reasons}
    choices = tuple(Choice(field=path, value=_plain(values[path]), reason=reasons[path]) for path in CHOSEN_FIELDS if path in values)
    chosen = {choice.field: choice.value for choice in choices}
    return Decision(choices, replace(search.resolved, spec=best.spec, defaults=search.resolved.defaults | chosen), best.plan, best.pool)


def _plain(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value)


def _open_fields(search: _Search, best: _Arrangement) -> Iterator[str]:
    """Yield the fields that the user left out and the plan chose. A job with one rank has no strategy."""
    for path in CHOSEN_FIELDS:
        is_single = path == STRATEGY_PATH and world_size(best.spec) == 1
        if search.is_open(path) and not is_single and not (path == GPUS_PATH and PROCESSES_PATH not in search.resolved.defaults):
            yield path


def _reasons(search: _Search, best: _Arrangement, fitting: list[_Arrangement], known: list[GpuPool]) -> dict[str, str]:
    """Why each open field has its value, by spec path."""
    need = f"at most {gigabytes(best.plan.memory.upper_bytes)} of {gigabytes(best.memory_bytes)} on each GPU"
    is_sharded = best.values[STRATEGY_PATH] is StrategyType.FSDP
    recomputes = best.values[CHECKPOINTING_PATH] is not GradientCheckpointing.DISABLED
    texts = {
        POOL_PATH: _pool_reason(best, fitting, known),
        GPUS_PATH: f"the smallest number of GPUs on which the job fits: {need}",
        STRATEGY_PATH: f"{'the least expected time, with sharded weights' if is_sharded else 'the job fits without sharding'}: {need}",
        MICRO_BATCH_PATH: f"{_micro_batch_reason(search, best)}: {need}",
        ACCUMULATION_PATH: f"keeps the effective batch of {search.rows_per_step} rows",
        CHECKPOINTING_PATH: (
            f"of all values that fit, those with recomputation have the least expected time: {need}" if recomputes else f"the activations fit: {need}"
        ),
    }
    return {path: texts[path] for path in _open_fields(search, best)}


def _micro_batch_reason(search: _Search, best: _Arrangement) -> str:
    if search.pads_rows(best.pool):
        return "the largest micro-batch that fits and adds no padding to that of the defaults"
    return "the micro-batch that fits with the least expected time"


def _pool_reason(best: _Arrangement, fitting: list[_Arrangement], known: list[GpuPool]) -> str:
    if len(known) == 1:
        return "the only pool with a known GPU memory that the job may use"
    if len(fitting) == 1:
        return f"the only one of {len(known)} pools on which the job fits"
    if best.cost is not None and all(one.cost is not None for one in fitting):
        return f"the lowest expected cost of {len(fitting)} pools on which the job fits"
    if best.pool.is_current:
        return "the default pool of the platform, and the job fits"
    return f"the least expected GPU time of {len(fitting)} pools on which the job fits"


def _reasons_if_upper_bound_does_not_fit(search: _Search, best: _Arrangement) -> dict[str, str]:
    memory = best.plan.memory
    text = (
        f"the least memory: the expected {gigabytes(memory.expected_bytes)} fit into {gigabytes(best.memory_bytes)} of each GPU, "
        f"but the upper bound {gigabytes(memory.upper_bytes)} does not"
    )
    return dict.fromkeys(_open_fields(search, best), text)


def _changes(search: _Search, best: _Arrangement, known: list[GpuPool], pools: Sequence[GpuPool]) -> tuple[Change, ...]:
    """Return the three nearest changes. If the user named a pool, another pool with larger GPUs is the nearest change."""
    others = [pool for pool in pools if pool not in known and best.plan.fits(pool.memory_bytes or 0)]
    changes = [Change({POOL_PATH: pool.name}, best.plan) for pool in others[:1]]
    return tuple([*changes, *changes_that_fit(best.spec, search.shape, best.memory_bytes, search.facts)][:MAX_CHANGES])


def _refusal(best: _Arrangement, known: list[GpuPool], changes: Sequence[Change]) -> ConfigError:
    names = ", ".join(f"{pool.name} ({gigabytes(pool.memory_bytes or 0)})" for pool in known)
    need = gigabytes(best.plan.memory.expected_bytes)
    message = f"the job is expected to need at least {need} on each GPU, which no pool that it may use has: {names}"
    return ConfigError("DoesNotFit", message, hint=describe_changes(changes))
