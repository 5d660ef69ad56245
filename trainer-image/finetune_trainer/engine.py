"""Checks for the Trainer of every objective. Each check detects a fault that transformers and TRL would ignore.

`GuardedTrainer` is mixed into TRL's trainers. It connects a trainer to the distributed strategy, and refuses a checkpoint whose weights do not match
the model. `FiniteGuard` ends a run if its loss or gradient norm is not finite.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import ConfigError, DivergedError, NoCheckpointError
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune_trainer.best import copy_to_all_nodes, find_best_folder
from finetune_trainer.checkpoint.background import BackgroundWriter
from finetune_trainer.checkpoint.rates import load_states_keeping_settings
from finetune_trainer.distributed import DistributedStrategy
from finetune_trainer.library_internals import OpenTrainer, tied_weight_names
from finetune_trainer.module_walks import CollectedModel, collected_model
from finetune_trainer.recomputation import RecomputationPerBatch
from finetune_trainer.speed import SpeedMeter

logger = logging.getLogger(__name__)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
QUANTIZATION_KEY_PARTS = (".absmax", ".quant_map", ".quant_state.", ".nested_")
"""Substrings of the keys under which bitsandbytes saves the scales of 4-bit weights.

`check_loaded_keys` accepts keys with these substrings in a checkpoint, because the base model is loaded with its scales.
"""


class GuardedTrainer(OpenTrainer):
    """Mixin for TRL trainers. `distributed.connect_trainer_class` derives a class from a trainer with this mixin, and sets `strategy` in the derived class."""

    strategy: DistributedStrategy
    meter: SpeedMeter | None = None
    lora_plus_ratio: float = 1.0
    """LoRA+: learning rate of the B matrices divided by the learning rate of the A matrices."""
    clock: TrainingClock | None = None
    """Measures the seconds of training. The clock starts with this attempt's first pass over the data."""
    kept_layer_tokens: int | None = None
    """Upper limit of the product of two numbers: the layers that keep their activations, and the tokens of the micro-batch. None: whether a layer
    recomputes its activations does not depend on the micro-batch."""
    checkpoint_writer: BackgroundWriter | None = None
    """Writes checkpoints in the background. None: each checkpoint is written before training continues."""
    _recomputation: RecomputationPerBatch | None = None
    _collected_model: CollectedModel | None = None
    """Lists of the model's modules and parameters, while an epoch runs. None between epochs, and with FSDP and DeepSpeed."""
    _operations_per_value: int | None = None
    """transformers' estimate of the floating-point operations for one token (or another input value) of a micro-batch."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, then apply the strategy's settings that have no field in TrainingArguments."""
        super().create_accelerator_and_postprocess()
        self.strategy.on_accelerator_created(self)

    def run_epoch(self, *args: Any, **options: Any) -> None:
        """Train on one pass over the data, unless the restored checkpoint is that of the last step.

        transformers compares the step with `max_steps` only after it has trained a step. So a run that resumes from its last step would train
        one step too many.
        """
        self._get_running_clock()
        if self._is_complete():
            self.control.should_training_stop = True
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().run_epoch(*args, **options)
        else:
            with collected_model(self.model_wrapped) as self._collected_model:
                super().run_epoch(*args, **options)
            self._collected_model = None
        if self.checkpoint_writer is not None and (self._is_complete() or self.control.should_training_stop):
            self.checkpoint_writer.wait()
            self.accelerator.wait_for_everyone()  # From here on, every rank can read the best weights.

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Decide which layers recompute their activations, and compute the gradients of a micro-batch."""
        if self.kept_layer_tokens is not None:
            if self._recomputation is None:
                self._recomputation = RecomputationPerBatch(self.model, self.kept_layer_tokens)
            self._recomputation.prepare(inputs)
        return super().training_step(model, inputs, *args, **options)

    def clip_gradients(self, model: Any) -> Any:
        """Clip the gradients and return their norm, without a walk over all modules."""
        return super().clip_gradients(model) if self._collected_model is None else self._clip_collected_gradients(self.args.max_grad_norm)

    def gradient_norm(self, model: Any, norm: Any = None) -> Any:
        """Return the gradient norm, without a walk over all modules. `norm`: the gradient norm if clipping has already computed it, else None."""
        if self._collected_model is None or norm is not None:
            return super().gradient_norm(model, norm)
        return self._clip_collected_gradients(math.inf)

    def _clip_collected_gradients(self, max_norm: float) -> Any:
        """Clip the gradients as accelerate does for models that are complete on each rank. Returns the gradient norm."""
        assert self._collected_model is not None
        self.accelerator.unscale_gradients()
        return torch.nn.utils.clip_grad_norm_(self._collected_model.trained_parameters, max_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate of the floating-point operations for a micro-batch. This method counts the model's parameters only once per run."""
        main_input_name = getattr(self.model, "main_input_name", "input_ids")
        if main_input_name not in inputs or self._collected_model is None:
            return int(super().floating_point_ops(inputs))
        value_count = inputs[main_input_name].numel()
        if self._operations_per_value is None and value_count:
            self._operations_per_value = super().floating_point_ops(inputs) // value_count
        return (self._operations_per_value or 0) * value_count

    def _is_complete(self) -> bool:
        callbacks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in callbacks
        )
        return stopped_early or self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, batches: Iterator[Any], *args: Any, **options: Any) -> Any:
        """Fetch the micro-batches of a step, and measure the time spent waiting for them."""
        if self.meter is None:
            return super().get_batch_samples(batches, *args, **options)
        return super().get_batch_samples(_measure_waiting(batches, self.meter), *args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the logged values: the time, the seconds of training over all attempts, the throughput, and the peak GPU memory."""
        logs["unix_time"] = round(time.time(), 3)
        logs["training_seconds"] = self._get_running_clock().read(is_training=self.is_in_train)
        if self.meter is not None and self.model.training and "loss" in logs:
            logs.update(self.meter.read(int(self.state.num_input_tokens_seen)))
            if self.args.device.type == "cuda":
                logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        super().log(logs, start_time)

    def _get_running_clock(self) -> TrainingClock:
        if self.clock is None:
            self.clock = TrainingClock(logged_training_seconds(self.state))
        return self.clock

    def save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Save a checkpoint. The large files of the checkpoint may be written in the background."""
        if self.checkpoint_writer is None:
            super().save_checkpoint(model, trial)
            return
        with self.checkpoint_writer.begin_checkpoint():
            super().save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Do nothing. TRL would write a model card with each checkpoint, but only the final model gets a card (`artefact.card`)."""

    def save_files(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        """Write weights, configuration and tokenizer, without the model card of PEFT."""
        if hasattr(self.model, "peft_config"):
            self.model.create_or_update_model_card = _write_no_card
        super().save_files(output_dir, state_dict)

    def run_after_files(self, task: Callable[[], object]) -> None:
        """Run `task` when all files that were saved before are written.

        If a background writer writes the files, it runs `task` later, in its own thread.
        """
        if self.checkpoint_writer is None:
            task()
        else:
            self.checkpoint_writer.run_after_files(task)

    def load_best_model(self) -> None:
        """Load the best weights from the folder of `best.KeepBest`. Errors: NoCheckpointError BestCheckpointMissing."""
        copy_to_all_nodes(self.args)
        self.state.best_model_checkpoint = str(find_best_folder(self))
        super().load_best_model()

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer. LoRA+ needs its own parameter groups: the A and B matrices have different learning rates."""
        if self.optimizer is None and self.lora_plus_ratio != 1.0:
            from peft.optimizers import create_loraplus_optimizer

            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            learning_rate = options.pop("lr")
            self.optimizer = create_loraplus_optimizer(
                model=self.model, optimizer_cls=optimizer_class, lr=learning_rate, loraplus_lr_ratio=self.lora_plus_ratio,
                loraplus_weight_decay=self.args.weight_decay, **options,
            )  # fmt: skip
            return self.optimizer
        return super().create_optimizer(model)

    def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and scheduler, but keep this attempt's learning rates and other settings."""

        def load() -> None:
            super(GuardedTrainer, self).load_optimizer_and_scheduler(checkpoint)

        load_states_keeping_settings(self.optimizer, self.lr_scheduler, load)

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        """Create the learning-rate schedule. Errors: ConfigError SchedulerParameterInvalid if the schedule rejects a value."""
        try:
            return super().create_scheduler(*args, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "SchedulerParameterInvalid", f"the scheduler rejects training.schedulerParameters: {error}",
                hint="change the parameters, or remove them and write a scheduler without parameters",
            ) from error  # fmt: skip

    def load_checkpoint_weights(self, folder: str, model: Any = None) -> None:
        """Load the weights of a checkpoint. The checkpoint must be an adapter or a model, not both.

        If a folder holds both, transformers loads only model.safetensors, and the adapter's weights are lost.
        Errors: NoCheckpointError CheckpointForeign.
        """
        path = Path(folder)
        if (path / ADAPTER_WEIGHTS).exists() and (path / MODEL_WEIGHTS).exists() and not self.is_fsdp_enabled:
            raise NoCheckpointError(
                "CheckpointForeign", f"{path.name} holds both {ADAPTER_WEIGHTS} and {MODEL_WEIGHTS}, but a checkpoint is either an adapter or a model",
                hint="remove the file that does not belong to the checkpoint",
            )  # fmt: skip
        super().load_checkpoint_weights(folder, model)

    def check_loaded_keys(self, missing_keys: list[str], unexpected_keys: list[str]) -> None:
        """Refuse a checkpoint with missing or unexpected weights. Errors: NoCheckpointError CheckpointForeign."""
        tied_names = tied_weight_names(self.model)
        mismatched_names = [key for key in missing_keys if key not in tied_names]
        mismatched_names += [key for key in unexpected_keys if not any(part in key for part in QUANTIZATION_KEY_PARTS)]
        if mismatched_names:
            raise NoCheckpointError(
                "CheckpointForeign", f"the weights of the checkpoint do not match the weights of this run: {', '.join(mismatched_names[:4])}",
                hint="use the same model, method and target modules as the run that wrote the checkpoint",
            )  # fmt: skip


def _write_no_card(output_dir: str) -> None:
    """Do nothing. This function replaces PEFT's method that writes a model card."""


class TrainingClock:
    """Counts the seconds of training over all attempts of a run. The clock runs from its creation until the end of training."""

    def __init__(self, earlier_seconds: float) -> None:
        """`earlier_seconds`: seconds of training of the earlier attempts."""
        self._seconds_before, self._start_time = earlier_seconds, time.perf_counter()
        self._last_reading = earlier_seconds

    def read(self, *, is_training: bool) -> float:
        """Return the seconds of training until now. After training (`is_training` is false), return the result of the last call."""
        if is_training:
            self._last_reading = round(self._seconds_before + time.perf_counter() - self._start_time, 3)
        return self._last_reading


def logged_training_seconds(state: TrainerState) -> float:
    """Return the seconds of training at the last logged line. 0 for a new run, and for checkpoints of releases that did not log this value."""
    return next((float(line["training_seconds"]) for line in reversed(state.log_history) if "training_seconds" in line), 0.0)


def _measure_waiting(batches: Iterator[Any], meter: SpeedMeter) -> Iterator[Any]:
    """Yield the batches, and add the time spent waiting for each batch to the meter.

    The duration of `get_batch_samples` would be too long: `get_batch_samples` also counts the tokens of all ranks, so it waits for the slowest rank.
    """
    while True:
        wait_start = time.perf_counter()
        batch = next(batches, None)
        meter.waited_seconds += time.perf_counter() - wait_start
        if batch is None:
            return
        yield batch


class FiniteGuard(TrainerCallback):
    """Ends the run if a loss or the gradient norm is not finite, because training cannot recover from such a step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check the logged values. Errors: DivergedError LossNotFinite, GradientNotFinite."""
        for key, code in (
            ("loss", "LossNotFinite"),
            ("eval_loss", "LossNotFinite"),
            ("grad_norm", "GradientNotFinite"),
        ):
            value = (logs or {}).get(key)
            if not isinstance(value, float | int) or math.isfinite(value):
                continue
            if key == "grad_norm" and args.fp16:
                continue  # If the gradients are not finite, fp16's gradient scaler skips the step and lowers its scale.
            raise DivergedError(
                code, f"{key} is {value} at step {state.global_step}",
                hint="lower training.learningRate, raise warmupSteps, or use bf16 instead of fp16",
            )  # fmt: skip


class LogLineWriter(TrainerCallback):
    """Writes one line to the pod's log for each logged step, on rank 0."""

    METRICS = ("loss", "eval_loss", "learning_rate", "grad_norm", "reward", "rewards/accuracies", "tokens_per_second")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        metric_texts = [f"{key} {logs[key]:.4g}" for key in self.METRICS if logs and isinstance(logs.get(key), float | int)]
        if state.is_world_process_zero and metric_texts:
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(metric_texts))


def require_finite_weights(model: Any) -> None:
    """Refuse to publish trained weights that are not finite. Errors: DivergedError WeightsNotFinite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise DivergedError(
                "WeightsNotFinite", f"{name} holds values that are not finite", hint="lower training.learningRate"
            )
