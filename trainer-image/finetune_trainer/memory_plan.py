"""Reports the planned memory and work of a run, the measured peak of memory, and advice after a GPU had no memory left."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from finetune_api.calibration import calibrate_memory
from finetune_api.defaults import ResolvedSpec
from finetune_api.errors import ConfigError
from finetune_api.gpus import find_gpu_type
from finetune_api.memory.architecture import parse_model_shape
from finetune_api.memory.choices import choose_values
from finetune_api.memory.description import RunFacts
from finetune_api.memory.ladder import RefusedAllocation, advise_smaller_values
from finetune_api.memory.plan import CONTEXT_BYTES, plan_memory
from finetune_api.pod import RunConfig
from finetune_api.status import MeasuredRun, MemoryAdvice, MemoryPlan, RunPlan, WorkPlan
from finetune_api.time_plan import DataSize, plan_work
from transformers import TrainerCallback

from finetune_trainer.channel import Channel
from finetune_trainer.recomputation import count_kept_layers

log = logging.getLogger(__name__)
REQUESTED_MEMORY_PATTERN = re.compile(r"Tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)")
BYTES_BY_UNIT = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def collect_memory_facts(
    run: RunConfig, config: Any, *, attention: str, longest_tokens: int, uses_liger: bool, recomputes: bool, kept_layer_tokens: int | None
) -> RunFacts:
    """Return the facts that determine the memory of a run and that its spec does not contain.

    `config`: the model's configuration. `longest_tokens`: tokens of the longest row, 0 if unknown. `recomputes`: whether activations are recomputed.
    `kept_layer_tokens`: `layer_tokens` of `recomputation.count_kept_layers`; None if all layers recompute.
    """
    recomputed_layer_count = None if recomputes else 0
    if recomputes and kept_layer_tokens is not None:
        layer_count = config.get_text_config().num_hidden_layers
        batch_tokens = (run.spec.training.batch_size_per_device or 1) * longest_tokens
        recomputed_layer_count = layer_count - count_kept_layers(layer_count, batch_tokens, kept_layer_tokens)
    return RunFacts(longest_tokens or None, attention, uses_liger, recomputed_layer_count)


def plan_memory_of_run(run: RunConfig, config: Any, facts: RunFacts, device: str = "") -> MemoryPlan | None:
    """Plan the memory of each rank from the spec and `facts`. Returns None if the plan does not know this kind of run.

    `device`: the name of the GPU. The upper bound of the plan is calibrated for this GPU if its type is known.
    """
    try:
        plan, gpu = plan_memory(run.spec, parse_model_shape(config.to_dict()), facts).memory, find_gpu_type(device)
        return plan if gpu is None else calibrate_memory(plan, gpu, has_several_gpus=run.world.size > 1)
    except ConfigError as error:
        log.info("no memory plan: %s", error.message)
        return None


def plan_work_of_run(
    run: RunConfig, config: Any, counts: Mapping[str, Any], trained_parameters: int | None, recomputed_share: float = 0.0
) -> WorkPlan | None:
    """Plan the work of a run. Returns None if the plan does not know this kind of run, or if the tokens were not counted.

    `counts`: the counts of the data, from `DataFacts.report`. `recomputed_share`: share of the layers that recompute their activations.
    """
    data = data_size(counts)
    if data is None:
        return None
    try:
        return plan_work(run.spec, parse_model_shape(config.to_dict()), data, recomputed_share, trained_parameters or 0)
    except ConfigError as error:
        log.info("no plan of the work: %s", error.message)
        return None


def data_size(counts: Mapping[str, Any]) -> DataSize | None:
    """Return the numbers of training rows and tokens, or None if they were not counted. `counts`: the counts from `DataFacts.report`."""
    rows, tokens = counts.get("rows", {}).get("train"), counts.get("tokens", {}).get("train", {}).get("tokens")
    return DataSize(rows, tokens) if rows and tokens else None


def choose_and_plan(run: RunConfig, config: Any, facts: RunFacts, counts: Mapping[str, Any], trained_parameters: int | None) -> RunPlan:
    """Choose the values that the user has left out, and plan memory and work with them.

    `config`: the model's configuration. `counts`: the counts of the data, from `DataFacts.report`.
    Errors: ConfigError DoesNotFit if the job fits on none of the pools that it may use.
    """
    try:
        resolved_spec = ResolvedSpec(run.spec, {path: run.spec.value(path) for path in run.defaults})
        decision = choose_values(resolved_spec, parse_model_shape(config.to_dict()), run.pools, facts, data_size(counts), trained_parameters or 0)
    except ConfigError as error:
        log.info("the plan chooses no values: %s", error.message)
        memory_plan, work_plan = plan_memory_of_run(run, config, facts), plan_work_of_run(run, config, counts, trained_parameters)
        return RunPlan(memory=memory_plan, work=work_plan, no_choices=error.message)
    if decision.refusal is not None:
        raise decision.refusal
    run_with_chosen_values = run.model_copy(update={"spec": decision.resolved.spec})
    recomputed_share = decision.plan.recomputed_layer_count / max(decision.plan.layer_count, 1)
    work_plan = plan_work_of_run(run_with_chosen_values, config, counts, trained_parameters, recomputed_share=recomputed_share)
    return RunPlan(memory=decision.plan.memory, work=work_plan, choices=list(decision.choices))


def advise_after_out_of_memory(run: RunConfig, config: Any, run_facts: RunFacts, refused_allocation: RefusedAllocation) -> MemoryAdvice:
    """Return what the next attempt should change after torch refused an allocation. Errors: ConfigError if the plan does not know this kind of run."""
    return advise_smaller_values(run.spec, parse_model_shape(config.to_dict()), run_facts, refused_allocation, run.defaults)


def describe_refused_allocation(error: torch.OutOfMemoryError, device: torch.device) -> RefusedAllocation:
    """Return how much GPU memory this process needed when torch refused an allocation, and how much was available to it.

    Memory that other programs use on the GPU is part of neither number.
    """
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    match = REQUESTED_MEMORY_PATTERN.search(str(error))
    requested_bytes = int(float(match.group(1)) * BYTES_BY_UNIT[match.group(2)]) if match is not None else 0
    own_bytes = min(total_bytes - free_bytes, torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES)
    return RefusedAllocation(needed_bytes=own_bytes + requested_bytes, available_bytes=own_bytes + free_bytes)


class MeasuredMemory(TrainerCallback):
    """Reports the peak memory of local rank 0's GPU at each log call, if it is higher than the last reported peak."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel, self._device, self._peak_bytes = channel, device, 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the peak so far, if it is higher than the last reported peak."""
        if self._channel.local_rank != 0:  # The supervisor uses the plan of local rank 0 only.
            return
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        bytes_outside_torch = max(0, total_bytes - free_bytes - torch.cuda.memory_reserved(self._device))
        peak_bytes = torch.cuda.max_memory_reserved(self._device) + bytes_outside_torch
        if peak_bytes > self._peak_bytes:
            self._peak_bytes = peak_bytes
            self._channel.report_plan(RunPlan(measured=MeasuredRun(memory_bytes=peak_bytes)))
