"""Runs one rank: loads the inputs from the local disk, applies the method, verifies the run, trains, and saves the final artefact."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from finetune_api import rules
from finetune_api.errors import FineTuneError, InternalError, MemoryExhaustedError
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source
from finetune_api.spec.enums import OutputKind
from finetune_api.status import ResolvedConfig, RunPlan, Stage

from finetune_trainer import imports
from finetune_trainer.channel import Channel
from finetune_trainer.files import replace_file
from finetune_trainer.inputs import Inputs
from finetune_trainer.objective import load_objective, objective_module

if TYPE_CHECKING:
    from finetune_api.memory.description import RunFacts

    from finetune_trainer.method.base import MethodContext, TrainableModel
    from finetune_trainer.objective.base import TrainingContext

OUT_OF_GPU_MEMORY_PATTERN = re.compile(
    r"(CUDA|HIP|NCCL|Cuda failure).{0,200}out of memory|(CUBLAS|CUSOLVER|CUDNN)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_HOST_ALLOCATION_FAILED)",
    re.IGNORECASE | re.DOTALL,
)
"""Matches out-of-memory messages of libraries that allocate GPU memory without torch. In these cases, torch raises no `torch.OutOfMemoryError`."""
CHECKPOINT_AFTER_FAILURE_SECONDS = 60.0
"""How long a rank whose training has failed waits for the checkpoint that is being written in the background."""
FINAL_FOLDER = "final"
"""Folder of the final artefact in the Trainer's output folder."""
RULES_CHECKED_AGAIN = (
    "OptionOfAnotherMethod", "OptionOfAnotherObjective", "LoraInitialisation", "BiasBesideReference", "NewTokensUntrained", "DpoLosses",
    "HalfWeights", "BatchTooSmall", "ObjectiveAndMethod", "RewardIncomplete", "GenerationsDoNotDivide",
    "GenerationServerUnsupported",
)  # fmt: skip
"""Rules of the API that each rank checks again, because run.json may come from an older operator that lacks a rule, or from a test.

If a spec violated one of these rules, the run would silently differ from the spec.
"""


def preload(run: RunConfig) -> None:
    """Import the large libraries that this run needs. `rank` calls this function while the supervisor downloads the inputs."""
    imports.preload(run, objective_module(rules.trainer_type_of(run.spec)))
    from finetune_trainer import attention, engine, hardware, model  # noqa: F401  each imports the libraries that it needs


@runtime_checkable
class NeedsTrainer(Protocol):
    """A callback that needs the Trainer object, which transformers does not pass to callbacks."""

    def on_trainer_created(self, trainer: Any) -> None:
        """This method is called with the Trainer before training begins."""


class TrainingHooks(Protocol):
    """The functions through which a training session reports, saves and restores checkpoints, and delivers the final artefact.

    `finetune_trainer.checkpoint.rank` implements these functions; tests have their own implementations.
    """

    def create_callbacks(self, run: RunConfig, channel: Channel, inputs: Inputs) -> list[Any]:
        """Return the callbacks for the Trainer."""

    def get_resume_folder(self, inputs: Inputs) -> Path | None:
        """Return the folder of the checkpoint to resume from, or None for a new run."""

    def report_final_artefact(
        self, run: RunConfig, channel: Channel, model_dir: Path, kind: OutputKind, manifest_extra: dict[str, Any]
    ) -> None:
        """Hand the final artefact in the folder `model_dir` to the supervisor, which uploads it.

        `manifest_extra`: the fields of `extra` in the model's manifest.
        """


def main(run: RunConfig, channel: Channel, inputs: Inputs, hooks: TrainingHooks | None = None) -> None:
    """Train and save on this rank, report over `channel`, and deliver the final artefact.

    Errors: FineTuneError; exceptions of libraries are converted by `to_finetune_error`.
    """
    imports.preload(run, objective_module(rules.trainer_type_of(run.spec)))
    try:
        TrainingSession(run, channel, inputs, hooks or _load_checkpoint_hooks()).execute()
    except FineTuneError:
        raise
    except Exception as error:
        raise to_finetune_error(error) from error


class TrainingSession:
    """The training run of one rank. `execute` does everything from loading the model to delivering the final artefact."""

    def __init__(self, run: RunConfig, channel: Channel, inputs: Inputs, hooks: TrainingHooks):
        from finetune_trainer import distributed, hardware

        _disable_progress_bars()
        rules.enforce_rules(rules.remove_defaults(run.spec, run.defaults), *RULES_CHECKED_AGAIN)
        self.run, self.channel, self.inputs, self.hooks = run, channel, inputs, hooks
        self.objective = load_objective(rules.trainer_type_of(run.spec))
        self.hardware = hardware.detect_hardware(run, channel.local_rank)
        self.strategy = distributed.choose_strategy(run, self.hardware, inputs, channel.world_size)
        self.strategy.prepare_process()
        self.resume_folder = hooks.get_resume_folder(inputs)
        self._emitted_notes: set[str] = set()
        self.memory_facts: RunFacts | None = None
        """The facts about this run from which the memory plan is computed. None before the first step."""

    def execute(self) -> None:
        """Train, evaluate the test set, and save and deliver the final artefact."""
        self.channel.report_stage(Stage.LOADING)
        trainer, trainable_model = self._build_trainer(self.hooks.create_callbacks(self.run, self.channel, self.inputs))
        if self.resume_folder is not None:
            self.channel.report_stage(Stage.RESTORING)
        with _finish_checkpoint_after_failure(trainer), self._advice_after_out_of_memory():
            trainer.train(resume_from_checkpoint=str(self.resume_folder) if self.resume_folder else None)
        test_metrics = self._evaluate_test_set(trainer)
        self.channel.report_stage(Stage.SAVING)
        folder, extra = self._save_output(trainer, trainable_model)
        if trainer.is_world_process_zero():
            self._write_settings_and_card(folder, test_metrics)
        extra |= self._write_reference_values(trainer)
        if test_metrics:
            extra["evaluation"] = test_metrics
        self.hooks.report_final_artefact(self.run, self.channel, folder, trainable_model.output_kind, extra)

    @contextmanager
    def _advice_after_out_of_memory(self) -> Iterator[None]:
        """If the GPU's memory is exhausted in a training step, report what the next attempt should change.

        If the memory is exhausted in an evaluation, nothing is reported, because the memory plan does not cover evaluations.
        """
        import torch

        from finetune_trainer.memory_plan import advise_after_out_of_memory, describe_refused_allocation

        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.memory_facts is not None and self.hardware.device.type == "cuda" and self.trainer.model.training:
                with suppress(Exception):  # without advice, the operator halves the micro-batch
                    advice = advise_after_out_of_memory(self.run, self.config, self.memory_facts, describe_refused_allocation(error, self.hardware.device))
                    self.channel.report_out_of_memory(advice)
            raise

    def _build_trainer(self, callbacks: list[Any]) -> tuple[Any, TrainableModel]:
        """Build arguments, data, base model, method and Trainer, in this order. Returns the Trainer and its model.

        The order must not change: everything that is built after `set_seed` consumes random numbers, so another order would change the results of a run.
        """
        from transformers import PrinterCallback, set_seed

        from finetune_trainer import distributed, model, vocabulary
        from finetune_trainer.data.prepare import late_defaults
        from finetune_trainer.method.registry import create_method

        tokenizer, notes = model.load_tokenizer(self.run, self.inputs)
        context, args = self._choose_arguments(tokenizer, [*self._create_own_callbacks(), *callbacks])
        splits, self.facts = self.objective.load_data(context)
        self.late_defaults = late_defaults(self.run, tokenizer, context.max_positions)
        self.training_rows, self.test_rows, self.datasets = splits.train, splits.test, (splits.test, splits.validation, splits.train)
        if splits.test is not None:
            with distributed.local_rank_0_first():
                if self.channel.rank == 0:
                    self._write_test_split()
        self._emit_notes(*notes, *self.facts.notes)
        kept_layer_tokens = self._choose_checkpointing(args)
        set_seed(args.seed)
        method = create_method(self._build_method_context(tokenizer))
        context.unquantized = method.before_load()
        with self._shared_weights() as (context.inputs, sharing_notes):
            base_model, notes = model.load_model(
                self.run, context.inputs, self.hardware, is_sharded=self.strategy.shards_weights, model_kind=self.objective.model_kind,
                skip_quantization=context.unquantized,
            )  # fmt: skip
            vocabulary.fit_embeddings(base_model, tokenizer, self.run, [splits.train, splits.validation, splits.test])
            trainable_model = method.make_trainable(base_model)
            self._emit_notes(*notes, *sharing_notes, *trainable_model.notes, *self.strategy.notes)
            with method.trainer_construction(base_model):  # Building dpo's Trainer also loads the reference model.
                trainer = self.objective.build_trainer(context, args, trainable_model.model, splits)
        context.inputs = self.inputs
        trainer.kept_layer_tokens = kept_layer_tokens
        method.on_trainer_created(trainer)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, NeedsTrainer):
                callback.on_trainer_created(trainer)
        trainer.remove_callback(PrinterCallback)
        self.trainer, self.trainable = trainer, trainable_model
        return trainer, trainable_model

    @contextmanager
    def _shared_weights(self) -> Iterator[tuple[Inputs, list[str]]]:
        """Yield the inputs with the folder to load the model from, and notes for the status.

        With FSDP, one rank of each pod first converts 16-bit weights to 32 bits for all ranks of the pod, if the ranks load the model in 32 bits.
        """
        import torch

        from finetune_trainer.distributed import local_rank_0_first
        from finetune_trainer.shared_weights import float32_weights
        from finetune_trainer.verification.weight_files import has_16_bit_weights

        is_needed = (
            self.strategy.name == "fsdp" and self.channel.world_size > 1 and self.hardware.dtype is torch.float32 and rules.base_bits(self.run.spec) is None
            and getattr(self.config, "quantization_config", None) is None and has_16_bit_weights(self.inputs.model)
        )  # fmt: skip
        if not is_needed:
            yield self.inputs, []
            return
        with float32_weights(
            self.inputs.model, self.channel.work_folder, converts=self.channel.local_rank == 0, local_rank_0_first=local_rank_0_first(),
            wait_for_ranks=torch.distributed.barrier,
        ) as (folder, notes):  # fmt: skip
            yield self.inputs.model_copy(update={"model": folder}), notes

    def _choose_arguments(self, tokenizer: Any, callbacks: list[Any]) -> tuple[TrainingContext, Any]:
        """Choose the model's attention implementation, and create the objective's context and TrainingArguments."""
        from finetune_trainer import model
        from finetune_trainer.attention import choose_attention
        from finetune_trainer.kernels import choose_kernels
        from finetune_trainer.library_internals import use_one_device
        from finetune_trainer.objective.base import TrainingContext

        self.config = config = model.load_config(self.run, self.inputs)
        attention, notes = choose_attention(self.run, self.hardware, config, self.inputs.adapter)
        self.hardware = self.strategy.hardware = replace(self.hardware, attention=attention)
        self._emit_notes(*notes)
        context = TrainingContext(
            self.run, self.inputs, self.hardware, self.strategy, tokenizer, self.channel.work_folder / "tokens", model.max_positions(config), callbacks,
            vision=model.load_processor(self.run, self.inputs, config, tokenizer),
        )  # fmt: skip
        self.vision = context.vision
        args = self.objective.training_arguments(context, has_validation_data=rules.has_validation_set(self.run.spec))
        use_one_device(args)
        self._emit_notes(*choose_kernels(args, self.run, self.hardware, config, self.objective.model_kind))
        return context, args

    def _choose_checkpointing(self, args: Any) -> int | None:
        """Turn off gradient checkpointing if the spec leaves this choice to the trainer and all activations fit into the GPU's memory.

        If only some activations fit, return the largest product of layers and tokens whose activations fit. In all other cases, return None.
        """
        import torch

        from finetune_trainer.activation_memory import choose_kept_activations

        if self.hardware.device.type != "cuda" or not self.facts.longest_sequence:
            return None
        choice = choose_kept_activations(
            self.run, self.hardware, self.strategy.name, self.config,
            batch_tokens=args.per_device_train_batch_size * self.facts.longest_sequence // self.strategy.context_parallel_size,
            gpu_bytes=torch.cuda.get_device_properties(self.hardware.device).total_memory, uses_liger=args.use_liger_kernel,
        )  # fmt: skip
        if choice is None:
            return None
        self._emit_notes(choice.note)
        if choice.kept_layer_tokens is None:
            args.activation_checkpointing = args.gradient_checkpointing = False
        return choice.kept_layer_tokens

    def _build_method_context(self, tokenizer: Any) -> MethodContext:
        from finetune_trainer import vocabulary
        from finetune_trainer.method.base import MethodContext

        return MethodContext(
            self.run, self.inputs, self.hardware, self.strategy, self.objective.model_kind,
            new_token_ids=tuple(vocabulary.new_token_ids(tokenizer, self.run.spec.model.new_tokens)),
            is_resumed=self.resume_folder is not None,
        )  # fmt: skip

    def _create_own_callbacks(self) -> list[Any]:
        """Return the callbacks that run before the callbacks for checkpoints and reporting."""
        from transformers import EarlyStoppingCallback

        from finetune_trainer.best import KeepBest
        from finetune_trainer.engine import FiniteGuard, LogLineWriter
        from finetune_trainer.memory_plan import MeasuredMemory

        callbacks: list[Any] = [self._create_verifier(), FiniteGuard(), LogLineWriter()]
        if self.hardware.device.type == "cuda":
            callbacks.append(MeasuredMemory(self.channel, self.hardware.device))
        if self.run.spec.checkpoint.load_best_at_end:
            callbacks.append(KeepBest(self.resume_folder))
        early_stopping = self.run.spec.training.early_stopping
        if early_stopping is not None:
            callbacks.append(
                EarlyStoppingCallback(3 if early_stopping.patience is None else early_stopping.patience, early_stopping.threshold or 0.0)
            )
        return callbacks

    def _create_verifier(self) -> Any:
        """Return a callback that verifies the run before the first step, after the Trainer has wrapped the model."""
        from transformers import TrainerCallback

        session = self

        class Verifier(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                session.verify()

        return Verifier()

    def verify(self) -> None:
        """Check that the requested features are active, and report the effective configuration.

        Errors: InternalError StrategyNotActive, AttentionSwapped, QuantizationNotActive, KernelsNotActive, PackingLeaks.
        """
        from finetune_trainer import active_features

        trainer, args = self.trainer, self.trainer.args
        active_strategy = self.strategy.verify_active(trainer)
        base_model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        attention = active_features.require_attention(base_model, self.hardware)
        active_features.require_quantization(base_model, self.run, self.hardware)
        if args.use_liger_kernel:
            self._emit_notes(*active_features.verify_kernels(base_model, self.run))
        self.objective.verify_trainer(trainer)
        self.channel.report_resolved(
            ResolvedConfig(
                world_size=self.channel.world_size,
                effective_batch=args.per_device_train_batch_size * args.gradient_accumulation_steps * self.strategy.data_parallel_size,
                strategy=active_strategy, attention=attention, device=self.hardware.name,
                trainable_parameters=self.trainable.trainable_count, total_parameters=self.trainable.total_count,
                model_revision=self.inputs.model_revision, dataset_digest=self.inputs.dataset_digest,
                dataset_rows=self.facts.rows, dataset_format=self.facts.format.value, defaults=self.late_defaults or None,
            )
        )  # fmt: skip
        self._report_memory_plan()
        self.channel.report_stage(Stage.TRAINING)

    def _report_memory_plan(self) -> None:
        """Report the planned memory and work of this rank, if the plan knows this kind of run."""
        from finetune_trainer.memory_plan import collect_memory_facts, plan_memory_of_run, plan_work_of_run

        args, trainer = self.trainer.args, self.trainer
        self.memory_facts = collect_memory_facts(
            self.run, self.config, attention=self.hardware.attention, longest_tokens=self.facts.longest_sequence, uses_liger=args.use_liger_kernel,
            recomputes=args.activation_checkpointing, kept_layer_tokens=trainer.kept_layer_tokens,
        )  # fmt: skip
        memory_plan = plan_memory_of_run(self.run, self.config, self.memory_facts, self.hardware.name)
        work_plan = plan_work_of_run(self.run, self.config, self.facts.report, self.trainable.trainable_count)
        if memory_plan is not None or work_plan is not None:
            self.channel.report_plan(RunPlan(memory=memory_plan, work=work_plan))

    def _evaluate_test_set(self, trainer: Any) -> dict[str, float]:
        """Evaluate the test set on the final weights. Returns the metrics of the test set; an empty dictionary without a test set."""
        from finetune_trainer.objective import held_out

        if self.test_rows is None:
            return {}
        self.channel.report_stage(Stage.EVALUATING)
        metrics = held_out.measure_test_set(trainer, self.test_rows, self.objective.held_out_metrics)
        self._emit_notes(held_out.format_note(metrics, self.objective.held_out_metrics))
        return metrics

    def _write_test_split(self) -> None:
        """Write the raw rows of the test set to the output folder.

        The data files are read again, because the stored rows contain only tokens.
        """
        from finetune_trainer.data import load
        from finetune_trainer.results.file_names import ResultFile
        from finetune_trainer.results.test_split import jsonl_lines

        with replace_file(self.inputs.output_dir / ResultFile.TEST_SPLIT) as partial_file, partial_file.open("w", encoding="utf-8") as file:
            file.writelines(jsonl_lines(row for row, _ in load(self.run, self.inputs, training_rows=0).test))

    def _save_output(self, trainer: Any, trainable_model: TrainableModel) -> tuple[Path, dict[str, Any]]:
        """Write the final artefact as a folder for transformers or PEFT. All ranks must call this function; rank 0 writes."""
        from finetune_trainer.engine import require_finite_weights

        require_finite_weights(trainer.model)
        folder = self.inputs.output_dir / FINAL_FOLDER
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            if trainable_model.initial_adapter is not None:
                trainer.model.save_pretrained(
                    folder, path_initial_model_for_weight_conversion=str(trainable_model.initial_adapter)
                )
            # TRL's preference trainers keep a frozen copy of the adapter under the name `ref`, and PEFT saves every adapter.
            shutil.rmtree(folder / "ref", ignore_errors=True)
            for name, text in trainable_model.extra_files.items():
                (folder / name).write_text(text)
            (folder / "training_args.bin").unlink(missing_ok=True)
            _name_base_by_source(folder, self.run)
            self._write_log(trainer)
        trainer.accelerator.wait_for_everyone()
        parameter_counts = {"trainable": trainable_model.trainable_count, "total": trainable_model.total_count}
        return folder, {"data": self.facts.report, "notes": sorted(self._emitted_notes), "parameters": parameter_counts}

    def _write_settings_and_card(self, folder: Path, test_metrics: dict[str, float]) -> None:
        """Write the generation settings with the trained end tokens, and the model card. Only rank 0 calls this function."""
        from finetune_trainer.artefact.card import CARD_FILE, TrainingFacts, build_model_card
        from finetune_trainer.artefact.end_tokens import find_trained_end_tokens, read_trained_answers
        from finetune_trainer.artefact.generation import copy_processor_files, write_generation_files

        tokenizer, state = self.trainer.processing_class, self.trainer.state
        if self.objective.model_kind == "causal":
            end_ids = find_trained_end_tokens(tokenizer, read_trained_answers(self.training_rows))
            write_generation_files(folder, self.inputs.model, self.config, tokenizer, end_ids)
        if self.vision is not None:
            copy_processor_files(self.inputs.model, folder)
        last_losses = {name: line[name] for line in state.log_history for name in ("loss", "eval_loss") if name in line}
        card_metrics = {"last training loss": last_losses.get("loss"), "last validation loss": last_losses.get("eval_loss"), **test_metrics}
        card_facts = TrainingFacts(
            self.facts.rows, self.facts.format.value, state.global_step, self.trainable.trainable_count, self.trainable.total_count,
            {name: value for name, value in card_metrics.items() if value is not None},
        )  # fmt: skip
        (folder / CARD_FILE).write_text(build_model_card(self.run, self.inputs, self.trainable.output_kind, card_facts), encoding="utf-8")

    def _write_reference_values(self, trainer: Any) -> dict[str, str]:
        """Write the reference values, which the stage `verifying` compares with the values of the stored model.

        This function is called after all weights are saved. With sharded weights, all ranks compute the values together. Returns the sha256 of the
        file, as an entry for the model's manifest.
        """
        from finetune_trainer.verification import record, reference

        if self.run.spec.output.verify is False or not (self.channel.rank == 0 or self.strategy.shards_weights):
            return {}
        tokenizer = trainer.processing_class
        rows = record.choose_rows(self.datasets, tokenizer)
        reference_values = record.record_reference_values(
            trainer, self.run, self.hardware, rows, tokenizer, head=self.objective.model_kind, is_sharded=self.strategy.shards_weights,
            vision=self.vision,
        )  # fmt: skip
        content = reference_values.to_bytes()
        if self.channel.rank == 0:
            with replace_file(self.inputs.output_dir / reference.FILE_NAME) as partial_file:
                partial_file.write_bytes(content)
        return {reference.MANIFEST_KEY: hashlib.sha256(content).hexdigest()}

    def _write_log(self, trainer: Any) -> None:
        """Write all log entries of the run, also those of earlier attempts, to the output folder.

        The supervisor may upload the file at any time, because it stores the result files before each commit.
        """
        from finetune_trainer.results.file_names import ResultFile
        from finetune_trainer.results.log_entry import LogEntry, log_to_jsonl

        entries = [LogEntry.model_validate(line) for line in trainer.state.log_history]
        with replace_file(self.inputs.output_dir / ResultFile.LOG) as partial_file:
            partial_file.write_text(log_to_jsonl(entries), encoding="utf-8")

    def _emit_notes(self, *notes: str) -> None:
        """Report each note for the status once, from rank 0."""
        for note in notes:
            if note not in self._emitted_notes:
                self._emitted_notes.add(note)
                if self.channel.rank == 0:
                    self.channel.report_note(note)


def _load_checkpoint_hooks() -> TrainingHooks:
    from finetune_trainer.checkpoint import rank

    return rank  # type: ignore[return-value]  # the module has the functions of TrainingHooks


@contextmanager
def _finish_checkpoint_after_failure(trainer: Any) -> Iterator[None]:
    """If training fails, let the background writer complete its checkpoint, because the steps up to the checkpoint were correct.

    An error of the writer does not replace the error of training.
    """
    try:
        yield
    except Exception:
        if trainer.checkpoint_writer is not None:
            with suppress(Exception):
                trainer.checkpoint_writer.wait(CHECKPOINT_AFTER_FAILURE_SECONDS)
        raise


def _name_base_by_source(folder: Path, run: RunConfig) -> None:
    """Write the base model's source into the adapter's configuration, where PEFT has written the base model's path on this pod's disk."""
    config_file = folder / "adapter_config.json"
    if config_file.exists():
        adapter_config = json.loads(config_file.read_text())
        adapter_config["base_model_name_or_path"] = redact_source(run.spec.model.source or "").removeprefix("hf://")
        config_file.write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")


def to_finetune_error(error: Exception) -> FineTuneError:
    """Convert a library's exception to MemoryExhaustedError GpuOutOfMemory, or to InternalError with the exception's type and first line."""
    import torch

    first_line = str(error).strip().split("\n")[0][:500]
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_GPU_MEMORY_PATTERN.search(str(error)):
        return MemoryExhaustedError(
            "GpuOutOfMemory", first_line, hint="lower training.batchSizePerDevice, raise gradientAccumulationSteps, or enable gradientCheckpointing"
        )  # fmt: skip
    return InternalError(type(error).__name__, first_line or type(error).__name__)


def _disable_progress_bars() -> None:
    """Turn off progress bars, because they overwrite their line, and a line in a pod's log cannot be overwritten."""
    import datasets
    from transformers.utils import logging as hf_logging

    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)
