"""What every objective's Trainer does beside training: guards against runs that go wrong without an error.

`Guarded` is mixed into TRL's trainers. It connects the strategy, refuses half-loaded checkpoints, and gives adapters their
precision back. `FiniteGuard` ends a run whose loss is no number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import ConfigError, DivergedError, NoCheckpointError
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune_trainer.best import best_folder, share
from finetune_trainer.checkpoint.rates import keep_settings
from finetune_trainer.distributed import Plan
from finetune_trainer.speed import Meter

logger = logging.getLogger(__name__)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
QUANTIZATION_STATE = (".absmax", ".quant_map", ".quant_state.", ".nested_")
"""Parts of the names under which bitsandbytes stores how a frozen 4-bit weight is read: the model has them already."""


class Guarded(Trainer):
    """Mixed in before a TRL trainer. Set `plan` on the class made by `guarded` before building it."""

    plan: Plan
    meter: Meter | None = None
    plus_ratio: float = 1.0
    """LoRA+: learning rate of the B matrices over that of the A matrices."""

    def create_accelerator_and_postprocess(self) -> None:
        """Let the strategy finish what TrainingArguments cannot say."""
        super().create_accelerator_and_postprocess()
        self.plan.after_accelerator(self)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """One pass over the data, unless the attempt before has done the last step and was lost before it could say so.

        transformers looks whether training is over after a step only: a run resumed from its last checkpoint would learn too much.
        """
        if self._is_over():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _is_over(self) -> bool:
        patience = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in patience)
        return stopped or self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, batches: Iterator[Any], *args: Any, **options: Any) -> Any:
        """Count the time spent waiting for data."""
        if self.meter is None:
            return super().get_batch_samples(batches, *args, **options)
        return super().get_batch_samples(self._timed(batches), *args, **options)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches. What follows them is no waiting for data: counting their tokens over all ranks waits for the slowest."""
        assert self.meter is not None, "the caller looks"
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.meter.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the paces since the last line, and the most memory in use."""
        if self.meter is not None and self.model.training and "loss" in logs:
            logs.update(self.meter.read(int(self.state.num_input_tokens_seen)))
            if self.args.device.type == "cuda":
                logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        super().log(logs, start_time)

    def _load_best_model(self) -> None:
        """Load the best weights from where they are kept. Errors: NoCheckpointError BestCheckpointMissing."""
        share(self.args)
        self.state.best_model_checkpoint = str(best_folder(self))
        super()._load_best_model()

    def create_optimizer(self, model: Any = None) -> Any:
        """LoRA+ has its own parameter groups."""
        if self.optimizer is None and self.plus_ratio != 1.0:
            from peft.optimizers import create_loraplus_optimizer

            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            learning_rate = options.pop("lr")
            self.optimizer = create_loraplus_optimizer(
                model=self.model, optimizer_cls=kind, lr=learning_rate, loraplus_lr_ratio=self.plus_ratio,
                loraplus_weight_decay=self.args.weight_decay, **options,
            )  # fmt: skip
            return self.optimizer
        return super().create_optimizer(model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their states from the checkpoint; rates and other settings stay this attempt's own."""

        def load() -> None:
            super(Guarded, self)._load_optimizer_and_scheduler(checkpoint)

        keep_settings(self.optimizer, self.lr_scheduler, load)

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        """Errors: ConfigError SchedulerParameterInvalid, for values that the schedule cannot be made of."""
        try:
            return super().create_scheduler(*args, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                "SchedulerParameterInvalid", f"training.schedulerParameters make no schedule: {error}",
                hint="change them, or leave them out with a scheduler that needs none",
            ) from error  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, all of them, and only those of the kind that is trained.

        transformers looks for model.safetensors first: a stray one beside an adapter makes it leave the adapter as it is.
        Errors: NoCheckpointError CheckpointForeign.
        """
        folder = Path(resume_from_checkpoint)
        if (folder / ADAPTER_WEIGHTS).exists() and (folder / MODEL_WEIGHTS).exists() and not self.is_fsdp_enabled:
            raise NoCheckpointError(
                "CheckpointForeign", f"{folder.name} holds both {ADAPTER_WEIGHTS} and {MODEL_WEIGHTS}: it is not one checkpoint",
                hint="remove the file that does not belong there",
            )  # fmt: skip
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Missing or unexpected weights are an error, where transformers warns."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        unexpected = [key for key in load_result.unexpected_keys if not any(part in key for part in QUANTIZATION_STATE)]
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected][:4])
            raise NoCheckpointError(
                "CheckpointForeign", f"the checkpoint has other weights than this run trains: {names}",
                hint="resume with the method, targets and model that it was made with",
            )  # fmt: skip


class FiniteGuard(TrainerCallback):
    """Ends the run when loss or gradient norm is no finite number: such weights never recover by themselves."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Errors: DivergedError LossNotFinite, GradientNotFinite."""
        for key, code in (
            ("loss", "LossNotFinite"),
            ("eval_loss", "LossNotFinite"),
            ("grad_norm", "GradientNotFinite"),
        ):
            value = (logs or {}).get(key)
            if not isinstance(value, float | int) or math.isfinite(value):
                continue
            if key == "grad_norm" and args.fp16:
                continue  # the gradient scaler skips such a step and lowers its scale
            raise DivergedError(
                code, f"{key} is {value} at step {state.global_step}",
                hint="lower training.learningRate, raise warmupSteps, or use bf16 instead of fp16",
            )  # fmt: skip


class LogLine(TrainerCallback):
    """One line of a pod's log per logged step, from rank 0: what a person wants to see passing by."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Say it."""
        shown = ("loss", "eval_loss", "learning_rate", "grad_norm", "reward", "rewards/accuracies", "tokens_per_second")
        values = [f"{key} {logs[key]:.4g}" for key in shown if logs and isinstance(logs.get(key), float | int)]
        if state.is_world_process_zero and values:
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(values))


class PrecisionKeeper:
    """Remembers the trainable weights of an adapter across a Trainer's construction.

    TRL turns the adapter of a quantised base into bf16 when it is built. Updates smaller than bf16's steps are lost then, so
    the weights go back to what PEFT made them, in full precision.
    """

    def __init__(self, model: Any):
        self._before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: Any) -> None:
        """Put the remembered weights back."""
        for name, parameter in model.named_parameters():
            before = self._before.get(name)
            if before is not None and parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)


def one_device(args: TrainingArguments) -> None:
    """A rank has one device. transformers would spread it over all that it sees, as on a workstation, and TRL refuses that."""
    args._n_gpu = min(args.n_gpu, 1)


def require_finite(model: Any) -> None:
    """Refuse to publish weights that are no numbers. Errors: DivergedError WeightsNotFinite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise DivergedError(
                "WeightsNotFinite",
                f"{name} holds values that are no finite numbers",
                hint="lower training.learningRate",
            )
