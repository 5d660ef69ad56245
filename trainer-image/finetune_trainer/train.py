"""One rank's run, from inputs on local disk to the final artefact: settle, load, tune, verify, train, save."""

from __future__ import annotations

import importlib
import logging
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from finetune_api import rules
from finetune_api.errors import ConfigError, FineTuneError, InternalError, MemoryExhaustedError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source
from finetune_api.spec.enums import LoraInit, OutputKind, TrainerType
from finetune_api.status import Resolved, Stage

from finetune_trainer import imports
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs

MEMORY = re.compile(
    r"(CUDA|HIP|NCCL|Cuda failure).{0,200}out of memory|(CUBLAS|CUSOLVER|CUDNN)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_HOST_ALLOCATION_FAILED)",
    re.IGNORECASE | re.DOTALL,
)
"""How libraries beside torch's own allocator say that a GPU's memory is full."""
FINAL = "final"
"""Folder of the final artefact, below the scratch folder."""
COMBINATIONS = (
    "OptionOfAnotherMethod", "OptionOfAnotherObjective", "LoraInitialisation", "BiasBesideReference", "NewTokensUntrained", "DpoLosses",
    "HalfWeights", "BatchTooSmall", "ObjectiveAndMethod", "RewardIncomplete", "GenerationsDoNotDivide",
)  # fmt: skip
"""Rules of the API that hold here too, whoever made the run's configuration: what would train something else than was asked."""
OBJECTIVES = {
    TrainerType.SFT: "finetune_trainer.objective.sft",
    TrainerType.DPO: "finetune_trainer.objective.dpo",
    TrainerType.GRPO: "finetune_trainer.objective.grpo",
    TrainerType.KTO: "finetune_trainer.objective.kto",
    TrainerType.ORPO: "finetune_trainer.objective.orpo",
    TrainerType.REWARD: "finetune_trainer.objective.reward",
}


def preload(run: RunConfig) -> None:
    """The heavy imports of this run, while the supervisor still downloads."""
    imports.preload(run)
    _objective(run)
    from finetune_trainer import engine, hardware, model  # noqa: F401  each imports what it needs


@runtime_checkable
class NeedsTrainer(Protocol):
    """A callback that needs the Trainer itself, which transformers does not pass to callbacks."""

    def on_trainer_created(self, trainer: Any) -> None:
        """Receive the Trainer, after it is built and before it trains."""


class Hooks(Protocol):
    """What surrounds training: reporting, checkpoints and the hand-over. `finetune_trainer.checkpoint.rank` is the real one."""

    def callbacks(self, run: RunConfig, channel: Channel, inputs: Inputs) -> list[Any]:
        """Callbacks for the Trainer."""

    def resume_path(self, inputs: Inputs) -> Path | None:
        """Checkpoint to go on from."""

    def finish(
        self, run: RunConfig, channel: Channel, model_dir: Path, kind: OutputKind, extra: dict[str, Any]
    ) -> None:
        """The final artefact is complete."""


def main(run: RunConfig, channel: Channel, inputs: Inputs, hooks: Hooks | None = None) -> None:
    """Train and save on this rank. Reports over `channel`; the final artefact is handed over when it is complete on disk.

    Errors: any FineTuneError; what the libraries raise is given a name where it has one (`named`).
    """
    imports.preload(run)
    try:
        Session(run, channel, inputs, hooks or _checkpoints()).go()
    except FineTuneError:
        raise
    except Exception as error:
        raise named(error) from error


class Session:
    """The steps of one rank in order; each leaves what the next one needs."""

    def __init__(self, run: RunConfig, channel: Channel, inputs: Inputs, hooks: Hooks):
        from finetune_trainer import distributed, hardware

        _quiet()
        rules.enforce_rules(rules.without_defaults(run.spec, run.defaults), *COMBINATIONS)
        self.run, self.channel, self.inputs, self.hooks = run, channel, inputs, hooks
        self.objective = _objective(run)
        self.hardware = hardware.detect(run, channel.local_rank)
        self.plan = distributed.choose(run, self.hardware, inputs, channel.world_size)
        self.plan.before()
        self._told: set[str] = set()
        self._tell(*self.hardware.notes)

    def go(self) -> None:
        """The whole run."""
        self.channel.stage(Stage.LOADING)
        trainer, applied = self._build(self.hooks.callbacks(self.run, self.channel, self.inputs))
        resume = self.hooks.resume_path(self.inputs)
        if resume is not None:
            self.channel.stage(Stage.RESTORING)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        measured = self._test(trainer)
        self.channel.stage(Stage.SAVING)
        folder, extra = self._save(trainer, applied)
        if measured:
            extra["evaluation"] = measured
        self.hooks.finish(self.run, self.channel, folder, applied.kind, extra)

    def _test(self, trainer: Any) -> dict[str, float]:
        """The held-out rows, looked at once, with the weights that will be published."""
        from finetune_trainer.objective import held_out

        if self.test is None:
            return {}
        self.channel.stage(Stage.EVALUATING)
        found = held_out.measure(trainer, self.test)
        self._tell(held_out.sentence(found))
        return found

    def _build(self, callbacks: Any) -> tuple[Any, Any]:
        from transformers import PrinterCallback, set_seed

        from finetune_trainer import engine, method, model, vocabulary
        from finetune_trainer.arguments import settle_kernels
        from finetune_trainer.method import loftq, lora, spectrum
        from finetune_trainer.objective.base import Setting

        run, inputs = self.run, self.inputs
        tokenizer, notes = model.load_tokenizer(run, inputs)
        config = model.load_config(run, inputs)
        setting = Setting(
            run, inputs, self.hardware, self.plan, tokenizer, self.channel.work / "tokens", model.positions(config),
            [*self._guards(), *callbacks],
        )  # fmt: skip
        args = self.objective.arguments(setting, evaluates=rules.has_validation_set(run.spec))
        engine.one_device(args)
        self._tell(*settle_kernels(args, run, config.model_type))
        data, self.facts = self.objective.data(setting)
        self.test = data.test
        self._tell(*notes, *self.facts.notes)
        set_seed(args.seed)
        selection = self._preselect()
        setting.unquantized = selection.modules if selection else ()
        base, notes = model.load_model(
            run, inputs, self.hardware, sharded=self.plan.sharded_weights, kind=self.objective.MODEL_KIND,
            skip_quantization=setting.unquantized,
        )  # fmt: skip
        vocabulary.fit(base, tokenizer, run, [data.train, data.validation, data.test])
        applied = method.apply(
            run, inputs, base, keep_dtype=self.plan.keep_adapter_dtype, fsdp=self.plan.name == "fsdp", selection=selection,
            new_ids=vocabulary.new_ids(tokenizer, run.spec.model.new_tokens),
        )  # fmt: skip
        self._tell(*notes, *applied.notes, *self.plan.notes)
        if lora.starts_with(run, LoraInit.LOFTQ) and self.hooks.resume_path(inputs) is None:
            whole, _ = model.load_model(run, inputs, self.hardware, kind=self.objective.MODEL_KIND, quantize=False)
            loftq.start(applied.model, whole)
            self._tell("init loftq: the adapter belongs to the base in 4 bits, as it is quantised here")
            del whole
        autocast = self.hardware.bf16 or self.hardware.fp16
        if autocast and applied.kind is OutputKind.ADAPTER and not self.plan.keep_adapter_dtype:
            method.widen(applied.model)
        keeper = engine.PrecisionKeeper(applied.model) if applied.kind is OutputKind.ADAPTER or selection else None
        with spectrum.trainable_although_quantized(base) if selection else nullcontext():
            trainer = self.objective.build(setting, args, applied.model, data)
        if keeper is not None:
            keeper.restore(trainer.model)
        if self.hardware.fp16 and self.plan.name != "deepspeed":
            method.require_scalable(trainer.model)
        if lora.starts_with(run, LoraInit.EVA) and self.hooks.resume_path(inputs) is None:
            lora.start_eva(trainer)
            set_seed(args.seed)
        for callback in callbacks:
            if isinstance(callback, NeedsTrainer):
                callback.on_trainer_created(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.plus_ratio = (run.spec.method.lora.plus_ratio or 1.0) if run.spec.method.lora else 1.0
        self.trainer, self.applied = trainer, applied
        return trainer, applied

    def _guards(self) -> list[Any]:
        """Callbacks of this run beside those for checkpoints and reporting; they come first."""
        from transformers import EarlyStoppingCallback

        from finetune_trainer.best import KeepBest
        from finetune_trainer.engine import FiniteGuard, LogLine

        found: list[Any] = [self.verifier(), FiniteGuard(), LogLine()]
        if self.run.spec.checkpoint.load_best_at_end:
            found.append(KeepBest(self.hooks.resume_path(self.inputs)))
        stop = self.run.spec.training.early_stopping
        if stop is not None:
            found.append(EarlyStoppingCallback(3 if stop.patience is None else stop.patience, stop.threshold or 0.0))
        return found

    def _preselect(self) -> Any:
        """Spectrum on a quantised base: choose the modules on the whole weights, before they are quantised."""
        from finetune_trainer import model
        from finetune_trainer.hardware import selects_on_quantized
        from finetune_trainer.method import spectrum

        if not selects_on_quantized(self.run):
            return None
        whole, _ = model.load_model(self.run, self.inputs, self.hardware, quantize=False)
        return spectrum.select(self.run, self.inputs, whole)

    def verifier(self) -> Any:
        """A callback that proves, once the model is wrapped, that what was asked is what runs, and reports it."""
        from transformers import TrainerCallback

        session = self

        class Verifier(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                session.verify()

        return Verifier()

    def verify(self) -> None:
        """Errors: InternalError StrategyNotActive, QuantizationNotActive, AttentionSwapped."""
        strategy = self.plan.verify(self.trainer)
        base = (
            self.trainer.model.get_base_model() if hasattr(self.trainer.model, "get_base_model") else self.trainer.model
        )
        attention = base.config._attn_implementation
        if attention != self.hardware.attention:
            raise InternalError(
                "AttentionSwapped", f"attention {self.hardware.attention} was asked for, {attention} is active"
            )
        self._check_quantization(base)
        self._check_kernels(base)
        if getattr(self.trainer.args, "packing", False):
            self.objective.require_isolation(self.trainer)
        args = self.trainer.args
        self.channel.resolved(
            Resolved(
                world_size=self.channel.world_size,
                effective_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * self.channel.world_size,
                strategy=strategy, attention=attention, device=self.hardware.name,
                trainable_parameters=self.applied.trainable, total_parameters=self.applied.total,
                model_revision=self.inputs.model_revision, dataset_digest=self.inputs.dataset_digest,
                dataset_rows=self.facts.rows, dataset_format=self.facts.format.value,
            )
        )  # fmt: skip
        self.channel.stage(Stage.TRAINING)

    def _check_quantization(self, base: Any) -> None:
        from finetune_trainer.model import quantization_config

        asked = quantization_config(self.run, self.hardware)
        if asked is None:
            return
        # The module holds the state even where FSDP has put a slice in the weight's place.
        four = asked.load_in_4bit
        layers = [one for one in base.modules() if type(one).__name__ == ("Linear4bit" if four else "Linear8bitLt")]
        if not any(
            getattr(one, "quant_state", None) is not None if four else one.weight.element_size() == 1 for one in layers
        ):
            bits = 4 if asked.load_in_4bit else 8
            raise InternalError("QuantizationNotActive", f"{bits}-bit weights were asked for, and none were found")

    def _check_kernels(self, base: Any) -> None:
        """Errors: InternalError KernelsNotActive. The library passes over models that it does not know without a word."""
        if not self.trainer.args.use_liger_kernel:
            return
        forwards = (getattr(module.forward, "__module__", "") for module in base.modules())
        if not any(name.startswith("liger_kernel") for name in forwards):
            raise InternalError(
                "KernelsNotActive", f"liger kernels were asked for, and no layer of {type(base).__name__} has one",
                hint="set model.ligerKernels: false",
            )  # fmt: skip

    def _save(self, trainer: Any, applied: Any) -> tuple[Path, dict[str, Any]]:
        """The final artefact as a plain folder that transformers or PEFT load. All ranks take part, rank 0 writes."""
        from finetune_trainer.engine import require_finite

        require_finite(trainer.model)
        folder = self.inputs.output_dir / FINAL
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            if applied.initial_adapter is not None:
                trainer.model.save_pretrained(
                    folder, path_initial_model_for_weight_conversion=str(applied.initial_adapter)
                )
            # Preference trainers keep the adapter's start under this name, and every way of saving writes it.
            shutil.rmtree(folder / "ref", ignore_errors=True)
            for name, text in applied.extra_files.items():
                (folder / name).write_text(text)
            for stray in ("training_args.bin", "README.md"):
                (folder / stray).unlink(missing_ok=True)
            _portable(folder, self.run)
        trainer.accelerator.wait_for_everyone()
        return folder, {"data": self.facts.report, "notes": sorted(self._told)}

    def _tell(self, *notes: str) -> None:
        """Say each note once, from rank 0."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                if self.channel.rank == 0:
                    self.channel.note(note)


def _checkpoints() -> Hooks:
    from finetune_trainer.checkpoint import rank

    return rank  # type: ignore[return-value]  # a module with these three functions


def _objective(run: RunConfig) -> ModuleType:
    kind = run.spec.trainer.type or TrainerType.SFT
    try:
        return importlib.import_module(OBJECTIVES[kind])
    except ModuleNotFoundError as error:
        if error.name != OBJECTIVES[kind]:
            raise
        raise ConfigError(
            "NotSupportedYet", f"trainer.type {kind} cannot be trained by this version", hint="write sft"
        ) from None


def _portable(folder: Path, run: RunConfig) -> None:
    """An adapter names its base by its source, not by a path on this pod's disk."""
    import json

    config = folder / "adapter_config.json"
    if config.exists():
        value = json.loads(config.read_text())
        value["base_model_name_or_path"] = redact_source(run.spec.model.source or "").removeprefix("hf://")
        config.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def named(error: Exception) -> FineTuneError:
    """A library's exception under a name of ours: GPU memory, peers, anything else with its first line."""
    import torch

    text = str(error).strip().split("\n")[0][:500]
    if isinstance(error, torch.OutOfMemoryError) or MEMORY.search(str(error)):
        return MemoryExhaustedError(
            "GpuOutOfMemory", text, hint="lower training.batchSizePerDevice, raise gradientAccumulationSteps, or enable gradientCheckpointing"
        )  # fmt: skip
    return InternalError(type(error).__name__, text or type(error).__name__)


def _quiet() -> None:
    """No progress bars: a pod's log is read line by line."""
    import datasets
    from transformers.utils import logging as hf_logging

    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
