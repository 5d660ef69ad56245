"""Small training runs of dpo, orpo, kto and reward on a CPU: measures their peak of memory, and describes them for the memory plan."""

from __future__ import annotations

import gc
import random
import tempfile
from dataclasses import dataclass, replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from finetune_api.memory.description import LOSS_HEADS
from finetune_api.memory.layers import Batch
from finetune_api.memory.replay import Reference, Step
from finetune_api.objectives import OBJECTIVES
from finetune_api.spec.enums import TrainerType

from .memory_runs import STEP_COUNT, SmallRun, add_adapter, create_base_model, find_peak_bytes

PREFERENCE_OBJECTIVES = (TrainerType.DPO, TrainerType.ORPO, TrainerType.KTO, TrainerType.REWARD)
TRAINER_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor"}
"""Names of the optimizers in TrainingArguments, by their names in `SmallRun`."""


@dataclass(frozen=True)
class PreferenceRun:
    """The configuration of one small run, which follows from its seed."""

    objective: TrainerType
    small_run: SmallRun
    """Model, method, precision and batch. `small_run.rows` is the number of pairs, or for kto the number of answers."""
    has_reference_model: bool
    """Whether an adapter is compared with a separate reference model (`trainer.dpo.referenceModel`)."""

    @staticmethod
    def draw(seed: int) -> PreferenceRun:
        """Draw a random configuration. After a change of this function, `memory_peaks_preferences.json` must be measured again."""
        objective = PREFERENCE_OBJECTIVES[seed % len(PREFERENCE_OBJECTIVES)]
        small_run, rng = SmallRun.draw(seed), random.Random(f"preferences {seed}")
        rows = rng.randrange(2, 6) if objective is TrainerType.KTO else rng.randrange(1, 4)
        return PreferenceRun(objective, replace(small_run, packs=False, rows=rows, loss_head="tiles"), rng.random() < 0.3)

    @property
    def reference(self) -> Reference:
        """The reference model that the trainer of this objective uses."""
        if OBJECTIVES[self.objective].passes_without_gradients == 0:
            return Reference.NONE
        return Reference.MODEL if self.small_run.method == "full" or self.has_reference_model else Reference.ADAPTER

    def as_step(self) -> Step:
        """Return the memory plan's description of the run."""
        small_run_step = self.small_run.as_step()
        rows = self.small_run.rows * OBJECTIVES[self.objective].sequences_per_row
        weights = replace(small_run_step.weights, has_dropout=False, has_score_head=self.objective is TrainerType.REWARD)
        batch = Batch(rows, self.small_run.tokens, has_mask=True)
        return replace(small_run_step, weights=weights, batch=batch, loss_head=LOSS_HEADS[self.objective], reference=self.reference)


def measure_preference_peak(run: PreferenceRun) -> int:
    """Train `STEP_COUNT` steps with this project's Trainer, and return the peak of torch's allocated memory in bytes, from the first step on."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(run.small_run.seed)
    gc.collect()
    gc.disable()
    try:
        with tempfile.TemporaryDirectory() as folder, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer = _create_trainer(run, folder)
            gc.collect()
            trainer.train()
    finally:
        gc.enable()
    return find_peak_bytes(profiler.profiler.kineto_results.experimental_event_tree())


def _create_trainer(run: PreferenceRun, folder: str) -> Any:
    """Build the model and the Trainer of the objective, in the same order as `finetune_trainer.train`."""
    from finetune_trainer.distributed.base import connect_trainer_class
    from finetune_trainer.method.precision import TrainedWeightsCopy, widen_trained_weights

    objective = import_module(f"finetune_trainer.objective.{run.objective}").OBJECTIVE
    model = create_base_model(run.small_run, **({"num_labels": 1} if objective.model_kind == "reward" else {}))
    model.config.pad_token_id = 0
    if run.small_run.method != "full":
        model = add_adapter(run.small_run, model)
    if run.small_run.precision == "autocast" and run.small_run.method != "full":
        widen_trained_weights(model)
    trained_weights_copy = TrainedWeightsCopy(model)
    trainer_options = {}
    if run.reference is Reference.MODEL:
        trainer_options["ref_model"] = create_base_model(run.small_run).requires_grad_(False).eval()
    elif run.reference is Reference.ADAPTER:
        trainer_options["ref_model"] = None
    trainer_class = connect_trainer_class(objective.trainer_class, SimpleNamespace(trainer_mixins=(), on_accelerator_created=lambda trainer: None))
    trainer = trainer_class(
        model=model, args=_create_arguments(run, folder), train_dataset=_create_rows(run), processing_class=_create_tokenizer(run.small_run.vocabulary),
        callbacks=[_create_training_marker()], **trainer_options,
    )  # fmt: skip
    trained_weights_copy.restore(model)
    del trained_weights_copy
    return trainer


def _create_arguments(run: PreferenceRun, folder: str) -> Any:
    from trl import DPOConfig, KTOConfig, RewardConfig
    from trl.experimental.orpo import ORPOConfig

    small_run = run.small_run
    config_class = {TrainerType.DPO: DPOConfig, TrainerType.ORPO: ORPOConfig, TrainerType.KTO: KTOConfig, TrainerType.REWARD: RewardConfig}[run.objective]
    recomputation_options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    return config_class(
        output_dir=folder, per_device_train_batch_size=small_run.rows, gradient_accumulation_steps=small_run.accumulation, max_steps=STEP_COUNT,
        learning_rate=1e-4, optim=TRAINER_OPTIMIZERS[small_run.optimizer], bf16=small_run.precision == "autocast", use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", train_sampling_strategy="sequential", dataloader_pin_memory=False, seed=small_run.seed,
        max_length=small_run.tokens if run.objective is TrainerType.ORPO else None,
        **(recomputation_options if small_run.recomputes else {"activation_checkpointing": False}),
        **({"remove_unused_columns": False} if run.objective is TrainerType.ORPO else {}),
    )  # fmt: skip


def _create_rows(run: PreferenceRun) -> Any:
    """Return random rows for all steps. The first row of each micro-batch has the most tokens."""
    from datasets import Dataset

    small_run = run.small_run
    rng, prompt_length = random.Random(small_run.seed), small_run.tokens // 3

    def draw_tokens(count: int) -> list[int]:
        return [rng.randrange(3, small_run.vocabulary) for _ in range(count)]

    rows: list[dict[str, Any]] = []
    for position in list(range(small_run.rows)) * small_run.accumulation * STEP_COUNT:
        prompt, answer = draw_tokens(prompt_length), draw_tokens(small_run.tokens - prompt_length - position * 7)
        rejected_answer = draw_tokens(len(answer) - 5)
        if run.objective is TrainerType.KTO:
            rows.append({"prompt_ids": prompt, "completion_ids": answer, "label": position % 2 == 0})
        elif run.objective is TrainerType.REWARD:
            rows.append({"chosen_ids": prompt + answer, "rejected_ids": prompt + rejected_answer})
        else:
            empty_texts = {"prompt": "", "chosen": "", "rejected": ""} if run.objective is TrainerType.ORPO else {}
            rows.append({"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": rejected_answer, **empty_texts})
    return Dataset.from_list(rows)


def _create_tokenizer(vocabulary_size: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    id_by_word = {f"w{number}": number for number in range(vocabulary_size)}
    special_tokens = {name: f"w{number}" for number, name in enumerate(("pad_token", "eos_token", "unk_token"))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(id_by_word, special_tokens["unk_token"])), **special_tokens)


def _create_training_marker() -> Any:
    """Return a callback that records the event `training` in the profile, because `find_peak_bytes` searches for this event."""
    from torch.profiler import record_function
    from transformers import TrainerCallback

    class TrainingMarker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.range = record_function("training")
            self.range.__enter__()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.range.__exit__(None, None, None)

    return TrainingMarker()
