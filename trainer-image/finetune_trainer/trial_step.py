"""Trains one step with a small copy of the model, on the CPU of a preparation: with the model's own classes, the job's method and objective, and a
few real rows.

The step finds two kinds of faults before GPUs are requested: code of the model that does not fit the installed libraries, and an objective that the model's
class refuses. An error is raised only if the copy's size cannot be the cause:

* The model's code cannot be imported, or uses a name that does not exist. If the code comes from the model's repository, an error is also raised for
  a wrong attribute or argument.
* The copy completes a plain forward and backward pass, but fails at the job's step, and a small Llama model completes the job's step.

Every other failure becomes a note. The step runs in a forked process with a time limit and a memory limit, so that it cannot end the preparation.
"""

from __future__ import annotations

import logging
import multiprocessing
import resource
import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from finetune_api import rules
from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source
from finetune_api.spec.enums import GradientCheckpointing, MethodType, TrainerType
from transformers import PrinterCallback

from finetune_trainer import model as models
from finetune_trainer import vocabulary
from finetune_trainer.attention import register, require_supported_attention
from finetune_trainer.distributed import DistributedStrategy
from finetune_trainer.hardware import Hardware
from finetune_trainer.library_internals import connect_backbone, use_one_device
from finetune_trainer.method.base import MethodContext
from finetune_trainer.method.registry import create_method
from finetune_trainer.objective.base import Objective, TrainingContext
from finetune_trainer.small_copy import shrink_config

log = logging.getLogger(__name__)
TIME_LIMIT_SECONDS = 60.0
MEMORY_LIMIT_BYTES = 3 * 2**29
TRIAL_ROW_COUNT, SEARCHED_ROW_COUNT, MAX_TRIAL_ROW_TOKENS = 2, 200, 8192
CODE_FAULT_EXCEPTIONS = (ImportError, SyntaxError, NameError)
"""Exceptions that show a fault in the code of a model, whatever the sizes of the model are."""
REFUSAL_EXCEPTIONS = (TypeError, AttributeError, NotImplementedError, ValueError, KeyError, *CODE_FAULT_EXCEPTIONS)
"""Exceptions with which the class of a model refuses a step."""
BACKEND_MESSAGE = "Could not run"
"""Beginning of torch's message about an operation that has no implementation for the CPU."""


def try_step(context: TrainingContext, objective: Objective[Any, Any], data: Any, config: Any, limit_seconds: float = TIME_LIMIT_SECONDS) -> str | None:
    """Train one step with a small copy of the model. Returns None after a success, and otherwise a note why the step was not possible.

    `config`: the configuration of the model. Errors: ConfigError ModelCodeFails, TrainingStepFails.
    """
    reason = reason_against_trial_step(context)
    if reason is not None:
        return f"the preparation trained no step with a small copy of the model: {reason}"
    outcome = _run_forked(lambda: _try_step(context, objective, data, config), limit_seconds)
    if isinstance(outcome, FineTuneError):
        raise outcome
    return None if outcome is None else f"the preparation trained no step with a small copy of the model: {outcome}"


def reason_against_trial_step(context: TrainingContext) -> str | None:
    """Return why a small copy of the model cannot train the job's step. None if no such reason is known."""
    spec, method_type = context.run.spec, rules.method_type_of(context.run.spec)
    if context.vision is not None:
        return "it is a model for images and text"
    if rules.trainer_type_of(spec) is TrainerType.GRPO:
        return "grpo generates answers and calls rewards"
    if method_type is MethodType.SPECTRUM or context.inputs.adapter is not None:
        return "the method needs the weights of the model"
    has_reference = rules.trainer_type_of(spec) in (TrainerType.DPO, TrainerType.KTO)
    if has_reference and (context.inputs.reference is not None or rules.trains_base_weights(spec)):
        return "the objective needs the weights of a reference model"
    return None


def _run_forked(action: Callable[[], FineTuneError | str | None], limit_seconds: float) -> FineTuneError | str | None:
    """Run an action in a forked process. Returns the result of the action or, if the process sent no result, the reason as a text."""
    fork_context = multiprocessing.get_context("fork")
    receiver, sender = fork_context.Pipe(duplex=False)
    process = fork_context.Process(target=_report_result, args=(action, sender), name="trial-step")
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_seconds):
            return f"it did not end within {limit_seconds:g} seconds"
        action_result: FineTuneError | str | None = receiver.recv()
        return action_result
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _report_result(action: Callable[[], FineTuneError | str | None], sender: Connection) -> None:
    torch.set_num_threads(1)  # the threads of the parent process do not exist in a forked process
    used_bytes = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")).split()[1]) * 1024
    limit_bytes = used_bytes + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    try:
        sender.send(action())
    except Exception as error:
        log.warning("no step was trained with a small copy of the model", exc_info=error)
        sender.send(_first_line(error))


def _try_step(context: TrainingContext, objective: Objective[Any, Any], data: Any, config: Any) -> FineTuneError | str | None:
    """Train one step. Returns None after a success, the error if the model is at fault, or a reason why the step says nothing about the model."""
    short_rows = _select_short_rows(data)
    if short_rows is None:
        return f"the shortest rows have more than {MAX_TRIAL_ROW_TOKENS} tokens"
    small_config, has_own_code = shrink_config(config), bool(getattr(config, "auto_map", None))
    try:
        _run_plain_step(_build_small_copy(context, objective, small_config), short_rows)
    except Exception as error:
        if isinstance(error, CODE_FAULT_EXCEPTIONS) or (has_own_code and isinstance(error, AttributeError | TypeError)):
            return _code_error(context, error)
        log.warning("the small copy cannot be trained", exc_info=error)
        return f"the small copy cannot be trained ({_first_line(error)})"
    try:
        _run_job_step(context, objective, short_rows, _build_small_copy(context, objective, small_config))
    except REFUSAL_EXCEPTIONS as error:
        if isinstance(error, NotImplementedError) and BACKEND_MESSAGE in str(error):
            return _first_line(error)
        if not _works_with_llama(context, objective, short_rows, small_config):
            raise
        return _step_error(context, error, small_config)
    return None


def _select_short_rows(data: Any) -> Any:
    """Return the data with only the `TRIAL_ROW_COUNT` shortest of the first `SEARCHED_ROW_COUNT` training rows. None if these rows have too many tokens."""
    first_rows = data.train.select(range(min(SEARCHED_ROW_COUNT, len(data.train))))
    lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in first_rows.with_format(None)]
    shortest_indices = sorted(sorted(range(len(lengths)), key=lengths.__getitem__)[:TRIAL_ROW_COUNT])
    if sum(lengths[index] for index in shortest_indices) > MAX_TRIAL_ROW_TOKENS:
        return None
    return replace(data, train=first_rows.select(shortest_indices), validation=None, test=None)


def _build_small_copy(context: TrainingContext, objective: Objective[Any, Any], config: Any) -> Any:
    """Build the small copy with random weights, in 32 bits on the CPU."""
    register()
    if objective.model_kind == "reward":
        config.num_labels = 1
    attention, _ = require_supported_attention(context.run, config, "sdpa")
    small_model = models.model_class(context.run, objective.model_kind).from_config(
        config, trust_remote_code=bool(context.run.spec.model.trust_remote_code), attn_implementation=attention, dtype=torch.float32
    )
    connect_backbone(small_model)
    vocabulary.fit_embeddings(small_model, context.tokenizer, context.run)
    return small_model


def _run_plain_step(small_model: Any, data: Any) -> None:
    """Compute a forward and a backward pass on the tokens of a row, without method and objective."""
    row = data.train.with_format(None)[0]
    ids = next(value for name, value in row.items() if name.endswith("ids"))[:32]
    small_model(input_ids=torch.tensor([ids])).logits.float().logsumexp(-1).mean().backward()


def _run_job_step(context: TrainingContext, objective: Objective[Any, Any], data: Any, small_model: Any) -> None:
    """Train one step with the method and the objective of the job."""
    run = make_small_run(context.run)
    hardware = Hardware(
        torch.device("cpu"), "cpu", torch.float32, computes_in_bf16=False, computes_in_fp16=False,
        attention=small_model.config._attn_implementation,
    )
    folder = context.inputs.output_dir.parent / "trial-step"
    inputs = context.inputs.model_copy(update={"output_dir": folder / "output"})
    strategy = DistributedStrategy(run, hardware, 1)
    small_context = replace(context, run=run, inputs=inputs, hardware=hardware, strategy=strategy, callbacks=())
    try:
        args = objective.training_arguments(small_context, has_validation_data=False)
        use_one_device(args)
        new_token_ids = tuple(vocabulary.new_token_ids(context.tokenizer, run.spec.model.new_tokens))
        method = create_method(MethodContext(run, inputs, hardware, strategy, objective.model_kind, new_token_ids=new_token_ids, is_resumed=True))
        trainable = method.make_trainable(small_model)
        with method.trainer_construction(small_model):
            trainer = objective.build_trainer(small_context, args, trainable.model, data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_small_run(run: RunConfig) -> RunConfig:
    """Return the run configuration for a single step on the CPU, without checkpoints, evaluations and GPU options."""
    values_by_path: dict[str, Any] = {
        "training.device": "cpu", "training.mixedPrecision": "no", "training.batchSizePerDevice": TRIAL_ROW_COUNT, "training.gradientAccumulationSteps": 1,
        "training.maxSteps": 1, "training.optimizer": "adamw_torch", "training.earlyStopping": None, "checkpoint.strategy": "no",
        "checkpoint.loadBestAtEnd": False, "evaluation.strategy": "no", "trainer.backend": "transformers", "model.ligerKernels": False,
        "model.quantization": None,
    }  # fmt: skip
    if run.spec.training.gradient_checkpointing is GradientCheckpointing.UNSLOTH:
        values_by_path["training.gradientCheckpointing"] = GradientCheckpointing.ENABLED.value
    return run.model_copy(update={"spec": run.spec.with_values(values_by_path)})


def _works_with_llama(context: TrainingContext, objective: Objective[Any, Any], data: Any, small_config: Any) -> bool:
    """Whether a small Llama model computes the same step. If it does not, this check may be the cause of a failure, instead of the model's class."""
    from transformers import LlamaConfig

    text_config = small_config.get_text_config()
    config = LlamaConfig(
        vocab_size=text_config.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=getattr(text_config, "max_position_embeddings", None) or 2048, pad_token_id=getattr(text_config, "pad_token_id", None),
    )  # fmt: skip
    spec = context.run.spec
    if spec.method.lora is not None:
        spec = spec.with_values({"method.lora.targetModules": ["all-linear"], "method.lora.targetParameters": None, "method.lora.modulesToSave": None})
    llama_context = replace(context, run=context.run.model_copy(update={"spec": spec}))
    try:
        _run_job_step(llama_context, objective, data, _build_small_copy(llama_context, objective, config))
    except Exception as error:
        log.warning("a small Llama model cannot compute the step either", exc_info=error)
        return False
    return True


def _code_error(context: TrainingContext, error: Exception) -> ConfigError:
    source = redact_source(context.run.spec.model.source or "")
    return ConfigError(
        "ModelCodeFails", f"the code of the model {source} fails in a plain forward and backward pass{_format_error_location(error)}: {_first_line(error)}",
        hint=f"give a model whose code fits the libraries of the trainer image, or set placement.image to an image that fits the code{_skip_hint()}",
        failure_class=FailureClass.MODEL,
    )  # fmt: skip


def _step_error(context: TrainingContext, error: Exception, small_config: Any) -> ConfigError:
    spec, model_type = context.run.spec, small_config.model_type
    combination = f"trainer.type {rules.trainer_type_of(spec)} and method.type {rules.method_type_of(spec)}"
    return ConfigError(
        "TrainingStepFails", f"a model of type {model_type} cannot be trained with {combination}: one step with a small copy fails"
        f"{_format_error_location(error)}: {_first_line(error)}. The same step works with a Llama model",
        hint=f"choose another model, trainer.type or method.type{_skip_hint()}", failure_class=FailureClass.MODEL,
    )  # fmt: skip


def _skip_hint() -> str:
    return "; to train without this check, write prepare.strategy: never"


def _format_error_location(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
